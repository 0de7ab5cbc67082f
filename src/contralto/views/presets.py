"""What the papers show to their encoders: lists of `BatchView`, two or more of each picture.

Sizes are arguments. Where the code of a paper blurs with PIL, whose filter is as wide as its blur, so do these; elsewhere the
filter has SimCLR's width, a tenth of the picture.
"""

from typing import Literal

from contralto.errors import UsageError
from contralto.views.batched import BatchView
from contralto.views.image import IMAGENET_MEAN, IMAGENET_STD

__all__ = [
    "adainf_pair",
    "byol_pair",
    "cacr_views",
    "groco_views",
    "moco_pair",
    "multi_crop",
    "pixpro_pair",
    "simclr_pair",
]

Colour = tuple[float, float, float]
Range = tuple[float, float]
_WIDE = -1  # as many taps as the blur needs


def simclr_pair(
    size: int,
    strength: float = 1.0,
    *,
    scale: Range = (0.08, 1.0),
    blur: float | None = None,
    mean: Colour = IMAGENET_MEAN,
    std: Colour = IMAGENET_STD,
) -> list[BatchView]:
    """SimCLR (Chen et al. 2020, A): two views of one kind.

    Parameters
    ----------
    size : int
    strength : float
        Of the colours; the paper takes 0.5 for CIFAR.
    scale : tuple of float
    blur : float, optional
        Probability; by default 0.5, and 0 for pictures of 32 pixels and less, as in the paper (B.9).
    mean, std : tuple of float

    Examples
    --------
    >>> first, second = simclr_pair(32, strength=0.5)
    >>> first == second, first.jitter, first.blur_p
    (True, (0.4, 0.4, 0.4, 0.1), 0.0)
    """
    blur = (0.5 if size > 32 else 0.0) if blur is None else blur
    s = strength
    jitter = (0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    return [BatchView(size, scale, jitter=jitter, grey=0.2, blur_p=blur, mean=mean, std=std)] * 2


def moco_pair(
    size: int,
    *,
    scale: Range = (0.2, 1.0),
    blur: float | None = None,
    mean: Colour = IMAGENET_MEAN,
    std: Colour = IMAGENET_STD,
) -> list[BatchView]:
    """MoCo v2 (Chen et al. 2020, code): two views of one kind.

    Parameters
    ----------
    size : int
    scale : tuple of float
    blur : float, optional
        Probability; by default 0.5, and 0 for pictures of 32 pixels and less.
    mean, std : tuple of float

    Examples
    --------
    >>> [view.jitter for view in moco_pair(224)]
    [(0.4, 0.4, 0.4, 0.1), (0.4, 0.4, 0.4, 0.1)]
    """
    blur = (0.5 if size > 32 else 0.0) if blur is None else blur
    jitter = (0.4, 0.4, 0.4, 0.1)
    view = BatchView(size, scale, jitter=jitter, grey=0.2, blur_p=blur, blur_kernel=_WIDE, mean=mean, std=std)
    return [view] * 2


def byol_pair(
    size: int,
    *,
    scale: Range = (0.08, 1.0),
    blur: tuple[float, float] | None = None,
    mean: Colour = IMAGENET_MEAN,
    std: Colour = IMAGENET_STD,
) -> list[BatchView]:
    """BYOL (Grill et al. 2020, B): the first view is always blurred, the second rarely, but sometimes solarised.

    Parameters
    ----------
    size : int
    scale : tuple of float
    blur : two floats, optional
        Probabilities; by default 1 and 0.1, and 0 for pictures of 32 pixels and less.
    mean, std : tuple of float

    Examples
    --------
    >>> [(view.blur_p, view.solarize_p) for view in byol_pair(224)]
    [(1.0, 0.0), (0.1, 0.2)]
    """
    blur = ((1.0, 0.1) if size > 32 else (0.0, 0.0)) if blur is None else blur
    return [
        BatchView(
            size,
            scale,
            jitter=(0.4, 0.4, 0.2, 0.1),
            grey=0.2,
            blur_p=p,
            solarize_p=solarize,
            interpolation="bicubic",
            mean=mean,
            std=std,
        )
        for p, solarize in zip(blur, (0.0, 0.2), strict=True)
    ]


def pixpro_pair(
    size: int, *, scale: Range = (0.08, 1.0), mean: Colour = IMAGENET_MEAN, std: Colour = IMAGENET_STD
) -> list[BatchView]:
    """PixPro (Xie et al. 2021, code): as BYOL's, with bilinear crops and a blur as wide as it needs.

    Examples
    --------
    >>> [(view.blur_p, view.solarize_p) for view in pixpro_pair(224)]
    [(1.0, 0.0), (0.1, 0.2)]
    """
    jitter = (0.4, 0.4, 0.2, 0.1)
    return [
        BatchView(
            size, scale, jitter=jitter, grey=0.2, blur_p=p, blur_kernel=_WIDE, solarize_p=solarize, mean=mean, std=std
        )
        for p, solarize in ((1.0, 0.0), (0.1, 0.2))
    ]


def multi_crop(
    size: int,
    small_size: int = 0,
    small_count: int = 0,
    *,
    count: int = 2,
    scale: Range | None = None,
    small_scale: Range = (0.05, 0.14),
    strength: float = 1.0,
    blur: float = 0.5,
    mean: Colour = IMAGENET_MEAN,
    std: Colour = IMAGENET_STD,
) -> list[BatchView]:
    """SwAV's multi-crop (Caron et al. 2020): large views, then small ones of small parts; the colours are SimCLR's.

    Parameters
    ----------
    size : int
        Side of the large views.
    small_size, small_count : int
        Side and number of the small views.
    count : int
        Number of the large views.
    scale : tuple of float, optional
        Of the large views: by default 0.14 to 1 beside small ones, 0.08 to 1 without.
    small_scale : tuple of float
    strength, blur : float
        Of the colours; probability of the blur.
    mean, std : tuple of float

    Examples
    --------
    >>> [view.size for view in multi_crop(224, 96, 6)]
    [224, 224, 96, 96, 96, 96, 96, 96]
    """
    s = strength
    jitter = (0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    return [
        BatchView(side, share, jitter=jitter, grey=0.2, blur_p=blur, blur_kernel=_WIDE, mean=mean, std=std)
        for side, share in _crops(size, count, scale, small_size, small_count, small_scale)
    ]


def groco_views(
    size: int,
    small_size: int = 0,
    small_count: int = 0,
    *,
    count: int = 2,
    scale: Range = (0.14, 1.0),
    small_scale: Range = (0.05, 0.14),
    mean: Colour = IMAGENET_MEAN,
    std: Colour = IMAGENET_STD,
) -> list[BatchView]:
    """GroCo (Shvetsova et al. 2023, code): large views that take turns in BYOL's two kinds, small ones blurred half the time.

    Examples
    --------
    >>> [(view.size, view.blur_p, view.solarize_p) for view in groco_views(224, 96, 1, count=3)]
    [(224, 1.0, 0.0), (224, 0.1, 0.2), (224, 1.0, 0.0), (96, 0.5, 0.0)]
    """
    kinds = [((1.0, 0.0), (0.1, 0.2))[i % 2] for i in range(count)] + [(0.5, 0.0)] * small_count
    crops = _crops(size, count, scale, small_size, small_count, small_scale)
    return [
        BatchView(
            side,
            share,
            jitter=(0.4, 0.4, 0.2, 0.1),
            grey=0.2,
            blur_p=blur,
            blur_kernel=_WIDE,
            solarize_p=solarize,
            interpolation="bicubic",
            mean=mean,
            std=std,
        )
        for (side, share), (blur, solarize) in zip(crops, kinds, strict=True)
    ]


def cacr_views(
    size: int,
    *,
    count: int = 5,
    scale: Range = (0.2, 1.0),
    mean: Colour = IMAGENET_MEAN,
    std: Colour = IMAGENET_STD,
) -> list[BatchView]:
    """CACR on small pictures (Zheng et al. 2023): K + 1 views whose colours always change; at 64 pixels `scale` is 0.08 to 1.

    Examples
    --------
    >>> len(cacr_views(32))
    5
    """
    return [BatchView(size, scale, jitter=(0.4,) * 4, jitter_p=1.0, grey=0.2, mean=mean, std=std)] * count


def adainf_pair(
    size: int,
    strength: float | Literal["weak", "strong"] = "weak",
    *,
    learner: Literal["simclr", "moco", "byol"] = "simclr",
    mean: Colour = IMAGENET_MEAN,
    std: Colour = IMAGENET_STD,
) -> list[BatchView]:
    """AdaInf (Wang et al. 2024): weaker views for data that were inflated by generated ones, and the strong ones they replace.

    Parameters
    ----------
    size : int
    strength : float, "weak" or "strong"
        "strong", or 1, is what is usual for the learner; "weak", or 0.5, is AdaInf's: the smallest crop covers 0.2 of the picture
        instead of 0.08, colours change half as often, and for SimCLR half as much. Other numbers from 0 to 1 lie on that line.
    learner : {"simclr", "moco", "byol"}
        SimCLR and MoCo have two views of one kind; BYOL and Barlow Twins blur none and solarise the second.
    mean, std : tuple of float

    Examples
    --------
    >>> adainf_pair(32)[0].scale, adainf_pair(32, "strong")[0].scale
    ((0.2, 1.0), (0.08, 1.0))
    """
    share = {"weak": 0.5, "strong": 1.0}.get(strength, -1.0) if isinstance(strength, str) else strength
    if not 0 <= share <= 1 or learner not in ("simclr", "moco", "byol"):
        raise UsageError(
            f'strength is "weak", "strong" or from 0 to 1, learner "simclr", "moco" or "byol"; got {strength!r}, {learner!r}'
        )
    jitter, blur, solarize = (0.4, 0.4, 0.4, 0.1), 0.5, (0.0, 0.0)
    if learner == "simclr":
        jitter = (0.8 * share, 0.8 * share, 0.8 * share, 0.2 * share)
    elif learner == "byol":
        jitter, blur, solarize = (0.4, 0.4, 0.2, 0.1), 0.0, (0.0, 0.2)
    return [
        BatchView(
            size,
            (round(0.32 - 0.24 * share, 6), 1.0),
            jitter=jitter,
            jitter_p=0.8 * share,
            grey=0.2,
            blur_p=blur,
            blur_kernel=_WIDE,
            solarize_p=p,
            interpolation="bicubic",
            mean=mean,
            std=std,
        )
        for p in solarize
    ]


def _crops(
    size: int, count: int, scale: Range | None, small_size: int, small_count: int, small_scale: Range
) -> list[tuple[int, Range]]:
    """Side and share of the area of large views and of small ones."""
    if count < 1 or small_count < 0 or (small_count and small_size < 1):
        raise UsageError(
            "there is at least one large view, and small ones have a size;"
            f" got {count} large and {small_count} small of {small_size} pixels"
        )
    if scale is None:
        scale = (0.14, 1.0) if small_count else (0.08, 1.0)
    return [(size, scale)] * count + [(small_size, small_scale)] * small_count
