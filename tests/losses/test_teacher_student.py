"""The losses of COCONUT against their equations written out, their invariants, and two processes against one."""

import pytest
import torch
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.pairs import clip, sup_con
from contralto.losses.teacher_student import audio_text, teacher_student

from tests.ranks import on_two_ranks

pytestmark = pytest.mark.xdist_group("teacher ranks")  # two processes are started once

N, D, T = 9, 5, 0.3
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3, 3, 3])
ANCHORS = torch.tensor([True, True, True, True, True, False, False, False, False])


def rows(seed, n=N):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slowly(student, teacher, labels, anchors, positive_from, negative_from, negatives, itself):
    """Equations 4 and 5 of the paper, pair by pair."""
    a, b = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    source = {"student": a, "teacher": b}
    losses = []
    for k in range(len(a)):
        if not anchors[k]:
            continue
        own = itself and positive_from == "teacher"
        positives = [p for p in range(len(a)) if labels[p] == labels[k] and (p != k or own)]
        others = [i for i in range(len(a)) if i != k and (negatives == "all" or not anchors[i])]
        below = sum(torch.exp(a[k] @ source[negative_from][i] / T) for i in others)
        if positives:
            found = [-torch.log(torch.exp(a[k] @ source[positive_from][p] / T) / below) for p in positives]
            losses.append(sum(found) / len(found))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("negatives", ["all", "new_only"])
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("design", [("teacher", "student"), ("student", "student"), ("teacher", "teacher")])
def test_values_and_gradients_are_those_of_the_equation(design, itself, negatives):
    positive, negative = design
    a, b = rows(0).requires_grad_(), rows(1)
    found = teacher_student(
        a, b, LABELS, ANCHORS, temperature=T, positive_from=positive, negative_from=negative, negatives=negatives,
        include_self_positive=itself,
    )  # fmt: skip
    expected = slowly(a, b, LABELS, ANCHORS, positive, negative, negatives, itself)
    assert torch.allclose(found, expected, rtol=1e-12)
    (mine,), (theirs,) = torch.autograd.grad(found, a), torch.autograd.grad(expected, a)
    assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-14)


def test_with_the_student_as_its_teacher_it_is_supervised_contrast_of_the_anchors():
    a = rows(0)
    every = sup_con(a, LABELS, temperature=T, reduction="none")
    counted = ANCHORS & torch.tensor([int((y == LABELS).sum()) > 1 for y in LABELS])
    expected = every[counted].mean()
    found = teacher_student(a, a, LABELS, ANCHORS, temperature=T, include_self_positive=False)
    assert torch.allclose(found, expected, rtol=1e-12)
    scl = teacher_student(a, None, LABELS, ANCHORS, temperature=T, positive_from="student")
    assert torch.allclose(scl, expected, rtol=1e-12)


def test_the_teacher_takes_no_gradient_and_new_samples_are_not_pulled_to_it():
    a, b = rows(0).requires_grad_(), rows(1).requires_grad_()
    teacher_student(a, b, LABELS, ANCHORS, temperature=T, negatives="new_only").backward()
    assert b.grad is None
    moved = rows(1)
    moved[~ANCHORS] += 10  # classes 3 has no anchor, 0 has one sample that is none: that one is a positive
    moved[5] = b[5].detach()
    again = teacher_student(a, moved, LABELS, ANCHORS, temperature=T)
    assert torch.equal(again, teacher_student(a, b, LABELS, ANCHORS, temperature=T))


