"""PixPro: cells of two views' feature maps that show the same place agree, so that the map is useful and not only its mean.

Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual Representation Learning, Xie et al., CVPR 2021,
arXiv 2011.10043. Instance discrimination compares whole pictures and loses where things are. Here the boxes of the views tell
which cells of one map belong to which of the other (positives). *Consistency* (PixPro) draws a cell of one view, smoothed by the
cells of its own view that resemble it, towards its positives of the other view as a slowly moving copy of the network sees them;
there are no negatives. *Contrast* (PixContrast) finds the positives among all cells of the other view.

The authors' code (zdaxie/PixPro) is followed where it differs from the paper: the loss is twice the paper's (`scale`), the
values of the propagation are scaled to length one before they are summed, the instance branch is a consistency of pooled maps.
PixContrast and the training of a pyramid are not in the code and follow the paper. Layers before a batch norm have no bias here,
which changes no output.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, mean_weight, rank, world_size
from contralto.encoders.heads import mlp
from contralto.errors import UsageError
from contralto.losses.contrast import contrast
from contralto.losses.pixels import pixel_consistency, pixel_contrast, positive_cells, propagate
from contralto.memory.momentum import momentum_copy, momentum_update
from contralto.systems.base import EncoderSystem, Optimizer

__all__ = ["PixPro"]


class PixPro(EncoderSystem):
    """Consistency or contrast between cells, with a comparison of whole pictures beside it or in its place.

    Parameters
    ----------
    encoder : nn.Module
        With ``forward_map(x)`` for a map (B, num_features, h, w), or ``forward_maps(x)`` for several of one width (a pyramid, the
        losses of whose levels are averaged); without either, the encoder itself must give the map.
    **base
        See `EncoderSystem`. The paper's rate is ``batch_size / 256`` with LARS.
    hidden, dim : int
        Widths of the projector: 4096 in the code, 2048 in the paper.
    task : {"consistency", "contrast", "none"}
        Between cells: PixPro, PixContrast, or nothing.
    threshold : float
        Two cells are positives where their centres are less than this many diagonals of the larger cell apart.
    gamma, clamp : float
        Of the propagation: sharpness, lowest similarity.
    value_layers : {0, 1, 2}
        Layers that the propagated values go through.
    scale : float
        Of both consistency losses, in each direction: 2 in the code, 1 in the paper.
    temperature : float
        Of the contrast between cells.
    instance : {"consistency", "contrast"}
        What whole pictures do: agree with what the copy makes of the other view (BYOL), or find it in the batch (MoCo).
    instance_weight : float
        0 = no comparison of whole pictures. 1 in the paper with it.
    instance_temperature : float
    decay : float
        Of the momentum copy at the beginning; it rises to 1 by half a cosine over all steps.
    crop : tuple of float
        Smallest and largest share of the picture that a view shows.

    Raises
    ------
    UsageError
        If nothing is compared, or the encoder gives no map.

    Examples
    --------
    >>> system = PixPro(nn.Conv2d(3, 4, 3, stride=2), num_features=4, hidden=8, dim=4)
    >>> boxes = [torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(6, 1)] * 2
    >>> out = system.step({"views": [torch.randn(6, 3, 9, 9)] * 2, "boxes": boxes, "index": torch.arange(6)})
    >>> sorted(out), system.embed(torch.randn(6, 3, 9, 9)).shape
    (['apart', 'features', 'loss', 'loss_cells', 'positives'], torch.Size([6, 4]))
    """

    needs: ClassVar[tuple[str, ...]] = ("boxes",)

    def __init__(
        self,
        encoder: nn.Module,
        *,
        batch_size: int = 1024,
        optimizer: Optimizer = "lars",
        lr: float = 4.0,
        weight_decay: float = 1e-5,
        warmup_epochs: float = 5,
        start_lr: float = 0.04,
        final_lr: float = 1e-6,
        hidden: int = 4096,
        dim: int = 256,
        task: Literal["consistency", "contrast", "none"] = "consistency",
        threshold: float = 0.7,
        gamma: float = 2.0,
        clamp: float = 0.0,
        value_layers: int = 1,
        scale: float = 2.0,
        temperature: float = 0.3,
        instance: Literal["consistency", "contrast"] = "consistency",
        instance_weight: float = 0.0,
        instance_temperature: float = 0.2,
        decay: float = 0.99,
        crop: tuple[float, float] = (0.08, 1.0),
        **base: Any,
    ) -> None:
        super().__init__(
            encoder,
            batch_size=batch_size,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            start_lr=start_lr,
            final_lr=final_lr,
            **base,
        )
        if task not in ("consistency", "contrast", "none") or instance not in ("consistency", "contrast"):
            raise UsageError(
                f'task must be "consistency", "contrast" or "none" and instance "consistency" or "contrast"; got {task!r} '
                f"and {instance!r}"
            )
        if task == "none" and not instance_weight:
            raise UsageError(
                'task="none" compares no cells: give an instance_weight above 0, so that pictures are compared'
            )
        if value_layers not in (0, 1, 2):
            raise UsageError(f"value_layers must be 0, 1 or 2, got {value_layers}")
        self.task, self.threshold, self.gamma, self.clamp, self.scale = task, threshold, gamma, clamp, scale
        self.temperature, self.decay, self.crop = temperature, decay, crop
        self.instance, self.instance_weight, self.instance_temperature = instance, instance_weight, instance_temperature
        self.key_encoder = momentum_copy(encoder)
        # Heads that no loss uses would be parameters without gradient.
        with self.seeded():
            if task != "none":
                self.projector = mlp([self.num_features, hidden, dim], norm="batch", kind="conv")
                self.key_projector = momentum_copy(self.projector)
            if task == "consistency":
                widths = [dim] * (value_layers + 1)
                self.value = mlp(widths, norm="batch", kind="conv") if value_layers else nn.Identity()
            if instance_weight:
                self.instance_projector = mlp([self.num_features, hidden, dim], norm="batch", kind="conv")
                self.key_instance_projector = momentum_copy(self.instance_projector)
                if instance == "consistency":
                    self.predictor = mlp([dim, hidden, dim], norm="batch", kind="conv")

    def views(self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Sequence[Any]:
        """The authors' two views, as BYOL's."""
        from contralto.views.presets import pixpro_pair

        return list(pixpro_pair(size, scale=self.crop, mean=mean, std=std))

    def maps(self, x: Tensor) -> list[Tensor]:
        """The feature maps (B, num_features, h, w) of all levels; usually one."""
        return _maps(self.encoder, x, self.num_features)

    def embed(self, x: Tensor) -> Tensor:
        """What is used after training (N, F): the mean of the map, over levels too."""
        return _pooled(self.maps(x))

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch of two views; the copy moves between the passes of the two networks.

        `positives` is the mean number of positive pairs of a picture, `apart` the share of pictures whose views do not touch.
        """
        views = self.checked(batch, 2)
        boxes = batch["boxes"]
        queries = [self.maps(view) for view in views]
        self._move()
        with torch.no_grad():
            keys = [_maps(self.key_encoder, view, self.num_features) for view in views]
        weight = mean_weight(torch.tensor(len(views[0]), device=views[0].device))
        out = {"features": _pooled(queries[0]).detach()}
        losses = []
        if self.task != "none":
            levels = [self._cells(q0, q1, k0, k1, boxes) for q0, q1, k0, k1 in zip(*queries, *keys, strict=True)]
            loss, found = (torch.stack(values) for values in zip(*levels, strict=True))
            out["loss_cells"] = loss.mean() * weight
            out |= {"positives": found.mean(), "apart": (found == 0).to(found.dtype).mean()}
            losses.append(out["loss_cells"])
        if self.instance_weight:
            each = [self._pictures(*level) for level in zip(*queries, *keys, strict=True)]
            out["loss_pictures"] = torch.stack(each).mean() * weight
            losses.append(self.instance_weight * out["loss_pictures"])
        return {"loss": torch.stack(losses).sum(), **out}

    def _move(self) -> None:
        """The copy follows the network as it is before this step's optimiser."""
        decay = 1 - (1 - self.decay) * (math.cos(math.pi * self.progress) + 1) / 2
        momentum_update(self.key_encoder, self.encoder, decay)
        if self.task != "none":
            momentum_update(self.key_projector, self.projector, decay)
        if self.instance_weight:
            momentum_update(self.key_instance_projector, self.instance_projector, decay)

    def _cells(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Loss between the cells of two maps in both directions, and the number of positive pairs of every picture (B,)."""
        positives = positive_cells(boxes[0], boxes[1], _sides(q0), _sides(q1), threshold=self.threshold)
        transposed = positives.transpose(1, 2)
        with torch.no_grad():
            x0, x1 = self.key_projector(k0), self.key_projector(k1)
        y0, y1 = self.projector(q0), self.projector(q1)
        found = positives.sum((1, 2)).float()
        if self.task == "contrast":
            there = pixel_contrast(y0, x1, positives, temperature=self.temperature)
            return (there + pixel_contrast(y1, x0, transposed, temperature=self.temperature)) / 2, found
        y0, y1 = (propagate(y, self.value(y), gamma=self.gamma, clamp=self.clamp) for y in (y0, y1))
        there = pixel_consistency(y0, x1, positives, scale=self.scale)
        return there + pixel_consistency(y1, x0, transposed, scale=self.scale), found

    def _pictures(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        """Loss between whole pictures, in both directions."""
        with torch.no_grad():
            x0, x1 = (self.key_instance_projector(k).mean((2, 3)) for k in (k0, k1))
        y0, y1 = self.instance_projector(q0), self.instance_projector(q1)
        if self.instance == "contrast":
            pairs = ((y0.mean((2, 3)), x1), (y1.mean((2, 3)), x0))
            there, back = (_among_all(y, x, self.instance_temperature) for y, x in pairs)
            return (there + back) / 2
        pairs = ((self.predictor(y0).mean((2, 3)), x1), (self.predictor(y1).mean((2, 3)), x0))
        there, back = (F.cosine_similarity(_wide(y), _wide(x), dim=1).mean() for y, x in pairs)
        return -self.scale * (there + back)


def _maps(encoder: nn.Module, x: Tensor, channels: int) -> list[Tensor]:
    several: Any = getattr(encoder, "forward_maps", None)
    one: Any = getattr(encoder, "forward_map", encoder)
    maps: list[Tensor] = list(several(x)) if several is not None else [one(x)]
    for cells in maps:
        if cells.ndim != 4 or cells.shape[1] != channels:
            raise UsageError(
                f"PixPro compares the cells of feature maps of {channels} channels, but the encoder gives {tuple(cells.shape)}: "
                f"take a convolutional one with a method forward_map, such as those of contralto.encoders.image"
            )
    return maps


def _wide(x: Tensor) -> Tensor:
    """In single precision at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _pooled(maps: Sequence[Tensor]) -> Tensor:
    return torch.stack([cells.mean((2, 3)) for cells in maps]).mean(0)


def _sides(cells: Tensor) -> tuple[int, int]:
    return cells.shape[2], cells.shape[3]


def _among_all(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Find the key (B, D) of every query among the keys of all ranks."""
    place = torch.arange(len(query), device=query.device)
    if world_size() > 1:
        place = (gather_rows(torch.full_like(place, rank())) == rank()).nonzero().squeeze(1)
    return contrast(query, gather_rows(key), positives=place, temperature=temperature, reduction="mean_all")
