"""CAPro for pictures with several labels each (NUS-WIDE form): tags as web labels, every class a yes or no of its own.

The web label of a picture and a class says whether the class's word is among the picture's tags. Every class has two
prototypes, of the pictures without it and with it, in a space of its own; anchors say yes or no for good; single entries
of the label matrix are kept, flipped or ignored.

Paper: "CAPro: Webly Supervised Learning with Cross-Modality Aligned Prototypes", NeurIPS 2023, arXiv 2310.09761, its multi-label
variant. Numbers as in `contralto.systems.webly.capro`; "CAPro 5M" is what differs:

- 5M.1 classification by binary cross-entropy per class, positives weighted by sqrt((N - n_c) / n_c).
- 5M.2 r+ = alpha sigmoid(classifier) + (1 - alpha) softmax over the two prototypes; r- = 1 - r+.
- 5M.3 an entry is kept when the score of its own side is at least 1/C or it is an anchor, flipped when the score of the other
  side is at least gamma and it is no anchor, ignored otherwise; a picture learns while any of its entries is kept or flipped.
- 5M.4 the soft target of collective bootstrapping is a probability per class; only its positive side is learnt.
- 5M.5 prototype contrast: two-way cross-entropy per class; prototypes move per class and side.

An entry is ignored only if 1 - gamma < r+ < 1/C, so never when gamma <= 1 - 1/C: with many classes labels are only flipped.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, mean_weight, world_size
from contralto.errors import UsageError
from contralto.memory.momentum import momentum_update
from contralto.prototypes.bank import ema_update
from contralto.systems.webly.base import instance_contrast
from contralto.systems.webly.capro import StagedCAPro, bootstrapping_weights

__all__ = ["EXTENSIONS", "CAProMultiLabel", "Stage", "correct_entries", "positive_weights"]

Stage = Literal["plain", "vanilla", "capro", "finetune"]

EXTENSIONS = ("lambda_class",)
"""Arguments that go beyond the paper; off by default."""


class CAProMultiLabel(StagedCAPro):
    """The network of multi-label CAPro and one training step of each of its stages.

    Parameters
    ----------
    encoder : nn.Module
        Pictures (B, 3, S, S) to features (B, `num_features`). `nn.Identity()` when the views are features already.
    num_classes : int
        C.
    num_features : int
        D_v, width of the features.
    stage : {"plain", "vanilla", "capro", "finetune"}
        As of `CAPro`.
    epochs, lr, warmup_epochs, vanilla_epochs, vanilla_lr, vanilla_warmup_epochs, plain_lr, finetune_epochs, finetune_lr
        As of `CAPro`; defaults are those of NUS-WIDE.
    frozen_encoder_epoch, init_proto_epoch, start_clean_epoch : int
        As of `CAPro`.
    threshold : float
        gamma: an entry is flipped when the score of the other side reaches it.
    alpha, beta, temperature, momentum_encoder, momentum_prototype
        As of `CAPro`.
    lambda_ins, lambda_recn, lambda_pro : float
        Weights of instance contrast, reconstruction and prototype contrast.
    dim, hidden, queue_size : int
    weight_decay : float
    lambda_class : float, optional
        Extension. Weight of the losses that are means over the classes: classification, auxiliary, prototype contrast; None = C,
        which makes them sums, as large beside the others as they are with one label per picture.
    seed : int

    Attributes
    ----------
    prototypes : Tensor (C, 2, dim)
        Unit rows: without the class, with it.
    positive_weight : Tensor (C,)
        Of 5M.1; the training job sets it by `positive_weights`.

    Examples
    --------
    >>> system = CAProMultiLabel(nn.Identity(), num_classes=3, num_features=8, hidden=16, dim=4, queue_size=16)
    >>> batch = {"views": [torch.randn(4, 8), torch.randn(4, 8)], "label": torch.tensor([[1, 0, 0]] * 4),
    ...          "anchor": torch.zeros(4, 3), "weight": torch.ones(4), "index": torch.arange(4)}
    >>> sorted(system.step(batch, epoch=0))
    ['loss', 'loss_aux', 'loss_cls', 'loss_ins', 'loss_recn']
    """

    positive_weight: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        num_features: int,
        *,
        stage: Stage = "capro",
        epochs: int = 100,
        lr: float = 2e-3,
        warmup_epochs: int = 10,
        vanilla_epochs: int = 100,
        vanilla_lr: float = 2e-3,
        vanilla_warmup_epochs: int = 10,
        plain_lr: float | None = None,
        finetune_epochs: int = 20,
        finetune_lr: float = 2e-5,
        frozen_encoder_epoch: int = 10,
        init_proto_epoch: int = 10,
        start_clean_epoch: int = 40,
        threshold: float = 0.9,
        alpha: float = 0.5,
        beta: float = 0.1,
        temperature: float = 0.1,
        momentum_encoder: float = 0.999,
        momentum_prototype: float | None = 0.999,
        lambda_ins: float = 1.0,
        lambda_recn: float = 1.0,
        lambda_pro: float = 1.0,
        dim: int = 128,
        hidden: int = 2048,
        queue_size: int | None = 2048,
        weight_decay: float = 1e-4,
        lambda_class: float | None = 1.0,
        seed: int = 1024,
    ) -> None:
        super().__init__()
        if lambda_class is not None and not lambda_class > 0:
            raise UsageError(f"lambda_class must be above 0, got {lambda_class}")
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} must be in [0, 1], got {value}")
        if not temperature > 0 or not threshold > 0.5:
            raise UsageError(f"temperature must be above 0 and threshold above 0.5, got {temperature} and {threshold}")
        self.save_hyperparameters(ignore=["encoder"])
        self.build(encoder, num_classes, num_features, stage, queue_size)
        self.prototypes = torch.zeros(num_classes, 2, dim)

    def build_more(self, num_classes: int) -> None:
        """A linear space and an auxiliary classifier for every class, and two prototypes."""
        dim = self.arguments.dim
        self.spaces = nn.Parameter(torch.empty(num_classes, dim, dim).uniform_(-1 / math.sqrt(dim), 1 / math.sqrt(dim)))
        self.offsets = nn.Parameter(torch.empty(num_classes, dim).uniform_(-1 / math.sqrt(dim), 1 / math.sqrt(dim)))
        self.register_buffer("positive_weight", torch.ones(num_classes))

    # One training step.

    def step(self, batch: Batch, epoch: int, batch_idx: int = 0) -> dict[str, Tensor]:
        """Losses of one batch; moves momentum encoder, queue and prototypes.

        Parameters
        ----------
        batch : dict
            `views` [weak, strong] (stage "plain": weak), `label` (B, C) of 0 and 1, `anchor` (B, C) not 0 where the entry holds
            for good, `weight` (B,).
        epoch, batch_idx : int

        Returns
        -------
        dict
            `loss` and its parts; with cleaning also shares of entries, `kept` (not ignored) and `corrected`.
        """
        h = self.arguments
        given, weight = batch["label"], batch["weight"].unsqueeze(1)
        v = self.encoder(batch["views"][0])
        logits = self.classifier(v)
        if h.stage == "plain":
            loss = self._class_weight() * (weight * self._binary(logits, given)).mean()
            loss = loss * mean_weight(given.new_tensor(len(given)))
            return {"loss": loss, "loss_cls": loss}
        prototypes_on = h.stage == "capro" and epoch > h.init_proto_epoch
        cleaning = h.stage == "capro" and epoch > h.start_clean_epoch

        # 1. Embedding, its copy in the space of every class, reconstruction; the momentum encoder and its keys.
        z = self.projector(v)
        each = self.in_spaces(z)
        reconstruction = self.reconstructor(z.detach() if prototypes_on else z)
        momentum_update(self.momentum_encoder, self.encoder, h.momentum_encoder)
        aux = self._auxiliary_logits(each)
        with torch.no_grad():
            key = self.projector(self.momentum_encoder(batch["views"][1]))
        negatives = self.queue.read()
        self.queue.enqueue(gather_rows(key))
        # 2. Soft target, correction, prototypes.
        target = self._bootstrap(z)
        prototypes = self.prototypes.clone()
        label, valid = given, torch.ones_like(given, dtype=torch.bool)
        if cleaning:
            label, valid = correct_entries(
                self._positive_scores(logits, each, prototypes), given, batch["anchor"], threshold=h.threshold
            )
        kept = valid.any(1)
        if prototypes_on:
            self._move_prototypes(each, label, valid)
        # 3. Losses.
        out: dict[str, Tensor] = {}
        if h.stage != "finetune":
            out["loss_ins"] = h.lambda_ins * instance_contrast(z, key, negatives, h.temperature)
        if bool(kept.any()):
            out |= self._entry_losses(logits, aux, each, label, valid, weight, target, prototypes, kept, prototypes_on)
            if h.stage != "finetune":
                out["loss_recn"] = h.lambda_recn * F.mse_loss(reconstruction[kept], v[kept].detach())
        if world_size() > 1:
            rows, share = mean_weight(given.new_tensor(len(given))), mean_weight(kept.sum())
            out = {k: (rows if k == "loss_ins" else share) * x for k, x in out.items()}
        losses = [*out.values(), *([self.nothing()] if world_size() > 1 else [])]
        out["loss"] = torch.stack(losses).sum()
        if cleaning:
            out["kept"] = valid.float().mean()
            out["corrected"] = (valid & (label != given)).float().mean()
        return out

    def in_spaces(self, z: Tensor) -> Tensor:
        """Embeddings (B, d) in the space of every class: unit rows (B, C, d)."""
        return F.normalize(torch.einsum("bd,ced->bce", z, self.spaces) + self.offsets, dim=2)

    def _auxiliary_logits(self, each: Tensor) -> Tensor:
        logits: Tensor = (each * self.auxiliary.weight).sum(2)  # their rows are of length one already
        return logits

    def _prototype_logits(self, each: Tensor, prototypes: Tensor) -> Tensor:
        """Similarities (B, C, 2) to both prototypes of every class, over the temperature."""
        similarity = torch.einsum("bcd,cpd->bcp", each, prototypes.to(each.dtype))
        return similarity / float(self.arguments.temperature)

    @torch.no_grad()
    def _positive_scores(self, logits: Tensor, each: Tensor, prototypes: Tensor) -> Tensor:
        """The scores r+ of CAPro 5M.2, (B, C)."""
        alpha = self.arguments.alpha
        near = self._prototype_logits(each, prototypes).softmax(2)[..., 1]
        scores: Tensor = alpha * logits.sigmoid() + (1 - alpha) * near
        return scores

    @torch.no_grad()
    def _bootstrap(self, z: Tensor) -> Tensor:
        keys = self.queue.read().to(z.dtype)
        return (bootstrapping_weights(z, keys) @ self._votes(keys)).clamp(0, 1)

    def _votes(self, keys: Tensor) -> Tensor:
        """Votes (Q, C) of keys for 5M.4: the scores of 5M.2, with the auxiliary classifier in place of the classifier.

        Both sides of a score are linear in the embedding before it is scaled to length one, so of the embeddings in the spaces
        only the lengths are worked out; a softmax over two prototypes is the sigmoid of a difference.
        """
        alpha, (classes, dim) = self.arguments.alpha, self.offsets.shape
        apart = (self.prototypes[:, 1] - self.prototypes[:, 0]).to(keys.dtype) / self.arguments.temperature
        asked = torch.stack([self.auxiliary.weight, apart], 1)  # (C, 2, d)
        slope = torch.einsum("cpe,ced->cpd", asked, self.spaces).flatten(0, 1)
        start = torch.einsum("cpe,ce->cp", asked, self.offsets).flatten()
        votes = []
        for part in keys.split(256):  # Q x C x d numbers at once are slow to allocate
            each = torch.addmm(self.offsets.flatten(), part, self.spaces.flatten(0, 1).T).view(-1, classes, dim)
            answers = torch.addmm(start, part, slope.T).view(-1, classes, 2)
            answers = (answers / each.norm(dim=2, keepdim=True).clamp_min(1e-12)).sigmoid()
            votes.append(alpha * answers[..., 0] + (1 - alpha) * answers[..., 1])
        return torch.cat(votes)

    def _binary(self, logits: Tensor, label: Tensor) -> Tensor:
        weight = self.positive_weight.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), pos_weight=weight, reduction="none")

    def _class_weight(self) -> float:
        share = self.arguments.lambda_class
        return float(self.arguments.num_classes if share is None else share)

    def _entry_losses(
        self,
        logits: Tensor,
        aux: Tensor,
        each: Tensor,
        label: Tensor,
        valid: Tensor,
        weight: Tensor,
        target: Tensor,
        prototypes: Tensor,
        kept: Tensor,
        prototypes_on: bool,
    ) -> dict[str, Tensor]:
        """Losses over the entries of kept pictures, ignored ones counting as zero."""
        h, mask, share = self.arguments, valid[kept].to(logits.dtype), self._class_weight()
        logits, aux, each, label, weight = (x[kept] for x in (logits, aux, each, label, weight))
        soft = -target[kept] * F.logsigmoid(aux)
        both = (1 - h.beta) * self._binary(aux, label) + h.beta * soft
        out = {
            "loss_cls": share * (weight * mask * self._binary(logits, label)).mean(),
            "loss_aux": share * (weight * mask * both).mean(),
        }
        if prototypes_on:
            side = label.long()
            near = -self._prototype_logits(each, prototypes).log_softmax(2).gather(2, side.unsqueeze(2)).squeeze(2)
            sides = torch.stack([torch.ones_like(self.positive_weight[0]), self.positive_weight.mean()]).to(near.dtype)
            out["loss_pro"] = share * h.lambda_pro * (mask * sides[side] * near).mean()
        return out

    def _move_prototypes(self, each: Tensor, label: Tensor, valid: Tensor) -> None:
        """CAPro 5.7 for every class and side: entry (i, c) moves prototype 2 c + side in the order of the global batch."""
        rows, y, on = gather_rows(each), gather_rows(label), gather_rows(valid)
        number = 2 * torch.arange(y.shape[1], device=y.device) + y.long()
        moved = ema_update(
            self.prototypes.flatten(0, 1),
            rows[on].to(self.prototypes.dtype),
            number[on],
            self.arguments.momentum_prototype,
        )
        self.prototypes.copy_(moved.view_as(self.prototypes))

    # Scores.

    def forward(self, x: Tensor) -> Tensor:
        """Probability of every class (B, C), by the classifier."""
        probabilities: Tensor = self.classifier(self.encoder(x)).sigmoid()
        return probabilities

    @torch.no_grad()
    def score(self, x: Tensor, text_scores: Tensor | None = None) -> dict[str, Tensor]:
        """All scores of a batch of inputs: `classifier`, `auxiliary`, `prototype`, `fused` (B, C) and `embedding` (B, dim)."""
        v = self.encoder(x)
        z, logits = self.projector(v), self.classifier(v)
        each = self.in_spaces(z)
        return {
            "classifier": logits.sigmoid(),
            "auxiliary": self._auxiliary_logits(each).sigmoid(),
            "prototype": self._prototype_logits(each, self.prototypes).softmax(2)[..., 1],
            "fused": self._positive_scores(logits, each, self.prototypes),
            "embedding": z,
        }

    @torch.no_grad()
    def init_prototypes(self) -> None:
        """Both prototypes of every class, from all anchor pictures by their web label of it, in the space of the class."""
        assert self.anchor_batches is not None, "anchor_batches must be set before prototypes are"
        training = self.training
        self.eval()
        sums = torch.zeros_like(self.prototypes)
        for batch in self.anchor_batches():
            each = self.in_spaces(self.projector(self.momentum_encoder(batch["views"][0].to(self.device))))
            side = F.one_hot(batch["label"].to(self.device).long(), 2).to(each.dtype)
            sums += torch.einsum("bcp,bcd->cpd", side, each)
        self.train(training)
        self.prototypes.copy_(F.normalize(sums, dim=2))


def correct_entries(scores: Tensor, labels: Tensor, anchors: Tensor, *, threshold: float) -> tuple[Tensor, Tensor]:
    """Keep, flip or ignore every entry of a label matrix (CAPro 5M.3).

    Parameters
    ----------
    scores : Tensor (N, C)
        r+, probability that the class is there.
    labels : Tensor (N, C)
        0 or 1.
    anchors : Tensor (N, C)
        Not 0 where the entry holds for good.
    threshold : float
        gamma, above 1/2.

    Returns
    -------
    Tensor (N, C)
        Corrected labels; ignored entries keep their value.
    Tensor (N, C) bool
        Entries that are not ignored.

    Examples
    --------
    >>> scores, labels = torch.tensor([[0.95, 0.05, 0.3]]), torch.tensor([[0, 1, 1]])
    >>> label, valid = correct_entries(scores, labels, torch.zeros(1, 3), threshold=0.9)
    >>> label.tolist(), valid.tolist()
    ([[1, 0, 1]], [[True, True, False]])
    """
    if labels.shape != scores.shape or anchors.shape != scores.shape:
        raise UsageError(
            f"scores, labels and anchors must be of one shape (N, C): {tuple(scores.shape)}, {tuple(labels.shape)}, "
            f"{tuple(anchors.shape)}"
        )
    own = torch.where(labels > 0, scores, 1 - scores)
    held = anchors != 0
    flipped = (1 - own >= threshold) & ~held
    kept = (own >= 1 / scores.shape[1]) | held
    return torch.where(flipped, 1 - labels, labels), kept | flipped


def positive_weights(labels: Tensor) -> Tensor:
    """Weight of the positive side of every class (CAPro 5M.1): sqrt((N - n_c) / n_c), a class without pictures counting one.

    Examples
    --------
    >>> positive_weights(torch.tensor([[1, 0], [0, 0], [0, 0], [0, 0], [0, 0]])).tolist()
    [2.0, 2.0]
    """
    count = labels.sum(0).clamp_min(1).to(torch.float32)
    return ((len(labels) - count) / count).sqrt()
