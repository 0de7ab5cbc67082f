"""ProtoGCD's step against the method written out, its schedules, what it keeps, and two processes against one."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.evaluation.discovery import right_clusters
from contralto.losses.discovery import linear_ramp
from contralto.systems.discovery.base import DiscoverySystem, nearest_prototypes
from contralto.systems.discovery.protogcd import ProtoGCD

from tests.ranks import on_two_ranks
from tests.systems.discovery.steps import CENTRES, NEW, OLD, Tiny, vectors
from tests.systems.selfsup.steps import encoder, train

ALL = OLD + NEW


def tiny(kind=ProtoGCD, **options):
    settings = {"hidden": 9, "dim": 7, "steps_per_epoch": 2, "epochs": 8, "num_classes": OLD, "num_new": NEW}
    return kind(encoder(), num_features=10, **(settings | options)).double()


def written_out(system, batch, ratio, teacher):
    """The total loss by loops over samples and prototypes."""
    y, n = batch["label"].tolist(), len(batch["label"])
    u = [system.encoder(v) for v in batch["views"]]
    mu = [row / row.norm() for row in system.prototypes.weight]
    score = [[torch.stack([f @ m / f.norm() for m in mu]) for f in view] for view in u]
    targets = []
    for view in score:
        t = [(s.detach() / teacher).softmax(0) for s in view]
        sure = [float(row.sort(descending=True).values[0] / (row.sort(descending=True).values[1] + 1e-6)) for row in t]
        surest = sorted(range(n), key=lambda i: -sure[i])[: math.floor(n * ratio)]
        targets.append([F.one_hot(t[i].argmax(), ALL).double() if i in surest else t[i] for i in range(n)])
    pseudo = sum(
        -(targets[v][i] * (score[1 - v][i] / 0.1).log_softmax(0)).sum() / (2 * n) for v in (0, 1) for i in range(n)
    )
    rows = score[0] + score[1]
    mean = sum((s / 0.1).softmax(0) for s in rows) / len(rows)
    balance = sum(p * p.log() for p in mean) + math.log(ALL)
    apart = sum(
        torch.stack([(mu[k] @ mu[j] / 0.1).exp() for j in range(ALL) if j != k]).mean().log() / ALL for k in range(ALL)
    )
    known = [(v, i) for v in (0, 1) for i in range(n) if y[i] >= 0]
    supervised = sum(-(score[v][i] / 0.1).log_softmax(0)[y[i]] / len(known) for v, i in known)
    h = [F.normalize(system.projector(f), dim=0) for view in u for f in view]
    contrast = 0.0
    for a in range(2 * n):
        logits = {b: h[a] @ h[b] for b in range(2 * n) if b != a}
        contrast = contrast + torch.stack(list(logits.values())).logsumexp(0) - logits[(a + n) % (2 * n)]
    contrast = contrast / (2 * n)
    labelled = [v * n + i for v, i in known]
    sup = 0.0
    for a in labelled:
        logits = {b: h[a] @ h[b] / 0.07 for b in labelled if b != a}
        same = [logits[b] for b in logits if y[b % n] == y[a % n]]
        bottom = torch.stack(list(logits.values())).logsumexp(0)
        sup = sup + sum(bottom - s for s in same) / len(same) / len(labelled)
    w = 0.35
    return (1 - w) * (pseudo + 2 * balance + 0.1 * apart) + w * supervised + (1 - w) * contrast + w * sup


@pytest.mark.parametrize("done", [0, 3, 5, 8])
def test_a_step_is_the_method_written_out_through_the_ramp(done):
    system = tiny()
    system.steps.fill_(done)
    batch = vectors(done, n=21, labelled=0.9)
    assert (batch["label"] >= 0).sum() > 1
    ratio = linear_ramp(done // 2, 0.0, 1.0, length=4)
    out = system.step(batch)
    expected = written_out(system, batch, ratio, 0.05)
    torch.testing.assert_close(out["loss"], expected, rtol=1e-10, atol=1e-12)
    assert out["hard"].item() == pytest.approx(math.floor(21 * ratio) / 21)
    found = torch.autograd.grad(out["loss"], [*list(system.encoder.parameters()), system.prototypes.weight])
    slow = torch.autograd.grad(expected, [*list(system.encoder.parameters()), system.prototypes.weight])
    torch.testing.assert_close(found, slow, rtol=1e-8, atol=1e-10)


def test_the_ramps_follow_the_epochs_of_the_steps():
    system = tiny(teacher_epochs=3, teacher_start=0.07, teacher_temperature=0.04, wait_epochs=1, ratio_start=0.2)
    seen = []
    for step in range(0, 14, 2):
        system.steps.fill_(step)
        seen.append((round(system.ratio, 4), round(system.sharpness, 4)))
    ratios, sharp = zip(*seen, strict=True)
    assert ratios == (0.0, 0.2, 0.4667, 0.7333, 1.0, 1.0, 1.0)
    assert sharp == (0.07, 0.055, 0.04, 0.04, 0.04, 0.04, 0.04)
    assert {tiny().sharpness} == {0.05}
    paper = ProtoGCD(encoder(), num_features=10, num_new=2, hidden=4, dim=4)
    assert (paper.ratio, paper.ramp_epochs) == (0, 100)
    paper.steps.fill_(33)
    assert paper.ratio == pytest.approx(33 / 99)


def test_swapping_the_views_changes_nothing():
    system, batch = tiny(), vectors(1)
    system.steps.fill_(3)
    one = system.step(batch)["loss"]
    torch.testing.assert_close(system.step(batch | {"views": batch["views"][::-1]})["loss"], one)


def test_lengths_of_features_and_prototypes_change_no_score_but_features_reach_the_projector_as_they_are():
    system = tiny()
    u = torch.randn(4, 10, dtype=torch.float64)
    before = system.prototypes(u)
    with torch.no_grad():
        system.prototypes.weight.mul_(torch.rand(ALL, 1) + 0.5)
    torch.testing.assert_close(system.prototypes(3 * u), before)
    seen = []
    system.projector.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    batch = vectors(0)
    system.step(batch)
    torch.testing.assert_close(seen[0], system.encoder(torch.cat(batch["views"])).detach())


def test_clustering_alone_trains_the_encoder_and_prototypes_are_never_scaled_back():
    system = tiny()
    u = system.encoder(torch.cat(vectors(0)["views"]))
    grad = torch.autograd.grad(system.prototypes(u).sum(), list(system.encoder.parameters()))
    assert all(g.abs().max() > 0 for g in grad)
    raw = system.prototypes.weight.detach().clone()
    train(system, steps=1, make=vectors)
    lengths = system.prototypes.weight.norm(dim=1)
    assert not torch.allclose(lengths, torch.ones(ALL, dtype=torch.float64), atol=1e-2)
    assert not torch.equal(system.prototypes.weight, raw)


def test_a_batch_without_labels_has_a_loss_and_one_of_labels_only_too():
    system = tiny()
    none = vectors(0) | {"label": torch.full((8,), -1)}
    out = system.step(none)
    assert out["supervised"] == 0
    out["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in system.parameters() if p.grad is not None)
    assert system.step(vectors(0) | {"label": torch.arange(8) % OLD})["loss"].isfinite()
    single = vectors(0) | {"label": torch.tensor([1] + 7 * [-1])}  # its other view is its positive
    assert system.step(single)["loss"].isfinite()


def test_labelled_samples_weigh_in_the_balance_and_get_pseudo_labels_too():
    system, batch = tiny(), vectors(2)
    whole = system.step(batch)
    hidden = system.step(batch | {"label": torch.full((8,), -1)})
    for part in ("pseudo", "entropy", "hard"):
        assert torch.equal(whole[part], hidden[part])


def test_training_finds_the_classes_and_old_ones_stay_on_their_prototypes():
    system = tiny(epochs=150, lr=0.05, seed=1)
    [optimizer], [schedule] = system.optimizers_and_schedules()
    for step in range(system.total_steps):
        system.step(vectors(step, n=40))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        system.at_step_end()
    kind = np.repeat(np.arange(ALL), 40)
    rows = CENTRES[kind] + 0.3 * torch.randn(200, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        found = system.discover(system.embed(rows).float().numpy(), np.full(200, -1))
    old = kind < OLD
    assert (found.assigned[old] == kind[old]).mean() > 0.9  # without any matching
    tables = [np.bincount(found.assigned[kind == c], minlength=ALL) for c in range(ALL)]
    assert len({int(t.argmax()) for t in tables}) == ALL
    assert found.confidence.mean() > 0.7


def test_what_is_found_is_the_nearest_prototype_in_blocks_and_its_probability():
    rng = np.random.default_rng(0)
    x, mu = rng.normal(size=(50, 6)), rng.normal(size=(7, 6))
    mu /= np.linalg.norm(mu, axis=1, keepdims=True)
    best, sure = nearest_prototypes(x, mu, temperature=0.1, rows=16)
    cosines = torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True) @ mu.T)
    p = (cosines / 0.1).softmax(1)
    assert np.array_equal(best, cosines.argmax(1).numpy())
    np.testing.assert_allclose(sure, p.amax(1).numpy(), rtol=1e-4)
    system = tiny()
    found = system.discover(rng.normal(size=(9, 10)), np.full(9, -1))
    assert (found.numbers, found.temperature) == ([ALL], 0.1)
    np.testing.assert_allclose(np.linalg.norm(found.prototypes, axis=1), 1, rtol=1e-6)
    assert found.assigned.dtype == np.int64


def test_prototypes_of_old_classes_may_begin_as_means_once():
    system = tiny(init_prototypes="means").float()
    before = system.prototypes.weight.detach().clone()
    assert system.asks_features(0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 10)).astype(np.float32), np.array([0, 0, -1, 0, -1, -1])
    system.at_epoch_start(x, y)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(system.prototypes.weight[0].detach(), unit[y == 0].mean(0), rtol=1e-5)
    assert torch.equal(system.prototypes.weight[1:], before[1:])  # class 1 has no labelled sample; the rest are new
    assert not system.asks_features(0)
    again = tiny(init_prototypes="means").float()
    again.load_state_dict(system.state_dict())
    assert not again.asks_features(0)  # a training that was killed in its first epoch does not begin anew
    plain = tiny()
    assert not plain.asks_features(0)
    before = plain.prototypes.weight.detach().clone()
    plain.at_epoch_start(x, y)
    assert torch.equal(plain.prototypes.weight, before)


def test_all_prototypes_may_begin_as_the_centres_of_clusters():
    """Rows of five directions, of which two are known: the others get the prototypes of the new classes."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(ALL), 12)
    x = (np.eye(10)[truth] + 0.05 * rng.normal(size=(len(truth), 10))).astype(np.float32)
    labels = np.where((truth < OLD) & (np.arange(len(truth)) % 2 == 0), truth, -1)
    system = tiny(init_prototypes="clusters").float()
    assert system.asks_features(0)
    system.at_epoch_start(x, labels)
    found = system.discover(x, labels)
    assert (found.assigned[truth < OLD] == truth[truth < OLD]).all()
    assert {len(np.unique(found.assigned[truth == c])) for c in range(ALL)} == {1}
    assert len(np.unique(found.assigned)) == ALL


