"""The claims of SuSana: Proto-Triplet beside the episodic cross-entropy serves classes that were never learnt from.

    contralto reproduce susana

Handwritten characters (Omniglot, 28 x 28): the 136 of Balinese, Early Aramaic, Greek, Korean and Latin are learnt from, the 106
of Japanese, Sanskrit and Tagalog are tested. Encoder: Conv-4, from scratch, no augmentation; episodes of 5 classes with 5 queries
each, Adam at 1e-3 with a cosine: the pilot's recipe. All arms of a seed have the same first weights, episodes and steps, and are
tested on the same 600 episodes of 5 classes with 15 queries, by the nearest prototype. What is compared is the accuracy on every
new character, mean over its queries: a resample draws characters.

Arms differ in the terms of the loss. Training has one support picture of a class, the test one or five. *points* is another
experiment: the ICNN loss alone moves 60 random points of three classes in R^8; leave-one-out nearest neighbours then tell the
classes apart.
"""

import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contralto.claims.digits import features_of, pretrain
from contralto.data.episodes import draw_episodes
from contralto.encoders.resnet import Conv4
from contralto.errors import DataError
from contralto.evaluation.episodes import few_shot_accuracy
from contralto.losses.icnn import icnn_loss
from contralto.systems.fewshot.susana import SuSana

__all__ = ["characters", "episodes_of", "points", "run"]

NOVEL = ("Japanese", "Sanskrit", "Tagalog")
WAY, QUERIES = 5, 5


@cache
def characters() -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (N, 1, 28, 28) in [0, 1], their characters (N,), and whether those are of an alphabet for testing (N,).

    Raises
    ------
    DataError
        If the data set is not there.
    """
    path = Path(os.environ.get("CONTRALTO_DATA", "")) / "omniglot" / "omniglot28.npz"
    if not path.is_file():
        raise DataError("omniglot was not found: set CONTRALTO_DATA to the folder that holds it")
    with np.load(path, allow_pickle=False) as archive:
        images, labels, names = archive["images"], archive["character"], archive["alphabet_names"][archive["alphabet"]]
    novel = np.array([any(str(name).startswith(n) for n in NOVEL) for name in names])
    pixels = torch.from_numpy(images).unsqueeze(1).float() / 255
    return pixels, torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(novel)


def episodes_of(
    pictures: Tensor, labels: Tensor, *, shot: int, episodes: int, seed: int
) -> Callable[[int], dict[str, Any]]:
    """Step -> batch: one episode of the pictures, in grey on three channels.

    Examples
    --------
    >>> make = episodes_of(torch.rand(60, 1, 28, 28), torch.arange(60) // 10, shot=1, episodes=2, seed=0)
    >>> make(1)["views"][0].shape, make(1)["label"][:5].equal(make(1)["label"][5::5])
    (torch.Size([30, 3, 28, 28]), True)
    """
    rng = np.random.default_rng([seed, 3])
    rows = draw_episodes(labels.numpy(), way=WAY, shot=shot, queries=QUERIES, episodes=episodes, rng=rng)

    def make(step: int) -> dict[str, Any]:
        index = torch.from_numpy(rows[step])
        return {"views": [pictures[index].expand(-1, 3, -1, -1)], "index": index, "label": labels[index]}

    return make


def run(
    arm: Mapping[str, Any],
    *,
    seed: int,
    data: str,
    budget: Mapping[str, Any],
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Train and measure one arm on one seed.

    Parameters
    ----------
    arm : mapping
        `terms`, `shot`, `margin`, and `episodes` where they are not the budget's; or `points`: the rate of Adam.
    seed : int
    data : {"omniglot"}
    budget : mapping
        `episodes` of training, `tested` episodes, `width` of the encoder.
    device : str
    progress : function, optional

    Returns
    -------
    dict
        `one_shot`, `five_shot` (C,): accuracy on every new character. Of *points*: `neighbours` and `loss`.
    """
    if "points" in arm:
        return points(seed, lr=float(arm["points"]))
    pictures, labels, novel = characters()
    shot, episodes = int(arm.get("shot", 1)), int(arm.get("episodes", budget["episodes"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Conv4(int(budget["width"]))
    system = SuSana(
        encoder, num_features=encoder.num_features, seed=seed, epochs=1 if episodes else 0, episodes=max(episodes, 1),
        steps_per_epoch=max(episodes, 1), way=WAY, shot=shot, queries=QUERIES, lr=1e-3, terms=arm.get("terms", ["cross"]),
        margin=float(arm.get("margin", 0.5)),
    )  # fmt: skip
    base = ~novel
    make = episodes_of(pictures[base], labels[base], shot=shot, episodes=max(episodes, 1), seed=seed)

    def told(step: int) -> dict[str, Any]:
        if progress is not None:
            progress(0.9 * step / episodes)
        return make(step)

    pretrain(system, told, device=device)
    features = features_of(system, pictures[novel].expand(-1, 3, -1, -1))
    names = labels[novel].unique(return_inverse=True)[1].numpy()
    return {
        name: few_shot_accuracy(
            features, names, way=WAY, shot=s, queries=15, episodes=int(budget["tested"]), seed=seed
        ).classes
        for name, s in (("one_shot", 1), ("five_shot", 5))
    }


def points(seed: int, *, lr: float = 0.2, steps: int = 100) -> dict[str, float]:
    """What minimising the ICNN loss does to 60 random points in R^8, 20 of each of three classes.

    Returns
    -------
    dict
        `neighbours`: how many are of the class of their nearest neighbour; `before`: the same at the start; `loss`.

    Examples
    --------
    >>> found = points(0)
    >>> found["before"] < 0.6 < 0.85 < found["neighbours"]
    True
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 8, generator=generator).requires_grad_()
    labels = torch.arange(3).repeat_interleave(20)
    before = _of_own_class(x, labels)
    optimizer = torch.optim.Adam([x], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        icnn_loss(x, labels, window=20).backward()
        optimizer.step()
    return {
        "neighbours": _of_own_class(x, labels),
        "before": before,
        "loss": float(icnn_loss(x.detach(), labels, window=20)),
    }


def _of_own_class(x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        nearest = torch.cdist(x, x).fill_diagonal_(torch.inf).argmin(1)
    return float((labels[nearest] == labels).float().mean())
