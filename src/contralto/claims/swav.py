"""The claims of SwAV: the even spread over prototypes prevents collapse, and swapped prediction then learns useful features.

    contralto reproduce swav

CIFAR-10 pictures, 400 per class for training and for the probe, 2,000 for testing, resized to 24 pixels. Encoder: four 3 x 3
convolutions 24-48-96-96 with batch norm and ReLU, strides 2, 2, 2, 1, and mean pooling; head 96-128-64; 60 prototypes that
are frozen for 30 steps; Adam at 1e-3 with a cosine, batch 128, 10 epochs: the pilot's recipe. The pilot does not name its
colours; SimCLR's for CIFAR are taken (half strength, no blur), for all arms.

Arms: *swav*, two crops of 0.2 to 1 of the area; *softmax*, the same with codes from a softmax at the same epsilon; *multi-crop*,
two crops of 0.3 to 1 and four of 12 pixels and 0.08 to 0.3; *untrained*. Measures: how many prototypes are in use for the test
pictures (perplexity of the mean prediction); nearest neighbours (20, tau 0.07) and a linear probe on the features of the encoder.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.claims.digits import Split, cifar, features_of, pretrain
from contralto.evaluation.representation import knn_right, probe_right
from contralto.systems.selfsup.swav import SwAV, perplexity
from contralto.views.batched import BatchView, draw_batch
from contralto.views.presets import multi_crop

__all__ = ["picture_batches", "run", "small_encoder"]

SIDE, HALF = 24, (0.5, 0.5, 0.5)


def small_encoder(widths: tuple[int, ...] = (24, 48, 96, 96), strides: tuple[int, ...] = (2, 2, 2, 1)) -> nn.Sequential:
    """Convolutions 3 x 3 with batch norm and ReLU, and the mean over places.

    Examples
    --------
    >>> small_encoder()(torch.zeros(2, 3, 24, 24)).shape
    torch.Size([2, 96])
    """
    layers: list[nn.Module] = []
    for width_in, width_out, stride in zip((3, *widths), widths, strides, strict=False):
        layers += [nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def picture_batches(
    pictures: Tensor, views: list[BatchView], *, seed: int, batch_size: int
) -> tuple[Callable[[int], dict[str, Any]], int]:
    """Step -> batch of views of pictures (N, 3, H, W) in [0, 1], passes in new orders; and the steps of a pass.

    Examples
    --------
    >>> make, steps = picture_batches(torch.rand(10, 3, 24, 24), multi_crop(24), seed=0, batch_size=4)
    >>> make(0)["views"][1].shape, steps
    (torch.Size([4, 3, 24, 24]), 2)
    """
    pixels = (pictures * 255).round().to(torch.uint8)
    size = min(batch_size, len(pixels))
    steps = len(pixels) // size

    def make(step: int) -> dict[str, Any]:
        epoch, place = divmod(step, steps)
        order = np.random.default_rng([seed, 3, epoch]).permutation(len(pixels))[place * size : (place + 1) * size]
        index = torch.from_numpy(order)
        drawn, _ = draw_batch(views, pixels[index], None, seed=seed, epoch=epoch, index=index)
        return {"views": drawn, "index": index}

    return make, steps


def run(
    arm: Mapping[str, Any],
    *,
    seed: int,
    data: str,
    budget: Mapping[str, Any],
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Train and measure one arm on one seed.

    Parameters
    ----------
    arm : mapping
        `sinkhorn_iterations`, `small_crops`; `epochs` where they are not the budget's.
    seed : int
    data : {"cifar10"}
    budget : mapping
        `epochs`, `batch_size`, `per_class`, `test`.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        `knn` and `probe` (N,) per test picture, `labels`; `perplexity`.
    """
    split = cifar(seed, per_class=int(budget["per_class"]), test=int(budget["test"]), size=SIDE)
    small = int(arm.get("small_crops", 0))
    scale, tiny = ((0.3, 1.0), (0.08, 0.3)) if small else ((0.2, 1.0), (0.05, 0.14))
    views = multi_crop(
        SIDE, SIDE // 2, small, scale=scale, small_scale=tiny, strength=0.5, blur=0.0, mean=HALF, std=HALF
    )
    make, steps = picture_batches(split.train, views, seed=seed, batch_size=int(budget["batch_size"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = small_encoder()
    system = SwAV(
        encoder, num_features=96, seed=seed, epochs=int(arm.get("epochs", budget["epochs"])), steps_per_epoch=steps,
        batch_size=int(budget["batch_size"]), optimizer="adam", lr=1e-3, weight_decay=0.0, warmup_epochs=0, start_lr=0.0,
        final_lr=0.0, hidden=128, dim=64, num_prototypes=[60], freeze_steps=30, check_every=0,
        sinkhorn_iterations=int(arm.get("sinkhorn_iterations", 3)),
    )  # fmt: skip
    pretrain(system, make, device=device)
    if progress is not None:
        progress(0.8)
    plain = Split(2 * split.train - 1, split.train_labels, 2 * split.test - 1, split.test_labels)
    parts = (
        features_of(system, plain.train), plain.train_labels.numpy(), features_of(system, plain.test),
        plain.test_labels.numpy(),
    )  # fmt: skip
    return {
        "knn": knn_right(*parts, k=20, temperature=0.07),
        "probe": probe_right(*parts),
        "labels": parts[3],
        "perplexity": _in_use(system, plain.test),
    }


@torch.inference_mode()
def _in_use(system: SwAV, pictures: Tensor) -> float:
    """How many prototypes the predictions for some pictures use."""
    weight = system.prototypes[0].weight
    assert isinstance(weight, Tensor)
    z = F.normalize(system.projector(system.encoder(pictures.to(weight.device))), dim=1)
    return float(perplexity((z @ F.normalize(weight, dim=1).T / system.temperature).softmax(1)))