def test_all_prototypes_may_begin_as_clusters_with_old_classes_in_their_place():
    rng, kind = np.random.default_rng(0), np.repeat(np.arange(6), 30)
    x = (np.eye(10)[kind] + 0.1 * rng.normal(size=(180, 10))).astype(np.float32)
    labels = np.where((np.arange(180) % 2 == 0) & np.isin(kind, [0, 2]), kind, -1)  # none of class 1
    system = tiny(num_classes=3, num_new=3, init_prototypes="clusters").float()
    assert system.asks_features(0)
    system.at_epoch_start(x, labels)
    found = system.discover(x, labels).assigned
    assert (found[kind == 0] == 0).all()
    assert (found[kind == 2] == 2).all()
    assert right_clusters(kind, found, [0]).mean() == 1


def test_a_checkpoint_holds_all_that_the_next_steps_need():
    def build():
        return tiny(init_prototypes="means")

    one, other = build(), build()
    one.at_epoch_start(np.eye(10, dtype=np.float32), np.arange(10) % OLD)
    optimizers = [torch.optim.SGD(s.parameters(), 0.1, momentum=0.9) for s in (one, other)]
    train(one, steps=3, make=vectors, optimizer=optimizers[0])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    later = [
        train(s, first=3, steps=4, make=vectors, optimizer=o) for s, o in zip((one, other), optimizers, strict=True)
    ]
    assert torch.equal(*later)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_biases_and_norms_take_no_decay_whatever_the_optimiser():
    for name in ("sgd", "adamw", "lars"):
        [optimizer], [schedule] = tiny(optimizer=name).optimizers_and_schedules()
        full, flat = optimizer.param_groups
        assert {p.ndim for p in full["params"]} == {2}
        assert {p.ndim for p in flat["params"]} == {1}
        assert (full["weight_decay"], flat["weight_decay"]) == (5e-5, 0.0)
        assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1]
    rates = []
    for _ in range(16):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == sorted(rates, reverse=True)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(1e-4)


