"""SepCLR against values of the official code and loops; what reaches which encoder; which labels it takes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.errors import DataError, UsageError
from contralto.losses.kernels import attribute_alignment
from contralto.systems.selfsup.sepclr import SepCLR

ARRAYS = np.load(Path(__file__).parents[2] / "reference" / "sepclr.npz", allow_pickle=False)
REF = {k.removeprefix("c1_"): torch.from_numpy(ARRAYS[k]) for k in ARRAYS.files if k.startswith("c1_")}
PARTS = ("common_align", "common_uniform", "salient_align", "salient_uniform", "salient_reg", "jem")


def build(**arguments):
    torch.manual_seed(0)
    options = {"num_features": 7, "common_dim": 4, "salient_dim": 3, "hidden": 8} | arguments
    return SepCLR(nn.Linear(6, 7), **options).double()


def batch(n=8, seed=0, labels=None, **more):
    g = torch.Generator().manual_seed(seed)
    views = [torch.randn(n, 6, generator=g, dtype=torch.float64) for _ in range(2)]
    label = torch.arange(n) % 2 if labels is None else torch.tensor(labels)
    return {"views": views, "index": torch.arange(n) + 100, "label": label} | more


def test_the_objective_equals_the_official_code():
    system = build(beta_salient=1.0, beta_reg=10.0, lambda_jem=10.0)
    heads = {k: REF[k].clone().requires_grad_() for k in ("c1", "c2", "s1", "s2")}
    out = system.losses([heads["c1"], heads["c2"]], [heads["s1"], heads["s2"]], REF["y"] == 1)
    for name in (*PARTS, "loss"):
        torch.testing.assert_close(out[name], REF[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    out["loss"].backward()
    for name, head in heads.items():
        torch.testing.assert_close(head.grad, REF[f"grad_{name}"], rtol=1e-9, atol=1e-11)


def slow_attribute_loss(system, c, s, y, attributes):
    """Card 12 by loops over pairs, tau 0.5: 1 / (2 tau) = 1."""
    n, unit = len(y), [F.normalize(x, dim=1) for x in c]
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    t = s * y[:, None]

    def uniform(x):
        return torch.stack([(-(x[i] - x[j]).square().sum()).exp() for i, j in pairs]).mean().log()

    loss = (unit[0] - unit[1]).square().sum(1).mean() + (uniform(unit[0]) + uniform(unit[1])) / 2
    own = 0.0
    for k, kind in enumerate(system.attributes):
        scale = 2 * 0.025 if kind == "continuous" else 1e-5
        both = [(i, j) for i, j in pairs if y[i] and y[j]]
        near = [
            torch.exp(-((attributes[i, k] - attributes[j, k]) ** 2) / scale) * (s[i, k] - s[j, k]) ** 2 for i, j in both
        ]
        pull = torch.stack([s[i, k] ** 2 for i in range(n) if not y[i]]).mean() / (1 if kind == "discrete" else 0.05)
        own = own + (torch.stack(near).mean() + pull) / 2 + uniform(t[:, k : k + 1])
    loss = loss + system.beta_salient * own / len(system.attributes)
    kernel = [
        [(-(unit[0][i] - unit[0][j]).square().sum() - (t[i] - t[j]).square().sum()).exp() for j in range(n)]
        for i in range(n)
    ]
    jem = torch.stack([torch.stack(row).mean().log() for row in kernel]).mean()
    return loss + system.lambda_jem * jem


def test_the_supervised_objective_equals_a_loop_over_pairs():
    system = build(attributes=("continuous", "discrete"), salient_dim=2, beta_salient=100.0)
    g = torch.Generator().manual_seed(3)
    c = [torch.randn(7, 4, generator=g, dtype=torch.float64) for _ in range(2)]
    s = torch.randn(7, 2, generator=g, dtype=torch.float64)
    y = torch.tensor([1, 0, 1, 1, 0, 1, 1]) == 1
    attributes = torch.stack(
        [torch.rand(7, generator=g, dtype=torch.float64), torch.tensor([1.0, 9, 1, 2, 9, 2, 2])], 1
    )
    found = []
    for function in (
        lambda a, b, x: system.attribute_losses([a, b], x, y, attributes)["loss"],
        lambda a, b, x: slow_attribute_loss(system, [a, b], x, y.double(), attributes),
    ):
        copies = [x.clone().requires_grad_() for x in (*c, s)]
        loss = function(*copies)
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in copies)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_an_attribute_takes_its_own_coordinate():
    system = build(attributes=("continuous",), salient_dim=1, lr=0.01, epochs=1, steps_per_epoch=200, lambda_jem=0.0)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(64) % 2
    x[:, 1] += 6 * y
    attribute = x[:, :1].sigmoid()
    given = {"views": [x, x], "index": torch.arange(64), "label": y, "attributes": attribute}

    def learnt():
        """How far pairs of near attributes are apart and how far the background is from the origin, in spreads of the target."""
        s = system.salient_head(system.salient(x))[:, 0].detach()
        near = attribute_alignment(s, attribute[:, 0], tau=0.025, where=y == 1)
        return near / s[y == 1].var(), s[y == 0].square().mean() / s[y == 1].var()

    before = learnt()
    [optimizer], _ = system.optimizers_and_schedules()
    for _ in range(200):
        optimizer.zero_grad()
        system.step(given)["loss"].backward()
        optimizer.step()
    after = learnt()
    assert after[0] < 0.75 * before[0]
    assert after[1] < before[1] / 2


def test_the_encoders_share_no_weights_and_only_joint_entropy_couples_them():
    system = build(lambda_jem=0.0)
    ours, theirs = dict(system.encoder.named_parameters()), dict(system.salient_encoder.named_parameters())
    assert all(torch.equal(ours[k], theirs[k]) and ours[k] is not theirs[k] for k in ours)
    system.step(batch())["loss"].backward()
    alone = system.encoder.weight.grad.clone()
    other = build(lambda_jem=0.0, beta_salient=7.0, beta_reg=0.0)
    other.step(batch())["loss"].backward()
    torch.testing.assert_close(other.encoder.weight.grad, alone)
    coupled = build(lambda_jem=10.0)
    coupled.step(batch())["loss"].backward()
    assert not torch.allclose(coupled.encoder.weight.grad, alone)


def test_background_rows_are_moved_by_the_pull_to_the_origin_alone():
    g = torch.Generator().manual_seed(0)
    c = [torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(2)]
    s = [torch.randn(6, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    target = torch.tensor([0, 1, 1, 0, 1, 0]) == 1
    system = build(beta_reg=5.0)
    system.losses(c, s, target)["loss"].backward()
    for x in s:
        torch.testing.assert_close(x.grad[~target], 5.0 / 2 * 2 * x.detach()[~target] / 3)
        assert (x.grad[target] != 0).all()


def test_salient_heads_are_not_normalised_and_common_ones_are():
    g = torch.Generator().manual_seed(0)
    c, s = ([torch.randn(6, d, generator=g, dtype=torch.float64) for _ in range(2)] for d in (4, 3))
    target = torch.arange(6) % 2 == 1
    system = build()
    plain = system.losses(c, s, target)
    scaled = system.losses([3 * x for x in c], s, target)
    torch.testing.assert_close(scaled["loss"], plain["loss"])
    assert system.losses(c, [3 * x for x in s], target)["salient_uniform"] < plain["salient_uniform"] - 0.1


@pytest.mark.parametrize("labels", [[0] * 4, [1] * 4, [0, 0, 0, 1]])
def test_a_batch_of_one_set_has_a_finite_loss(labels):
    system = build()
    loss = system.step(batch(4, labels=labels))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in system.parameters() if p.grad is not None)


def test_the_background_may_be_named_and_is_kept_with_the_weights():
    given = batch()
    first, second = build(), build(background="well")
    first.take_classes(["healthy", "sick"])
    second.take_classes(["ill", "well"])
    swapped = given | {"label": 1 - given["label"]}
    torch.testing.assert_close(first.step(given)["loss"], second.step(swapped)["loss"])
    loaded = build(background="well")
    with pytest.raises(UsageError, match="'well' is not known"):
        loaded.step(swapped)
    loaded.load_state_dict(second.state_dict())
    assert torch.isfinite(loaded.step(swapped)["loss"])


@pytest.mark.parametrize(
    ("names", "error", "told"),
    [
        (["a", "b", "c"], DataError, "two values, got 3"),
        ([], DataError, "got 0"),
        (["a", "b"], UsageError, "a and b; got 'c'"),
    ],
)
def test_labels_that_do_not_tell_two_sets_apart_are_refused(names, error, told):
    with pytest.raises(error, match=told):
        build(background="c").take_classes(names)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"use": "all"}, "use must be"),
        ({"attributes": ("ordinal",)}, "continuous or discrete; got 'ordinal'"),
        ({"attributes": ("discrete",)}, "salient_dim must be 1"),
    ],
)
def test_bad_arguments_are_named(arguments, told):
    with pytest.raises(UsageError, match=told):
        build(**arguments)


def test_bad_batches_are_named():
    system = build()
    with pytest.raises(DataError, match="sample 102 has label -1"):
        system.step(batch(4, labels=[0, 1, -1, 1]))
    with pytest.raises(DataError, match="sample 101 has label 2"):
        system.step(batch(4, labels=[0, 2, 1, 1]))
    with pytest.raises(UsageError, match="at least two"):
        system.step(batch(1))
    with pytest.raises(UsageError, match="needs 'label'"):
        system.step({k: v for k, v in batch().items() if k != "label"})
    supervised = build(attributes=("discrete",), salient_dim=1)
    with pytest.raises(UsageError, match="'attributes'"):
        supervised.step(batch())
    with pytest.raises(UsageError, match=r"shape \(8, 1\)"):
        supervised.step(batch(attributes=torch.zeros(8, 2)))


def test_embed_gives_both_codes_side_by_side_or_one():
    x = batch()["views"][0]
    system = build().eval()
    both = system.embed(x)
    torch.testing.assert_close(both, torch.cat([system.common(x), system.salient(x)], 1))
    for use, width in (("common", 4), ("salient", 3)):
        one = build(use=use).eval()
        one.load_state_dict(system.state_dict())
        assert one.embed(x).shape == (8, width)
        torch.testing.assert_close(one.embed(x), getattr(system, use)(x))


def test_the_same_seed_gives_the_same_heads_and_leaves_the_global_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    encoder = nn.Linear(6, 7)
    torch.manual_seed(5)
    a = SepCLR(encoder, num_features=7, seed=3)
    assert torch.rand(1) == expected
    b = SepCLR(encoder, num_features=7, seed=3)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_rate_stays_unless_it_is_told_where_to_end():
    for final, end in ((None, 3e-4), (0.0, 0.0)):
        system = build(final_lr=final, epochs=2, steps_per_epoch=5)
        [optimizer], [schedule] = system.optimizers_and_schedules()
        for _ in range(10):
            optimizer.step()
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(end)
