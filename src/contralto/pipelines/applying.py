"""A finished model over a whole collection: labels or embeddings of every picture or recording, here or on a cluster."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from contralto.cluster import has_gpus, map_blocks
from contralto.data.images import ImageError, decode_image
from contralto.data.ingest import clean_name
from contralto.data.sounds import SoundError
from contralto.data.sources import SUFFIXES, Block, Kind, find_blocks, read_block
from contralto.errors import DataError
from contralto.files import write_atomically
from contralto.systems.classifier import UNKNOWN, Classifier

if TYPE_CHECKING:
    from contralto.pipelines.embedding import Embedder
    from contralto.pipelines.speech import SpeechModel

__all__ = ["Applied", "apply_model"]

BATCH = 64


@dataclass
class Applied:
    """What came of a collection: how many pictures, how many of them unknown, those skipped with their reason, the first rows."""

    n: int = 0
    unknown: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    head: list[dict[str, Any]] = field(default_factory=list)


def apply_model(
    model: "Classifier | Embedder | SpeechModel",
    data: str,
    target: str | Path,
    *,
    task: Literal["predict", "embed"] = "predict",
    threshold: float = 0.0,
    image_column: str | None = None,
    on: str | None = None,
) -> Applied:
    """Write what a model says of every picture.

    Parameters
    ----------
    model : Classifier, Embedder or SpeechModel
        The last takes recordings; its label is what is said.
    data : str
        Path or fsspec address in any form of `contralto.data.sources`, or one image file.
    target : path
        Parquet file, with the columns `id`, `label` and `confidence`, or `id` and `embedding`; rows in the order of reading.
    task : {"predict", "embed"}
    threshold : float
        See `Classifier.predict`.
    image_column : str, optional
        Column of the images.
    on : str, optional
        Where: see `contralto.cluster.map_blocks`.

    Returns
    -------
    Applied

    Raises
    ------
    DataError
        If not one picture can be used; then nothing is written.
    """
    applied = Applied()

    def write(part: Path) -> None:
        writer = None
        try:
            for table, skipped in _results(model, data, task, threshold, image_column, on):
                applied.skipped += skipped
                if not table.num_rows:
                    continue
                writer = writer or pq.ParquetWriter(part, table.schema)
                writer.write_table(table)
                applied.n += table.num_rows
                applied.head += table.slice(0, 10 - len(applied.head)).to_pylist()
                if task == "predict" and threshold > 0 and not model.multilabel:
                    applied.unknown += table.column("label").to_pylist().count(UNKNOWN)
        finally:
            if writer is not None:
                writer.close()
        if not applied.n:
            raise DataError(f"not one usable image ({len(applied.skipped)} skipped)", file=data)

    write_atomically(target, write)
    return applied


def _results(
    model: "Classifier | Embedder | SpeechModel",
    data: str,
    task: str,
    threshold: float,
    image_column: str | None,
    on: str | None,
) -> Iterator[tuple[pa.Table, list[tuple[str, str]]]]:
    kind: Kind = getattr(model, "kind", "image")
    if Path(data).is_file() and data.lower().endswith(SUFFIXES[kind]):
        return iter([(_Apply(model, task, threshold).table([data], [Path(data).read_bytes()]), [])])
    gpu = on is not None and has_gpus(on)
    setup = (model, task, threshold, image_column, "cuda" if gpu else None)
    return map_blocks(_Apply, find_blocks(data, image_column=image_column, kind=kind), on=on, setup=setup, gpu=gpu)


class _Apply:
    """The work on one block."""

    def __init__(
        self,
        model: "Classifier | Embedder | SpeechModel",
        task: str,
        threshold: float,
        image_column: str | None = None,
        device: str | None = None,
    ) -> None:
        self.model = model if device is None else model.to(device)
        self.task, self.threshold, self.image_column = task, threshold, image_column

    def __call__(self, block: Block) -> tuple[pa.Table, list[tuple[str, str]]]:
        ids: list[str] = []
        pictures: list[Any] = []
        skipped: list[tuple[str, str]] = []
        tables = []
        decode = getattr(self.model, "decode", decode_image)
        for record in read_block(block, image_column=self.image_column):
            try:
                if record.problem:
                    raise ImageError(record.problem)
                picture = decode(record.data)
            except (ImageError, SoundError) as error:
                skipped.append((clean_name(record.id), str(error)))
                continue
            ids.append(clean_name(record.id))
            pictures.append(picture)
            if len(ids) == BATCH:
                tables.append(self.table(ids, pictures))
                ids, pictures = [], []
        return pa.concat_tables([*tables, self.table(ids, pictures)]), skipped

    def table(self, ids: list[str], pictures: list[Any]) -> pa.Table:
        """What the model says of some pictures."""
        if self.task == "embed":
            rows = self.model.embed(pictures)
            return pa.table(
                {"id": pa.array(ids, pa.string()), "embedding": pa.array(list(rows), pa.list_(pa.float32()))}
            )
        found = self.model.predict(pictures, threshold=self.threshold)
        kind = pa.list_(pa.string()) if self.model.multilabel else pa.string()
        best = found.probabilities.max(1, initial=0.0)
        columns = {"id": pa.array(ids, pa.string()), "label": pa.array(list(found), kind), "confidence": best}
        return pa.table(columns)
