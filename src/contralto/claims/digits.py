"""Small real data for claims, the views of them, a small network and the loop: what most paired experiments here need.

Everything is a function of the seed, so that the arms of one seed see the same data, views and order.
"""

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.images import decode_image
from contralto.errors import DataError
from contralto.systems.base import EncoderSystem

__all__ = [
    "Split",
    "batches",
    "cifar",
    "conv_encoder",
    "digit_views",
    "digits",
    "features_of",
    "few_labels",
    "mlp_encoder",
    "pretrain",
    "split_features",
    "thinned",
]  # fmt: skip

SIDE = 8


class Split(NamedTuple):
    """Samples in two parts: `train`, `test` tensors (N, ...) and their labels (N,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def digits(seed: int, *, test: int = 597) -> Split:
    """The 1,797 handwritten digits of scikit-learn (8 x 8) as vectors (N, 64) in [0, 1], split at random.

    Examples
    --------
    >>> digits(0).train.shape, digits(0).test.shape
    (torch.Size([1200, 64]), torch.Size([597, 64]))
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.data / 16).float()
    y = torch.from_numpy(found.target).long()
    order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(x)))
    held, kept = order[:test], order[test:]
    return Split(x[kept], y[kept], x[held], y[held])


def cifar(seed: int, *, per_class: int, test: int = 2000, size: int = 32) -> Split:
    """Pictures (N, 3, size, size) in [0, 1] of CIFAR-10, from `CONTRALTO_DATA`; `per_class` drawn for training.

    Raises
    ------
    DataError
        If the data set is not there.
    """
    import pyarrow.parquet as pq

    folder = Path(os.environ.get("CONTRALTO_DATA", "")) / "cifar10n"
    if not (folder / "train.parquet").is_file():
        raise DataError("cifar10n was not found: set CONTRALTO_DATA to the folder that holds it")
    tables = {s: pq.read_table(folder / f"{s}.parquet", columns=["image", "label"]) for s in ("train", "test")}
    labels = {s: t.column("label").to_numpy().astype(np.int64) for s, t in tables.items()}
    rng = np.random.default_rng([seed, 2])
    order = rng.permutation(len(labels["train"]))
    train = np.concatenate([order[labels["train"][order] == c][:per_class] for c in range(10)])
    held = np.sort(rng.permutation(len(labels["test"]))[:test])

    def read(part: str, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        pictures = [decode_image(data) for data in tables[part].column("image").take(rows).to_pylist()]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        if size != pixels.shape[-1]:
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        return pixels, torch.from_numpy(labels[part][rows])

    return Split(*read("train", train), *read("test", held))


def thinned(split: Split, sizes: Sequence[int], seed: int) -> Split:
    """The split with fewer training samples: as many of a class as `sizes` says, classes in an order drawn by the seed.

    Examples
    --------
    >>> thinned(digits(0), [5] * 9 + [100], seed=0).train_labels.bincount().sort().values[[0, -1]]
    tensor([  5, 100])
    """
    rng, labels = np.random.default_rng([seed, 5]), split.train_labels.numpy()
    place, order = rng.permutation(len(sizes)), rng.permutation(len(labels))
    rows = np.sort(np.concatenate([order[labels[order] == c][: sizes[place[c]]] for c in range(len(sizes))]))
    return split._replace(train=split.train[rows], train_labels=split.train_labels[rows])


def few_labels(labels: Tensor, per_class: int, seed: int) -> npt.NDArray[np.int64]:
    """Rows of some samples of every class, drawn by the seed: those whose labels a probe may see.

    Examples
    --------
    >>> len(few_labels(digits(0).train_labels, 3, seed=0))
    30
    """
    found, order = labels.numpy(), np.random.default_rng([seed, 6]).permutation(len(labels))
    return np.concatenate([order[found[order] == c][:per_class] for c in np.unique(found)])


def digit_views(
    x: Tensor,
    generator: torch.Generator,
    *,
    degrees: float = 20.0,
    scale: float = 0.2,
    shift: float = 1.0,
    noise: float = 0.1,
    contrast: tuple[float, float] = (1.0, 1.0),
    erase: int = 0,
) -> Tensor:
    """One random view of every digit.

    Parameters
    ----------
    x : Tensor (B, 64)
        In [0, 1].
    generator : torch.Generator
    degrees, scale, shift : float
        Largest rotation, relative change of size, and shift in pixels, drawn uniformly.
    noise : float
        Standard deviation of what is added to every pixel.
    contrast : tuple of float
        Range of a factor.
    erase : int
        Side of a square that is set to 0, at a place drawn uniformly; 0 = none.

    Returns
    -------
    Tensor (B, 64)

    Examples
    --------
    >>> digit_views(torch.rand(5, 64), torch.Generator().manual_seed(0)).shape
    torch.Size([5, 64])
    """
    n = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    angle = torch.deg2rad(uniform(-degrees, degrees))
    zoom = uniform(1 - scale, 1 + scale)
    across, down = uniform(-shift, shift) * 2 / SIDE, uniform(-shift, shift) * 2 / SIDE
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    theta = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = F.affine_grid(theta, [n, 1, SIDE, SIDE], align_corners=False)
    out = F.grid_sample(x.view(n, 1, SIDE, SIDE), grid, align_corners=False).flatten(1)
    if contrast != (1.0, 1.0):
        out = out * uniform(*contrast).unsqueeze(1)
    if erase:
        corner = torch.randint(SIDE - erase + 1, (n, 2), generator=generator)
        place = torch.arange(SIDE)
        inside = (place >= corner[..., None]) & (place < corner[..., None] + erase)  # (n, 2, SIDE)
        out = out * ~(inside[:, 0, :, None] & inside[:, 1, None, :]).flatten(1)
    return out + noise * torch.randn(out.shape, generator=generator)


def mlp_encoder(sizes: tuple[int, ...] = (64, 256, 128)) -> nn.Sequential:
    """Linear layers, each with batch norm and ReLU.

    Examples
    --------
    >>> mlp_encoder()(torch.zeros(2, 64)).shape
    torch.Size([2, 128])
    """
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layers += [nn.Linear(width_in, width_out, bias=False), nn.BatchNorm1d(width_out), nn.ReLU()]
    return nn.Sequential(*layers)


def conv_encoder(
    num_features: int, *, widths: tuple[int, ...] = (16, 32, 64), height: int = SIDE, width: int = SIDE
) -> nn.Sequential:
    """Convolutions of 3 x 3 with batch norm and ReLU, all but the first with stride 2, and a linear layer; for grey pictures.

    Parameters
    ----------
    num_features : int
    widths : tuple of int
        Channels.
    height, width : int
        Of a picture, which comes as a vector (height * width,).

    Examples
    --------
    >>> conv_encoder(64, height=8, width=18)(torch.zeros(2, 144)).shape
    torch.Size([2, 64])
    """
    layers: list[nn.Module] = [nn.Unflatten(1, (1, height, width))]
    for place, (width_in, width_out) in enumerate(pairwise((1, *widths))):
        stride = 2 if place else 1
        layers += [nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()]
        height, width = -(-height // stride), -(-width // stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * height * width, num_features))


def batches(
    split: Split,
    *,
    seed: int,
    batch_size: int,
    view: Callable[[Tensor, torch.Generator], Tensor],
    views: int = 2,
    rows: Callable[[int], npt.NDArray[np.int64]] | None = None,
) -> Callable[[int], dict[str, Any]]:
    """Step -> batch of the training part; passes over it in new orders, last incomplete batches are left out.

    Parameters
    ----------
    split : Split
    seed : int
    batch_size : int
        More than there are samples means all of them.
    view : function
        Samples (B, ...) and a generator to one view of them.
    views : int
    rows : function, optional
        Step -> rows of its batch, where they come in another order.

    Examples
    --------
    >>> make = batches(digits(0), seed=0, batch_size=32, view=digit_views)
    >>> make(0)["views"][1].shape, bool((make(3)["index"] == make(3)["index"]).all())
    (torch.Size([32, 64]), True)
    """
    n = len(split.train)
    size = min(batch_size, n)

    def make(step: int) -> dict[str, Any]:
        epoch, place = divmod(step, n // size)
        if rows is None:
            order = np.random.default_rng([seed, 3, epoch]).permutation(n)[place * size : (place + 1) * size]
        else:
            order = rows(step)
        index = torch.from_numpy(order)
        generator = torch.Generator().manual_seed(int(np.random.default_rng([seed, 4, step]).integers(2**62)))
        x = split.train[index]
        return {
            "views": [view(x, generator) for _ in range(views)],
            "index": index,
            "label": split.train_labels[index],
        }

    return make


def pretrain(
    system: EncoderSystem, make_batch: Callable[[int], dict[str, Any]], *, device: str = "cpu", log: bool = False
) -> list[dict[str, float]]:
    """Train a system for its `total_steps` in a plain loop; it is in evaluation mode afterwards.

    Parameters
    ----------
    system : EncoderSystem
        With its seed, epochs and steps per epoch set.
    make_batch : function
        Step -> batch.
    device : str
    log : bool
        Give back what every step said.

    Examples
    --------
    >>> from contralto.systems.selfsup.simclr import SimCLR
    >>> system = SimCLR(mlp_encoder((64, 16)), num_features=16, hidden=16, dim=8, epochs=1, steps_per_epoch=3, optimizer="adam")
    >>> len(pretrain(system, batches(digits(0), seed=0, batch_size=16, view=digit_views), log=True))
    3
    """
    told = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(system.seed)  # dropout and its like
        system.to(device).train()
        [optimizer], [schedule] = system.optimizers_and_schedules()
        for step in range(system.total_steps):
            batch = {k: _to(v, device) for k, v in make_batch(step).items()}
            out = system.step(batch)
            out["loss"].backward()
            system.on_before_optimizer_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            system.at_step_end()
            if log:
                told.append({k: float(v.detach()) for k, v in out.items() if k != "features"})
    system.eval()
    return told


@torch.inference_mode()
def features_of(system: EncoderSystem, x: Tensor, *, batch_size: int = 512) -> npt.NDArray[np.float32]:
    """What `system.embed` gives for samples (N, ...), as an array (N, F).

    Examples
    --------
    >>> from contralto.systems.selfsup.simclr import SimCLR
    >>> features_of(SimCLR(mlp_encoder((64, 16)), num_features=16, hidden=16, dim=8).eval(), digits(0).test).shape
    (597, 16)
    """
    device = next(system.parameters()).device
    return np.concatenate([system.embed(part.to(device)).float().cpu().numpy() for part in x.split(batch_size)])


def split_features(system: EncoderSystem, split: Split) -> tuple[npt.NDArray[Any], ...]:
    """Features and labels of the training part, features and labels of the test part, as `knn_right` takes them.

    Examples
    --------
    >>> from contralto.systems.selfsup.simclr import SimCLR
    >>> system = SimCLR(mlp_encoder((64, 16)), num_features=16, hidden=16, dim=8).eval()
    >>> [len(x) for x in split_features(system, digits(0))]
    [1200, 1200, 597, 597]
    """
    train, test = features_of(system, split.train), features_of(system, split.test)
    return train, split.train_labels.numpy(), test, split.test_labels.numpy()


def _to(value: Any, device: str) -> Any:
    return [v.to(device) for v in value] if isinstance(value, list) else value.to(device)
