"""The claim of FoPro: its machinery, its data, and the figures in the docs."""

import csv
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from contralto.claims import fopro
from contralto.claims.plan import find_claim
from contralto.errors import DataError


@pytest.mark.data
def test_arms_of_a_seed_share_pictures_and_test(data_folder, tmp_path):
    claim = find_claim("fopro")
    how = {"seed": 0, "data": "cifar10n", "budget": claim.budget | claim.quick, "device": "cpu", "work": tmp_path}
    shares = []
    found = [fopro.run(claim.arms[f"{a}, 1 shot"], progress=shares.append, **how) for a in ("web + shots", "fopro")]
    assert set(found[0]) == {"right", "labels", "groups"}
    assert "noise_precision" in found[1]
    assert np.array_equal(found[0]["labels"], found[1]["labels"])
    assert shares == [0.5, 0.25, 0.5, 0.75]
    assert [p.name for p in tmp_path.iterdir()] == ["1-0"]


@pytest.mark.data
def test_the_data_are_what_the_claim_says(data_folder, tmp_path):
    fopro.make_data(tmp_path, 2, seed=1)
    rows = pq.read_table(tmp_path / "data.parquet").to_pylist()
    kinds = {k: [r for r in rows if r["id"].startswith(k)] for k in ("web", "foreign", "shot", "test")}
    assert {k: len(v) for k, v in kinds.items()} == {"web": 2500, "foreign": 250, "shot": 20, "test": 2000}
    wrong = np.mean([r["query"] != r["label"] for r in kinds["web"]])
    assert wrong == pytest.approx(0.4, abs=0.03)
    with (tmp_path / "shots.csv").open() as file:
        assert {(r["id"], r["label"]) for r in csv.DictReader(file)} == {(r["id"], r["label"]) for r in kinds["shot"]}
    pictures = {k: [np.asarray(Image.open(io.BytesIO(r["image"]))) for r in v[:20]] for k, v in kinds.items()}
    assert all(p.shape == (32, 32, 3) for p in pictures["web"] + pictures["foreign"])
    blue = {k: np.mean([p[..., 2].mean() - p[..., 0].mean() for p in v]) for k, v in pictures.items()}
    assert blue["web"] < blue["test"] - 30  # a warm cast
    again = pq.read_table(tmp_path / "data.parquet")
    fopro.make_data(tmp_path, 2, seed=1)
    assert pq.read_table(tmp_path / "data.parquet").equals(again)


def test_data_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTRALTO_DATA", str(tmp_path))
    with pytest.raises(DataError, match="cifar10n and tiny_imagenet100 were not found"):
        fopro.make_data(tmp_path, 1, seed=0)
