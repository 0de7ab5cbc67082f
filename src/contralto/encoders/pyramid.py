"""A pyramid of feature maps on a convolutional backbone, and the shared convolutions of a detector's head on it."""

from typing import Any

import torch
from torch import Tensor, nn

from contralto.errors import UsageError

__all__ = ["FeaturePyramid"]


class FeaturePyramid(nn.Module):
    """Maps P3 to P6 of one width (FPN, Lin et al. 2017) from the strides 8, 16 and 32 of a backbone.

    Parameters
    ----------
    name : str
        Of a timm model that gives the maps of its stages.
    width : int
        Channels of every level.
    head : int
        Convolutions of 3 x 3 on top, shared by all levels, with group norm and ReLU, as in FCOS.
    pretrained : bool
        Begin with the weights that belong to the name.

    Examples
    --------
    >>> pyramid = FeaturePyramid("resnet18", width=32, head=1)
    >>> [tuple(cells.shape[1:]) for cells in pyramid.forward_maps(torch.zeros(2, 3, 64, 64))]
    [(32, 8, 8), (32, 4, 4), (32, 2, 2), (32, 1, 1)]
    """

    def __init__(self, name: str, *, width: int = 256, head: int = 0, pretrained: bool = False) -> None:
        import timm
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        super().__init__()
        try:
            backbone: Any = timm.create_model(name, pretrained=pretrained, features_only=True)
            strides = backbone.feature_info.reduction()
        except (RuntimeError, AttributeError) as error:
            raise UsageError(f"{name!r} gives no maps of its stages: take a convolutional timm model") from error
        if not {8, 16, 32} <= set(strides):
            raise UsageError(f"a pyramid needs maps of strides 8, 16 and 32; {name!r} has {strides}")
        self.backbone = backbone
        self.taken = [len(strides) - 1 - strides[::-1].index(s) for s in (8, 16, 32)]
        channels = [backbone.feature_info.channels()[i] for i in self.taken]
        self.pyramid = FeaturePyramidNetwork(channels, width, extra_blocks=LastLevelMaxPool())
        layers: list[nn.Module] = []
        for _ in range(head):
            groups = 32 if width % 32 == 0 else 1
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(groups, width), nn.ReLU()]
        self.head = nn.Sequential(*layers)
        self.num_features = width

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Pixels (N, 3, H, W) to the maps of all levels (N, width, h, w), the finest first."""
        stages = self.backbone(x)
        levels = self.pyramid({str(i): stages[i] for i in self.taken})
        return [self.head(cells) for cells in levels.values()]

    def forward_map(self, x: Tensor) -> Tensor:
        """The finest map (N, width, H / 8, W / 8)."""
        return self.forward_maps(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, width): the mean over cells, then over levels."""
        return torch.stack([cells.mean((2, 3)) for cells in self.forward_maps(x)]).mean(0)
