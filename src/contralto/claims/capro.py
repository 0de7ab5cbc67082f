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

Each arm has its own learning rate (`rate` in `capro.yaml`), chosen by `choose_rates` on a part of the training pictures that it
did not train on, with a seed that is not reported. The verdict is on *capro* against *plain*, mean over classes of the clean
test part.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from contralto.claims.arms import made_once
from contralto.claims.plan import DEVELOPMENT_SEED
from contralto.claims.runner import tune
from contralto.data.definitions import load_definitions
from contralto.data.ingest import ingest
from contralto.data.manifest import Manifest
from contralto.errors import DataError, UsageError
from contralto.pipelines.capro import CAProJob
from contralto.pipelines.job import load_preset
from contralto.systems.webly.base import scale_rule
from contralto.systems.webly.capro import Stage

__all__ = [
    "GRID",
    "ambiguous_classes",
    "choose_rates",
    "held_out",
    "right_share",
    "run",
    "shared_manifest",
    "with_split",
]

RATE_ARGUMENTS = ("plain_lr", "vanilla_lr", "lr", "finetune_lr")
GRID = (0.0001, 0.0003, 0.001, 0.003, 0.01)


def run(
    arm: Mapping[str, Any],
    *,
    seed: int,
    data: str,
    budget: Mapping[str, Any],
    device: str,
    progress: Callable[[float], None],
    work: Path,
) -> dict[str, Any]:
    """Train one arm and test it; see `capro.yaml` for the arms.

    Returns
    -------
    dict
        `right`, `labels`, `groups` and `ambiguous` (whether its class is) by test picture; of an arm with anchors also their
        share of right ones, and `noise_*`, how good its list of wrong labels is.
    """
    shared = shared_manifest(data, work, development=seed >= DEVELOPMENT_SEED)
    arguments = dict(budget)
    shared = _fewer(shared, arguments.pop("pictures"))
    settings = {"rate": None, "plain": False, "random_anchors": False, **arm}
    plain, rate = settings.pop("plain"), settings.pop("rate")
    manifest = Manifest.load(shared)
    train = (manifest.column("split") == "train") & (manifest.labels >= 0)
    anchors = scale_rule(int(train.sum()), len(manifest.classes))["anchors"]
    rates = dict.fromkeys(RATE_ARGUMENTS, rate[data] if isinstance(rate, Mapping) else rate)
    arguments = load_preset("small") | arguments | rates | {"seed": seed, "accelerator": device.partition(":")[0]}
    arguments |= {
        "anchors": -anchors if settings.pop("random_anchors") else anchors,
        "cache": shared.parent / "features",
    }
    arguments |= settings
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        shutil.copytree(shared, folder / "manifest")
        job = CAProJob(str(shared), folder, arguments, progress=False)
        job.ingest()
        stage: Stage = "plain" if plain else "finetune"
        found: dict[str, Any] = {}
        if plain:
            job.train("plain")
        else:
            job.train("vanilla")
            progress(1 / 3)
            job.match()
            job.train("capro")
            job.clean()
            progress(2 / 3)
            job.train("finetune")
            clean = manifest.column("clean_label")[job.train_rows].astype(np.int64)
            found = {f"noise_{k}": v for k, v in job.noise().items()}
            found["anchors"] = float((job.labels == clean)[job.anchors].mean())
        predicted = job.predict_rows(stage, job.encoder(), job.test_rows).argmax(1)
    labels = manifest.column("clean_label")[job.test_rows].astype(np.int64)
    found |= {"right": predicted == labels, "labels": labels, "ambiguous": ambiguous_classes(manifest)[labels]}
    return found | {"groups": manifest.column("group")[job.test_rows].astype(str)}


def choose_rates(work: str | Path = "runs/claims") -> dict[str, dict[str, dict[float, float]]]:
    """The score of every arm and learning rate on a seventh of the training pictures, held out by group; the best is taken.

    Clean labels of training pictures serve as the judge here; test pictures are not looked at.

    Returns
    -------
    dict
        By data set and arm: rate -> mean over classes.
    """
    return {
        name: tune("capro", "rate", GRID, "right", macro=True, data=name, work=work)
        for name in ("web_icons", "fashion_web")
    }


def _fashion() -> Path | None:
    folder = Path(os.environ.get("CONTRALTO_DATA", "")) / "fashion_web"
    return folder if (folder / "fashion_web.parquet").is_file() else None


def shared_manifest(name: str, work: Path, *, development: bool = False) -> Path:
    """The manifest of a data set, made once for all arms; for development a seventh of the training part is the test part."""
    folder = work / name / ("manifest-development" if development else "manifest")
    if folder.exists():
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
    return made_once(folder, manifest.save)


def _fewer(shared: Path, share: float) -> Path:
    """The manifest with a share of its pictures; the others are in no part."""
    if share == 1:
        return shared
    manifest = Manifest.load(shared)
    left = np.random.default_rng(0).random(len(manifest)) >= share
    split = np.where(left, "untouched", manifest.column("split")).astype(object)
    return made_once(shared.with_name(f"{shared.name}-{share}"), with_split(manifest, split).save)


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
