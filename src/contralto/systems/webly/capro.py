"""CAPro: webly supervised learning with cross-modality aligned prototypes.

Images found by class names carry labels that are wrong in a structured way: the wrong sense of a word can be the
majority, so a rule that trusts the majority keeps the wrong images. CAPro picks a few anchors per class by text (page
text against the class definition), sets visual prototypes from them, and lets prototypes, the classifier and a dictionary
of recent samples correct labels and drop off-topic images while it trains.

Paper: "CAPro: Webly Supervised Learning with Cross-Modality Aligned Prototypes", NeurIPS 2023, arXiv 2310.09761.

The method, in the numbered steps to which the docstrings of the parts refer as "CAPro 5.6":

- 0.1 leave out tiny, long and blank pictures; 0.4 clean the texts.
- 2   *vanilla*: train with the losses of 5.4 but without prototypes and cleaning.
- 3.1 exact k nearest neighbours of every picture by the vanilla features; 3.2 k-reciprocal re-ranking of each list within
  itself; 3.3 the nearest of them become edges; 3.4 a symmetric, normalised graph; 3.5 texts smoothed along it; 3.6 the same
  without re-ranking.
- 4.1 distance of every (smoothed) text to the definition of its class; 4.3 the K nearest per class are anchors, whose labels
  hold for good; 4.5 prototypes start as the means of their anchors in the space of the momentum encoder.
- 5.2 momentum encoder, 5.3 queue of its keys; 5.4 losses: classification, auxiliary classification of the embedding, instance
  contrast against the queue, reconstruction of the features, prototype contrast; 5.5 collective bootstrapping: a soft target
  looked up among the keys of the queue; 5.6 correction: r = alpha softmax(classifier) + (1 - alpha) softmax(prototypes), and
  in this order: anchors hold, max r >= gamma corrects, r of the given class >= 1/C keeps, the rest is off-topic; 5.7 prototypes
  move by kept samples; 5.8 warm-up and cosine; 5.9 weak and strong views; 5.10 only the classifier is used afterwards.
- 6.1 judge all training pictures once by 5.6; 6.2 fine-tune the classifiers on what is left, with mixup; 6.3 sample weights.

Where paper, released code and this file differ: the encoder is frozen for the first epochs and then released, as the
figure shows (the released trainer never releases it); sample weights act per sample (there, an outer product makes them a
constant); text edges are similarities by default (there, distances). Arguments that the paper does not have are off by
default and listed in `EXTENSIONS`.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, mean_weight, world_size
from contralto.encoders.image import freeze
from contralto.errors import UsageError
from contralto.losses.contrast import contrast, soft_cross_entropy
from contralto.memory.momentum import momentum_update
from contralto.prototypes.bank import ema_update, prototype_logits
from contralto.prototypes.correction import Correction, correct_labels
from contralto.systems.webly.base import WeblySystem, instance_contrast, label_loss, lr_factor

__all__ = ["EXTENSIONS", "CAPro", "Stage", "StagedCAPro", "bootstrapping_target", "bootstrapping_weights"]

Stage = Literal["plain", "vanilla", "capro", "finetune"]

EXTENSIONS = ("text_weight", "keep_threshold", "class_balanced", "reconcile")
"""Arguments that go beyond the paper; off by default."""


class StagedCAPro(WeblySystem):
    """Stages, rates and freezing of both forms of CAPro, with one label and with several."""

    stages = ("plain", "vanilla", "capro", "finetune")

    def on_train_epoch_start(self) -> None:
        """Rate of the epoch; frozen or released encoder; prototypes from the anchors when it is time."""
        h, epoch = self.arguments, self.current_epoch
        rate, warmup = self._rate_and_warmup()
        self.set_rate(rate * lr_factor(epoch, warmup, self.stage_epochs(h, h.stage)))
        if h.stage == "finetune":
            freeze(self.encoder)
        elif h.stage == "capro":
            self.freeze_encoder_until(epoch, h.frozen_encoder_epoch)
        if h.stage == "capro" and self.sets_prototypes(epoch):
            self.init_prototypes()

    def sets_prototypes(self, epoch: int) -> bool:
        """Whether prototypes are set from the anchors at the start of an epoch."""
        return bool(epoch == self.arguments.init_proto_epoch)

    def configure_optimizers(self) -> Any:
        """SGD on all but the momentum encoder."""
        trained = [p for name, p in self.named_parameters() if not name.startswith("momentum_encoder.")]
        return torch.optim.SGD(
            trained, lr=self._rate_and_warmup()[0], momentum=0.9, weight_decay=self.arguments.weight_decay
        )

    def _rate_and_warmup(self) -> tuple[float, int]:
        h = self.arguments
        plain = h.vanilla_lr if h.plain_lr is None else h.plain_lr
        by_stage: dict[str, tuple[float, int]] = {
            "plain": (plain, h.vanilla_warmup_epochs),
            "vanilla": (h.vanilla_lr, h.vanilla_warmup_epochs),
            "capro": (h.lr, h.warmup_epochs),
            "finetune": (h.finetune_lr, 0),
        }
        return by_stage[h.stage]

    @staticmethod
    def stage_epochs(arguments: Any, stage: str) -> int:
        """Epochs of a stage; plain training gets as many as the other three together."""
        parts = {
            "vanilla": arguments["vanilla_epochs"],
            "capro": arguments["epochs"],
            "finetune": arguments["finetune_epochs"],
        }
        return int(sum(parts.values()) if stage == "plain" else parts[stage])


class CAPro(StagedCAPro):
    """The network of CAPro and one training step of each of its stages.

    Parameters
    ----------
    encoder : nn.Module
        Pictures (B, 3, S, S) to features (B, `num_features`). `nn.Identity()` when the views are features already.
    num_classes : int
        C.
    num_features : int
        D_v, width of the features.
    stage : {"plain", "vanilla", "capro", "finetune"}
        "plain" is the baseline: cross-entropy on the given labels, as many epochs as the other three together. "vanilla"
        (CAPro 2) has no prototypes and no cleaning, "capro" (stage 5) has all, "finetune" (stage 6) trains the
        classifiers on the cleaned list with the encoder frozen.
    epochs, lr, warmup_epochs : int, float, int
        Of stage "capro". SGD with momentum 0.9, linear warm-up, cosine.
    vanilla_epochs, vanilla_lr, vanilla_warmup_epochs : int, float, int
        Of stage "vanilla"; "plain" uses its warm-up.
    plain_lr : float, optional
        Rate of stage "plain", so that the baseline can have its own best; default: `vanilla_lr`.
    finetune_epochs, finetune_lr : int, float
        Of stage "finetune"; cosine without warm-up.
    mixup : float
        Parameter of the Beta distribution of mixup while fine-tuning; 0 = off.
    frozen_encoder_epoch : int
        The encoder is frozen in epochs below this one (stage "capro").
    init_proto_epoch : int
        Prototypes are set from the anchors at the start of this epoch; their losses and updates begin in the next.
    start_clean_epoch : int
        Labels are corrected in epochs above this one.
    threshold : float
        gamma: a label is corrected when the best fused score reaches it.
    alpha : float
        Share of the classifier in the fused score, the rest is the prototypes'; the same for the votes of 5.5.
    beta : float
        Share of the soft target.
    temperature : float
        tau of instance and prototype contrast.
    momentum_encoder, momentum_prototype : float
        m_e and m_p. A prototype moves by (1 - m_p) per sample of its class: with few steps take a smaller m_p. None (here
        and for `queue_size`) is for jobs that know the data: they fill it by `scale_rule`.
    update_proto_freq : int
        Prototypes move in epochs divisible by it; 0 = never, they are set anew from the anchors in every epoch.
    lambda_ins, lambda_recn, lambda_pro : float
        Weights of instance contrast, reconstruction and prototype contrast.
    label_reference : int
        Which soft target is used where (0 to 10, baselines of the paper): 0 none, 1 own softmax, 2 uniform, 3 own confidence,
        4 confidence of the fused score, 5 neighbours in the batch, 6 prototypes, 7 collective bootstrapping on the
        auxiliary head (CAPro), 8 auxiliary softmax for the main head, 9 collective bootstrapping on the main head,
        10 own softmax on the auxiliary head.
    dim, hidden, queue_size : int
        Width of embeddings, hidden width of projector and reconstructor, number of keys in the queue.
    weight_decay : float
    text_weight : float
        Extension. Share of the text's P(class | text) in the fused score: r <- (1 - w) r + w P(class | text).
    keep_threshold : float, optional
        Extension. The given class must score this much to be kept; default 1/C as in the paper.
    seed : int

    Attributes
    ----------
    prototypes : Tensor (C, dim)
        Unit rows, zero before `init_proto_epoch`.

    Examples
    --------
    >>> system = CAPro(nn.Identity(), num_classes=3, num_features=8, hidden=16, dim=4, queue_size=16)
    >>> batch = {"views": [torch.randn(4, 8), torch.randn(4, 8)], "label": torch.tensor([0, 1, 2, 0]),
    ...          "anchor": torch.zeros(4, dtype=torch.bool), "weight": torch.ones(4), "index": torch.arange(4)}
    >>> sorted(system.step(batch, epoch=0))
    ['loss', 'loss_aux', 'loss_cls', 'loss_ins', 'loss_recn']
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        num_features: int,
        *,
        stage: Stage = "capro",
        epochs: int = 60,
        lr: float = 0.1,
        warmup_epochs: int = 5,
        vanilla_epochs: int = 120,
        vanilla_lr: float = 0.1,
        vanilla_warmup_epochs: int = 10,
        plain_lr: float | None = None,
        finetune_epochs: int = 15,
        finetune_lr: float = 1e-4,
        mixup: float = 0.8,
        frozen_encoder_epoch: int = 5,
        init_proto_epoch: int = 5,
        start_clean_epoch: int = 10,
        threshold: float = 0.6,
        alpha: float = 0.5,
        beta: float = 0.1,
        temperature: float = 0.1,
        momentum_encoder: float = 0.999,
        momentum_prototype: float | None = 0.999,
        update_proto_freq: int = 1,
        lambda_ins: float = 1.0,
        lambda_recn: float = 1.0,
        lambda_pro: float = 1.0,
        label_reference: int = 7,
        dim: int = 128,
        hidden: int = 2048,
        queue_size: int | None = 8192,
        weight_decay: float = 1e-4,
        text_weight: float = 0.0,
        keep_threshold: float | None = None,
        seed: int = 1024,
    ) -> None:
        super().__init__()
        _check(threshold, alpha, beta, text_weight, temperature, label_reference)
        self.save_hyperparameters(ignore=["encoder"])
        self.build(encoder, num_classes, num_features, stage, queue_size)

    # One training step, in the order of the method.

    def step(self, batch: Batch, epoch: int, batch_idx: int = 0) -> dict[str, Tensor]:
        """Losses of one batch; moves momentum encoder, queue and prototypes.

        Parameters
        ----------
        batch : dict
            `views` [weak, strong] (stage "plain": weak), `label`, `anchor`, `weight`, `text_scores` if `text_weight` > 0.
            Extension: `posterior` (B, C), of `reconcile`, takes the place of the fused scores, from the first epoch on;
            `target` (B, C), soft labels, takes the place of the corrected labels for both classifiers.
        epoch, batch_idx : int
            Numbers of the epoch and of the batch in it, from 0.

        Returns
        -------
        dict
            `loss` and its parts; with cleaning also `kept` and `corrected`, shares of the batch.
        """
        h = self.arguments
        if h.stage == "plain":
            logits = self.classifier(self.encoder(batch["views"][0]))
            rows = mean_weight(batch["label"].new_tensor(len(logits)))  # the last batch of an epoch may be uneven
            loss = rows * (batch["weight"] * label_loss(logits, batch["label"], batch.get("target"))).mean()
            return {"loss": loss, "loss_cls": loss}
        label, weight = batch["label"], batch["weight"]
        prototypes_on = h.stage == "capro" and epoch > h.init_proto_epoch
        posterior, soft = batch.get("posterior"), batch.get("target")
        cleaning = h.stage == "capro" and (epoch > h.start_clean_epoch or posterior is not None)

        # 1. Features, embedding, reconstruction; in warm-up its gradient reaches projector and encoder.
        v = self.encoder(batch["views"][0])
        z = self.projector(v)
        logits = self.classifier(v)
        reconstruction = self.reconstructor(z.detach() if prototypes_on else z)
        # 2. The momentum encoder moves before it computes the keys.
        momentum_update(self.momentum_encoder, self.encoder, h.momentum_encoder)
        # 3. Auxiliary classifier on the unit embedding; keys of the strong view.
        aux = self.auxiliary(F.normalize(z, dim=1))
        with torch.no_grad():
            key = self.projector(self.momentum_encoder(batch["views"][1]))
        # 4. Negatives are read before the new keys enter the queue.
        negatives = self.queue.read()
        self.queue.enqueue(gather_rows(key))
        # 5. Collective bootstrapping with the updated queue and the prototypes as they are.
        bootstrap = self._bootstrap(z) if h.label_reference in (7, 9) else None
        # 6. Prototypes as they are before their update.
        prototypes = self.prototypes.clone()
        # 7. Noise removal and label correction.
        fused = posterior
        if fused is None:
            fused = self.fused_scores(logits, z, prototypes, batch.get("text_scores"))
        correction = None
        if cleaning:
            if h.text_weight > 0 and posterior is None and "text_scores" not in batch:
                raise UsageError("text_weight > 0 needs text_scores in the batch")
            correction = self._correct(fused, batch)
            label, kept = correction.labels, correction.kept
        else:
            kept = torch.ones_like(label, dtype=torch.bool)
        # 8. Prototypes move, in the order of the batch, with kept samples and corrected labels.
        if prototypes_on and h.update_proto_freq and epoch % h.update_proto_freq == 0:
            all_kept, all_z, all_labels = gather_rows(kept), gather_rows(z), gather_rows(label)
            moved = ema_update(prototypes, all_z[all_kept], all_labels[all_kept], h.momentum_prototype)
            self.prototypes.copy_(moved)
        # 9. Losses: instance contrast on all rows, the others on the kept ones.
        out: dict[str, Tensor] = {}
        if h.stage != "finetune":
            out["loss_ins"] = h.lambda_ins * instance_contrast(z, key, negatives, h.temperature)
        learns = kept if soft is None else torch.ones_like(kept)  # a soft label says by itself how sure it is
        if bool(learns.any()):
            target, soft_label = (None if x is None else x[learns] for x in (bootstrap, soft))
            out |= self._classification(
                logits[learns], aux[learns], v[learns], z[learns], label[learns], weight[learns], fused[learns], prototypes,
                target, soft_label,
            )  # fmt: skip
        if bool(kept.any()):
            if h.stage != "finetune":
                out["loss_recn"] = h.lambda_recn * F.mse_loss(reconstruction[kept], v[kept].detach())
            if prototypes_on:
                out["loss_pro"] = h.lambda_pro * contrast(
                    z[kept], prototypes, positives=label[kept], temperature=h.temperature, normalize=False
                )
        elif world_size() > 1:  # every rank must reach all parameters
            nothing = 0.0 * (logits.sum() + aux.sum() + reconstruction.sum())
            out["loss_cls"] = out.get("loss_cls", nothing) + nothing
        rows = mean_weight(label.new_tensor(len(label)))
        if world_size() > 1:
            share = mean_weight(kept.sum())
            on_all = {"loss_ins"} if soft is None else {"loss_ins", "loss_cls", "loss_aux"}
            out = {k: (rows if k in on_all else share) * v for k, v in out.items()}
        if h.stage == "finetune" and h.mixup > 0:
            out["loss_mixup"] = rows * self._mixup(batch["views"][0], label, soft, epoch, batch_idx)
        out["loss"] = torch.stack(list(out.values())).sum()
        if correction is not None:
            out["kept"] = kept.float().mean()
            out["corrected"] = (kept & (label != batch["label"])).float().mean()
        return out

    def _bootstrap(self, z: Tensor) -> Tensor:
        h = self.arguments
        with torch.no_grad():
            keys = self.queue.read().to(z.dtype)
            votes = h.alpha * self.auxiliary(keys).softmax(1)
            votes = votes + (1 - h.alpha) * self.prototype_scores(keys, self.prototypes)
            return bootstrapping_target(z, keys, votes)

    def prototype_scores(self, z: Tensor, prototypes: Tensor) -> Tensor:
        """Softmax of the similarities over the temperature."""
        return prototype_logits(z, prototypes.to(z.dtype), self.arguments.temperature).softmax(1)

    @torch.no_grad()
    def fused_scores(self, logits: Tensor, z: Tensor, prototypes: Tensor, text_scores: Tensor | None = None) -> Tensor:
        """The scores r of CAPro 5.6; with `text_weight` the text has its say."""
        h = self.arguments
        fused: Tensor = h.alpha * logits.softmax(1) + (1 - h.alpha) * self.prototype_scores(z, prototypes)
        if h.text_weight > 0 and text_scores is not None:
            fused = (1 - h.text_weight) * fused + h.text_weight * text_scores
        return fused

    def _correct(self, fused: Tensor, batch: Batch) -> Correction:
        return correct_labels(
            fused,
            batch["label"],
            batch["anchor"],
            threshold=self.arguments.threshold,
            keep_threshold=self.arguments.keep_threshold,
        )

    def _classification(
        self,
        logits: Tensor,
        aux: Tensor,
        v: Tensor,
        z: Tensor,
        label: Tensor,
        weight: Tensor,
        fused: Tensor,
        prototypes: Tensor,
        bootstrap: Tensor | None,
        soft: Tensor | None,
    ) -> dict[str, Tensor]:
        """Both heads: hard label on one, (1 - beta) hard + beta soft on the other, by `label_reference`."""
        mode, beta = self.arguments.label_reference, self.arguments.beta
        hard, hard_aux = label_loss(logits, label, soft), label_loss(aux, label, soft)
        if mode in (7, 10):
            target = aux.softmax(1) if bootstrap is None else bootstrap
            hard_aux = (1 - beta) * hard_aux + beta * soft_cross_entropy(aux, target)
        elif mode in (3, 4):
            score = logits.softmax(1) if mode == 3 else fused
            confidence = score.detach().gather(1, label.unsqueeze(1)).squeeze(1)
            hard = confidence * hard + (1 - confidence) * soft_cross_entropy(logits, logits.softmax(1))
        elif mode != 0:
            if mode == 1:
                target = logits.softmax(1)
            elif mode == 2:
                target = torch.full_like(logits, 1 / logits.shape[1])
            elif mode == 5:
                target = _neighbour_target(v, logits)
            elif mode == 6:
                target = self.prototype_scores(z, prototypes)
            elif mode == 8:
                target = aux.softmax(1)
            else:
                assert bootstrap is not None
                target = bootstrap
            hard = (1 - beta) * hard + beta * soft_cross_entropy(logits, target)
        return {"loss_cls": (weight * hard).mean(), "loss_aux": (weight * hard_aux).mean()}

    def _mixup(self, x: Tensor, label: Tensor, soft: Tensor | None, epoch: int, batch_idx: int) -> Tensor:
        """CAPro 6.2: one Beta draw per batch, inputs and losses mixed; the draw is a function of (seed, epoch, batch)."""
        rng = np.random.default_rng([self.arguments.seed, epoch, batch_idx])
        share = float(rng.beta(self.arguments.mixup, self.arguments.mixup))
        order = torch.from_numpy(rng.permutation(len(x))).to(x.device)
        logits = self.classifier(self.encoder(share * x + (1 - share) * x[order]))
        other = label_loss(logits, label[order], None if soft is None else soft[order])
        return (share * label_loss(logits, label, soft) + (1 - share) * other).mean()

    def sets_prototypes(self, epoch: int) -> bool:
        """When it is time; without updates, at the start of every later epoch too."""
        h = self.arguments
        return super().sets_prototypes(epoch) or (h.update_proto_freq == 0 and epoch > h.init_proto_epoch)


