"""SwAV's step against runs of the official code and against the method written out; its queue, freezing and warnings."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.sinkhorn import sinkhorn
from contralto.systems.selfsup.swav import SwAV, perplexity

REFERENCE = np.load(Path(__file__).parents[2] / "reference" / "swav.npz", allow_pickle=False)


def ref(name):
    return torch.from_numpy(REFERENCE[name])


class Flat(nn.Module):
    """The first 16 values of a picture through one layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 12)

    def forward(self, x):
        return self.linear(x.flatten(1)[:, :16]).relu()


NAMES = {  # ours -> that of the official code
    "encoder.linear.weight": "backbone.weight", "encoder.linear.bias": "backbone.bias",
    "projector.0.weight": "projection_head.0.weight", "projector.1.weight": "projection_head.1.weight",
    "projector.1.bias": "projection_head.1.bias", "projector.1.running_var": "projection_head.1.running_var",
    "projector.3.weight": "projection_head.3.weight", "projector.3.bias": "projection_head.3.bias",
    "prototypes.0.weight": "prototypes.weight",
}  # fmt: skip


def official(case, **options):
    system = SwAV(
        Flat(), num_features=12, hidden=12, dim=6, num_prototypes=[7], freeze_steps=0, batch_size=4, steps_per_epoch=3,
        **options,
    ).double()  # fmt: skip
    state = system.state_dict()
    for ours, theirs in NAMES.items():
        state[ours].copy_(ref(f"{case}_init_{theirs}"))
    return system.train()


@pytest.mark.parametrize(
    ("case", "options"), [("train_plain", {}), ("train_queue", {"queue_size": 8, "queue_epoch": 0})]
)
def test_some_steps_equal_the_official_code(case, options):
    system = official(case, **options)
    optimizer = torch.optim.SGD(system.parameters(), 1.0, momentum=0.9, weight_decay=0.01)
    crops = [ref(f"{case}_crop{v}") for v in range(3) if f"{case}_crop{v}" in REFERENCE.files]
    for step, lr in enumerate(ref(f"{case}_lr").tolist()):
        optimizer.param_groups[0]["lr"] = lr
        loss = system.step({"views": [c[step] for c in crops], "index": torch.arange(4)})["loss"]
        torch.testing.assert_close(loss.detach(), ref(f"{case}_losses")[step], rtol=1e-8, atol=1e-10)
        optimizer.zero_grad()
        loss.backward()
        system.on_before_optimizer_step(optimizer)
        optimizer.step()
        system.at_step_end()
        if options and step % 3 == 2:
            torch.testing.assert_close(system.queue.rows, ref(f"{case}_queue")[step // 3], rtol=1e-8, atol=1e-10)
    state = system.state_dict()
    for ours, theirs in NAMES.items():
        torch.testing.assert_close(state[ours], ref(f"{case}_final_{theirs}"), rtol=1e-8, atol=1e-10, msg=ours)


def test_schedules_equal_the_official_code():
    warm = {"lr": 4.8, "start_lr": 0.3, "final_lr": 0.0048, "steps_per_epoch": 4, "epochs": 10, "warmup_epochs": 2}
    cold = {"lr": 0.6, "start_lr": 0.0, "final_lr": 0.0006, "steps_per_epoch": 5, "epochs": 4, "warmup_epochs": 0}
    for case, options in (("sched_a", warm), ("sched_b", cold)):
        [optimizer], [schedule] = tiny(optimizer="sgd", **options).optimizers_and_schedules()
        rates = []
        for _ in ref(case):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), ref(case), rtol=1e-8, atol=1e-10)


def tiny(**options):
    settings = {"hidden": 7, "dim": 5, "num_prototypes": [6], "freeze_steps": 0, "batch_size": 8, "steps_per_epoch": 4}
    return SwAV(nn.Linear(6, 8), num_features=8, **(settings | options))


def batch(step=0, views=2, n=8):
    g = torch.Generator().manual_seed(step)
    return {"views": [torch.randn(n, 6, generator=g) for _ in range(views)], "index": torch.arange(n)}


def train(system, steps, start=0):
    [optimizer], _ = system.optimizers_and_schedules()
    losses = []
    for step in range(start, start + steps):
        out = system.step(batch(step))
        optimizer.zero_grad()
        out["loss"].backward()
        system.on_before_optimizer_step(optimizer)
        optimizer.step()
        system.at_step_end()
        losses.append(out["loss"].item())
    return losses


@pytest.mark.parametrize("sets", [[6], [6, 4, 9]])
def test_a_step_is_the_method_written_out(sets):
    system = tiny(num_prototypes=sets).double()
    views = [v.double() for v in batch(views=4)["views"]]
    found = system.step({"views": views})["loss"]
    z = F.normalize(system.projector(torch.cat([system.encoder(v) for v in views])), dim=1)
    total = 0.0
    for layer in system.prototypes:
        C = F.normalize(layer.weight.detach(), dim=1)
        S = (z @ C.T).detach().reshape(4, 8, -1)
        for i in (0, 1):
            q = sinkhorn(S[i])
            for v in range(4):
                if v != i:
                    for b in range(8):
                        p = (S[v, b] / 0.1).softmax(0)
                        total -= float((q[b] * p.log()).sum()) / (2 * 3 * 8 * len(sets))
    assert found.item() == pytest.approx(total, rel=1e-10)


