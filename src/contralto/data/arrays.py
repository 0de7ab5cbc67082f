"""Pictures in NumPy archives (`.npz`): an array of pictures, and beside it arrays with an entry for each of them.

Sizes and types are read from the headers of the members and checked before anything is inflated, nothing is unpickled, and rows
are read a few at a time. What `numpy.savez` wrote can be read from any row on; what `numpy.savez_compressed` wrote only from its
beginning, so that such an archive is read in one go, and its pictures are bounded by `MAX_PACKED`.

Pictures are uint8, (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels. Entries of the other arrays are columns of the same names,
and of those that `COMMON` gives them; -1 and NaN say that there is none. `train_images`, `x_test` and the like are parts of the
data, whose name becomes the column `split`. Texts in `alphabet_names` are what the numbers in `alphabet` mean.
"""

import io
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from contralto.errors import ContraltoError, DataError

__all__ = ["BoundedFile", "Member", "Pictures", "as_png", "find_pictures", "read_members", "read_pictures", "read_rows"]

Array = npt.NDArray[Any]
PICTURES = ("images", "image", "x", "data", "pictures", "imgs", "img", "arr_0")
"""Common names of the array of pictures; where there is one array that can hold pictures, it may be called anything."""
COMMON = {
    "labels": "label", "y": "label", "targets": "label", "target": "label", "class": "label", "character": "label", "ids": "id",
    "groups": "group", "alphabet": "group", "splits": "split", "texts": "text", "captions": "text", "titles": "text",
}  # fmt: skip
"""What arrays of common names are for."""
CLASS_NAMES = ("label_names", "class_names", "names", "classes", "categories")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MAX_PIXELS = 50_000_000
MAX_PACKED = 2 * 2**30
MAX_RATIO = 100  # a packed member of real values holds five to twenty times what it takes; short ones may be all alike
MAX_ENTRY = 2**18
MAX_NAMES = 16 * 2**20
MAX_MEMBERS = 1000
MAX_HEADER = 16 * 2**10
PIECE = 2**20


