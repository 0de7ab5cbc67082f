"""Pictures from untrusted bytes: checked by their header before anything is decoded, then decoded within bounds."""

import io
import math
import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from contralto.errors import DataError

__all__ = [
    "FORMATS",
    "ImageError",
    "ImageInfo",
    "decode_image",
    "duplicate_groups",
    "filter_reason",
    "load_image",
    "open_image",
    "orientation",
    "oriented_size",
    "perceptual_hash",
    "probe_image",
]

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
MAX_BYTES = 64 * 2**20

ImageFile.LOAD_TRUNCATED_IMAGES = False
PngImagePlugin.MAX_TEXT_CHUNK = 2**20
PngImagePlugin.MAX_TEXT_MEMORY = 4 * 2**20


class ImageError(DataError):
    """A picture that cannot be used; `reason` is a short code that counts can be made of."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + (f" ({detail})" if detail else ""))
        self.reason, self.detail = reason, detail


class ImageInfo(NamedTuple):
    """What the header says: pixels after EXIF rotation, and the format found in the bytes."""

    width: int
    height: int
    format: str


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Read and check the header; nothing is decoded before `load_image`.

    Raises
    ------
    ImageError
        If the bytes are not a picture in one of `FORMATS` within the bounds.

    Examples
    --------
    >>> buffer = io.BytesIO()
    >>> Image.new("RGB", (30, 20)).save(buffer, "PNG")
    >>> open_image(buffer.getvalue()).size
    (30, 20)
    """
    if not data:
        raise ImageError("empty file")
    if len(data) > max_bytes:
        raise ImageError("too many bytes", f"{len(data)} > {max_bytes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        start = data[:256].lstrip().lower()
        markup = start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg"))
        raise ImageError("not an image", "markup" if markup else "unknown bytes") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError("too many pixels", str(error)[:120]) from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError, OverflowError) as error:
        raise ImageError("broken image", f"{type(error).__name__}: {error}"[:120]) from error
    if image.width * image.height > max_pixels:
        raise ImageError("too many pixels", f"{image.width} x {image.height}")
    return image


def probe_image(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> ImageInfo:
    """Read the header only.

    Parameters
    ----------
    data : bytes
    max_pixels, max_bytes : int
        Bounds; beyond them the picture is refused.

    Raises
    ------
    ImageError
        If the bytes are not a picture in one of `FORMATS` within the bounds.

    Examples
    --------
    >>> buffer = io.BytesIO()
    >>> Image.new("RGB", (30, 20)).save(buffer, "PNG")
    >>> probe_image(buffer.getvalue())
    ImageInfo(width=30, height=20, format='PNG')
    """
    image = open_image(data, max_pixels=max_pixels, max_bytes=max_bytes)
    return ImageInfo(*oriented_size(image), str(image.format))


def orientation(image: Image.Image) -> int:
    """How EXIF says that the pixels lie: 1 (as they are) to 8."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, ArithmeticError):
        return 1  # a damaged EXIF block says nothing about the pixels


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after EXIF rotation, by the header."""
    if image.format == "TIFF":
        return image.size  # PIL has turned it already
    return (image.height, image.width) if orientation(image) in (5, 6, 7, 8) else image.size


def decode_image(
    data: bytes, *, size: int | None = None, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> npt.NDArray[np.uint8]:
    """Decode to RGB: EXIF rotation applied, transparency on white, 16 bit scaled, the first frame of an animation.

    Parameters
    ----------
    data : bytes
    size : int, optional
        A JPEG may be decoded at half, quarter or eighth scale as long as its shorter side keeps this many pixels.

    Returns
    -------
    array (H, W, 3) uint8

    Raises
    ------
    ImageError
        Also if the picture is truncated.
    """
    image = load_image(open_image(data, max_pixels=max_pixels, max_bytes=max_bytes), size)
    return np.array(image, dtype=np.uint8)  # a copy: torch wants writable memory


def load_image(image: Image.Image, size: int | None = None) -> Image.Image:
    """Decode what `open_image` opened, as `decode_image` does, to a PIL image in RGB.

    Raises
    ------
    ImageError
        If the picture is truncated or broken.
    """
    try:
        if size is not None and image.format == "JPEG":
            ratio = size / min(image.size)
            image.draft("RGB", (max(1, math.ceil(image.width * ratio)), max(1, math.ceil(image.height * ratio))))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on metadata; what matters raises
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError, OverflowError) as error:
        reason = "truncated" if "truncated" in str(error) else "broken image"
        raise ImageError(reason, f"{type(error).__name__}: {error}"[:120]) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1e-9)
        return Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # to convert is to copy, even where nothing changes


