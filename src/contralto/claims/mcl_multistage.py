"""Two digits side by side, one of them faint: contrast in stages should learn the faint one too.

A picture holds two handwritten digits (8 x 8 each, 2 columns between), the left one in full contrast, the right one in a third of
it. What counts is how well a linear probe reads the right digit, and that the left one does not get worse. All arms take
as many steps in all and give as many features:

- `mcl`: three stages, the second and third on batches of one code;
- `long`: SimCLR in one go, with features three times as wide;
- `ensemble`: three SimCLRs from different seeds side by side, of which the first is the first stage of `mcl`;
- `untrained`: three networks as they are drawn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.claims.digits import Split, batches, conv_encoder, digits, features_of, pretrain
from contralto.data.grouped import GroupBatchSampler
from contralto.evaluation.representation import probe_right
from contralto.systems.selfsup.mcl_multistage import MultiStage, stage_seed, train_in_stages

__all__ = ["Composites", "composite_views", "composites", "run"]

HEIGHT, WIDTH = 8, 18
Integers = npt.NDArray[np.int64]


class Composites(NamedTuple):
    """Pictures (N, 144) in [0, 1], their labels (N, 2) of left and right digit, and the digits (N, 2) that they were made of."""

    pictures: Tensor
    labels: Integers
    sources: Integers


def composites(x: Tensor, labels: Tensor, count: int, *, faint: float, seed: int) -> Composites:
    """Pictures of two digits side by side, drawn from some digits with replacement.

    Parameters
    ----------
    x : Tensor (M, 64)
    labels : Tensor (M,)
    count : int
    faint : float
        Contrast of the right digit.
    seed : int

    Examples
    --------
    >>> found = composites(torch.ones(5, 64), torch.arange(5), 3, faint=0.3, seed=0)
    >>> found.pictures.view(3, 8, 18)[0, 0, [0, 8, 17]]
    tensor([1.0000, 0.0000, 0.3000])
    """
    sources = np.random.default_rng(seed).integers(len(x), size=(count, 2))
    left, right = (x[torch.from_numpy(sources[:, side])].view(-1, 8, 8) for side in range(2))
    pictures = torch.cat([left, left.new_zeros(count, 8, WIDTH - 16), faint * right], 2)
    return Composites(pictures.flatten(1), labels.numpy()[sources], sources)


def composite_views(
    x: Tensor, generator: torch.Generator, *, shift: float = 1.0, shear: float = 0.2, noise: float = 0.1
) -> Tensor:
    """One random view (B, 144) of every picture: shifted, sheared, of another brightness (0.8 to 1.2), with noise.

    Parameters
    ----------
    x : Tensor (B, 144)
    generator : torch.Generator
    shift : float
        Largest shift in pixels.
    shear : float
        Largest tangent.
    noise : float
        Standard deviation.

    Examples
    --------
    >>> composite_views(torch.rand(5, 144), torch.Generator().manual_seed(0)).shape
    torch.Size([5, 144])
    """
    n = len(x)

    def uniform(limit: float) -> Tensor:
        return limit * (2 * torch.rand(n, generator=generator) - 1)

    across, down, slant = uniform(shift) * 2 / WIDTH, uniform(shift) * 2 / HEIGHT, uniform(shear) * HEIGHT / WIDTH
    one, none = torch.ones(n), torch.zeros(n)
    theta = torch.stack([torch.stack([one, slant, across], 1), torch.stack([none, one, down], 1)], 1)
    grid = F.affine_grid(theta, [n, 1, HEIGHT, WIDTH], align_corners=False)
    out = F.grid_sample(x.view(n, 1, HEIGHT, WIDTH), grid, align_corners=False).flatten(1)
    out = out * (1 + uniform(0.2)).unsqueeze(1)
    return out + noise * torch.randn(out.shape, generator=generator)


def run(
    arm: dict[str, Any],
    *,
    seed: int,
    data: str,
    budget: dict[str, Any],
    device: str,
    progress: Callable[[float], None],
) -> dict[str, Any]:
    """Train one arm on one seed, and read both digits from its features.

    Returns
    -------
    dict
        `left`, `right` (N,): whether the probe names the digit; `groups`: the right digit's own picture; and of stages, what the
        last one had to draw from, and the right digit by each stage alone.
    """
    split = digits(seed)
    train = composites(split.train, split.train_labels, budget["train"], faint=budget["faint"], seed=2 * seed)
    test = composites(split.test, split.test_labels, budget["test"], faint=budget["faint"], seed=2 * seed + 1)
    stages, steps = (1 if arm["kind"] == "long" else budget["stages"]), budget["steps"]
    total = budget["stages"] * steps
    done = [0]

    def system(stage: int) -> MultiStage:
        own = stage_seed(seed, stage)
        width = budget["features"] * (budget["stages"] if arm["kind"] == "long" else 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own)
            encoder = conv_encoder(width, widths=(16, 32, 32), height=HEIGHT, width=WIDTH)
        learner = MultiStage(
            encoder, num_features=width, steps_per_epoch=total // stages, epochs=1, seed=own, stages=budget["stages"],
            clusters=budget["clusters"], optimizer="adam", lr=budget["lr"], weight_decay=0.0, warmup_epochs=0,
            hidden=64, dim=64, temperature=budget["temperature"], smallest=budget["smallest"],
        )  # fmt: skip
        if budget.get("projector") == "plain":
            with learner.seeded():
                learner.learner.projector = nn.Sequential(nn.ReLU(), nn.Linear(width, 64))
        return learner

    def fit(stage: int, codes: Integers | None, before: list[MultiStage]) -> MultiStage:
        learner = system(stage)
        if arm["kind"] == "untrained":
            return learner.eval()
        make = batches(
            Split(train.pictures, torch.from_numpy(train.labels), test.pictures, torch.from_numpy(test.labels)),
            seed=learner.seed, batch_size=budget["batch_size"], view=composite_views,
            rows=None if codes is None else grouped(codes, learner).__getitem__,
        )  # fmt: skip

        def counted(step: int) -> dict[str, Any]:
            progress(done[0] / total)
            done[0] += 1
            return make(step)

        pretrain(learner, counted, device=device)
        return learner

    def grouped(codes: Integers, learner: MultiStage) -> list[Integers]:
        sampler = GroupBatchSampler(
            codes, budget["batch_size"], seed=learner.seed, batches=learner.total_steps, smallest=learner.smallest
        )
        return [np.array([row for _, row in batch]) for batch in sampler]

    more: dict[str, Any] = {}
    if arm["kind"] == "mcl":
        found = train_in_stages(
            fit, lambda learner: features_of(learner, train.pictures), stages=stages, clusters=budget["clusters"],
            batch_size=budget["batch_size"], seed=seed,
        )  # fmt: skip
        learners = [s.learnt for s in found]
        more = {f"last_{k}": v for k, v in found[-1].report.items()}
    else:
        learners = [fit(stage, None, []) for stage in range(stages)]
    by_stage = [[features_of(learner, part.pictures) for learner in learners] for part in (train, test)]

    def probe(columns: slice, side: int) -> npt.NDArray[np.float64]:
        x, y = (np.concatenate(part[columns], 1) for part in by_stage)
        return probe_right(x, train.labels[:, side], y, test.labels[:, side])

    if arm["kind"] != "untrained":
        more |= {f"right_of_stage_{s}": float(probe(slice(s, s + 1), 1).mean()) for s in range(stages)}
    every = slice(None)
    return more | {"left": probe(every, 0), "right": probe(every, 1), "groups": test.sources[:, 1].astype(str)}
