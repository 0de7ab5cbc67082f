"""The claim of FoPro: prototypes set by a few shots, with cleaning, beat adding the same shots to noisy web pictures.

    contralto reproduce fopro

Data: `cifar10n` as the real world, `tiny_imagenet100` for pictures of no class. A "web" of 2,500 CIFAR-10 pictures under a fixed
shift of looks (colour cast, blur, coarse JPEG), of which 40 % carry the label of the next class, and 250 pictures of foreign
classes under random labels; 1 or 16 shots per class from other, unshifted training pictures; tested on 2,000 test pictures.

Arms, in pairs over seeds (same pictures, shots, views, number of epochs; each at its own best learning rate): *web + shots*,
plain training on both; *no prototypes*, FoPro's network with prototypes and cleaning off; *fopro*. All over the features of the
frozen, pretrained EfficientNet-Lite0 at 64 px with the `small` preset: the paper, too, starts from a pretrained encoder. With a
network of four layers from scratch, FoPro ends with all pictures in one class (seed 100): prototypes mean little before the
encoder has learnt something, and whatever class is corrected into first gets the lowest temperature.

Rates: the best of `GRID` on 500 other unshifted pictures, with seed 100 (`choose_rates`); the test pictures have no part in it.
"""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter
from rich.console import Console

from contralto.claims.runner import compare, demand_plots, found_once, save
from contralto.errors import DataError, UsageError
from contralto.files import write_atomically
from contralto.pipelines.fopro import FoProJob
from contralto.pipelines.job import load_preset

__all__ = ["ARMS", "RATES", "choose_rates", "reproduce_fopro"]

SHOTS = (1, 16)
NEVER = 10**6
ARMS: dict[str, dict[str, Any]] = {
    "web + shots": {},
    "no prototypes": {
        "init_proto_epoch": NEVER,
        "start_clean_epoch": NEVER,
        "relation_clean_epoch": NEVER,
        "threshold": 2.0,
    },
    "fopro": {},
}
COMPARISONS = (("fopro", "web + shots"), ("fopro", "no prototypes"), ("no prototypes", "web + shots"))
SETTINGS: dict[str, Any] = {
    "image_size": 64, "feature_views": 3, "image_filter": False, "finetune_epochs": 0, "accelerator": "cpu",
}  # fmt: skip
"""Changes to the `small` preset."""
GRID = (0.0003, 0.001, 0.003)
RATES: dict[str, float] = {"web + shots": 0.001, "no prototypes": 0.001, "fopro": 0.003}
"""Learning rate of every arm, the outcome of `choose_rates`."""
DEVELOPMENT_SEED = 100
WEB, FOREIGN, TEST, HELD = 2500, 250, 2000, 500
WRONG = 0.4


def reproduce_fopro(
    out: str | Path,
    *,
    data: str | None = None,
    seeds: int = 5,
    quick: bool = False,
    work: str | Path = "runs/claims/fopro",
    progress: bool = True,
) -> dict[str, Any]:
    """Run all arms over seeds and numbers of shots, judge, and write `fopro.json` and `fopro.png`.

    Parameters
    ----------
    out : path
        Folder of results.
    data : {"1 shot", "16 shots"}, optional
        Default: both.
    seeds : int
        Number of seeds, from 0; a seed draws web, noise and shots, too.
    quick : bool
        Few pictures and epochs, one seed: a look at the machinery that says nothing about the claim; nothing is written.
    work : path
        Where finished trainings are kept, so that an interrupted comparison goes on.
    progress : bool

    Returns
    -------
    dict
        By number of shots: accuracies of all arms by seed, comparisons with intervals, verdict; and whether the gain grows.
    """
    demand_plots()
    names = {f"{k} shot{'s' if k > 1 else ''}": k for k in SHOTS}
    if data is not None and data not in names:
        raise UsageError(f"the claim runs with {' or '.join(names)}, not with {data!r}")
    seeds = 1 if quick else seeds
    console = Console(stderr=True, quiet=not progress)
    results, rights = {}, {}
    for name, k in names.items():
        if data in (None, name):
            results[name], rights[name] = _one(name, k, seeds, Path(work), quick, console)
    if len(rights) == 2:
        few, many = rights.values()
        gain = {n: r["fopro"] - r["web + shots"] for n, r in (("16", many), ("1", few))}
        labels = np.array(results["1 shot"].pop("labels"))
        results["16 shots"].pop("labels")
        growth = compare(gain, [("16", "1")], labels, np.array([""] * len(labels)))[0]
        growth |= {"method": "gain with 16 shots", "baseline": "gain with 1 shot"}
        results["16 shots"]["comparisons"].append(growth)
    for result in results.values():
        result.pop("labels", None)
    claim = "prototypes set by few shots, with cleaning, beat adding the shots to the noisy training set; more so with more shots"
    return save("fopro", claim, seeds, results, None if quick else Path(out))


