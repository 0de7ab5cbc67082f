"""CAPro's claim as a paired experiment on data with real noise.

Under structured label noise (wrong senses of a word), anchors chosen by text, prototypes and bootstrapping beat plain
training on the web labels, and most of the gain sits in the ambiguous classes.

Four arms see the same pictures, views, class-balanced draws and number of epochs:

- *plain*: cross-entropy on the web labels, as many epochs as all stages of CAPro together;
- *random anchors*: the paper's rule with anchors drawn at random, which leaves the texts out;
- *capro*: the paper's rule, anchors by text;
- *capro+text*: beyond the paper, the text keeps its say (`text_weight`, `keep_threshold`).

What the `small` preset does beyond that (`reconcile`) is no part of the claim; `benchmarks/webly.py` measures it.

The paper's other baseline, *vanilla* (stage 2: auxiliary head, reconstruction and instance contrast as well), is no arm of
its own: over frozen features its other losses do not reach the linear classifier, which is then that of *plain* to the bit.

Each arm has its own learning rate, chosen by `choose_rates` on a part of the training pictures that it did not train on,
with a seed that is not reported. The verdict is on *capro* against *plain*, mean over classes of the clean test part:
reproduced if the 95 % bootstrap interval over seeds and groups of test pictures lies above 0, not reproduced if below,
else inconclusive.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console

from contralto.claims.runner import compare, demand_plots, found_once, points, save
from contralto.data.definitions import load_definitions
from contralto.data.ingest import ingest
from contralto.data.manifest import Manifest
from contralto.errors import DataError, UsageError
from contralto.evaluation.classification import per_class_accuracy
from contralto.pipelines.capro import CAProJob
from contralto.pipelines.job import load_preset
from contralto.systems.webly.base import scale_rule
from contralto.systems.webly.capro import Stage

__all__ = [
    "ARMS",
    "RATES",
    "ambiguous_classes",
    "choose_rates",
    "held_out",
    "markdown",
    "reproduce_capro",
    "right_share",
    "shared_manifest",
    "with_split",
]

PAPER: dict[str, Any] = {"reconcile": False, "text_weight": 0.0, "keep_threshold": None}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "random anchors": PAPER,
    "capro": PAPER,
    "capro+text": {"reconcile": False},
}
RATE_ARGUMENTS = ("plain_lr", "vanilla_lr", "lr", "finetune_lr")
GRID = (0.0003, 0.001, 0.003, 0.01)
RATES: dict[str, dict[str, float]] = {
    "web_icons": {
        "plain": 0.001,
        "random anchors": 0.001,
        "capro": 0.001,
        "capro+text": 0.003,
    },
    "fashion_web": {
        "plain": 0.0003,
        "random anchors": 0.001,
        "capro": 0.003,
        "capro+text": 0.003,
    },
}
"""Learning rate of every arm by data set, the outcome of `choose_rates`."""

COMPARISONS = (
    ("capro", "plain"),
    ("capro", "random anchors"),
    ("random anchors", "plain"),
    ("capro+text", "plain"),
    ("capro+text", "capro"),
)
DEVELOPMENT_SEED = 100


def reproduce_capro(
    out: str | Path,
    *,
    data: str | None = None,
    seeds: int = 5,
    quick: bool = False,
    work: str | Path = "runs/claims/capro",
    progress: bool = True,
) -> dict[str, Any]:
    """Run all arms over seeds on the sets with real noise, judge, and write `capro.json` and `capro.png`.

    Parameters
    ----------
    out : path
        Folder of results.
    data : {"web_icons", "fashion_web"}, optional
        Default: the icons, and fashion_web if `CONTRALTO_DATA` has it.
    seeds : int
        Number of seeds, from 0.
    quick : bool
        One epoch per stage, one seed: a look at the machinery that says nothing about the claim; nothing is written.
    work : path
        Where finished trainings are kept, so that an interrupted comparison goes on.
    progress : bool

    Returns
    -------
    dict
        By data set: accuracies of all arms by seed, comparisons with intervals, verdict.
    """
    demand_plots()
    names = [data] if data is not None else ["web_icons", *(["fashion_web"] if _fashion() is not None else [])]
    if data is None and len(names) == 1:
        Console(stderr=True).print("fashion_web is left out: CONTRALTO_DATA does not name a folder that holds it")
    seeds = 1 if quick else seeds
    results = {name: _compare(name, list(range(seeds)), Path(work), quick, progress) for name in names}
    claim = "anchors chosen by text, prototypes and bootstrapping beat plain training on noisy web labels"
    return save("capro", claim, seeds, results, None if quick else Path(out))


def choose_rates(
    work: str | Path = "runs/claims/capro", *, arms: Sequence[str] = tuple(ARMS)
) -> dict[str, dict[str, float]]:
    """The learning rate of every arm that does best on a seventh of the training pictures, held out by group.

    Clean labels of training pictures serve as the judge here; test pictures are not looked at.
    """
    rates: dict[str, dict[str, float]] = {}
    for name in ("web_icons", "fashion_web"):
        shared = shared_manifest(name, Path(work), development=True)
        for arm in arms:
            score: dict[float, float] = {}
            waiting = list(GRID)
            while waiting:
                rate = waiting.pop(0)
                found = _arm(name, arm, DEVELOPMENT_SEED, Path(work) / "rates", shared, rate, quick=False)
                score[rate] = _macro(found)
                print(name, arm, rate, round(score[rate], 4), flush=True)  # noqa: T201 (a log of a long search)
                lowest = min(score)
                if not waiting and max(score, key=lambda r: score[r]) == lowest:
                    waiting.append(float(f"{lowest / 3:.0e}"))  # the best may lie below
            rates.setdefault(name, {})[arm] = max(score, key=lambda r: score[r])
    return rates


def _fashion() -> Path | None:
    folder = Path(os.environ.get("CONTRALTO_DATA", "")) / "fashion_web"
    return folder if (folder / "fashion_web.parquet").is_file() else None


def shared_manifest(name: str, work: Path, *, development: bool = False) -> Path:
    """The manifest of a data set, made once for all arms; for development a seventh of the training part is the test part."""
    folder = work / name / ("manifest-development" if development else "manifest")
    if (folder / "manifest.parquet").exists():
        return folder
    if name == "web_icons":
        with resources.as_file(resources.files("contralto.data").joinpath("samples/web_icons")) as source:
            path, group = source / "web_icons.parquet", "emoji"
    elif name == "fashion_web":
        found = _fashion()
        if found is None:
            raise DataError("fashion_web was not found: set CONTRALTO_DATA to the folder that holds it")
        path, group = found / "fashion_web.parquet", None
    else:
        raise UsageError(f"the claim runs on web_icons or fashion_web, not on {name!r}")
    classes = load_definitions(path.parent / "classes.json")
    manifest = ingest(str(path), classes=classes, group_column=group, blank_share=load_preset("small")["blank_share"])
    if development:
        manifest = held_out(manifest)
    manifest.save(folder)
    return folder


def held_out(manifest: Manifest) -> Manifest:
    """A manifest for development: a seventh of the training pictures, by group, is its test part; its own is left untouched."""
    groups = manifest.column("group").astype(str)
    groups = np.where(groups == "", np.arange(len(groups)).astype(str), groups)
    unique, inverse = np.unique(groups, return_inverse=True)
    held = np.random.default_rng(DEVELOPMENT_SEED).random(len(unique)) < 1 / 7
    split = manifest.column("split").astype(object)
    split[split == "test"] = "untouched"
    split[(split == "train") & held[inverse]] = "test"
    return with_split(manifest, split)


def with_split(manifest: Manifest, split: npt.NDArray[np.object_]) -> Manifest:
    """The same pictures with other parts."""
    at = manifest.table.schema.get_field_index("split")
    return replace(manifest, table=manifest.table.set_column(at, "split", pa.array(split.tolist(), pa.string())))


def _arm(name: str, arm: str, seed: int, work: Path, shared: Path, rate: float, *, quick: bool) -> dict[str, Any]:
    """Train one arm and test it; what was found is kept, the weights are not."""
    folder = work / name / f"seed{seed}" / f"{arm}-{rate}{'-quick' if quick else ''}"
    return found_once(folder, lambda: _train(arm, seed, folder, shared, rate, quick=quick))


def _train(arm: str, seed: int, folder: Path, shared: Path, rate: float, *, quick: bool) -> dict[str, Any]:
    shutil.copytree(shared, folder / "manifest")
    manifest = Manifest.load(shared)
    train = (manifest.column("split") == "train") & (manifest.labels >= 0)
    anchors = scale_rule(int(train.sum()), len(manifest.classes))["anchors"]
    arguments = load_preset("small") | ARMS[arm] | {"seed": seed} | dict.fromkeys(RATE_ARGUMENTS, rate)
    arguments |= {"anchors": -anchors if arm == "random anchors" else anchors, "cache": shared.parent / "features"}
    if quick:
        arguments |= {
            "vanilla_epochs": 1,
            "epochs": 5,
            "finetune_epochs": 1,
            "feature_views": 1,
            "text_encoder": "tfidf",
        }
    job = CAProJob(str(shared), folder, arguments, progress=False)
    job.ingest()
    found: dict[str, Any] = {"labels": manifest.column("clean_label")[job.test_rows].tolist()}
    found["groups"] = manifest.column("group")[job.test_rows].tolist()
    stage: Stage = "plain" if arm == "plain" else "finetune"
    if arm == "plain":
        job.train("plain")
    else:
        job.train("vanilla")
        job.match()
        job.train("capro")
        job.clean()
        job.train("finetune")
        clean = manifest.column("clean_label")[job.train_rows].astype(np.int64)
        found["noise"] = job.noise()
        found["anchors"] = float((job.labels == clean)[job.anchors].mean())
    found["predicted"] = job.predict_rows(stage, job.encoder(), job.test_rows).argmax(1).tolist()
    shutil.rmtree(folder / "stages")
    return found


def _macro(found: dict[str, Any], only: npt.NDArray[np.bool_] | None = None) -> float:
    labels, predicted = np.array(found["labels"]), np.array(found["predicted"])
    by_class = per_class_accuracy(labels, predicted, int(labels.max()) + 1)
    return float(np.nanmean(by_class if only is None else by_class[only[: len(by_class)]]))


def _compare(name: str, seeds: list[int], work: Path, quick: bool, progress: bool) -> dict[str, Any]:
    shared = shared_manifest(name, work)
    rates = RATES[name]
    console = Console(stderr=True, quiet=not progress)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            console.print(f"[bold]{name}[/bold], seed {seed}: {arm}", highlight=False)
            found[arm].append(_arm(name, arm, seed, work, shared, rates[arm], quick=quick))
    labels, groups = np.array(found["plain"][0]["labels"]), np.array(found["plain"][0]["groups"])
    manifest = Manifest.load(shared)
    hard = ambiguous_classes(manifest)
    right = {arm: np.array([np.array(f["predicted"]) == labels for f in found[arm]], dtype=float) for arm in ARMS}
    arms = {}
    for arm in ARMS:
        arms[arm] = {
            "rate": rates[arm],
            "accuracy": [float(r.mean()) for r in right[arm]],
            "macro": [_macro(f) for f in found[arm]],
            "macro_ambiguous": [_macro(f, hard) for f in found[arm]],
        } | ({k: [f[k] for f in found[arm]] for k in ("noise", "anchors")} if "noise" in found[arm][0] else {})
    comparisons = compare(right, COMPARISONS, labels, groups, {"ambiguous": hard[labels]})
    return {
        "test_images": len(labels),
        "ambiguous": [n for n, h in zip(manifest.class_names, hard, strict=True) if h],
        "arms": arms,
        "comparisons": comparisons,
        "verdict": "not judged" if quick else comparisons[0]["verdict"],
    }


def ambiguous_classes(manifest: Manifest) -> npt.NDArray[np.bool_]:
    """Classes of which less than two thirds of the web labels are right (C,); for evaluation only."""
    return np.asarray(right_share(manifest) < 2 / 3)


def right_share(manifest: Manifest) -> npt.NDArray[np.float64]:
    """Share of the web labels of every class that are right (C,), 1 where there are none; for evaluation only."""
    labels, clean = manifest.labels, manifest.column("clean_label").astype(np.int64)
    train = (manifest.column("split") == "train") & (labels >= 0)
    count = np.bincount(labels[train], minlength=len(manifest.classes))
    right = np.bincount(labels[train & (labels == clean)], minlength=len(manifest.classes))
    return np.where(count > 0, right / np.maximum(count, 1), 1.0)


def markdown(result: dict[str, Any]) -> str:
    """The result of `reproduce_capro` as a Markdown table: means over seeds, and the difference to plain training.

    Examples
    --------
    >>> arms = {a: {"macro": [0.5, 0.6]} for a in ("plain", "capro")}
    >>> comparison = {"method": "capro", "baseline": "plain", "verdict": "inconclusive"}
    >>> comparison["macro"] = comparison["macro_ambiguous"] = {"value": 0.0, "low": -0.1, "high": 0.1}
    >>> print(markdown({"data": {"x": {"arms": arms, "comparisons": [comparison]}}}).splitlines()[-1])
    | x | capro | 55.0 | +0.0 [-10.0, +10.0] | +0.0 [-10.0, +10.0] | inconclusive |
    """
    lines = [
        "| data | training | accuracy, % | against plain | ambiguous classes | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in result["data"].items():
        for arm, values in found["arms"].items():
            c = next((c for c in found["comparisons"] if (c["method"], c["baseline"]) == (arm, "plain")), None)
            told = ["", "", ""]
            if c is not None:
                told = [points(c["macro"]), points(c["macro_ambiguous"]), c["verdict"]]
            lines.append(f"| {name} | {arm} | {100 * np.mean(values['macro']):.1f} | {' | '.join(told)} |")
    return "\n".join(lines)
