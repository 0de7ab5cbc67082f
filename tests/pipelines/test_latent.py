"""cMIM and SepCLR from pictures in files to embeddings: sides of any size, the background by name."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from contralto.errors import DataError, UsageError
from contralto.pipelines.loading import load
from contralto.systems.registry import get_job

from tests.conftest import COLOURS, picture

SMALL = {
    "image_encoder": "resnet8",
    "image_size": 20,
    "batch_size": 8,
    "epochs": 1,
    "accelerator": "cpu",
    "progress": False,
}
N = 24


def table(path, labels):
    names = sorted(COLOURS)
    rows = [{"image": picture(COLOURS[names[i % 2]], seed=i), "label": labels[i % len(labels)]} for i in range(N)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_cmim_reconstructs_pictures_of_the_side_of_its_encoder(tmp_path):
    run = get_job("cmim").fit(table(tmp_path / "a.parquet", ["x", "y"]), tmp_path / "run", dim=6, hidden=32, **SMALL)
    assert np.isfinite(json.loads((run / "metrics.json").read_text())["nll"])
    model = load(run)
    assert model.system.decoder.shape == (3, 20, 20)
    found = model.embed([picture(COLOURS[sorted(COLOURS)[0]], seed=k) for k in range(3)])
    assert found.shape == (3, 16 * 16)
    assert model.system.generate(2).shape == (2, 3, 20, 20)


def test_sepclr_learns_from_two_sets_and_gives_both_codes(tmp_path):
    data = table(tmp_path / "a.parquet", ["sick", "well"])
    arguments = {"common_dim": 5, "salient_dim": 3, "hidden": 16, **SMALL}
    run = get_job("sepclr").fit(data, tmp_path / "run", background="well", **arguments)
    model = load(run)
    assert model.system.background_label == 1
    pictures = [picture(COLOURS[sorted(COLOURS)[0]], seed=k) for k in range(3)]
    both = model.embed(pictures)
    assert both.shape == (3, 8)
    model.system.use = "salient"
    torch.testing.assert_close(torch.tensor(model.embed(pictures)), torch.tensor(both[:, 5:]))
    with pytest.raises(UsageError, match="sick and well; got 'ill'"):
        get_job("sepclr").fit(data, tmp_path / "other", background="ill", **arguments)


def test_labels_that_are_no_two_sets_are_refused(tmp_path):
    with pytest.raises(DataError, match="two values, got 3"):
        get_job("sepclr").fit(table(tmp_path / "a.parquet", ["a", "b", "c"]), tmp_path / "run", **SMALL)
