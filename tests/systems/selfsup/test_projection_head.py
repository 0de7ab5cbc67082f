"""The projection head: both layers, three objectives; the theory against gradient descent."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.errors import DataError, UsageError
from contralto.losses.pairs import sup_con
from contralto.systems.selfsup.projection_head import ProjectionHead
from contralto.systems.selfsup.theory import earlier_layer_wins, feature_share, share_gap, spectral_weights

REFERENCE = np.load(Path(__file__).parents[2] / "reference" / "projection_head.npz", allow_pickle=False)


def ref(name):
    return torch.from_numpy(REFERENCE[name])


def tiny(**options):
    return ProjectionHead(nn.Linear(6, 8), num_features=8, hidden=5, **options)


def batch(n=6, views=2, labels=True):
    g = torch.Generator().manual_seed(n)
    made = {"views": [torch.randn(n, 6, generator=g) for _ in range(views)], "index": torch.arange(n)}
    return made | ({"label": torch.arange(n) % 3} if labels else {})


@pytest.mark.parametrize(("case", "views", "temperature"), [("one_view_0.5", 1, 0.5), ("two_view_0.1", 2, 0.1)])
def test_supervised_contrast_equals_the_authors_code(case, views, temperature):
    z = ref(f"supcon_{case}_z").requires_grad_()
    loss = sup_con(z, ref("labels").repeat(views), temperature=temperature)
    torch.testing.assert_close(loss, ref(f"supcon_{case}_loss"), rtol=1e-9, atol=1e-11)
    loss.backward()
    torch.testing.assert_close(z.grad, ref(f"supcon_{case}_grad"), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("head", ["mlp", "none", "mlp3", "identity_init", "fixed"])
def test_both_layers_are_at_hand_and_the_one_before_the_head_is_used(head):
    system = tiny(head=head).double().eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    z = system.encoder(x)
    assert torch.equal(system.embed(x), z)
    assert torch.equal(system.representation(x), z)
    assert torch.equal(system.representation(x, use_head=True), system.head(z))


def test_objectives_written_out():
    data = {k: [v.double() for v in x] if k == "views" else x for k, x in batch().items()}
    y, n = data["label"], 6
    contrast, classes, pairs = (
        tiny(objective=o, num_classes=3 if o == "cross_entropy" else 0).double() for o in ("sup_con", "cross_entropy", "nt_xent")
    )  # fmt: skip
    h = F.normalize(contrast.requires_grad_(False).head(contrast.encoder(torch.cat(data["views"]))), dim=1)
    s, labels, total = h @ h.T / 0.5, y.repeat(2), 0.0
    for i in range(2 * n):
        others = [j for j in range(2 * n) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        total += float(s[i, others].logsumexp(0) - s[i, positives].mean()) / (2 * n)
    assert contrast.step(data)["loss"].item() == pytest.approx(total)
    logits = classes.requires_grad_(False).classifier(classes.head(classes.encoder(torch.cat(data["views"]))))
    expected = -sum(float(logits[i].log_softmax(0)[labels[i]]) for i in range(2 * n)) / (2 * n)
    assert classes.step(data)["loss"].item() == pytest.approx(expected)
    h = F.normalize(pairs.head(pairs.encoder(torch.cat(data["views"]))), dim=1)
    s = h @ h.T / 0.5
    total = sum(
        (s[i, [j for j in range(2 * n) if j != i]].logsumexp(0) - s[i, (i + n) % (2 * n)]).item() for i in range(2 * n)
    )
    assert pairs.step(data)["loss"].item() == pytest.approx(total / (2 * n))


def test_every_objective_and_head_has_finite_gradients():
    for head in ("mlp", "none", "mlp3", "identity_init", "fixed"):
        for objective in ("nt_xent", "sup_con", "cross_entropy"):
            system = tiny(head=head, objective=objective, num_classes=3 if objective == "cross_entropy" else 0)
            system.step(batch())["loss"].backward()
            assert all(torch.isfinite(p.grad).all() for p in system.parameters())


def test_what_cannot_be_is_said():
    with pytest.raises(UsageError, match="needs 'label'"):
        tiny(objective="sup_con").step(batch(labels=False))
    unlabelled = batch()
    unlabelled["label"] = torch.tensor([0, 1, -1, 0, 1, 2])
    with pytest.raises(DataError, match="some have none"):
        tiny(objective="sup_con").step(unlabelled)
    with pytest.raises(UsageError, match="objective must be"):
        tiny(objective="mse")
    for options in ({"objective": "cross_entropy"}, {"objective": "cross_entropy", "num_classes": 1}):
        with pytest.raises(UsageError, match="num_classes must be"):
            tiny(**options)
    with pytest.raises(UsageError, match="takes 2 views"):
        tiny().step(batch(views=3))


# The theory.


def test_predicted_weights_are_those_of_the_reference_and_of_gradient_descent():
    phi, alpha, sigma = (REFERENCE[f"theory_{k}"] for k in ("phi", "alpha", "sigma"))
    found = spectral_weights(phi, alpha, float(sigma))
    for ours, theirs in (
        (found.product, "product_sv"), (found.layer, "first_layer_sv"), (found.post, "post_weight"), (found.pre, "pre_weight"),
        (found.loss, "min_loss"),
    ):  # fmt: skip
        np.testing.assert_allclose(ours, REFERENCE[f"theory_{theirs}"], rtol=1e-9)
    np.testing.assert_allclose(np.diag(found.layer**2), REFERENCE["theory_gd_first_layer_gram"], atol=1e-6)
    np.testing.assert_allclose(np.diag(found.product**2), REFERENCE["theory_gd_product_gram"], atol=1e-6)


@pytest.mark.parametrize("layers", [2, 3])
def test_gradient_descent_from_a_small_start_arrives_there(layers):
    phi, alpha, sigma = np.array([1.0, 0.8, 1.3]), np.array([0.0, 0.4, 0.1]), 0.3
    C = torch.from_numpy(np.diag((1 - alpha) * phi**2))
    V = torch.from_numpy(np.diag(phi**2 + sigma**2))
    g = torch.Generator().manual_seed(0)
    weights = [torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0] * 0.2 for _ in range(layers)]
    for w in weights:
        w.requires_grad_()
    optimizer = torch.optim.SGD(weights, 0.05)
    for _ in range(4_000):
        W = torch.linalg.multi_dot(weights[::-1]) if layers > 2 else weights[1] @ weights[0]
        loss = -2 * (W @ C @ W.T).trace() + (W @ V @ W.T @ W @ V @ W.T).trace()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(spectral_weights(phi, alpha, sigma).loss, abs=1e-8)
    reached = torch.eye(3, dtype=torch.float64)
    for layer in range(1, layers + 1):
        reached = weights[layer - 1].detach() @ reached
        expected = spectral_weights(phi, alpha, sigma, layer=layer, layers=layers).layer
        np.testing.assert_allclose(reached.T @ reached, np.diag(expected**2), atol=2e-4)


@pytest.mark.parametrize(
    ("phi", "alpha", "before", "after"),
    [
        ([1, 1, 1, 1, 1], [0.9, 0, 0, 0, 0], 0.073, 0.024),
        ([5, 1, 1, 1, 1], [0] * 5, 0.576, 0.228),
        ([0.5, 1, 1, 1, 1], [0] * 5, 0.091, 0.138),
        ([1, 5, 1, 1, 1], [0] * 5, 0.106, 0.193),
    ],
)
def test_shares_before_and_after_the_head(phi, alpha, before, after):
    found = spectral_weights(phi, alpha, 0.3)
    assert feature_share(found.pre)[0] == pytest.approx(before, abs=5e-4)
    assert feature_share(found.post)[0] == pytest.approx(after, abs=5e-4)


def test_the_rule_says_where_the_earlier_layer_wins():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        phi, alpha, sigma = rng.uniform(0.05, 5, 2), rng.uniform(0, 0.9, 2) * rng.integers(0, 2), rng.uniform(0.1, 1)
        found = spectral_weights(phi, alpha, sigma)
        wins = found.pre[0] / found.pre[1] > found.post[0] / found.post[1]
        assert earlier_layer_wins(phi, alpha, sigma)[0, 1] == wins
        seen.add(bool(wins))
        if not alpha.any():  # (b), (c) and the range between, where the last layer wins
            low, high = sorted((sigma**2 / phi[1], phi[1]))
            assert wins == (phi[0] < low or phi[0] > high)
    assert seen == {True, False}


def test_the_map_of_gaps_has_both_signs():
    gap = share_gap([0.0, 0.5, 0.9], [0.1, 0.5, 1.0, 5.0])
    assert (gap[2] > 0)[2]
    assert gap[0, 1] < 0
    assert gap[0, 3] == pytest.approx(0.576 - 0.228, abs=1e-3)
    with pytest.raises(UsageError, match="phi must be above 0"):
        spectral_weights([0.0], [0.0], 0.1)
