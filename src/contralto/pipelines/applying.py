"""A finished model over a whole collection: what it says of every picture, recording or row, here or on a cluster."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from contralto.cluster import has_gpus, map_blocks
from contralto.data.images import ImageError, decode_image
from contralto.data.ingest import clean_name
from contralto.data.sounds import SoundError
from contralto.data.sources import SUFFIXES, Block, Record, find_blocks, read_block
from contralto.data.tables import read_numbers
from contralto.errors import DataError, UsageError
from contralto.files import write_atomically
from contralto.systems.classifier import UNKNOWN, Classifier

if TYPE_CHECKING:
    from contralto.pipelines.embedding import Embedder
    from contralto.pipelines.regression import Regressor
    from contralto.pipelines.speech import SpeechModel

    Model = Classifier | Embedder | Regressor | SpeechModel

__all__ = ["Applied", "apply_model"]

BATCH, ROWS = 64, 4096
THINGS = {"image": "image", "sound": "recording", "table": "row"}


@dataclass
class Applied:
    """What came of a collection: how many answers, how many of them unknown, what was skipped and why, the first rows."""

    n: int = 0
    unknown: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    head: list[dict[str, Any]] = field(default_factory=list)


def apply_model(
    model: "Model",
    data: str,
    target: str | Path,
    *,
    task: Literal["predict", "embed"] = "predict",
    threshold: float = 0.0,
    image_column: str | None = None,
    sound_column: str | None = None,
    on: str | None = None,
) -> Applied:
    """Write what a model says of every picture, recording or row of a table.

    Parameters
    ----------
    model : Classifier, Embedder, Regressor or SpeechModel
        As of `contralto.load`; its `kind` says what it takes.
    data : str
        Path or fsspec address in any form of `contralto.data.sources`, or one file; of a model of rows, a table of
        `contralto.data.tables` with its columns.
    target : path
        Parquet file, rows in the order of reading: `id` and what the model's `answers` say (`label` and `confidence`; `text`,
        `intent` where there is one, and `confidence`; or `number`), or `id` and `embedding`.
    task : {"predict", "embed"}
    threshold : float
        See `Classifier.predict`.
    image_column, sound_column : str, optional
        Column of the images, or of the recordings.
    on : str, optional
        Where: see `contralto.cluster.map_blocks`. Rows of a table are read here.

    Returns
    -------
    Applied

    Raises
    ------
    UsageError
        If an argument does not suit what the model takes.
    DataError
        If not one sample can be used; then nothing is written, and a file that was there stays.
    """
    applied = Applied()

    def write(part: Path) -> None:
        writer = None
        try:
            for table, skipped in _results(model, data, task, threshold, image_column, sound_column, on):
                applied.skipped += skipped
                if not table.num_rows:
                    continue
                writer = writer or pq.ParquetWriter(part, table.schema)
                writer.write_table(table)
                applied.n += table.num_rows
                applied.head += table.slice(0, 10 - len(applied.head)).to_pylist()
                if threshold > 0:
                    applied.unknown += table.column(1).to_pylist().count(UNKNOWN)
        finally:
            if writer is not None:
                writer.close()
        if not applied.n:
            told = "none was found"
            if applied.skipped:
                told = f"{len(applied.skipped)} skipped, the first {applied.skipped[0][0]}: {applied.skipped[0][1]}"
            raise DataError(f"not one usable {_thing(model)}: {told}", file=data)

    write_atomically(target, write)
    return applied


def _thing(model: "Model") -> str:
    return THINGS[model.kind]


def _results(
    model: "Model",
    data: str,
    task: str,
    threshold: float,
    image_column: str | None,
    sound_column: str | None,
    on: str | None,
) -> Iterator[tuple[pa.Table, list[tuple[str, str]]]]:
    columns = {"image": image_column, "sound": sound_column}
    for kind, column in columns.items():
        if column is not None and kind != model.kind:
            raise UsageError(f"--{kind}_column names {THINGS[kind]}s, and this run takes {_thing(model)}s")
    if model.kind == "table":
        if on is not None:
            raise UsageError("--on is for images and recordings: a table of numbers is read on this machine")
        return _rows(_Apply(model, task, threshold), data)
    for kind, suffixes in SUFFIXES.items():
        if data.lower().endswith(suffixes) and Path(data).is_file():
            if kind != model.kind:
                raise DataError(f"this run takes {_thing(model)}s, and this is another kind of file", file=data)
            return iter([_Apply(model, task, threshold).of([Record(data, data, data=Path(data).read_bytes())])])
    gpu = on is not None and has_gpus(on)
    setup = (model, task, threshold, columns[model.kind], "cuda" if gpu else None)
    return map_blocks(
        _Apply, find_blocks(data, image_column=image_column, kind=model.kind), on=on, setup=setup, gpu=gpu
    )


def _rows(apply: "_Apply", data: str) -> Iterator[tuple[pa.Table, list[tuple[str, str]]]]:
    """What is said of the rows of a table, some at a time."""
    found = read_numbers(data, None, columns=apply.model.config["columns"])
    skipped = [(f"row {row}", reason) for row, reason in found.skipped]
    for first in range(0, len(found), ROWS):
        part = slice(first, first + ROWS)
        yield apply.table(found.ids[part].tolist(), found.inputs[part]), [] if first else skipped


class _Apply:
    """The work on one block."""

    def __init__(
        self,
        model: "Model",
        task: str,
        threshold: float,
        column: str | None = None,
        device: str | None = None,
    ) -> None:
        self.model: Any = model if device is None else model.to(device)
        self.task, self.threshold, self.column = task, threshold, column

    def __call__(self, block: Block) -> tuple[pa.Table, list[tuple[str, str]]]:
        return self.of(read_block(block, image_column=self.column))

    def of(self, records: Iterable[Record]) -> tuple[pa.Table, list[tuple[str, str]]]:
        """What the model says of what was found, and what of that is skipped."""
        ids: list[str] = []
        samples: list[Any] = []
        skipped: list[tuple[str, str]] = []
        tables = []
        decode = getattr(self.model, "decode", decode_image)
        for record in records:
            try:
                if record.problem:
                    raise ImageError(record.problem)
                sample = decode(record.data)
            except (ImageError, SoundError) as error:
                skipped.append((clean_name(record.id), str(error)))
                continue
            ids.append(clean_name(record.id))
            samples.append(sample)
            if len(ids) == BATCH:
                tables.append(self.table(ids, samples))
                ids, samples = [], []
        return pa.concat_tables([*tables, self.table(ids, samples)]), skipped

    def table(self, ids: list[str], samples: Any) -> pa.Table:
        """What the model says of some samples."""
        if self.task == "embed":
            columns = {"embedding": pa.array(list(self.model.embed(samples)), pa.list_(pa.float32()))}
        else:
            columns = self.model.answers(samples, threshold=self.threshold)
        return pa.table({"id": pa.array(ids, pa.string())} | columns)
