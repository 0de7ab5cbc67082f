"""What few-shot systems share: episodes in, prototypes from their support, a loss on their queries.

A batch holds one episode or several, each in the order of `contralto.data.episodes`: first the support rows class by class, then
the query rows class by class. Which class is which is read off the labels, so a batch in another order is refused.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from contralto.data.dataset import Batch
from contralto.errors import UsageError
from contralto.losses.episodes import prototypical_logits
from contralto.systems.base import EncoderSystem, Optimizer
from contralto.views.batched import BatchView

__all__ = ["EpisodicSystem", "few_shot_view"]


def few_shot_view(
    size: int,
    *,
    crop: float,
    flip: float,
    jitter: float,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> BatchView:
    """The augmentation of few-shot training: a crop of at least the share `crop` of the area, a flip, changes of colour.

    Examples
    --------
    >>> few_shot_view(32, crop=1.0, flip=0.0, jitter=0.0, mean=(0.5,) * 3, std=(0.5,) * 3).jitter
    (0.0, 0.0, 0.0, 0.0)
    """
    colours = (jitter, jitter, jitter, 0.0)
    return BatchView(size, (crop, 1.0), flip=flip, jitter=colours, jitter_p=1.0, mean=mean, std=std)


class EpisodicSystem(EncoderSystem):
    """Base of the systems that learn from episodes; a system is what it says of support and queries (`episode_loss`).

    Parameters
    ----------
    encoder, num_features, num_samples, steps_per_epoch, seed, optimizer, ..., final_lr
        See `EncoderSystem`.
    epochs, episodes : int
        Epochs, and episodes of each.
    way, shot, queries : int
        Classes of an episode of training; support and query pictures of each.
    episodes_per_step : int
        Their mean loss makes one step.
    crop, flip, jitter : float
        See `few_shot_view`. Characters and the like must not be flipped.
    """

    needs = ("label",)

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
        way: int = 5,
        shot: int = 1,
        queries: int = 15,
        episodes_per_step: int = 1,
        optimizer: Optimizer = "adam",
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        warmup_epochs: float = 0,
        start_lr: float = 0.0,
        final_lr: float = 0.0,
        crop: float = 0.5,
        flip: float = 0.5,
        jitter: float = 0.4,
    ) -> None:
        if way < 2 or min(shot, queries, episodes, episodes_per_step) < 1:
            raise UsageError(
                f"an episode has two classes or more, and shot, queries, episodes and episodes_per_step are at least 1; got "
                f"way {way}, shot {shot}, queries {queries}, episodes {episodes}, episodes_per_step {episodes_per_step}"
            )
        super().__init__(
            encoder, num_features=num_features, num_samples=num_samples, steps_per_epoch=steps_per_epoch, seed=seed,
            epochs=epochs, batch_size=episodes_per_step * way * (shot + queries), optimizer=optimizer, lr=lr,
            weight_decay=weight_decay, momentum=momentum, warmup_epochs=warmup_epochs, start_lr=start_lr, final_lr=final_lr,
        )  # fmt: skip
        self.episodes, self.way, self.shot, self.queries = episodes, way, shot, queries
        self.episodes_per_step = episodes_per_step
        self.crop, self.flip, self.jitter = crop, flip, jitter

    def views(
        self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> Sequence[BatchView]:
        """One view of every picture."""
        return [few_shot_view(size, crop=self.crop, flip=self.flip, jitter=self.jitter, mean=mean, std=std)]

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of the episodes of a batch, and the share of their queries that the nearest prototype names rightly."""
        [x] = self.checked(batch, 1)
        labels = batch["label"]
        self._check_episodes(labels)
        features = self.encoder(x)
        support, queries = self._split(features)
        prototypes = support.mean(2)
        targets = torch.arange(self.way, device=x.device).repeat_interleave(self.queries).expand(len(queries), -1)
        out = self.episode_loss(support, queries, prototypes, targets)
        with torch.no_grad():
            right = prototypical_logits(queries, prototypes).argmax(-1) == targets
        return out | {"accuracy": right.float().mean(), "features": features.detach()}

    def episode_loss(self, support: Tensor, queries: Tensor, prototypes: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`loss`, and its parts.

        Parameters
        ----------
        support : Tensor (E, W, S, F)
        queries : Tensor (E, W * Q, F)
        prototypes : Tensor (E, W, F)
            Means of the support.
        targets : Tensor (E, W * Q)
            Classes of the queries, in [0, W).
        """
        raise NotImplementedError

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, ...) to support (E, W, S, ...) and queries (E, W * Q, ...)."""
        episodes = rows.unflatten(0, (-1, self.way * (self.shot + self.queries)))
        support, queries = episodes.split([self.way * self.shot, self.way * self.queries], dim=1)
        return support.unflatten(1, (self.way, self.shot)), queries

    def _check_episodes(self, labels: Tensor) -> None:
        """Refuse what is not whole episodes in their order."""
        size = self.way * (self.shot + self.queries)
        if len(labels) % size:
            raise UsageError(
                f"a batch holds whole episodes of {size} rows ({self.way} classes, {self.shot} support and {self.queries} query "
                f"rows each), got {len(labels)} rows: draw them with contralto.data.episodes"
            )
        support, queries = self._split(labels)
        names = support[:, :, 0]
        same = (support == names.unsqueeze(2)).all() & (
            queries.unflatten(1, (self.way, -1)) == names.unsqueeze(2)
        ).all()
        differ = names.sort(dim=1).values.diff(dim=1).ne(0).all()
        if not (same & differ & (labels >= 0).all()):
            raise UsageError(
                "the labels are not those of an episode: first the support rows class by class, then the query rows in the same "
                "order of classes, all labelled; draw them with contralto.data.episodes"
            )