def test_views_are_the_crops_of_the_released_code_unless_asked_otherwise():
    one, two = tiny().views(224, Tiny.mean, Tiny.std)
    assert one == two
    assert (one.scale, one.ratio, one.jitter) == ((0.766, 0.766), (1.0, 1.0), (0.0, 0.0, 0.0, 0.0))
    strong = tiny(crop=(0.2, 1.0), colours=1.0).views(32, Tiny.mean, Tiny.std)[0]
    assert (strong.scale, strong.ratio, strong.jitter) == ((0.2, 1.0), (3 / 4, 4 / 3), (0.4, 0.4, 0.4, 0.1))


def test_of_a_transformer_only_the_last_blocks_learn_where_asked():
    def blocks():
        return nn.Sequential(nn.Linear(6, 10), nn.Sequential(*(nn.Linear(10, 10) for _ in range(3))))

    net = nn.ModuleDict({"stem": nn.Linear(6, 10), "blocks": nn.ModuleList(nn.Linear(10, 10) for _ in range(3))})
    DiscoverySystem(net, num_features=10, num_classes=2, hidden=4, dim=4, trained_blocks=1)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {"blocks.2.weight", "blocks.2.bias"}
    with pytest.raises(UsageError, match="4 last blocks are to learn, but the encoder has 3 blocks"):
        DiscoverySystem(net, num_features=10, hidden=4, dim=4, trained_blocks=4)
    with pytest.raises(UsageError, match="the encoder has no list of blocks"):
        DiscoverySystem(blocks(), num_features=10, hidden=4, dim=4, trained_blocks=1)


