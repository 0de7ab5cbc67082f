"""Hydra (later SimLAP): any two classes may be a positive pair, in a subspace that a gate opens for this pair of classes.

Rethinking Positive Pairs in Contrastive Learning, Wu et al. 2024, arXiv 2410.18200. For any two classes there is a subspace in
which they agree and differ from the rest. A network makes a gate over dimensions from the embeddings of two classes; samples of
the partner class are positives of an anchor, samples of neither class its negatives, compared through the gate, and gate and
encoder learn from the same loss. Afterwards, the gates say which classes have what in common (`Hydra.relations`).

It needs labels (or pseudo-labels); its fair baseline is supervised contrast: `pairing="identical"`, `gate="open"`. The authors'
code (erow/FastSSL, erow/vitookit), younger than the paper's first version, is followed: gates act on unit rows without a new
normalisation (`placement="squared"`; "subspace" is what the abstract describes), every anchor counts the same (`reduction`),
keys carry gradient. Noise of gumbel gates is logistic here, as the difference of two Gumbel variables is; the code adds one.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, gather_with_gradient, mean_weight, rank
from contralto.encoders.heads import mlp
from contralto.errors import DataError, UsageError
from contralto.losses.gated import Placement, gated_contrast, pair_masks
from contralto.losses.margin import angular_margin_logits
from contralto.systems.base import EncoderSystem, Optimizer

__all__ = ["Hydra", "PairGate", "draw_partners"]

Gate = Literal["sigmoid", "gumbel", "stochastic", "open"]
Pairing = Literal["arbitrary", "identical", "distinct", "present"]


def draw_partners(labels: Tensor, pairing: Pairing, classes: int, generator: torch.Generator) -> Tensor:
    """The class that every sample of a batch is paired with.

    Parameters
    ----------
    labels : Tensor (N,)
        In [0, classes).
    pairing : {"arbitrary", "identical", "distinct", "present"}
        The label of another sample (or its own), so that partners are as frequent as classes; the own class; any other class, of
        which the batch may have no sample; any other class of which it has one (where there is one at all).
    classes : int
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    Tensor (N,)

    Examples
    --------
    >>> draw_partners(torch.tensor([0, 1, 0, 1]), "distinct", 2, torch.Generator()).tolist()
    [1, 0, 1, 0]
    """
    if pairing == "identical":
        return labels
    if pairing == "arbitrary":
        return labels[torch.randperm(len(labels), generator=generator).to(labels.device)]
    if pairing not in ("distinct", "present"):
        raise UsageError(f'pairing must be "arbitrary", "identical", "distinct" or "present", got {pairing!r}')
    kinds = torch.arange(classes, device=labels.device) if pairing == "distinct" else labels.unique()
    if len(kinds) < 2:
        return labels
    away = torch.randint(1, len(kinds), (len(labels),), generator=generator).to(labels.device)
    return kinds[(torch.searchsorted(kinds, labels) + away) % len(kinds)]


class PairGate(nn.Module):
    """A gate over dimensions for every pair of classes, the same for (a, b) and (b, a).

    Parameters
    ----------
    classes : int
    dim : int
        D, dimensions to be gated.
    embedding, hidden : int
        Width of the class embeddings, and of the network that makes gates from them.
    kind : {"sigmoid", "gumbel", "stochastic", "open"}
        The sigmoid of the network's output; with logistic noise in training; a clipped normal variable around it (stochastic
        gates, Yamada et al. 2020); or always 1, without any parameters.
    fuse : bool
        One gate from the mean of both embeddings; otherwise the product of the gates of both classes.

    Examples
    --------
    >>> gate = PairGate(3, 4, embedding=8, hidden=8).eval()
    >>> a, b = torch.tensor([0, 1]), torch.tensor([2, 1])
    >>> gate(a, b).shape, torch.equal(gate(a, b), gate(b, a))
    (torch.Size([2, 4]), True)
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        *,
        embedding: int = 512,
        hidden: int = 1024,
        kind: Gate = "sigmoid",
        fuse: bool = True,
    ) -> None:
        super().__init__()
        if kind not in ("sigmoid", "gumbel", "stochastic", "open"):
            raise UsageError(f'gate must be "sigmoid", "gumbel", "stochastic" or "open", got {kind!r}')
        self.dim, self.kind, self.fuse = dim, kind, fuse
        if kind != "open":
            self.embedding = nn.Embedding(classes, embedding)
            self.network = nn.Sequential(
                nn.ReLU(), nn.BatchNorm1d(embedding), nn.Linear(embedding, hidden),
                nn.ReLU(), nn.BatchNorm1d(hidden), nn.Linear(hidden, dim),
            )  # fmt: skip

    def forward(self, a: Tensor, b: Tensor, noise: Tensor | None = None) -> Tensor:
        """Gates (N, D) in [0, 1] of pairs of classes (N,), (N,); `noise` (N, D), uniform in (0, 1), for those that want it."""
        if self.kind == "open":
            return torch.ones(len(a), self.dim, device=a.device)
        if self.fuse:
            return self._opened(self.logits(a, b), noise)
        return self._opened(self.logits(a, a), noise) * self._opened(self.logits(b, b), noise)

    def logits(self, a: Tensor, b: Tensor) -> Tensor:
        """What the network says of pairs of classes (N, D)."""
        said: Tensor = self.network((self.embedding(a) + self.embedding(b)) / 2)
        return said

    def expected_open(self, a: Tensor, b: Tensor) -> Tensor:
        """Expected number of stochastic gates that are not shut (N,)."""
        expected: Tensor = torch.special.ndtr((self.logits(a, b) + 0.5) / _SPREAD)
        return expected.sum(1)

    def _opened(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        if self.kind == "stochastic":
            moved = logits + 0.5
            if noise is not None:
                moved = moved + _SPREAD * torch.special.ndtri(noise)
            return moved.clamp(0, 1)
        if self.kind == "gumbel" and noise is not None:
            logits = logits + torch.logit(noise)
        return logits.sigmoid()


_SPREAD = 0.5
"""Standard deviation of stochastic gates."""


class Hydra(EncoderSystem):
    """Contrast between paired classes, every pair in its own subspace.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`.
    num_classes : int
        Labels are in [0, num_classes).
    form : {"two_views", "single_view", "fused"}
        Two views of every sample against each other; all views as samples of their own, with a linear classifier on features
        that take no gradient from it; the same without a network for the gates: they are open where the weights of both classes
        in a margin classifier have one sign, samples of the own class are positives too, and the classifier's loss is added.
    pairing : {"arbitrary", "identical", "distinct", "present"}
        See `draw_partners`.
    gate : {"sigmoid", "gumbel", "stochastic", "open"}
        See `PairGate`; with `embedding`, `gate_hidden` and `fuse`. Not used in the fused form.
    placement : {"squared", "subspace"}
        See `gated_similarity`; always "subspace" in the fused form.
    reduction : {"anchor", "pair"}
        See `multi_positive`; always "pair" in the fused form.
    hidden, dim : int
        Widths of the projector.
    temperature : float
    learn_temperature : bool
        Begin with `temperature` and learn it.
    alpha : float
        Contrast with the open space, learnt from this value; 0 = none.
    sparsity : float
        Weight of the expected number of open stochastic gates.
    supervised : bool
        Let the gradient of the linear classifier of the single-view form through.
    margin : float
        Angle of the fused form's classifier, in radians.
    repeats : int
        Views of every sample in the single-view and fused forms (repeated augmentation).
    crop : tuple of float
        Smallest and largest share of the picture that a view shows.

    Examples
    --------
    >>> system = Hydra(nn.Linear(8, 4), num_features=4, num_classes=3, hidden=8, dim=4)
    >>> batch = {"views": [torch.randn(6, 8)] * 2, "label": torch.arange(6) % 3, "index": torch.arange(6)}
    >>> sorted(system.step(batch))
    ['alike', 'alone', 'entropy', 'features', 'loss', 'open']
    """

    needs: ClassVar[tuple[str, ...]] = ("label",)

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_classes: int = 1000,
        epochs: int = 1000,
        batch_size: int = 512,
        optimizer: Optimizer = "adamw",
        lr: float = 1e-4,
        warmup_epochs: float = 10,
        final_lr: float = 1e-4,
        form: Literal["two_views", "single_view", "fused"] = "two_views",
        pairing: Pairing = "arbitrary",
        gate: Gate = "sigmoid",
        embedding: int = 512,
        gate_hidden: int = 1024,
        fuse: bool = True,
        placement: Placement = "squared",
        reduction: Literal["anchor", "pair"] = "anchor",
        hidden: int = 2048,
        dim: int = 256,
        temperature: float = 0.1,
        learn_temperature: bool = False,
        alpha: float = 0.0,
        sparsity: float = 1e-6,
        supervised: bool = False,
        margin: float = 0.5,
        repeats: int = 1,
        crop: tuple[float, float] = (0.08, 1.0),
        **base: Any,
    ) -> None:
        super().__init__(
            encoder,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            lr=lr,
            warmup_epochs=warmup_epochs,
            final_lr=final_lr,
            **base,
        )
        if form not in ("two_views", "single_view", "fused"):
            raise UsageError(f'form must be "two_views", "single_view" or "fused", got {form!r}')
        if num_classes < 2 or repeats < 1:
            raise UsageError(f"num_classes must be at least 2 and repeats at least 1, got {num_classes} and {repeats}")
        if not temperature > 0:
            raise UsageError(f"temperature must be above 0, got {temperature}")
        fused = form == "fused"
        self.num_classes, self.form, self.pairing, self.sparsity = num_classes, form, pairing, sparsity
        self.placement: Placement = "subspace" if fused else placement
        self.reduction: Literal["anchor", "pair"] = "pair" if fused else reduction
        self.supervised, self.margin, self.repeats, self.crop = supervised, margin, repeats, crop
        self.fixed_temperature = temperature
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learn_temperature else None
        self.alpha = nn.Parameter(torch.tensor(float(alpha))) if alpha else None
        with self.seeded():
            self.projector = mlp([self.num_features, hidden, dim], norm="batch", last_norm="layer")
            if fused:
                self.prototypes = nn.Parameter(torch.empty(num_classes, dim))
                nn.init.xavier_normal_(self.prototypes)
            else:
                self.gate = PairGate(num_classes, dim, embedding=embedding, hidden=gate_hidden, kind=gate, fuse=fuse)
            if form == "single_view":
                self.classifier = nn.Linear(self.num_features, num_classes)

    @property
    def temperature(self) -> float | Tensor:
        """As it is now; a parameter of the loss where it is learnt."""
        return self.fixed_temperature if self.log_scale is None else (-self.log_scale).exp()

    def views(self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Sequence[Any]:
        """SimCLR's two views, or plain crops with flips of which every one is a sample of its own."""
        if self.form == "two_views":
            from contralto.views.presets import simclr_pair

            return list(simclr_pair(size, scale=self.crop, mean=mean, std=std))
        from contralto.views.batched import BatchView

        return [BatchView(size, scale=self.crop, mean=mean, std=std)] * self.repeats

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch with labels.

        `open` is the share of open gates and `entropy` that of their Bernoulli variables; `alike` the mean cosine of the two
        views of a sample (in the two-view form); `alone` the share of anchors whose partner class has no sample in the batch.
        """
        views = self.checked(batch, 2 if self.form == "two_views" else None)
        labels = self._labels(batch)
        first = self.encoder(views[0])
        if self.form == "two_views":
            z, features = self.projector(first), first
            keys = self.projector(self.encoder(views[1]))
        else:
            features = torch.cat([first, *(self.encoder(view) for view in views[1:])])
            labels = labels.repeat(len(views))
            z = keys = self.projector(features)
        partners, noise = self._drawn(batch["label"].long(), len(labels) // len(views[0]))
        all_labels, gate = gather_rows(labels), self._gates(labels, partners, noise)
        contrast = gated_contrast(
            z, gather_with_gradient(keys), gate, labels, partners, all_labels, placement=self.placement,
            temperature=self.temperature, alpha=0.0 if self.alpha is None else self.alpha, both=self.form == "fused",
            reduction=self.reduction,
        )  # fmt: skip
        positives, _ = pair_masks(labels, partners, all_labels, both=self.form == "fused")
        rows = mean_weight(torch.tensor(len(labels), device=labels.device))
        loss = contrast * (mean_weight(positives.sum()) if self.reduction == "pair" else rows)
        out = {"features": first.detach(), "alone": (~positives.any(1)).float().mean()}
        out |= _described(gate.detach())
        if self.form == "two_views":
            out["alike"] = F.cosine_similarity(z.detach(), keys.detach(), dim=1).mean()
        elif self.form == "single_view":
            said = self.classifier(features if self.supervised else features.detach())
            out["loss_classifier"] = F.cross_entropy(said, labels) * rows
            loss = loss + out["loss_classifier"]
        else:
            cosines = F.normalize(z, dim=1) @ F.normalize(self.prototypes, dim=1).T
            said = angular_margin_logits(cosines, labels, self.margin, self.temperature)
            out["loss_classifier"] = F.cross_entropy(said, labels) * rows
            loss = loss + out["loss_classifier"]
        if self.form != "fused" and self.gate.kind == "stochastic":
            loss = loss + self.sparsity * self.gate.expected_open(labels, partners).mean() * rows
        return {"loss": loss, **out}

    def _labels(self, batch: Batch) -> Tensor:
        labels: Tensor = batch["label"].long()
        wrong = (labels < 0) | (labels >= self.num_classes)
        if wrong.any():
            row = int(batch["index"][wrong.to(batch["index"].device)][0])
            raise DataError(
                f"sample {row} has the label {int(labels[wrong][0])}: Hydra needs one in [0, {self.num_classes}) for every sample"
            )
        return labels

    def _drawn(self, labels: Tensor, copies: int) -> tuple[Tensor, Tensor | None]:
        """Partners of every view of every sample of this rank, and the noise of their gates.

        Drawn for the samples of all ranks, view by view: neither the number of ranks nor an interruption changes anything.
        """
        generator = torch.Generator().manual_seed((self.seed << 32) + self.done)
        everyone = gather_rows(labels)
        mine = gather_rows(torch.full_like(labels, rank())) == rank()
        noisy = self.training and self.form != "fused" and self.gate.kind in ("gumbel", "stochastic")
        partners, noise = [], []
        for _ in range(copies):
            partners.append(draw_partners(everyone, self.pairing, self.num_classes, generator)[mine])
            if noisy:
                drawn = torch.rand(len(everyone), self.gate.dim, generator=generator).clamp(1e-6, 1 - 1e-6)
                noise.append(drawn.to(labels.device)[mine])
        return torch.cat(partners), torch.cat(noise) if noisy else None

    def _gates(self, labels: Tensor, partners: Tensor, noise: Tensor | None = None) -> Tensor:
        """Of pairs of classes (N, D)."""
        if self.form == "fused":
            signs = self.prototypes.detach().sign()
            return (signs[labels] * signs[partners] > 0).to(self.prototypes.dtype)
        gate: Tensor = self.gate(labels, partners, noise)
        return gate

    @torch.no_grad()
    def relations(self) -> dict[str, Tensor]:
        """What the gates say of the classes, once trained (in evaluation mode, whatever the mode is).

        Returns
        -------
        dict of Tensor (num_classes, num_classes)
            `openness`: mean gate of every pair; `entropy` of the gates as Bernoulli variables; `similarity`: cosines of the gates
            of (a, a) and (b, b); `embedding`: cosines of the class embeddings (of the classifier's weights in the fused form).

        Examples
        --------
        >>> system = Hydra(nn.Linear(8, 4), num_features=4, num_classes=3, hidden=8, dim=4)
        >>> {name: tuple(table.shape) for name, table in system.relations().items()}
        {'openness': (3, 3), 'entropy': (3, 3), 'similarity': (3, 3), 'embedding': (3, 3)}
        """
        classes = torch.arange(self.num_classes, device=next(self.projector.parameters()).device)
        if self.form != "fused" and self.gate.kind == "open":
            raise UsageError('gate="open" has no gates that could say anything of the classes')
        mode = self.training
        self.eval()
        try:
            told = []
            for a in classes:  # a row of pairs at a time: all of them would be C * C * D numbers
                gate = self._gates(a.expand_as(classes), classes)
                told.append((gate.mean(1), _entropy(gate).mean(1)))
            openness, entropy = (torch.stack(rows) for rows in zip(*told, strict=True))
            own = F.normalize(self._gates(classes, classes), dim=1)
            known = F.normalize(self.prototypes if self.form == "fused" else self.gate.embedding.weight, dim=1)
        finally:
            self.train(mode)
        return {"openness": openness, "entropy": entropy, "similarity": own @ own.T, "embedding": known @ known.T}


def _described(gate: Tensor) -> dict[str, Tensor]:
    return {"open": gate.mean(), "entropy": _entropy(gate).mean()}


def _entropy(gate: Tensor) -> Tensor:
    return -(torch.xlogy(gate, gate) + torch.xlogy(1 - gate, 1 - gate))
