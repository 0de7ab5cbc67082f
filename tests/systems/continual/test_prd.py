"""PRD against the released code and its own rules: who gets which gradient, what is kept, what is told at the ends of tasks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.pairs import sup_con
from contralto.systems.continual.prd import PRD, prototype_loss

from tests.systems.continual import steps

REFERENCE = np.load(Path(__file__).parents[2] / "reference" / "prd.npz", allow_pickle=False)
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
AXES = ["samples", "prototypes"]


def reference(case):
    return {k.removeprefix(f"{case}__"): torch.from_numpy(REFERENCE[k]) for k in REFERENCE.files if k.startswith(case)}


def grads(system, loss):
    """Gradients of encoder, projector and prototypes."""
    found = torch.autograd.grad(
        loss,
        [*system.encoder.parameters(), *system.projector.parameters(), system.prototypes.weight],
        allow_unused=True,
    )
    n = len(list(system.encoder.parameters()))
    return found[:n], found[n:-1], found[-1]


def test_supervised_contrast_and_prototypes_are_those_of_the_released_code():
    r = reference("supcon")
    z = r["features"].requires_grad_()
    loss = sup_con(z.transpose(0, 1).flatten(0, 1), r["labels"].repeat(2), temperature=0.1, base_temperature=0.07)
    loss.backward()
    torch.testing.assert_close(loss, r["loss"], **CLOSE)
    unit = z.detach()  # the code is given unit rows and does not scale them: its gradient, less what scaling takes off
    tangent = r["grad"] - (r["grad"] * unit).sum(-1, keepdim=True) * unit
    torch.testing.assert_close(z.grad, tangent, **CLOSE)
    r = reference("rel_0")
    p = r["prototypes"].reshape(9, 6).clone().requires_grad_()
    x = r["features_new"].requires_grad_()
    loss = prototype_loss(x, p, r["labels"]).mean()
    loss.backward()
    torch.testing.assert_close(loss, r["proto_loss"], **CLOSE)
    torch.testing.assert_close(p.grad[6:], r["grad_proto_current"], **CLOSE)
    assert (p.grad[:6] == 0).all()
    assert x.grad is None


@pytest.mark.parametrize("axis", AXES)
def test_every_loss_moves_what_it_should_and_nothing_else(axis):
    system = steps.build("prd", axis=axis)
    out = system.step(steps.batch("prd", system))
    encoder, projector, prototypes = grads(system, out["relations"])
    assert all((g != 0).any() for g in encoder)
    assert all(g is None for g in projector)
    assert (prototypes[:2] != 0).any(1).all()  # of the first task: they move along
    assert (prototypes[2:] == 0).all()
    out = system.step(steps.batch("prd", system))
    encoder, projector, prototypes = grads(system, out["prototypes"])
    assert all(g is None for g in encoder)
    assert (prototypes[:2] == 0).all()
    assert (prototypes[2:] != 0).any(1).all()
    out = system.step(steps.batch("prd", system))
    encoder, projector, prototypes = grads(system, out["contrast"])
    assert prototypes is None
    assert all((g != 0).any() for g in [*encoder, *projector])


@pytest.mark.parametrize("axis", AXES)
def test_the_step_is_the_sum_of_its_parts_by_their_weights(axis):
    system = steps.build("prd", axis=axis, alpha=3.0, beta=5.0)
    first = steps.batch("prd", system)
    out = system.step(first)
    torch.testing.assert_close(out["loss"], out["contrast"] + 3 * out["prototypes"] + 5 * out["relations"])
    x = torch.cat(first["views"])
    with torch.no_grad():
        unit, old = F.normalize(system.encoder(x), dim=1), F.normalize(system.teacher("encoder", x), dim=1)
        p, q = (F.normalize(w[:2], dim=1) for w in (system.prototypes.weight, system.teacher.weight("prototypes")))
        if axis == "samples":
            own, wanted = p @ unit.T / 0.1, q @ old.T / 0.1
        else:
            own, wanted = system.encoder(x) @ p.T, system.teacher("encoder", x) @ q.T
        by_hand = (wanted.softmax(1) * (wanted.log_softmax(1) - own.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(out["relations"], by_hand)


def test_the_first_task_has_no_teacher():
    system = steps.build("prd", task=0)
    out = system.step(steps.batch("prd", system, classes=(0, 1)))
    assert "relations" not in out
    assert "relations" not in steps.build("prd", beta=0.0).step(steps.batch("prd", system))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("teacher", ["train", "eval"])
def test_right_after_a_task_there_is_nothing_to_distil(axis, teacher):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10), torch.nn.BatchNorm1d(10))
    system = PRD(encoder, num_features=10, num_classes=4, hidden=8, dim=4, axis=axis, teacher=teacher).train()
    system.begin_task([0, 1])
    encoder(torch.cat(steps.batch("prd", system)["views"]))  # statistics
    system.end_task()
    system.begin_task([2, 3])
    loss = system.step(steps.batch("prd", system))["relations"]
    encoder_grads, _, _ = grads(system, loss)
    if teacher == "train":  # the same statistics on both sides: student and teacher are the same
        assert abs(loss) < 1e-6
        assert all(g.abs().max() < 1e-6 for g in encoder_grads)
    else:  # the statistics in use differ from those of the batch
        assert loss > 1e-5


def test_only_distillation_moves_old_prototypes_and_none_without():
    for beta, moved in ((0.0, False), (4.0, True)):
        system = steps.build("prd", beta=beta)
        before = system.prototypes.weight.detach().clone()
        [optimizer], [schedule] = system.optimizers_and_schedules()
        for step in range(4):
            system.step(steps.batch("prd", system, step))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            system.at_step_end()
        assert (before[:2] != system.prototypes.weight[:2]).any().item() == moved
        assert (before[2:] != system.prototypes.weight[2:]).any()


def test_prototypes_have_a_group_of_their_own_and_rates_fall_in_steps():
    system = steps.build("prd", task=0, milestones=(1, 3), extra_epochs=3, prototype_lr=0.02, lr=0.1)
    [optimizer], [schedule] = system.optimizers_and_schedules()
    every, own = optimizer.param_groups
    assert (own["momentum"], own["weight_decay"], own["lr"]) == (0, 0, 0.02)
    assert [id(p) for p in own["params"]] == [id(system.prototypes.weight)]
    learnt = [*system.encoder.parameters(), *system.projector.parameters()]
    assert {id(p) for p in every["params"]} == {id(p) for p in learnt}
    rates = []
    for _ in range(system.total_steps):
        rates.append((every["lr"], own["lr"]))
        optimizer.step()
        schedule.step()
    assert len(rates) == (2 + 3) * 3
    assert [round(a, 6) for a, _ in rates[::3]] == [0.1, 0.01, 0.01, 0.001, 0.001]
    assert [round(b, 6) for _, b in rates[::3]] == [0.02, 0.002, 0.002, 0.0002, 0.0002]
    system.end_task()
    system.begin_task([2, 3])
    assert system.total_steps == 2 * 3
    again = system.optimizers_and_schedules()[0][0]
    assert not again.state
    assert again.param_groups[0]["lr"] == 0.1


def test_row_c_is_class_c_whatever_the_order_of_tasks():
    system = steps.build("prd", task=0)
    system.end_task()
    system.begin_task([3])
    first = steps.batch("prd", system, classes=(3,))
    out = system.step(first)
    prototypes = grads(system, out["prototypes"])[2]
    assert (prototypes[3] != 0).any()
    assert (prototypes[:3] == 0).all()
    assert system.task_of_class.tolist() == [0, 0, -1, 1]


def test_predictions_know_what_can_be():
    system = steps.build("prd").eval()
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        everything, of_first = system.predict_logits(x), system.predict_logits(x, [0, 1])
        cosine = F.cosine_similarity(system.encoder(x).unsqueeze(1), system.prototypes.weight, dim=2)
    torch.testing.assert_close(everything, cosine)
    assert torch.equal(of_first[:, :2], everything[:, :2])
    assert (of_first[:, 2:] == -torch.inf).all()
    young = steps.build("prd", task=0).eval()
    with torch.no_grad():
        assert (young.predict_logits(x)[:, 2:] == -torch.inf).all()


def test_asking_does_not_move_the_teachers_statistics():
    system = steps.build("prd")
    before = {k: v.clone() for k, v in system.teacher.state_dict().items()}
    system.eval()
    with torch.no_grad():
        system.predict_logits(torch.randn(5, 3, 16, 16))
    assert all(torch.equal(v, before[k]) for k, v in system.teacher.state_dict().items())


def test_what_does_not_fit_is_refused_with_a_sentence():
    with pytest.raises(UsageError, match="axis"):
        steps.build("prd", axis="both")
    with pytest.raises(UsageError, match="weights"):
        steps.build("prd", beta=-1.0)
    system = steps.build("prd")
    with pytest.raises(UsageError, match="has not ended"):
        system.begin_task([1])
    with pytest.raises(UsageError, match="class 7 belongs to no task"):
        system.step(steps.batch("prd", system) | {"label": torch.full((8,), 7)})
    system.end_task()
    with pytest.raises(UsageError, match="begin_task first"):
        system.end_task()
    with pytest.raises(UsageError, match="classes from 0 to 3"):
        system.begin_task([4])
    with pytest.raises(UsageError, match="2 views"):
        system.step({k: v[:1] if k == "views" else v for k, v in steps.batch("prd", system).items()})