def filter_reason(
    image: npt.NDArray[np.uint8], *, min_side: int = 32, max_aspect: float = 5.0, blank_share: float | None = 0.8
) -> str | None:
    """Why a picture is of no use, or None (CAPro 0.1).

    Parameters
    ----------
    image : array (H, W, 3) uint8
    min_side : int
        Smallest side in pixels.
    max_aspect : float
        Largest height / (width + 1), and its inverse.
    blank_share : float, optional
        The picture is blank when one grey level covers this share of it, looked at with at most 64 pixels a side; None
        looks for nothing. Drawings on white may need a larger share.

    Examples
    --------
    >>> filter_reason(np.zeros((40, 40, 3), np.uint8)), filter_reason(np.zeros((10, 40, 3), np.uint8))
    ('blank', 'too small')
    """
    height, width = image.shape[:2]
    if min(height, width) < min_side:
        return "too small"
    if height / (width + 1) > max_aspect or height / (width + 1) < 1 / max_aspect:
        return "extreme aspect"
    if blank_share is not None:
        side = min(64, height, width)
        grey = np.asarray(Image.fromarray(image).convert("L").resize((side, side)))
        if np.bincount(grey.ravel(), minlength=256).max() >= blank_share * grey.size:
            return "blank"
    return None


def perceptual_hash(image: npt.NDArray[np.uint8]) -> int:
    """64 bits that near-identical pictures share: signs of the 8 x 8 lowest frequencies of the 32 x 32 grey picture.

    Examples
    --------
    >>> ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[:, None, None], 64, 1).repeat(3, 2)
    >>> perceptual_hash(ramp) == perceptual_hash(np.ascontiguousarray(ramp[::2, ::2]))
    True
    """
    from scipy.fft import dctn

    grey = np.asarray(Image.fromarray(image).convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = dctn(grey, norm="ortho")[:8, :8].ravel()
    low[np.abs(low) < 1e-6] = 0.0
    bits = low > np.median(low[1:])
    return int(np.packbits(bits).view(">u8")[0])


def duplicate_groups(
    phash: npt.NDArray[np.uint64], sha256: npt.NDArray[np.str_], *, max_distance: int = 1
) -> npt.NDArray[np.int64]:
    """Group near-identical pictures.

    Parameters
    ----------
    phash : array (N,) uint64
    sha256 : array (N,) str
        Equal bytes are always one group.
    max_distance : int
        Bits that may differ, at most 3. Groups are transitive: on pictures that are much alike, such as products on white, a
        larger distance chains different ones together.

    Returns
    -------
    array (N,) int64
        Row number of the first member of the group.

    Notes
    -----
    Hashes that differ in at most 3 of 64 bits agree in at least one of four 16-bit bands, so only members of one band
    bucket are compared. A bucket of more than 500 different hashes is compared within 500 neighbours of its sorted order.

    Examples
    --------
    >>> duplicate_groups(np.array([7, 200, 6], np.uint64), np.array(["a", "b", "c"])).tolist()
    [0, 1, 0]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(phash)
    if n == 0:
        return np.zeros(0, np.int64)
    rows, columns = [np.arange(n)], [np.arange(n)]
    _, same_bytes = np.unique(sha256, return_inverse=True)
    hashes, same_hash = np.unique(phash, return_inverse=True)
    for inverse in (same_bytes, same_hash):
        first = np.full(inverse.max() + 1, n)
        np.minimum.at(first, inverse, np.arange(n))
        rows.append(np.arange(n))
        columns.append(first[inverse])
    representative = np.full(len(hashes), n)
    np.minimum.at(representative, same_hash, np.arange(n))
    for band in range(4):
        key = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(key, kind="stable")
        sorted_key = key[order]
        for step in range(1, 501):
            left = np.flatnonzero(sorted_key[step:] == sorted_key[:-step])
            if len(left) == 0:
                break
            a, b = order[left], order[left + step]
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= max_distance
            rows.append(representative[a[near]])
            columns.append(representative[b[near]])
    row, column = np.concatenate(rows), np.concatenate(columns)
    _, component = connected_components(coo_array((np.ones(len(row)), (row, column)), shape=(n, n)), directed=False)
    first = np.full(component.max() + 1, n)
    np.minimum.at(first, component, np.arange(n))
    return np.asarray(first[component], dtype=np.int64)
