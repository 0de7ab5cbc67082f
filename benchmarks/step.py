"""What a CAPro step costs beside a plain cross-entropy step of the same network and batch, in interleaved rounds, medians.

    python benchmarks/step.py [out.json]

Tensors in memory, batch 64, cleaning and prototypes on. Three phases of training:

trained     all is trained; the floor is 1.33: one more forward pass, for the keys
frozen      the first epochs of the paper, in which the encoder is frozen: both views pass it without gradient. Beside the
            plain step of the trained network (`ratio`), and beside a plain step over the frozen one (`ratio_frozen`, floor 2)
features    the `small` preset: both views are features, computed before; the plain step is one linear layer
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from contralto.encoders.image import freeze, image_encoder
from contralto.pipelines.outputs import environment
from contralto.systems.webly.capro import CAPro

CASES = (("resnet8", 32), ("timm/resnet18", 64), ("efficientnet-lite0", 72))
CLASSES, BATCH, ROUNDS = 30, 64, 15


def stepper(encoder, num_features, shape, stage, *, frozen=False):
    """A function that takes one training step and returns its seconds."""
    system = CAPro(
        encoder, CLASSES, num_features, stage=stage, hidden=512, queue_size=2048, init_proto_epoch=0, start_clean_epoch=0,
        momentum_prototype=0.99, text_weight=0.5,
    ).train()  # fmt: skip
    optimizer = system.configure_optimizers()
    if frozen:
        freeze(system.encoder)
    batch = {
        "views": [torch.randn(BATCH, *shape) for _ in range(2)], "label": torch.randint(CLASSES, (BATCH,)),
        "anchor": torch.rand(BATCH) < 0.2, "weight": torch.ones(BATCH), "text_scores": torch.full((BATCH, CLASSES), 1 / CLASSES),
    }  # fmt: skip

    def step():
        started = time.perf_counter()
        loss = system.step(batch, epoch=5)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - started

    return step


def measure(steppers, rounds=ROUNDS):
    """Seconds of every stepper in every round, after one to warm up."""
    for step in steppers.values():
        step()
    return [{name: step() for name, step in steppers.items()} for _ in range(rounds)]


def milliseconds(told, name):
    return round(1000 * statistics.median(t[name] for t in told), 2)


def ratio(told, ours, theirs):
    return round(statistics.median(t[ours] / t[theirs] for t in told), 2)


def main(out: Path) -> None:
    torch.manual_seed(0)
    rows = []
    for name, size in CASES:

        def make(stage, frozen=False, name=name, size=size):
            encoder = image_encoder(name, pretrained=False, size=size)
            return stepper(encoder, encoder.num_features, (3, size, size), stage, frozen=frozen)

        told = measure(
            {
                "plain": make("plain"), "capro": make("capro"), "plain frozen": make("plain", True),
                "capro frozen": make("capro", True),
            }
        )  # fmt: skip
        common = {"encoder": name, "size": size, "batch": BATCH, "rounds": ROUNDS}
        plain = {"plain_ms": milliseconds(told, "plain")}
        rows.append(
            {
                "phase": "trained", **common, **plain, "capro_ms": milliseconds(told, "capro"),
                "ratio": ratio(told, "capro", "plain"),
            }
        )  # fmt: skip
        rows.append(
            {
                "phase": "frozen", **common, **plain, "plain_frozen_ms": milliseconds(told, "plain frozen"),
                "capro_ms": milliseconds(told, "capro frozen"), "ratio": ratio(told, "capro frozen", "plain"),
                "ratio_frozen": ratio(told, "capro frozen", "plain frozen"),
            }
        )  # fmt: skip
        print(json.dumps(rows[-2]), json.dumps(rows[-1]), sep="\n", flush=True)
    steppers = {s: stepper(nn.Identity(), 1280, (1280,), s) for s in ("plain", "capro")}
    told = measure(steppers, 20 * ROUNDS)
    rows.append(
        {
            "phase": "features", "features": 1280, "batch": BATCH, "rounds": 20 * ROUNDS, "plain_ms": milliseconds(told, "plain"),
            "capro_ms": milliseconds(told, "capro"), "ratio": ratio(told, "capro", "plain"),
        }
    )  # fmt: skip
    print(json.dumps(rows[-1]), flush=True)
    text = json.dumps({"command": "python benchmarks/step.py", "environment": environment(), "rows": rows}, indent=1)
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("results/step.json"))
