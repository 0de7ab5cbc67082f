"""Small networks trained from scratch: residual ones for small pictures (He et al. 2016, the CIFAR form: a 3x3 stem, no pooling).

Beside them the two networks of few-shot papers.
"""

from itertools import pairwise

from torch import Tensor, nn

__all__ = ["Conv4", "ResNet12", "SmallResNet"]


class SmallResNet(nn.Module):
    """Stages of basic blocks; every stage after the first halves the side and doubles the width.

    Parameters
    ----------
    blocks : tuple of int
        Blocks per stage: (1, 1, 1) is ResNet-8, (2, 2, 2) is ResNet-14, (2, 2, 2, 2) is ResNet-18.
    width : int
        Channels of the first stage.

    Examples
    --------
    >>> import torch
    >>> SmallResNet((1, 1, 1), 32)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 128])
    """

    def __init__(self, blocks: tuple[int, ...], width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                out = width * 2**stage
                layers.append(_Block(channels, out, stride=2 if stage > 0 and block == 0 else 1))
                channels = out
        self.layers = nn.Sequential(*layers)
        self.num_features = channels

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) to features (N, num_features)."""
        return self.forward_map(x).mean((2, 3))

    def forward_map(self, x: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) to the map (N, num_features, h, w) whose mean the features are."""
        cells: Tensor = self.layers(x)
        return cells


class Conv4(nn.Sequential):
    """Four blocks of 3 x 3 convolution, batch norm, ReLU and halving of the sides: the small network of few-shot papers.

    Parameters
    ----------
    width : int
        Channels, and features.

    Examples
    --------
    >>> import torch
    >>> Conv4(64)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 64])
    """

    def __init__(self, width: int = 64) -> None:
        layers: list[nn.Module] = []
        for channels in (3, width, width, width):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = width

    def forward_map(self, x: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) to the map (N, num_features, h, w) whose mean the features are."""
        for layer in list(self)[:-2]:
            x = layer(x)
        return x


class ResNet12(nn.Sequential):
    """Four residual blocks of three 3 x 3 convolutions, each halving the sides: the larger network of few-shot papers.

    Without their DropBlock. The widths are those of most papers of metric learning.

    Parameters
    ----------
    widths : tuple of int
        Channels of the blocks; the last are the features.

    Examples
    --------
    >>> import torch
    >>> ResNet12((8, 8, 16, 16))(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 16])
    """

    def __init__(self, widths: tuple[int, ...] = (64, 160, 320, 640)) -> None:
        blocks = [_PooledBlock(a, b) for a, b in pairwise((3, *widths))]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = widths[-1]

    def forward_map(self, x: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) to the map (N, num_features, h, w) whose mean the features are."""
        for layer in list(self)[:-2]:
            x = layer(x)
        return x


class _PooledBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, channels in enumerate((width_in, width_out, width_out)):
            layers += [nn.Conv2d(channels, width_out, 3, padding=1, bias=False), nn.BatchNorm2d(width_out)]
            layers += [nn.LeakyReLU(0.1)] if number < 2 else []
        self.body = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(width_in, width_out, 1, bias=False), nn.BatchNorm2d(width_out))
        self.end = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.end(self.body(x) + self.shortcut(x))
        return out


class _Block(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width_out),
            nn.ReLU(),
            nn.Conv2d(width_out, width_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(width_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.body(x) + self.shortcut(x)).relu()
        return out
