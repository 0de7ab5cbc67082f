"""Readers for the forms in which people have images or sounds with texts, and random access to the bytes later.

=================  ====================================================================================================
form               what it looks like
=================  ====================================================================================================
`folder`           one folder per class; texts in side files (.txt, .json) or one `metadata.csv`/`.jsonl` with `file_name`
`shards`           img2dataset's numbered folders (`00000/000000012.jpg`, `.txt`, `.json`)
`tar`              WebDataset or img2dataset tars (`key.jpg`, `key.txt`, `key.json`, `key.cls`), through an index of their headers
`parquet`          columns with image bytes (or `{bytes, path}`), or with paths
`table`            CSV or JSON lines (`.jsonl`, `.jsonl.gz`) with paths
`arrays`           NumPy archives (`.npz`): an array of pictures, arrays of labels and the like (`data.arrays`)
=================  ====================================================================================================

Any fsspec address works in place of a local path. Nothing is extracted, nothing is unpickled, no member or path may leave
the root; what is refused comes out as a `Record` with a `problem`, so that it is counted and listed.

Data are read in blocks (`find_blocks`, `read_block`): a tar, some row groups of a Parquet file, some files, some rows of a table
or of an array. A block says where pictures are and holds none of their bytes, so any process that reaches the address can read it
by itself.
"""

import csv
import gzip
import io
import itertools
import json
import posixpath
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from contralto.data.arrays import BoundedFile, Member, as_png, find_pictures, read_members, read_pictures
from contralto.data.arrays import read_rows as read_array
from contralto.errors import DataError

__all__ = [
    "Block", "ByteReader", "Kind", "Record", "detect_form", "find_blocks", "open_filesystem", "read_block", "read_lines",
    "read_records", "read_rows",
]  # fmt: skip

