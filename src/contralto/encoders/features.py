"""Features computed once: a cache of arrays under a fingerprint, and the pass that fills it, here or on a cluster."""

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from contralto.cluster import has_gpus
from contralto.encoders.pictures import PictureBlock, PictureReader
from contralto.errors import ContraltoError
from contralto.files import save_array, write_atomically
from contralto.views.image import EvalView, View

__all__ = ["EncodePictures", "cached_array", "device_of", "encode_batches"]


def cached_array(
    folder: str | Path,
    name: str,
    key: Mapping[str, Any],
    compute: Callable[[], npt.NDArray[Any] | Iterable[npt.NDArray[Any]]],
    *,
    rows: int | None = None,
) -> npt.NDArray[Any]:
    """An array that is computed once and then read from disk.

    Parameters
    ----------
    folder : path
    name : str
        Beginning of the file name.
    key : mapping
        Everything on which the array depends, JSON-able; another key is another file.
    compute : function
        Called when there is no file, or when it cannot be read (with a warning).
    rows : int, optional
        `compute` gives the array in parts, which have so many rows together; they go to the disk one by one.

    Returns
    -------
    array
        Memory-mapped, read-only.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> cached_array(folder, "x", {"a": 1}, lambda: np.arange(3)).tolist()
    [0, 1, 2]
    >>> cached_array(folder, "x", {"a": 1}, lambda: 1 / 0).tolist()
    [0, 1, 2]
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(key), sort_keys=True)
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npy"
    if path.exists():
        try:
            return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, OSError) as error:
            warnings.warn(f"{path} cannot be read ({error}) and is computed again", stacklevel=2)
    computed = compute()
    if isinstance(computed, np.ndarray):
        save_array(computed, path)
    else:
        write_atomically(path, lambda part: _write_parts(computed, rows or 0, part))
    write_atomically(path.with_suffix(".json"), lambda part: part.write_text(text, encoding="utf-8"))
    return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _write_parts(parts: Iterable[npt.NDArray[Any]], rows: int, path: Path) -> None:
    """A `.npy` file, part by part."""
    written = 0
    with path.open("wb") as file:
        for part in parts:
            if not written:
                shape = (rows, *part.shape[1:])
                form = {"descr": np.lib.format.dtype_to_descr(part.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, form)
            file.write(np.ascontiguousarray(part).data)
            written += len(part)
    if written != rows:
        raise ContraltoError(f"{path}: {written} of {rows} rows were computed")


class EncodePictures:
    """Features of pictures of a manifest, block by block: the work for `contralto.cluster.map_blocks`.

    Parameters
    ----------
    encoder : nn.Module
    device : str
    root : str
        `Manifest.root`.
    view : View or EvalView
        What is drawn of each picture.
    variant : int
        Stands for the epoch in the drawing of views.
    """

    def __init__(self, encoder: nn.Module, device: str, root: str, view: View | EvalView, variant: int = 0) -> None:
        self.encode = _Encoding(encoder, device)
        self.pictures = PictureReader(root, view, variant)

    def __call__(self, block: PictureBlock) -> npt.NDArray[np.float16]:
        """Features (N, D) of the pictures of a block."""
        return self.encode(self.pictures.batches(block))


def device_of(accelerator: str, on: str | None = None) -> str:
    """The device for an encoder where a training has this `accelerator`; on a cluster, that of its machines.

    Examples
    --------
    >>> device_of("cpu"), device_of("mps")
    ('cpu', 'mps')
    """
    there = torch.cuda.is_available() if on is None else has_gpus(on)
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and there):
        return "cuda"
    return "mps" if accelerator == "mps" else "cpu"


def encode_batches(encoder: nn.Module, batches: Iterable[Tensor], *, device: str = "cpu") -> npt.NDArray[np.float16]:
    """Run an encoder over batches of pixels.

    Parameters
    ----------
    encoder : nn.Module
        Set to evaluation mode.
    batches : iterable of Tensor (B, 3, S, S)
    device : str

    Returns
    -------
    array (N, D) float16
        Half precision: the cache is half as large, and features of a frozen network need no more.

    Examples
    --------
    >>> encode_batches(nn.Flatten(), [torch.ones(2, 3, 1, 1)]).shape
    (2, 3)
    """
    return _Encoding(encoder, device)(batches)


class _Encoding:
    """An encoder on its device, folded when the first batch is there."""

    def __init__(self, encoder: nn.Module, device: str) -> None:
        self.encoder, self.device, self.is_folded = encoder.eval().to(device), device, False

    def __call__(self, batches: Iterable[Tensor]) -> npt.NDArray[np.float16]:
        rows: list[npt.NDArray[np.float16]] = []
        with torch.inference_mode():
            for batch in batches:
                x = batch.to(self.device, memory_format=torch.channels_last)
                if not self.is_folded:
                    self.encoder, self.is_folded = (
                        _folded(self.encoder.to(memory_format=torch.channels_last), x[:2]),
                        True,
                    )
                rows.append(self.encoder(x).float().cpu().numpy().astype(np.float16))
        return np.concatenate(rows)


def _folded(encoder: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose batch norms are part of the convolutions before them, which is 1.2 to 1.6 times as fast on a CPU.

    A norm is taken to follow the convolution that its parent names just before it. Where that is wrong, the answer to `x` is
    another one, and the encoder stays as it is.
    """
    folded = copy.deepcopy(encoder)
    for parent in list(folded.modules()):
        parts = list(parent.named_children())
        for (_, before), (name, norm) in pairwise(parts):
            if not (isinstance(before, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
                continue
            if norm.track_running_stats and before.out_channels == norm.num_features:
                fused = fuse_conv_bn_eval(before, norm)
                before.weight, before.bias = fused.weight, fused.bias
                setattr(parent, name, getattr(norm, "act", nn.Identity()))  # timm's norms hold their activation
    folded = folded.to(memory_format=torch.channels_last)
    expected, found = encoder(x), folded(x)
    return folded if (found - expected).abs().max() <= 1e-3 * expected.abs().max() else encoder