def choose_rates(work: str | Path = "runs/claims/fopro") -> dict[str, float]:
    """The learning rate of every arm that does best on held-out unshifted pictures, with 16 shots."""
    rates = {}
    for arm in ARMS:
        score = {}
        for rate in GRID:
            found = _arm(arm, 16, DEVELOPMENT_SEED, Path(work), rate, quick=False)
            score[rate] = float(np.mean(np.array(found["predicted"]) == np.array(found["labels"])))
            print(arm, rate, round(score[rate], 4), flush=True)  # noqa: T201 (a log of a long search)
        rates[arm] = max(score, key=lambda r: score[r])
    return rates


def _one(
    name: str, k: int, seeds: int, work: Path, quick: bool, console: Console
) -> tuple[dict[str, Any], dict[str, npt.NDArray[np.float64]]]:
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            console.print(f"[bold]{name}[/bold], seed {seed}: {arm}", highlight=False)
            found[arm].append(_arm(arm, k, seed, work, RATES[arm], quick=quick))
        shutil.rmtree(work / f"{k}" / f"seed{seed}" / "features", ignore_errors=True)
    labels = np.array(found["fopro"][0]["labels"])
    right = {a: np.array([np.array(f["predicted"]) == labels for f in found[a]], float) for a in ARMS}
    comparisons = compare(right, COMPARISONS, labels, np.array([""] * len(labels)))
    arms = {
        a: {"rate": RATES[a], "macro": [float(r.mean()) for r in right[a]]}
        | ({"noise": [f["noise"] for f in found[a]]} if "noise" in found[a][0] else {})
        for a in ARMS
    }
    verdict = "not judged" if quick else comparisons[0]["verdict"]
    told = {
        "test_images": len(labels),
        "arms": arms,
        "comparisons": comparisons,
        "verdict": verdict,
        "labels": labels.tolist(),
    }
    return told, right


def _arm(arm: str, k: int, seed: int, work: Path, rate: float, *, quick: bool) -> dict[str, Any]:
    """Train one arm and test it; what was found is kept, the weights are not."""
    folder = work / f"{k}" / f"seed{seed}" / f"{arm}-{rate}{'-quick' if quick else ''}"
    return found_once(folder, lambda: _train(arm, k, seed, folder, rate, quick=quick))


def _train(arm: str, k: int, seed: int, folder: Path, rate: float, *, quick: bool) -> dict[str, Any]:
    data = folder.parent / ("data-quick" if quick else "data")
    if not (data / "shots.csv").exists():
        data.mkdir(parents=True, exist_ok=True)
        make_data(data, k, seed, quick=quick)
    arguments = load_preset("small", "fopro") | SETTINGS | ARMS[arm]
    arguments |= {
        "seed": seed,
        "lr": rate,
        "plain_lr": rate,
        "shots": data / "shots.csv",
        "cache": folder.parent / "features",
    }
    if quick:
        fewer = {
            "epochs": 4,
            "init_proto_epoch": 0,
            "start_clean_epoch": 1,
            "relation_clean_epoch": 2,
            "relation_epochs": 1,
        }
        arguments |= fewer | ARMS[arm] | {"feature_views": 1}
    job = FoProJob(str(data / "data.parquet"), folder, arguments, progress=False)
    job.ingest()
    found: dict[str, Any] = {"labels": job.manifest.column("clean_label")[job.test_rows].tolist()}
    if arm == "web + shots":
        stage = "plain"
        job.train(stage)
    elif arm == "no prototypes":
        stage = "prototypes"  # has all epochs
        job.train(stage)
    else:
        for stage in ("prototypes", "relation", "fopro"):
            job.train(stage)
        job.clean()
        found["noise"] = job.noise()
    found["predicted"] = job.predict_rows(stage, job.encoder(), job.test_rows).argmax(1).tolist()
    shutil.rmtree(folder)
    return found


