"""Fine-tuning, replay, LwF and joint training: what each adds, and that a whole stream goes as it must."""

import pytest
import torch
from torch.nn import functional as F

from contralto.data.tasks import TaskSampler, split_by_class
from contralto.errors import UsageError
from contralto.systems.continual.baselines import LwF
from contralto.systems.registry import SYSTEMS

from tests.systems.continual import steps

ALL = ["finetune", "replay", "lwf", "joint", "prd"]


def test_a_sample_finds_its_class_among_those_of_its_task_or_all_so_far():
    for compare in ("task", "seen"):
        system = steps.build("finetune", compare=compare)
        first = steps.batch("finetune", system)
        x, labels = torch.cat(first["views"]), first["label"].repeat(2)
        logits = system.head(system.encoder(x))
        wanted = F.cross_entropy(logits[:, 2:], labels - 2) if compare == "task" else F.cross_entropy(logits, labels)
        torch.testing.assert_close(system.step(first)["loss"], wanted)
    old = steps.batch("finetune", system, classes=(0, 2))
    system = steps.build("finetune", compare="task")
    assert system.rivals(old["label"])[:2].tolist() == [[True, True, False, False], [False, False, True, True]]


def test_classes_of_a_domain_that_comes_again_are_compared_with_those_of_the_domain():
    system = steps.build("finetune", task=0)
    system.end_task()
    system.begin_task([1, 2])
    assert system.task_of_class.tolist() == [0, 0, 1, -1]
    assert system.rivals(torch.tensor([1, 2, 0])).tolist() == [
        [False, True, True, False], [False, True, True, False], [True, True, False, False]
    ]  # fmt: skip


def test_lwf_keeps_the_answers_of_every_earlier_task():
    system = steps.build("lwf", task=0)
    system.end_task()
    system.begin_task([2])
    system.end_task()
    system.begin_task([3])
    with torch.no_grad():
        system.encoder[0].weight += 0.1 * torch.randn_like(system.encoder[0].weight)
    first = steps.batch("lwf", system, classes=(3,))
    x = torch.cat(first["views"])
    out = system.step(first)
    with torch.no_grad():
        own, old = system.head(system.encoder(x)), system.teacher("head", system.teacher("encoder", x))
        wanted = F.kl_div((own[:, :2] / 2).log_softmax(1), (old[:, :2] / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(out["distillation"], wanted)  # the second task has one class: nothing to keep
    torch.testing.assert_close(out["loss"], out["distillation"])  # the only class of its task is certain
    assert all(p.grad is None for p in system.teacher.parameters())


def test_replay_keeps_and_takes_part_of_earlier_tasks():
    system = steps.build("replay")
    assert system.memory.label.tolist() == [0] * 4 + [1] * 4
    assert not system.wants_features
    both = steps.batch("replay", system, classes=(0, 2))
    system.step(both)["loss"].backward()
    assert (system.head.weight.grad != 0).any(1).tolist() == [True, True, True, True]
    assert steps.build("replay", memory_rule="barycenter").wants_features
    with pytest.raises(UsageError, match="fine-tuning"):
        steps.build("replay", memory_size=0)


def test_a_reservoir_takes_new_samples_in_the_first_epoch_only():
    system = steps.build("replay", task=0, memory_rule="reservoir", memory_size=20)
    for step in range(6):  # three steps are an epoch
        batch = steps.batch("replay", system, step, classes=(0, 1)) | {"index": torch.arange(8) + 8 * step}
        system.step(batch | {"replayed": torch.arange(8) >= 6})
        system.at_step_end()
    assert sorted(system.memory.index.tolist()) == [i + 8 * step for step in range(3) for i in range(6)]
    system.end_task()  # chooses nothing more
    assert len(system.memory) == 18


@pytest.mark.parametrize("name", ALL)
def test_a_system_saved_between_tasks_goes_on_the_same(name):
    one, other = steps.build(name, task=0), steps.build(name, task=0)
    index = torch.arange(12)
    for system in (one, other):
        system.end_task(index, index % 2, torch.randn(12, steps.WIDTH))
    fresh = steps.build(name, kind=steps.SYSTEMS[name], task=0)
    fresh.load_state_dict(one.state_dict())
    losses = []
    for system in (one, fresh):
        system.begin_task([2, 3])
        [optimizer], _ = system.optimizers_and_schedules()
        for step in range(3):
            loss = system.step(steps.batch(name, system, step))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            system.at_step_end()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]
    state = zip(one.state_dict().values(), fresh.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in state)


def test_a_stream_in_a_plain_loop_and_who_forgets():
    """Four classes as corners: fine-tuning over all classes forgets, replay and joint training do not."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 4
    x = 0.3 * torch.randn(80, 3, 16, 16, generator=g)
    x[:, :, :8] += (labels % 2).view(-1, 1, 1, 1) * 2.0 - 1
    x[:, :, :, :8] += (labels // 2).view(-1, 1, 1, 1) * 2.0 - 1
    right = {}
    for name, arguments in (("finetune", {"compare": "seen"}), ("replay", {"replayed": 4}), ("joint", {})):
        system = steps.build(name, kind=steps.SYSTEMS[name], task=0, epochs=10, milestones=(), **arguments)
        for number, task in enumerate(split_by_class(labels.numpy(), 2)):
            rows = torch.arange(80).numpy() if number and system.keeps_all else task.rows
            memory = () if system.memory is None else system.memory.index.numpy()
            sampler = TaskSampler(rows, 8, seed=0, memory=memory, replayed=system.replayed)
            if number:
                system.begin_task(task.classes, steps_per_epoch=len(sampler))
            system.steps_per_epoch = len(sampler)
            [optimizer], [schedule] = system.optimizers_and_schedules()
            for epoch in range(system.task_epochs):
                sampler.set_epoch(epoch)
                for keys in sampler:
                    index = torch.tensor([row for _, row in keys])
                    system.step({"views": [x[index]], "index": index, "label": labels[index]})["loss"].backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                    system.at_step_end()
            rows = torch.from_numpy(task.rows)
            system.end_task(rows, labels[rows])
        with torch.no_grad():
            right[name] = (system.eval().predict_logits(x).argmax(1) == labels)[labels < 2].float().mean().item()
    assert right["finetune"] < 0.2
    assert right["replay"] > 0.8
    assert right["joint"] > 0.9


def test_other_arguments_are_refused():
    with pytest.raises(UsageError, match="compare"):
        steps.build("finetune", compare="none")
    with pytest.raises(UsageError, match="num_classes"):
        steps.build("finetune", num_classes=1)
    with pytest.raises(UsageError, match="needs index and labels"):
        steps.build("replay").end_task()
    assert LwF is steps.SYSTEMS["lwf"]


def test_the_registry_names_them():
    assert {"prd", "finetune", "replay", "lwf", "joint"} <= set(SYSTEMS)
