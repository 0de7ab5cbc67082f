"""Pure functions: tensors in, a scalar or a loss per sample out; and modules that keep the functions' settings."""

from contralto.losses.modules import CLIP, DCL, InfoNCE, NTXent, SigLIP, SupCon, Temperature
from contralto.losses.pairs import (
    clip,
    dcl,
    focal,
    hard_negative,
    hardest,
    info_nce,
    nt_xent,
    siglip,
    soft_info_nce,
    sup_con,
)  # fmt: skip

__all__ = [
    "CLIP", "DCL", "InfoNCE", "NTXent", "SigLIP", "SupCon", "Temperature",
    "clip", "dcl", "focal", "hard_negative", "hardest", "info_nce", "nt_xent", "siglip", "soft_info_nce", "sup_con",
]  # fmt: skip
