"""Two processes give what one process gives on the same global batch."""

from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.data.dataset import EpochSampler
from contralto.distributed import gather_rows, mean_weight
from contralto.systems.webly import capro_multilabel
from contralto.systems.webly.capro import CAPro
from contralto.systems.webly.capro_multilabel import CAProMultiLabel
from contralto.systems.webly.fopro import FoPro

from tests.ranks import average, on_two_ranks

CLASSES = 4
STAGES = ("plain", "vanilla", "capro", "finetune")
CASES = {  # stage, rows of the global batch, which rows are kept: all that score enough, or anchors only
    **{f"{stage}, {n} rows": (stage, n, "") for stage in STAGES for n in (12, 13)},
    "capro, none kept on the second rank": ("capro", 13, "first rank"),
    "capro, one kept at all": ("capro", 13, "one"),
    "capro, none kept at all": ("capro", 13, "none"),
    **{f"fopro, {stage}, {n} rows": (f"fopro {stage}", n, "") for stage in FoPro.stages for n in (12, 13)},
    "fopro, none kept on the second rank": ("fopro fopro", 13, "first rank"),
    **{f"several labels, {stage}, {n} rows": (f"multilabel {stage}", n, "") for stage in STAGES for n in (12, 13)},
    "several labels, none kept on the second rank": ("multilabel capro", 13, "first rank"),
    "several labels, one kept at all": ("multilabel capro", 13, "one"),
    "several labels, none kept at all": ("multilabel capro", 13, "none"),
}


pytestmark = pytest.mark.xdist_group("ranks")  # two processes are started once


def build(stage, kept):
    torch.manual_seed(0)
    same = {
        "hidden": 7,
        "dim": 5,
        "queue_size": 30,
        "init_proto_epoch": 0,
        "start_clean_epoch": 0,
        "momentum_prototype": 0.9,
    }
    if stage.startswith("multilabel "):
        system = CAProMultiLabel(
            nn.Linear(6, 8), CLASSES, 8, stage=stage.removeprefix("multilabel "), threshold=0.85, alpha=0.2, **same
        ).double()
        system.prototypes.copy_(F.normalize(torch.randn(CLASSES, 2, 5, dtype=torch.float64), dim=2))
        system.positive_weight.copy_(1 + torch.rand(CLASSES, dtype=torch.float64))
        return system
    same |= {"mixup": 0.0, "threshold": 2.0 if kept else 0.4}
    if stage.startswith("fopro "):
        rest = {"relation_clean_epoch": 0, "cleaning": "relation" if kept else "fusion"}
        system = FoPro(nn.Linear(6, 8), CLASSES, 8, stage=stage.removeprefix("fopro "), **rest, **same).double()
    else:
        system = CAPro(nn.Linear(6, 8), CLASSES, 8, stage=stage, keep_threshold=2.0 if kept else 0.26, **same).double()
    system.prototypes.copy_(F.normalize(torch.randn(CLASSES, 5, dtype=torch.float64), dim=1))
    return system


def batch(stage, step, n, kept, rows):
    g = torch.Generator().manual_seed(step)
    views = [torch.randn(n, 6, generator=g, dtype=torch.float64) for _ in range(2)]
    label, anchor = torch.randint(CLASSES, (n,), generator=g), torch.rand(n, generator=g) < 0.1
    if kept:
        anchor = {"first rank": torch.arange(n) % 2 == 0, "one": torch.arange(n) == 3, "none": torch.arange(n) < 0}[
            kept
        ]
    if stage.startswith("multilabel "):
        label = (torch.rand(n, CLASSES, generator=g) < 0.4).long()
        anchor = anchor.long().unsqueeze(1).expand(n, CLASSES)
    weight = torch.rand(n, generator=g, dtype=torch.float64)
    return {"views": [v[rows] for v in views], "label": label[rows], "anchor": anchor[rows], "weight": weight[rows]}


