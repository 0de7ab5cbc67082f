"""The manifest: one table that says what the data are, read by everything that comes after.

Ingest turns whatever people have into a manifest once; from then on nothing looks at folders, tars or column names again.
A row is one picture. The bytes stay where they are: a row says where to find them (`source`, `container`, `offset`,
`length`), how to recognise them (`sha256`, `phash`) and what came along (`label`, `text`).

======================  =========  ==============================================================================
column                  type       meaning
======================  =========  ==============================================================================
`index`                 int64      0 .. N-1, the row; every dataset yields it; per-sample state is kept under it
`id`                    string     stable name, unique, never a path that may be opened
`source`                string     file or address that holds the bytes, relative to `root` where it can be
`container`             string     "file" (whole file), "tar" (a member), "parquet" (a cell), "arrays" (an entry)
`member`                string     name inside a tar or an archive of arrays, or column of a Parquet file; "" otherwise
`offset`                int64      first byte in a tar; row in a Parquet file or an array; 0 for a file
`length`                int64      number of bytes
`width`, `height`       int32      pixels, after EXIF rotation
`format`                string     "JPEG", "PNG", ... as found in the bytes, whatever the name says
`sha256`                string     of the bytes, hexadecimal
`phash`                 uint64     perceptual hash; near-identical pictures differ in few bits
`duplicate_group`       int64      `index` of the first row of the group of near-identical pictures; own index if alone
`label`                 int32      the class given by the web (index into `classes`); -1 = none
`text`                  string     what came along, as found, bounded in length; "" = none
`split`                 string     "train", "test", or whatever the data call their parts
`clean_label`           int32      for evaluation only: the right class; -1 = out of set, -2 = not known
`group`                 string     samples of one group depend on each other (same object, product, author); "" = alone
======================  =========  ==============================================================================
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from contralto.data.sources import ByteReader
from contralto.errors import DataError
from contralto.files import naming, write_json

__all__ = ["CLEAN_SETS", "MANIFEST_SCHEMA", "SKIPPED_SCHEMA", "ClassInfo", "Manifest"]

MANIFEST_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("container", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("sha256", pa.string()),
        ("phash", pa.uint64()),
        ("duplicate_group", pa.int64()),
        ("label", pa.int32()),
        ("text", pa.string()),
        ("split", pa.string()),
        ("clean_label", pa.int32()),
        ("group", pa.string()),
    ]
)

CLEAN_SETS = pa.list_(pa.int32())

SKIPPED_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class ClassInfo:
    """What is known about a class before training.

    Parameters
    ----------
    name : str
        How the class is called in the given labels.
    queries : tuple of str
        The words that were searched for.
    definition : str
        One or two sentences that say what is meant; "" = none.
    """

    name: str
    queries: tuple[str, ...] = ()
    definition: str = ""


@dataclass(frozen=True)
class Manifest:
    """The data of a run: a table of pictures, their classes, and what was left out.

    Parameters
    ----------
    table : pyarrow.Table
        One row per picture, in the columns of `MANIFEST_SCHEMA`.
    classes : tuple of ClassInfo
        The classes in the order of their numbers.
    root : str
        Folder or address to which `source` is relative.
    skipped : pyarrow.Table
        What was found but left out, in the columns of `SKIPPED_SCHEMA`.
    clean_sets : pyarrow.Array, optional
        Of multi-label data, for evaluation only: the list of the right classes of every row, null = not known.
    """

    table: pa.Table
    classes: tuple[ClassInfo, ...]
    root: str
    skipped: pa.Table = field(default_factory=SKIPPED_SCHEMA.empty_table)
    clean_sets: pa.Array | None = None

    def __post_init__(self) -> None:
        if self.table.schema.names != MANIFEST_SCHEMA.names:
            raise DataError(
                f"a manifest has the columns {MANIFEST_SCHEMA.names}, this table has {self.table.schema.names}"
            )

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their numbers."""
        return [c.name for c in self.classes]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Given labels (N,), -1 = none."""
        return self.column("label").astype(np.int64)

    @property
    def right_labels(self) -> npt.NDArray[np.int64]:
        """Labels to test by (N,): the clean ones, or the given ones where the data have no clean labels; -1 = none."""
        clean = self.column("clean_label").astype(np.int64)
        return np.where(clean >= 0, clean, np.where(clean == -2, self.labels, -1))

    def split_of(self, split: str | None = None) -> tuple[str | None, npt.NDArray[np.bool_]]:
        """The split that is tested, by default `test` if there is one, else None for all; and which rows are in it (N,)."""
        splits = self.column("split").astype(str)
        wanted = split if split is not None else "test" if "test" in splits else None
        return wanted, np.ones(len(splits), bool) if wanted is None else splits == wanted

    @cached_property
    def texts(self) -> list[str]:
        """Texts as found, one per row; made once, because many look up one after the other."""
        return [str(t) for t in self.table.column("text").to_pylist()]

    def column(self, name: str) -> npt.NDArray[Any]:
        """One column as a NumPy array (N,)."""
        return np.asarray(self.table.column(name).to_numpy(zero_copy_only=False))

    def clean_matrix(self) -> npt.NDArray[np.int64]:
        """Right labels (N, C) of multi-label data: 1 = there, 0 = not, -2 = not known; for evaluation only."""
        out = np.full((len(self), len(self.classes)), -2, np.int64)
        for row, found in enumerate([] if self.clean_sets is None else self.clean_sets.to_pylist()):
            if found is not None:
                out[row] = 0
                out[row, found] = 1
        return out

    def read_bytes(self, row: int) -> bytes:
        """The encoded picture of a row.

        Raises
        ------
        DataError
            If its file is gone or has changed.
        """
        return self._reader.read(*self._places[row])

    def places(self, rows: npt.NDArray[Any]) -> list[tuple[Any, ...]]:
        """Where the bytes of some rows are, as arguments of `ByteReader.read`."""
        names = ("source", "container", "member", "offset", "length")
        if not len(rows):
            return []
        first, last = int(rows.min()), int(rows.max())  # `take` from all of a long table is slow
        chosen = self.table.select(names).slice(first, last + 1 - first).take(pa.array(rows - first))
        return list(zip(*(chosen.column(n).to_pylist() for n in names), strict=True))

    @cached_property
    def _reader(self) -> ByteReader:
        return ByteReader(self.root)

    @cached_property
    def _places(self) -> list[tuple[Any, ...]]:
        return self.places(np.arange(len(self)))

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when pictures, texts, given labels or classes change.

        The clean labels are not part of it: they serve evaluation only and change nothing that is learnt.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([[c.name, c.queries, c.definition] for c in self.classes]).encode())
        for name in ("id", "sha256", "label", "text", "split"):
            digest.update(json.dumps(self.table.column(name).to_pylist()).encode())
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write `manifest.parquet`, `skipped.parquet` and `classes.json` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(self.table.replace_schema_metadata({"root": self.root}), folder / "manifest.parquet")
        pq.write_table(self.skipped, folder / "skipped.parquet")
        if self.clean_sets is not None:
            pq.write_table(pa.table({"classes": self.clean_sets}), folder / "clean_sets.parquet")
        classes = [{"name": c.name, "queries": list(c.queries), "definition": c.definition} for c in self.classes]
        write_json(folder / "classes.json", classes)

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read what `save` wrote."""
        folder = Path(folder)
        if not (folder / "manifest.parquet").is_file():
            raise DataError("there is no manifest.parquet in this folder", file=str(folder))
        with naming(folder / "manifest.parquet"):
            table = pq.read_table(folder / "manifest.parquet")
            root = (table.schema.metadata or {}).get(b"root", b"").decode()
            table = table.replace_schema_metadata(None).cast(MANIFEST_SCHEMA)
        with naming(folder / "classes.json"):
            entries = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
            classes = tuple(
                ClassInfo(str(c["name"]), tuple(map(str, c["queries"])), str(c["definition"])) for c in entries
            )
        with naming(folder / "skipped.parquet"):
            skipped = pq.read_table(folder / "skipped.parquet").cast(SKIPPED_SCHEMA)
        sets = None
        if (folder / "clean_sets.parquet").is_file():
            with naming(folder / "clean_sets.parquet"):
                column = pq.read_table(folder / "clean_sets.parquet").column("classes")
                sets = column.combine_chunks().cast(CLEAN_SETS)
                known = np.array([c for found in sets.to_pylist() for c in found or ()], np.int64)
                if len(sets) != len(table) or (len(known) and not 0 <= known.min() <= known.max() < len(classes)):
                    raise ValueError("the sets do not fit the manifest")
        return cls(table, classes, root, skipped, sets)
