"""Prototypical network: a query belongs to the class whose support has the nearest mean. The baseline of episodic training.

Prototypical Networks for Few-shot Learning, Snell et al., NeurIPS 2017, arXiv 1703.05175: 64 filters, episodes of more classes
than in the test, Adam at 1e-3, halved every 2,000 episodes (here: a cosine).
"""

from torch import Tensor, nn

from contralto.losses.episodes import prototypical_cross_entropy
from contralto.systems.base import Optimizer
from contralto.systems.fewshot.base import EpisodicSystem

__all__ = ["ProtoNet"]


class ProtoNet(EpisodicSystem):
    """Prototypical network.

    Parameters
    ----------
    encoder, num_features, ..., jitter
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
        num_features: int,
        num_samples: int = 0,
        steps_per_epoch: int = 1,
        seed: int = 0,
        epochs: int = 200,
        episodes: int = 100,
        way: int = 20,
        shot: int = 1,
        queries: int = 15,
        episodes_per_step: int = 1,
        optimizer: Optimizer = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        warmup_epochs: float = 0,
        crop: float = 0.5,
        flip: float = 0.5,
        jitter: float = 0.4,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(
            encoder, num_features=num_features, num_samples=num_samples, steps_per_epoch=steps_per_epoch, seed=seed,
            epochs=epochs, episodes=episodes, way=way, shot=shot, queries=queries, episodes_per_step=episodes_per_step,
            optimizer=optimizer, lr=lr, weight_decay=weight_decay, momentum=momentum, warmup_epochs=warmup_epochs, crop=crop,
            flip=flip, jitter=jitter,
        )  # fmt: skip
        self.temperature = temperature

    def episode_loss(self, support: Tensor, queries: Tensor, prototypes: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the queries."""
        return {"loss": prototypical_cross_entropy(queries, prototypes, targets, temperature=self.temperature)}
