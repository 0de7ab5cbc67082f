"""What tests ask of run folders: the weights, whether two are the same, and a training that is stopped in a given step."""

from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file


def weights(run):
    """Stage -> weights, of every stage that is done."""
    return {p.parent.name: load_file(p) for p in sorted(run.glob("stages/*/weights.safetensors"))}


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[s][k], b[s][k]) for s in a for k in a[s])


def assert_same(run, other):
    assert weights(run)
    assert same_weights(weights(run), weights(other))
    assert pq.read_table(run / "cleaned.parquet").equals(pq.read_table(other / "cleaned.parquet"))


@contextmanager
def stopped(monkeypatch, system, stage, epoch, step):
    """Ctrl-C before a training step of a stage."""
    training_step = system.training_step

    def stops(self, batch, batch_idx):
        if (self.hparams.stage, self.current_epoch, batch_idx) == (stage, epoch, step):
            raise KeyboardInterrupt
        return training_step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(system, "training_step", stops)
        with pytest.raises(KeyboardInterrupt):
            yield
