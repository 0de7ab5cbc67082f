"""Distillation against the equations, the released code of PRD, and what must not change it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.distillation import feature_distance, grouped_targets, relation_distillation, soft_targets

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "prd.npz", allow_pickle=False)
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(wanted, own):
    p, q = wanted.softmax(0), own.softmax(0)
    return (p * (p / q).log()).sum()


def test_soft_targets_row_by_row():
    own, teacher = drawn(4, 3, 5), drawn(4, 3, 5, seed=1)
    rows = torch.stack([torch.stack([kl(teacher[i, j] / 2, own[i, j] / 2) for j in range(3)]) for i in range(4)])
    torch.testing.assert_close(soft_targets(own, teacher, temperature=2.0, reduction="none"), rows, **CLOSE)
    torch.testing.assert_close(soft_targets(own, teacher, temperature=2.0, scale=True), 4 * rows.mean(), **CLOSE)
    mask = torch.arange(12).view(4, 3) % 2 == 0
    torch.testing.assert_close(soft_targets(own, teacher, temperature=2.0, mask=mask), rows[mask].mean(), **CLOSE)
    assert soft_targets(own, teacher, mask=torch.zeros(4, 3, dtype=torch.bool)) == 0


def test_masked_rows_give_no_gradient_even_where_they_are_no_numbers():
    own, mask = drawn(3, 4).requires_grad_(), torch.tensor([True, False, True])
    soft_targets(own, drawn(3, 4, seed=1), mask=mask).backward()
    assert (own.grad[1] == 0).all()
    assert (own.grad[0] != 0).any()


def test_groups_are_distributions_of_their_own():
    groups = torch.tensor([2, 0, 2, -1, 0, 5])
    own, teacher = drawn(7, 6), drawn(7, 6, seed=1)
    wanted = sum(
        torch.stack([kl(teacher[i, groups == g] / 3, own[i, groups == g] / 3) for i in range(7)]).mean() for g in (0, 2)
    )
    found = grouped_targets(own, teacher, groups, temperature=3.0)
    torch.testing.assert_close(found, wanted, **CLOSE)  # the group of one class, 5, says nothing
    far = own.clone()
    far[:, 3] += 100  # of no group
    far[:, [0, 2]] += 7  # a constant for a group
    torch.testing.assert_close(grouped_targets(far, teacher, groups, temperature=3.0), wanted, **CLOSE)
    assert torch.isfinite(grouped_targets(1e4 * own, teacher, groups))
    assert grouped_targets(own, teacher, torch.full((6,), -1)) == 0


def test_feature_distances():
    own, teacher = drawn(5, 4), drawn(5, 4, seed=1)
    torch.testing.assert_close(feature_distance(own, teacher), F.mse_loss(own, teacher), **CLOSE)
    cosine = 1 - F.cosine_similarity(own, teacher).mean()
    torch.testing.assert_close(feature_distance(own, teacher, kind="cosine"), cosine, **CLOSE)


class TestRelations:
    x, before, p, q = drawn(8, 6), drawn(8, 6, seed=1), drawn(4, 6, seed=2), drawn(4, 6, seed=3)

    def test_the_papers_form_prototype_by_prototype(self):
        rows = []
        for c in range(4):
            own = torch.stack([F.cosine_similarity(self.p[c], x, dim=0) for x in self.x]) / 0.1
            wanted = torch.stack([F.cosine_similarity(self.q[c], x, dim=0) for x in self.before]) / 0.1
            rows.append(kl(wanted, own))
        found = relation_distillation(self.x, self.p, self.before, self.q)
        torch.testing.assert_close(found, torch.stack(rows).mean(), **CLOSE)

    def test_the_released_code(self):
        r = {k.removeprefix("rel_0__"): torch.from_numpy(REFERENCE[k]) for k in REFERENCE.files if k.startswith("rel")}
        x, p = r["features_new"].requires_grad_(), r["prototypes"][:2].reshape(6, 6).clone().requires_grad_()
        groups = torch.tensor([0, 0, 0, 1, 1, 1])
        loss = relation_distillation(
            x,
            p,
            r["features_old"],
            r["prev_prototypes"][:2].reshape(6, 6),
            axis="prototypes",
            temperature=1.0,
            groups=groups,
        )
        loss.backward()
        torch.testing.assert_close(loss, r["distill_loss"], **CLOSE)
        torch.testing.assert_close(x.grad, r["grad_features"], **CLOSE)
        torch.testing.assert_close(p.grad[:3], r["grad_proto_old0"], **CLOSE)

    @pytest.mark.parametrize("axis", ["samples", "prototypes"])
    def test_a_student_like_its_teacher_loses_nothing_and_gets_no_gradient(self, axis):
        x, p = self.x.clone().requires_grad_(), self.p.clone().requires_grad_()
        loss = relation_distillation(x, p, self.x, self.p, axis=axis)
        loss.backward()
        assert abs(loss) < 1e-14
        assert x.grad.abs().max() < 1e-14
        assert p.grad.abs().max() < 1e-14

    def test_scale_changes_the_form_of_the_code_alone(self):
        scaled = (2 * self.x, 3 * self.p, 0.5 * self.before, 4 * self.q)
        for axis, same in (("samples", True), ("prototypes", False)):
            plain = relation_distillation(self.x, self.p, self.before, self.q, axis=axis)
            assert torch.allclose(relation_distillation(*scaled, axis=axis), plain) == same
        of_prototypes = (self.x, 3 * self.p, self.before, 4 * self.q)
        plain = relation_distillation(self.x, self.p, self.before, self.q, axis="prototypes")
        torch.testing.assert_close(relation_distillation(*of_prototypes, axis="prototypes"), plain, **CLOSE)

    def test_a_constant_is_lost_along_the_axis_of_the_softmax(self):
        scores, wanted = drawn(4, 8), drawn(4, 8, seed=1)  # (C, N)
        over_samples = soft_targets(scores, wanted)
        torch.testing.assert_close(soft_targets(scores + drawn(4, 1, seed=2), wanted), over_samples, **CLOSE)
        assert not torch.allclose(soft_targets(scores + drawn(1, 8, seed=2), wanted), over_samples)
        over_prototypes = soft_targets(scores.T, wanted.T)
        torch.testing.assert_close(soft_targets((scores + drawn(1, 8, seed=2)).T, wanted.T), over_prototypes, **CLOSE)

    def test_one_old_class_says_something_in_the_papers_form_only(self):
        one = (self.x, self.p[:1], self.before, self.q[:1])
        assert relation_distillation(*one) > 1e-3
        assert relation_distillation(*one, axis="prototypes") == 0

    def test_no_gradient_reaches_the_teacher_and_none_without_prototypes(self):
        before, q = self.before.clone().requires_grad_(), self.q.clone().requires_grad_()
        x = self.x.clone().requires_grad_()
        relation_distillation(x, self.p, before, q).backward()
        assert before.grad is None
        assert q.grad is None
        assert (x.grad != 0).any()
        assert relation_distillation(x, self.p[:0], before, q[:0]) == 0

    def test_cosines_at_temperature_one_are_next_to_even(self):
        sharp, flat = (relation_distillation(self.x, self.p, self.before, self.q, temperature=t) for t in (0.1, 1.0))
        assert flat < 0.05 * sharp


def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(UsageError, match="one shape"):
        soft_targets(x, x[:1])
    with pytest.raises(UsageError, match="groups"):
        grouped_targets(x, x, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UsageError, match="mse"):
        feature_distance(x, x, kind="city")
    with pytest.raises(UsageError, match="axis"):
        relation_distillation(x, x, x, x, axis="both")
    with pytest.raises(UsageError, match="same shapes"):
        relation_distillation(x, x, x[:1], x)
    with pytest.raises(UsageError, match="reduction"):
        soft_targets(x, x, reduction="mean_all")