def bootstrapping_target(z: Tensor, keys: Tensor, votes: Tensor) -> Tensor:
    """Soft labels looked up in the dictionary of recent keys (CAPro 5.5), without gradient.

    Every key votes in proportion to its positive cosine: ``a_ij = clip(z_i . z'_j, 0, 1) + 1e-7``, rows scaled to sum 1.

    Parameters
    ----------
    z : Tensor (B, d)
        Unit rows.
    keys : Tensor (Q, d)
        Unit rows.
    votes : Tensor (Q, C)
        Class distribution of every key.

    Returns
    -------
    Tensor (B, C)
        Rows that sum to 1.

    Examples
    --------
    >>> bootstrapping_target(torch.eye(2), torch.eye(2), torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    tensor([[1.0000e+00, 5.0000e-08],
            [5.0000e-01, 5.0000e-01]])
    """
    target = (bootstrapping_weights(z, keys) @ votes).clamp(0, 1)
    return target / target.sum(1, keepdim=True)


def bootstrapping_weights(z: Tensor, keys: Tensor) -> Tensor:
    """The share (B, Q) that every key has in the soft label of every sample; rows sum to 1 (see `bootstrapping_target`)."""
    share = (z.detach() @ keys.T).clamp(0, 1) + 1e-7
    return share / share.sum(1, keepdim=True)


def _neighbour_target(v: Tensor, logits: Tensor, k: int = 10) -> Tensor:
    """Mode 5: similarity-weighted mean of softmax(logits / 2) over the k nearest of the batch, cosine clipped to [0, 1]."""
    unit = F.normalize(v.detach(), dim=1)
    similarity, index = (unit @ unit.T).clamp(0, 1).topk(min(k, len(v)), dim=1)
    share = similarity / similarity.sum(1, keepdim=True).clamp_min(1e-7)
    return (share.unsqueeze(2) * (logits.detach() / 2).softmax(1)[index]).sum(1)


def _check(
    threshold: float, alpha: float, beta: float, text_weight: float, temperature: float, label_reference: int
) -> None:
    for name, value in (("alpha", alpha), ("beta", beta), ("text_weight", text_weight)):
        if not 0 <= value <= 1:
            raise UsageError(f"{name} must be in [0, 1], got {value}")
    if not temperature > 0 or not threshold > 0:
        raise UsageError(f"temperature and threshold must be above 0, got {temperature} and {threshold}")
    if label_reference not in range(11):
        raise UsageError(f"label_reference must be a whole number from 0 to 10, got {label_reference}")