Kind = Literal["image", "sound"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")
SUFFIXES = {"image": IMAGE_SUFFIXES, "sound": (".wav", ".flac", ".ogg", ".oga")}
SIDE_SUFFIXES = (".txt", ".json", ".cls")
MAX_SIDE_FILE = 2**20
MAX_LINE = 32 * 2**20
MAX_TABLE = 4 * 2**30
MAX_RATIO = 100  # a .gz of real rows expands five to twenty times
MAX_FILE = 64 * 2**20
MAX_GROUP = 2 * 2**30
BLOCK_ROWS = 1000
BLOCK_TEXT = 4 * 2**20
MAX_DEPTH = 50
_NAMES = ("path", "file_name", "filename", "filepath", "file")
_PATH_COLUMNS = {
    "image": ("image_path", *_NAMES, "image", "img", "key"),
    "sound": ("audio_path", *_NAMES, "audio", "sound", "wav", "key"),
}
_BYTE_COLUMNS = {
    "image": ("image", "jpg", "png", "bytes", "image_bytes", "img", "webp"),
    "sound": ("audio", "sound", "wav", "flac", "bytes", "audio_bytes"),
}


@dataclass
class Record:
    """One picture or sound as found: where its bytes are, the bytes, and what came along."""

    id: str
    source: str
    container: str = "file"
    member: str = ""
    offset: int = 0
    data: bytes = b""
    fields: dict[str, Any] = field(default_factory=dict)
    row: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Block:
    """A part of the data that can be read by itself: where its pictures are, not their bytes.

    Parameters
    ----------
    address : str
        Of the data, as the user gave it.
    form : {"files", "tar", "parquet", "table", "arrays"}
    path : str
        The tar, Parquet file, table or archive of arrays; "" for files.
    first : int
        Row of the first picture in it.
    items : tuple
        What of it: numbers of row groups (of no groups: all of them); for files their paths with side files, class, row and
        metadata; for a table its rows; of an archive the array of pictures, and how many of them.
    kind : {"image", "sound"}
        What is looked for.
    """

    address: str
    form: str
    path: str = ""
    first: int = 0
    items: tuple[Any, ...] = ()
    kind: Kind = "image"


def detect_form(address: str, kind: Kind = "image") -> str:
    """Which of the forms an address holds.

    Raises
    ------
    DataError
        If nothing is there, or nothing that can be read.
    """
    fs, root = open_filesystem(address)
    if not fs.exists(root):
        raise DataError("there is no such file or folder", file=address)
    if fs.isfile(root):
        name = root.lower()
        for form, suffixes in (
            ("tar", (".tar",)),
            ("parquet", (".parquet",)),
            ("table", (".csv", ".jsonl", ".jsonl.gz")),
            ("arrays", (".npz",)),
        ):
            if name.endswith(suffixes):
                return form
        if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise DataError("a compressed tar has no random access: unpack it to a plain .tar first", file=address)
        raise DataError(
            "this kind of file is not known: expected .tar, .parquet, .csv, .jsonl, .jsonl.gz, .npz or a folder",
            file=address,
        )
    entries = fs.ls(root, detail=True)
    files = [e["name"].lower() for e in entries if e["type"] == "file"]
    folders = [posixpath.basename(e["name"].rstrip("/")) for e in entries if e["type"] == "directory"]
    if any(f.endswith(".tar") for f in files):
        return "tar"
    if folders and all(re.fullmatch(r"\d{4,}", f) for f in folders):
        return "shards"
    if any(f.endswith(".parquet") for f in files):
        return "parquet"
    if folders or any(f.endswith(SUFFIXES[kind]) for f in files):
        return "folder"
    if any(f.endswith(".npz") for f in files):
        return "arrays"
    tables = [f for f in files if f.endswith((".csv", ".jsonl", ".jsonl.gz"))]
    if len(tables) == 1:
        return "table"
    raise DataError(
        "nothing here is known: expected a folder per class, .tar, .parquet or .npz files, numbered shards, or one .csv/.jsonl",
        file=address,
    )


def read_records(
    address: str, *, image_column: str | None = None, allow_outside: bool = False, kind: Kind = "image"
) -> Iterator[Record]:
    """All pictures (or sounds) at an address, one after the other, with their bytes.

    Parameters
    ----------
    address : str
        Path or fsspec address.
    image_column : str, optional
        Column with bytes or paths, for tables; array of pictures, for archives.
    allow_outside : bool
        Let a table name files outside its own folder.
    kind : {"image", "sound"}
        What is looked for.

    Yields
    ------
    Record
        With `problem` set where something is refused.
    """
    for block in find_blocks(address, image_column=image_column, kind=kind):
        yield from read_block(block, image_column=image_column, allow_outside=allow_outside)


def find_blocks(
    address: str, *, rows: int | None = None, image_column: str | None = None, kind: Kind = "image"
) -> Iterator[Block]:
    """The parts of the data at an address, in the order of reading; folders are listed and tables read on the way.

    Parameters
    ----------
    address : str
        Path or fsspec address.
    rows : int, optional
        About so many pictures in a block, 1000 by default; a tar is one block, as is a packed array, and no row group of a
        Parquet file is split.
    image_column : str, optional
        Array of pictures, for archives.
    kind : {"image", "sound"}
        What is looked for.

    Yields
    ------
    Block
    """
    form, rows = detect_form(address, kind), BLOCK_ROWS if rows is None else rows
    fs, root = open_filesystem(address)
    if form in ("folder", "shards"):
        found = _folder_files(fs, root, kind) if form == "folder" else _shard_files(fs, root, kind)
        for part in _parts(found, rows):
            yield Block(address, "files", items=tuple(part), kind=kind)
    elif form == "tar":
        for path in _files(fs, root, (".tar",)):
            yield Block(address, "tar", path, kind=kind)
    elif form == "parquet":
        for path in _files(fs, root, (".parquet",)):
            yield from _group_blocks(fs, address, path, rows, kind)
    elif form == "arrays":
        for path in _files(fs, root, (".npz",)):
            yield from _array_blocks(fs, address, path, rows, image_column, kind)
    else:
        for path in _files(fs, root, (".csv", ".jsonl", ".jsonl.gz")):
            for part in _parts(read_rows(fs, path), rows):
                yield Block(address, "table", path, items=tuple(part), kind=kind)


def read_block(block: Block, *, image_column: str | None = None, allow_outside: bool = False) -> Iterator[Record]:
    """The pictures of one block, with their bytes.

    Parameters
    ----------
    block : Block
    image_column, allow_outside
        See `read_records`.

    Yields
    ------
    Record
        With `problem` set where something is refused.
    """
    fs, root = open_filesystem(block.address)
    if block.form == "files":
        for item in block.items:
            yield _file_record(fs, root, *item)
    elif block.form == "tar":
        yield from _tar(fs, root, block.path, block.kind)
    elif block.form == "parquet":
        yield from _parquet(fs, root, block, image_column, allow_outside)
    elif block.form == "arrays":
        yield from _arrays(fs, root, block)
    else:
        yield from _table(fs, block, image_column, allow_outside)


def _parts(found: Iterable[Any], rows: int) -> Iterator[list[Any]]:
    """Cut a stream into lists of so many entries, or fewer where they hold much text."""
    part: list[Any] = []
    weight = 0
    for entry in found:
        part.append(entry)
        weight += _weight(entry)
        if len(part) >= rows or weight > BLOCK_TEXT:
            yield part
            part, weight = [], 0
    if part:
        yield part


def _weight(value: Any, depth: int = 0) -> int:
    """About how many bytes of text a value holds; what is nested deeper than anybody writes is not looked at."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if depth == MAX_DEPTH:
        return 8
    if isinstance(value, dict):
        return sum(len(k) + _weight(v, depth + 1) for k, v in value.items())
    return sum(_weight(v, depth + 1) for v in value) if isinstance(value, (list, tuple)) else 8


def root_of(address: str) -> str:
    """The folder to which the `source` of a record is relative, as an address."""
    fs, root = open_filesystem(address)
    folder = posixpath.dirname(root) if fs.isfile(root) else root
    return str(fs.unstrip_protocol(folder)) if not _is_local(fs) else folder


class ByteReader:
    """Random access to the bytes that a manifest points at.

    Parameters
    ----------
    root : str
        `Manifest.root`.

    Notes
    -----
    Keeps no open file, so it may be copied to worker processes. The last few row groups of Parquet files and
    packed arrays are kept in memory.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        fs, folder = open_filesystem(root)
        self._folder = folder if _is_local(fs) else None
        self._groups: OrderedDict[tuple[str, str, int], Any] = OrderedDict()
        self._arrays: OrderedDict[tuple[str, str], tuple[Member, Any]] = OrderedDict()
        self._starts: dict[str, list[int]] = {}

    def read(self, source: str, container: str, member: str, offset: int, length: int) -> bytes:
        """The bytes of one picture.

        Raises
        ------
        DataError
            If the file is gone or shorter than it was.
        """
        local = self._folder is not None and "://" not in source
        try:
            if local and container in ("file", "tar"):  # opened without fsspec, which costs more than the read
                path = source if _is_absolute(source) else posixpath.join(str(self._folder), source)
                with Path(path).open("rb", buffering=0) as file:
                    file.seek(offset)
                    data = bytes(file.read(length) or b"")
            else:
                data = self._read_through_fsspec(source, container, member, offset, length)
        except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
            raise DataError(f"cannot be read any more: {error}", file=source) from error
        if len(data) != length:
            raise DataError(f"has changed: expected {length} bytes at {offset}, found {len(data)}", file=source)
        return data

    def _read_through_fsspec(self, source: str, container: str, member: str, offset: int, length: int) -> bytes:
        fs, root = open_filesystem(self.root)
        path = source if _is_absolute(source) else posixpath.join(root, source)
        if container == "parquet":
            return self._cell(fs, path, member, offset)
        if container == "arrays":
            return self._entry(fs, path, member, offset)
        with fs.open(path, "rb") as file:
            file.seek(offset)
            return bytes(file.read(length))

    def _cell(self, fs: Any, path: str, column: str, row: int) -> bytes:
        if path not in self._starts:
            with fs.open(path, "rb") as file:
                meta = pq.ParquetFile(file).metadata
                self._starts[path] = [0]
                for i in range(meta.num_row_groups):
                    self._starts[path].append(self._starts[path][-1] + meta.row_group(i).num_rows)
        starts = self._starts[path]
        group = next(i for i in range(len(starts) - 1) if starts[i] <= row < starts[i + 1])
        key = (path, column, group)
        if key not in self._groups:
            with fs.open(path, "rb") as file:
                # As a dictionary: a value that the file holds once is held once here too, however often it is repeated.
                schema = pq.read_schema(file)
                leaf = column if not pa.types.is_struct(schema.field(column).type) else f"{column}.bytes"
                whole = pq.ParquetFile(file, read_dictionary=[leaf])
                self._groups[key] = whole.read_row_group(group, columns=[column]).column(0)
            while len(self._groups) > 4:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        value = self._groups[key][row - starts[group]].as_py()
        return bytes(value["bytes"] if isinstance(value, dict) else value)

    def _entry(self, fs: Any, path: str, name: str, row: int) -> bytes:
        key = (path, name)
        with fs.open(path, "rb") as file:
            if key not in self._arrays:
                found = next(p.member for p in find_pictures(read_members(file, path), path, name))
                self._arrays[key] = found, read_array(file, path, found) if found.packed else None
                while len(self._arrays) > 4:
                    self._arrays.popitem(last=False)
            self._arrays.move_to_end(key)
            member, whole = self._arrays[key]
            if row >= member.shape[0]:
                raise DataError(f"has changed: array {name!r} has {member.shape[0]} entries", file=path, row=row)
            return as_png(read_array(file, path, member, row, 1)[0] if whole is None else whole[row])


def open_filesystem(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    fs, root = fsspec.core.url_to_fs(str(address))
    return fs, str(root).rstrip("/") or "/"


def _is_local(fs: Any) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def _is_absolute(path: str) -> bool:
    return path.startswith("/") or "://" in path or bool(re.match(r"[A-Za-z]:[\\/]", path))


def _files(fs: Any, root: str, suffixes: tuple[str, ...]) -> list[str]:
    if fs.isfile(root):
        return [root]
    return sorted(
        e["name"] for e in fs.ls(root, detail=True) if e["type"] == "file" and e["name"].lower().endswith(suffixes)
    )


def _relative(path: str, root: str) -> str:
    return posixpath.relpath(path, root)


def _escapes(fs: Any, root: str, path: str) -> bool:
    """Whether a path leaves the root, by its name or by a link on the way."""
    if _is_local(fs):
        return not Path(path).resolve().is_relative_to(Path(root).resolve())
    return not (posixpath.normpath(path) + "/").startswith(root.rstrip("/") + "/")


def _read_file(fs: Any, path: str, limit: int) -> bytes:
    with fs.open(path, "rb") as file:
        data = bytes(file.read(limit + 1))
    if len(data) > limit:
        raise DataError(f"is larger than {limit} bytes", file=path)
    return data


def _side_file(fs: Any, root: str, path: str) -> bytes:
    if _escapes(fs, root, path):
        raise DataError("leads outside the data folder", file=_relative(path, root))
    return _read_file(fs, path, MAX_SIDE_FILE)


def _picture(fs: Any, root: str, path: str, identity: str, fields: dict[str, Any], row: int = 0) -> Record:
    record = Record(identity, _relative(path, root), fields=fields, row=row)
    if _escapes(fs, root, path):
        record.problem = "leads outside the data folder"
        return record
    return _filled(record, fs, path)


def _filled(record: Record, fs: Any, path: str) -> Record:
    try:
        record.data = _read_file(fs, path, MAX_FILE)
    except FileNotFoundError:
        record.problem = "file is missing"
    except (ConnectionError, TimeoutError):  # says nothing about the picture
        raise
    except (OSError, DataError) as error:
        record.problem = f"cannot be read: {error}"[:200]
    return record


def _side_fields(texts: dict[str, bytes], name: str) -> dict[str, Any]:
    """Fields from what lies beside a picture: .txt is its text, .json its other columns, .cls its class."""
    fields: dict[str, Any] = {}
    if ".json" in texts:
        try:
            loaded = json.loads(texts[".json"])
        except (ValueError, RecursionError) as error:
            raise DataError(f"is not valid JSON ({type(error).__name__})", file=f"{name}.json") from error
        if isinstance(loaded, dict):
            fields |= loaded
    if ".txt" in texts:
        fields["text"] = texts[".txt"].decode("utf-8", errors="replace")
    if ".cls" in texts:
        fields["class"] = texts[".cls"].decode("utf-8", errors="replace").strip()
    return fields


def _folder_files(fs: Any, root: str, kind: Kind) -> Iterator[tuple[Any, ...]]:
    """Every picture of a folder of classes, as arguments of `_file_record`."""
    metadata = _folder_metadata(fs, root)
    subfolders = sorted(e["name"] for e in fs.ls(root, detail=True) if e["type"] == "directory")
    for folder in [root, *subfolders]:
        before = {} if folder == root else {"class": posixpath.basename(folder.rstrip("/"))}
        for path, sides, row in _flat_folder(fs, folder, kind, deep=folder != root):
            yield path, sides, row, before, metadata.get(_relative(path, root), {})


def _shard_files(fs: Any, root: str, kind: Kind) -> Iterator[tuple[Any, ...]]:
    for folder in sorted(e["name"] for e in fs.ls(root, detail=True) if e["type"] == "directory"):
        for path, sides, row in _flat_folder(fs, folder, kind):
            yield path, sides, row, {}, {}


def _folder_metadata(fs: Any, root: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in ("metadata.csv", "captions.csv", "metadata.jsonl", "captions.jsonl"):
        path = posixpath.join(root, name)
        if fs.exists(path):
            if _escapes(fs, root, path):
                raise DataError("leads outside the data folder", file=path)
            for row, fields in read_rows(fs, path):
                if "file_name" not in fields:
                    raise DataError("has no column file_name", file=path, row=row)
                found[posixpath.normpath(str(fields.pop("file_name")))] = fields
    return found


def _flat_folder(fs: Any, folder: str, kind: Kind, deep: bool = False) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """The pictures of a folder (`deep`: and below), with the suffixes of the side files of the same stem, and their row."""
    paths = sorted(fs.find(folder) if deep else [e["name"] for e in fs.ls(folder, detail=True) if e["type"] == "file"])
    beside = {p for p in paths if p.lower().endswith(SIDE_SUFFIXES)}
    for row, path in enumerate(p for p in paths if p.lower().endswith(SUFFIXES[kind])):
        stem = posixpath.splitext(path)[0]
        yield path, tuple(s for s in SIDE_SUFFIXES if stem + s in beside), row


def _file_record(
    fs: Any, root: str, path: str, sides: tuple[str, ...], row: int, before: dict[str, Any], after: dict[str, Any]
) -> Record:
    """A picture in a file of its own; its fields are those `before`, those of its side files, those `after`."""
    stem = posixpath.splitext(path)[0]
    problem, fields = "", {}
    try:
        fields = _side_fields({s: _side_file(fs, root, stem + s) for s in sides}, stem)
    except DataError as error:
        problem = str(error)
    record = _picture(fs, root, path, _relative(stem, root), before | fields | after, row)
    record.problem = record.problem or problem
    return record


def _tar(fs: Any, root: str, path: str, kind: Kind) -> Iterator[Record]:
    """Members of one tar, grouped by their key; only headers are parsed, and the bytes of what is needed are read."""
    base = posixpath.dirname(path) if fs.isfile(root) else root
    source = _relative(path, base)
    with fs.open(path, "rb") as file:
        bounded: Any = BoundedFile(file, tarfile.ReadError)
        try:
            archive = tarfile.open(fileobj=bounded, mode="r:")  # noqa: SIM115 (closed with the file)
        except tarfile.TarError as error:
            raise DataError(f"is not a plain tar ({error})", file=path) from error
        group: dict[str, tarfile.TarInfo] = {}
        key = ""
        row = 0
        while True:
            try:
                member = archive.next()
            except tarfile.TarError as error:
                record = _tar_record(file, source, key, group, row, kind)
                if record is not None:
                    yield record
                    row += 1
                yield Record(
                    f"{source}/{key}", source, "tar", row=row, problem=f"broken tar after this member ({error})"
                )
                break
            archive.members = []  # type: ignore[attr-defined]  # the headers of a long tar need not stay in memory
            if member is not None and not member.isdir():
                unsafe = not member.isreg() or _is_absolute(member.name) or ".." in member.name.split("/")
                if unsafe:
                    problem = "unsafe member (link, device, or path that leaves the archive)"
                    yield Record(f"{source}/{member.name}"[:500], source, "tar", member.name, row=row, problem=problem)
                    row += 1
                    continue
            name = "" if member is None else member.name
            folder, _, last = name.rpartition("/")
            stem = f"{folder}/{last.partition('.')[0]}" if folder else last.partition(".")[0]
            if member is None or stem != key:
                record = _tar_record(file, source, key, group, row, kind)
                if record is not None:
                    yield record
                    row += 1
                group, key = {}, stem
            if member is None:
                break
            suffix = "." + last.partition(".")[2].lower()
            if member.isreg() and suffix in (*SIDE_SUFFIXES, *SUFFIXES[kind]):
                group[suffix] = member


def _tar_record(
    file: Any, source: str, key: str, group: dict[str, tarfile.TarInfo], row: int, kind: Kind
) -> Record | None:
    suffix = next((s for s in SUFFIXES[kind] if s in group), None)
    if suffix is None:
        return None
    picture = group[suffix]
    record = Record(f"{source}/{key}", source, "tar", picture.name, picture.offset_data, row=row)
    if picture.size > MAX_FILE:
        record.problem = f"is larger than {MAX_FILE} bytes"
        return record
    position = file.tell()
    texts: dict[str, bytes] = {}
    for side in SIDE_SUFFIXES:
        if side in group:
            file.seek(group[side].offset_data)
            texts[side] = bytes(file.read(min(group[side].size, MAX_SIDE_FILE)))
    file.seek(picture.offset_data)
    record.data = bytes(file.read(picture.size))
    file.seek(position)
    try:
        record.fields = _side_fields(texts, key)
    except DataError as error:
        record.problem = str(error)
    return record


def _group_blocks(fs: Any, address: str, path: str, rows: int, kind: Kind) -> Iterator[Block]:
    """Blocks of whole row groups. A file that cannot be understood is one block, and reading it says what is wrong."""
    try:
        with fs.open(path, "rb") as file:
            meta = pq.ParquetFile(file).metadata
            counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError):
        counts = []
    groups: list[int] = []
    first = seen = 0
    for number, count in enumerate(counts):
        groups.append(number)
        seen += count
        if seen - first >= rows:
            yield Block(address, "parquet", path, first, tuple(groups), kind)
            groups, first = [], seen
    if groups or not counts:
        yield Block(address, "parquet", path, first, tuple(groups), kind)


def _parquet(fs: Any, root: str, block: Block, image_column: str | None, allow_outside: bool) -> Iterator[Record]:
    path = block.path
    base = posixpath.dirname(path) if fs.isfile(root) else root
    source = _relative(path, base)
    with fs.open(path, "rb") as file:
        try:
            parquet = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"is not a Parquet file ({error})"[:200], file=path) from error
        schema = parquet.schema_arrow
        column = _image_column(schema, image_column, path, block.kind)
        row = block.first
        for number in block.items or range(parquet.num_row_groups):
            size = parquet.metadata.row_group(number).total_byte_size
            if size > MAX_GROUP:
                raise DataError(f"row group {number} holds {size} bytes, more than {MAX_GROUP}", file=path, row=row)
        # A few at a time: one large value may be repeated in all rows.
        batches = parquet.iter_batches(batch_size=8, row_groups=list(block.items) or None)
        while True:
            try:
                batch = next(batches)
                rows = ({n: batch.column(n)[i].as_py() for n in batch.schema.names} for i in range(batch.num_rows))
                for cells in rows:
                    picture = cells.pop(column)
                    yield _cell_record(fs, base, source, column, picture, cells, row, allow_outside, block.kind)
                    row += 1
            except StopIteration:
                break
            except DataError:
                raise
            except (pa.ArrowException, OSError, ValueError) as error:
                raise DataError(f"is damaged: {error}"[:200], file=path, row=row) from error


def _array_blocks(fs: Any, address: str, path: str, rows: int, image_column: str | None, kind: Kind) -> Iterator[Block]:
    if kind != "image":
        raise DataError(f"arrays are read as pictures, not as {kind}s", file=path)
    with fs.open(path, "rb") as file:
        found = find_pictures(read_members(file, path), path, image_column)
    for pictures in found:
        count = len(pictures) if pictures.packed else rows
        for first in range(0, len(pictures), count):
            yield Block(address, "arrays", path, first, (pictures.member.name, count), kind)


def _arrays(fs: Any, root: str, block: Block) -> Iterator[Record]:
    name, count = block.items
    source = _relative(block.path, posixpath.dirname(block.path) if fs.isfile(root) else root)
    with fs.open(block.path, "rb") as file:
        (pictures,) = find_pictures(read_members(file, block.path), block.path, name)
        for row, pixels, fields in read_pictures(file, block.path, pictures, block.first, count):
            yield Record(f"{source}/{name}#{row}", source, "arrays", name, row, as_png(pixels), fields, row)


def _image_column(schema: pa.Schema, wanted: str | None, path: str, kind: Kind) -> str:
    if wanted is not None:
        if wanted not in schema.names:
            raise DataError(f"has no column {wanted!r}; its columns are {', '.join(schema.names)}", file=path)
        return wanted
    candidates = [c for c in (*_BYTE_COLUMNS[kind], *_PATH_COLUMNS[kind]) if c in schema.names]
    binary = [
        c
        for c in candidates
        if pa.types.is_binary(schema.field(c).type)
        or pa.types.is_large_binary(schema.field(c).type)
        or pa.types.is_struct(schema.field(c).type)
    ]
    if not candidates:
        raise DataError(
            f"no column with {kind}s was found among {', '.join(schema.names)}; name it with --{kind}_column", file=path
        )
    return (binary or candidates)[0]


def _cell_record(
    fs: Any,
    base: str,
    source: str,
    column: str,
    picture: Any,
    fields: dict[str, Any],
    row: int,
    allow_outside: bool,
    kind: Kind,
) -> Record:
    if isinstance(picture, dict):
        picture = picture.get("bytes") if picture.get("bytes") is not None else picture.get("path")
    if isinstance(picture, str):
        return _named_picture(fs, base, picture, fields, row, allow_outside)
    record = Record(f"{source}#{row}", source, "parquet", column, row, fields=fields, row=row)
    if picture is None:
        record.problem = f"no {kind} in this row"
    else:
        record.data = bytes(picture)
    return record


def _named_picture(fs: Any, base: str, name: str, fields: dict[str, Any], row: int, allow_outside: bool) -> Record:
    path = name if _is_absolute(name) else posixpath.normpath(posixpath.join(base, name))
    if "\x00" in name or (not allow_outside and ("://" in name or _escapes(fs, base, path))):
        return Record(name[:500], name[:500], fields=fields, row=row, problem="leads outside the data folder")
    record = Record(name[:500], path if _is_absolute(name) else _relative(path, base), fields=fields, row=row)
    return _filled(record, fs, path)


def read_rows(fs: Any, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a CSV or JSON lines, with their numbers."""
    lines = read_lines(fs, path)
    if path.lower().endswith(".csv"):
        csv.field_size_limit(16 * 2**20)
        reader = csv.DictReader(lines)
        try:
            for row, fields in enumerate(reader):
                fields.pop(None, None)
                yield row, dict(fields)
        except csv.Error as error:
            raise DataError(f"cannot be read as CSV ({error})", file=path, row=reader.line_num) from error
        return
    for row, line in enumerate(lines):
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError("is not valid JSON", file=path, row=row) from error
            if not isinstance(fields, dict):
                raise DataError("is not a JSON object", file=path, row=row)
            yield row, fields


def read_lines(fs: Any, path: str) -> Iterator[str]:
    """Lines of a text file, also .gz, within bounds."""
    with fs.open(path, "rb") as raw:
        stream: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
        yield from _lines(io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline=""), path, raw)


def _lines(text: Any, path: str, raw: Any) -> Iterator[str]:
    """Lines of a table; none may be huge, nor may they be far more than `raw` holds packed."""
    read = 0
    for row in itertools.count():
        try:
            line = text.readline(MAX_LINE)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot be read: {error}"[:200], file=path, row=row) from error
        if not line:
            return
        read += len(line)
        if len(line) == MAX_LINE:
            raise DataError(f"a line has {MAX_LINE} characters or more", file=path, row=row)
        if read > min(MAX_TABLE, MAX_RATIO * raw.tell() + 2**20):
            raise DataError(f"{read} characters so far, too many for the size of the file", file=path, row=row)
        yield line


def _table(fs: Any, block: Block, image_column: str | None, allow_outside: bool) -> Iterator[Record]:
    path, base = block.path, posixpath.dirname(block.path)
    for row, found in block.items:
        fields = dict(found)  # a block may be read again
        column = image_column or next((c for c in _PATH_COLUMNS[block.kind] if c in fields), None)
        if column is None or column not in fields:
            wanted = f"no column {image_column!r}" if image_column else "no column with paths was found"
            raise DataError(f"{wanted}; its columns are {', '.join(map(str, fields))}", file=path, row=row)
        name = fields.pop(column)
        if not name:
            yield Record(
                f"#{row}", _relative(path, base), fields=fields, row=row, problem=f"no {block.kind} in this row"
            )
        else:
            yield _named_picture(fs, base, str(name), fields, row, allow_outside)
