"""PRD's claim: arms in pairs, streams without a stored sample, measures of what is left."""

import numpy as np
import pytest
import torch

from contralto.claims import prd
from contralto.claims.digits import digits, pretrain
from contralto.claims.plan import find_claim
from contralto.data.tasks import split_by_class
from contralto.systems.continual.baselines import FineTuning, Joint
from contralto.systems.continual.prd import PRD

PLAN = find_claim("prd")
BUDGET = dict(PLAN.budget) | {"epochs": 3, "extra_epochs": 0, "test": 1397}


@pytest.fixture(scope="module")
def measured():
    return {arm: prd.run(settings, seed=101, data="digits", budget=BUDGET) for arm, settings in PLAN.arms.items()}


def test_all_arms_are_tested_on_the_same_digits(measured):
    first = measured["prd"]
    for found in measured.values():
        assert np.array_equal(found["labels"], first["labels"])
        assert found["task_incremental"].shape == found["class_incremental"].shape == (1397,)
        assert (found["task_incremental"] >= found["class_incremental"]).all()


def test_a_run_is_a_function_of_the_seed(measured):
    again = prd.run(PLAN.arms["prd"], seed=101, data="digits", budget=BUDGET)
    assert all(np.array_equal(again[k], v) for k, v in measured["prd"].items())
    other = prd.run(PLAN.arms["prd"], seed=102, data="digits", budget=BUDGET)
    assert not np.array_equal(other["task_incremental"], again["task_incremental"])


def test_an_encoder_that_learns_nothing_forgets_nothing(measured):
    assert measured["untrained"]["forgetting"] == measured["untrained"]["backward"] == 0
    assert measured["untrained"]["task_incremental"].mean() > 0.6
    assert measured["first task"]["forgetting"] == 0


def test_arms_of_prd_differ_in_the_distillation_alone(measured):
    settings = {name: PLAN.arms[name] for name in ("prd", "no distillation", "released code", "features")}
    assert {s["system"] for s in settings.values()} == {"prd"}
    assert all(set(s) <= {"system", "beta", "axis", "distill", "lr"} for s in settings.values())
    assert len({measured[name]["task_incremental"].tobytes() for name in settings}) == 4


def test_steps_see_samples_of_their_task_alone_and_nothing_is_kept(monkeypatch):
    seen, step = [], PRD.step

    def noted(self, batch):
        seen.append((int(self.task), batch["label"].tolist(), batch["index"].tolist()))
        return step(self, batch)

    monkeypatch.setattr(PRD, "step", noted)
    prd.run(PLAN.arms["prd"], seed=103, data="digits", budget=BUDGET)
    split = digits(103, test=1397)
    tasks = split_by_class(split.train_labels.numpy(), 5, seed=103)
    for number, labels, index in seen:
        assert set(labels) <= set(tasks[number].classes)
        assert set(index) <= set(tasks[number].rows.tolist())
    assert {number for number, _, _ in seen} == set(range(5))


def test_a_stream_learns_in_its_order_and_joint_training_sees_all():
    split = digits(104, test=1697)
    tasks = split_by_class(split.train_labels.numpy(), 2, seed=104)
    sizes = {}
    for kind in (FineTuning, Joint):
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh())
        system = kind(encoder, num_features=16, num_classes=10, epochs=1, extra_epochs=0, milestones=())
        rows = []

        def learn(system, make, number, rows=rows):
            rows.append(system.total_steps)
            pretrain(system, make)

        found = prd.learn_stream(system, split, tasks, batch_size=10, learn=learn)
        assert [np.isfinite(x[0]).sum() for x in found] == [5, 10]
        sizes[kind] = rows
    assert sizes[Joint][0] == sizes[FineTuning][0]
    assert sizes[Joint][1] > sizes[FineTuning][1]
