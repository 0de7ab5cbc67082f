"""Learn to write ten spoken words, two at a time, in a loop of your own, and see what is written of each after every task.

    python examples/spoken_digits.py RECORDINGS [PICTURE.png]

RECORDINGS is a folder of a class per folder with WAV or FLAC files, a table, or Parquet with bytes, such as the Free Spoken Digit
Dataset. Two recordings of every word are kept. Under a minute on one core; needs contralto[sound], the picture contralto[plots].
For a run folder with model and page: contralto fit coconut RECORDINGS --preset small --out RUN
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from contralto.data.sounds import SoundDataset, read_sounds
from contralto.data.tasks import TaskSampler, split_by_class, task_of_samples
from contralto.data.texts import Characters
from contralto.encoders.audio import ConvGRUEncoder
from contralto.evaluation.continual import accuracy_matrix, continual_scores
from contralto.systems.continual.coconut import COCONUT
from contralto.views.audio import LogMel, spectrograms

if len(sys.argv) < 2:
    sys.exit(__doc__)
with tempfile.TemporaryDirectory() as folder:
    sounds = read_sounds(sys.argv[1], Path(folder) / "sounds", rate=8000, seconds=1.0)
    frames = spectrograms(sounds, LogMel(8000))
labels, texts = sounds.column("label").astype(np.int64), sounds.column("text").tolist()
place = np.random.default_rng(0).permutation(len(labels))
test = np.sort(np.concatenate([place[labels[place] == c][:20] for c in range(len(sounds.classes))]))
train = np.concatenate([place[labels[place] == c][20:120] for c in range(len(sounds.classes))])
letters = Characters.learn(texts, least=1)
length = letters.longest(texts)
fields = {"label": torch.from_numpy(labels), "text": torch.from_numpy(letters.encode(texts, length=length))}
tasks = split_by_class(np.where(np.isin(np.arange(len(labels)), train), labels, -1), 5, seed=0)

torch.manual_seed(0)
system = COCONUT(
    ConvGRUEncoder(40, 64), num_features=64, num_classes=len(sounds.classes), vocabulary=len(letters), length=length, epochs=20,
    extra_epochs=20, batch_size=38, replayed=6, memory_size=2 * len(sounds.classes), fixed_quota=True, lr=1e-3, dim=64, beam=1,
)  # fmt: skip
written, epochs = [], 0
for task in tasks:
    memory = system.memory.index.numpy()
    batches = TaskSampler(task.rows, 38, seed=0, memory=memory, replayed=6, first_epoch=epochs)
    data = SoundDataset(frames.take, fields, memory)
    system.begin_task(task.classes, steps_per_epoch=len(batches))
    [optimizer], [schedule] = system.optimizers_and_schedules()
    system.train()
    for epoch in range(system.task_epochs):
        batches.set_epoch(epoch)
        for keys in batches:
            batch = system.on_after_batch_transfer(data.__getitems__(keys), 0)  # draws moves and noise
            system.step(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            system.at_step_end()
    epochs += system.task_epochs
    system.end_task(torch.from_numpy(task.rows), fields["label"][task.rows])
    system.eval()
    x, lengths = (torch.from_numpy(part) for part in frames.take(test))
    written.append(letters.decode(system.write(x, lengths).numpy()))
    print(f"{task.name}: {', '.join(sounds.classes[c] for c in task.classes)}")

right = [[said == texts[row] for said, row in zip(answers, test, strict=True)] for answers in written]
test_tasks = task_of_samples(tasks, labels[test])
print(np.round(100 * accuracy_matrix(right, test_tasks)))
for name, score in continual_scores(right, test_tasks).items():
    print(f"{name}: {score.value:.1%} ({score.low:.1%} to {score.high:.1%})")

if len(sys.argv) > 2:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [int(np.flatnonzero(labels[test] == c)[0]) for task in tasks for c in task.classes]
    figure, axes = plt.subplots(len(shown), len(tasks) + 1, figsize=(8, 0.62 * len(shown)), squeeze=False)
    for line, sample in zip(axes, shown, strict=True):
        spectrogram, _ = frames.take([test[sample]])
        line[0].imshow(spectrogram[0].T, origin="lower", aspect="auto", cmap="magma")
        line[0].set_ylabel(texts[test[sample]], rotation=0, ha="right", va="center")
        for number, cell in enumerate(line[1:]):
            come = test_tasks[sample] <= number
            good = right[number][sample]
            cell.set_facecolor("white" if not come else "#cfe8d5" if good else "#f3d3cf")
            cell.text(
                0.5, 0.5, written[number][sample] if come else "", ha="center", va="center", transform=cell.transAxes
            )
        for cell in line:
            cell.set_xticks([])
            cell.set_yticks([])
    for number, cell in enumerate(axes[0]):
        cell.set_title("heard" if number == 0 else f"after task {number}", fontsize=10)
    figure.tight_layout(pad=0.3)
    figure.savefig(sys.argv[2], dpi=110)
