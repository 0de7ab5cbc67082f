"""DeepCluster-v2: the memory, the clusters of an epoch, the loss written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.systems.selfsup.deepcluster import DeepClusterV2


def tiny(**options):
    settings = {
        "num_samples": 20,
        "steps_per_epoch": 2,
        "hidden": 7,
        "dim": 5,
        "num_prototypes": [4, 3],
        "batch_size": 8,
    }
    settings |= {"optimizer": "adam", "lr": 0.01, "warmup_epochs": 0, "weight_decay": 0.1}
    return DeepClusterV2(nn.Linear(6, 8), num_features=8, **(settings | options))


def batch(step):
    g = torch.Generator().manual_seed(step)
    return {"views": [torch.randn(8, 6, generator=g) for _ in range(3)], "index": torch.arange(8) + 8 * (step % 2)}


def train(system, first, count):
    [optimizer], _ = system.optimizers_and_schedules()
    losses = []
    for step in range(first, first + count):
        out = system.step(batch(step))
        optimizer.zero_grad()
        out["loss"].backward()
        system.on_before_optimizer_step(optimizer)
        optimizer.step()
        system.at_step_end()
        losses.append(out["loss"].item())
    return losses


def test_the_first_epoch_fills_the_memory_and_changes_no_weight():
    system = tiny()
    before = [p.detach().clone() for p in system.parameters()]
    assert train(system, 0, 2) == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(before, system.parameters(), strict=True))
    assert system.seen.tolist() == [True] * 16 + [False] * 4
    torch.testing.assert_close(system.memory[:, :16].norm(dim=2), torch.ones(2, 16))
    assert (system.clusters == -100).all()


def test_a_step_is_the_cross_entropy_of_the_nearest_centroids():
    system = tiny()
    train(system, 0, 2)
    memory = system.memory.clone()
    data = batch(2)
    found = system.step(data)["loss"]
    total = 0.0
    z = F.normalize(system.projector(torch.cat([system.encoder(v) for v in data["views"]])), dim=1)
    for head, layer in enumerate(system.prototypes):
        torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(len(layer.weight)))
        nearest = (memory[head % 2, :16] @ layer.weight.T).argmax(1)
        assert torch.equal(system.clusters[head, :16], nearest)
        assert (system.clusters[head, 16:] == -100).all()
        assert len(nearest.unique()) == len(layer.weight)
        logits = (z.detach() @ layer.weight.T / 0.1).log_softmax(1).reshape(3, 8, -1)
        for v in range(3):
            for b in range(8):
                total -= float(logits[v, b, nearest[data["index"][b]]]) / (2 * 3 * 8)
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_clusters_serve_an_epoch_and_samples_without_one_are_left_out():
    system = tiny()
    train(system, 0, 3)
    kept = system.clusters.clone(), [layer.weight.clone() for layer in system.prototypes]
    train(system, 3, 1)
    assert torch.equal(system.clusters, kept[0])
    assert all(torch.equal(layer.weight, w) for layer, w in zip(system.prototypes, kept[1], strict=True))
    unseen = {"views": [v[:4] for v in batch(9)["views"]], "index": torch.arange(16, 20)}
    assert system.step(unseen)["loss"].item() == 0
    mixed = {"views": batch(9)["views"], "index": torch.tensor([0, 1, 2, 3, 16, 17, 18, 19])}
    assert torch.isfinite(system.step(mixed)["loss"])


def test_it_learns_and_a_checkpoint_goes_on():
    system = tiny()
    train(system, 0, 5)
    other = tiny(seed=4)
    other.load_state_dict(system.state_dict())
    one, two = (s.step(batch(7))["loss"] for s in (system, other))
    assert torch.equal(one, two)
    assert all(p.grad is None for layer in system.prototypes for p in layer.parameters())
    losses = train(tiny(), 0, 40)
    assert sum(losses[-4:]) < sum(losses[2:6])


def test_what_cannot_be_is_said():
    for wrong in ([], [1], [21]):
        with pytest.raises(UsageError, match=r"from 2 to that of the samples \(20\)"):
            tiny(num_prototypes=wrong)
    with pytest.raises(UsageError, match="at least two views"):
        tiny().step({"views": [torch.randn(4, 6)], "index": torch.arange(4)})
