"""Colour changes of pictures, in place; values are those of torchvision.

Pictures are float32 (..., 3, H, W) with values from 0 to 255: torch tensors (N, 3, H, W) with factors (N, 4), a set for each
picture, on any device; or a numpy array (3, H, W) with factors (4,), because for one small picture numpy's calls cost half of
torch's. The arithmetic is the same: both have its few functions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["adjust_hue", "change_colours", "rgb_to_grey", "solarize"]

GREY = (0.2989, 0.587, 0.114)
"""Weights of ITU-R 601."""
TOP = 255.0


def change_colours(x: Any, factors: Any, order: Sequence[int]) -> Any:
    """Brightness, contrast, saturation and hue, in a given order; values as of torchvision's `adjust_...`.

    Parameters
    ----------
    x : Tensor or array (..., 3, H, W), or (..., 1, H, W) where all is grey
    factors : Tensor or array (..., 4)
        Of brightness, contrast and saturation (1 changes nothing), and the shift of hue in turns of the colour circle.
    order : sequence of int
        Which of the four comes first, and so on, the same for all.

    Returns
    -------
    Tensor or array
        `x` itself.

    Examples
    --------
    >>> red = torch.tensor([255.0, 0, 0]).view(1, 3, 1, 1)
    >>> change_colours(red, torch.tensor([[1, 1, 1, 1 / 3]]), (3,)).flatten().tolist()
    [0.0, 255.0, 0.0]
    """
    for step in order:
        factor = factors[..., step, None, None, None]
        if step >= 2 and x.shape[-3] == 1:
            continue  # grey has neither saturation nor hue
        if step == 0:
            x *= factor
        elif step == 1:
            grey = rgb_to_grey(x.mean((-2, -1))[..., None, None])  # the mean of the grey picture, without making it
            x *= factor
            x += grey * (1 - factor)
        elif step == 2:
            grey = rgb_to_grey(x)
            grey *= 1 - factor
            x *= factor
            x += grey
        else:
            adjust_hue(x, factors[..., 3])
            continue
        _functions(x).clip(x, 0, TOP, out=x)
    return x


def rgb_to_grey(x: Any) -> Any:
    """(..., 3, H, W) -> (..., 1, H, W) with the weights of ITU-R 601; (..., 1, H, W) is grey already, and copied."""
    if x.shape[-3] == 1:
        return x * 1
    grey = x[..., 0:1, :, :] * GREY[0]
    grey += x[..., 1:2, :, :] * GREY[1]
    grey += x[..., 2:3, :, :] * GREY[2]
    return grey


def adjust_hue(x: Any, turns: Any) -> Any:
    """Shift the hue of HSV by `turns` (...) of the colour circle, in few passes, without a division or a choice.

    A channel falls from the largest value to the least by its distance on the circle, which is six times the chroma around.
    From red, the distance is the sum of the other two above the least, plus what red lacks of the largest; green being more
    than blue says on which side.

    Examples
    --------
    >>> adjust_hue(torch.tensor([255.0, 0, 0]).view(1, 3, 1, 1), torch.tensor([0.5])).flatten().tolist()
    [0.0, 255.0, 255.0]
    """
    use = _functions(x)
    r, g, b = (x[..., i : i + 1, :, :] for i in range(3))
    low, high = use.minimum(r, g), use.maximum(r, g)
    use.minimum(low, b, out=low)
    use.maximum(high, b, out=high)
    chroma = high - low
    place = g + b
    place -= r
    place += chroma
    place -= low
    use.copysign(place, g - b, out=place)
    # Where the middle of the low part of red, green and blue comes to lie, in [-3, 3); the peak is 3 away, on either side.
    steps = torch.arange(6, 0, -2, device=x.device) if use is torch else np.arange(6, 0, -2, dtype=np.float32)
    middle = (turns[..., None] * 6 + steps) % 6 - 3
    use.multiply(chroma, middle[..., None, None], out=x)
    x += place
    use.abs(x, out=x)
    x -= chroma * 3
    use.abs(x, out=x)
    use.subtract(high + chroma, x, out=x)
    use.maximum(x, low, out=x)
    return use.minimum(x, high, out=x)


def _functions(x: Any) -> Any:
    return torch if isinstance(x, Tensor) else np


def solarize(x: Tensor, threshold: float = 128.0) -> Tensor:
    """Invert what is at least as bright as the threshold.

    Examples
    --------
    >>> solarize(torch.tensor([100.0, 128, 255]).view(1, 3, 1, 1)).flatten().tolist()
    [100.0, 127.0, 0.0]
    """
    return torch.where(x >= threshold, TOP - x, x)
