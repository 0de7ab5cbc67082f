"""The claim of COCONUT on spoken digits: new words are learnt with less loss of the old ones than by replay alone.

    contralto reproduce coconut

Recordings of ten words by six speakers (8 kHz, the first second), 100 of every word to learn from, drawn by the seed, and the
300 of the official test; log-mel spectrograms of 40 bands, every 10 ms. The words come in five tasks of two, in an order drawn by
the seed; the memory keeps two recordings of every word, drawn at random. Two convolutions and a GRU in both directions (64 wide)
read, a transformer decoder of one layer (64 wide, 4 heads) writes the word letter by letter; projections of 64. AdamW at 1e-3,
20 epochs a task and 40 in the first, 32 new recordings and 6 of the memory in every batch; moves by one frame and noise;
temperature 0.1 and weights of 0.1.

All arms of a seed see the same recordings, words in the same order, batches, views and first weights. A word counts when it is
written without a mistake, greedily. Measures: *last*, over all words after the last task; *average*, the mean over tasks of what
is right of all words so far.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from contralto.claims.arms import made_once
from contralto.claims.digits import pretrain
from contralto.data.sounds import Ragged, SoundDataset, Sounds, load_sounds, read_sounds
from contralto.data.tasks import Task, TaskSampler, split_by_class, task_of_samples
from contralto.data.texts import Characters, Vocabulary
from contralto.encoders.audio import ConvGRUEncoder
from contralto.errors import DataError
from contralto.systems.continual.coconut import COCONUT
from contralto.views.audio import LogMel, spectrograms

__all__ = ["build", "learn", "run", "spoken_digits"]

RATE, MELS = 8000, 40


def spoken_digits(work: Path) -> Sounds:
    """The recordings of `CONTRALTO_DATA`, read once into a folder that all arms share.

    Raises
    ------
    DataError
        If the data set is not there.
    """
    found = Path(os.environ.get("CONTRALTO_DATA", "")) / "spoken_digits" / "spoken_digits.parquet"
    if not found.is_file():
        raise DataError("spoken_digits was not found: set CONTRALTO_DATA to the folder that holds it")

    def make(folder: Path) -> None:
        sounds = read_sounds(str(found), folder / "sounds", rate=RATE, seconds=1.0)
        spectrograms(sounds, LogMel(RATE, MELS), folder / "spectrograms.npy")

    return load_sounds(made_once(work / "spoken_digits", make) / "sounds")


def build(arm: Mapping[str, Any], *, seed: int, budget: Mapping[str, Any], vocabulary: int, length: int) -> COCONUT:
    """The system of an arm.

    Examples
    --------
    >>> build({"nspt_weight": 0.0}, seed=0, budget={"epochs": 2}, vocabulary=20, length=6).task_epochs
    4
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ConvGRUEncoder(MELS, 64)
    epochs = int(budget["epochs"])
    settings = {
        "dim": 64,
        "lr": 1e-3,
        "memory_size": 20,
        "fixed_quota": True,
        "replayed": 6,
        "beam": 1,
        "length": length,
    }
    return COCONUT(
        encoder, num_features=64, num_classes=10, vocabulary=vocabulary, seed=seed, epochs=epochs, extra_epochs=epochs,
        batch_size=32 + 6, **settings | dict(arm),
    )  # fmt: skip


