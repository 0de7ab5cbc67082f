"""Views of a picture: crops, flips and colour, drawn per sample from a passed generator.

The same (seed, epoch, sample index, view) gives the same pixels in any process, in any order, after any interruption:
`view_generator` makes the generator, a `View` draws from it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "EvalView", "View", "strong_view", "view_generator", "weak_view"]

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
        top, left, height, width = _crop(image.shape[-2], image.shape[-1], self.scale, self.ratio, rng)
        out = TF.resized_crop(image, top, left, height, width, [self.size, self.size], antialias=True)
        out = out.to(torch.float32) / 255
        if self.grayscale and rng.random() < self.grayscale:
            out = TF.rgb_to_grayscale(out, num_output_channels=3)
        if self.jitter:
            out = _jitter(out, self.jitter, rng)
        if rng.random() < self.flip:
            out = TF.horizontal_flip(out)
        if self.lighting:
            noise = _COLOUR_VECTORS @ (rng.normal(0, self.lighting, 3) * _COLOUR_VALUES)
            out = out + torch.from_numpy(noise.astype(np.float32)).view(3, 1, 1)
        return _normalise(out, self.mean, self.std)


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

    def __call__(self, image: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """`image` uint8 (3, H, W) -> float32 (3, size, size), normalised."""
        out = TF.center_crop(TF.resize(image, [round(self.size / self.crop)], antialias=True), [self.size, self.size])
        return _normalise(out.to(torch.float32) / 255, self.mean, self.std)


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


def _jitter(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    low, high = max(0.0, 1 - strength), 1 + strength
    brightness, contrast, saturation = rng.uniform(low, high, 3)
    hue = rng.uniform(-min(strength, 0.5), min(strength, 0.5))
    for step in rng.permutation(4):
        if step == 0:
            image = TF.adjust_brightness(image, brightness)
        elif step == 1:
            image = TF.adjust_contrast(image, contrast)
        elif step == 2:
            image = TF.adjust_saturation(image, saturation)
        else:
            image = TF.adjust_hue(image, hue)
    return image


def _normalise(image: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    return (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