CASES = {
    "protogcd": (ProtoGCD, {}, 0.5), "protogcd, hardly a label": (ProtoGCD, {}, 0.15), "no labels": (ProtoGCD, {}, 0.0),
    "instance": (DiscoverySystem, {}, 0.5),
}  # fmt: skip


def ranked(rank, world):
    found = {}
    for name, (kind, options, labelled) in CASES.items():
        for n in (12, 13):
            system = tiny(kind, **options)
            losses = train(
                system, steps=7, rank=rank, world=world, make=lambda step, n=n, p=labelled: vectors(step, n, p)
            )
            found[f"{name}, {n}"] = {"losses": losses, "state": system.state_dict()}
    return found


@pytest.mark.xdist_group("ranks")
def test_two_processes_equal_one(tmp_path):
    alone = ranked(0, 1)
    for rank in on_two_ranks(ranked, tmp_path):
        for case, expected in alone.items():
            torch.testing.assert_close(rank[case]["losses"], expected["losses"], rtol=1e-9, atol=1e-10, msg=case)
            for key, value in expected["state"].items():
                torch.testing.assert_close(rank[case]["state"][key], value, rtol=1e-8, atol=1e-9, msg=f"{case}: {key}")


def test_what_cannot_be_is_said():
    system = tiny()
    with pytest.raises(UsageError, match=r"label 2 is no old class: labels are in \[0, 2\), -1 where there is none"):
        system.step(vectors(0) | {"label": torch.full((8,), 2)})
    with pytest.raises(UsageError, match="needs 'label'"):
        system.step({"views": vectors(0)["views"]})
    with pytest.raises(UsageError, match="takes 2 views"):
        system.step(vectors(0) | {"views": vectors(0)["views"][:1]})
    for options, words in (
        ({"num_classes": 1, "num_new": 0}, "two classes at least"), ({"num_new": -1}, "num_new must be at least 0"),
        ({"supervised_weight": 1.2}, "supervised_weight"), ({"temperature_instance": 0.0}, "temperature_instance"),
        ({"temperature": 0.0}, "temperature"), ({"ratio_end": 1.5}, "ratio_end"), ({"ramp_epochs": -1}, "ramp_epochs"),
        ({"init_prototypes": "kmeans"}, "init_prototypes"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            tiny(**options)


def test_scores_are_of_single_precision_at_least_under_autocast():
    system = tiny().float()
    batch = {k: [x.float() for x in v] if isinstance(v, list) else v for k, v in vectors(0).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = system.step(batch)
        cosines = system.prototypes(torch.randn(3, 10, dtype=torch.bfloat16))
    assert cosines.dtype == out["loss"].dtype == torch.float32
    torch.testing.assert_close(out["loss"], system.step(batch)["loss"], rtol=0.03, atol=0.03)


def test_the_plain_method_clusters_with_the_labels_and_keeps_old_classes_in_their_place():
    rng, kind = np.random.default_rng(0), np.repeat(np.arange(6), 30)
    x = (np.eye(10)[kind] + 0.1 * rng.normal(size=(180, 10))).astype(np.float32)
    labels = np.where(
        (np.arange(180) % 2 == 0) & np.isin(kind, [0, 2]), kind, -1
    )  # none of class 1, which is an old one
    system = tiny(DiscoverySystem, num_classes=3, num_new=3)
    found = system.discover(x, labels)
    assert (found.assigned[kind == 0] == 0).all()
    assert (found.assigned[kind == 2] == 2).all()
    assert right_clusters(kind, found.assigned, [0]).mean() == 1
    np.testing.assert_allclose(np.linalg.norm(found.prototypes, axis=1), 1, rtol=1e-5)
    assert found.confidence.min() > 0.5
    again = system.discover(x, labels)
    assert np.array_equal(found.assigned, again.assigned)
    with pytest.raises(UsageError, match="k must be"):
        system.discover(x[:5], labels[:5])
