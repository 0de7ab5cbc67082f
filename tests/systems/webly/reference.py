"""Values of the official code, and the tiny network that they belong to."""

from pathlib import Path

import numpy as np
import torch


def load(file):
    return np.load(Path(__file__).parents[2] / "reference" / file, allow_pickle=False)


def reference_case(arrays, case):
    return {k.removeprefix(f"{case}__"): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(f"{case}__")}


@torch.no_grad()
def fill(system, ref):
    """Put the state before the step into a system of the same shape."""
    for ours, theirs in (("projector", "projection"), ("reconstructor", "projection_back")):
        for layer in (0, 2):
            getattr(system, ours)[layer].weight.copy_(ref[f"init__{theirs}.{layer}.weight"])
            getattr(system, ours)[layer].bias.copy_(ref[f"init__{theirs}.{layer}.bias"])
    system.encoder.weight.copy_(ref["init__encoder_q.weight"])
    system.momentum_encoder.weight.copy_(ref["init__encoder_k.weight"])
    system.classifier.weight.copy_(ref["init__classifier.fc.weight"])
    system.queue.keys.copy_(ref["init__queue"].T)
    system.queue.pointer.copy_(ref["init__queue_ptr"][0])
    system.prototypes.copy_(ref["init__prototypes"])
