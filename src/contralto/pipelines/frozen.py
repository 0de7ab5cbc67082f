"""An encoder that stays as it is: its features of drawn views, computed once, and the layers behind it that learn on them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from contralto.data.canvas import CanvasDataset
from contralto.encoders.features import encode_batches
from contralto.encoders.heads import identity_mlp
from contralto.encoders.image import ImageEncoder
from contralto.errors import UsageError
from contralto.views.batched import BatchView, draw_batch

__all__ = ["BLOCK", "check_frozen", "features_of_view", "has_learnt", "layers_behind"]

Array = npt.NDArray[Any]
BLOCK, BATCH = 512, 64
"""Pictures between two looks at the progress, and at a time through the encoder."""


def has_learnt(arguments: Mapping[str, Any]) -> bool:
    """Whether the encoder that a job is asked for has weights: of its name, or in its folder."""
    return bool(arguments["pretrained"]) or (Path(arguments["image_encoder"]) / "encoder.json").is_file()


def check_frozen(arguments: Mapping[str, Any]) -> None:
    """Refuse to freeze an encoder that has learnt nothing, or to draw no views; `UsageError` says what to do."""
    if arguments["variants"] < 1:
        raise UsageError(f"variants must be at least 1, got {arguments['variants']}")
    if arguments["frozen"] and not has_learnt(arguments):
        raise UsageError(
            f"--frozen needs an encoder that has learnt something: {arguments['image_encoder']} begins without weights. Add "
            f"--pretrained with an encoder that has weights, such as efficientnet-lite0, or name a folder of an encoder"
        )


def layers_behind(encoder: ImageEncoder, features: Array) -> ImageEncoder:
    """Two layers for features of an encoder, which begin by centring them and giving them a mean variance of one.

    Features after a ReLU all point one way: cosines would hardly tell them apart.

    Parameters
    ----------
    encoder : ImageEncoder
    features : array (N, F)
        Some of its features, which say where their centre is.

    Examples
    --------
    >>> from contralto.encoders.image import image_encoder
    >>> x = torch.rand(50, 128) * 3 + 4
    >>> y = layers_behind(image_encoder("resnet8"), x.numpy())(x)
    >>> round(y.mean().abs().item(), 3), round(y.var(0, correction=0).mean().item(), 3)
    (0.0, 1.0)
    """
    x = features.astype(np.float32)
    mean, spread = x.mean(0), float(max(np.sqrt(x.var(0).mean()), 1e-6))
    layers = identity_mlp(encoder.num_features)
    first: Any = layers[0]
    with torch.no_grad():
        first.weight.div_(spread)
        first.bias.copy_(torch.from_numpy(-mean / spread))
    return ImageEncoder("adapter", layers, encoder.num_features, encoder.size, encoder.mean, encoder.std)


def features_of_view(
    encoder: ImageEncoder, pictures: CanvasDataset, view: BatchView, variant: int, *, seed: int, device: str
) -> Iterator[Array]:
    """Features (BLOCK, F) float16 of one drawing of a view of all pictures, block by block.

    Parameters
    ----------
    encoder : ImageEncoder
    pictures : CanvasDataset
    view : BatchView
    variant : int
        Number of the drawing; stands for the epoch.
    seed : int
    device : str
    """

    def pixels(start: int) -> Iterable[Tensor]:
        for first in range(start, min(start + BLOCK, len(pictures)), BATCH):
            rows = range(first, min(first + BATCH, len(pictures)))
            batch = pictures.__getitems__([(variant, row) for row in rows])
            place = {"seed": seed, "epoch": variant, "index": batch["index"]}
            yield draw_batch([view], batch["pictures"], batch["sizes"], **place)[0][0]

    for start in range(0, len(pictures), BLOCK):
        yield encode_batches(encoder, pixels(start), device=device)
