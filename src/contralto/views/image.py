"""Views of a picture: crops, flips and colour, drawn per sample from a passed generator.

The same (seed, epoch, sample index, view) gives the same pixels in any process, in any order, after any interruption:
`view_generator` makes the generator, a `View` draws from it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from contralto.data.images import load_image, open_image, orientation, oriented_size
from contralto.errors import UsageError
from contralto.views.colour import change_colours, rgb_to_grey

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "OVERSAMPLING",
    "EvalView",
    "View",
    "draw_views",
    "resize_image",
    "strong_view",
    "view_generator",
    "weak_view",
]

OVERSAMPLING = 1.5
"""Pixels of a JPEG decoded at a reduced scale for each pixel of a view, at least."""
Box = tuple[float, float, float, float]
Pixels = npt.NDArray[np.uint8]
Planes = npt.NDArray[np.float32]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Principal components of ImageNet's colours (Krizhevsky et al. 2012), for the lighting noise.
_COLOUR_VALUES = np.array([0.2175, 0.0188, 0.0045])
_COLOUR_VECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def view_generator(seed: int, epoch: int, index: int, view: int) -> np.random.Generator:
    """The generator of one view of one sample in one epoch.

    Examples
    --------
    >>> view_generator(0, 1, 2, 3).random() == view_generator(0, 1, 2, 3).random()
    True
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, index, view])))


