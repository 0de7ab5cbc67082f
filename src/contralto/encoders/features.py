"""Features computed once: a cache of arrays under a fingerprint, and the pass that fills it."""

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

from contralto.files import save_array, write_atomically

__all__ = ["cached_array", "encode_batches"]


def cached_array(
    folder: str | Path, name: str, key: Mapping[str, Any], compute: Callable[[], npt.NDArray[Any]]
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
    array = compute()
    save_array(array, path)
    write_atomically(path.with_suffix(".json"), lambda part: part.write_text(text, encoding="utf-8"))
    return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))


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
    encoder = encoder.eval().to(device).to(memory_format=torch.channels_last)
    rows: list[npt.NDArray[np.float16]] = []
    with torch.inference_mode():
        for batch in batches:
            x = batch.to(device, memory_format=torch.channels_last)
            if not rows:
                encoder = _folded(encoder, x[:2])
            rows.append(encoder(x).float().cpu().numpy().astype(np.float16))
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