def learn(
    system: COCONUT, tasks: list[Task], data: SoundDataset, after: Callable[[int], None], *, device: str = "cpu"
) -> None:
    """Learn one task after another.

    Parameters
    ----------
    system : COCONUT
    tasks : list of Task
    data : SoundDataset
    after : function
        Called with the number of every task that has ended.
    device : str
    """
    first_epoch = 0
    for number, task in enumerate(tasks):
        memory = system.memory.index.cpu().numpy() if system.memory is not None else np.zeros(0, np.int64)
        data.memory = torch.from_numpy(memory)
        sampler = TaskSampler(
            task.rows, system.batch_size, seed=system.seed, memory=memory, replayed=system.replayed, first_epoch=first_epoch
        )  # fmt: skip
        system.begin_task(task.classes, steps_per_epoch=len(sampler))

        def make(step: int, sampler: TaskSampler = sampler) -> dict[str, Any]:
            epoch, place = divmod(step, len(sampler))
            if place == 0:
                sampler.set_epoch(epoch)
                make.batches = iter(sampler)  # type: ignore[attr-defined]
            drawn = data.__getitems__(next(make.batches))  # type: ignore[attr-defined]
            return system.on_after_batch_transfer(drawn, 0)

        pretrain(system, make, device=device)
        first_epoch += system.task_epochs
        rows = torch.from_numpy(task.rows)
        system.end_task(rows, data.fields["label"][rows])
        after(number)


@torch.inference_mode()
def _written(system: COCONUT, frames: Ragged, rows: npt.NDArray[np.int64], names: Vocabulary, device: str) -> list[str]:
    """What the system writes for some recordings."""
    x, lengths = frames.take(rows)
    texts = system.write(torch.from_numpy(x).to(device), torch.from_numpy(lengths).to(device))
    return names.decode(texts.cpu().numpy())


def run(
    arm: Mapping[str, Any],
    *,
    seed: int,
    data: str,
    budget: Mapping[str, Any],
    work: Path,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Train and measure one arm on one seed.

    Parameters
    ----------
    arm : mapping
        Arguments of `COCONUT`.
    seed : int
    data : {"spoken_digits"}
    budget : mapping
        `epochs` of a task, `per_class`, `tasks`.
    work : Path
        Folder that all arms share.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        `last` and `average` (N,) per test recording: whether it was right after the last task, and the share of the times that it
        was right since its word has come, so weighted that the mean over recordings is the measure; `labels`.
    """
    sounds = spoken_digits(work)
    frames = spectrograms(sounds, LogMel(RATE, MELS), work / "spoken_digits" / "spectrograms.npy")
    labels, texts, split = (sounds.column(name) for name in ("label", "text", "split"))
    labels = labels.astype(np.int64)
    order = np.random.default_rng([seed, 31]).permutation(np.flatnonzero(split == "train"))
    train = np.concatenate([order[labels[order] == c][: int(budget["per_class"])] for c in range(10)])
    tested = np.flatnonzero(split == "test")
    names = Characters.learn(texts.tolist(), least=1)
    length = names.longest(texts.tolist())
    numbers = torch.from_numpy(names.encode(texts.tolist(), length=length))
    known = np.where(np.isin(np.arange(len(labels)), train), labels, -1)  # others come in no task
    tasks = split_by_class(known, int(budget["tasks"]), seed=seed)
    dataset = SoundDataset(frames.take, {"label": torch.from_numpy(labels), "text": numbers})
    system = build(arm, seed=seed, budget=budget, vocabulary=len(names), length=length)
    right: list[npt.NDArray[np.bool_]] = []

    def after(number: int) -> None:
        written = _written(system, frames, tested, names, device)
        right.append(np.array([w == t for w, t in zip(written, texts[tested], strict=True)]))
        if progress is not None:
            progress((number + 1) / len(tasks))

    learn(system, tasks, dataset, after, device=device)
    return _measures(np.stack(right), task_of_samples(tasks, labels[tested])) | {"labels": labels[tested]}


def _measures(right: npt.NDArray[np.bool_], task: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float64]]:
    """Of right answers (T, N) after every task: `last`, and `average` as a score per recording.

    Examples
    --------
    >>> found = _measures(np.array([[True, False], [False, True]]), np.array([0, 1]))
    >>> float(found["average"].mean()), float(found["last"].mean())
    (0.75, 0.5)
    """
    come = task <= np.arange(len(right))[:, None]  # (T, N)
    share = come / come.sum(1, keepdims=True) * right.shape[1]
    return {"last": right[-1].astype(float), "average": (share * right).mean(0)}
