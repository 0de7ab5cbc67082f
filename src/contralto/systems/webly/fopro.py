"""FoPro: few-shot guided robust webly-supervised prototypical learning.

Classifiers trained on web images lose accuracy in the real world: labels are wrong, and web pictures look different. A few
pictures per class with labels by people, the shots, set the centres of the classes; web pictures are drawn to them, get
another label or are left out, by classifier, prototypes and a learnt relation between picture and prototype. Without shots
the web pictures of each class take their place.

Paper: "FoPro: Few-Shot Guided Robust Webly-Supervised Prototypical Learning", AAAI 2023, arXiv 2212.00465.

The method, in the numbered steps to which the docstrings of the parts refer as "FoPro 6":

- 2   network of `WeblySystem`, and a relation module on pairs of embedding and prototype.
- 3   prototypes start as the means of the shots in the space of the momentum encoder.
- 4   prototype logits (z . z^c - margin [shot, c = y]) / T_c.
- 5   soft target t = alpha softmax(classifier) + (1 - alpha) softmax(z . z^c / T_c), for shots their label; confidence q = t of
  the given label.
- 6   cleaning by rule: max t > gamma corrects, q > 1/C keeps, shots hold. 7 later, a relation score > gamma keeps too, and is
  asked first.
- 8   prototypes move by the momentum embeddings of kept web pictures and shots; 13 their temperatures follow the density.
- 9   archive: samples sure enough for 10, the auxiliary classification of both views with a margin; 11 samples from which the
  relation learns.
- 12  losses: q CE(label) + (1 - q) CE(t) on the classifier, prototype contrast, auxiliary, reconstruction, relation, instance
  contrast against the queue.
- 14  stages: *prototypes* (up to the first cleaned epoch, relation off), *relation* (it alone learns), *fopro* (all), and, where
  `finetune_epochs` is not 0, *finetune* on the cleaned labels.

Where paper, released code and this file differ: temperatures are bounded and a class without a kept sample keeps its own
(there it becomes 0); the cosine of the learning rate runs over stages *prototypes* and *fopro* together, whose epochs
count through.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, mean_weight, world_size
from contralto.encoders.heads import Relation
from contralto.encoders.image import freeze
from contralto.errors import UsageError
from contralto.losses.contrast import soft_cross_entropy
from contralto.losses.margin import margin_logits
from contralto.memory.momentum import momentum_update
from contralto.prototypes.bank import density_temperature, ema_update, prototype_logits
from contralto.prototypes.correction import Correction, Verdict, correct_labels
from contralto.systems.webly.base import WeblySystem, instance_contrast, label_loss, lr_factor

__all__ = ["FoPro", "Stage"]

Stage = Literal["plain", "prototypes", "relation", "fopro", "finetune"]


class FoPro(WeblySystem):
    """The network of FoPro and one training step of each of its stages.

    The defaults are those of the paper's fine-grained sets; `webvision1k` and `google500` are presets.

    Parameters
    ----------
    encoder : nn.Module
        Pictures (B, 3, S, S) to features (B, `num_features`). `nn.Identity()` when the views are features already.
    num_classes : int
        C.
    num_features : int
        D_v, width of the features.
    stage : {"plain", "prototypes", "relation", "fopro", "finetune"}
        "plain" is the baseline: cross-entropy on the given labels, shots among them, as many epochs as the others together.
    optimizer : {"adam", "sgd"}
        SGD has momentum 0.9.
    epochs, lr, warmup_epochs : int, float, int
        Of stages "prototypes" and "fopro" together: linear warm-up, then cosine.
    plain_lr : float, optional
        Rate of the baseline; default: `lr`.
    beta1_epoch : int
        Adam's beta1 is 0.9 before this epoch and 0.1 from it on.
    relation_epochs, relation_lr : int, float
        Of stage "relation": Adam, constant rate.
    finetune_epochs, finetune_lr : int, float
        Of stage "finetune" (FoPro 14): cosine; the encoder learns at a tenth of the rate.
    mixup : float
        Parameter of the Beta distribution of mixup while fine-tuning, which half of the batches undergo; 0 = off.
    frozen_encoder_epoch : int
        The encoder is frozen in epochs below this one.
    init_proto_epoch : int
        Prototypes are set at the start of this epoch; they are used from the next on.
    start_clean_epoch : int
        Labels are corrected in epochs above this one.
    relation_clean_epoch : int
        The relation has its say in epochs above this one; stage "prototypes" ends with this epoch.
    cleaning : {"fusion", "relation"}
        What corrects then: t, or the relation alone.
    threshold : float
        gamma, for t, for the relation, and for q while there are no prototypes.
    alpha : float
        Share of the classifier in t.
    margin : float
        Of the prototype logits of shots, and of the auxiliary classifier on all samples.
    archive_distance : float
        A sample is in the archive if it sees all prototypes as its own does, up to this distance (no cleaning yet).
    temperature : float
        tau; the temperature of prototypes before their first density.
    density : bool
        Give every prototype a temperature by its density.
    relation_every : int
        The relation learns in epochs divisible by it.
    momentum_encoder, momentum_prototype : float
        None is for jobs that know the data, here and for `queue_size`: they fill it by `scale_rule`.
    dim, hidden, queue_size : int
        Width of embeddings; hidden width of projector and reconstructor, 0 for a single linear layer; keys in the queue.
    class_weighted : bool
        Weigh the classification losses of a sample by mean class size / size of its (corrected) class.
    keep_threshold : float, optional
        Extension. The given class must score more than this in t to be kept; default 1/C as in the paper.
    weight_decay : float
    seed : int

    Attributes
    ----------
    prototypes : Tensor (C, dim)
        Unit rows, zero before `init_proto_epoch`.
    temperatures : Tensor (C,)
        T_c.

    Examples
    --------
    >>> system = FoPro(nn.Identity(), num_classes=3, num_features=8, hidden=16, dim=4, queue_size=16)
    >>> batch = {"views": [torch.randn(4, 8), torch.randn(4, 8)], "label": torch.tensor([0, 1, 2, 0]),
    ...          "anchor": torch.tensor([True, False, False, False]), "weight": torch.ones(4), "index": torch.arange(4)}
    >>> sorted(system.step(batch, epoch=0))
    ['loss', 'loss_aux', 'loss_cls', 'loss_recn']
    """

    stages = ("plain", "prototypes", "relation", "fopro", "finetune")
    temperatures: Tensor
    distance: Tensor
    count: Tensor
    class_weights: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        num_features: int,
        *,
        stage: Stage = "fopro",
        optimizer: Literal["adam", "sgd"] = "adam",
        epochs: int = 200,
        lr: float = 1e-4,
        warmup_epochs: int = 5,
        plain_lr: float | None = None,
        beta1_epoch: int = 40,
        relation_epochs: int = 20,
        relation_lr: float = 1e-4,
        finetune_epochs: int = 0,
        finetune_lr: float = 1e-2,
        mixup: float = 0.8,
        frozen_encoder_epoch: int = 5,
        init_proto_epoch: int = 20,
        start_clean_epoch: int = 25,
        relation_clean_epoch: int = 26,
        cleaning: Literal["fusion", "relation"] = "fusion",
        threshold: float = 0.6,
        alpha: float = 0.5,
        margin: float = 0.5,
        archive_distance: float = 20.0,
        temperature: float = 0.1,
        density: bool = True,
        relation_every: int = 1,
        momentum_encoder: float = 0.999,
        momentum_prototype: float | None = 0.999,
        dim: int = 128,
        hidden: int = 2048,
        queue_size: int | None = 2048,
        class_weighted: bool = False,
        keep_threshold: float | None = None,
        weight_decay: float = 1e-8,
        seed: int = 1024,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UsageError(f"alpha must be in [0, 1], got {alpha}")
        if not temperature > 0 or not threshold > 0:
            raise UsageError(f"temperature and threshold must be above 0, got {temperature} and {threshold}")
        if not init_proto_epoch <= start_clean_epoch <= relation_clean_epoch:
            raise UsageError(
                f"init_proto_epoch <= start_clean_epoch <= relation_clean_epoch must hold, got {init_proto_epoch}, "
                f"{start_clean_epoch}, {relation_clean_epoch}"
            )
        self.save_hyperparameters(ignore=["encoder"])
        self.build(encoder, num_classes, num_features, stage, queue_size)

    def build_more(self, num_classes: int) -> None:
        """The relation, and the counters of the prototypes."""
        self.relation = Relation(self.arguments.dim)
        self.register_buffer("temperatures", torch.full((num_classes,), self.arguments.temperature))
        for name in ("distance", "count"):
            self.register_buffer(name, torch.zeros(num_classes))
        self.register_buffer("class_weights", torch.ones(num_classes))

    # One training step, in the order of the method.

    def step(self, batch: Batch, epoch: int, batch_idx: int = 0) -> dict[str, Tensor]:
        """Losses of one batch; moves momentum encoder, queue, prototypes and their counters.

        Parameters
        ----------
        batch : dict
            `views` [weak, strong] (stage "plain": weak), `label`, `anchor` (a shot), `weight`.
        epoch, batch_idx : int
            Number of the epoch, counted through stages "prototypes" and "fopro", and of the batch in it, from 0.

        Returns
        -------
        dict
            `loss` and its parts; with cleaning also `kept` and `corrected`, shares of the batch.
        """
        h = self.arguments
        if h.stage in ("plain", "finetune"):
            return self._classify(batch, epoch, batch_idx)
        given, shot = batch["label"], batch["anchor"]
        prototypes_on, cleaning = epoch > h.init_proto_epoch, epoch > h.start_clean_epoch
        if h.stage == "relation":
            prototypes_on = cleaning = True
        out: dict[str, Tensor] = {}

        # 1. Features and embeddings of both views; the relation alone needs no gradient of them.
        with torch.set_grad_enabled(h.stage != "relation"):
            v = self.encoder(batch["views"][0])
            z, logits = self.projector(v), self.classifier(v)
        # 2. The momentum encoder moves before it is used.
        if h.stage != "relation":
            momentum_update(self.momentum_encoder, self.encoder, h.momentum_encoder)
        with torch.no_grad():  # in warm-up too, where only its batch norms follow: prototypes start in this space
            slow = self.projector(self.momentum_encoder(batch["views"][0]))
        # 3. Soft target and confidence, by prototypes as they are.
        prototypes = self.prototypes.clone()
        target = self.fused_scores(logits, z, prototypes) if prototypes_on else logits.detach().softmax(1)
        target = torch.where(shot.unsqueeze(1), F.one_hot(given, target.shape[1]).to(target.dtype), target)
        confidence = target.gather(1, given.unsqueeze(1)).squeeze(1)
        # 4. Cleaning, by the rule first, later with the relation.
        label, kept, sure = given, torch.ones_like(shot), shot | (confidence > 1 / target.shape[1])
        if cleaning:
            with_relation = h.stage == "fopro" and epoch > h.relation_clean_epoch
            correction, sure = self.judge(target, z, given, shot, prototypes, with_relation=with_relation)
            label, kept = correction.labels, correction.kept
        # 5. Prototypes move, in the order of the global batch, by the slow embeddings of the kept samples.
        if cleaning:
            self._move_prototypes(slow, label, kept)
        # 6. The archive.
        if cleaning:
            archive = kept
        elif prototypes_on:
            archive = shot | (self._archive_distance(z.detach(), given, prototypes) <= h.archive_distance)
        else:
            archive = shot | (confidence > h.threshold)
        # 7. The relation learns from sure samples, or alone from the archive, by the prototypes after their update.
        learns = {"prototypes": torch.zeros_like(shot), "relation": archive}.get(h.stage, sure)
        if prototypes_on and (epoch % h.relation_every == 0 or h.stage == "relation"):
            self._add(out, "loss_rel", learns, lambda rows: self._relation_loss(z[rows], label[rows]))
        if h.stage == "relation":
            return self._with_total(out, cleaning, kept, label, given)
        # 8. Losses of the network, each a mean over its own samples.
        weight, every = batch["weight"] * self.class_weights[label].to(v.dtype), torch.ones_like(kept)
        if prototypes_on:
            with torch.no_grad():
                key = self.projector(self.momentum_encoder(batch["views"][1]))
            negatives = self.queue.read()
            self.queue.enqueue(gather_rows(key))
            hard, soft = label_loss(logits, label), soft_cross_entropy(logits, target)
            each = weight * (confidence * hard + (1 - confidence) * soft)
            scale = self.temperatures.to(z.dtype)
            near = margin_logits(z @ prototypes.to(z.dtype).T, label, h.margin * shot.to(z.dtype), scale)
            self._add(out, "loss_pro", kept, lambda rows: label_loss(near[rows], label[rows]).mean())
            self._add(out, "loss_ins", every, lambda _: instance_contrast(z, key, negatives, h.temperature))
        else:
            each = weight * label_loss(logits, label)
        self._add(out, "loss_cls", kept, lambda rows: each[rows].mean())
        self._add(
            out, "loss_aux", archive, lambda rows: self._auxiliary_loss(z, batch["views"][1], label, weight, rows)
        )
        source, goal = (z.detach(), v.detach()) if prototypes_on else (self.projector(v.detach()), v.detach())
        self._add(out, "loss_recn", every, lambda _: F.mse_loss(self.reconstructor(source), goal))
        return self._with_total(out, cleaning, kept, label, given)

    def judge(
        self,
        target: Tensor,
        z: Tensor,
        given: Tensor,
        shot: Tensor,
        prototypes: Tensor,
        *,
        with_relation: bool,
    ) -> tuple[Correction, Tensor]:
        """Keep, correct or drop labels (FoPro 6, with the relation 7).

        Parameters
        ----------
        target : Tensor (B, C)
            t.
        z : Tensor (B, d)
        given : Tensor (B,)
        shot : Tensor (B,) bool
        prototypes : Tensor (C, d)
        with_relation : bool

        Returns
        -------
        Correction
        Tensor (B,) bool
            Web pictures whose label is sure, corrected or confirmed.
        """
        h = self.arguments
        held, scores, keep = shot, target, h.keep_threshold
        if with_relation:
            relation = self.relation_scores(z, prototypes)
            held = shot | (relation.gather(1, given.unsqueeze(1)).squeeze(1) > h.threshold)
            if h.cleaning == "relation":
                scores, keep = relation, float("inf")
        correction = correct_labels(
            scores, given, held, threshold=h.threshold, keep_threshold=keep, strict=True
        )  # the relation keeps a label as a shot does
        correction.verdict[held & ~shot] = int(Verdict.KEPT)
        return correction, (scores.max(1).values > h.threshold) & ~held

    def _add(self, out: dict[str, Tensor], name: str, rows: Tensor, loss: Any) -> None:
        """Add a loss that is a mean over some rows, of all ranks; nothing where there are none anywhere."""
        share = mean_weight(rows.sum())
        if bool(rows.any()):
            out[name] = share * loss(rows)

    def _with_total(
        self, out: dict[str, Tensor], cleaning: bool, kept: Tensor, label: Tensor, given: Tensor
    ) -> dict[str, Tensor]:
        losses = list(out.values())
        if world_size() > 1 or not losses:
            losses.append(self.nothing())
        out["loss"] = torch.stack(losses).sum()
        if cleaning:
            out["kept"] = kept.float().mean()
            out["corrected"] = (kept & (label != given)).float().mean()
        return out

    def _classify(self, batch: Batch, epoch: int, batch_idx: int) -> dict[str, Tensor]:
        """Plain training; or fine-tuning by the own confidence (FoPro 14): p_y CE(y) + (1 - p_y) CE(own softmax)."""
        h, x, label = self.arguments, batch["views"][0], batch["label"]
        weight = batch["weight"] * self.class_weights[label]
        rng = np.random.default_rng([h.seed, epoch, batch_idx])
        mixed = h.stage == "finetune" and h.mixup > 0 and rng.random() < 0.5
        order = torch.from_numpy(rng.permutation(len(x))).to(x.device)
        share = float(rng.beta(h.mixup, h.mixup)) if mixed else 1.0
        logits = self.classifier(self.encoder(share * x + (1 - share) * x[order] if mixed else x))

        def loss(labels: Tensor, weights: Tensor) -> Tensor:
            each = label_loss(logits, labels)
            if h.stage == "finetune":
                own = logits.detach().softmax(1)
                p = own.gather(1, labels.unsqueeze(1)).squeeze(1)
                each = p * each + (1 - p) * soft_cross_entropy(logits, own)
            return (weights * each).mean()

        total = loss(label, weight)
        if mixed:
            total = share * total + (1 - share) * loss(label[order], weight[order])
        total = mean_weight(label.new_tensor(len(label))) * total
        return {"loss": total, "loss_cls": total}

    def _move_prototypes(self, slow: Tensor, label: Tensor, kept: Tensor) -> None:
        """FoPro 8, with counts and distances to the prototypes as they were."""
        rows = gather_rows(kept)
        z, y = gather_rows(slow)[rows].to(self.prototypes.dtype), gather_rows(label)[rows]
        self.count.index_add_(0, y, torch.ones_like(y, dtype=self.count.dtype))
        self.distance.index_add_(0, y, (z - self.prototypes[y]).norm(dim=1))
        self.prototypes.copy_(ema_update(self.prototypes, z, y, self.arguments.momentum_prototype))

    def _archive_distance(self, z: Tensor, label: Tensor, prototypes: Tensor) -> Tensor:
        """How differently a sample and its prototype see all prototypes (FoPro 9): D_i."""
        prototypes = prototypes.to(z.dtype)
        difference = (z @ prototypes.T - prototypes[label] @ prototypes.T).abs()
        own = (1 - (z * prototypes[label]).sum(1)).abs()
        others = difference.sum(1) - difference.gather(1, label.unsqueeze(1)).squeeze(1)
        return 0.5 * own + 0.5 * others

    def _relation_loss(self, z: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(self.relation(z.detach(), self.prototypes.to(z.dtype)), label)

    def _auxiliary_loss(self, z: Tensor, strong: Tensor, label: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        """FoPro 10: both views, the strong one through the encoder that learns, margin for all."""
        both = torch.cat([z[rows], self.projector(self.encoder(strong))[rows]])
        y, w = label[rows].repeat(2), weight[rows].repeat(2)
        h = self.arguments
        return (
            w * label_loss(margin_logits(self.auxiliary(F.normalize(both, dim=1)), y, h.margin, h.temperature), y)
        ).mean()

    # Scores.

    def prototype_scores(self, z: Tensor, prototypes: Tensor) -> Tensor:
        """Softmax of the similarities over the temperature of each prototype."""
        return prototype_logits(z, prototypes.to(z.dtype), self.temperatures.to(z.dtype)).softmax(1)

    @torch.no_grad()
    def relation_scores(self, z: Tensor, prototypes: Tensor) -> Tensor:
        """Relation scores (B, C), in [0, 1]."""
        scores: Tensor = self.relation(z, prototypes.to(z.dtype)).sigmoid()
        return scores

    @torch.no_grad()
    def fused_scores(self, logits: Tensor, z: Tensor, prototypes: Tensor, text_scores: Tensor | None = None) -> Tensor:
        """The soft target t of FoPro 5; texts have no part in it."""
        alpha = self.arguments.alpha
        fused: Tensor = alpha * logits.softmax(1) + (1 - alpha) * self.prototype_scores(z, prototypes)
        return fused

    # What the trainer calls.

    @property
    def first_epoch(self) -> int:
        """Stage "fopro" goes on counting where stage "prototypes" ends."""
        return int(self.arguments.relation_clean_epoch) + 1 if self.arguments.stage == "fopro" else 0

    def on_train_epoch_start(self) -> None:
        """Rate and beta1 of the epoch; frozen or released encoder; prototypes from the shots when it is time."""
        h, epoch = self.arguments, self.first_epoch + self.current_epoch
        if h.stage in ("plain", "prototypes", "fopro"):
            total = self.stage_epochs(h, "plain") if h.stage == "plain" else h.epochs
            rate = h.plain_lr if h.stage == "plain" and h.plain_lr is not None else h.lr
            self.set_rate(rate * lr_factor(epoch, h.warmup_epochs, total))
        elif h.stage == "finetune":
            self.set_rate(h.finetune_lr * lr_factor(epoch, 0, h.finetune_epochs))
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                if "betas" in group and h.stage != "relation":
                    group["betas"] = (0.9 if epoch < h.beta1_epoch else 0.1, group["betas"][1])
        if h.stage == "relation":
            freeze(self.encoder)
        elif h.stage != "finetune":
            self.freeze_encoder_until(epoch, h.frozen_encoder_epoch)
        if h.stage == "prototypes" and epoch == h.init_proto_epoch:
            self.init_prototypes()

    def on_train_epoch_end(self) -> None:
        """Temperatures by density after every epoch with cleaning (FoPro 13); counters start anew."""
        super().on_train_epoch_end()
        if self.arguments.density:
            self.temperatures.copy_(density_temperature(self.distance, self.count, self.temperatures))
        self.distance.zero_()
        self.count.zero_()

    def configure_optimizers(self) -> Any:
        """Adam or SGD on what the stage trains."""
        h = self.arguments
        if h.stage == "relation":
            return torch.optim.Adam(self.relation.parameters(), lr=h.relation_lr)
        parts = ["encoder", "classifier"]
        if h.stage not in ("plain", "finetune"):
            parts += ["projector", "reconstructor", "auxiliary"] + (["relation"] if h.stage == "fopro" else [])
        shares = {"encoder": 0.1} if h.stage == "finetune" else {}
        groups = [{"params": list(getattr(self, p).parameters()), "share": shares.get(p, 1.0)} for p in parts]
        groups = [g for g in groups if g["params"]]
        if h.optimizer == "adam":
            return torch.optim.Adam(groups, lr=h.lr, weight_decay=h.weight_decay)
        return torch.optim.SGD(groups, lr=h.lr, momentum=0.9, weight_decay=h.weight_decay)

    @staticmethod
    def stage_epochs(arguments: Any, stage: str) -> int:
        """Epochs of a stage; plain training gets as many as the others together."""
        first = min(arguments["relation_clean_epoch"] + 1, arguments["epochs"])
        parts = {
            "prototypes": first,
            "relation": arguments["relation_epochs"],
            "fopro": arguments["epochs"] - first,
            "finetune": arguments["finetune_epochs"],
        }
        return int(sum(parts.values()) if stage == "plain" else parts[stage])