def test_a_batch_without_anchors_gives_zero_with_gradient():
    a = rows(0).requires_grad_()
    loss = teacher_student(a, rows(1), LABELS, torch.zeros(N, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_it_may_be_below_zero():
    """The term of the numerator is not in the denominator."""
    a = torch.eye(4)
    loss = teacher_student(a, a, torch.tensor([0, 1, 2, 3]), torch.ones(4, dtype=torch.bool), temperature=0.1)
    assert loss < -8


def test_the_order_of_the_batch_changes_nothing():
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    a, b, which = rows(0), rows(1), torch.tensor([7, 7, 2, 2, 2, 5, 1, 1, 7])
    for loss in (
        lambda i: teacher_student(a[i], b[i], LABELS[i], ANCHORS[i], temperature=T),
        lambda i: audio_text(a[i], b[i], which[i], temperature=T),
    ):
        assert torch.allclose(loss(order), loss(torch.arange(N)), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_extreme_temperatures_give_numbers(scale):
    a = rows(0).float().requires_grad_()
    teacher_student(a, rows(1).float(), LABELS, ANCHORS, temperature=scale).backward()
    assert torch.isfinite(a.grad).all()


def test_different_texts_are_those_of_clip_and_equal_ones_are_shared():
    a, t = rows(0), rows(1)
    assert torch.allclose(audio_text(a, t, temperature=T), clip(a, t, temperature=T), rtol=1e-12)
    assert torch.allclose(audio_text(a, t, torch.arange(N), temperature=T), clip(a, t, temperature=T), rtol=1e-12)
    which = torch.tensor([0, 1, 0, 2, 1, 0, 3, 4, 4])
    s = F.normalize(a, dim=1) @ F.normalize(t, dim=1).T / T
    same = (which[:, None] == which).double()
    expected = 0.0
    for log in (s.log_softmax(1), s.T.log_softmax(1)):
        expected = expected - ((log * same).sum(1) / same.sum(1)).mean() / 2
    assert torch.allclose(audio_text(a, t, which, temperature=T), expected, rtol=1e-12)


def test_equal_rows_of_equal_texts_change_nothing_but_where_they_are_summed():
    a, which = rows(0), torch.tensor([0, 1, 0, 2, 1, 0, 3, 4, 4])
    t = rows(1)[which]
    alone = audio_text(a, t, temperature=T)
    assert torch.allclose(audio_text(a, t, which, temperature=T), alone, rtol=1e-12)
    s = F.normalize(a, dim=1) @ F.normalize(t, dim=1).T / T
    out = torch.where(which[:, None] == which, 0.0, -torch.inf)
    expected = sum((x.logsumexp(1) - (x + out).logsumexp(1)).mean() for x in (s, s.T)) / 2
    found = audio_text(a, t, which, pooled="sum", temperature=T)
    assert torch.allclose(found, expected, rtol=1e-12)
    assert found < alone


def test_an_empty_side_gives_zero():
    a = rows(0)[:0].requires_grad_()
    assert audio_text(a, rows(1)[:0], torch.zeros(0, dtype=torch.int64)) == 0


def test_what_does_not_fit_is_named():
    a = rows(0)
    with pytest.raises(UsageError, match="teacher must hold the same samples"):
        teacher_student(a, None, LABELS, ANCHORS)
    with pytest.raises(UsageError, match="positive_from"):
        teacher_student(a, a, LABELS, ANCHORS, positive_from="parent")
    with pytest.raises(UsageError, match="negatives"):
        teacher_student(a, a, LABELS, ANCHORS, negatives="some")
    with pytest.raises(UsageError, match="labels and anchors"):
        teacher_student(a, a, LABELS[:3], ANCHORS)
    with pytest.raises(UsageError, match="one shape"):
        audio_text(a, a[:3])
    with pytest.raises(UsageError, match="pooled"):
        audio_text(a, a, pooled="max")
    with pytest.raises(UsageError, match="which"):
        audio_text(a, a, LABELS[:3])


CASES = {
    "nspt": lambda a, b, y, r: teacher_student(a, b, y, r, temperature=T, gather="all"),
    "nspt, strict": lambda a, b, y, r: teacher_student(
        a, b, y, r, temperature=T, include_self_positive=False, gather="all"
    ),
    "scl, new": lambda a, b, y, r: teacher_student(
        a, None, y, r, temperature=T, positive_from="student", negatives="new_only", gather="all"
    ),
    "ntpt": lambda a, b, y, r: teacher_student(a, b, y, r, temperature=T, negative_from="teacher", gather="all"),
    "mm": lambda a, b, y, r: audio_text(a[~r], b[~r], y[~r], temperature=T, gather="all"),
    "mm, summed": lambda a, b, y, r: audio_text(a, b, y, pooled="sum", temperature=T, gather="all"),
    "mm, all": lambda a, b, y, r: audio_text(a, b, y, temperature=T, gather="all"),
}


def value(case, rank=0, world=1):
    """The loss and the gradient of a weight, of this rank's rows."""
    w = torch.eye(D, dtype=torch.float64, requires_grad=True)
    here = slice(rank, None, world)
    loss = CASES[case](rows(0)[here] @ w, rows(1)[here], LABELS[here], ANCHORS[here])
    loss.backward()
    return loss.detach(), w.grad


def values(rank, world):
    return {case: value(case, rank, world) for case in CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(values, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(ranks, case):
    loss, grad = value(case)
    assert torch.allclose(sum(r[case][0] for r in ranks) / 2, loss, rtol=1e-12)
    assert torch.allclose(sum(r[case][1] for r in ranks) / 2, grad, rtol=1e-10, atol=1e-14)
