"""The claim of FoPro: prototypes set by a few shots, with cleaning, beat adding the same shots to noisy web pictures.

Data: `cifar10n` as the real world, `tiny_imagenet100` for pictures of no class. A "web" of 2,500 CIFAR-10 pictures under a fixed
shift of looks (colour cast, blur, coarse JPEG), of which 40 % carry the label of the next class, and 250 pictures of foreign
classes under random labels; 1 or 16 shots per class from other, unshifted training pictures; tested on 2,000 test pictures.

Arms, in pairs over seeds (same pictures, shots, views, number of epochs; each at its own best learning rate): *web + shots*,
plain training on both; *no prototypes*, FoPro's network with prototypes and cleaning off; *fopro*. All over the features of the
frozen, pretrained EfficientNet-Lite0 at 64 px with the `small` preset: the paper, too, starts from a pretrained encoder. With a
network of four layers from scratch, FoPro ends with all pictures in one class (seed 100): prototypes mean little before the
encoder has learnt something, and whatever class is corrected into first gets the lowest temperature.

Rates: the best of `GRID` with 16 shots on 500 other unshifted pictures, with seed 100 (`choose_rates`); the test pictures have
no part in it.
"""

import io
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from contralto.claims.arms import made_once
from contralto.claims.plan import DEVELOPMENT_SEED
from contralto.claims.runner import tune
from contralto.errors import DataError
from contralto.pipelines.fopro import FoProJob
from contralto.pipelines.job import load_preset

__all__ = ["GRID", "choose_rates", "make_data", "run"]

SETTINGS: dict[str, Any] = {"image_size": 64, "image_filter": False, "finetune_epochs": 0}
"""Changes to the `small` preset."""
GRID = (0.0003, 0.001, 0.003)
WEB, FOREIGN, TEST, HELD = 2500, 250, 2000, 500
WRONG = 0.4


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
    """Train one arm and test it; see `fopro.yaml` for the arms. A seed draws web, noise and shots, too.

    Returns
    -------
    dict
        `right`, `labels` and `groups` by test picture; of *fopro* also `noise_*`, how good its list of wrong labels is.
    """
    settings = dict(arm)
    shots, rate, trained = (
        settings.pop("shots"),
        settings.pop("rate"),
        settings.pop("stages", ["prototypes", "relation", "fopro"]),
    )
    arguments = load_preset("small", "fopro") | SETTINGS | dict(budget) | settings
    share = arguments.pop("pictures")
    pictures = made_once(work / f"{shots}-{seed}", lambda folder: make_data(folder, shots, seed, share=share))
    arguments |= {"seed": seed, "lr": rate, "plain_lr": rate, "accelerator": device.partition(":")[0]}
    arguments |= {"shots": pictures / "shots.csv", "cache": pictures / "features"}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        job = FoProJob(str(pictures / "data.parquet"), Path(folder), arguments, progress=False)
        job.ingest()
        for i, stage in enumerate(trained):
            job.train(stage)
            progress((i + 1) / (len(trained) + 1))
        found: dict[str, Any] = {}
        if "fopro" in trained:
            job.clean()
            found = {f"noise_{k}": v for k, v in job.noise().items()}
        labels = job.manifest.column("clean_label")[job.test_rows].astype(np.int64)
        predicted = job.predict_rows(trained[-1], job.encoder(), job.test_rows).argmax(1)
    alone = np.full(len(labels), "")  # no picture shows what another one does
    return found | {"right": predicted == labels, "labels": labels, "groups": alone}


def choose_rates(work: str | Path = "runs/claims") -> dict[str, dict[float, float]]:
    """The score of every arm and learning rate on held-out unshifted pictures, with 16 shots; the best is taken."""
    found = tune("fopro", "rate", GRID, "right", data="cifar10n", work=work)
    return {arm: scores for arm, scores in found.items() if arm.endswith("16 shots")}


def make_data(folder: Path, k: int, seed: int, *, share: float = 1.0) -> None:
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
    order, labels = rng.permutation(len(train)), train["label"].to_numpy()
    web, rest = order[: int(WEB * share)], order[int(WEB * share) :]
    rows = [
        {"id": f"web-{i}", "image": _shifted(train["image"][int(i)].as_py()), "query": names[_noisy(labels[i], rng)],
         "label": names[labels[i]], "split": "train"} for i in web
    ]  # fmt: skip
    rows += [
        {"id": f"foreign-{i}", "image": _shifted(foreign[int(i)].as_py()), "query": names[int(rng.integers(10))],
         "label": "none of them", "split": "train"} for i in rng.permutation(len(foreign))[: int(FOREIGN * share)]
    ]  # fmt: skip
    shots = [int(i) for c in range(10) for i in rest[labels[rest] == c][:k]]
    rows += [_real(train, i, names, f"shot-{i}", "train", names[labels[i]]) for i in shots]
    if seed >= DEVELOPMENT_SEED:
        held = [int(i) for i in rest if int(i) not in set(shots)][:HELD]
        rows += [_real(train, i, names, f"held-{i}", "test", None) for i in held]
    else:
        chosen = np.sort(np.random.default_rng(0).permutation(len(test))[: int(TEST * share)])
        rows += [_real(test, int(i), names, f"test-{i}", "test", None) for i in chosen]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    lines = ["id,label", *(f"shot-{i},{names[labels[i]]}" for i in shots)]
    (folder / "shots.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


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
