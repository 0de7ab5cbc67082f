"""Prototypical network: a query belongs to the class whose support has the nearest mean. The baseline of episodic training.

Prototypical Networks for Few-shot Learning, Snell et al., NeurIPS 2017, arXiv 1703.05175: 64 filters, episodes of more classes
than in the test, Adam at 1e-3, halved every 2,000 episodes (here: a cosine).
"""

from typing import Any

from torch import Tensor, nn

from contralto.losses.episodes import prototypical_cross_entropy
from contralto.systems.fewshot.base import EpisodicSystem

__all__ = ["ProtoNet"]


class ProtoNet(EpisodicSystem):
    """Prototypical network.

    Parameters
    ----------
    encoder, **base
        See `EpisodicSystem`.
    temperature : float
        Of the squared distances.

    Examples
    --------
    >>> import torch
    >>> system = ProtoNet(nn.Linear(8, 4), num_features=4, way=2, shot=1, queries=1)
    >>> batch = {"views": [torch.randn(4, 8)], "index": torch.arange(4), "label": torch.tensor([7, 3, 7, 3])}
    >>> sorted(system.step(batch))
    ['accuracy', 'features', 'loss']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        way: int = 20,
        lr: float = 1e-3,
        temperature: float = 1.0,
        **base: Any,
    ) -> None:
        super().__init__(encoder, way=way, lr=lr, **base)
        self.temperature = temperature

    def episode_loss(self, support: Tensor, queries: Tensor, prototypes: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the queries."""
        return {"loss": prototypical_cross_entropy(queries, prototypes, targets, temperature=self.temperature)}
