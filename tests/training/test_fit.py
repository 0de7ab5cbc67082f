"""Training that is interrupted goes on as if nothing had happened; what is wrong is said."""

import json

import pytest
import torch
from lightning import LightningModule
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from contralto.data.dataset import EpochSampler, FeatureDataset
from contralto.errors import ContraltoError, UsageError
from contralto.training.fit import fit_stage


class Tiny(LightningModule):
    """A linear classifier that can be made to fail."""

    def __init__(self, fails_at=None, bad_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.fails_at, self.bad_at = nn.Linear(4, 2), fails_at, bad_at

    def training_step(self, batch, _):
        if self.current_epoch == self.fails_at:
            raise KeyboardInterrupt
        loss = F.cross_entropy(self.layer(batch["views"][0]), batch["label"])
        self.log(
            "loss", loss * float("nan") if self.current_epoch == self.bad_at else loss, on_step=False, on_epoch=True
        )
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def loader(workers=0):
    g = torch.Generator().manual_seed(0)
    views = [torch.randn(3, 20, 4, generator=g).numpy()]
    dataset = FeatureDataset(views, {"label": torch.randint(2, (20,), generator=g)}, seed=0)
    return DataLoader(dataset, 8, sampler=EpochSampler(20, seed=0), collate_fn=as_it_is, num_workers=workers)


def as_it_is(batch):
    return batch


def fit(module, folder, fingerprint="x", workers=0):
    return fit_stage(
        module,
        loader(workers),
        folder,
        epochs=5,
        fingerprint=fingerprint,
        progress=False,
        trainer={"accelerator": "cpu"},
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(tmp_path, epoch, workers):
    whole = fit(Tiny(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(Tiny(fails_at=epoch), tmp_path / "cut", workers=workers)
    assert not (tmp_path / "cut" / "done.json").exists()
    resumed = fit(Tiny(), tmp_path / "cut", workers=workers)
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    logs = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["epoch"] for line in logs[0].splitlines()] == list(range(5))


def test_a_finished_training_is_loaded_not_repeated(tmp_path):
    whole = fit(Tiny(), tmp_path / "a")
    again = fit(Tiny(fails_at=0), tmp_path / "a")
    assert torch.equal(whole.layer.weight, again.layer.weight)
    assert torch.equal(load_file(tmp_path / "a" / "weights.safetensors")["layer.weight"], whole.layer.weight)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "done.json", "fingerprint", "metrics.jsonl", "weights.safetensors",
    ]  # fmt: skip


def test_a_folder_of_another_training_is_refused(tmp_path):
    fit(Tiny(), tmp_path / "a")
    with pytest.raises(UsageError, match="other arguments or data"):
        fit(Tiny(), tmp_path / "a", fingerprint="y")


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(ContraltoError, match="not a number in epoch 2"):
        fit(Tiny(bad_at=2), tmp_path / "a")
    whole = fit(Tiny(), tmp_path / "whole")
    assert torch.equal(fit(Tiny(), tmp_path / "a").layer.weight, whole.layer.weight)
