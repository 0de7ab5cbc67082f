"""What every system of the registry that trains an encoder must do, whatever it is.

Self-supervised systems are built and fed here; another group of systems tells how in `steps.py` of its test folder: `build(name,
**arguments)` and `batch(name, system, seed, n)`.
"""

import copy
import importlib
import inspect

import pytest
import torch
from torch import nn

from contralto.errors import ContraltoError, UsageError
from contralto.systems.base import EncoderSystem
from contralto.systems.registry import SYSTEMS, get_job, get_system
from contralto.views.batched import draw_batch

GROUPS = ("selfsup", "discovery", "continual", "fewshot", "finetuning", "regression")
NAMES = [name for name, entry in SYSTEMS.items() if entry.path.split(".")[2] in GROUPS]
SMALL = {"hidden": 16, "dim": 8, "queue_size": 32, "batch_size": 16, "epochs": 2, "hardest": 4}
WIDTH, SIZE, SAMPLES = 12, 16, 24


class Tiny(nn.Module):
    """The smallest encoder that knows all that an `ImageEncoder` does."""

    size, mean, std, num_features = SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), WIDTH

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, WIDTH, 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(),
        )  # fmt: skip

    def forward_map(self, x):
        return self.layers(x)

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def of_group(name):
    """The ways of the group of a system, or None for a self-supervised one."""
    group = SYSTEMS[name].path.split(".")[2]
    return None if group == "selfsup" else importlib.import_module(f"tests.systems.{group}.steps")


def build(name, **arguments):
    if of_group(name):
        return of_group(name).build(name, **arguments).train()
    system = get_system(name)
    names = inspect.signature(system).parameters
    small = {k: v for k, v in SMALL.items() if k in names}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Tiny()
    facts = {"num_features": WIDTH, "num_samples": SAMPLES, "steps_per_epoch": 3}
    return system(encoder, **facts, **(small | arguments)).train()


def batch(name, system, seed=0, n=8):
    if of_group(name):
        return of_group(name).batch(name, system, seed, n)
    g = torch.Generator().manual_seed(seed)
    pictures = torch.randint(256, (n, 3, 24, 24), generator=g, dtype=torch.uint8)
    index = torch.randperm(SAMPLES, generator=g)[:n]
    views = system.views(SIZE, Tiny.mean, Tiny.std)
    pixels, boxes = draw_batch(views, pictures, None, seed=0, epoch=seed, index=index)
    return {"views": pixels, "boxes": boxes, "index": index, "label": torch.arange(n) % 2}


def steps(name, system, optimizer, schedule, first, count):
    losses = []
    for i in range(first, first + count):
        loss = system.step(batch(name, system, i))["loss"]
        loss.backward()
        system.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        system.at_step_end()
        losses.append(loss.item())
    return losses


def parts(system):
    [optimizer], [schedule] = system.optimizers_and_schedules()
    return optimizer, schedule


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    def test_one_step_has_finite_gradients_and_reaches_the_encoder(self, name):
        system = build(name)
        first = batch(name, system)
        out = system.step(first)
        assert out["loss"].ndim == 0
        assert not out["features"].requires_grad
        assert len(out["features"]) == len(first["views"][0])
        out["loss"].backward()
        grads = [p.grad for p in system.encoder.parameters()]
        assert all(g is not None and torch.isfinite(g).all() for g in grads)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in system.parameters())

    def test_saved_and_loaded_it_takes_the_same_next_steps(self, name):
        system = build(name)
        optimizer, schedule = parts(system)
        steps(name, system, optimizer, schedule, 0, 2)
        other = build(name)
        other.load_state_dict(copy.deepcopy(system.state_dict()))
        again, later = parts(other)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        later.load_state_dict(schedule.state_dict())
        torch.manual_seed(3)  # dropout and its like
        first = steps(name, system, optimizer, schedule, 2, 3)
        torch.manual_seed(3)
        assert first == steps(name, other, again, later, 2, 3)
        assert other.done == system.done == 5
        assert all(
            torch.equal(a, b) for a, b in zip(system.state_dict().values(), other.state_dict().values(), strict=True)
        )

    def test_two_identical_runs_agree(self, name):
        runs = []
        for _ in range(2):
            system = build(name)
            torch.manual_seed(3)
            runs.append(steps(name, system, *parts(system), 0, 3))
        assert runs[0] == runs[1]

    def test_construction_leaves_the_global_random_state_alone(self, name):
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        build(name)
        assert torch.equal(torch.rand(1), expected)

    def test_a_batch_of_one_is_refused_with_a_sentence(self, name):
        system = build(name)
        one = batch(name, system, n=2)
        one = {k: [x[:1] for x in v] if isinstance(v, list) else v[:1] for k, v in one.items()}
        with pytest.raises(UsageError, match="two"):
            system.step(one)

    def test_what_is_no_number_is_named_by_its_sample(self, name):
        system = build(name)
        broken = batch(name, system)
        for view in broken["views"]:
            view[3].view(-1)[0] = torch.nan
        with pytest.raises(ContraltoError, match=f"sample {int(broken['index'][3])} holds"):
            system.training_step(broken, 0)

    def test_embeddings_are_rows_of_the_encoder(self, name):
        system = build(name).eval()
        x = batch(name, system)["views"][0]
        with torch.no_grad():
            found = system.embed(x)
        assert found.ndim == 2
        assert len(found) == len(x)

    def test_the_command_line_can_be_made_of_it(self, name):
        system = get_system(name)
        assert issubclass(system, EncoderSystem)
        for parameter in list(inspect.signature(system).parameters.values())[1:]:
            assert parameter.kind is parameter.KEYWORD_ONLY, parameter
            assert parameter.annotation is not parameter.empty, parameter
        assert get_job(name).system is system
