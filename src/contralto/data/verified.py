"""Labels by people: a table of ids and classes, or the decisions of a review, checked against a manifest."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from contralto.data.decisions import DATABASE, Decisions
from contralto.data.manifest import Manifest
from contralto.errors import DataError
from contralto.files import naming

__all__ = ["UNKNOWN", "read_reviewed", "read_verified"]

UNKNOWN = -2
"""Nobody has looked at the picture."""


def read_verified(path: str | Path, manifest: Manifest) -> npt.NDArray[np.int64]:
    """The class of every picture by people.

    Parameters
    ----------
    path : path
        CSV or Parquet with the columns `id` and `label`: the name of a class or what it was searched by; empty for a picture of
        none of the classes.
    manifest : Manifest

    Returns
    -------
    array (N,)
        Number of the class, -1 = none of them, -2 = not in the table.

    Raises
    ------
    DataError
        If a row names a picture or a class that is not there, or a picture twice with different labels.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("there is no such file", file=str(path))
    row_of = {identity: i for i, identity in enumerate(manifest.column("id").tolist())}
    number = {q: i for i, c in enumerate(manifest.classes) for q in c.queries}
    number |= {c.name: i for i, c in enumerate(manifest.classes)} | {"": -1}
    out = np.full(len(manifest), UNKNOWN, np.int64)
    for n, (identity, label) in enumerate(_rows(path)):
        if identity not in row_of:
            raise DataError(f"no usable picture has the id {identity[:200]!r}", file=str(path), row=n)
        if label not in number:
            raise DataError(
                f"no class is called {label[:200]!r}: there are {', '.join(manifest.class_names[:10])}",
                file=str(path),
                row=n,
            )
        row = row_of[identity]
        if out[row] not in (UNKNOWN, number[label]):
            raise DataError(f"{identity[:200]!r} has a second, different label", file=str(path), row=n)
        out[row] = number[label]
    return out


def read_reviewed(run: str | Path, manifest: Manifest) -> npt.NDArray[np.int64]:
    """The class of every picture by the people who reviewed a run (of these pictures, or of some of them).

    Parameters
    ----------
    run : path
        Run folder in which `contralto review` was at work.
    manifest : Manifest
        Pictures are the same where their ids are.

    Returns
    -------
    array (N,)
        As from `read_verified`.

    Raises
    ------
    DataError
        If nobody reviewed the run, a decision has several labels or names a class that is not there, or no picture is the same.
    """
    run = Path(run)
    if not (run / DATABASE).is_file():
        raise DataError(f"there is no {DATABASE}: nobody reviewed this run", file=str(run))
    decisions = Decisions(run)
    holding = decisions.holding()
    decisions.close()
    number = {c.name: i for i, c in enumerate(manifest.classes)}
    out = np.full(len(manifest), UNKNOWN, np.int64)
    for row, identity in enumerate(manifest.column("id").tolist()):
        if identity not in holding:
            continue
        labels = holding[identity].labels
        if len(labels) > 1:
            raise DataError(f"{identity[:200]!r} has several labels; this system learns one", file=str(run))
        if labels and labels[0] not in number:
            raise DataError(f"{identity[:200]!r} was called {labels[0][:200]!r}, which is no class here", file=str(run))
        out[row] = number[labels[0]] if labels else -1
    if (out == UNKNOWN).all():
        raise DataError(
            f"none of the {len(holding)} pictures that people decided about is in these data (compared by id)",
            file=str(run),
        )
    return out


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix.lower() == ".parquet":
        with naming(path):
            table = pq.read_table(path)
        _demand(path, table.column_names)
        for name in ("id", "label"):
            if not (
                pa.types.is_string(table.schema.field(name).type)
                or pa.types.is_large_string(table.schema.field(name).type)
            ):
                raise DataError(f"the column {name!r} must hold strings", file=str(path))
        columns = (table.column(name).to_pylist() for name in ("id", "label"))
        yield from ((i or "", label or "") for i, label in zip(*columns, strict=True))
        return
    with naming(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        _demand(path, reader.fieldnames or [])
        yield from [((r["id"] or "").strip(), (r["label"] or "").strip()) for r in reader]


def _demand(path: Path, names: Sequence[str]) -> None:
    missing = [n for n in ("id", "label") if n not in names]
    if missing:
        raise DataError(
            f"there is no column {missing[0]!r}; found {', '.join(map(str, names)) or 'none'}", file=str(path)
        )
