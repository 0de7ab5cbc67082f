"""The page of a fine-tuning: what is said of the test pictures, class by class beside the baseline, and the usual mistakes."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from contralto.files import naming
from contralto.review.charts import bar_pairs
from contralto.review.encoder import picture_address, write_encoder_report
from contralto.review.report import shown_text

__all__ = ["write_tuned_report"]

CLASSES, MISTAKES = 30, 12
"""At most so many classes and kinds of mistakes are listed: the worst ones."""


def write_tuned_report(
    run: str | Path,
    embeddings: npt.NDArray[np.float32],
    pictures: Any,
    names: Any,
    labels: Any,
    *,
    out: str | Path | None = None,
) -> Path:
    """Write `report.html` of a fine-tuning.

    Parameters
    ----------
    run : path
        Folder of the run; without `predictions.parquet` (no pictures for testing) the page says nothing of answers.
    embeddings, pictures, names, labels, out
        See `review.encoder.write_encoder_report`.

    Returns
    -------
    Path
    """
    run = Path(run)
    found = run / "predictions.parquet"
    return write_encoder_report(
        run, embeddings, pictures, names, labels, out=out, template="report_tuned",
        more={"answers": _answers(found) if found.exists() else None, "sheet": picture_address(run / "answers.png")},
    )  # fmt: skip


def _answers(path: Path) -> dict[str, Any]:
    """Accuracies of classes and the most frequent mistakes, from the table of predictions."""
    with naming(path):
        table = {k: np.array(v, dtype=object) for k, v in pq.read_table(path).to_pydict().items()}
        label, predicted, plain = table["label"], table["predicted"], table.get("baseline")
    rows = []
    for name in dict.fromkeys(label.tolist()):
        own = label == name
        before = None if plain is None else float((plain[own] == name).mean())
        rows.append((shown_text(name, 60), before, float((predicted[own] == name).mean())))
    rows.sort(key=lambda row: row[2])
    sizes = Counter(label.tolist())
    wrong = Counter((a, b) for a, b in zip(label, predicted, strict=True) if a != b)
    mended = None if plain is None else int(((plain != label) & (predicted == label)).sum())
    spoilt = None if plain is None else int(((plain == label) & (predicted != label)).sum())
    return {
        "count": len(label), "classes": len(rows), "listed": min(len(rows), CLASSES),
        "bars": bar_pairs(rows[:CLASSES], names=("cross-entropy", "this run")),
        "baseline": plain is not None, "mended": mended, "spoilt": spoilt,
        "mistakes": [
            {"label": shown_text(a, 60), "said": shown_text(b, 60), "count": n, "share": n / sizes[a]}
            for (a, b), n in wrong.most_common(MISTAKES)
        ],
    }  # fmt: skip
