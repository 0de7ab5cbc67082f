"""Neighbours past memory: exact cosines, nearly all of the true neighbours, never all rows at once."""

import json
import os
from functools import partial

import numpy as np
import pytest

from contralto.errors import UsageError
from contralto.neighbors import rerank
from contralto.neighbors.knn import knn
from contralto.neighbors.rerank import neighbour_graph
from contralto.neighbors.streamed import default_index, fits_memory, knn_streamed
from contralto.pipelines import capro

from tests.tiny import FROZEN


@pytest.fixture(scope="module")
def clustered():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 32))
    return (centres[rng.integers(40, size=3000)] + 0.5 * rng.standard_normal((3000, 32))).astype(np.float32)


class Watched:
    """Rows on a disk: remembers the most that were asked for at a time."""

    def __init__(self, rows):
        self.rows, self.most, self.shape = rows, 0, rows.shape

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        part = self.rows[at]
        self.most = max(self.most, len(part))
        return part


def test_an_index_that_loses_nothing_gives_the_exact_neighbours(clustered):
    similarity, index = knn_streamed(clustered, 8, index="Flat", block=700)
    exact, neighbours = knn(clustered, 8)
    np.testing.assert_allclose(similarity, exact, atol=1e-5)
    assert (index == neighbours).mean() > 0.999  # but for ties of rounding


def test_compressed_it_finds_nearly_all_and_says_true_cosines(clustered):
    similarity, index = knn_streamed(clustered, 8, candidates=8, probes=32)
    neighbours = knn(clustered, 8)[1]
    assert np.mean([len(set(a) & set(b)) / 8 for a, b in zip(index, neighbours, strict=True)]) > 0.95
    unit = clustered / np.linalg.norm(clustered, axis=1, keepdims=True)
    np.testing.assert_allclose(similarity, np.einsum("nd,nkd->nk", unit, unit[index]), atol=1e-5)
    assert (np.diff(similarity[:, 1:]) <= 1e-6).all()
    assert (index[:, 0] == np.arange(3000)).all()
    assert all(len(set(row)) == 8 for row in index)


def test_more_candidates_find_more(clustered):
    neighbours = knn(clustered, 8)[1]
    shares = []
    for candidates in (1, 4, 16):
        _, index = knn_streamed(clustered, 8, index="IVF20,PQ4", probes=20, candidates=candidates)
        shares.append((index[:, :, None] == neighbours[:, None]).any(2).mean())
    assert shares[0] < shares[1] < shares[2]


def test_rows_are_read_in_blocks(clustered):
    watched = Watched(clustered)
    _, index = knn_streamed(watched, 4, block=100, sample=900, candidates=2, index="IVF10,PQ8")
    assert watched.most == 900  # the sample; a block of 100 and its 8 candidates each are at most as many
    _, same = knn_streamed(clustered, 4, block=3000, sample=900, candidates=2, index="IVF10,PQ8")
    assert (index == same).all()


@pytest.mark.parametrize("use_rerank", [True, False])
def test_the_graph_of_streamed_neighbours_is_the_exact_one_where_the_index_loses_nothing(
    clustered, monkeypatch, use_rerank
):
    monkeypatch.setattr(rerank, "knn_streamed", partial(knn_streamed, index="Flat", sample=900, block=100))
    watched, how = Watched(clustered), {"candidates": 10, "k": 4, "use_rerank": use_rerank}
    index, distance = neighbour_graph(watched, search="streamed", **how)
    assert watched.most < 3000
    exact, length = neighbour_graph(clustered, search="exact", **how)
    same = (index == exact).all(1)
    assert same.mean() > 0.99  # but for ties of rounding
    np.testing.assert_allclose(distance[same], length[same], atol=1e-5)


def test_a_job_whose_rows_do_not_fit_streams_its_neighbours(tiny_parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(capro, "fits_memory", lambda n, dim: n * dim < 1000)
    searched = []
    monkeypatch.setattr(rerank, "knn_streamed", lambda rows, k, seed: searched.append(len(rows)) or knn(rows, k))
    definitions = tiny_parquet.with_name("classes.yaml")
    run = capro.fit_capro(
        str(tiny_parquet), tmp_path / "r", definitions=definitions, **FROZEN | {"epochs": 2, "baseline": False}
    )
    assert searched == [48]
    told = [json.loads(p.read_text()) for p in (run / "features").glob("graph-*.json")]
    assert [t["search"] for t in told] == ["streamed"]


def test_what_fits_is_a_matter_of_the_machine_and_not_of_the_moment():
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert fits_memory(1000, 1280)
    assert not fits_memory(memory // 24 + 1000, 1)


def test_cells_with_too_few_rows_are_filled_up():
    rows = np.eye(16, dtype=np.float32)[np.arange(64) % 16] + 0.01
    _, index = knn_streamed(rows, 10, index="IVF16,Flat", probes=1)
    assert (index >= 0).all()
    assert all(len(set(row)) == 10 for row in index)


def test_a_memory_mapped_file_in_half_precision(tmp_path, clustered):
    np.save(tmp_path / "x.npy", clustered.astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    _, index = knn_streamed(mapped, 5, index="Flat")
    assert (index == knn(clustered.astype(np.float16), 5)[1]).mean() > 0.999


@pytest.mark.parametrize(
    ("more", "message"),
    [({"k": 0}, "k must be"), ({"k": 99}, "k must be"), ({"index": "IVF4,Nonsense"}, "index factory"), ({"probes": 0}, "probes"),
     ({"candidates": 0}, "candidates"), ({"block": 0}, "block"), ({"sample": 0}, "sample"), ({"index": "PQ2"}, "too few")],
)  # fmt: skip
def test_what_does_not_fit_is_named(more, message):
    rows = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    with pytest.raises(UsageError, match=message):
        knn_streamed(rows, **{"k": 3} | more)
    with pytest.raises(UsageError, match="shape"):
        knn_streamed(rows[0], 1)


@pytest.mark.parametrize("dim", [1, 3, 16, 22, 128, 384, 768, 1280])
def test_the_default_index_divides_the_width(dim):
    assert dim % int(default_index(10**6, dim).split("PQ")[1]) == 0
