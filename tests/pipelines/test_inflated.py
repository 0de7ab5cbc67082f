"""Pretraining on real and generated pictures: what is drawn how often, what is refused, and a run that is as long as without."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from contralto.errors import DataError, UsageError
from contralto.pipelines.embedding import evaluate_encoder
from contralto.pipelines.loading import load
from contralto.systems.registry import get_job
from contralto.systems.selfsup.adainf import AdaInf

from tests.conftest import COLOURS, picture
from tests.killing import whole

SMALL = {
    "image_encoder": "resnet8", "image_size": 16, "batch_size": 8, "epochs": 6, "hidden": 16, "dim": 8, "optimizer": "adam",
    "lr": 1e-3, "warmup_epochs": 0, "dup": 3, "progress": False,
}  # fmt: skip
REAL, GENERATED = 16, 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Real pictures of two colours, some for testing; generated ones in folders of another name, one of them broken."""
    folder = tmp_path_factory.mktemp("inflated")
    names = sorted(COLOURS)[:2]
    rows = [
        {
            "image": picture(COLOURS[names[i % 2]], seed=i),
            "label": names[i % 2],
            "split": "test" if i >= REAL else "train",
        }
        for i in range(REAL + 8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "real.parquet")
    for i in range(GENERATED):
        place = folder / "generated" / f"batch{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(picture(COLOURS[names[i % 2]], seed=1000 + i))
    (folder / "generated" / "batch0" / "broken.png").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def watched(data, tmp_path_factory):
    seen, plain = [], AdaInf.training_step

    def noted(self, batch, batch_idx):
        seen.append((batch["index"].tolist(), batch["label"].tolist()))
        return plain(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaInf, "training_step", noted)
        out = tmp_path_factory.mktemp("run") / "run"
        run = get_job("adainf").fit(str(data / "real.parquet"), out, generated=str(data / "generated"), **SMALL)
    return run, seen


def test_real_pictures_are_drawn_dup_times_as_often_and_generated_ones_have_no_label(watched):
    run, seen = watched
    whole(run)
    assert len(seen) == 6 * (REAL // 8)  # as many steps as without generated pictures
    rows = [i for batch, _ in seen for i in batch]
    labels = [y for _, batch in seen for y in batch]
    assert len(rows) == 96  # 72 = 3 * 16 + 24 make one pass
    counts = {i: rows[:72].count(i) for i in range(REAL + GENERATED)}
    assert [counts[i] for i in range(REAL)] == [3] * REAL
    assert [counts[i] for i in range(REAL, REAL + GENERATED)] == [1] * GENERATED
    assert all((label == -1) == (row >= REAL) for row, label in zip(rows, labels, strict=True))


def test_the_run_says_what_was_drawn_and_evaluates_on_real_pictures(watched, data):
    run, _ = watched
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["generated"] == GENERATED
    assert metrics["real_share"] == pytest.approx(48 / 72)
    assert metrics["pictures"] == REAL
    assert 0 <= metrics["probe"] <= 1
    system = load(run).system
    assert (system.dup, system.num_samples) == (3, REAL + GENERATED)
    result = evaluate_encoder(load(run), str(data / "real.parquet"))
    assert (result["learnt_from"], result["tested"]) == (REAL, 8)
    assert result["probe"] == 1.0


def test_without_generated_pictures_it_is_the_base_on_real_ones(data, tmp_path):
    run = get_job("adainf").fit(str(data / "real.parquet"), tmp_path / "run", **(SMALL | {"epochs": 1}))
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["generated"], metrics["real_share"]) == (0, 1.0)
    assert load(run).system.done == REAL // 8


def test_a_run_goes_on_and_other_generated_pictures_are_refused(watched, data, tmp_path):
    run, _ = watched
    before = (run / "training" / "weights.safetensors").stat().st_mtime_ns
    arguments = SMALL | {"generated": str(data / "generated")}
    get_job("adainf").fit(str(data / "real.parquet"), run, **arguments)
    assert (run / "training" / "weights.safetensors").stat().st_mtime_ns == before
    again = get_job("adainf").fit(str(data / "real.parquet"), tmp_path / "again", **arguments, cache_gib=0.0)
    a, b = (load_file(r / "training" / "weights.safetensors") for r in (run, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(UsageError, match="generated"):
        get_job("adainf").fit(str(data / "real.parquet"), run, **SMALL)


def test_a_picture_that_is_kept_for_testing_is_no_generated_one(data, tmp_path):
    leaked = tmp_path / "generated"
    leaked.mkdir()
    (leaked / "a.png").write_bytes(picture(COLOURS[sorted(COLOURS)[0]], seed=REAL))
    (leaked / "b.png").write_bytes(picture((1, 2, 3), seed=77))
    with pytest.raises(DataError, match=r"'a\S*' is a picture that .* keeps out of training \(1 are\)"):
        get_job("adainf").fit(str(data / "real.parquet"), tmp_path / "run", generated=str(leaked), **SMALL)


def test_a_folder_without_pictures_is_named(data, tmp_path):
    (tmp_path / "generated").mkdir()
    (tmp_path / "generated" / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="generated"):
        get_job("adainf").fit(
            str(data / "real.parquet"), tmp_path / "run", generated=str(tmp_path / "generated"), **SMALL
        )