@dataclass(frozen=True)
class Member:
    """An array of an archive, as its header tells.

    Parameters
    ----------
    name : str
        Without `.npy`.
    shape : tuple of int
    dtype : numpy.dtype
        Of kind "O" where the array holds Python objects, which are never read.
    start : int
        Where the values begin: in the file, or in the inflated member where it is `packed`.
    packed : bool
    problem : str
        Why it cannot be read; "" = it can.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    packed: bool
    problem: str = ""

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def holds_pictures(self) -> bool:
        """Whether type and shape are those of pictures."""
        grey, coloured = len(self.shape) == 3, len(self.shape) == 4 and self.shape[3] in (1, 3, 4)
        return self.dtype == np.uint8 and (grey or coloured) and min(self.shape) > 0

    def __str__(self) -> str:
        return f"{self.name[:80]} {self.shape} {self.dtype}"


@dataclass(frozen=True)
class Pictures:
    """An array of pictures, and the columns beside it.

    Parameters
    ----------
    member : Member
        The pictures.
    columns : mapping of str to Member
        By the name of the column.
    meanings : mapping of str to Member
        The texts that the numbers of some columns mean.
    split : str
        The part of the data that it is; "" = all.
    """

    member: Member
    columns: Mapping[str, Member]
    meanings: Mapping[str, Member] = field(default_factory=dict)
    split: str = ""

    def __len__(self) -> int:
        return self.member.shape[0]

    @property
    def packed(self) -> bool:
        """Whether any of the arrays can only be read from its beginning."""
        return any(m.packed for m in (self.member, *self.columns.values()))


def read_members(file: Any, path: str) -> dict[str, Member]:
    """The arrays of an archive, by their headers.

    Parameters
    ----------
    file : file opened for reading bytes
    path : str
        Its name, for errors.

    Raises
    ------
    DataError
        If it is no archive of arrays.

    Examples
    --------
    >>> buffer = io.BytesIO()
    >>> np.savez_compressed(buffer, images=np.zeros((5, 8, 8), np.uint8), y=np.arange(5))
    >>> [str(m) for m in read_members(buffer, "a.npz").values()]
    ['images (5, 8, 8) uint8', 'y (5,) int64']
    """
    found = {}
    with _telling(path):
        archive = zipfile.ZipFile(BoundedFile(file, zipfile.BadZipFile))
        if len(archive.infolist()) > MAX_MEMBERS:
            raise DataError(f"has more than {MAX_MEMBERS} members", file=path)
        for info in archive.infolist():
            if info.filename.endswith(".npy"):
                name = info.filename.removesuffix(".npy")
                with _telling(path, name):
                    found[name] = _member(archive, file, info, name)
    return found


def _member(archive: zipfile.ZipFile, file: Any, info: zipfile.ZipInfo, name: str) -> Member:
    """A member by its two headers, that of the archive and that of the array."""
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("it is encrypted, or packed in a way that NumPy does not use")
    packed = info.compress_type == zipfile.ZIP_DEFLATED
    with archive.open(info) as stream:
        head = io.BytesIO(stream.read(MAX_HEADER))
    version = np.lib.format.read_magic(head)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(head)
    start, size = head.tell(), prod(shape) * dtype.itemsize
    problem = ""
    if dtype.hasobject:
        problem = "holds Python objects, which are never unpickled: save it as numbers or texts"
    elif fortran and len(shape) > 1:
        problem = "lies in Fortran order: save numpy.ascontiguousarray of it"
    elif min(shape, default=1) < 0 or info.file_size != start + size:
        raise ValueError(f"its header asks for {size} bytes of {shape} {dtype}, and it holds {info.file_size - start}")
    elif packed and info.file_size > 64 * 2**20 + MAX_RATIO * info.compress_size:
        problem = f"asks for {info.file_size} bytes, too many for the {info.compress_size} that it takes"
    if not packed:
        file.seek(info.header_offset)
        local = file.read(30)
        start += info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
    return Member(name, tuple(map(int, shape)), dtype, start, packed, problem)


def find_pictures(members: Mapping[str, Member], path: str, wanted: str | None = None) -> list[Pictures]:
    """Which arrays are pictures, and what stands beside them.

    Parameters
    ----------
    members : mapping of str to Member
        Of `read_members`, with the file to which they belong.
    path : str
        Name of the file, for errors.
    wanted : str, optional
        The array of pictures; default: by the common names, or the only one that can be.

    Returns
    -------
    list of Pictures
        One, or one per part of the data.

    Raises
    ------
    DataError
        If no array can be pictures, or several can, or columns do not fit.

    Examples
    --------
    >>> buffer = io.BytesIO()
    >>> np.savez(buffer, x_train=np.zeros((5, 8, 8), np.uint8), y_train=np.arange(5), x_test=np.zeros((2, 8, 8), np.uint8))
    >>> for part in find_pictures(read_members(buffer, "a.npz"), "a.npz"):
    ...     part.split, part.member.name, list(part.columns)
    ('train', 'x_train', ['y', 'label'])
    ('test', 'x_test', [])
    """
    told = ", ".join(map(str, list(members.values())[:20])) or "nothing"
    form = "pictures are uint8, (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels"
    if wanted is not None and (wanted not in members or not members[wanted].holds_pictures):
        raise DataError(f"has no array {wanted!r} of pictures: {form}; it holds {told}", file=path)
    able = [m for m in members.values() if m.holds_pictures and wanted in (None, m.name)]
    chosen = []
    for split in dict.fromkeys(_part(m.name)[0] for m in able):
        here = [m for m in able if _part(m.name)[0] == split]
        named = [m for n in PICTURES for m in here if _part(m.name)[1].lower() == n]
        if len(here) > 1 and not named:
            raise DataError(f"which are the pictures? {told}; name them with --image_column", file=path)
        chosen.append((split, (named or here)[0]))
    if any(not split for split, _ in chosen):
        chosen = [(split, m) for split, m in chosen if not split]
    if not chosen:
        raise DataError(f"no array can be pictures: {form}; it holds {told}", file=path)
    return [_with_columns(members, member, split, path) for split, member in chosen]


def _part(name: str) -> tuple[str, str]:
    """The part of the data that the name of an array tells, "" for none, and the rest of the name."""
    words = "|".join(SPLITS)
    found = re.fullmatch(rf"({words})_(.+)|(.+)_({words})", name, re.IGNORECASE)
    if found is None:
        return "", name
    first, after, before, last = found.groups()
    return SPLITS[(first or last).lower()], after or before


def _with_columns(members: Mapping[str, Member], pictures: Member, split: str, path: str) -> Pictures:
    if pictures.problem or prod(pictures.shape[1:3]) > MAX_PIXELS:
        raise DataError(f"{pictures}: {pictures.problem or 'too many pixels'}", file=path)
    if pictures.packed and pictures.row_bytes * len(range(pictures.shape[0])) > MAX_PACKED:
        raise DataError(
            f"{pictures} takes more than {MAX_PACKED} bytes, and a packed array cannot be read from the middle: save it with "
            "numpy.savez, not numpy.savez_compressed, or in several files",
            file=path,
        )
    n = pictures.shape[0]
    columns: dict[str, Member] = {}
    for member in members.values():
        part, base = _part(member.name)
        name = base if split else member.name
        role = COMMON.get(name.lower(), name.lower() if name.lower() in COMMON.values() else "")
        if member is pictures or (split and part != split):
            continue
        plain = len(member.shape) == 1 or (len(member.shape) == 2 and member.shape[1] == 1)
        fits = plain and member.shape[0] == n and member.dtype.kind in "biufUS" and not member.problem
        if fits and member.row_bytes <= MAX_ENTRY:
            columns[name] = member
        elif role:
            wrong = member.problem or f"it must hold a number or a short text for each of the {n} pictures"
            raise DataError(f"{member}: {wrong}", file=path)
    for name in list(columns):
        columns.setdefault(COMMON.get(name.lower(), name), columns[name])
    meanings = {}
    for name, member in columns.items():
        usual = CLASS_NAMES if COMMON.get(name.lower(), name) == "label" else ()
        texts = [members[w] for w in (f"{_part(member.name)[1]}_names", *usual) if w in members and w not in columns]
        texts = [t for t in texts if t.dtype.kind in "US" and len(t.shape) == 1 and not t.problem]
        if member.dtype.kind in "iu" and texts:
            meanings[name] = texts[0]
    return Pictures(pictures, columns, meanings, split)


def read_pictures(
    file: Any, path: str, pictures: Pictures, first: int = 0, count: int | None = None
) -> Iterator[tuple[int, Array, dict[str, Any]]]:
    """Pictures with their columns, a few in memory at a time.

    Parameters
    ----------
    file : file opened for reading bytes
    path : str
        Its name, for errors.
    pictures : Pictures
    first, count : int
        From which row on, and how many; default: all.

    Yields
    ------
    row : int
    pixels : array (H, W) or (H, W, C) uint8
    fields : dict
        Column to value, None where there is none.

    Raises
    ------
    DataError
        If the file is damaged, or a number has no meaning among the texts that stand for them; names array and row.
    """
    meanings = {name: _meanings(file, path, m) for name, m in pictures.meanings.items()}
    every = [pictures.member, *pictures.columns.values()]
    last = len(pictures) if count is None else min(len(pictures), first + count)
    step = max(1, PIECE // sum(m.row_bytes for m in every))
    streams = [_Stream(file, path, m, first) for m in every]
    for row in range(first, last, step):
        pixels, *columns = (stream.take(min(step, last - row)) for stream in streams)
        cells = [_values(c.reshape(len(c))) for c in columns]
        for i, picture in enumerate(pixels):
            fields = {"split": pictures.split} if pictures.split else {}
            for name, values in zip(pictures.columns, cells, strict=True):
                fields[name] = values[i]
                if name in meanings and values[i] is not None:
                    if values[i] >= len(meanings[name]):
                        told = f"{values[i]} in {name!r} has no entry in {pictures.meanings[name]}"
                        raise DataError(told, file=path, row=row + i)
                    fields[name] = meanings[name][values[i]]
            yield row + i, picture, fields


def read_rows(file: Any, path: str, member: Member, first: int = 0, count: int | None = None) -> Array:
    """Some entries of an array.

    Parameters
    ----------
    file : file opened for reading bytes
    path : str
        Its name, for errors.
    member : Member
    first, count : int
        From which entry on, and how many; default: all.

    Returns
    -------
    array (count, ...)

    Raises
    ------
    DataError
        If they are not there.

    Examples
    --------
    >>> buffer = io.BytesIO()
    >>> np.savez(buffer, y=np.arange(5))
    >>> read_rows(buffer, "a.npz", read_members(buffer, "a.npz")["y"], 3).tolist()
    [3, 4]
    """
    count = member.shape[0] - first if count is None else count
    if min(first, count) < 0 or first + count > member.shape[0]:
        raise DataError(f"{member} has no entries {first} to {first + count}", file=path)
    return _Stream(file, path, member, first).take(count)


def as_png(pixels: Array) -> bytes:
    """A picture as a file, nothing packed: the same bytes for the same pixels.

    Examples
    --------
    >>> from contralto.data.images import decode_image
    >>> decode_image(as_png(np.full((2, 3), 7, np.uint8)))[0, 0].tolist()
    [7, 7, 7]
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _meanings(file: Any, path: str, member: Member) -> list[str]:
    if member.row_bytes * member.shape[0] > MAX_NAMES:
        raise DataError(f"{member} takes more than {MAX_NAMES} bytes, too many for names", file=path)
    return [str(v) for v in _values(read_rows(file, path, member))]


