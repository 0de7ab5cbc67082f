"""Training steps per second of the systems that work with prototypes, each beside its plain baseline, in turns, medians.

    python benchmarks/steps.py [out.json] [--rounds 15]

Tensors in memory, one network and batch for both: 64 pictures of 32 px by `resnet8` (SuSana: an episode of 5 classes, 1 + 15
pictures of each; COCONUT: 32 recordings of 100 frames by its small encoder and decoder), ten classes. A step is forward pass,
loss, gradients, optimiser. Continual systems are in their second task, with a teacher; what looks at all samples once an epoch
is not in it. `ratio` is the median over rounds of the system's seconds by the baseline's. TMV-HLP takes no steps: its row is
whole fits on 2,000 samples in three views of 64 columns, beside scikit-learn's LabelSpreading over all columns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contralto.encoders.audio import ConvGRUEncoder
from contralto.encoders.image import image_encoder
from contralto.files import write_json
from contralto.pipelines.outputs import environment
from contralto.systems.base import EncoderSystem
from contralto.systems.continual.baselines import FineTuning as TaskByTask
from contralto.systems.continual.coconut import COCONUT
from contralto.systems.continual.prd import PRD
from contralto.systems.discovery.base import DiscoverySystem
from contralto.systems.discovery.gpc import GPC
from contralto.systems.discovery.protogcd import ProtoGCD
from contralto.systems.fewshot.protonet import ProtoNet
from contralto.systems.fewshot.susana import SuSana
from contralto.systems.finetuning.base import FineTuning
from contralto.systems.finetuning.core_tuning import CoreTuning
from contralto.systems.regression.base import Regression
from contralto.systems.regression.supremix import SupReMix
from contralto.systems.zeroshot.tmv_hlp import TMVHLP

BATCH, SIDE, CLASSES, SAMPLES = 64, 32, 10, 640
FACTS = {"num_samples": SAMPLES, "steps_per_epoch": 10, "epochs": 100}
Step = Callable[[], float]


def pictures(kind: type[EncoderSystem], **arguments: Any) -> EncoderSystem:
    """A system on a small network, the same for all."""
    torch.manual_seed(0)
    encoder = image_encoder("resnet8", size=SIDE)
    return kind(encoder, num_features=encoder.num_features, **(FACTS | arguments))


def batch(views: int, **fields: Tensor) -> dict[str, Any]:
    """Pictures with labels, of which a system takes as many views as it draws."""
    generator = torch.Generator().manual_seed(0)
    shown = [torch.randn(BATCH, 3, SIDE, SIDE, generator=generator) for _ in range(views)]
    return {"views": shown, "index": torch.arange(BATCH), "label": torch.arange(BATCH) % CLASSES} | fields


def stepper(system: EncoderSystem, given: dict[str, Any]) -> Step:
    """A function that takes one training step and returns its seconds."""
    system.train()
    [optimizer], [schedule] = system.optimizers_and_schedules()

    def step() -> float:
        started = time.perf_counter()
        loss = system.step(given)["loss"]
        optimizer.zero_grad()
        loss.backward()
        system.on_before_optimizer_step(optimizer)
        optimizer.step()
        schedule.step()
        system.at_step_end()
        return time.perf_counter() - started

    return step


def discovery() -> dict[str, tuple[Step, Step]]:
    """ProtoGCD and GPC beside the losses of instances that they share; half of the old classes' pictures have a label."""
    old, new = 6, 4
    label = torch.arange(BATCH) % CLASSES
    given = batch(2, label=torch.where((label < old) & (torch.arange(BATCH) // CLASSES % 2 == 0), label, -1))
    facts = {"num_classes": old, "num_new": new, "hidden": 512, "dim": 128}
    rng = np.random.default_rng(0)
    every = np.arange(SAMPLES) % CLASSES
    seen = np.where((every < old) & (np.arange(SAMPLES) // CLASSES % 2 == 0), every, -1)
    protogcd, gpc = pictures(ProtoGCD, **facts), pictures(GPC, wait_epochs=0, **facts)
    gpc.at_epoch_start(rng.normal(size=(SAMPLES, gpc.num_features)).astype(np.float32), seen)
    return {
        name: (stepper(system, given), stepper(pictures(DiscoverySystem, **facts), given))
        for name, system in (("protogcd", protogcd), ("gpc", gpc))
    }


def continual() -> dict[str, tuple[Step, Step]]:
    """PRD beside fine-tuning, both in their second task."""
    found = {}
    half = CLASSES // 2
    given = batch(2, label=half + torch.arange(BATCH) % half)
    for kind in (PRD, TaskByTask):
        system = pictures(kind, num_classes=CLASSES, batch_size=BATCH)
        index = torch.arange(SAMPLES)
        system.begin_task(list(range(half)))
        system.end_task(index, index % half, torch.randn(SAMPLES, system.num_features))
        system.begin_task(list(range(half, CLASSES)))
        found[kind] = stepper(system, given)
    return {"prd": (found[PRD], found[TaskByTask])}


def speech() -> dict[str, tuple[Step, Step]]:
    """COCONUT beside the same network without its two contrasts, in the second task, with an eighth of replayed recordings."""
    n, frames, mels, width, half = 32, 100, 40, 64, CLASSES // 2
    generator = torch.Generator().manual_seed(0)
    replayed = torch.arange(n) >= n - n // 8
    label = torch.where(replayed, 0, half) + torch.arange(n) % half
    words = torch.stack([torch.tensor([4 + c, 5 + c, 2]) for c in range(CLASSES)])
    given = {
        "views": [torch.randn(n, frames, mels, generator=generator)], "lengths": torch.full((n,), frames), "label": label,
        "text": words[label], "index": torch.arange(n), "replayed": replayed,
    }  # fmt: skip
    found = []
    for weights in ({}, {"nspt_weight": 0.0, "mm_weight": 0.0}):
        torch.manual_seed(0)
        system = COCONUT(
            ConvGRUEncoder(mels, width), num_features=width, num_classes=CLASSES, vocabulary=5 + CLASSES, length=5, replayed=4,
            dim=128, **FACTS, **weights,
        )  # fmt: skip
        index = torch.arange(SAMPLES)
        system.train()
        system.begin_task(list(range(half)))
        system.end_task(index, index % half, torch.randn(SAMPLES, width))
        system.begin_task(list(range(half, CLASSES)))
        found.append(stepper(system, given))
    return {"coconut": (found[0], found[1])}


def others() -> dict[str, tuple[Step, Step]]:
    """SuSana beside a prototypical network, Core-tuning beside cross-entropy, SupReMix beside the absolute error."""
    way, each = 5, 16
    order = torch.cat([torch.arange(way), torch.arange(way).repeat_interleave(each - 1)])
    episode = batch(0) | {
        "views": [torch.randn(len(order), 3, SIDE, SIDE)], "label": order, "index": torch.arange(len(order))
    }  # fmt: skip
    numbers = batch(2, number=torch.arange(BATCH).float() % 20)
    one = batch(1)
    return {
        "susana": (stepper(pictures(SuSana, way=way), episode), stepper(pictures(ProtoNet, way=way), episode)),
        "core_tuning": (
            stepper(pictures(CoreTuning, num_classes=CLASSES), one), stepper(pictures(FineTuning, num_classes=CLASSES), one),
        ),
        "supremix": (stepper(pictures(SupReMix), numbers), stepper(pictures(Regression), numbers)),
    }  # fmt: skip


BASELINES = {
    "protogcd": "losses of instances alone", "gpc": "losses of instances alone", "prd": "fine-tuning task by task",
    "coconut": "without its contrasts", "susana": "prototypical network", "core_tuning": "cross-entropy",
    "supremix": "absolute error", "tmv_hlp": "scikit-learn's LabelSpreading",
}  # fmt: skip


def transductive() -> tuple[Step, Step]:
    """TMV-HLP beside LabelSpreading over nearest neighbours."""
    from sklearn.semi_supervised import LabelSpreading

    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, 2000)
    views = [rng.normal(size=(CLASSES, 64))[y] + 2 * rng.normal(size=(2000, 64)) for _ in range(3)]
    few = np.where(np.arange(2000) < 50, y, -1)

    def timed(fit: Callable[[], Any]) -> Step:
        def step() -> float:
            started = time.perf_counter()
            fit()
            return time.perf_counter() - started

        return step

    return (
        timed(lambda: TMVHLP(standardise="all").fit(views, few)),
        timed(lambda: LabelSpreading(kernel="knn", n_neighbors=30, alpha=0.35).fit(np.hstack(views), few)),
    )


def measure(name: str, pair: tuple[Step, Step], rounds: int) -> dict[str, Any]:
    """Seconds of both in every round, after one to warm up, as rates and their ratio."""
    for step in pair:
        step()
    told = [[step() for step in pair] for _ in range(rounds)]
    ours, theirs = (statistics.median(t[i] for t in told) for i in (0, 1))
    return {
        "system": name, "baseline": BASELINES[name], "rounds": rounds,
        "per_second": round(1 / ours, 2), "baseline_per_second": round(1 / theirs, 2),
        "ratio": round(statistics.median(a / b for a, b in told), 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("results/steps.json"))
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, pair in (discovery() | continual() | speech() | others()).items():
        rows.append(measure(name, pair, asked.rounds))
        print(json.dumps(rows[-1]), flush=True)
    rows.append(measure("tmv_hlp", transductive(), min(asked.rounds, 5)))
    print(json.dumps(rows[-1]), flush=True)
    command = "python benchmarks/steps.py" + ("" if asked.rounds == 15 else f" --rounds {asked.rounds}")
    write_json(asked.out, {"command": command, "environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
