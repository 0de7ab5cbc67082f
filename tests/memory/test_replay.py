"""What is kept of earlier tasks: the right samples, never more than there is room for, the same after a checkpoint."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from contralto.errors import UsageError
from contralto.memory.replay import ReplayMemory, barycenter, closest_to_mean, herd
from contralto.memory.teacher import Teacher

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "herding.npz", allow_pickle=False)


@pytest.mark.parametrize(("rule", "key"), [("closest", "closest_to_mean"), ("barycenter", "barycenter")])
def test_the_released_code_chooses_the_same_samples_in_the_same_order(rule, key):
    features, labels = torch.from_numpy(REFERENCE["features"]), torch.from_numpy(REFERENCE["labels"])
    assert herd(features, labels, 4, rule).tolist() == REFERENCE[key].tolist()


def test_the_first_of_a_choice_are_the_smaller_choice():
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)) + 1
    for choose in (closest_to_mean, barycenter):
        assert choose(x, 20)[:7].tolist() == choose(x, 7).tolist()
        assert len(set(choose(x, 50).tolist())) == 50
        assert len(choose(x, 80)) == 50


def test_the_barycenter_of_what_is_herded_is_close_to_that_of_all():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    unit = nn.functional.normalize(x, dim=1)
    off = (unit[barycenter(x, 10)].mean(0) - unit.mean(0)).norm()
    drawn = [torch.randperm(200, generator=torch.Generator().manual_seed(s))[:10] for s in range(20)]
    assert off < min((unit[rows].mean(0) - unit.mean(0)).norm() for rows in drawn)


def test_equal_samples_do_not_stop_the_herding():
    assert sorted(barycenter(torch.ones(5, 2), 3, iterations=10).tolist()) != []
    assert len(set(barycenter(torch.ones(5, 2), 3, iterations=10).tolist())) == 3


def filled(rule, size=20, tasks=4, per_class=15):
    memory = ReplayMemory(size, rule=rule, seed=3)
    g = torch.Generator().manual_seed(0)
    for task in range(tasks):
        index = torch.arange(2 * per_class) + 1000 * task
        labels = 2 * task + index % 2
        if rule == "reservoir":
            for part, label in zip(index.split(7), labels.split(7), strict=True):
                memory.observe(part, label)
        else:
            memory.add(index, labels, torch.randn(len(index), 3, generator=g))
        assert len(memory) <= size
    return memory


@pytest.mark.parametrize("rule", ["random", "closest", "barycenter"])
def test_classes_have_the_same_quota_and_old_ones_keep_their_first(rule):
    three, four = filled(rule, tasks=3), filled(rule, tasks=4)
    assert three.label.bincount().tolist() == [3] * 6  # 20 // 6
    assert four.label.bincount().tolist() == [2] * 8
    for c in range(6):
        assert four.index[four.label == c].tolist() == three.index[three.label == c][:2].tolist()
    assert (four.index // 1000 == four.label // 2).all()


def test_a_fixed_quota_is_there_from_the_beginning():
    memory = ReplayMemory(20, rule="random", num_classes=10)
    memory.add(torch.arange(30), torch.arange(30) % 2)
    assert memory.label.bincount().tolist() == [2, 2]


def test_a_class_that_comes_again_has_a_place_for_each_time():
    memory = ReplayMemory(8, rule="random")
    memory.add(torch.arange(10), torch.arange(10) % 2)
    memory.add(torch.arange(100, 110), torch.arange(10) % 2)
    assert memory.label.bincount().tolist() == [4, 4]
    assert ((memory.index < 100).sum(), (memory.index >= 100).sum()) == (4, 4)


def test_a_reservoir_keeps_all_alike():
    counts = torch.zeros(60)
    for seed in range(600):
        memory = ReplayMemory(12, rule="reservoir", seed=seed)
        for part in torch.arange(60).split(7):
            memory.observe(part, torch.zeros_like(part))
        assert len(set(memory.index.tolist())) == 12
        counts[memory.index] += 1
    expected = 600 * 12 / 60
    chi = ((counts - expected) ** 2 / (expected * (1 - 12 / 60))).sum()
    assert chi < 59 + 4 * (2 * 59) ** 0.5


@pytest.mark.parametrize("rule", ["random", "barycenter", "reservoir"])
def test_saved_and_loaded_it_goes_on_the_same(rule):
    whole, part = filled(rule, tasks=3), ReplayMemory(20, rule=rule, seed=3)
    part.load_state_dict(copy.deepcopy(filled(rule, tasks=2).state_dict()))
    index = torch.arange(30) + 2000
    features = torch.randn(30, 3, generator=torch.Generator().manual_seed(9))
    first = filled(rule, tasks=2)
    for memory in (part, first):
        if rule == "reservoir":
            memory.observe(index, 4 + index % 2)
        else:
            memory.add(index, 4 + index % 2, features)
    assert all(torch.equal(a, b) for a, b in zip(part.state_dict().values(), first.state_dict().values(), strict=True))
    assert len(whole) == len(part)


def test_the_memory_is_as_large_as_what_it_keeps():
    state = ReplayMemory(1000, rule="reservoir").state_dict()
    assert sum(v.numel() for v in state.values()) == 3 * 1000 + 2


def test_what_does_not_fit_is_refused_with_a_sentence():
    with pytest.raises(UsageError, match="at least 1"):
        ReplayMemory(0)
    with pytest.raises(UsageError, match="rule"):
        ReplayMemory(4, rule="best")
    with pytest.raises(UsageError, match="no place"):
        ReplayMemory(2, rule="random").add(torch.arange(6), torch.arange(6) % 3)
    with pytest.raises(UsageError, match="features"):
        ReplayMemory(4).add(torch.arange(6), torch.arange(6) % 3)
    with pytest.raises(UsageError, match="observe"):
        ReplayMemory(4, rule="reservoir").add(torch.arange(6), torch.arange(6) % 3)
    with pytest.raises(UsageError, match="add"):
        ReplayMemory(4).observe(torch.arange(6), torch.arange(6) % 3)
    with pytest.raises(UsageError, match="generator"):
        herd(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), 1, "random")


class TestTeacher:
    def net(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def test_in_training_mode_it_sees_the_batch_as_the_student_does(self):
        net, x = self.net(), torch.randn(16, 3) + 5
        for mode in ("train", "eval"):
            teacher = Teacher(mode=mode, net=net).train()
            teacher.take(net=net)
            assert teacher.parts["net"][1].training == (mode == "train")
            before = teacher.parts["net"][1].running_mean.clone()
            teacher("net", x)
            assert torch.equal(before, teacher.parts["net"][1].running_mean) == (mode == "eval")
            teacher.eval()
            before = teacher.parts["net"][1].running_mean.clone()
            teacher("net", x)  # in use, no statistics move
            assert torch.equal(before, teacher.parts["net"][1].running_mean)

    def test_it_is_a_copy_without_gradient_and_part_of_the_state(self):
        net = self.net()
        teacher = Teacher(net=net)
        assert not bool(teacher.taken)
        with torch.no_grad():
            net[0].weight += 1
        assert not torch.equal(teacher.parts["net"][0].weight, net[0].weight)
        teacher.take(net=net)
        assert torch.equal(teacher.parts["net"][0].weight, net[0].weight)
        assert not any(p.requires_grad for p in teacher.parameters())
        other = Teacher(net=self.net())
        other.load_state_dict(teacher.state_dict())
        assert bool(other.taken)
        with pytest.raises(UsageError, match="cannot take"):
            teacher.take(head=net)
        with pytest.raises(UsageError, match="mode"):
            Teacher(mode="asleep", net=net)
