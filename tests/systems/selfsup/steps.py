"""What tests of self-supervised systems share: a tiny network, batches of vectors, and a loop."""

import copy

import torch
from torch import nn

from tests.ranks import average

SAMPLES = 30


def encoder():
    """Without batch norm, which would see other batches on two ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh())


def without_batch_norm(system):
    """The system in double precision, its batch norms replaced by fixed scalings."""
    for name, module in list(system.named_modules()):
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            parent = system.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Identity())
    return system.double()


def batch(step, n=8, views=2):
    """Views of samples that are the same in all of them but for noise."""
    g = torch.Generator().manual_seed(step)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64)
    index = torch.randperm(SAMPLES, generator=g)[:n]
    pixels = [x + 0.3 * torch.randn(n, 6, generator=g, dtype=torch.float64) for _ in range(views)]
    return {"views": pixels, "index": index}


def share(whole, rank, world):
    """The rows of a batch that a rank has, views in double precision."""
    rows = torch.arange(len(whole["index"]))[rank::world]
    return {k: [v[rows].double() for v in x] if isinstance(x, list) else x[rows] for k, x in whole.items()}


def train(system, *, first=0, steps=3, n=8, views=2, rank=0, world=1, optimizer=None, make=None):
    """Losses of some steps, means over ranks; gradients are averaged over them as DDP does. `make` gives batches by step."""
    make = make or (lambda step: batch(step, n, views))
    optimizer = optimizer or torch.optim.SGD([p for p in system.parameters() if p.requires_grad], 0.1)
    losses = []
    for step in range(first, first + steps):
        loss = system.step(share(make(step), rank, world))["loss"]
        optimizer.zero_grad()
        loss.backward()
        for p in system.parameters():
            if p.grad is not None:
                p.grad = average(p.grad)
        optimizer.step()
        system.at_step_end()
        losses.append(average(loss.detach()))
    return torch.stack(losses)


def goes_on(build, *, views=2):
    """A system that was saved and loaded takes the same next steps, bit by bit."""
    one, other = build(), build()
    train(one, views=views)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(train(one, first=3, views=views), train(other, first=3, views=views))
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
