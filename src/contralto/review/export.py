"""What came out of a review: all training pictures with their labels after it, for other tools.

Columns that cleanlab has, too, have its names (`cleanlab.datalab`, issue type "label"): `given_label`, `predicted_label`,
`is_label_issue`, `label_score` (0 = surely wrong, 1 = surely right).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from contralto.data.names import called
from contralto.errors import UsageError
from contralto.files import write_atomically
from contralto.pipelines.outputs import write_cleaned_csv
from contralto.review.discovered import Discoveries, is_discovery
from contralto.review.listing import Listing

__all__ = ["discovered_table", "export_review", "reviewed_table"]

SHARD = 1000


def reviewed_table(listing: Listing) -> pa.Table:
    """One row per training picture.

    Parameters
    ----------
    listing : Listing

    Returns
    -------
    pyarrow.Table
        `id`; `label`: the last word of the people, else the machine's; null for none of the classes; `given_label`,
        `predicted_label`: before, and by the machine; `is_label_issue`: `label` is not `given_label`; `label_score`: probability
        that `given_label` is right, 0 or 1 where people looked; `verdict`; `reviewed`; `reviewer`, `time` of the last word;
        `agreed`: all reviewers say the same; `text`. In runs with several labels per picture, labels are lists.
    """
    listing.decisions.refresh()
    holding = listing.decisions.holding()
    rows: list[dict[str, Any]] = []
    for n, identity in enumerate(listing.ids):
        holds = holding.get(identity)
        given, new = listing.given[n], listing.new[n]
        label = new if holds is None else holds.labels
        wrong = set(label) != set(given)
        rows.append(
            {
                "id": identity, "label": label, "given_label": given, "predicted_label": new, "is_label_issue": wrong,
                "label_score": 1 - float(listing.p_wrong[n]) if holds is None else float(not wrong),
                "verdict": listing.verdict[n], "reviewed": holds is not None,
                "reviewer": None if holds is None else holds.reviewer, "time": None if holds is None else holds.time,
                "agreed": None if holds is None else not bool(listing.differ[n]), "text": listing.texts[n],
            }
        )  # fmt: skip
    label = pa.list_(pa.string()) if listing.multilabel else pa.string()
    for row in rows:
        for name in ("label", "given_label", "predicted_label"):
            row[name] = list(row[name]) if listing.multilabel else next(iter(row[name]), None)
    schema = pa.schema(
        [
            ("id", pa.string()), ("label", label), ("given_label", label), ("predicted_label", label),
            ("is_label_issue", pa.bool_()), ("label_score", pa.float64()), ("verdict", pa.string()),
            ("reviewed", pa.bool_()), ("reviewer", pa.string()), ("time", pa.string()), ("agreed", pa.bool_()),
            ("text", pa.string()),
        ]
    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema)


def discovered_table(found: Discoveries) -> pa.Table:
    """One row per picture of a run that discovered classes, under the names that people gave these.

    Parameters
    ----------
    found : Discoveries

    Returns
    -------
    pyarrow.Table
        `id`; `label`: the given label, or else the class that was found, by its name; `given_label`: null where there was none;
        `predicted_label`: the class that was found; `confidence`; `reviewed`: people have named this class.
    """
    names = found.names
    told = called(found.classes, names)
    predicted = [told[k] for k in found.found]
    return pa.table(
        {
            "id": pa.array(found.ids, pa.string()),
            "label": pa.array([g or p for g, p in zip(found.given, predicted, strict=True)], pa.string()),
            "given_label": pa.array([g or None for g in found.given], pa.string()),
            "predicted_label": pa.array(predicted, pa.string()),
            "confidence": found.confidence,
            "reviewed": pa.array([found.classes[k] in names for k in found.found], pa.bool_()),
        }
    )


def export_review(run: str | Path, target: str | Path) -> int:
    """Write the outcome of a review.

    Parameters
    ----------
    run : path
        A finished run, reviewed as far as it was.
    target : path
        `.parquet` or `.csv` for the table of `reviewed_table`; a new folder for a data set that
        `datasets.load_dataset(folder)` of Hugging Face reads: pictures with their labels after the review.

    Returns
    -------
    int
        Pictures written; the folder holds those with a label only.

    Raises
    ------
    UsageError
        If the folder is there already.
    DataError
        If the run is not finished, or pictures cannot be read any more.
    """
    target = Path(target)
    if is_discovery(run):
        if target.suffix not in (".parquet", ".csv"):
            raise UsageError(f"{target} is to be .parquet or .csv: classes that were found are no data set yet")
        table = discovered_table(Discoveries(run))
    else:
        listing = Listing(run)
        table = reviewed_table(listing)
    if target.suffix == ".parquet":
        write_atomically(target, lambda part: pq.write_table(table, part))
    elif target.suffix == ".csv":
        write_cleaned_csv(table, target)
    elif target.suffix:
        raise UsageError(f"{target} is to be .parquet, .csv, or a folder")
    else:
        return _write_data_set(listing, table, target)
    return int(table.num_rows)


def _write_data_set(listing: Listing, table: pa.Table, folder: Path) -> int:
    if folder.exists():
        raise UsageError(f"{folder} is there already: choose another folder")
    names = listing.manifest.class_names
    number = {name: c for c, name in enumerate(names)}
    class_label = {"names": names, "_type": "ClassLabel"}
    features: dict[str, Any] = {"image": {"_type": "Image"}, "id": _value("string")}
    features["label"] = {"feature": class_label, "_type": "Sequence"} if listing.multilabel else class_label
    kept = [n for n, label in enumerate(table.column("label").to_pylist()) if label]
    extra = ["given_label", "is_label_issue", "label_score", "reviewed", "text"]
    types = {"is_label_issue": "bool", "label_score": "float64", "reviewed": "bool"}
    for name in extra:
        features[name] = _value(types.get(name, "string"))
    if listing.multilabel:
        features["given_label"] = {"feature": _value("string"), "_type": "Sequence"}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "data").mkdir(parents=True)
    shards = max(1, -(-len(kept) // SHARD))
    for s in range(shards):
        chosen = kept[s * SHARD : (s + 1) * SHARD]
        some = table.take(chosen)
        images = [{"bytes": listing.manifest.read_bytes(int(listing.rows[n])), "path": None} for n in chosen]
        labels = some.column("label").to_pylist()
        columns: dict[str, Any] = {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "id": some.column("id"),
            "label": pa.array([[number[x] for x in v] for v in labels], pa.list_(pa.int64())) if listing.multilabel
            else pa.array([number[v] for v in labels], pa.int64()),
        }  # fmt: skip
        shard = pa.table(columns | {name: some.column(name) for name in extra}).replace_schema_metadata(about)
        pq.write_table(shard, part / "data" / f"train-{s:05d}-of-{shards:05d}.parquet", row_group_size=100)
    reviewed = sum(table.column("reviewed").to_pylist())
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n\n"
        f"{len(kept)} pictures of {len(names)} classes with corrected labels; people looked at {reviewed} of the "
        f"{table.num_rows} that were in the run. `datasets.load_dataset` reads this folder.\n"
    )
    (part / "README.md").write_text(card, encoding="utf-8")
    part.rename(folder)
    return len(kept)


def _value(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "_type": "Value"}