def test_prototypes_are_of_length_one_in_every_step_and_learn():
    system = tiny(optimizer="sgd", lr=0.5, warmup_epochs=0)
    before = system.prototypes[0].weight.detach().clone()
    train(system, 3)
    drifted = system.prototypes[0].weight.norm(dim=1)
    assert (drifted - 1).abs().max() > 1e-4
    system.step(batch(9))
    torch.testing.assert_close(system.prototypes[0].weight.norm(dim=1), torch.ones(6))
    assert not torch.allclose(F.normalize(before, dim=1), system.prototypes[0].weight)


@pytest.mark.parametrize("optimizer", ["sgd", "larc", "adam"])
def test_frozen_prototypes_stay_whatever_the_optimiser(optimizer):
    system = tiny(freeze_steps=2, optimizer=optimizer, lr=0.1, warmup_epochs=0, weight_decay=0.1)
    start = F.normalize(system.prototypes[0].weight.detach().clone(), dim=1)
    train(system, 2)
    torch.testing.assert_close(F.normalize(system.prototypes[0].weight, dim=1), start)
    train(system, 1, start=2)
    assert not torch.allclose(F.normalize(system.prototypes[0].weight, dim=1), start, atol=1e-5)


def test_the_queue_begins_at_its_epoch_fills_and_is_then_used():
    system = tiny(queue_size=20, queue_epoch=1)
    assert system.queue.rows.shape == (2, 16, 5)  # a multiple of the batch
    asked = []
    codes = system.codes
    system.codes = lambda layer, scores, past=None: asked.append(past) or codes(layer, scores, past)
    train(system, 7)
    assert [past is not None for past in asked] == [False] * 6 + [True]
    assert int(system.queue.filled) == 16
    own = torch.rand(2, 8, 6)
    past = F.normalize(torch.randn(2, 16, 5), dim=2)
    layer = system.prototypes[0]
    whole = [sinkhorn(torch.cat([past[v] @ layer.weight.detach().T, own[v]])) for v in (0, 1)]
    torch.testing.assert_close(codes(layer, own, past), torch.stack(whole)[:, -8:])


def test_a_checkpoint_holds_all_that_the_next_step_needs():
    first, second = tiny(queue_size=16, queue_epoch=0), tiny(queue_size=16, queue_epoch=0, seed=5)
    train(first, 3)
    second.load_state_dict(first.state_dict())
    one, two = (s.step(batch(7)) for s in (first, second))
    for key in one:
        assert torch.equal(one[key], two[key])
    assert second.queue.is_full
    assert second.done == 3


def test_initialisation_is_a_function_of_the_seed_and_leaves_the_global_state_alone():
    def build(seed):
        torch.manual_seed(3)
        encoder = nn.Linear(6, 8)
        system = SwAV(encoder, num_features=8, hidden=7, dim=5, num_prototypes=[6], seed=seed)
        return torch.cat([p.flatten() for p in system.parameters()]), torch.rand(1)

    (one, after), (two, _), (three, _) = build(0), build(0), build(1)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    torch.manual_seed(3)
    nn.Linear(6, 8)
    assert torch.equal(after, torch.rand(1))


def test_small_crops_predict_and_pass_the_head_with_the_large_ones():
    system = SwAV(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        num_features=4, hidden=7, dim=5, num_prototypes=[6],
    )  # fmt: skip
    seen = []
    system.encoder[1].register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    system.projector[1].register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    views = [torch.randn(6, 3, s, s) for s in (12, 12, 8, 8, 8)]
    views[4].requires_grad_()
    out = system.step({"views": views})
    assert seen == [(12, 4, 10, 10), (18, 4, 6, 6), (30, 7)]
    out["loss"].backward()
    assert views[4].grad.abs().max() > 0
    assert out["features"].shape == (6, 4)


def test_collapse_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tiny(check_every=2), 5)
    system = tiny(check_every=2)
    with torch.no_grad():
        system.projector[3].weight.zero_()  # all embeddings equal
    system.steps.fill_(2)
    with pytest.warns(UserWarning, match=r"collapsed at step 2: .* loss of 1.792 is that of guessing"):
        system.step(batch())


def test_perplexity_counts_prototypes():
    assert perplexity(torch.eye(5)).item() == pytest.approx(5)
    assert perplexity(torch.eye(5)[:1].repeat(9, 1)).item() == pytest.approx(1)
    assert perplexity(torch.tensor([[0.5, 0.25, 0.25]])).item() == pytest.approx(np.exp(1.0397207708399179))


def test_the_cluster_of_a_sample_is_the_nearest_prototype():
    system = tiny().eval()
    x = batch()["views"][0]
    z = F.normalize(system.projector(system.encoder(x)), dim=1)
    cosine = torch.stack([F.cosine_similarity(z, c[None], dim=1) for c in system.prototypes[0].weight], 1)
    assert torch.equal(system.assign(x), cosine.argmax(1))
    assert torch.equal(system.embed(x), system.encoder(x))


def test_what_cannot_be_is_said():
    with pytest.raises(UsageError, match="at least two views of every sample"):
        tiny().step(batch(views=1))
    with pytest.raises(UsageError, match="a batch needs at least two"):
        tiny().step(batch(n=1))
    with pytest.raises(UsageError, match="same samples"):
        tiny().step({"views": [torch.randn(4, 6), torch.randn(3, 6)]})
    with pytest.raises(UsageError, match=r"at least a batch \(8\), got 5"):
        tiny(queue_size=5)
    for wrong in ([], [1]):
        with pytest.raises(UsageError, match="num_prototypes"):
            tiny(num_prototypes=wrong)
    with pytest.raises(UsageError, match="must be at least 0"):
        tiny(small_crops=-1)
