"""Tables of numbers: columns to learn from, a number to tell, and what cannot be used said by file and row."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from contralto.data.ingest import clean_name, label_name
from contralto.data.sources import IMAGE_SUFFIXES, open_filesystem, read_rows
from contralto.errors import DataError
from contralto.files import naming

__all__ = ["ClassVectors", "NumberTable", "is_table", "read_class_vectors", "read_numbers"]

SUFFIXES = (".csv", ".jsonl", ".jsonl.gz", ".parquet")
ROLES = {
    "id": ("id", "key", "uid"),
    "split": ("split", "partition", "subset"),
    "group": ("group", "subject", "patient"),
}
"""Columns that are no inputs, by their usual names."""
CLASS_COLUMNS = ("name", "class_name", "class", "label", "category")
"""Columns that name a class, by their usual names."""
MAX_COLUMNS = 10_000


@dataclass(frozen=True)
class ClassVectors:
    """Numbers that describe classes, their attributes for instance.

    Parameters
    ----------
    names : tuple of str
        Of the classes.
    columns : tuple of str
        Names of the numbers.
    values : array (C, A) float64
        In [0, 1]: the smallest value of a column is 0, the largest 1, so that what is there or not stays 1 or 0.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]
    values: npt.NDArray[np.float64]


@dataclass(frozen=True)
class NumberTable:
    """Rows of numbers, and the number of each that is to be told.

    Parameters
    ----------
    columns : tuple of str
        Names of the inputs.
    inputs : array (N, F) float64
    numbers : array (N,) float64
        NaN where they are not known: such rows can be told, but not learnt from.
    ids, splits, groups : arrays (N,) of str
        "" where the table has none.
    target : str
        Name of the column of the numbers; "" where they are not known.
    skipped : tuple of (int, str)
        Rows that were left out, with the reason.
    """

    columns: tuple[str, ...]
    inputs: npt.NDArray[np.float64]
    numbers: npt.NDArray[np.float64]
    ids: npt.NDArray[np.str_]
    splits: npt.NDArray[np.str_]
    groups: npt.NDArray[np.str_]
    target: str
    skipped: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def classes(self) -> tuple[Any, ...]:
        """There are none."""
        return ()

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any value."""
        digest = hashlib.sha256(repr((self.columns, self.target)).encode())
        for part in (self.inputs, self.numbers):
            digest.update(np.ascontiguousarray(part).tobytes())
        for words in (self.ids, self.splits):
            digest.update("\x00".join(words.tolist()).encode())
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write `table.parquet` and `skipped.parquet` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        columns = {f"input {n}": self.inputs[:, n] for n in range(len(self.columns))}
        about = {"columns": "\x00".join(self.columns), "target": self.target}
        table = pa.table({"id": self.ids, "split": self.splits, "group": self.groups, "number": self.numbers} | columns)
        pq.write_table(table.replace_schema_metadata(about), folder / "table.parquet")
        reasons = {"row": pa.array([r for r, _ in self.skipped], pa.int64()), "reason": [w for _, w in self.skipped]}
        pq.write_table(
            pa.table(reasons, schema=pa.schema([("row", pa.int64()), ("reason", pa.string())])),
            folder / "skipped.parquet",
        )

    @classmethod
    def load(cls, folder: str | Path) -> "NumberTable":
        """Read what `save` wrote."""
        folder = Path(folder)
        with naming(folder / "table.parquet"):
            table = pq.read_table(folder / "table.parquet")
            about = table.schema.metadata
            columns = tuple(about[b"columns"].decode().split("\x00"))
            inputs = np.stack([table.column(f"input {n}").to_numpy() for n in range(len(columns))], 1)
            ids, splits, groups = (
                np.array(table.column(n).to_pylist(), dtype=np.str_) for n in ("id", "split", "group")
            )
            numbers = table.column("number").to_numpy()
        with naming(folder / "skipped.parquet"):
            skipped = pq.read_table(folder / "skipped.parquet").to_pylist()
            left = tuple((r["row"], r["reason"]) for r in skipped)
        return cls(columns, inputs, numbers, ids, splits, groups, about[b"target"].decode(), left)


def is_table(address: str) -> bool:
    """Whether an address is a table of numbers, not pictures: rows without image bytes and without names of image files.

    Examples
    --------
    >>> is_table("a/folder/of/pictures")
    False
    """
    if not str(address).lower().endswith(SUFFIXES):
        return False
    for _, fields in itertools.islice(_rows(address), 1):
        found = [v for value in fields.values() for v in (value.values() if isinstance(value, dict) else [value])]
        return not any(
            isinstance(v, bytes) or (isinstance(v, str) and v.lower().endswith(IMAGE_SUFFIXES)) for v in found
        )
    return True


def read_numbers(
    address: str,
    target: str | None,
    *,
    columns: Sequence[str] | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
) -> NumberTable:
    r"""Read a table of numbers.

    Parameters
    ----------
    address : str
        Path or fsspec address: .csv, .jsonl, .jsonl.gz or .parquet.
    target : str or None
        Column of the number that is to be told; a row without it is left out. None: the numbers are not known.
    columns : sequence of str, optional
        The inputs; default: every other column that holds numbers, but for those of ids, splits and groups.
    id_column, split_column, group_column : str, optional
        Columns, where their names are not common ones.

    Returns
    -------
    NumberTable
        Rows with an empty cell among the inputs are in `skipped`.

    Raises
    ------
    DataError
        Names the file, and the row: a column that is not there, a cell that is no number.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.csv"
    >>> _ = path.write_text("width,colour,weight\n1,red,10\n2,blue,20\n,red,30\n")
    >>> table = read_numbers(str(path), "weight")
    >>> table.columns, table.inputs.tolist(), table.numbers.tolist(), table.skipped
    (('width',), [[1.0], [2.0]], [10.0, 20.0], ((2, "no value of 'width'"),))
    """
    rows = list(_rows(address))
    names = list(dict.fromkeys(name for _, fields in rows[:1000] for name in fields))
    if not rows:
        raise DataError("the table has no rows", file=address)
    roles = {}
    for role, given in (("id", id_column), ("split", split_column), ("group", group_column)):
        if given is not None and given not in names:
            raise DataError(f"there is no column {given!r} for the {role}; there are {_told(names)}", file=address)
        roles[role] = given or next((n for n in ROLES[role] if n in names and n != target), None)
    if target is not None and target not in names:
        raise DataError(f"there is no column {target!r}; there are {_told(names)}", file=address)
    for name in columns or ():
        if name not in names or name == target:
            told = "" if target is None else f" to learn from beside {target!r}"
            raise DataError(f"there is no column {name!r}{told}; there are {_told(names)}", file=address)
    taken = list(columns) if columns else _numeric(rows, [n for n in names if n not in (target, *roles.values())])
    if not taken:
        raise DataError(
            f"no column holds numbers{'' if target is None else f' beside {target!r}'}; there are {_told(names)}",
            file=address,
        )
    inputs, numbers, words, places, skipped = [], [], [], [], []
    for row, fields in rows:
        cells = [_number(fields.get(n), n, address, row) for n in taken]
        number = math.nan if target is None else _number(fields.get(target), target, address, row)
        empty = [n for n, c in zip(taken, cells, strict=True) if math.isnan(c)]
        if not empty and target is not None and math.isnan(number):
            empty = [target]
        if empty:
            skipped.append((row, f"no value of {empty[0]!r}"))
            continue
        inputs.append(cells)
        places.append(str(row))
        numbers.append(number)
        words.append([clean_name(fields.get(c) or "") if c else "" for c in roles.values()])
    if not inputs:
        raise DataError(f"not one row can be used: {skipped[0][1]} in row {skipped[0][0]}", file=address)
    ids, splits, groups = np.array(words, dtype=np.str_).T
    ids = np.where(ids == "", places, ids)
    return NumberTable(
        tuple(taken), np.array(inputs, np.float64), np.array(numbers, np.float64), ids, splits, groups, target or "",
        tuple(skipped),
    )  # fmt: skip


def read_class_vectors(address: str) -> ClassVectors:
    r"""Read a table with a row for each class: its name, and numbers that describe it.

    Parameters
    ----------
    address : str
        Path or fsspec address: .csv, .jsonl, .jsonl.gz or .parquet. The name stands in the first of the columns `CLASS_COLUMNS`
        that is there, else in the first one; columns that hold no numbers are left out.

    Raises
    ------
    DataError
        Names the file, and the row: a class without a name, or one that stands twice; a cell that is empty, or no number.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.csv"
    >>> _ = path.write_text("class,stripes,legs\nzebra,1,4\nsnake,1,0\nheron,0,2\n")
    >>> found = read_class_vectors(str(path))
    >>> found.names, found.columns, found.values.tolist()
    (('zebra', 'snake', 'heron'), ('stripes', 'legs'), [[1.0, 1.0], [1.0, 0.0], [0.0, 0.5]])
    """
    rows = list(_rows(address))
    if not rows:
        raise DataError("the table has no rows", file=address)
    there = list(dict.fromkeys(name for _, fields in rows[:1000] for name in fields))
    key = next((n for n in CLASS_COLUMNS if n in there), there[0])
    columns = _numeric(rows, [n for n in there if n not in (key, *CLASS_COLUMNS, *ROLES["id"])])
    if not columns:
        raise DataError(f"no column holds numbers beside {key!r}; there are {_told(there)}", file=address)
    values: dict[str, list[float]] = {}
    for row, fields in rows:
        name = label_name(fields.get(key), address, row)
        if name is None or name in values:
            what = f"no class is named in column {key!r}" if name is None else f"the class {name!r} stands twice"
            raise DataError(what, file=address, row=row)
        values[name] = [_number(fields.get(n), n, address, row) for n in columns]
        empty = next((n for n, v in zip(columns, values[name], strict=True) if math.isnan(v)), None)
        if empty is not None:
            raise DataError(f"no value of {empty!r} for the class {name!r}", file=address, row=row)
    raw = np.array(list(values.values()), np.float64)
    with np.errstate(over="ignore"):
        spread = np.ptp(raw, axis=0)
    if not np.isfinite(spread).all():
        raise DataError(f"the numbers of {columns[int(np.argmin(np.isfinite(spread)))]!r} are too large", file=address)
    scaled = (raw - raw.min(0)) / np.where(spread > 0, spread, 1.0)
    return ClassVectors(tuple(values), tuple(columns), scaled)


def _rows(address: str) -> Iterator[tuple[int, dict[str, Any]]]:
    fs, path = open_filesystem(str(address))
    if not fs.exists(path):
        raise DataError("there is no such file", file=str(address))
    if not fs.isfile(path) or not path.lower().endswith(SUFFIXES):
        raise DataError(f"a table of numbers is {', '.join(SUFFIXES)}", file=str(address))
    if path.lower().endswith(".parquet"):
        with fs.open(path, "rb") as file:
            try:
                batches = list(pq.ParquetFile(file).iter_batches())
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"is not a Parquet file that can be read ({error})"[:200], file=str(address)) from error
        rows: Any = enumerate(fields for batch in batches for fields in batch.to_pylist())
    else:
        rows = read_rows(fs, path)
    for row, fields in rows:
        if len(fields) > MAX_COLUMNS:
            raise DataError(f"has more than {MAX_COLUMNS} columns", file=str(address), row=row)
        yield row, fields


def _numeric(rows: list[tuple[int, dict[str, Any]]], names: list[str]) -> list[str]:
    """Columns of which most of the first cells are numbers: one wrong cell among them is then named, not the column dropped."""
    found = []
    for name in names:
        cells = [v for _, fields in rows[:1000] if not _is_empty(v := fields.get(name))]
        right = sum(_value(v) is not None for v in cells)
        if cells and right > len(cells) / 2:
            found.append(name)
    return found


def _number(value: Any, name: str, address: str, row: int) -> float:
    if _is_empty(value):
        return math.nan
    found = _value(value)
    if found is None:
        raise DataError(f"{str(value)[:40]!r} in column {name!r} is no number", file=str(address), row=row)
    return found


def _is_empty(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, str) and value.strip().lower() in ("", "na", "nan", "null", "none"))
        or (isinstance(value, float) and math.isnan(value))
    )


def _value(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, str):
        if "_" in value:  # Python reads 1_0 as ten
            return None
        try:
            value = float(value.strip())
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _told(names: Sequence[str]) -> str:
    return ", ".join(clean_name(n) for n in names[:20]) + (", ..." if len(names) > 20 else "")
