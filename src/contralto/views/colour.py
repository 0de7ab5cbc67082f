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
    x : Tensor (N, 3, H, W), or (N, 1, H, W) where all is grey
    factors : Tensor (N, 4)
        Of brightness, contrast and saturation (1 changes nothing), and the shift of hue in turns of the colour circle.
    order : sequence of int
        Which of the four comes first, and so on, the same for all.

    Returns
    -------
    Tensor
        `x` itself.

    Examples
    --------
    >>> red = torch.tensor([255.0, 0, 0]).view(1, 3, 1, 1)
    >>> change_colours(red, torch.tensor([[1, 1, 1, 1 / 3]]), (3,)).flatten().tolist()
    [0.0, 255.0, 0.0]
    """
    for step in order:
        factor = factors[:, step].view(-1, 1, 1, 1)
        if step >= 2 and x.shape[1] == 1:
            continue  # grey has neither saturation nor hue
        if step == 0:
            x.mul_(factor)
        elif step == 1:
            mean = x.mean((2, 3), keepdim=True)
            shift = rgb_to_grey(mean)  # the mean of the grey picture, without making it
            x.mul_(factor).add_(shift.mul_(1 - factor))
        elif step == 2:
            grey = rgb_to_grey(x).mul_(1 - factor)
            x.mul_(factor).add_(grey)
        else:
            adjust_hue(x, factors[:, 3])
            continue
        x.clamp_(0, TOP)
    return x


def rgb_to_grey(x: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W) with the weights of ITU-R 601; (N, 1, H, W) is grey already, and copied."""
    if x.shape[1] == 1:
        return x.clone()
    grey = x[:, :1] * GREY[0]
    grey.add_(x[:, 1:2], alpha=GREY[1])
    return grey.add_(x[:, 2:], alpha=GREY[2])


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of HSV by `turns` (N,) of the colour circle, in few passes, without a division or a choice.

    A channel falls from the largest value to the least by its distance on the circle, which is six times the chroma around.
    From red, the distance is the sum of the other two above the least, plus what red lacks of the largest; green being more
    than blue says on which side.

    Examples
    --------
    >>> adjust_hue(torch.tensor([255.0, 0, 0]).view(1, 3, 1, 1), torch.tensor([0.5])).flatten().tolist()
    [0.0, 255.0, 255.0]
    """
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    chroma = high - low
    r, g, b = x.split(1, 1)
    side = g - b
    place = (g + b).sub_(r).add_(chroma).sub_(low)
    torch.copysign(place, side, out=place)
    top, chroma3 = high + chroma, chroma * 3
    # Where the middle of the low part of red, green and blue comes to lie, in [-3, 3); the peak is 3 away, on either side.
    shift = 6 - 2 * torch.arange(3, device=x.device)
    middle = torch.remainder(turns[:, None] * 6 + shift, 6) - 3
    torch.mul(chroma, middle[:, :, None, None], out=x)
    x.add_(place).abs_().sub_(chroma3).abs_()
    torch.sub(top, x, out=x)
    torch.maximum(x, low, out=x)
    return torch.minimum(x, high, out=x)


def solarize(x: Tensor, threshold: float = 128.0) -> Tensor:
    """Invert what is at least as bright as the threshold.

    Examples
    --------
    >>> solarize(torch.tensor([100.0, 128, 255]).view(1, 3, 1, 1)).flatten().tolist()
    [100.0, 127.0, 0.0]
    """
    return torch.where(x >= threshold, TOP - x, x)
