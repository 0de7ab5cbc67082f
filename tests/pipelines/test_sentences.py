"""From a file of texts to a model of sentences and their embeddings."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from contralto.errors import DataError, UsageError
from contralto.pipelines.sentences import SentenceJob, load_sentences
from contralto.systems.registry import SYSTEMS, System

NAME = "sentence-mim"
SMALL = {
    "epochs": 2, "batch_size": 8, "dim": 4, "embedding": 8, "hidden": 12, "length": 8, "held": 0.1, "accelerator": "cpu",
    "progress": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    entry = System(
        NAME, "SentenceMIM", "codes of sentences", "texts", "arXiv 2003.02645",
        "contralto.systems.text.sentence_mim:SentenceMIM", "contralto.pipelines.sentences:SentenceJob",
    )  # fmt: skip
    monkeypatch.setitem(SYSTEMS, NAME, entry)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "cat", "dog", "runs", "sleeps", "."]
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(" ".join(rng.choice(words, rng.integers(2, 7))) for _ in range(60)))
    return path


def fit(texts, out, **arguments):
    return SentenceJob(NAME).fit(str(texts), out, **(SMALL | arguments))


def test_a_run_holds_embeddings_something_to_read_and_figures(texts, tmp_path):
    run = fit(texts, tmp_path / "run")
    lines = texts.read_text().splitlines()
    table = pq.read_table(run / "embeddings.parquet")
    assert table.column("text").to_pylist() == lines
    embedded = np.array(table.column("embedding").to_pylist(), np.float32)
    assert embedded.shape == (60, 12)
    model = load_sentences(run)
    np.testing.assert_allclose(model.embed(lines), embedded, rtol=1e-5, atol=1e-6)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["texts"] == 60
    assert metrics["words"] == 8
    assert metrics["held_perplexity"] > 1
    assert np.isfinite(metrics["loss"])
    page = (run / "written.txt").read_text()
    assert page.count("->") == 6
    assert page.index("New ones") > page.index("->")
    assert len(model.write(3)) == 3
    again = model.write(3, seed=1)
    assert again == model.write(3, seed=1)


def test_called_again_it_gives_the_same_and_other_arguments_are_refused(texts, tmp_path):
    run = fit(texts, tmp_path / "run")
    before = (run / "embeddings.parquet").read_bytes()
    fit(texts, tmp_path / "run", checkpoint_every=7)
    assert (run / "embeddings.parquet").read_bytes() == before
    with pytest.raises(UsageError, match="other arguments or data"):
        fit(texts, tmp_path / "run", dim=5)


def test_two_runs_agree(texts, tmp_path):
    torch.manual_seed(1)
    one = fit(texts, tmp_path / "one")
    torch.manual_seed(2)
    two = fit(texts, tmp_path / "two")
    assert (one / "embeddings.parquet").read_bytes() == (two / "embeddings.parquet").read_bytes()


def test_bad_input_is_named(texts, tmp_path):
    with pytest.raises(UsageError, match="no argument 'dimension'"):
        fit(texts, tmp_path / "a", dimension=3)
    with pytest.raises(UsageError, match="held is a share"):
        fit(texts, tmp_path / "b", held=1.0)
    with pytest.raises(UsageError, match="one device"):
        fit(texts, tmp_path / "c", devices=2)
    (tmp_path / "one.txt").write_text("just one text one text")
    with pytest.raises(DataError, match="at least two"):
        fit(tmp_path / "one.txt", tmp_path / "d")
    with pytest.raises(DataError, match="no such file"):
        fit(tmp_path / "none.txt", tmp_path / "e")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError):
        load_sentences(tmp_path)
