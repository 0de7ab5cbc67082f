"""PixPro's claim on road scenes: comparing cells gives better maps than comparing pictures, all else being equal.

Frames of CamVid without labels are learnt from; then a logistic regression on frozen cells of every fourth training frame
says the class of the cells of every second test frame. All arms have the same network, first weights, views, batches,
momentum copy and number of steps; they differ in what is compared.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from contralto.claims.arms import made_once
from contralto.claims.digits import pretrain
from contralto.data.images import decode_image, open_image
from contralto.errors import DataError
from contralto.evaluation.dense import cell_labels, confusion_matrix, dense_probe, mean_iou, propagate_labels
from contralto.systems.selfsup.pixpro import PixPro
from contralto.views.batched import BatchView, draw_batch

__all__ = ["RoadNet", "build", "camvid", "run"]

CLASSES, WIDTH, HEIGHT = 11, 160, 120
STRIDE = 8
VIEW = BatchView(
    48, scale=(0.15, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
)


class RoadNet(nn.Module):
    """Three convolutions of stride 2 and one of stride 1, each with batch norm and ReLU.

    Examples
    --------
    >>> RoadNet().forward_map(torch.zeros(2, 3, 48, 48)).shape
    torch.Size([2, 96, 6, 6])
    """

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for number, width in enumerate(widths):
            stride = 2 if number < 3 else 1
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.num_features = channels

    def forward_map(self, x: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) to cells (N, num_features, H / 8, W / 8)."""
        cells: Tensor = self.layers(x)
        return cells

    def forward(self, x: Tensor) -> Tensor:
        """The mean of the map (N, num_features)."""
        return self.forward_map(x).mean((2, 3))


def camvid(work: Path) -> dict[str, npt.NDArray[Any]]:
    """Frames (N, 3, 120, 160) and masks (N, 120, 160) of both parts, and the videos of the test frames.

    Parameters
    ----------
    work : Path
        Folder in which the decoded frames are kept for the other arms.

    Raises
    ------
    DataError
        If the data set is not there.
    """

    def make(folder: Path) -> None:
        import pyarrow.parquet as pq
        from PIL import Image

        path = Path(os.environ.get("CONTRALTO_DATA", "")) / "camvid" / "camvid240.parquet"
        if not path.is_file():
            raise DataError("camvid was not found: set CONTRALTO_DATA to the folder that holds it")
        table = pq.read_table(path, columns=["image", "mask", "split", "file"])
        for split in ("train", "test"):
            rows = [row for row in table.to_pylist() if row["split"] == split]
            frames = np.stack([_resized(decode_image(row["image"])) for row in rows])
            masks = [open_image(row["mask"]).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST) for row in rows]
            np.save(folder / f"{split}.npy", frames.transpose(0, 3, 1, 2), allow_pickle=False)
            np.save(folder / f"{split}_masks.npy", np.stack([np.asarray(m) for m in masks]), allow_pickle=False)
            videos = np.array([row["file"].split("_")[0] for row in rows])
            np.save(folder / f"{split}_videos.npy", videos, allow_pickle=False)

    folder = made_once(work / "camvid160", make)
    names = ("train", "train_masks", "test", "test_masks", "test_videos")
    return {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in names}


def _resized(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def build(arm: Mapping[str, Any], *, seed: int, steps: int) -> PixPro:
    """The system of an arm.

    Examples
    --------
    >>> build({"task": "contrast"}, seed=0, steps=3).total_steps
    3
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = RoadNet()
    return PixPro(
        encoder, num_features=encoder.num_features, seed=seed, epochs=1 if steps else 0, steps_per_epoch=max(steps, 1),
        optimizer="adam", lr=1e-3, start_lr=0.0, final_lr=1e-3, weight_decay=0.0, warmup_epochs=0, hidden=128, dim=64,
        decay=0.95, **arm,
    )  # fmt: skip


def run(
    arm: dict[str, Any],
    *,
    seed: int,
    data: str,
    budget: dict[str, Any],
    device: str,
    progress: Callable[[float], None],
    work: Path,
) -> dict[str, Any]:
    """Train one arm on one seed and probe its map.

    Returns
    -------
    dict
        `miou` of the linear probe and `miou_neighbours` of a vote of the nearest cells; `cells` (N,): share of right cells
        of every test frame, of which `groups` names the video.
    """
    settings = dict(arm)
    steps = int(settings.pop("steps", budget["steps"]))
    system = build(settings, seed=seed, steps=steps)
    frames = camvid(work)
    pictures = torch.from_numpy(frames["train"]).contiguous(memory_format=torch.channels_last)
    size = min(budget["batch_size"], len(pictures))

    def make(step: int) -> dict[str, Any]:
        progress(step / steps)
        epoch, place = divmod(step, len(pictures) // size)
        order = np.random.default_rng([seed, 3, epoch]).permutation(len(pictures))[place * size : (place + 1) * size]
        index = torch.from_numpy(order)
        views, boxes = draw_batch([VIEW, VIEW], pictures[index], seed=seed, epoch=epoch, index=index)
        return {"views": views, "boxes": boxes, "index": index}

    pretrain(system, make, device=device)
    few = budget["frames"]  # a quick look takes every so-and-so-many-th of the frames
    train, test = slice(None, None, 4 * few), slice(None, None, 2 * few)
    maps, test_maps = (_maps(system, frames[part][rows], device) for part, rows in (("train", train), ("test", test)))
    cells = (HEIGHT // STRIDE, WIDTH // STRIDE)
    labels = cell_labels(frames["train_masks"][train], *cells, classes=CLASSES)
    truth = cell_labels(frames["test_masks"][test], *cells, classes=CLASSES)
    said = dense_probe(maps, labels, test_maps, C=0.1, cells=4000, seed=seed)
    voted = propagate_labels(maps, labels, test_maps, k=10, cells=4000, seed=seed)
    there = (truth >= 0).sum((1, 2))
    return {
        "miou": mean_iou(confusion_matrix(truth, said, classes=CLASSES)),
        "miou_neighbours": mean_iou(confusion_matrix(truth, voted, classes=CLASSES)),
        "cells": ((said == truth) & (truth >= 0)).sum((1, 2)) / np.maximum(there, 1),
        "groups": frames["test_videos"][test],
    }


@torch.inference_mode()
def _maps(system: PixPro, frames: npt.NDArray[np.uint8], device: str) -> npt.NDArray[np.float32]:
    """The maps of whole frames."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (VIEW.mean, VIEW.std))
    found = []
    for part in torch.from_numpy(frames).split(32):
        [cells] = system.maps(((part / 255 - mean) / std).to(device))
        found.append(cells.float().cpu().numpy())
    return np.concatenate(found)