def train(stage, n, kept, rank=0, world=1):
    """Three steps: losses, corrected labels in the order of the global batch, and the state at the end."""
    system = build(stage, kept)
    optimizer = torch.optim.SGD([p for n, p in system.named_parameters() if not n.startswith("momentum")], 0.1)
    losses, corrected = [], []
    with noting(system, kept, corrected):
        for step in range(3):
            out = system.step(batch(stage, step, n, kept, torch.arange(n)[rank::world]), epoch=1)
            optimizer.zero_grad()
            out["loss"].backward()
            for p in system.parameters():
                if p.grad is not None:
                    p.grad = average(p.grad)
            optimizer.step()
            losses.append(average(out["loss"].detach()))
    return {"losses": torch.stack(losses), "corrected": corrected, "state": system.state_dict()}


def noting(system, kept, corrected):
    """Writes what the system makes of labels into a list, labels and which are kept, in the order of the global batch."""
    several = isinstance(system, CAProMultiLabel)
    owner, name = (capro_multilabel, "correct_entries") if several else (system, "_correct")
    if isinstance(system, FoPro):
        name = "judge"
    correct = getattr(owner, name)

    def noted(*words, **options):
        result = correct(*words, **options)
        if several:
            label, valid = result
            if kept:  # no score makes a rule ignore all entries of a picture
                valid = valid & (words[2] != 0)
                result = label, valid
        else:
            correction = result[0] if name == "judge" else result
            label, valid = correction.labels, correction.kept
        corrected.append(torch.stack([gather_rows(label), gather_rows(valid).long()]))
        return result

    return patch.object(owner, name, noted)


def both(rank, world):
    found = {name: train(*case, rank, world) for name, case in CASES.items()}
    uneven = gather_rows(torch.arange(5)[rank::world])
    empty = mean_weight(torch.tensor(3 if rank == 0 else 0))
    sampler = EpochSampler(13, seed=0)
    drawn = gather_rows(torch.tensor([row for _, row in sampler]))
    return {"cases": found, "uneven": uneven, "empty": empty, "drawn": drawn}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found."""
    return on_two_ranks(both, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(ranks, name):
    alone = train(*CASES[name])
    assert torch.isfinite(alone["losses"]).all()
    cleaned = name.startswith(("capro", "fopro, prototypes", "fopro, relation", "fopro, fopro", "fopro, none"))
    cleaned |= name.startswith(("several labels, capro", "several labels, none", "several labels, one"))
    assert len(alone["corrected"]) == (3 if cleaned else 0)
    for rank in ranks:
        found = rank["cases"][name]
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(found["corrected"], alone["corrected"], strict=True):
            assert torch.equal(ours, theirs)
        for key, value in alone["state"].items():  # weights, queue with its pointer, prototypes
            torch.testing.assert_close(
                found["state"][key], value, rtol=1e-8, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_the_cases_are_what_they_say():
    kept = {name: train(*case)["corrected"][0][1] for name, case in CASES.items() if name.startswith("capro")}
    assert 0 < kept["capro, 13 rows"].sum() < 13
    assert kept["capro, none kept on the second rank"].tolist() == [1, 0] * 6 + [1]
    assert kept["capro, one kept at all"].sum() == 1
    assert kept["capro, none kept at all"].sum() == 0
    assert train(*CASES["fopro, none kept on the second rank"])["corrected"][0][1].tolist() == [1, 0] * 6 + [1]
    several = {name: train(*case)["corrected"] for name, case in CASES.items() if name.startswith("several labels, ")}
    labels, valid = several["several labels, capro, 13 rows"][0]
    assert 0 < valid.sum() < 13 * CLASSES
    assert (labels != batch("multilabel ", 0, 13, "", torch.arange(13))["label"])[valid > 0].any()
    assert several["several labels, none kept on the second rank"][0][1].any(1).tolist() == [1, 0] * 6 + [1]
    assert several["several labels, one kept at all"][0][1].any(1).sum() == 1
    assert several["several labels, none kept at all"][0][1].sum() == 0


def test_rows_of_ranks_are_gathered_in_the_order_of_the_global_batch(ranks):
    alone = [row for _, row in EpochSampler(13, seed=0)]
    for number, rank in enumerate(ranks):
        assert rank["uneven"].tolist() == [0, 1, 2, 3, 4]
        assert rank["empty"] == (2.0 if number == 0 else 0.0)
        assert rank["drawn"].tolist() == [*alone, alone[0]]  # all ranks have as many: the first is taken twice
