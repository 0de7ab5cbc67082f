"""Classes of which one picture is labelled: learn from five digits in episodes, then tell the other five apart.

    python examples/few_shot.py

Half a minute on one core. For pictures in files: contralto fit susana PICTURES --out RUN
"""

import numpy as np
import torch
from sklearn.datasets import load_digits

from contralto.claims.digits import conv_encoder
from contralto.data.episodes import EpisodeSampler
from contralto.evaluation.episodes import few_shot_accuracy
from contralto.systems.fewshot.susana import SuSana

EPISODES = 400

pictures, labels = load_digits(return_X_y=True)
pictures = torch.from_numpy(pictures / 16).float()
base = np.flatnonzero(labels % 2 == 0)  # even digits are learnt from
new = np.flatnonzero(labels % 2 == 1)

torch.manual_seed(0)
encoder = conv_encoder(64, widths=(32, 64, 64))
system = SuSana(
    encoder, num_features=64, way=5, shot=1, queries=5, epochs=1, steps_per_epoch=EPISODES, lr=1e-3,
    terms=["cross", "prototriplet"],
)  # fmt: skip
[optimizer], [schedule] = system.optimizers_and_schedules()


@torch.inference_mode()
def accuracy(shot: int) -> str:
    """Of the odd digits, five classes at once, over 600 episodes."""
    system.eval()
    found = few_shot_accuracy(system.embed(pictures[new]).numpy(), labels[new], way=5, shot=shot).accuracy
    system.train()
    return f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"


print(f"untrained: one shot {accuracy(1)}, five shots {accuracy(5)}")
for keys in EpisodeSampler(labels[base], way=5, shot=1, queries=5, seed=0, episodes=EPISODES):
    rows = base[[row for _, row in keys]]
    batch = {"views": [pictures[rows]], "index": torch.from_numpy(rows), "label": torch.from_numpy(labels[rows])}
    system.step(batch)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    system.at_step_end()
print(f"trained:   one shot {accuracy(1)}, five shots {accuracy(5)}")
