"""Training that is interrupted goes on as if nothing had happened; what is wrong is said."""

import json
import os
import pickle
import signal

import pytest
import torch
from lightning import LightningModule
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from contralto.data.dataset import EpochSampler, FeatureDataset
from contralto.encoders.image import freeze, unfreeze
from contralto.errors import ContraltoError, DataError, UsageError
from contralto.training.fit import fit_stage


class Tiny(LightningModule):
    """A linear classifier with dropout that can be made to stop at (epoch, batch), and counts the steps it does."""

    def __init__(self, stops_at=None, bad_at=None, stop=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.stops_at, self.bad_at, self.stop = nn.Linear(4, 2), stops_at, bad_at, stop or interrupt
        self.losses, self.steps = [], []

    def training_step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == self.stops_at:
            self.stop()
        self.steps.append((self.current_epoch, batch_idx))
        loss = F.cross_entropy(self.layer(F.dropout(batch["views"][0], 0.3)), batch["label"])
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self):
        mean = torch.stack(self.losses).mean()
        self.log("loss", mean * float("nan") if self.current_epoch == self.bad_at else mean)
        self.losses.clear()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["losses"] = self.losses

    def on_load_checkpoint(self, checkpoint):
        self.losses = checkpoint["losses"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def interrupt():
    raise KeyboardInterrupt


def loader(workers=0, balanced=False):
    g = torch.Generator().manual_seed(0)
    views = [torch.randn(3, 44, 4, generator=g).numpy()]
    labels = torch.randint(2, (44,), generator=g)
    sampler = EpochSampler(44, seed=0, labels=labels.numpy() if balanced else None)
    dataset = FeatureDataset(views, {"label": labels}, seed=0)
    return DataLoader(dataset, 8, sampler=sampler, collate_fn=as_it_is, num_workers=workers, drop_last=balanced)


def as_it_is(batch):
    return batch


def fit(module, folder, fingerprint="x", workers=0, balanced=False, every=1000):
    return fit_stage(
        module,
        loader(workers, balanced),
        folder,
        epochs=3,
        fingerprint=fingerprint,
        checkpoint_every=every,
        progress=False,
        trainer={"accelerator": "cpu"},
    )


def same(folder, whole, resumed):
    """Weights to the bit, and the log of every epoch."""
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    logs = [(folder / n / "metrics.jsonl").read_text() for n in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["epoch"] for line in logs[0].splitlines()] == list(range(3))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", [(0, 0), (0, 3), (1, 2), (1, 5), (2, 4)])
def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(tmp_path, place, workers, balanced):
    if balanced and place == (1, 5):
        place = (1, 4)  # an incomplete last batch is dropped
    whole = fit(Tiny(), tmp_path / "whole", balanced=balanced)
    with pytest.raises(KeyboardInterrupt):
        fit(Tiny(place), tmp_path / "cut", workers=workers, balanced=balanced, every=2)
    assert not (tmp_path / "cut" / "done.json").exists()
    resumed = fit(Tiny(), tmp_path / "cut", workers=workers, balanced=balanced, every=3)
    same(tmp_path, whole, resumed)
    epoch, batch = place
    assert resumed.steps[0] == (epoch, batch // 2 * 2)  # nothing is done twice but the steps after the checkpoint


def test_pictures_of_steps_that_were_done_are_not_fetched_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(Tiny((1, 4)), tmp_path, every=2)
    fetched = []
    again = loader()
    again.dataset.__class__ = type("Noted", (FeatureDataset,), {"__getitems__": noted(fetched)})
    fit_stage(Tiny(), again, tmp_path, epochs=2, fingerprint="x", progress=False, trainer={"accelerator": "cpu"})
    sampler = EpochSampler(44, seed=0)
    sampler.set_epoch(1)
    assert fetched == list(sampler)[4 * 8 :]


def noted(fetched):
    def getitems(self, keys):
        fetched.extend(keys)
        return FeatureDataset.__getitems__(self, keys)

    return getitems


class Frozen(Tiny):
    """With a part that the start of the first epoch freezes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.norm = nn.BatchNorm1d(4)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch | {"views": [self.norm(batch["views"][0])]}, batch_idx)

    def on_train_epoch_start(self):
        if self.current_epoch == 0:
            freeze(self.norm)
        if self.current_epoch == 1:
            unfreeze(self.norm)


@pytest.mark.parametrize("place", [(0, 3), (1, 3)])
def test_what_an_epoch_froze_is_frozen_when_it_goes_on(tmp_path, place):
    whole = fit(Frozen(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(Frozen(place), tmp_path / "cut", every=2)
    resumed = fit(Frozen(), tmp_path / "cut")
    same(tmp_path, whole, resumed)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])


@pytest.mark.parametrize("place", [(1, 3), (1, 5)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_saves_it(tmp_path, place, number):
    whole = fit(Tiny(), tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(Tiny(place, stop=lambda: os.kill(os.getpid(), number)), tmp_path / "cut", workers=2)
    assert signal.getsignal(signal.SIGINT) is before
    resumed = fit(Tiny(), tmp_path / "cut")
    same(tmp_path, whole, resumed)
    assert resumed.steps[0] == ((1, 4) if place == (1, 3) else (2, 0))


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(Tiny((1, 3), stop=twice), tmp_path / "cut")
    resumed = fit(Tiny(), tmp_path / "cut")
    assert resumed.steps[0] == (1, 0)


class Canary:
    def __reduce__(self):
        return (os.mkdir, (os.environ["CANARY"],))


@pytest.mark.parametrize("kind", ["pickle", "torch", "cut", "empty", "other"])
def test_a_damaged_or_hostile_checkpoint_is_named_and_never_unpickled(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    with pytest.raises(KeyboardInterrupt):
        fit(Tiny((1, 4)), tmp_path / "cut", every=2)
    last = tmp_path / "cut" / "last.ckpt"
    whole = last.read_bytes()
    if kind == "torch":
        torch.save({"place": Canary()}, last)
    elif kind == "other":
        torch.save({"epoch": 3}, last)
    else:
        last.write_bytes({"pickle": pickle.dumps(Canary()), "cut": whole[: len(whole) // 2], "empty": b""}[kind])
    with pytest.raises(DataError, match="delete it, and this stage begins anew") as caught:
        fit(Tiny(), tmp_path / "cut")
    assert str(last) in str(caught.value)
    assert not (tmp_path / "canary").exists()
    last.unlink()
    fit(Tiny(), tmp_path / "cut")


def test_damaged_weights_of_a_finished_training_are_named(tmp_path):
    fit(Tiny(), tmp_path)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"weights\.safetensors: is damaged"):
        fit(Tiny(), tmp_path)


def test_a_finished_training_is_loaded_not_repeated(tmp_path):
    whole = fit(Tiny(), tmp_path / "a")
    again = fit(Tiny((0, 0)), tmp_path / "a")
    assert torch.equal(whole.layer.weight, again.layer.weight)
    assert torch.equal(load_file(tmp_path / "a" / "weights.safetensors")["layer.weight"], whole.layer.weight)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "done.json", "fingerprint", "metrics.jsonl", "weights.safetensors",
    ]  # fmt: skip


def test_a_folder_of_another_training_is_refused(tmp_path):
    fit(Tiny(), tmp_path / "a")
    with pytest.raises(UsageError, match="other arguments or data"):
        fit(Tiny(), tmp_path / "a", fingerprint="y")
    with pytest.raises(UsageError, match="checkpoint_every must be at least 1"):
        fit(Tiny(), tmp_path / "b", every=0)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(ContraltoError, match="not a number in epoch 2"):
        fit(Tiny(bad_at=2), tmp_path / "a")
    whole = fit(Tiny(), tmp_path / "whole")
    assert torch.equal(fit(Tiny(), tmp_path / "a").layer.weight, whole.layer.weight)
