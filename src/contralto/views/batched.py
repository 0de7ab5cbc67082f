"""Views of a batch of pictures: crops, flips, colours and blur, with parameters of their own for every picture.

The parameters of a view are drawn on the CPU, all of a batch at once, as a function of (seed, epoch, sample index, view):
they are the same in any process, in any order, in any batch, after any interruption. Pixels are made where the pictures
are. What is drawn and how it is applied follows torchvision's `RandomResizedCrop`, `ColorJitter`, `RandomGrayscale`,
`GaussianBlur` and `RandomSolarize`, in the order of SimCLR and BYOL: crop, flip, colours, grey, blur, solarise.

`views.image` has the views of one encoded picture, which is decoded no finer than they need: for jobs in which reading
costs more than colours. Here pictures are decoded once and for all, and a batch of them is one tensor.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from contralto.errors import UsageError
from contralto.views.colour import change_colours, rgb_to_grey, solarize
from contralto.views.image import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["BatchView", "DrawViews", "Drawn", "apply_view", "draw_batch", "draw_parameters", "uniforms"]

ORDERS = tuple(itertools.permutations(range(4)))
"""In which the four changes of colour may come, by number."""
TRIES = 10
BLOCK_BYTES = 8 * 2**20
"""Pictures of a block stay in the cache while one change after the other is made; half and twice as many are 10 % slower."""
BLUR_BLOCK = 32
# Which of a sample's uniform numbers decides what; a new one goes to the end, so that the others stay as they are.
_AREA, _RATIO = slice(0, TRIES), slice(TRIES, 2 * TRIES)
_TOP, _LEFT, _FLIP, _JITTER, _ORDER, _GREY, _BLUR, _SIGMA, _SOLARIZE = range(20, 29)
_FACTORS = slice(29, 33)
_COUNT = 33

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class BatchView:
    """A random view, drawn for each picture of a batch.

    Parameters
    ----------
    size : int
        Side of the square that comes out, in pixels.
    scale : tuple of float
        Share of the area that the crop covers, drawn uniformly.
    ratio : tuple of float
        Aspect ratio of the crop, drawn log-uniformly.
    flip : float
        Probability of a horizontal flip.
    jitter : tuple of float
        Strength of the changes of brightness, contrast, saturation (factors within 1 +- strength) and hue (turns within
        +- strength, at most 0.5), which come in an order of each picture's own.
    jitter_p, grey, blur_p, solarize_p : float
        Probability of these changes, of losing the colour, of a Gaussian blur, of being solarised (threshold 128).
    blur_sigma : tuple of float
        Standard deviation of the blur in pixels, drawn uniformly.
    blur_kernel : int
        Taps of the blur, odd; 0 = SimCLR's rule, about a tenth of `size`; -1 = as many as the widest blur needs.
    interpolation : {"bilinear", "bicubic"}
        Both with antialias where the crop shrinks.
    mean, std : tuple of float
        Normalisation at the end, of values from 0 to 1.

    Examples
    --------
    >>> view = BatchView(8, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2)
    >>> pixels, boxes = draw_batch([view], torch.zeros(2, 3, 20, 20, dtype=torch.uint8), seed=0, epoch=0, index=[4, 7])
    >>> pixels[0].shape, boxes[0].shape
    (torch.Size([2, 3, 8, 8]), torch.Size([2, 4]))
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.8
    grey: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 0
    solarize_p: float = 0.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"size is the side of the view in pixels, at least 1; got {self.size}")
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise UsageError(f"{name} is a range of positive numbers, the smaller one first; got {(low, high)}")
        if self.scale[1] > 1:
            raise UsageError(f"scale is a range of shares of the picture, at most 1; got {self.scale}")
        for name in ("flip", "jitter_p", "grey", "blur_p", "solarize_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is a probability, from 0 to 1; got {getattr(self, name)}")
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise UsageError(
                "jitter is the strength of brightness, contrast, saturation and hue: four numbers from 0 on, hue at most"
                f" 0.5; got {self.jitter}"
            )
        if self.blur_kernel < -1 or (self.blur_kernel > 0 and self.blur_kernel % 2 == 0):
            raise UsageError(f"blur_kernel is an odd number of taps, 0 or -1; got {self.blur_kernel}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UsageError(f'interpolation is "bilinear" or "bicubic"; got {self.interpolation!r}')
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError("mean and std are three numbers each, those of std above 0")

    @property
    def blur_radius(self) -> int:
        """Taps of the blur on each side of the middle."""
        if self.blur_kernel == -1:
            return math.ceil(4 * self.blur_sigma[1])
        return self.blur_kernel // 2 if self.blur_kernel else max(1, self.size // 10 // 2)


class Drawn(NamedTuple):
    """What was drawn for a view of B pictures."""

    box: Ints
    """(B, 4) top, left, height, width of the crop in pixels."""
    flip: Bools
    factors: npt.NDArray[np.float32]
    """(B, 4) of brightness, contrast, saturation; shift of hue in turns."""
    order: Ints
    """(B,) place in `ORDERS`, -1 = colours stay."""
    grey: Bools
    sigma: npt.NDArray[np.float32]
    """(B,) of the blur, 0 = none."""
    solarize: Bools


def draw_batch(
    views: Sequence[BatchView],
    pictures: Tensor,
    sizes: Any = None,
    *,
    seed: int,
    epoch: Any,
    index: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """Several views of each picture of a batch.

    Parameters
    ----------
    views : sequence of BatchView
    pictures : uint8 Tensor (B, 3, H, W)
        Fastest on the CPU when the channels come last in memory.
    sizes : integers (B, 2), optional
        Height and width of the part of its canvas, from the top left, that a picture fills; all of it by default.
    seed : int
    epoch, index : integer or integers (B,)
        Epoch of the draw and row of the sample: with `seed` and the number of the view they decide every parameter.

    Returns
    -------
    views : list of float32 Tensor (B, 3, size, size)
        Normalised, on the device of `pictures`.
    boxes : list of float32 Tensor (B, 4)
        x1, y1, x2, y2: corner pixels of the crop in unit coordinates of the picture (PixPro 1), x1 > x2 where it is mirrored.

    Raises
    ------
    UsageError
        If an argument does not fit the others.

    Examples
    --------
    >>> pictures = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    >>> (large, small), boxes = draw_batch([BatchView(32), BatchView(16)], pictures, seed=0, epoch=0, index=[0, 1])
    >>> large.shape, small.shape
    (torch.Size([2, 3, 32, 32]), torch.Size([2, 3, 16, 16]))
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.dtype != torch.uint8:
        raise UsageError(f"pictures are uint8 (B, 3, H, W); got {pictures.dtype} {tuple(pictures.shape)}")
    whole = np.broadcast_to(np.array(pictures.shape[2:]), (len(pictures), 2))
    filled = whole if sizes is None else _integers(sizes, (len(pictures), 2), "sizes")
    wrong = np.flatnonzero(((filled < 1) | (filled > whole)).any(1))
    if len(wrong):
        raise UsageError(
            f"sizes of picture {wrong[0]} are {filled[wrong[0]].tolist()}, its canvas is {whole[0].tolist()}"
        )
    rows, epochs = (_integers(v, (len(pictures),), n) for v, n in ((index, "index"), (epoch, "epoch")))
    pixels, boxes = [], []
    for number, view in enumerate(views):
        drawn = draw_parameters(view, filled, uniforms(seed, epochs, rows, number, _COUNT))
        pixels.append(apply_view(view, pictures, drawn))
        boxes.append(torch.from_numpy(_unit_boxes(drawn, filled)).to(pictures.device))
    return pixels, boxes


class DrawViews:
    """Turns a batch of pictures into a batch of views: as `collate_fn` in the workers, or on the device in the training step.

    Parameters
    ----------
    views : sequence of BatchView
    seed : int

    Examples
    --------
    >>> batch = {"pictures": torch.zeros(2, 3, 9, 9, dtype=torch.uint8), "epoch": 0, "index": torch.tensor([3, 4])}
    >>> batch = DrawViews([BatchView(8)], seed=0)(batch)
    >>> sorted(batch), batch["views"][0].shape
    (['boxes', 'epoch', 'index', 'views'], torch.Size([2, 3, 8, 8]))
    """

    def __init__(self, views: Sequence[BatchView], *, seed: int) -> None:
        self.views, self.seed = list(views), seed

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`pictures` and `sizes` give way to `views` and `boxes`; all else stays."""
        rest = {k: v for k, v in batch.items() if k not in ("pictures", "sizes")}
        views, boxes = draw_batch(
            self.views,
            batch["pictures"],
            batch.get("sizes"),
            seed=self.seed,
            epoch=batch["epoch"],
            index=batch["index"],
        )
        return {"views": views, "boxes": boxes, **rest}


def uniforms(seed: int, epoch: Any, index: Any, view: int, count: int) -> Floats:
    """Numbers in [0, 1) that are a function of their arguments alone.

    Parameters
    ----------
    seed, view : int
    epoch, index : integer or integers (B,)
    count : int

    Returns
    -------
    array (B, count) float64
        Row b holds the first `count` numbers of (seed, epoch[b], index[b], view), whatever the other rows are.

    Notes
    -----
    A counter that is hashed by the finaliser of SplitMix64 (Steele et al. 2014), once for each of the arguments.

    Examples
    --------
    >>> a, b = uniforms(0, 1, [5, 6], 0, 3), uniforms(0, 1, [6], 0, 2)
    >>> bool((a[1, :2] == b[0]).all())
    True
    """
    rows, epochs = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v)).astype(np.int64) for v in (index, epoch)))
    state = np.full(len(rows), seed & (2**64 - 1), np.uint64)
    for value in (np.full(len(rows), view, np.int64), epochs, rows):
        state = _mix(state * _GOLDEN + value.astype(np.uint64) + _GOLDEN)
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return np.asarray((_mix(state[:, None] + steps) >> np.uint64(11)) * 2.0**-53)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def draw_parameters(view: BatchView, sizes: Ints, u: Floats) -> Drawn:
    """The parameters of a view from uniform numbers.

    Parameters
    ----------
    view : BatchView
    sizes : array (B, 2)
        Height and width of the pictures.
    u : array (B, >= 33)
        As `uniforms` gives them.
    """
    strength = np.array(view.jitter)
    low = np.maximum(1 - strength, 0)
    low[3] = -strength[3]
    factors = low + u[:, _FACTORS] * (np.append(1 + strength[:3], strength[3]) - low)
    order = np.where(u[:, _JITTER] < view.jitter_p, (u[:, _ORDER] * len(ORDERS)).astype(np.int64), -1)
    sigma = view.blur_sigma[0] + u[:, _SIGMA] * (view.blur_sigma[1] - view.blur_sigma[0])
    return Drawn(
        box=_crop(view, sizes, u),
        flip=u[:, _FLIP] < view.flip,
        factors=factors.astype(np.float32),
        order=order if strength.any() else np.full(len(u), -1),
        grey=u[:, _GREY] < view.grey,
        sigma=np.where(u[:, _BLUR] < view.blur_p, sigma, 0).astype(np.float32),
        solarize=u[:, _SOLARIZE] < view.solarize_p,
    )


