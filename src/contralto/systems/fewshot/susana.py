"""SuSana: two losses that make the classes of an episode compact and far from each other, beside its cross-entropy.

The cross-entropy of a prototypical network only orders the distances of a query. Proto-Triplet asks in addition for a margin
between its own prototype and the nearest other one; ICNN asks of all rows of the episode that their nearest neighbours be of
their class, near, and others far. The chosen terms are averaged, without weights.

SuSana Distancia is all you need: Enforcing class separability in metric learning via two novel distance-based loss functions
for few-shot image classification, 2023, arXiv 2305.09062. The losses follow the released code (`losses.episodes`, `losses.icnn`
say where more than one form exists). Its step decay, whose steps are not known for the published runs, is a cosine here. A mean
of two terms halves the weight of the cross-entropy: Adam does not mind, SGD does.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contralto.errors import UsageError
from contralto.losses.episodes import proto_triplet, prototypical_cross_entropy
from contralto.losses.icnn import icnn_loss
from contralto.systems.fewshot.base import EpisodicSystem

__all__ = ["SuSana", "Term"]

Term = Literal["cross", "prototriplet", "fullicnn", "suppicnn"]


class SuSana(EpisodicSystem):
    """Episodic training with cross-entropy, Proto-Triplet and ICNN.

    Parameters
    ----------
    encoder, **base
        See `EpisodicSystem`. The paper has more classes in training (30 for one shot, 20 for five) than in the test, and begins
        from an encoder that was trained as a classifier of the base classes.
    terms : list of {"cross", "prototriplet", "fullicnn", "suppicnn"}
        What is averaged. "fullicnn" judges support and queries together, "suppicnn" the support alone. Published: cross and
        prototriplet; cross and fullicnn; prototriplet and fullicnn; all three.
    temperature : float
        Of the cross-entropy.
    margin : float
        Of Proto-Triplet: a distance.
    k : int
        Neighbours that ICNN judges.
    omega : bool
        Of ICNN: see `icnn_score`.

    Examples
    --------
    >>> system = SuSana(nn.Linear(8, 4), num_features=4, way=2, shot=1, queries=2, terms=["cross", "fullicnn"])
    >>> labels = torch.tensor([7, 3, 7, 7, 3, 3])
    >>> out = system.step({"views": [torch.randn(6, 8)], "index": torch.arange(6), "label": labels})
    >>> sorted(out), bool(out["loss"] == (out["cross"] + out["fullicnn"]) / 2)
    (['accuracy', 'cross', 'features', 'fullicnn', 'loss'], True)
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        terms: list[Term] | tuple[Term, ...] = ("cross", "prototriplet"),
        temperature: float = 1.0,
        margin: float = 0.5,
        k: int = 4,
        omega: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(encoder, **base)
        known = ("cross", "prototriplet", "fullicnn", "suppicnn")
        if not terms or len(set(terms)) < len(terms) or not set(terms) <= set(known):
            raise UsageError(f"terms must be some of {', '.join(known)}, each once; got {list(terms)}")
        if "suppicnn" in terms and self.shot < 2:
            raise UsageError("with one support picture of a class, suppicnn finds no neighbour of it: take fullicnn")
        if margin < 0 or k < 1:
            raise UsageError(f"margin must be at least 0 and k at least 1, got {margin} and {k}")
        self.terms, self.temperature, self.margin, self.k, self.omega = tuple(terms), temperature, margin, k, omega

    def episode_loss(self, support: Tensor, queries: Tensor, prototypes: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The mean of the terms, and each of them."""
        ways = torch.arange(self.way, device=targets.device)
        shown = ways.repeat_interleave(self.shot).expand(len(targets), -1)  # classes of the support rows
        rows = support.flatten(1, 2)
        of: dict[Term, Callable[[], Tensor]] = {
            "cross": lambda: prototypical_cross_entropy(queries, prototypes, targets, temperature=self.temperature),
            "prototriplet": lambda: proto_triplet(queries, prototypes, targets, margin=self.margin),
            "fullicnn": lambda: icnn_loss(
                torch.cat([rows, queries], 1),
                torch.cat([shown, targets], 1),
                k=self.k,
                window=max(self.k, self.shot + self.queries),  # a whole class fits in
                omega=self.omega,
            ),
            "suppicnn": lambda: icnn_loss(rows, shown, k=self.k, omega=self.omega),
        }
        parts: dict[str, Tensor] = {term: of[term]() for term in self.terms}
        return {"loss": torch.stack(list(parts.values())).mean(), **parts}
