"""Gated contrast between classes against values of the official code, and against slow loops over anchors and pairs."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses import gated
from contralto.losses.contrast import contrast
from contralto.losses.gated import gated_contrast, gated_similarity, multi_positive, pair_masks

with np.load(Path(__file__).parents[1] / "reference" / "hydra.npz", allow_pickle=False) as arrays:
    REFERENCE = {k: torch.from_numpy(arrays[k]) for k in arrays.files}


def near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def draw(seed, n=5, m=5, d=3, classes=3):
    g = torch.Generator().manual_seed(seed)
    z, k = torch.randn(n, d, generator=g, dtype=torch.float64), torch.randn(m, d, generator=g, dtype=torch.float64)
    gate = torch.rand(n, d, generator=g, dtype=torch.float64)
    labels = torch.randint(classes, (max(n, m),), generator=g)
    return z, k, gate, labels[:n], torch.randint(classes, (n,), generator=g), labels[:m]


def slow(z, k, gate, labels, partners, key_labels, placement, t, alpha, both, reduction):
    per_pair, per_anchor = [], []
    for i in range(len(z)):
        logits, own = [], []
        for j in range(len(k)):
            a, b, g = z[i] / z[i].norm(), k[j] / k[j].norm(), gate[i]
            if placement == "squared":
                s = sum(a[d] * g[d] ** 2 * b[d] for d in range(len(g)))
            else:
                s = F.cosine_similarity(g * z[i], g * k[j], dim=0)
            logits.append((s - alpha * (a @ b)) / t)
        left = [j for j in range(len(k)) if key_labels[j] not in (labels[i], partners[i])]
        wanted = (labels[i], partners[i]) if both else (partners[i],)
        for j in range(len(k)):
            if key_labels[j] in wanted:
                others = sum(logits[n].exp() for n in left)
                own.append((logits[j].exp() + others).log() - logits[j])
        per_pair += own
        per_anchor.append(sum(own, z.new_zeros(())) / (len(own) + 1e-6))
    if reduction == "pair":
        return sum(per_pair, z.new_zeros(())) / max(len(per_pair), 1)
    return torch.stack(per_anchor) if reduction == "none" else torch.stack(per_anchor).mean()


def test_both_similarities_equal_the_official_code():
    z1, z2, gate = (REFERENCE[k] for k in ("z1", "z2", "gate_eval"))
    near(gated_similarity(z1, z2, gate) / 0.1, REFERENCE["logits_official_T0.1"])
    near(gated_similarity(z1, z2, gate, placement="subspace"), REFERENCE["logits_subspace_cosine"])


def test_masks_and_the_reduction_per_anchor_equal_the_official_code():
    positives, negatives = pair_masks(REFERENCE["y"], REFERENCE["y2"], REFERENCE["y"])
    assert torch.equal(positives, REFERENCE["pos_mask"])
    assert torch.equal(negatives, REFERENCE["neg_mask"])
    logits = REFERENCE["logits_official_T0.1"].clone().requires_grad_()
    loss = multi_positive(logits, positives, negatives)
    loss.backward()
    near(loss, REFERENCE["multipos_per_anchor_loss"])
    near(logits.grad, REFERENCE["multipos_per_anchor_grad_logits"])


def test_a_partner_class_that_is_absent_gives_what_the_official_code_gives():
    y, y2 = REFERENCE["missing_y"], REFERENCE["missing_y2"]
    positives, negatives = pair_masks(y, y2, y)
    assert not positives.any(1).all()
    loss = multi_positive(REFERENCE["logits_official_T0.1"], positives, negatives)
    near(loss, REFERENCE["missing_loss_per_anchor_version"])
    near(gated_contrast(REFERENCE["z1"], REFERENCE["z2"], REFERENCE["gate_eval"], y, y2), loss)


def test_the_whole_loss_and_its_gradients_equal_the_official_code():
    z1, z2, gate = (REFERENCE[k].clone().requires_grad_() for k in ("z1", "z2", "gate_eval"))
    loss = gated_contrast(z1, z2, gate, REFERENCE["y"], REFERENCE["y2"])
    loss.backward()
    near(loss, REFERENCE["official_loss"])
    for ours, theirs in ((z1, "z1"), (z2, "z2"), (gate, "gate")):
        near(ours.grad, REFERENCE[f"official_grad_{theirs}"])


@pytest.mark.parametrize(("name", "alpha"), [("alpha0", 0.0), ("alpha0.5", 0.5)])
def test_contrast_with_the_open_space_equals_the_official_code(name, alpha):
    z1, z2, gate = (REFERENCE[k] for k in ("z1", "z2", "gate_train"))
    loss = gated_contrast(z1, z2, gate, REFERENCE["y"], REFERENCE["y2"], alpha=alpha)
    near(loss, REFERENCE[f"{name}_loss_train_gate"])


@given(
    st.integers(0, 10_000), st.sampled_from(["squared", "subspace"]), st.sampled_from(["anchor", "pair", "none"]),
    st.booleans(), st.sampled_from([0.0, 0.5]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_equals_the_slow_way(seed, placement, reduction, both, alpha):
    data = draw(seed, m=4 + seed % 3)
    found = gated_contrast(
        *data, placement=placement, temperature=0.3, alpha=alpha, both=both, reduction=reduction
    )  # fmt: skip
    near(found, slow(*data, placement, 0.3, alpha, both, reduction))


def test_the_tiled_engine_gives_the_same_values_and_gradients():
    z, k, gate, labels, partners, key_labels = draw(0, n=30, m=40, d=6)
    found = []
    for form in ("dense", "tiled"):
        leaves = [x.clone().requires_grad_() for x in (z, k, gate)]
        with patch.object(gated, "contrast", lambda *a, form=form, **o: contrast(*a, **o, form=form)):
            loss = gated_contrast(*leaves, labels, partners, key_labels)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for dense, tiled in zip(*found, strict=True):
        near(tiled, dense)


@pytest.mark.parametrize("placement", ["squared", "subspace"])
def test_gradients_are_right(placement):
    z, k, gate, labels, partners, key_labels = draw(1)
    t, alpha = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (z, k, gate, t, alpha)]

    def loss(z, k, gate, t, alpha):
        return gated_contrast(z, k, gate, labels, partners, key_labels, placement=placement, temperature=t, alpha=alpha)

    assert torch.autograd.gradcheck(loss, leaves)


def test_identical_partners_and_an_open_gate_are_supervised_contrast_with_one_softmax_per_positive():
    z, k, gate, labels, *_ = draw(2)
    loss = gated_contrast(z, k, torch.ones_like(gate), labels, labels, reduction="none")
    logits = F.normalize(z, dim=1) @ F.normalize(k, dim=1).T / 0.1
    for i in range(len(z)):
        same = labels == labels[i]
        each = [
            torch.cat([logits[i, j : j + 1], logits[i, ~same]]).logsumexp(0) - logits[i, j]
            for j in same.nonzero()[:, 0]
        ]
        torch.testing.assert_close(loss[i], sum(each) / len(each), rtol=1e-5, atol=0)


def test_the_own_class_is_neither_pulled_nor_pushed():
    z, k, gate, *_ = draw(3, n=1, m=3)
    k.requires_grad_()
    loss = gated_contrast(z, k, gate, torch.tensor([0]), torch.tensor([1]), torch.tensor([0, 1, 2]))
    loss.backward()
    assert (k.grad[0] == 0).all()
    assert (k.grad[1:] != 0).any(1).all()


def test_a_subspace_knows_the_proportions_of_a_gate_only_and_the_squared_form_knows_its_size():
    z, k, gate, *_ = draw(4)
    near(gated_similarity(z, k, gate / 2, placement="subspace"), gated_similarity(z, k, gate, placement="subspace"))
    near(gated_similarity(z, k, gate / 2), gated_similarity(z, k, gate) / 4)


@pytest.mark.parametrize("placement", ["squared", "subspace"])
def test_closed_gates_and_extreme_logits_stay_finite(placement):
    z, k, gate, labels, partners, key_labels = (x.float() if x.is_floating_point() else x for x in draw(5))
    gate[0] = 0
    z[1] = 0
    leaves = [x.requires_grad_() for x in (z, k, gate)]
    for reduction in ("anchor", "pair"):
        loss = gated_contrast(
            *leaves, labels, partners, key_labels, placement=placement, temperature=1e-4, reduction=reduction
        )
        loss.backward()
        assert loss.isfinite()
        assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("placement", ["squared", "subspace"])
@pytest.mark.parametrize("reduction", ["anchor", "pair"])
def test_without_any_positive_the_loss_is_zero(placement, reduction):
    z, k, gate, labels, *_ = draw(6)
    z.requires_grad_()
    partners = torch.full_like(labels, 9)
    loss = gated_contrast(z, k, gate, labels, partners, placement=placement, reduction=reduction)
    loss.backward()
    assert loss == 0
    assert (z.grad == 0).all()


def test_half_precision_is_computed_in_float32():
    z, k, gate, labels, partners, key_labels = draw(7)
    for placement in ("squared", "subspace"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = [x.bfloat16() for x in (z, k, gate)]
            found = gated_contrast(*low, labels, partners, key_labels, placement=placement)
            wide = gated_contrast(*(x.float() for x in low), labels, partners, key_labels, placement=placement)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wide)


def test_what_does_not_fit_is_named():
    z, k, gate, labels, partners, key_labels = draw(8, m=4)
    with pytest.raises(UsageError, match=r"key_labels must be of shape \(4,\)"):
        gated_contrast(z, k, gate, labels, partners)
    with pytest.raises(UsageError, match="gate must be of shape"):
        gated_contrast(z, k, gate[:, :2], labels, partners, key_labels)
    with pytest.raises(UsageError, match="anchors and gate must be of one shape"):
        gated_contrast(z, k, gate[:, :2], labels, partners, key_labels, placement="subspace")
    with pytest.raises(UsageError, match="placement"):
        gated_contrast(z, k, gate, labels, partners, key_labels, placement="cubed")
    for placement in ("squared", "subspace"):
        with pytest.raises(UsageError, match="reduction"):
            gated_contrast(z, k, gate, labels, partners, key_labels, placement=placement, reduction="mean")
