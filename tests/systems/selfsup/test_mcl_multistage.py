"""Stages, codes and what is used in the end, against the reference of the official code and loops in double precision."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.files import load_weights, save_weights
from contralto.losses.pairs import clip, nt_xent
from contralto.systems.selfsup.byol import BYOL
from contralto.systems.selfsup.mcl_multistage import (
    DualStage,
    DualStages,
    MultiStage,
    extend_codes,
    first_weights,
    integrate,
    pool_report,
    stage_seed,
    train_in_stages,
    zero_shot,
)
from contralto.systems.selfsup.moco import MoCo
from contralto.systems.selfsup.simclr import SimCLR

from tests.ranks import on_two_ranks
from tests.systems.selfsup import steps

REFERENCE = Path(__file__).parents[2] / "reference" / "mcl_multistage.npz"
FACTS = {
    "num_features": 10,
    "num_samples": steps.SAMPLES,
    "steps_per_epoch": 3,
    "epochs": 4,
    "dim": 5,
    "hidden": 7,
    "seed": 1,
}


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE, allow_pickle=False) as z:
        return dict(z)


class TestCodes:
    def test_they_are_those_of_the_official_code(self, reference):
        codes = None
        for stage, labels in enumerate(reference["cluster_labels"]):
            codes = extend_codes(codes, labels, 4)
            assert np.array_equal(codes, reference[f"pseudo_after_stage{stage}"])

    def test_they_are_digits_the_first_stage_the_highest(self):
        rng = np.random.default_rng(0)
        labels, codes = rng.integers(0, 7, (4, 50)), None
        for stage in labels:
            codes = extend_codes(codes, stage, 7)
        expected = [sum(int(labels[t, i]) * 7 ** (3 - t) for t in range(4)) for i in range(50)]
        assert codes.tolist() == expected

    def test_what_cannot_be_is_said(self):
        with pytest.raises(UsageError, match=r"labels must be in \[0, 3\), got 0 to 3"):
            extend_codes(None, [0, 3], 3)
        with pytest.raises(UsageError, match="one shape"):
            extend_codes([0], [0, 1], 3)
        with pytest.raises(UsageError, match="do not fit into a 64-bit integer"):
            extend_codes([2**62], [1], 10)
        with pytest.raises(UsageError, match="10 clusters in 30 stages give more codes"):
            train_in_stages(None, None, stages=30, clusters=10, batch_size=2)
        with pytest.raises(UsageError, match="stages must be at least 1 and clusters at least 2"):
            train_in_stages(None, None, stages=1, clusters=1, batch_size=2)


def test_the_report_of_pools_against_a_loop():
    rng = np.random.default_rng(0)
    codes, z = rng.integers(0, 5, 60), rng.normal(size=(60, 4))
    codes[codes == 4] = np.where(np.arange((codes == 4).sum()) < 3, 4, 0)  # a code that has no full batch
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    batches, sums = {}, {}
    for c in range(5):
        rows = np.flatnonzero(codes == c)
        batches[c] = len(rows) // 4
        pairs = [unit[i] @ unit[j] for i in rows for j in rows if i != j]
        sums[c] = float(np.mean(pairs))
    assert batches[4] == 0
    report = pool_report(codes, 4, 3 * z)
    assert report["codes"] == 5
    assert report["full_codes"] == 4
    assert report["covered"] == pytest.approx(sum(batches.values()) * 4 / 60)
    expected = sum(batches[c] * sums[c] for c in batches) / sum(batches.values())
    assert report["cosine_within"] == pytest.approx(expected, rel=1e-5)
    every = np.mean([unit[i] @ unit[j] for i in range(60) for j in range(60) if i != j])
    assert report["cosine"] == pytest.approx(every, abs=1e-6)
    assert set(pool_report(codes, 4)) == {"codes", "full_codes", "covered"}
    assert "cosine_within" not in pool_report([0, 1], 2, np.eye(2))


class TestIntegration:
    def setup_method(self):
        g = torch.Generator().manual_seed(0)
        self.images = [torch.randn(6, 3, generator=g, dtype=torch.float64) * s for s in (1, 10)]
        self.texts = [torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(2)]

    def test_zero_shot_scales_the_long_row_once(self):
        found = zero_shot(self.images, self.texts, scale=5.0)
        for i in range(6):
            logits = []
            image = torch.cat([part[i] for part in self.images])
            for c in range(4):
                text = torch.cat([part[c] for part in self.texts])
                logits.append(5 * image @ text / image.norm() / text.norm())
            expected = torch.stack(logits).exp() / torch.stack(logits).exp().sum()
            torch.testing.assert_close(found[i], expected, rtol=1e-12, atol=1e-12)

    def test_scaling_each_stage_is_another_method(self):
        once, each = integrate(self.images, normalize=True), integrate(self.images, unit_stages=True)
        torch.testing.assert_close(each[:, :3].norm(dim=1), torch.ones(6, dtype=torch.float64))
        torch.testing.assert_close(each[:, 3:].norm(dim=1), torch.ones(6, dtype=torch.float64))
        torch.testing.assert_close(once.norm(dim=1), torch.ones(6, dtype=torch.float64))
        assert (once[:, :3].norm(dim=1) < 0.5).all()  # the second stage has ten times the length

    def test_raw_rows_by_default(self):
        assert torch.equal(integrate(self.images), torch.cat(self.images, 1))
        with pytest.raises(UsageError, match="at least one stage"):
            integrate([])


class TestClip:
    def test_loss_and_gradients_are_those_of_the_official_code(self, reference):
        image, text = (torch.tensor(reference[f"clip0_{k}"], requires_grad=True) for k in ("img", "txt"))
        loss = clip(image, text, temperature=1 / 14.285714285714285)
        loss.backward()
        assert loss.item() == pytest.approx(float(reference["clip0_loss"]), rel=1e-9)
        for x, key in ((image, "clip0_grad_img"), (text, "clip0_grad_txt")):
            there = torch.tensor(
                reference[key]
            )  # with regard to unit rows; through the scaling, what is along them falls away
            unit = x.detach()
            expected = there - (there * unit).sum(1, keepdim=True) * unit
            torch.testing.assert_close(x.grad, expected, rtol=1e-9, atol=1e-11)


class Dual(nn.Module):
    """The smallest dual encoder."""

    def __init__(self, scale=None):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 10), nn.Linear(6, 10)
        if scale is not None:
            self.logit_scale = nn.Parameter(torch.tensor(scale))

    def encode_image(self, x):
        return self.image(x)

    def encode_text(self, x):
        return self.text(x)


class TestDualStage:
    def test_its_loss_is_that_of_clip_with_its_scale(self):
        stage = DualStage(Dual(scale=2.0), num_features=10).double()
        batch = steps.batch(0)
        expected = clip(
            stage.encoder.image(batch["views"][0]), stage.encoder.text(batch["views"][1]), temperature=math.exp(-2)
        )
        found = stage.step(batch)
        torch.testing.assert_close(found["loss"], expected)
        assert found["scale"].item() == pytest.approx(math.exp(2.0))
        assert DualStage(Dual(), num_features=10).step(batch_of(torch.float32))["scale"].item() == pytest.approx(
            1 / 0.07
        )

    @pytest.mark.parametrize(("start", "end"), [(9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)])
    def test_the_scale_stays_in_its_range_and_learns(self, start, end):
        stage = DualStage(Dual(scale=start), num_features=10)
        stage.step(batch_of(torch.float32))["loss"].backward()
        assert stage.encoder.logit_scale.grad.abs() > 0
        stage.at_step_end()
        assert stage.encoder.logit_scale.item() == pytest.approx(end)

    def test_what_is_locked_stays(self):
        dual = Dual()
        dual.text.requires_grad_(False)
        stage = DualStage(dual, num_features=10, warmup=0, lr=0.1)
        before = copy.deepcopy(dual.state_dict())
        [optimizer], _ = stage.optimizers_and_schedules()
        stage.step(batch_of(torch.float32))["loss"].backward()
        optimizer.step()
        assert torch.equal(dual.text.weight, before["text.weight"])
        assert not torch.equal(dual.image.weight, before["image.weight"])

    def test_the_rate_rises_and_stays(self):
        stage = DualStage(Dual(), num_features=10, lr=0.5, warmup=4, steps_per_epoch=5, epochs=2)
        [optimizer], [schedule] = stage.optimizers_and_schedules()
        rates = []
        for _ in range(10):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates == pytest.approx([0, 0.5 / 3, 1 / 3, *[0.5] * 7])

    def test_several_are_one(self):
        duals = [Dual(), Dual()]
        with torch.no_grad():
            duals[1].image.weight.add_(1)
        both, x = DualStages(duals), torch.randn(5, 6)
        assert torch.equal(both.encode_image(x), torch.cat([d.image(x) for d in duals], 1))
        assert torch.equal(both.encode_text(x), torch.cat([d.text(x) for d in duals], 1))
        expected = 100 * F.normalize(both.encode_image(x), dim=1) @ F.normalize(both.encode_text(x[:2]), dim=1).T
        torch.testing.assert_close(both.zero_shot(x, x[:2]), expected.softmax(1))


def batch_of(dtype):
    found = steps.batch(0)
    return found | {"views": [v.to(dtype) for v in found["views"]]}


def stage(number=0, **more):
    return steps.without_batch_norm(MultiStage(steps.encoder(), stage=number, **(FACTS | more)))


class TestLearnerOfAStage:
    @pytest.mark.parametrize(
        ("base", "system", "more"),
        [
            ("simclr", SimCLR, {}),
            ("moco", MoCo, {"queue_size": 24, "decay": 0.9, "temperature": 0.5}),
            ("byol", BYOL, {"decay": 0.9}),
        ],
    )
    def test_the_loss_is_that_of_the_base_untouched(self, base, system, more):
        plain = steps.without_batch_norm(system(steps.encoder(), **FACTS, **more))
        found = stage(base=base, **more)
        assert torch.equal(steps.train(found), steps.train(plain))
        for name, value in plain.state_dict().items():
            assert torch.equal(found.state_dict()[f"learner.{name}"], value), name
        assert found.done == found.learner.done == 3

    def test_nt_xent_on_the_views_of_the_batch(self):
        found, batch = stage(), steps.batch(0)
        z0, z1 = (found.learner.projector(found.encoder(v)) for v in batch["views"])
        torch.testing.assert_close(found.step(batch)["loss"], nt_xent(z0, z1, temperature=0.5))

    @pytest.mark.parametrize("unit", [False, True])
    def test_it_embeds_by_all_stages_and_clusters_by_its_own(self, unit):
        found, x = stage(2, unit_stages=unit), torch.randn(5, 6, dtype=torch.float64)
        with torch.no_grad():
            for number, encoder in enumerate(found.earlier):
                encoder[0].bias.add_(number + 1)
            parts = [e(x) for e in (*found.earlier, found.encoder)]
            expected = torch.cat([F.normalize(p, dim=1) if unit else p for p in parts], 1)
            assert torch.equal(found.embed(x), expected)
            assert torch.equal(found.to_cluster()(x), parts[2])
            by_projections = stage(2, cluster_on="projections")
            own = by_projections.learner.projector(by_projections.encoder(x))
            assert torch.equal(by_projections.to_cluster()(x), own)

    def test_earlier_encoders_learn_nothing_not_even_statistics(self):
        encoder = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10))
        found = MultiStage(encoder, stage=1, optimizer="adam", **FACTS).train()
        before = copy.deepcopy(found.earlier.state_dict())
        [optimizer], _ = found.optimizers_and_schedules()
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert not trained & {id(p) for p in found.earlier.parameters()}
        found.step(batch_of(torch.float32))["loss"].backward()
        found.embed(torch.randn(4, 6))
        assert all(torch.equal(v, before[k]) for k, v in found.earlier.state_dict().items())
        assert not torch.equal(found.encoder[1].running_mean, before["0.1.running_mean"])

    def test_every_weight_is_saved_once_and_loaded(self, tmp_path):
        one, other = stage(1), stage(1, seed=5)
        steps.train(one)
        save_weights(one, tmp_path / "w.safetensors")
        load_weights(other, tmp_path / "w.safetensors")
        x = torch.randn(4, 6, dtype=torch.float64)
        assert torch.equal(one.embed(x), other.embed(x))
        assert not any(name.startswith("encoder.") for name in one.state_dict())

    def test_a_saved_run_goes_on_bit_by_bit(self):
        steps.goes_on(lambda: stage(1, base="moco", queue_size=24))

    def test_what_cannot_be_is_said(self):
        for wrong, told in (
            ({"base": "swav"}, "base must be simclr, moco or byol; got 'swav'"),
            ({"stage": 3}, "stage must be from 0 to 2, got 3"),
            ({"init": "none"}, "init must be fresh, base or previous"),
            ({"cluster_on": "pixels"}, "cluster_on must be"),
            ({"clusters": 1}, "clusters at least 2"),
        ):
            with pytest.raises(UsageError, match=told):
                MultiStage(steps.encoder(), **FACTS, **wrong)


def learner(number, base):
    if base == "dual":
        return DualStage(Dual(), num_features=10, warmup=1).double()
    return stage(number, base=base, queue_size=24, decay=0.9)


def run(rank=0, world=1):
    found = {}
    for number, base in ((0, "simclr"), (1, "moco"), (0, "byol"), (0, "dual")):
        for n in (8, 9):
            system = learner(number, base)
            losses = steps.train(system, n=n, rank=rank, world=world)
            found[f"{base}, {n}"] = {"losses": losses, **system.state_dict()}
    return found


@pytest.mark.xdist_group("ranks")
def test_two_processes_equal_one(tmp_path):
    alone = run()
    for rank in on_two_ranks(run, tmp_path):
        for name, expected in alone.items():
            assert expected["losses"].diff().abs().min() > 0
            for key, value in expected.items():
                torch.testing.assert_close(
                    rank[name][key], value, rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}"
                )


class TestTheMethod:
    """With learners that are arrays: stage 0 sees the first coordinate, stage 1 the second."""

    data = np.array([[a, b] for a in (0, 1) for b in (0, 1) for _ in range(4)], float)

    def rows(self, learnt):
        return np.eye(2)[self.data[:, learnt].astype(int)] + 0.01 * np.random.default_rng(0).normal(size=(16, 2))

    def test_every_stage_gets_the_codes_of_all_before(self, tmp_path):
        seen = []

        def train(stage, codes, before):
            seen.append((codes, list(before)))
            return stage

        found = train_in_stages(train, self.rows, stages=3, clusters=2, batch_size=4)
        assert [s.learnt for s in found] == [0, 1, 2]
        assert [before for _, before in seen] == [[], [0], [0, 1]]
        assert seen[0][0] is None
        assert found[0].report == {}
        first, second = seen[1][0], seen[2][0]
        assert len(np.unique(first)) == 2
        for code in range(2):  # samples of one code are alike in the first coordinate
            assert len(set(self.data[first == code, 0])) == 1
        assert len(np.unique(second)) == 4
        assert np.array_equal(second // 2, first)
        assert found[2].report["full_codes"] == 4
        assert found[1].report["cosine_within"] > 0.99 > found[1].report["cosine"]

    def test_kept_codes_are_read_and_nothing_is_embedded_again(self, tmp_path):
        def codes_of(embed, **more):
            codes = []
            train_in_stages(lambda s, c, b: codes.append(c) or s, embed, stages=3, clusters=2, batch_size=4, **more)
            return codes

        first = codes_of(self.rows, keep=tmp_path)
        again = codes_of(lambda learnt: 1 / 0, keep=tmp_path)
        assert all(np.array_equal(a, b) for a, b in zip(first[1:], again[1:], strict=True))
        assert np.array_equal(codes_of(self.rows)[2], first[2])

    def test_a_row_that_is_no_number_is_named(self):
        rows = self.rows(0)
        rows[5] = np.nan
        with pytest.raises(UsageError, match="row 5 of the features is not finite"):
            train_in_stages(lambda s, c, b: s, lambda learnt: rows, stages=2, clusters=2, batch_size=4)


def test_a_stage_starts_with_the_weights_that_were_asked_for():
    def fresh(seed):
        torch.manual_seed(seed)
        return nn.Linear(2, 2)

    trained = [nn.Linear(2, 2), nn.Linear(2, 2)]
    same = torch.equal
    assert same(first_weights(fresh, [], "fresh", 7).weight, fresh(7).weight)
    assert same(first_weights(fresh, trained, "fresh", 7).weight, fresh(stage_seed(7, 2)).weight)
    assert same(first_weights(fresh, trained, "base", 7).weight, fresh(7).weight)
    previous = first_weights(fresh, trained, "previous", 7)
    assert same(previous.weight, trained[1].weight)
    assert previous is not trained[1]
    assert same(first_weights(fresh, [], "previous", 7).weight, fresh(7).weight)
    assert len({stage_seed(s, t) for s in range(5) for t in range(5)}) == 25
