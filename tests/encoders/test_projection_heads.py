"""Heads for training only, against the authors' values and by hand."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.encoders.crops import forward_by_size
from contralto.encoders.heads import Reweight, SymmetricReLU, dino_head, identity_mlp, projection_head
from contralto.errors import UsageError

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "projection_head.npz", allow_pickle=False)


def ref(name):
    return torch.from_numpy(REFERENCE[name])


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kappa", [1.5, 0.9])
def test_reweighting_equals_the_authors_code(kappa):
    head = Reweight(6, kappa)
    torch.testing.assert_close(head.weight, ref(f"reweight_{kappa}_weights"), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(head(ref("x")), ref(f"reweight_{kappa}_out"), rtol=1e-9, atol=1e-11)
    assert not list(head.parameters())
    assert head.weight[0] == 1  # i begins at 0


def test_symmetric_relu_equals_the_authors_code():
    layer, x = SymmetricReLU(0.4), ref("x").requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    torch.testing.assert_close(out, ref("symrelu_0.4_out"), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(x.grad, ref("symrelu_0.4_grad_x_of_sum_sq"), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer.threshold.grad, ref("symrelu_0.4_grad_b_of_sum_sq"), rtol=1e-9, atol=1e-11)


def test_identity_head_begins_as_the_identity_and_learns():
    head, x = identity_mlp(6), ref("x")
    torch.testing.assert_close(head(x), ref("identity_head_out"), rtol=1e-9, atol=1e-11)
    logits = nn.functional.linear(head(x), ref("identity_head_classifier_w"), ref("identity_head_classifier_b"))
    torch.testing.assert_close(logits, ref("identity_head_logits"), rtol=1e-9, atol=1e-11)
    head(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in head.parameters())


def test_a_threshold_removes_after_the_head_what_is_still_there_before_it():
    z = torch.randn(200, 5) * torch.tensor([2.0, 1.0, 0.5, 0.05, 0.01])
    h = SymmetricReLU(0.3)(z)
    assert np.linalg.matrix_rank(z.numpy()) == 5
    assert np.linalg.matrix_rank(h.detach().numpy()) == 3


@pytest.mark.parametrize(
    ("kind", "options", "layers", "width"),
    [
        ("none", {}, 0, 8), ("mlp", {}, 2, 8), ("mlp", {"out": 3}, 2, 3), ("mlp3", {"hidden": 5}, 3, 8),
        ("identity_init", {}, 2, 8), ("fixed", {"kappa": 1.5}, 0, 8),
    ],
)  # fmt: skip
def test_heads_by_name(kind, options, layers, width):
    head = projection_head(kind, 8, **options)
    assert head(torch.randn(4, 8)).shape == (4, width)
    assert sum(isinstance(m, nn.Linear) for m in head.modules()) == layers


def test_a_kappa_that_silences_features_is_warned_of_and_a_floor_helps():
    with pytest.warns(UserWarning, match=r"learn nothing; take kappa near 1.027"):
        head = projection_head("fixed", 512, kappa=1.5)
    assert (head.weight.float() == 0).sum() > 200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert projection_head("fixed", 512, kappa=1.5, floor=1e-6).weight.min() == 1e-6
        projection_head("fixed", 512)


def test_what_cannot_be_is_said():
    with pytest.raises(UsageError, match="none, mlp, mlp3, identity_init or fixed"):
        projection_head("conv", 8)
    for kind in ("none", "fixed", "identity_init"):
        with pytest.raises(UsageError, match="keeps the width"):
            projection_head(kind, 8, out=4)
    for options in ({"kappa": 0.0}, {"floor": 2.0}):
        with pytest.raises(UsageError, match="kappa must be above 0"):
            Reweight(4, **options)


def test_views_of_one_size_pass_together_in_their_order():
    seen = []

    class Sum(nn.Module):
        def forward(self, x):
            seen.append(tuple(x.shape))
            return x.flatten(1).sum(1, keepdim=True)

    views = [torch.full((2, s), float(v)) for v, s in enumerate((3, 3, 2, 2, 3))]
    out = forward_by_size(Sum(), views)
    assert seen == [(4, 3), (4, 2), (2, 3)]  # neighbours only: the order of rows is that of the views
    assert out[:, 0].tolist() == [0, 0, 3, 3, 4, 4, 6, 6, 12, 12]
    for wrong in ([], [torch.zeros(2, 3), torch.zeros(3, 3)]):
        with pytest.raises(UsageError, match="same samples"):
            forward_by_size(Sum(), wrong)


def test_dinos_head_is_three_layers_with_gelu_and_small_weights():
    torch.manual_seed(0)
    head = dino_head(32, 64, 16)
    x = torch.randn(5, 32)
    first, second, third = head[0], head[2], head[4]
    expected = third(F.gelu(second(F.gelu(first(x)))))
    assert torch.equal(head(x), expected)
    assert len(head) == 5
    for layer in (first, second, third):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert (layer.bias == 0).all()


def test_the_last_layer_of_dinos_head_gives_cosines_and_its_gain_never_learns():
    head = dino_head(8, 16, 4, last=6)
    learnt = [name for name, p in head.named_parameters() if p.requires_grad]
    assert sum("parametrizations" in name for name in learnt) == 1
    x = torch.randn(3, 8)
    inner = head[:5](x)
    cosines = F.normalize(inner, dim=1) @ F.normalize(head[-1].weight, dim=1).T
    torch.testing.assert_close(head(x), cosines)
    with torch.no_grad():
        head[-1].parametrizations.weight.original1.mul_(3)
    torch.testing.assert_close(head(x), cosines)
