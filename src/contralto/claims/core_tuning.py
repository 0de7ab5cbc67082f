"""The claim of Core-tuning: on few labels, contrast on hard mixtures makes fine-tuning better than cross-entropy alone.

    contralto reproduce core_tuning

The handwritten digits of scikit-learn (8 x 8): 1,200 for training without labels, of which five per class have a label for the
fine-tuning; 597 for testing. Encoder: three 3 x 3 convolutions 32-64-128 with batch norm and ReLU, strides 1, 2, 2, and mean
pooling: 128 features. Pretraining, once for all arms of a seed: SimCLR, batch 128, 500 steps, temperature 0.2, head
128-128-64, Adam at 1e-3 with a cosine. Fine-tuning: 150 steps of 64 draws from the 50 labelled digits, SGD 0.03 with
Nesterov's momentum and a cosine, the whole encoder learns. These are the pilot's; it says nothing of the views while
fine-tuning: here shifts by up to a pixel and turns by up to 15 degrees, as the paper crops and turns, for all arms.

Core-tuning is run as its released code is, in which the encoder learns through mixtures alone, and with gradient through the
unmixed rows as well. Measure: accuracy on the test digits. Untrained: the same fine-tuning of
an encoder that was not pretrained.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from contralto.claims.arms import made_once
from contralto.claims.digits import Split, batches, conv_encoder, digit_views, digits, few_labels, pretrain
from contralto.files import load_weights, save_weights
from contralto.systems.finetuning.base import FineTuning
from contralto.systems.finetuning.core_tuning import CoreTuning
from contralto.systems.selfsup.simclr import SimCLR

__all__ = ["labelled", "pooled_encoder", "pretrained_encoder", "run"]

WIDTHS = (32, 64, 128)


def pooled_encoder(seed: int) -> nn.Sequential:
    """Convolutions, and the mean over places; drawn by the seed.

    Examples
    --------
    >>> pooled_encoder(0)(torch.zeros(2, 64)).shape
    torch.Size([2, 128])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = conv_encoder(WIDTHS[-1], widths=WIDTHS)[:-2]  # without its last, linear layer
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def pretrained_encoder(seed: int, budget: Mapping[str, Any], *, device: str = "cpu") -> nn.Module:
    """The encoder after SimCLR on all training digits."""
    system = SimCLR(
        pooled_encoder(seed), num_features=WIDTHS[-1], seed=seed, epochs=int(budget["pretraining_steps"]),
        optimizer="adam", lr=1e-3, weight_decay=0.0, warmup_epochs=0, hidden=128, dim=64, temperature=0.2,
    )  # fmt: skip
    make = batches(digits(seed), seed=seed, batch_size=int(budget["pretraining_batch"]), view=digit_views)
    pretrain(system, make, device=device)
    return system.encoder.cpu()


def labelled(seed: int, per_class: int) -> Split:
    """The digits with a label, and the test digits.

    Examples
    --------
    >>> labelled(0, 5).train_labels.bincount().tolist()
    [5, 5, 5, 5, 5, 5, 5, 5, 5, 5]
    """
    split = digits(seed)
    rows = torch.from_numpy(few_labels(split.train_labels, per_class, seed))
    return split._replace(train=split.train[rows], train_labels=split.train_labels[rows])


def run(
    arm: Mapping[str, Any],
    *,
    seed: int,
    data: str,
    budget: Mapping[str, Any],
    work: Path,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune and measure one arm on one seed.

    Parameters
    ----------
    arm : mapping
        `system` ("finetuning" or "core_tuning") with its `eta` and `learn_original`; `pretrained`.
    seed : int
    data : {"digits"}
    budget : mapping
        `steps`, `batch_size`, `per_class`, `pretraining_steps`, `pretraining_batch`.
    work : path
        Where the pretrained encoder is kept for the other arms of the seed.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        `right` (N,) per test digit, `labels`.
    """
    encoder = pooled_encoder(seed)
    if arm.get("pretrained", True):
        made = made_once(
            work / f"seed{seed}",
            lambda folder: save_weights(
                pretrained_encoder(seed, budget, device=device), folder / "encoder.safetensors"
            ),
        )
        load_weights(encoder, made / "encoder.safetensors")
    if progress is not None:
        progress(0.6)
    n = int(budget["batch_size"])
    own: dict[str, Any] = {"learn_original": bool(arm["learn_original"])} if "learn_original" in arm else {}
    system = {"finetuning": FineTuning, "core_tuning": CoreTuning}[arm["system"]](
        encoder, num_features=WIDTHS[-1], num_classes=10, seed=seed, epochs=int(budget["steps"]), lr=0.03, batch_size=n,
        eta=float(arm["eta"]), micro_batch=n, **own,
    )  # fmt: skip
    split = labelled(seed, int(budget["per_class"]))

    def drawn(step: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([seed, 7, step]).integers(len(split.train), size=n)

    view = partial(digit_views, degrees=15.0, scale=0.0, shift=1.0, noise=0.0)
    make = batches(split, seed=seed, batch_size=n, view=view, views=1, rows=drawn)
    pretrain(system, make, device=device)
    return {"right": _right(system, split, device), "labels": split.test_labels.numpy()}


@torch.inference_mode()
def _right(system: FineTuning, split: Split, device: str) -> Tensor:
    """Which test digits are named rightly."""
    return (system.logits(split.test.to(device)).argmax(1).cpu() == split.test_labels).float()
