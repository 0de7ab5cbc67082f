"""Multistage contrastive learning from files to a run: stages that go on, batches of one code, embeddings of all stages."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from contralto.cli import main
from contralto.encoders.image import image_encoder
from contralto.errors import UsageError
from contralto.pipelines.loading import load
from contralto.pipelines.multistage import fit_dual_stages
from contralto.systems.registry import get_job
from contralto.systems.selfsup.mcl_multistage import DualStage, DualStages, MultiStage

from tests.conftest import COLOURS, picture
from tests.killing import whole

SMALL = {
    "image_encoder": "resnet8", "image_size": 16, "batch_size": 8, "epochs": 2, "hidden": 16, "dim": 8, "optimizer": "adam",
    "lr": 1e-3, "warmup_epochs": 0, "stages": 3, "clusters": 2, "smallest": 2, "progress": False,
}  # fmt: skip
N = 40


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Pictures of two colours, which a first stage tells apart."""
    folder = tmp_path_factory.mktemp("coloured")
    names = sorted(COLOURS)[:2]
    rows = [{"image": picture(COLOURS[names[i % 2]], seed=i), "label": names[i % 2]} for i in range(N)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    return folder / "data.parquet"


@pytest.fixture(scope="module")
def watched(coloured, tmp_path_factory):
    """A finished run, and the rows of every batch of every stage."""
    seen, plain = [], MultiStage.training_step

    def noted(self, batch, batch_idx):
        seen.append((self.stage, batch["index"].tolist()))
        return plain(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiStage, "training_step", noted)
        run = get_job("mcl_multistage").fit(str(coloured), tmp_path_factory.mktemp("multistage") / "run", **SMALL)
    return run, seen


def weights(run, name="training"):
    return load_file(run / name / "weights.safetensors")


def test_every_stage_is_a_training_on_batches_of_one_code(watched):
    run, seen = watched
    whole(run)
    assert (run / "stages" / "stage0" / "done.json").exists()
    assert (run / "stages" / "stage1" / "done.json").exists()
    for stage in range(3):
        batches = [rows for s, rows in seen if s == stage]
        assert len(batches) == 2 * (N // 8)  # as many steps in every stage
        if stage:
            codes = np.load(run / "stages" / f"codes{stage - 1}.npy", allow_pickle=False)
            assert codes.shape == (N,)
            assert all(len(set(codes[rows])) == 1 and len(set(rows)) == len(rows) for rows in batches)
            assert len({int(codes[rows[0]]) for rows in batches}) > 1
    first, second = (np.load(run / "stages" / f"codes{s}.npy", allow_pickle=False) for s in range(2))
    assert np.array_equal(second // 2, first)


def test_the_last_stage_holds_all_and_each_began_anew(watched):
    run, _ = watched
    last = weights(run)
    for stage in range(2):
        there = weights(run, f"stages/stage{stage}")
        mine = {k: v for k, v in there.items() if k.startswith("learner.encoder.")}
        assert mine
        for name, value in mine.items():
            assert torch.equal(last[name.replace("learner.encoder.", f"earlier.{stage}.")], value)
    matrix = next(k for k, v in last.items() if k.startswith("earlier.0.") and v.ndim == 4)
    first, second, third = (last[matrix.replace("earlier.0", n)] for n in ("earlier.0", "earlier.1", "learner.encoder"))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_the_run_embeds_by_all_stages_and_so_does_its_encoder(watched, coloured, capsys, tmp_path):
    run, _ = watched
    system, encoder = load(run).system, image_encoder(str(run / "encoder")).eval()
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        found = system.embed(pixels)
        assert found.shape == (3, 3 * 128)
        torch.testing.assert_close(encoder(pixels), found)
        torch.testing.assert_close(found[:, 256:], system.encoder(pixels))
    assert encoder.name == "resnet8+resnet8+resnet8"
    assert main(["embed", str(run), str(coloured), "--out", str(tmp_path / "e.parquet"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["width"] == 3 * 128
    assert main(["evaluate", str(run), str(coloured)]) == 0
    assert "linear probe" in capsys.readouterr().out


def test_what_is_known_of_the_stages_is_told(watched):
    run, _ = watched
    metrics = json.loads((run / "metrics.json").read_text())
    first, second, third = metrics["stages"]
    assert set(first) == {"first_loss", "last_loss"}
    assert second["codes"] == 2
    assert second["cosine_within"] > second["cosine"]
    assert 2 <= third["codes"] <= 4
    assert 0 < third["covered"] <= 1
    assert metrics["pictures"] == N
    assert set(metrics["seconds"]) == {"stage0", "stage1", "training"}


def test_it_goes_on_after_any_stage_with_the_same_result(watched, coloured, tmp_path):
    run, _ = watched
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "training")
    kept = (again / "stages" / "stage1" / "weights.safetensors").stat().st_mtime_ns
    get_job("mcl_multistage").fit(str(coloured), again, **SMALL)
    assert (again / "stages" / "stage1" / "weights.safetensors").stat().st_mtime_ns == kept
    a, b = weights(run), weights(again)
    assert all(torch.equal(a[k], b[k]) for k in a)
    shutil.rmtree(again / "training")
    shutil.rmtree(again / "stages")
    get_job("mcl_multistage").fit(str(coloured), again, **SMALL)
    b = weights(again)
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(UsageError, match="clusters"):
        get_job("mcl_multistage").fit(str(coloured), again, **(SMALL | {"clusters": 3}))


@pytest.mark.parametrize("init", ["base", "previous"])
def test_other_beginnings(coloured, tmp_path, init):
    started = []
    with pytest.MonkeyPatch.context() as patch:
        plain = MultiStage.on_train_start

        def noted(self):
            started.append(next(self.encoder.parameters()).detach().clone())
            return plain(self)

        patch.setattr(MultiStage, "on_train_start", noted)
        arguments = SMALL | {"init": init, "stages": 2, "epochs": 1}
        run = get_job("mcl_multistage").fit(str(coloured), tmp_path / "run", **arguments, base="moco", queue_size=32)
    first = weights(run, "stages/stage0")
    learnt = next(v for k, v in first.items() if k.startswith("learner.encoder.") and v.shape == started[0].shape)
    assert torch.equal(started[1], started[0]) == (init == "base")
    assert torch.equal(started[1], learnt) == (init == "previous")


def test_codes_that_are_too_small_say_what_to_do(coloured, tmp_path):
    arguments = SMALL | {"batch_size": 32, "smallest": None, "epochs": 1}
    with pytest.raises(UsageError, match="choose a smaller batch size or fewer groups"):
        get_job("mcl_multistage").fit(str(coloured), tmp_path / "run", **arguments)


class Pairs(Dataset):
    """Vectors of an easy and a faint part, and the texts that name both."""

    def __init__(self, n=240):
        g = torch.Generator().manual_seed(0)
        self.easy, self.faint = (torch.randint(4, (n,), generator=g) for _ in range(2))
        one = torch.eye(4)
        self.text = torch.cat([one[self.easy], one[self.faint]], 1)
        self.image = torch.cat([one[self.easy], 0.2 * one[self.faint]], 1) + 0.02 * torch.randn(n, 8, generator=g)

    def __getitem__(self, key):
        _, row = key
        return {"views": [self.image[row], self.text[row]], "index": row}

    def __len__(self):
        return len(self.text)


class Dual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6)) for _ in range(2))

    def encode_image(self, x):
        return self.image(x)

    def encode_text(self, x):
        return self.text(x)


DUAL = {
    "num_features": 6, "stages": 3, "clusters": 4, "batch_size": 12, "smallest": 4, "epochs": 3, "lr": 3e-3, "warmup": 2,
    "weight_decay": 0.0, "progress": False, "trainer": {"accelerator": "cpu"},
}  # fmt: skip


def lock(dual):
    dual.text.requires_grad_(False)


class TestDual:
    def test_stages_of_a_pretrained_dual_encoder(self, tmp_path, monkeypatch):
        seen, plain = [], DualStage.training_step

        def noted(self, batch, batch_idx):
            seen.append((self.seed, batch["index"].tolist()))
            return plain(self, batch, batch_idx)

        monkeypatch.setattr(DualStage, "training_step", noted)
        pairs, dual = Pairs(), Dual()
        before = {k: v.clone() for k, v in dual.state_dict().items()}
        found = fit_dual_stages(dual, pairs, tmp_path, prepare=lock, **DUAL)
        assert all(torch.equal(v, before[k]) for k, v in dual.state_dict().items())
        first, *others = found.encoders
        assert all(torch.equal(v, before[k]) for k, v in first.state_dict().items())
        for encoder in others:
            assert torch.equal(encoder.text[0].weight, dual.text[0].weight)
            assert not torch.equal(encoder.image[0].weight, dual.image[0].weight)
        assert found.encode_image(pairs.image).shape == (240, 18)
        codes = [np.load(p, allow_pickle=False) for p in sorted(tmp_path.glob("codes-*/codes*.npy"))]
        assert len(codes) == 2
        for stage, seed in enumerate(dict.fromkeys(s for s, _ in seen)):
            for rows in (rows for s, rows in seen if s == seed):
                assert len(set(codes[stage][rows])) == 1

    def test_trained_from_the_start_and_called_again_it_is_read(self, tmp_path):
        arguments, pairs, one = DUAL | {"pretrained": False, "epochs": 6, "lr": 1e-2}, Pairs(), torch.eye(4)
        found = fit_dual_stages(Dual(), pairs, tmp_path, **arguments)
        again = fit_dual_stages(Dual(), pairs, tmp_path, **arguments)
        assert all(
            torch.equal(a, b) for a, b in zip(found.state_dict().values(), again.state_dict().values(), strict=True)
        )
        matrices = [e.image[0].weight for e in found.encoders]
        assert not torch.equal(matrices[0], matrices[1])
        assert not torch.equal(matrices[1], matrices[2])
        assert not torch.equal(matrices[0], Dual().image[0].weight)
        kinds = [(easy, faint) for easy in range(4) for faint in range(4)]
        texts = torch.stack([torch.cat([one[a], one[b]]) for a, b in kinds])
        with torch.no_grad():
            first = DualStages([found.encoders[0]])  # the others were made to look for something else
            right = first.zero_shot(pairs.image, texts).argmax(1) // 4 == pairs.easy
        assert right.float().mean() > 0.9

    def test_other_arguments_are_refused_and_other_weights_too(self, tmp_path):
        arguments = DUAL | {"stages": 2, "epochs": 1}
        fit_dual_stages(Dual(), Pairs(), tmp_path, **arguments)
        with pytest.raises(UsageError, match="other arguments or data"):
            fit_dual_stages(Dual(), Pairs(), tmp_path, **(arguments | {"lr": 1e-2}))
        other = Dual()
        with torch.no_grad():
            other.image[0].weight.add_(0.1)
        with pytest.raises(UsageError, match="other arguments or data"):
            fit_dual_stages(other, Pairs(), tmp_path, **arguments)
