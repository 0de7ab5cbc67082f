"""What a run reads once and leaves for people: manifest, cleaned list as CSV, model card, record of versions and machine."""

import json
import platform
import resource
import unicodedata
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import torch
from rich.console import Console

from contralto.data.ingest import ingest
from contralto.data.manifest import Manifest
from contralto.errors import UsageError
from contralto.files import naming, plain_json, remove_leftovers, write_atomically, write_json

__all__ = ["FREE", "claim_run", "environment", "model_card", "peak_memory_gib", "read_once", "write_cleaned_csv"]

FREE = ("checkpoint_every", "on")
"""Arguments on which no result depends: a run may go on with other ones."""


def claim_run(
    out: Path, system: str, data: str, arguments: Mapping[str, Any], *, extensions: Sequence[str] = ()
) -> None:
    """Make a run folder that says what it is (`config.json`, `environment.json`), or make sure that it holds the same run.

    Raises
    ------
    UsageError
        If there is another run, or something else.
    """
    path = out / "config.json"
    config: dict[str, Any] = {
        "system": system,
        "version": metadata.version("contralto"),
        "data": data,
        "arguments": dict(arguments),
        "extensions": list(extensions),
    }
    if path.exists() and any((out / name).exists() for name in ("manifest", "sounds")):
        with naming(path):
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        written = json.loads(plain_json(config))  # as it comes back: a pair as a list
        ours, theirs = ({k: v for k, v in c.get("arguments", {}).items() if k not in FREE} for c in (written, before))
        same = before.get("data") == data and before.get("system") == system
        if not same or ours != theirs:
            changed = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            raise UsageError(
                f"{out} holds a run with other arguments ({', '.join(changed) or 'system or data'}): choose another --out, "
                f"or delete that folder"
            )
    elif not path.exists() and out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no run: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    write_json(path, config)
    write_json(out / "environment.json", environment())


def read_once(
    data: str, folder: Path, arguments: Mapping[str, Any], console: Console, *, columns: bool = True
) -> Manifest:
    """The manifest of the pictures of a job, made at the first call and kept in a folder of the run.

    Parameters
    ----------
    data : str
    folder : path
    arguments : mapping
        Of the job: `min_side`, `workers`, `allow_outside`, `on`, and what ends in `_column`.
    console : rich.console.Console
        Where progress is shown.
    columns : bool
        Take the columns that were named; else those of usual names.
    """
    if not (folder / "manifest.parquet").exists():
        console.print(f"[bold]ingest[/bold]  reading {data}", highlight=False, soft_wrap=True)
        with console.status("reading") as status:
            manifest = ingest(
                data,
                **{k: v for k, v in arguments.items() if k.endswith("_column") and columns},
                **{k: arguments[k] for k in ("min_side", "workers", "allow_outside", "on")},
                blank_share=None,
                unlabelled=True,
                progress=lambda n: status.update(f"{n} pictures read"),
            )
        part = folder.with_name(f".{folder.name}.part")
        manifest.save(part)
        part.rename(folder)
    return Manifest.load(folder)


def write_cleaned_csv(table: pa.Table, path: Path) -> None:
    """The cleaned list as CSV: lists joined by semicolons, and no cell that a spreadsheet would take for a formula."""
    columns = {}
    for name in table.column_names:
        values = table.column(name).to_pylist()
        if values and isinstance(values[0], list):
            values = ["; ".join(map(str, v)) for v in values]
        columns[name] = [_no_formula(v) if isinstance(v, str) else v for v in values]
    write_atomically(path, lambda p: pyarrow.csv.write_csv(pa.table(columns), p))


def _no_formula(cell: str) -> str:
    first = unicodedata.normalize("NFKC", cell.lstrip()[:1])  # full-width signs count too
    return "'" + cell if first in ("=", "+", "-", "@") or cell[:1] in ("\t", "\r", "\n") else cell


def peak_memory_gib() -> float:
    """The most memory that this process has held so far, in GiB.

    Examples
    --------
    >>> 0 < peak_memory_gib() < 1024
    True
    """
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def environment(*more: str) -> dict[str, Any]:
    """Versions and machine, for the record of a run; `more` names further packages."""
    packages = (
        "contralto",
        "torch",
        "torchvision",
        "lightning",
        "timm",
        "faiss-cpu",
        "numpy",
        "scikit-learn",
        "pyarrow",
    )
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "packages": {p: metadata.version(p) for p in (*packages, *more)},
    }


def model_card(
    system: str,
    classes: list[str],
    arguments: Mapping[str, Any],
    extensions: list[str],
    metrics: Mapping[str, Any],
    n_images: int,
    size: int,
) -> str:
    """The README of a trained classifier: what it names, what it learnt from, how right it is, where its limits are."""
    test = metrics.get("test")
    lines = [
        f"# Classifier of {len(classes)} classes, trained on noisy web images",
        "",
        f"Classes: {', '.join(classes)}",
        "",
        f"Trained with {system} on {n_images} images with the labels of the web; encoder "
        f"{arguments['image_encoder']}, input {size} px.",
        "Beyond the paper: " + (", ".join(extensions) or "nothing") + ".",
        "",
        "    import contralto",
        '    contralto.load("path/to/this/folder").predict(["a.jpg", "b.jpg"])',
        "",
        "## Accuracy",
        "",
    ]
    if test and "map_macro" in test["model"]:
        lines += ["| | mAP over classes | C-F1 | O-F1 |", "|---|---|---|---|"]
        for name, told in (("plain", "plain training"), ("model", "this model")):
            if name in test:
                t = test[name]
                lines.append(f"| {told} | {t['map_macro']:.1%} | {t['class_f1']:.1%} | {t['overall_f1']:.1%} |")
        lines += ["", f"On {test['n']} test images with clean labels; F1 of the three surest classes."]
    elif test:
        lines += ["| | accuracy | mean over classes (95 % interval) |", "|---|---|---|"]
        for name, told in (("plain", "plain training"), ("model", "this model")):
            if name in test:
                t = test[name]
                lines.append(
                    f"| {told} | {t['accuracy']:.1%} | {t['macro']:.1%} ({t['macro_low']:.1%} to {t['macro_high']:.1%}) |"
                )
        lines += ["", f"On {test['n']} test images with clean labels."]
    else:
        lines += ["Not measured: the data had no clean test labels."]
    by_people = arguments.get("reviewed") or arguments.get("shots")
    verified = "only in part verified by people" if by_people else "never verified by a person"
    lines += [
        "",
        "## Limits",
        "",
        f"The labels that it learnt from were {verified}; see the report of the run for what was corrected.",
        "It names one of its classes for any picture; a low probability is the only sign of a picture of something else.",
    ]
    return "\n".join(lines) + "\n"
