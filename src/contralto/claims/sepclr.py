"""The claim of SepCLR: maximising the joint entropy of both codes cuts what the common one tells about the salient pattern.

    contralto reproduce sepclr

Background: patches of scikit-learn's two photographs, 16 x 16 pixels. Target: other such patches in which a handwritten digit
of scikit-learn is blended (half and half). The digit is the salient label; the common one is where the patch comes from, one of
four: left or right half of either photograph. Cells of the photographs, and digits, are either for training or for testing.

Two convolutional encoders (32-64-64, stride 2) and codes of width 16, tau 0.5, Adam at 1e-3, batch 256, 300 steps, both beta 100:
the pilot's recipe. Views are SepCLR's without mirroring and with crops from three quarters of the area on. That was chosen on
seed 100: with half of the area, all arms told fewer digits. Arms, in pairs over seeds: *sepclr* (lambda 10); *no jem* (lambda
0); *plain*, two contrastive encoders to which all images are targets (lambda 0, nothing is pulled to the origin).

Measures, by a logistic probe on the codes of target images: digits told by the common code (leakage: lower is better) and by the
salient one, the common label by either; and which set an image belongs to, by either.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.claims.digits import digits, features_of, pretrain
from contralto.evaluation.representation import probe_right
from contralto.systems.selfsup.sepclr import SepCLR
from contralto.views.batched import BatchView, draw_batch

__all__ = ["Blended", "blended", "run"]

SIDE = 16
CELL, PATCH = 48, 32
"""Pixels of a photograph: cells are either for training or for testing, patches lie in one cell and are halved."""
DIM = 16
HALF = (0.5, 0.5, 0.5)


class Blended(NamedTuple):
    """Images (N, 3, 16, 16) uint8, whether each is a target, its digit (-1 for the background), and where it comes from."""

    images: Tensor
    target: Tensor
    digit: Tensor
    place: Tensor


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
        Arguments of the system; `alike` makes every image a target, `steps` goes before the budget's.
    seed : int
    data : {"photographs"}
    budget : mapping
        `steps`, `batch_size`.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        Per test image with a digit, 1 where the probe is right, of ``<label>_from_<code>`` with the labels `digit` and `place`
        and the codes `common` and `salient`; `labels`, the digits; and the shares `set_from_common`, `set_from_salient` over all
        test images.

    Examples
    --------
    >>> found = run({}, seed=100, data="photographs", budget={"steps": 2, "batch_size": 16})
    >>> sorted(k for k in found if k.startswith("digit"))
    ['digit_from_common', 'digit_from_salient']
    """
    arm = dict(arm)
    steps, alike = int(arm.pop("steps", budget["steps"])), bool(arm.pop("alike", False))
    train, test = blended(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _encoder()
    system = SepCLR(
        encoder, num_features=256, common_dim=DIM, salient_dim=DIM, lr=1e-3, seed=seed, epochs=steps,
        batch_size=int(budget["batch_size"]), **({"beta_salient": 100.0, "beta_reg": 100.0} | arm),
    )  # fmt: skip
    pretrain(system, _batches(train, seed, system.batch_size, alike), device=device)
    if progress is not None:
        progress(0.9)
    found: dict[str, Any] = {"labels": test.digit[test.target].numpy()}
    for code in ("common", "salient"):
        system.use = code
        parts = [(features_of(system, _scaled(part.images)), part) for part in (train, test)]
        for label in ("digit", "place"):
            known = [(x[p.target.numpy()], getattr(p, label)[p.target].numpy()) for x, p in parts]
            found[f"{label}_from_{code}"] = probe_right(*known[0], *known[1])
        sets = [(x, p.target.long().numpy()) for x, p in parts]
        found[f"set_from_{code}"] = float(probe_right(*sets[0], *sets[1]).mean())
    return found


def blended(seed: int) -> tuple[Blended, Blended]:
    """Training and test images of a seed: as many with a digit as without.

    Examples
    --------
    >>> train, test = blended(0)
    >>> train.images.shape, int(test.target.sum())
    (torch.Size([2400, 3, 16, 16]), 597)
    """
    split = digits(seed)
    rng = np.random.default_rng([seed, 21])
    cells = _cells()
    order = rng.permutation(len(cells))
    held = order[: len(cells) * 2 // 5]
    parts = []
    for chosen, x, y in (
        (np.setdiff1d(order, held), split.train, split.train_labels),
        (held, split.test, split.test_labels),
    ):
        patches, place = _patches(cells[rng.choice(chosen, 2 * len(x))], rng)
        shown = F.interpolate(x.view(-1, 1, 8, 8), size=(SIDE, SIDE), mode="bilinear")
        target = torch.arange(2 * len(x)) < len(x)
        images = 0.5 * patches
        images[: len(x)] += 0.5 * shown
        digit = torch.where(target, F.pad(y, (0, len(x))), -1)
        parts.append(Blended((255 * images).round().to(torch.uint8), target, digit, place))
    return parts[0], parts[1]


@cache
def _photographs() -> list[npt.NDArray[np.uint8]]:
    from sklearn.datasets import load_sample_images

    return [np.asarray(image) for image in load_sample_images().images]


def _cells() -> npt.NDArray[np.int64]:
    """Photograph, top and left of every cell (N, 3)."""
    height, width = _photographs()[0].shape[:2]
    grid = np.meshgrid(range(len(_photographs())), range(height // CELL), range(width // CELL), indexing="ij")
    return np.asarray(np.stack(grid, -1).reshape(-1, 3) * np.array([1, CELL, CELL]))


def _patches(cells: npt.NDArray[np.int64], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A patch (N, 3, 16, 16) in [0, 1] at a random place of each cell, and the label of that place (N,)."""
    photographs = np.stack(_photographs())
    corner = cells[:, 1:] + rng.integers(0, CELL - PATCH + 1, (len(cells), 2))
    rows, columns = (corner[:, k, None] + np.arange(PATCH) for k in range(2))
    pixels = photographs[cells[:, 0, None, None], rows[:, :, None], columns[:, None, :]]
    half = cells[:, 2] + CELL / 2 > photographs.shape[2] / 2
    small = F.avg_pool2d(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, PATCH // SIDE)
    return small, torch.from_numpy(2 * cells[:, 0] + half)


def _encoder() -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten())


def _batches(part: Blended, seed: int, size: int, alike: bool) -> Callable[[int], dict[str, Any]]:
    """Step -> batch of two views, half of it background."""
    view = BatchView(SIDE, scale=(0.75, 1.0), flip=0.0, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, mean=HALF, std=HALF)
    half = size // 2
    sets = [np.flatnonzero(part.target.numpy() == member) for member in (False, True)]
    rounds = min(map(len, sets)) // half

    def make(step: int) -> dict[str, Any]:
        epoch, place = divmod(step, rounds)
        rows = [
            np.random.default_rng([seed, 22, epoch, member]).permutation(own)[place * half : (place + 1) * half]
            for member, own in enumerate(sets)
        ]
        index = torch.from_numpy(np.concatenate(rows))
        views, _ = draw_batch([view, view], part.images[index], None, seed=seed, epoch=epoch, index=index)
        label = part.target[index].long()
        return {"views": views, "index": index, "label": torch.ones_like(label) if alike else label}

    return make


def _scaled(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.5) / 0.5
