"""The parts of PixPro's claim: arms that differ in nothing but what they compare, and what is measured."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from contralto.claims import pixpro
from contralto.claims.plan import find_claim
from contralto.errors import DataError

CLAIM = find_claim("pixpro")
BUDGET = {"steps": 2, "batch_size": 4, "frames": 1}


def encoded(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """A folder with frames whose colour is their class: sky above, road below."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "camvid").mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(16):
        mask = np.zeros((180, 240), np.uint8)
        mask[80 + 5 * (i % 4) :] = 3
        mask[:, :10] = 11
        pixels = np.where(mask[..., None] == 0, (90, 120, 250), (80, 80, 80)) + rng.integers(-20, 5, (180, 240, 3))
        rows.append(
            {
                "image": encoded(pixels.astype(np.uint8)), "mask": encoded(mask), "split": "train" if i < 12 else "test",
                "file": f"video{i % 2}_{i}.png",
            }
        )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "camvid" / "camvid240.parquet")
    return folder


@pytest.fixture(scope="module")
def measured(frames, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTRALTO_DATA", str(frames))
        return {name: run(name, work) for name in CLAIM.arms}


def run(name, work):
    told = []
    found = pixpro.run(
        dict(CLAIM.arms[name]), seed=100, data="camvid", budget=BUDGET, device="cpu", progress=told.append, work=work
    )
    assert all(0 <= share < 1 for share in told)
    return found


def test_all_arms_measure_the_same_frames(measured):
    for found in measured.values():
        assert found["groups"].tolist() == ["video0", "video0"]  # every second of four
        assert found["cells"].shape == (2,)
        assert found["cells"].min() > 0.9  # two colours: anything finds them
        assert 0.8 < found["miou"] <= 1
        assert 0.8 < found["miou_neighbours"] <= 1


def test_frames_and_masks_fit_each_other(measured, frames, tmp_path, monkeypatch):
    monkeypatch.setenv("CONTRALTO_DATA", str(frames))
    found = pixpro.camvid(tmp_path)
    assert found["train"].shape == (12, 3, 120, 160)
    assert found["test_masks"].shape == (4, 120, 160)
    blue = found["train"][:, 2].astype(int) - found["train"][:, 0] > 60
    known = found["train_masks"] < 11
    assert ((found["train_masks"] == 0) == blue)[known].mean() > 0.98
    monkeypatch.setenv("CONTRALTO_DATA", str(tmp_path))
    assert pixpro.camvid(tmp_path)["test"].shape == (4, 3, 120, 160)  # decoded once
    with pytest.raises(DataError, match="set CONTRALTO_DATA"):
        pixpro.camvid(tmp_path / "elsewhere")


@pytest.mark.parametrize("arm", CLAIM.arms)
def test_arms_have_the_same_first_weights_and_train(arm, measured):
    settings = {k: v for k, v in CLAIM.arms[arm].items() if k != "steps"}
    ours, first = (pixpro.build(a, seed=3, steps=2) for a in (settings, {}))
    for a, b in zip(ours.encoder.parameters(), first.encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    assert ours.needs == ("boxes",)
    assert ours.optimizers_and_schedules()[0][0].param_groups[0]["lr"] == 1e-3


def test_the_same_seed_gives_the_same_numbers(measured, frames, tmp_path, monkeypatch):
    monkeypatch.setenv("CONTRALTO_DATA", str(frames))
    again = run("PixPro", tmp_path)
    assert again["miou"] == measured["PixPro"]["miou"]
    assert np.array_equal(again["cells"], measured["PixPro"]["cells"])