def _crop(view: BatchView, sizes: Ints, u: Floats) -> Ints:
    """As torchvision's RandomResizedCrop: ten tries, then the largest centred crop within the ratio."""
    height, width = sizes.T
    area = (height * width)[:, None] * (view.scale[0] + u[:, _AREA] * (view.scale[1] - view.scale[0]))
    low, high = np.log(view.ratio)
    ratio = np.exp(low + u[:, _RATIO] * (high - low))
    w, h = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    rows, first = np.arange(len(u)), fits.argmax(1)
    some = fits[rows, first]
    w = np.where(some, w[rows, first], np.clip(np.rint(height * view.ratio[1]), 1, width)).astype(np.int64)
    h = np.where(some, h[rows, first], np.clip(np.rint(width / view.ratio[0]), 1, height)).astype(np.int64)
    top = np.where(some, u[:, _TOP] * (height - h + 1), (height - h) // 2).astype(np.int64)
    left = np.where(some, u[:, _LEFT] * (width - w + 1), (width - w) // 2).astype(np.int64)
    return np.stack([top, left, h, w], 1)


def _unit_boxes(drawn: Drawn, sizes: Ints) -> npt.NDArray[np.float32]:
    top, left, height, width = drawn.box.T
    last = np.maximum(sizes - 1, 1)
    y1, y2 = top / last[:, 0], (top + height - 1) / last[:, 0]
    x1, x2 = left / last[:, 1], (left + width - 1) / last[:, 1]
    corners = [np.where(drawn.flip, x2, x1), y1, np.where(drawn.flip, x1, x2), y2]
    return np.stack(corners, 1).astype(np.float32)


def apply_view(view: BatchView, pictures: Tensor, drawn: Drawn) -> Tensor:
    """Make the pixels of a view whose parameters were drawn: uint8 (B, 3, H, W) -> float32 (B, 3, size, size), normalised."""
    with torch.autocast(pictures.device.type, enabled=False):  # levels of 255 are more than half precision holds
        return _apply(view, pictures, drawn)


def _apply(view: BatchView, pictures: Tensor, drawn: Drawn) -> Tensor:
    device = pictures.device
    out = torch.empty((len(pictures), 3, view.size, view.size), device=device)
    scale = 1 / (255 * torch.tensor(view.std, device=device)).view(3, 1, 1)
    shift = (torch.tensor(view.mean, device=device) / torch.tensor(view.std, device=device)).view(3, 1, 1)
    # Pictures whose colours change in the same order stand together, so that each change is made on a slice.
    place = np.argsort(drawn.order, kind="stable")
    for rows in _blocks(place, view.size, device):
        part = Drawn._make(values[rows] for values in drawn)
        x = _cut(view, pictures, rows, part)
        if (part.order >= 0).any():
            factors = torch.from_numpy(part.factors).to(device)
            for order, first, end in _runs(part.order):
                change_colours(x[first:end], factors[first:end], ORDERS[order])
        for chosen in _chosen(part.grey, device):
            x[chosen] = rgb_to_grey(x[chosen]).expand(-1, 3, -1, -1)
        for chosen in _chosen(part.sigma > 0, device):
            sigma = torch.from_numpy(part.sigma).to(device)
            x[chosen] = _blur(x[chosen], sigma[chosen], view.blur_radius)
        for chosen in _chosen(part.solarize, device):
            x[chosen] = solarize(x[chosen])
        out[torch.from_numpy(rows).to(device)] = x.mul_(scale).sub_(shift)
    return out


def _blocks(place: Ints, side: int, device: torch.device) -> Iterator[Ints]:
    step = len(place) if device.type != "cpu" else max(1, BLOCK_BYTES // (12 * side * side))
    for first in range(0, len(place), max(step, 1)):
        yield place[first : first + step]


def _runs(order: Ints) -> Iterator[tuple[int, int, int]]:
    """Value, first place and end of every run of a sorted array, without those of -1."""
    values, firsts = np.unique(order, return_index=True)
    ends = np.append(firsts[1:], len(order))
    yield from ((int(v), int(f), int(e)) for v, f, e in zip(values, firsts, ends, strict=True) if v >= 0)


def _chosen(drew: Bools, device: torch.device) -> Iterator[Tensor]:
    """The places of those that drew something, unless nobody did."""
    if drew.any():
        yield torch.from_numpy(np.flatnonzero(drew)).to(device)


def _cut(view: BatchView, pictures: Tensor, rows: Ints, drawn: Drawn) -> Tensor:
    """The crops, resized and flipped: float32 (B, 3, size, size), values from 0 to 255."""
    if pictures.device.type == "cpu":
        return _cut_one_by_one(view, pictures, rows, drawn)
    return _cut_by_matrices(view, pictures, rows, drawn)


def _cut_one_by_one(view: BatchView, pictures: Tensor, rows: Ints, drawn: Drawn) -> Tensor:
    # torch resizes bytes of one size in integers: on a CPU 1.5 (32 pixels) to 30 times (224) the speed of matrices.
    form = torch.channels_last if pictures.stride(1) == 1 else torch.contiguous_format
    out = torch.empty((len(rows), 3, view.size, view.size), dtype=torch.uint8, memory_format=form)
    side = [view.size, view.size]
    for i, (row, (top, left, height, width), flip) in enumerate(
        zip(rows.tolist(), drawn.box.tolist(), drawn.flip.tolist(), strict=True)
    ):
        part = pictures[row : row + 1, :, top : top + height, left : left + width]
        cut = interpolate(part, side, mode=view.interpolation, antialias=True)
        out[i] = cut[0].flip(-1) if flip else cut[0]
    return out.to(torch.float32, memory_format=torch.contiguous_format)


def _cut_by_matrices(view: BatchView, pictures: Tensor, rows: Ints, drawn: Drawn) -> Tensor:
    """The same by two matrix products, of any number of crops at once; within one level of 255."""
    device = pictures.device
    box = torch.from_numpy(drawn.box).to(device)
    flip = torch.from_numpy(drawn.flip).to(device)
    x = pictures[torch.from_numpy(rows).to(device)].float()
    down = _resampling(box[:, 0], box[:, 2], pictures.shape[2], view)
    along = _resampling(box[:, 1], box[:, 3], pictures.shape[3], view)
    along = torch.where(flip[:, None, None], along.flip(1), along)
    x = torch.matmul(x, along.transpose(1, 2)[:, None]).clamp_(0, 255)  # in between too, as bytes are
    return torch.matmul(down[:, None], x).round_().clamp_(0, 255)


def _resampling(first: Tensor, length: Tensor, side: int, view: BatchView) -> Tensor:
    """Weights (B, size, side) that resize `length` pixels from `first` on, as torch's antialiased `interpolate`."""
    step = (length.float() / view.size)[:, None, None]
    middle = (torch.arange(view.size, device=first.device) + 0.5)[:, None] * step
    pixel = torch.arange(side, device=first.device) - first[:, None, None]
    distance = ((pixel + 0.5 - middle) / step.clamp(min=1)).abs()
    if view.interpolation == "bilinear":
        weight = (1 - distance).clamp_(min=0)
    else:  # Keys' cubic with a = -1/2
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, far * (distance < 2))
    weight = weight * ((pixel >= 0) & (pixel < length[:, None, None]))
    return weight / weight.sum(-1, keepdim=True)


def _blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur with a standard deviation (N,) per picture; edges are mirrored, as in torchvision.

    Along each side a few columns at a time are the product of the pixels around them and a small matrix that holds the taps:
    two to five times as fast as one product for all, whose matrix is mostly 0.
    """
    n, _, height, width = x.shape
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma[:, None]) ** 2)
    taps = taps / taps.sum(1, keepdim=True)
    # Row i of the matrix holds the taps from column i on: rows that are one too long, cut where they are too short.
    block = min(BLUR_BLOCK, max(height, width))
    wide = block + 2 * radius
    rows = pad(taps, (0, block)).unsqueeze(1).expand(-1, block, -1).reshape(n, -1)
    matrix = rows[:, : block * wide].view(n, block, wide)
    padded = x.index_select(3, _mirrored(width, radius, x.device)).view(n, 3 * height, -1)
    out = x.new_empty(n, 3 * height, width)
    for first in range(0, width, block):
        end = min(first + block, width)
        part = matrix[:, : end - first, : end - first + 2 * radius].transpose(1, 2)
        out[:, :, first:end] = torch.bmm(padded[:, :, first : end + 2 * radius], part)
    padded = out.view(n, 3, height, width).index_select(2, _mirrored(height, radius, x.device)).view(3 * n, -1, width)
    matrix = matrix.repeat_interleave(3, 0)
    out = x.new_empty(3 * n, height, width)
    for first in range(0, height, block):
        end = min(first + block, height)
        part = matrix[:, : end - first, : end - first + 2 * radius]
        out[:, first:end] = torch.bmm(part, padded[:, first : end + 2 * radius])
    return out.view(n, 3, height, width)


def _mirrored(side: int, radius: int, device: torch.device) -> Tensor:
    """Which pixel stands in for each from `radius` before the first to `radius` behind the last."""
    place = torch.arange(-radius, side + radius, device=device).remainder(max(2 * (side - 1), 1))
    return torch.minimum(place, 2 * (side - 1) - place)


def _integers(values: Any, shape: tuple[int, ...], name: str) -> Ints:
    """One integer for each, or one for all, as an array."""
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if (
        (array.dtype.kind not in "iu" and array.size)
        or (array.ndim and array.shape != shape)
        or (array.ndim == 0 and len(shape) > 1)
    ):
        raise UsageError(f"{name} are integers of shape {shape}; got {array.dtype} {array.shape}")
    return np.broadcast_to(array.astype(np.int64), shape)
