"""GPC: the step and the E-step written out, the number of classes carried over, what is kept, two processes against one."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.neighbors.kmeans import semi_supervised_kmeans
from contralto.prototypes.bank import densities
from contralto.systems.discovery.gpc import GPC, fitted_temperature

from tests.ranks import on_two_ranks
from tests.systems.discovery.steps import CENTRES, NEW, OLD, vectors
from tests.systems.selfsup.steps import encoder, train

ALL, SAMPLES = OLD + NEW, 30
REFERENCE = Path(__file__).parents[2] / "reference" / "gpc.npz"


def tiny(**options):
    settings = {
        "hidden": 9,
        "dim": 7,
        "steps_per_epoch": 2,
        "epochs": 8,
        "num_classes": OLD,
        "num_new": NEW,
        "coin": 0.0,
    }
    return GPC(encoder(), num_features=10, num_samples=SAMPLES, **(settings | options)).double()


def everything(seed=0, n=SAMPLES, spread=0.1):
    """Features (n, 10) of all samples around the corners of a cube, labels of some, and the right classes."""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % ALL
    x = 3 * np.eye(10)[truth] + spread * rng.normal(size=(n, 10))
    labels = np.where((truth < OLD) & (np.arange(n) % 3 > 0), truth, -1)
    return x.astype(np.float32), labels, truth


def started(**options):
    system = tiny(**options)
    system.at_epoch_start(*everything()[:2])
    return system


def test_a_step_is_the_losses_of_instances_and_the_cross_entropy_of_either_view():
    system, batch = started(temperature=0.3), vectors(0, n=12)
    out = system.step(batch)
    views = [system.encoder(v) for v in batch["views"]]
    h1, h2 = (system.projector(u) for u in views)
    total = system.instance_loss(h1, h2, batch["label"])
    torch.testing.assert_close(out["instance"], total)
    own = system.assigned[batch["index"]].tolist()
    for u in views:
        for row, c in zip(u, own, strict=True):
            logits = [
                (row / row.norm()) @ p.double() / t for p, t in zip(system.prototypes, system.temperatures, strict=True)
            ]
            total = total - 0.5 * torch.stack(logits).log_softmax(0)[c] / len(own)
    torch.testing.assert_close(out["loss"], total)
    found = torch.autograd.grad(out["loss"], list(system.encoder.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(total, list(system.encoder.parameters())))
    assert not system.prototypes.requires_grad
    light = started(temperature=0.3, prototype_weight=0.25).step(batch)
    torch.testing.assert_close(light["loss"], out["instance"] + 0.25 * out["prototypes"])


def test_before_the_first_clustering_there_are_the_losses_of_instances_alone():
    system, batch = tiny(), vectors(0)
    out = system.step(batch)
    h1, h2 = (system.projector(system.encoder(v)) for v in batch["views"])
    assert set(out) == {"loss", "features"}
    torch.testing.assert_close(out["loss"], system.instance_loss(h1, h2, batch["label"]))
    assert system.number == ALL


def test_the_clustering_is_the_method_written_out():
    x, labels, _ = everything(spread=0.6)
    system = started(estimate=False, temperature=0.2, kappa=2.0, num_new=3)
    system.at_epoch_start(x, labels)
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    own = system.assigned.numpy()
    known = labels >= 0
    assert np.array_equal(own[known], labels[known])
    mean, phi, number = z.mean(0), [], ALL
    centres = [(z[own == k].sum(0) + 2.0 * mean) / ((own == k).sum() + 2.0) for k in range(number)]
    for k in range(number):
        distance = [np.linalg.norm(row - centres[k]) for row in z[own == k]]
        phi.append(np.mean(distance) / math.log(len(distance) + 10))
    phi = np.clip(phi, np.percentile(phi, 10), np.percentile(phi, 90))
    np.testing.assert_allclose(system.temperatures, 0.2 * phi / np.mean(phi), rtol=1e-5)
    assert system.temperatures.mean().item() == pytest.approx(0.2)
    units = np.stack([c / np.linalg.norm(c) for c in centres])
    np.testing.assert_allclose(system.prototypes, units, atol=1e-6)


def test_temperatures_of_the_released_code():
    with np.load(REFERENCE, allow_pickle=False) as file:
        ref = {k.removeprefix("sskm__"): file[k] for k in file if k.startswith("sskm")}
    x = np.concatenate([ref["labelled"], ref["unlabelled"]])
    labels = np.concatenate([ref["labels"], np.full(len(ref["unlabelled"]), -1)])
    found = semi_supervised_kmeans(x, labels, 4, normalize=False)
    distance = np.linalg.norm(x - found.centroids[found.labels], axis=1)
    total, count = (torch.from_numpy(np.bincount(found.labels, w, 4)) for w in (distance, None))
    units = found.centroids / np.linalg.norm(found.centroids, axis=1, keepdims=True)
    match = (units @ ref["centroids"].T).argmax(1)
    np.testing.assert_allclose(densities(total, count, target=1.0), ref["density"][match], rtol=1e-5)


def test_the_number_of_clusters_is_found_and_carried_over():
    x, labels, truth = everything(n=200)
    system = tiny(num_new=9, psi=0.0)
    for epoch in range(1, 7):
        system.steps.fill_(2 * epoch)
        before = system.number
        system.at_epoch_start(x, labels)
        assert int(system.numbers[-1]) == system.number == len(system.prototypes) == len(system.temperatures)
        assert system.number <= before
    assert system.number == ALL
    assert len({*zip(truth, system.assigned.tolist(), strict=True)}) == ALL
    found = system.discover(x, labels)
    assert found.numbers == system.numbers.tolist()
    kept = tiny(num_new=9, estimate=False)
    kept.at_epoch_start(x, labels)
    assert kept.number == OLD + 9


def test_what_is_asked_and_when():
    system = tiny(wait_epochs=2, update_every=3)
    assert [e for e in range(10) if system.asks_features(e)] == [2, 5, 8]
    system.steps.fill_(4)
    system.at_epoch_start(*everything()[:2])
    assert not system.asks_features(2)
    assert system.asks_features(5)
    other = tiny(wait_epochs=2, update_every=3)
    other.load_state_dict(system.state_dict())
    assert not other.asks_features(2)


@pytest.mark.parametrize("options", [{}, {"pca_dim": 4}, {"prototype_momentum": 0.9}, {"coin": 0.5}])
def test_what_is_saved_goes_on_bit_by_bit(options):
    one, other = started(num_new=6, **options), tiny(num_new=6, **options)
    train(one, steps=2, make=vectors)
    assert len(one.prototypes) != len(other.prototypes)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for system in (one, other):
        system.at_epoch_start(*everything(seed=1)[:2])
    assert torch.equal(train(one, first=2, make=vectors), train(other, first=2, make=vectors))
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_prototypes_follow_the_samples_only_where_they_are_told_to():
    system, moving = started(), started(prototype_momentum=0.9)
    before = system.prototypes.clone()
    assert torch.equal(before, moving.prototypes)
    batch = vectors(0)
    for s in (system, moving):
        s.step(batch)
    assert torch.equal(system.prototypes, before)
    hit = torch.zeros(len(before), dtype=torch.bool)
    hit[moving.assigned[batch["index"]]] = True
    changed = (moving.prototypes != before).any(1)
    assert torch.equal(changed, hit)
    torch.testing.assert_close(moving.prototypes.norm(dim=1), torch.ones(len(before)))


def test_principal_directions_are_those_of_the_unit_features():
    x, labels, _ = everything(n=100, spread=0.5)
    system = tiny(pca_dim=3)
    system.at_epoch_start(x, labels)
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    _, _, right = np.linalg.svd(z - z.mean(0), full_matrices=False)
    cosines = np.abs((system.directions.numpy() * right[:3]).sum(1))
    np.testing.assert_allclose(cosines, 1, atol=1e-4)
    assert system.prototypes.shape[1] == 3
    rows = system.project(torch.from_numpy(x))
    torch.testing.assert_close(rows, F.normalize(torch.from_numpy(z) @ system.directions.T, dim=1))
    assert system.step(vectors(0))["loss"].isfinite()
    assert system.discover(x, labels).prototypes.shape == (system.number, 10)


def test_what_is_discovered():
    x, labels, truth = everything(n=150)
    system = tiny()
    system.at_epoch_start(x, labels)
    found = system.discover(x, labels)
    assert (found.assigned[truth < OLD] == truth[truth < OLD]).all()
    assert len({*zip(truth, found.assigned, strict=True)}) == ALL
    np.testing.assert_allclose(np.linalg.norm(found.prototypes, axis=1), 1, rtol=1e-5)
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    logits = torch.from_numpy(z @ found.prototypes.T / found.temperature)
    assert np.array_equal(found.assigned, logits.argmax(1))
    np.testing.assert_allclose(found.confidence, logits.softmax(1).max(1).values, rtol=1e-4)
    assert found.assigned.dtype == np.int64
    unclear = everything(n=150, spread=2.0)
    assert system.discover(unclear[0], labels).confidence.mean() < found.confidence.mean()


def test_without_labels_it_clusters():
    x, _, truth = everything(n=100)
    none = np.full(100, -1)
    system = tiny(num_classes=0, num_new=8)
    for epoch in range(4):
        system.steps.fill_(2 * epoch)
        system.at_epoch_start(x, none)
    assert system.number == ALL
    found = system.discover(x, none)
    assert len({*zip(truth, found.assigned, strict=True)}) == ALL
    assert found.temperature == 0.1


def test_temperature_is_the_likeliest():
    rng = np.random.default_rng(0)
    cosines = rng.uniform(-1, 1, (4000, 5))
    p = np.exp(cosines / 0.3)
    labels = (rng.random((4000, 1)) > (p / p.sum(1, keepdims=True)).cumsum(1)).sum(1)
    assert fitted_temperature(cosines, labels) == pytest.approx(0.3, rel=0.1)
    assert fitted_temperature(np.eye(3), np.arange(3)) < 0.05


def ranked(rank, world):
    found = {}
    for name, options in {"plain": {}, "momentum": {"prototype_momentum": 0.8}, "directions": {"pca_dim": 4}}.items():
        system = started(temperature=0.2, **options)
        losses = train(system, steps=5, rank=rank, world=world, make=lambda step: vectors(step, 13))
        found[name] = {"losses": losses, "state": system.state_dict()}
    return found


@pytest.mark.xdist_group("ranks")
def test_two_processes_equal_one(tmp_path):
    alone = ranked(0, 1)
    for rank in on_two_ranks(ranked, tmp_path):
        for case, expected in alone.items():
            torch.testing.assert_close(rank[case]["losses"], expected["losses"], rtol=1e-9, atol=1e-10, msg=case)
            for key, value in expected["state"].items():
                tolerance = 1e-6 if value.dtype == torch.float32 else 1e-8
                torch.testing.assert_close(
                    rank[case]["state"][key], value, rtol=tolerance, atol=tolerance, msg=f"{case}: {key}"
                )


def test_logits_are_of_single_precision_at_least_under_autocast():
    system = started(temperature=0.2).float()
    batch = {k: [x.float() for x in v] if isinstance(v, list) else v for k, v in vectors(0).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = system.step(batch)
    assert out["prototypes"].dtype == torch.float32
    torch.testing.assert_close(out["loss"], system.step(batch)["loss"], rtol=0.03, atol=0.03)


def test_psi_is_chosen_from_the_labelled_classes():
    x, labels, _ = everything(n=150)
    for start in (ALL - OLD, 3 * ALL - OLD):
        system = tiny(num_new=start, psi="auto")
        for epoch in range(8):
            system.steps.fill_(2 * epoch)
            system.at_epoch_start(1000 * x, labels)
        assert system.number == ALL
    with pytest.raises(UsageError, match="two labelled classes at least, there are 0: say a number"):
        tiny(num_classes=0, num_new=8, psi="auto").at_epoch_start(x, np.full(150, -1))


def test_what_cannot_be_is_said():
    x, labels, _ = everything()
    with pytest.raises(UsageError, match="old classes must have a labelled sample, and no other; see class 1"):
        tiny().at_epoch_start(x, np.where(labels == 1, -1, labels))
    with pytest.raises(UsageError, match="see class 4"):
        tiny().discover(x, np.where(labels == 1, 4, labels))
    for options, words in (
        ({"num_classes": 0, "num_new": 0}, "num_new must be at least 1"), ({"temperature": 0.0}, "temperature"),
        ({"prototype_momentum": 1.5}, "prototype_momentum"), ({"wait_epochs": -1}, "wait_epochs"),
        ({"update_every": 0}, "update_every"), ({"psi": "large"}, 'psi must be a number or "auto"'),
        ({"pca_dim": 11}, "number of features, 10; got 11"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            tiny(**options)
    with pytest.raises(UsageError, match="nu above D - 1 = 9"):
        tiny(nu=5.0).at_epoch_start(x, labels)
    assert CENTRES.shape[0] == ALL
