"""What data hold, before anything is trained on them."""

import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from contralto.data.definitions import fill_definitions, load_definitions
from contralto.data.ingest import ROLES, find_columns, ingest
from contralto.data.sources import detect_form, read_records

__all__ = ["inspect_data", "print_inspection"]


def inspect_data(data: str, *, definitions: Path | None = None, **options: Any) -> dict[str, Any]:
    """Read data once and count.

    Parameters
    ----------
    data : str
        Path or address.
    definitions : path, optional
        Definitions file.
    **options
        Of `contralto.data.ingest.ingest`.

    Returns
    -------
    dict
        `form`, `columns` (that were found), `roles` (role -> columns), `pictures`,
        `seconds`, `splits`, `classes` (name, count, definition, senses), `texts`, `sizes`, `formats`,
        `skipped` (reason, count, examples), `duplicates`, `leaks` (training pictures that repeat a test picture),
        `unlabelled`, `warnings`.
    """
    started = time.perf_counter()
    form = detect_form(data)
    first = islice(read_records(data, image_column=options.get("image_column")), 100)
    columns = list(dict.fromkeys(name for record in first for name in record.fields))
    given = {role: options.get(f"{role}_column") for role in ROLES}
    manifest = ingest(data, classes=None if definitions is None else load_definitions(definitions), **options)
    classes, senses = fill_definitions(manifest.classes)
    labels, groups, splits = manifest.labels, manifest.column("duplicate_group"), manifest.column("split")
    training = (splits == "train") & (labels >= 0)
    counts = np.bincount(labels[training], minlength=len(classes))
    tests = set(groups[splits == "test"].tolist())
    side = np.minimum(manifest.column("width"), manifest.column("height"))
    words = [len(t.split()) for t in manifest.texts]
    reasons = Counter(manifest.skipped.column("reason").to_pylist())
    names = {r: [s["id"] for s in manifest.skipped.to_pylist() if s["reason"] == r][:3] for r in reasons}
    warnings = [
        f"class {c.name!r} has only {n} training pictures" for c, n in zip(classes, counts, strict=True) if n < 10
    ]
    warnings += [
        f"class {c.name!r} has no definition: write one into a definitions file" for c in classes if not c.definition
    ]
    leaks = int(sum(g in tests for g in groups[training]))
    if leaks:
        warnings.append(f"{leaks} training pictures nearly repeat a test picture")
    return {
        "data": data,
        "form": form,
        "columns": columns,
        "roles": {role: found for role, found in find_columns(columns, given).items() if found},
        "pictures": len(manifest),
        "seconds": round(time.perf_counter() - started, 2),
        "splits": dict(Counter(splits.tolist())),
        "classes": [
            {
                "name": c.name, "train": int(n), "definition": c.definition,
                "senses": [s.definition for s in senses.get(c.name, [])],
            }
            for c, n in zip(classes, counts, strict=True)
        ],
        "unlabelled": int(((splits == "train") & (labels < 0)).sum()),
        "texts": {"with_text": int(sum(w > 0 for w in words)), "median_words": float(np.median(words))},
        "sizes": {"min": int(side.min()), "median": int(np.median(side)), "max": int(side.max())},
        "formats": dict(Counter(manifest.column("format").tolist())),
        "skipped": [{"reason": r, "n": n, "examples": names[r]} for r, n in reasons.most_common()],
        "duplicates": len(groups) - len(np.unique(groups)),
        "leaks": leaks,
        "clean_labels": int((manifest.column("clean_label") >= 0).sum()),
        "warnings": warnings,
    }  # fmt: skip


def print_inspection(result: dict[str, Any]) -> None:
    """Show the result of `inspect_data` to a person."""
    console = Console(highlight=False, markup=False, soft_wrap=True)  # names from outside are no markup
    console.print(
        f"{result['data']}: {result['form']}, {result['pictures']} pictures, read in {result['seconds']} s",
    )
    t, s = result["texts"], result["sizes"]
    used = {column: role for role, columns in result["roles"].items() for column in columns}
    told = {
        "columns": ", ".join(f"{c} ({used[c]})" if c in used else c for c in result["columns"]) or "none",
        "splits": ", ".join(f"{k} {v}" for k, v in result["splits"].items()),
        "formats": ", ".join(f"{k} {v}" for k, v in result["formats"].items()),
        "shorter side": f"{s['min']} to {s['max']} px, median {s['median']}",
        "with text": f"{t['with_text']}, median {t['median_words']:.0f} words",
        "without given label": str(result["unlabelled"]),
        "with clean label": str(result["clean_labels"]),
        "near duplicates": str(result["duplicates"]),
    }
    for key, value in told.items():
        console.print(f"  {key:20s} {value}")
    table = Table("class", "train", "definition", box=None, padding=(0, 2, 0, 0))
    for c in result["classes"]:
        extra = f"  ({len(c['senses'])} senses, the first taken)" if len(c["senses"]) > 1 else ""
        table.add_row(c["name"], str(c["train"]), (c["definition"][:90] or "none") + extra)
    console.print(table)
    for c in result["classes"]:
        if len(c["senses"]) > 1:
            console.print(f"  {c['name']} may mean (choose one in a definitions file):")
            for sense in c["senses"][:5]:
                console.print(f"    {sense[:110]}")
    for r in result["skipped"]:
        console.print(f"  left out: {r['n']} {r['reason']}, for example {', '.join(r['examples'])}")
    for warning in result["warnings"]:
        console.print(f"  note: {warning}")
    if "cost" in result:
        c = result["cost"]
        console.print(
            f"  cost of `fit capro --preset small` here: about {c['minutes']:.0f} min, {c['disk_mb']:.0f} MB of features",
        )