@dataclass(frozen=True)
class View:
    """A random view of a picture.

    Parameters
    ----------
    size : int
        Side of the square that comes out, in pixels.
    scale : tuple of float
        Share of the area that the crop covers, drawn uniformly.
    ratio : tuple of float
        Aspect ratio of the crop, drawn log-uniformly.
    flip, grayscale : float
        Probability of a horizontal flip, of losing the colour.
    jitter : float
        Strength of brightness, contrast, saturation and hue changes (hue within +-jitter of the circle, at most 0.5).
    lighting : float
        Standard deviation of the noise along ImageNet's colour components; 0 = none.
    mean, std : tuple of float
        Normalisation at the end.

    Examples
    --------
    >>> view = View(size=8, jitter=0.4, grayscale=0.2)
    >>> view(torch.zeros(3, 20, 10, dtype=torch.uint8), view_generator(0, 0, 0, 0)).shape
    torch.Size([3, 8, 8])
    """

    size: int
    scale: tuple[float, float] = (0.8, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    grayscale: float = 0.0
    jitter: float = 0.0
    lighting: float = 0.1
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """`image` uint8 (3, H, W) -> float32 (3, size, size), normalised."""
        return draw_views(image.permute(1, 2, 0).numpy(), [self], [rng])[0]

    def place(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """Draw the crop of a picture of this size: top, left, height, width."""
        return _crop(height, width, self.scale, self.ratio, rng)

    def cut(self, image: Image.Image, box: Box) -> Pixels:
        """The crop at the size that comes out: (size, size, 3)."""
        top, left, height, width = map(int, box)
        return resize_image(image.crop((left, top, left + width, top + height)), self.size, self.size)

    def finish(self, pixels: Pixels, rng: np.random.Generator) -> Tensor:
        """Draw and apply all that follows the crop: uint8 (size, size, 3) -> float32 (3, size, size), normalised."""
        grey = bool(self.grayscale) and rng.random() < self.grayscale
        jitter = _draw_jitter(self.jitter, rng) if self.jitter else None
        if rng.random() < self.flip:
            pixels = pixels[:, ::-1]  # no change of colour cares for the place
        offset = _COLOUR_VECTORS @ (rng.normal(0, self.lighting, 3) * _COLOUR_VALUES) if self.lighting else np.zeros(3)
        out = _planes(pixels)
        if grey:
            out = rgb_to_grey(out)
        if jitter is not None:
            change_colours(out, *jitter)
        return _normalise(np.repeat(out, 3, 0) if grey else out, offset, self.mean, self.std)


@dataclass(frozen=True)
class EvalView:
    """The one view for testing: shorter side to `size / crop`, then the square in the middle; draws nothing.

    Examples
    --------
    >>> EvalView(8)(torch.zeros(3, 20, 10, dtype=torch.uint8)).shape
    torch.Size([3, 8, 8])
    """

    size: int
    crop: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise UsageError(f"crop is the share of the picture's shorter side, above 0 and at most 1; got {self.crop}")

    def __call__(self, image: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """`image` uint8 (3, H, W) -> float32 (3, size, size), normalised."""
        return draw_views(image.permute(1, 2, 0).numpy(), [self], [rng])[0]

    def place(self, height: int, width: int, rng: np.random.Generator | None = None) -> Box:
        """The square in the middle of a picture of this size: top, left, height, width, not in whole pixels."""
        rows, columns, top, left = self._grid(height, width)
        y, x = height / rows, width / columns
        return top * y, left * x, self.size * y, self.size * x

    def cut(self, image: Image.Image, box: Box) -> Pixels:
        """The square at the size that comes out: (size, size, 3)."""
        rows, columns, top, left = self._grid(image.height, image.width)
        return resize_image(image, rows, columns)[top : top + self.size, left : left + self.size]

    def finish(self, pixels: Pixels, rng: np.random.Generator | None = None) -> Tensor:
        """uint8 (size, size, 3) -> float32 (3, size, size), normalised."""
        return _normalise(_planes(pixels), np.zeros(3), self.mean, self.std)

    def _grid(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Height and width of the whole picture after resizing, and where its middle begins; as torchvision's `resize`."""
        shorter = round(self.size / self.crop)
        rows, columns = (int(shorter * n / min(height, width)) for n in (height, width))
        return rows, columns, round((rows - self.size) / 2), round((columns - self.size) / 2)


def draw_views(picture: bytes | Pixels, views: Sequence[View | EvalView], generators: Sequence[Any]) -> list[Tensor]:
    """Several views of one picture, decoded once and no finer than they need.

    Parameters
    ----------
    picture : bytes or uint8 array (H, W, 3)
        Encoded bytes are checked and bounded as by `decode_image`.
    views : sequence of View or EvalView
    generators : sequence of numpy Generator
        One per view.

    Returns
    -------
    list of Tensor (3, size, size)

    Raises
    ------
    ImageError
        If the bytes are no picture.

    Notes
    -----
    The crops are drawn first, by the size that the header tells. Where each of them has at least 3 pixels of a JPEG along
    its shorter side for each that comes out, the JPEG is decoded at half scale (6: quarter, 12: eighth). This changes a view
    by one to two levels of 255 on average, less than bicubic in place of bilinear resizing would. The scale is chosen for all
    views together: beside a finer view, a view of a large JPEG comes from finer pixels than alone.

    Examples
    --------
    >>> weak, test = View(8), EvalView(8)
    >>> generators = [view_generator(0, 0, 0, view) for view in range(2)]
    >>> [tuple(v.shape) for v in draw_views(np.zeros((20, 10, 3), np.uint8), [weak, test], generators)]
    [(3, 8, 8), (3, 8, 8)]
    """
    image = open_image(picture) if isinstance(picture, bytes) else Image.fromarray(picture)
    # The partly filled last block of a picture that EXIF turns is at another edge, where boxes do not expect it.
    ragged = orientation(image) != 1 and (image.width % 8 or image.height % 8)
    reducible = image.format == "JPEG" and not ragged
    if not reducible:
        image = load_image(image)
    width, height = oriented_size(image) if reducible else image.size
    boxes = [view.place(height, width, rng) for view, rng in zip(views, generators, strict=True)]
    if reducible:
        enough = max(v.size * OVERSAMPLING / min(b[2:]) for v, b in zip(views, boxes, strict=True))
        image = load_image(image, math.ceil(enough * min(height, width)))
    factor = round(width / image.width)
    if factor == 1:
        cuts = [view.cut(image, box) for view, box in zip(views, boxes, strict=True)]
    else:
        cuts = [_cut_reduced(image, box, factor, view.size) for view, box in zip(views, boxes, strict=True)]
    return [view.finish(pixels, rng) for view, pixels, rng in zip(views, cuts, generators, strict=True)]


def _cut_reduced(image: Image.Image, box: Box, factor: int, size: int) -> Pixels:
    """A crop, given in pixels of the whole picture, of one that was decoded at a smaller scale."""
    top, left, height, width = (n / factor for n in box)
    part = (left, top, min(left + width, image.width), min(top + height, image.height))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=part))  # places between pixels count


def resize_image(image: Image.Image, rows: int, columns: int) -> Pixels:
    """Bilinear with antialias, by torch: the values of PIL within one level of 255 in a third of the time."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = interpolate(pixels, size=(rows, columns), mode="bilinear", antialias=True)
    return np.asarray(resized[0].permute(1, 2, 0).numpy())


def _planes(pixels: Pixels) -> Planes:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)


def weak_view(size: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> View:
    """CAPro's weak view (5.9): crop of 80 to 100 %, flip, lighting."""
    return View(size, scale=(0.8, 1.0), mean=mean, std=std)


def strong_view(size: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> View:
    """CAPro's strong view (5.9): crop of 20 to 100 %, grey, colour jitter, flip, lighting."""
    return View(size, scale=(0.2, 1.0), grayscale=0.2, jitter=0.4, mean=mean, std=std)


def _crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    # As torchvision's RandomResizedCrop: ten tries, then the largest centred crop within the ratio.
    for area, log_ratio in zip(
        rng.uniform(*scale, 10), rng.uniform(math.log(ratio[0]), math.log(ratio[1]), 10), strict=True
    ):
        w = round(float(np.sqrt(height * width * area * np.exp(log_ratio))))
        h = round(float(np.sqrt(height * width * area / np.exp(log_ratio))))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _draw_jitter(strength: float, rng: np.random.Generator) -> tuple[npt.NDArray[np.float32], list[int]]:
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = rng.uniform(low, high, 3).tolist()
    hue = rng.uniform(-min(strength, 0.5), min(strength, 0.5))
    return np.array([*factors, hue], np.float32), rng.permutation(4).tolist()


def _normalise(
    image: Planes, offset: npt.NDArray[np.float64], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """(image / 255 + offset - mean) / std, in place."""
    image *= (1 / (255 * np.array(std)))[:, None, None].astype(np.float32)
    image += ((offset - mean) / std)[:, None, None].astype(np.float32)
    return torch.from_numpy(image)
