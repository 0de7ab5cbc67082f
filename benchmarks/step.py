"""What a CAPro step costs beside a plain cross-entropy step of the same network and batch, in pairs, medians.

    python benchmarks/step.py [out.json]

Tensors in memory, batch 64, encoder not frozen, cleaning and prototypes on.
The floor is 1.33: one more forward pass, for the keys.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from contralto.encoders.image import image_encoder
from contralto.pipelines.outputs import environment
from contralto.systems.webly.capro import CAPro

CASES = (("resnet8", 32), ("timm/resnet18", 64), ("efficientnet-lite0", 72))
CLASSES, BATCH, PAIRS = 30, 64, 15


def stepper(name, size, stage):
    """A function that takes one training step and returns its seconds."""
    encoder = image_encoder(name, pretrained=False, size=size)
    system = CAPro(
        encoder, CLASSES, encoder.num_features, stage=stage, hidden=512, queue_size=2048, init_proto_epoch=0, start_clean_epoch=0,
        momentum_prototype=0.99, text_weight=0.5,
    ).train()  # fmt: skip
    optimizer = system.configure_optimizers()
    batch = {
        "views": [torch.randn(BATCH, 3, size, size) for _ in range(2)], "label": torch.randint(CLASSES, (BATCH,)),
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


def main(out: Path) -> None:
    torch.manual_seed(0)
    rows = []
    for name, size in CASES:
        plain, ours = stepper(name, size, "plain"), stepper(name, size, "capro")
        for warm_up in (plain, ours):
            warm_up()
        pairs = [(plain(), ours()) for _ in range(PAIRS)]
        row = {
            "encoder": name, "size": size, "batch": BATCH, "pairs": PAIRS,
            "plain_ms": round(1000 * statistics.median(p for p, _ in pairs), 1),
            "capro_ms": round(1000 * statistics.median(o for _, o in pairs), 1),
            "ratio": round(statistics.median(o / p for p, o in pairs), 2),
        }  # fmt: skip
        rows.append(row)
        print(*row.values(), flush=True)
    text = json.dumps({"command": "python benchmarks/step.py", "environment": environment(), "rows": rows}, indent=1)
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("results/step.json"))