def _values(column: Array) -> list[Any]:
    """Entries as Python has them; None for -1 and NaN."""
    if column.dtype.kind == "S":
        return [v.decode("utf-8", errors="replace") for v in column.tolist()]
    if column.dtype.kind in "if":
        none = np.isnan(column) if column.dtype.kind == "f" else column == -1
        return [None if n else v for v, n in zip(column.tolist(), none.tolist(), strict=True)]
    return list(column.tolist())


class _Stream:
    """The entries of an array one after the other, from one of them on."""

    def __init__(self, file: Any, path: str, member: Member, first: int) -> None:
        self.file, self.path, self.member, self.row = file, path, member, first
        self.stream: Any = None
        if member.packed:
            with _telling(path, member.name):
                archive = zipfile.ZipFile(BoundedFile(file, zipfile.BadZipFile))
                self.stream = archive.open(f"{member.name}.npy")
                left = member.start + first * member.row_bytes
                while left:
                    left -= len(self._read(min(PIECE, left)))

    def take(self, count: int) -> Array:
        """The next entries."""
        with _telling(self.path, self.member.name, self.row):
            if self.stream is None:
                self.file.seek(self.member.start + self.row * self.member.row_bytes)
            data = self._read(count * self.member.row_bytes)
            entries = np.frombuffer(data, self.member.dtype).reshape(count, *self.member.shape[1:])
        self.row += count
        return entries

    def _read(self, size: int) -> bytearray:
        """So many bytes, asked for in pieces, because a file may not hold what its headers promise."""
        data = bytearray()
        while len(data) < size:
            piece = (self.file if self.stream is None else self.stream).read(min(PIECE, size - len(data)))
            if not piece:
                raise EOFError(f"{size - len(data)} bytes are missing")
            data += piece
        return data


class BoundedFile:
    """A file from which no header of an archive can ask for more than `PIECE` bytes at once.

    Parameters
    ----------
    file : file opened for reading bytes
    error : type of exception
        What is raised then.
    """

    def __init__(self, file: Any, error: type[Exception]) -> None:
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self._file, self._error = file, error

    def read(self, size: int = -1) -> bytes:
        """So many bytes."""
        found = bytes(self._file.read(min(size, PIECE + 1) if size >= 0 else PIECE + 1))
        if len(found) > PIECE:
            raise self._error(f"a part of more than {PIECE} bytes")
        return found


@contextmanager
def _telling(path: str, member: str | None = None, row: int | None = None) -> Iterator[None]:
    """Name file, array and row where damaged bytes raise something: nearly any error can come of them."""
    try:
        yield
    except (ContraltoError, ConnectionError, TimeoutError):
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
        what = "is no archive of NumPy arrays" if member is None else f"array {member[:80]!r} cannot be read"
        raise DataError(f"{what} ({told})", file=path, row=row) from error
