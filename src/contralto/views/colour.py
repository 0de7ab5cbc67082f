"""Colour changes of a batch of pictures, in place, with one factor per picture; values are those of torchvision.

Pictures are float32 (N, 3, H, W) with values from 0 to 255, on any device. The functions change them where they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["adjust_hue", "change_colours", "rgb_to_grey", "solarize"]

GREY = (0.2989, 0.587, 0.114)
"""Weights of ITU-R 601."""
TOP = 255.0


def change_colours(x: Tensor, factors: Tensor, order: Sequence[int]) -> Tensor:
    """Brightness, contrast, saturation and hue, in a given order; values as of torchvision's `adjust_...`.

    Parameters
    ----------
    x : Tensor (N, 3, H, W)
    factors : Tensor (N, 4)
        Of brightness, contrast and saturation (1 changes nothing), and the shift of hue in turns of the colour circle.
    order : sequence of int
        Which of the four comes first, and so on, the same for all.

    Returns
    -------
    Tensor (N, 3, H, W)
        `x` itself.

    Examples
    --------
    >>> red = torch.tensor([255.0, 0, 0]).view(1, 3, 1, 1)
    >>> change_colours(red, torch.tensor([[1, 1, 1, 1 / 3]]), (3,)).flatten().tolist()
    [0.0, 255.0, 0.0]
    """
    for step in order:
        factor = factors[:, step].view(-1, 1, 1, 1)
        if step == 0:
            x.mul_(factor)
        elif step == 1:
            mean = x.mean((2, 3)) @ x.new_tensor(GREY)  # of the grey picture, without making it
            x.mul_(factor).add_((1 - factor) * mean.view(-1, 1, 1, 1))
        elif step == 2:
            grey = rgb_to_grey(x).mul_(1 - factor)
            x.mul_(factor).add_(grey)
        else:
            adjust_hue(x, factors[:, 3])
            continue
        x.clamp_(0, TOP)
    return x


def rgb_to_grey(x: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W) with the weights of ITU-R 601."""
    grey = x[:, :1] * GREY[0]
    grey.add_(x[:, 1:2], alpha=GREY[1])
    return grey.add_(x[:, 2:], alpha=GREY[2])


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of HSV by `turns` (N,) of the colour circle, in few passes and without a division.

    A channel falls from the largest value to the least by its distance on the circle. Everything is multiplied by the chroma,
    so that nothing is divided: `place` is 6 hue * chroma, in [-1, 5] chroma.

    Examples
    --------
    >>> adjust_hue(torch.tensor([255.0, 0, 0]).view(1, 3, 1, 1), torch.tensor([0.5])).flatten().tolist()
    [0.0, 255.0, 255.0]
    """
    r, g, b = x.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    place = torch.where(
        high == r, g - b, torch.where(high == g, (b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4))
    )
    top, chroma3 = high + chroma, chroma * 3
    distance = torch.empty_like(high)
    for channel, number in ((r, 3), (g, 1), (b, -1)):
        # From the middle of the channel's low part, in [-6, 6); its peak is 3 away, on either side.
        middle = torch.remainder(turns * 6 + (number + 5), 6) - 5
        torch.mul(chroma, middle.view(-1, 1, 1), out=distance)
        distance.add_(place).abs_().sub_(chroma3).abs_()
        torch.sub(top, distance, out=distance)
        torch.maximum(distance, low, out=distance)
        torch.minimum(distance, high, out=channel)
    return x


def solarize(x: Tensor, threshold: float = 128.0) -> Tensor:
    """Invert what is at least as bright as the threshold.

    Examples
    --------
    >>> solarize(torch.tensor([100.0, 128, 255]).view(1, 3, 1, 1)).flatten().tolist()
    [100.0, 127.0, 0.0]
    """
    return torch.where(x >= threshold, TOP - x, x)