def make_data(folder: Path, k: int, seed: int, *, quick: bool = False) -> Path:
    """Write `data.parquet` (web, shots, test) and `shots.csv`; everything is a function of k and seed."""
    source = Path(os.environ.get("CONTRALTO_DATA", ""))
    if not (source / "cifar10n" / "train.parquet").is_file() or not (source / "tiny_imagenet100").is_dir():
        raise DataError(
            "cifar10n and tiny_imagenet100 were not found: set CONTRALTO_DATA to the folder that holds them"
        )
    columns = ["image", "label", "class_name"]
    train, test = (pq.read_table(source / "cifar10n" / f"{p}.parquet", columns=columns) for p in ("train", "test"))
    foreign = pq.read_table(source / "tiny_imagenet100" / "tiny_imagenet100.parquet", columns=["image"]).column(0)
    names = dict(zip(train["label"].to_pylist(), train["class_name"].to_pylist(), strict=True))
    rng = np.random.default_rng([seed, 3])
    small = 0.1 if quick else 1.0
    order, labels = rng.permutation(len(train)), train["label"].to_numpy()
    web, rest = order[: int(WEB * small)], order[int(WEB * small) :]
    rows = [
        {"id": f"web-{i}", "image": _shifted(train["image"][int(i)].as_py()), "query": names[_noisy(labels[i], rng)],
         "label": names[labels[i]], "split": "train"} for i in web
    ]  # fmt: skip
    rows += [
        {"id": f"foreign-{i}", "image": _shifted(foreign[int(i)].as_py()), "query": names[int(rng.integers(10))],
         "label": "none of them", "split": "train"} for i in rng.permutation(len(foreign))[: int(FOREIGN * small)]
    ]  # fmt: skip
    shots = [int(i) for c in range(10) for i in rest[labels[rest] == c][:k]]
    rows += [_real(train, i, names, f"shot-{i}", "train", names[labels[i]]) for i in shots]
    if seed == DEVELOPMENT_SEED:
        held = [int(i) for i in rest if int(i) not in set(shots)][:HELD]
        rows += [_real(train, i, names, f"held-{i}", "test", None) for i in held]
    else:
        chosen = np.sort(np.random.default_rng(0).permutation(len(test))[: int(TEST * small)])
        rows += [_real(test, int(i), names, f"test-{i}", "test", None) for i in chosen]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    lines = ["id,label", *(f"shot-{i},{names[labels[i]]}" for i in shots)]
    text, shots_file = "\n".join(lines) + "\n", folder / "shots.csv"
    write_atomically(
        shots_file, lambda path: path.write_text(text, encoding="utf-8")
    )  # the last: it says that all is there
    return shots_file


def _real(
    table: pa.Table, i: int, names: dict[int, str], identity: str, split: str, query: str | None
) -> dict[str, Any]:
    label = names[table["label"][i].as_py()]
    return {"id": identity, "image": table["image"][i].as_py(), "query": query, "label": label, "split": split}


def _noisy(label: int, rng: np.random.Generator) -> int:
    return (int(label) + 1) % 10 if rng.random() < WRONG else int(label)


def _shifted(data: bytes) -> bytes:
    """How the "web" shows a picture: small, warm, soft, and compressed too much."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    red, green, blue = image.split()
    cast = Image.merge(
        "RGB", (red.point(lambda v: min(255, int(v * 1.2 + 20))), green, blue.point(lambda v: int(v * 0.6)))
    )
    buffer = io.BytesIO()
    cast.filter(ImageFilter.GaussianBlur(0.8)).save(buffer, "JPEG", quality=30)
    return buffer.getvalue()
