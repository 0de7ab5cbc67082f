"""What else a practitioner would try on noisy labels, over frozen features; arms of `benchmarks/webly.py`.

Losses on the same classifier, draws and steps as plain training (`TRAININGS`), and lists by cleanlab's Datalab.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from contralto.systems.webly.base import label_loss
from contralto.systems.webly.capro import CAPro


class Mixup(CAPro):
    """Plain training on mixed pairs (Zhang et al. 2018): features and losses in the share Beta(strength, strength)."""

    strength = 1.0

    def step(self, batch, epoch, batch_idx=0):
        rng = np.random.default_rng([self.arguments.seed, epoch, batch_idx])
        share = float(rng.beta(self.strength, self.strength))
        order = torch.from_numpy(rng.permutation(len(batch["label"])))
        x = self.encoder(batch["views"][0])
        logits = self.classifier(share * x + (1 - share) * x[order])
        label = batch["label"]
        loss = (share * label_loss(logits, label) + (1 - share) * label_loss(logits, label[order])).mean()
        return {"loss": loss, "loss_cls": loss}


class StrongMixup(Mixup):
    """The strength at which the paper's tables of corrupted labels are best, of those that it lists."""

    strength = 8.0


class CoTeaching(CAPro):
    """Two classifiers, each of which learns from the pictures on which the other has the smallest loss (Han et al. 2018).

    The share left out grows from none to `forget` over `GROWS` epochs. With linear classifiers of frozen features the
    problem is convex: the two differ by their starts and by what they were shown, and less and less.
    """

    forget = 0.0
    GROWS = 10

    def build_more(self, num_classes):
        self.second = nn.Linear(self.classifier.in_features, num_classes, bias=False)

    def step(self, batch, epoch, batch_idx=0):
        x, label = self.encoder(batch["views"][0]), batch["label"]
        keep = max(round(len(label) * (1 - self.forget * min((epoch + 1) / self.GROWS, 1))), 1)
        losses = [F.cross_entropy(head(x), label, reduction="none") for head in (self.classifier, self.second)]
        easy = [loss.detach().argsort(stable=True)[:keep] for loss in losses]
        loss = losses[0][easy[1]].mean() + losses[1][easy[0]].mean()
        return {"loss": loss, "loss_cls": loss}


TRAININGS = {"mixup": Mixup, "mixup, strength 8": StrongMixup, "co-teaching": CoTeaching}


def told_to_forget(share: float) -> type[CoTeaching]:
    """Co-teaching that is told how many labels are wrong, as in its paper."""
    return type("CoTeaching", (CoTeaching,), {"forget": share, "__init__": CoTeaching.__init__})


def datalab(labels: np.ndarray, probs: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P(wrong); which pictures have a wrong label or are outliers; and which have an earlier near-duplicate."""
    from cleanlab import Datalab

    lab = Datalab({"label": labels.tolist()}, label_name="label", verbosity=0)
    types = {"label": {}, "outlier": {}, "near_duplicate": {}}
    lab.find_issues(pred_probs=probs, features=features, issue_types=types)
    issues = lab.get_issues()
    marked = (issues["is_label_issue"] | issues["is_outlier_issue"]).to_numpy()
    later = np.zeros(len(labels), bool)
    for i, twins in enumerate(lab.get_issues("near_duplicate")["near_duplicate_sets"]):
        later[i] = any(j < i for j in twins)
    p_wrong = 1 - np.minimum(issues["label_score"], issues["outlier_score"]).to_numpy()
    return p_wrong, marked, later
