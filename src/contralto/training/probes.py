"""How a pretraining goes, seen by labels that it does not learn from: callbacks for Lightning's Trainer.

Both look at the features of augmented training views, as the steps make them, so they cost next to nothing; what they say
is a sign on the way, not a measurement (that is ``contralto evaluate``). They want a system that leaves `features` (B, F)
after a step.
"""

from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.evaluation.representation import knn_right

__all__ = ["OnlineKNN", "OnlineProbe"]


class OnlineProbe(Callback):
    """A linear classifier on normalised features, learning beside; its accuracy over an epoch is logged as `probe`.

    Samples of label -1 are left out. What it learns is in the checkpoints.

    Parameters
    ----------
    num_features, num_classes : int
    lr : float
        Of Adam.

    Examples
    --------
    >>> probe = OnlineProbe(4, 2)
    >>> probe.learn(torch.randn(8, 4), torch.tensor([0, 1, 0, 1, -1, 0, 1, 1]))
    >>> probe.seen.tolist()[1]
    7.0
    """

    def __init__(self, num_features: int, num_classes: int, lr: float = 1e-2) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.probe = nn.Sequential(nn.BatchNorm1d(num_features, affine=False), nn.Linear(num_features, num_classes))
        self.optimizer = torch.optim.Adam(self.probe.parameters(), lr=lr)
        self.seen = torch.zeros(2)  # right answers, and all

    def learn(self, features: Tensor, labels: Tensor) -> None:
        """One step on features (B, F) and labels (B,)."""
        known = labels >= 0
        if int(known.sum()) < 2:
            return
        with torch.enable_grad():
            logits = self.probe(features[known].detach().float())
            self.optimizer.zero_grad()
            F.cross_entropy(logits, labels[known]).backward()
            self.optimizer.step()
        right = (logits.argmax(1) == labels[known]).sum()
        self.seen += torch.stack([right, known.sum()]).cpu()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move to where the system is."""
        self.probe.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Learn from the features of the step."""
        features = getattr(pl_module, "features", None)
        if features is not None and len(features) == len(batch["label"]):
            self.learn(features, batch["label"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy of the epoch."""
        if self.seen[1]:
            pl_module.log("probe", self.seen[0] / self.seen[1])
        self.seen = torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser and counts."""
        return {"probe": self.probe.state_dict(), "optimizer": self.optimizer.state_dict(), "seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.probe.load_state_dict(state_dict["probe"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.seen = state_dict["seen"]


class OnlineKNN(Callback):
    """Nearest neighbours among the last features of an epoch: the later half asks, the earlier one answers; logged as `knn`.

    Parameters
    ----------
    size : int
        Features that are kept.
    k : int

    Examples
    --------
    >>> OnlineKNN(size=100).state_dict()
    {'features': [], 'labels': []}
    """

    def __init__(self, size: int = 4096, k: int = 20) -> None:
        self.size, self.k = size, k
        self.features: list[Tensor] = []
        self.labels: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the features of the step."""
        features = getattr(pl_module, "features", None)
        if features is None or len(features) != len(batch["label"]):
            return
        known = batch["label"] >= 0
        self.features.append(features[known].float().cpu())
        self.labels.append(batch["label"][known].cpu())
        while len(self.features) > 1 and sum(map(len, self.labels)) - len(self.labels[0]) >= self.size:
            del self.features[0], self.labels[0]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy of the epoch."""
        if self.labels:
            x, y = torch.cat(self.features).numpy(), torch.cat(self.labels).numpy()
            half = len(y) // 2
            if half >= 1:
                pl_module.log("knn", float(np.mean(knn_right(x[:half], y[:half], x[half:], y[half:], k=self.k))))
        self.features, self.labels = [], []

    def state_dict(self) -> dict[str, Any]:
        """Features and labels of the epoch so far."""
        return {"features": self.features, "labels": self.labels}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.features, self.labels = state_dict["features"], state_dict["labels"]
