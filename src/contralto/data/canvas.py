"""Pictures of all shapes as batches of bytes: each at the top left of a square canvas, with its size beside it.

Augmentation of whole batches (`views.batched`) wants pictures that were decoded once. `CanvasDataset` yields batches of
canvases; with a cache every picture is decoded a single time, before training, into one file that workers map into memory.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from contralto.data.images import ImageError, load_image, open_image, oriented_size
from contralto.errors import DataError, UsageError
from contralto.files import naming
from contralto.views.image import OVERSAMPLING, resize_image

__all__ = ["CanvasDataset", "as_it_is", "fit_picture"]

Batch = dict[str, Any]
Pixels = npt.NDArray[np.uint8]
BLOCK, THREADS = 16, 4
"""Pictures that are decoded between two writes of the cache, and how many at once: each may be of the largest size allowed."""
TOLERANCE = 4.0
"""Mean difference of levels that another decoder may make."""


class CanvasDataset(Dataset[Batch]):
    """Pictures on canvases, a whole batch at a time.

    Parameters
    ----------
    read : function
        Row -> encoded bytes, which are decoded here within bounds, or uint8 array (H, W, 3). Called in one thread only.
    fields : mapping of str to Tensor (N, ...)
        What comes along with each row (`label`, ...).
    side : int
        Of the canvas, in pixels. Pictures whose longer side is longer are made smaller; none is enlarged. A crop of a tenth of
        the area is as sharp as before from a side of about three times that of the view on.
    count : int, optional
        Number of rows, where `fields` is empty.
    cache : path, optional
        A file (`.npy`) that holds all canvases, in `3 side^2` bytes each. It is made at once where it is missing; an interrupted
        making goes on where it was. Without it pictures are decoded each time they are fetched, in the workers.
    name : function, optional
        Row -> name of the picture's file, for messages.
    progress : bool
        Show how far the making of the cache is, on a terminal.

    Raises
    ------
    DataError
        If a picture cannot be decoded (ingest has sorted out what could not; this one broke later), or the cache is of other
        pictures.

    Notes
    -----
    Keys are the (epoch, row) pairs of `EpochSampler`. Use with ``collate_fn=as_it_is``, or with `views.batched.DrawViews` to draw
    views in the workers. A batch is a dict of

    =============  =====================  ================================================================================
    `pictures`     (B, 3, side, side)     uint8, channels last in memory, 0 beyond the picture
    `sizes`        (B, 2) int32           height and width of the picture
    `index`        (B,) int64             row
    `epoch`        (B,) int64
    =============  =====================  ================================================================================

    and the fields.

    Examples
    --------
    >>> dataset = CanvasDataset(lambda row: np.full((4, 8, 3), row, np.uint8), {"label": torch.arange(5)}, side=4)
    >>> batch = dataset.__getitems__([(0, 3), (0, 1)])
    >>> tuple(batch["pictures"].shape), batch["sizes"].tolist(), batch["label"].tolist()
    ((2, 3, 4, 4), [[2, 4], [2, 4]], [3, 1])
    """

    def __init__(
        self,
        read: Callable[[int], bytes | Pixels],
        fields: Mapping[str, Tensor],
        *,
        side: int,
        count: int | None = None,
        cache: str | Path | None = None,
        name: Callable[[int], str] | None = None,
        progress: bool = True,
    ) -> None:
        if side < 1:
            raise UsageError(f"side is that of the canvas in pixels, at least 1; got {side}")
        counts = {k: len(v) for k, v in fields.items()} | ({} if count is None else {"count": count})
        if len(set(counts.values())) != 1:
            raise UsageError(f"fields have one row per picture, all as many, or `count` says how many; got {counts}")
        self.read, self.fields, self.side, self.name = read, dict(fields), side, name
        self._count = next(iter(counts.values()))
        self.cache = None if cache is None else Path(cache)
        self._records: npt.NDArray[Any] | None = None
        if self.cache is not None:
            self._fill(self.cache, progress)

    def __len__(self) -> int:
        return self._count

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        epochs, rows = np.array(keys, np.int64).reshape(-1, 2).T
        if self.cache is None:
            records, chosen = np.zeros(len(rows), self._form), np.arange(len(rows))
            for record, row in zip(records, rows.tolist(), strict=True):
                self._put(record, row, self.read(row))
        else:
            records, chosen = self._mapped(self.cache), rows
        index = torch.from_numpy(rows.copy())
        return {
            "pictures": torch.from_numpy(records["pixels"][chosen]).permute(0, 3, 1, 2),
            "sizes": torch.from_numpy(records["size"][chosen]),
            "index": index,
            "epoch": torch.from_numpy(epochs.copy()),
            **{k: v[index] for k, v in self.fields.items()},
        }

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        return {k: v[0] for k, v in self.__getitems__([key]).items()}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None}  # a copy in another process maps the file by itself

    @property
    def _form(self) -> np.dtype[np.void]:
        return np.dtype([("size", "<i4", (2,)), ("pixels", "u1", (self.side, self.side, 3))])

    def _put(self, record: Any, row: int, picture: bytes | Pixels) -> None:
        """Decode one picture onto its canvas."""
        try:
            pixels = fit_picture(picture, self.side)
        except ImageError as error:
            file = "the pictures" if self.name is None else self.name(row)
            raise DataError(f"cannot be decoded any more: {error}", file=file, row=row) from error
        height, width = pixels.shape[:2]
        record["size"] = height, width
        record["pixels"][:height, :width] = pixels

    # The cache: a structured array, a record per picture. It grows at its end under another name, so that its length says
    # how far it is, and a full disk is an error of `write`.

    def _mapped(self, cache: Path) -> npt.NDArray[Any]:
        if self._records is None:
            with naming(cache):
                records = np.load(cache, mmap_mode="r", allow_pickle=False)
            if records.dtype != self._form or records.shape != (len(self),):
                raise DataError(
                    f"holds {records.shape} records of {records.dtype}, not {len(self)} canvases of side {self.side}:"
                    " remove it, so that it is made again",
                    file=str(cache),
                )
            self._records = records
        return self._records

    def _fill(self, cache: Path, progress: bool) -> None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        if not cache.exists():
            growing = cache.with_name(f"{cache.name}.growing-{self.side}-{len(self)}")
            with growing.open("a+b") as held, _alone(held):
                if not cache.exists():  # another process may just have made it
                    with growing.open("r+b") as file:
                        self._grow(file, progress)
                    growing.replace(cache)
                else:
                    growing.unlink(missing_ok=True)
        records = self._mapped(cache)
        self._compare(records, cache)

    def _grow(self, file: BufferedRandom, progress: bool) -> None:
        done = self._done(file)
        if done:
            there = np.memmap(file, self._form, "r", offset=file.tell() - done * self._form.itemsize, shape=(done,))
            self._compare(there, Path(file.name))
            del there
        console = Console(stderr=True)
        steps = range(done, len(self), BLOCK)
        told = track(
            steps, "  decoding", console=console, transient=True, disable=not (progress and console.is_terminal)
        )
        with ThreadPoolExecutor(
            min(THREADS, os.cpu_count() or 1)
        ) as pool:  # both PIL and torch let others run meanwhile
            for first in told:
                rows = range(first, min(first + BLOCK, len(self)))
                records = np.zeros(len(rows), self._form)
                list(pool.map(self._put, records, rows, map(self.read, rows)))
                file.write(records.tobytes())
        file.flush()
        os.fsync(file.fileno())

    def _done(self, file: BufferedRandom) -> int:
        """How many whole records a file holds; it is left behind the last of them, cut."""
        header = {"descr": np.lib.format.dtype_to_descr(self._form), "fortran_order": False, "shape": (len(self),)}
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        start, step = file.tell(), self._form.itemsize
        done = max(0, size - start) // step
        while done:  # a power cut may leave a length without its bytes
            file.seek(start + (done - 1) * step)
            if np.frombuffer(file.read(8), "<i4").all():
                break
            done -= 1
        file.truncate(start + done * step)
        file.seek(start + done * step)
        return done

    def _compare(self, records: npt.NDArray[Any], file: Path) -> None:
        """A few pictures are decoded again: that a cache is of these pictures must not be believed."""
        for row in sorted({0, len(records) // 2, len(records) - 1} - {-1}):
            fresh = np.zeros(1, self._form)
            self._put(fresh[0], row, self.read(row))
            old, new = records[row], fresh[0]
            height, width = new["size"]
            difference = np.abs(old["pixels"].astype(np.int16) - new["pixels"])[:height, :width]
            if (old["size"] != new["size"]).any() or difference.mean() > TOLERANCE:
                raise DataError(
                    f"is of other pictures (row {row} differs): remove it, so that it is made again", file=str(file)
                )


def fit_picture(picture: bytes | Pixels, side: int) -> Pixels:
    """A picture no longer than `side`, of the same shape; one that is small enough stays as it is.

    Parameters
    ----------
    picture : bytes or uint8 array (H, W, 3)
        Encoded bytes are checked and bounded as by `decode_image`; a JPEG is decoded no finer than needed.
    side : int

    Returns
    -------
    uint8 array (height, width, 3)

    Raises
    ------
    ImageError
        If the bytes are no picture.
    UsageError
        If the array is none.

    Examples
    --------
    >>> fit_picture(np.zeros((40, 20, 3), np.uint8), 10).shape
    (10, 5, 3)
    """
    if isinstance(picture, bytes):
        image = open_image(picture)
        width, height = oriented_size(image)
        image = load_image(image, math.ceil(min(1.0, OVERSAMPLING * side / max(width, height)) * min(width, height)))
    elif picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8 and picture.size:
        height, width = picture.shape[:2]
        image = Image.fromarray(picture)
    else:
        raise UsageError(f"a picture is bytes or a uint8 array (H, W, 3); got {picture.dtype} {picture.shape}")
    if max(height, width) <= side:
        return np.asarray(image)
    rows, columns = (max(1, round(n * side / max(height, width))) for n in (height, width))
    return resize_image(image, rows, columns)


def as_it_is(batch: Any) -> Any:
    """The `collate_fn` of a dataset that yields whole batches."""
    return batch


@contextmanager
def _alone(file: Any) -> Iterator[None]:
    """Wait until no other process holds this file; the end of a process, however it came, lets go."""
    with suppress(ImportError):  # Windows has no such lock: there each process must have a cache of its own
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    yield
