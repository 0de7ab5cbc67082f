"""SepCLR: what two sets of samples share, and what only one of them shows, as two representations of every sample.

Given a background set (healthy) and a target set (diseased) without further labels, one encoder learns the common patterns of
both by contrast on the sphere. A second one learns the salient patterns of the target alone: its codes repel each other and the
origin, to which the background is pulled, since it has nothing salient. The two are made independent by
maximising their joint entropy with a product of Gaussian kernels (k-JEM).

Separating common from salient patterns with Contrastive Representation Learning, Louiset et al., ICLR 2024, arXiv 2402.11928.
As in the official code, all gradients flow; that of the background rows in the salient uniformity and in k-JEM is zero because
these rows are replaced by the origin. The second encoder starts as a copy of the first one, pretrained or not; the code
draws both anew.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, gather_with_gradient
from contralto.encoders.heads import mlp
from contralto.errors import DataError, UsageError
from contralto.losses.kernels import alignment, attribute_alignment, joint_entropy, uniformity
from contralto.systems.base import EncoderSystem, Optimizer

__all__ = ["SepCLR"]

Attribute = Literal["continuous", "discrete"]
BANDWIDTH = {"continuous": 0.025, "discrete": 1e-5 / 2}
"""On the scale of an attribute; the discrete one leaves pairs of the same value only."""


class SepCLR(EncoderSystem):
    """Two encoders with a contrastive objective each, and their joint entropy.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`.
    final_lr : float, optional
        Where half a cosine ends; default: the rate stays as it is, as in the paper.
    common_dim, salient_dim : int
        Widths of the two representations.
    hidden : int
        Width of the projection heads.
    tau : float
        Bandwidth of all kernels.
    beta_salient, beta_reg : float
        Weights of the salient objective, and of the pull of background samples to the origin. Only the second encoder sees them.
    lambda_jem : float
        Weight of the joint entropy. It couples the encoders: relative to `beta_salient` it cleans mostly the common one.
    uniform_weight : float, optional
        Of both uniformities; default: 2, and 1 for the common one where there are attributes, as in the paper.
    background : str, optional
        Name of the label that the background has; default: the first of the two. In a loop of one's own, where labels have no
        names, 0 is the background and 1 the target.
    attributes : sequence of {"continuous", "discrete"}
        The supervised form: what kind of number each column of the batch's `attributes` (B, A) is. Coordinate k of the salient
        code then learns attribute k of the target samples. The views of a sample are its undistorted and a distorted one.
    use : {"both", "common", "salient"}
        What `embed` gives: both representations side by side, the common one first; or one of them.
    crop, jitter : float
        Views of pictures: smallest share of the area, and strength of the changes of colour. A view must neither destroy nor fake
        what is special of the target.

    Attributes
    ----------
    salient_encoder : nn.Module
    background_label : Tensor ()
        Number of the label that the background has; kept with the weights.

    Examples
    --------
    >>> system = SepCLR(nn.Linear(8, 4), num_features=4, common_dim=3, salient_dim=2)
    >>> batch = {"views": [torch.randn(6, 8)] * 2, "index": torch.arange(6), "label": torch.tensor([0, 0, 0, 1, 1, 1])}
    >>> sorted(system.step(batch))
    ['common_align', 'common_uniform', 'features', 'jem', 'loss', 'salient_align', 'salient_reg', 'salient_uniform']
    >>> system.embed(torch.randn(6, 8)).shape, system.salient(torch.randn(6, 8)).shape
    (torch.Size([6, 5]), torch.Size([6, 2]))
    """

    needs = ("label",)
    background_label: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        epochs: int = 250,
        batch_size: int = 512,
        optimizer: Optimizer = "adam",
        lr: float = 3e-4,
        weight_decay: float = 0.0,
        final_lr: float | None = None,
        common_dim: int = 32,
        salient_dim: int = 32,
        hidden: int = 128,
        tau: float = 0.5,
        beta_salient: float = 1000.0,
        beta_reg: float = 1000.0,
        lambda_jem: float = 10.0,
        uniform_weight: float | None = None,
        background: str | None = None,
        attributes: Sequence[Attribute] = (),
        use: Literal["both", "common", "salient"] = "both",
        crop: float = 0.2,
        jitter: float = 0.4,
        **base: Any,
    ) -> None:
        super().__init__(
            encoder,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            final_lr=lr if final_lr is None else final_lr,
            **base,
        )
        if use not in ("both", "common", "salient"):
            raise UsageError(f"use must be both, common or salient; got {use!r}")
        unknown = [kind for kind in attributes if kind not in BANDWIDTH]
        if unknown:
            raise UsageError(f"attributes are continuous or discrete; got {unknown[0]!r}")
        if attributes and salient_dim != len(attributes):
            raise UsageError(f"every attribute has a coordinate of its own: salient_dim must be {len(attributes)}")
        self.background, self.tau = background, tau
        self.register_buffer("background_label", torch.tensor(0 if background is None else -1))
        self.beta_salient, self.beta_reg, self.lambda_jem = beta_salient, beta_reg, lambda_jem
        self.common_weight = (1.0 if attributes else 2.0) if uniform_weight is None else uniform_weight
        self.salient_weight = 2.0 if uniform_weight is None else uniform_weight
        self.attributes, self.use, self.crop, self.jitter = tuple(attributes), use, crop, jitter
        self.salient_encoder = copy.deepcopy(encoder)
        with self.seeded():
            self.to_common, self.to_salient = (nn.Linear(self.num_features, d) for d in (common_dim, salient_dim))
            self.common_head = mlp([common_dim, hidden, common_dim], norm="batch")
            self.salient_head = mlp([salient_dim, hidden, salient_dim], norm="batch")

    # Training.

    def take_classes(self, names: Sequence[str]) -> None:
        """Find the background among the names of the labels.

        Raises
        ------
        DataError, UsageError
            If there are not two of them, or `background` is none of them.
        """
        if len(names) != 2:
            raise DataError(
                f"SepCLR compares two sets, background and target: the labels must have two values, got {len(names)} "
                f"({', '.join(names[:5])}); name the column that tells the sets apart with --label_column"
            )
        if self.background is not None and self.background not in names:
            raise UsageError(
                f"background must be one of the two labels, {' and '.join(names)}; got {self.background!r}"
            )
        self.background_label.fill_(0 if self.background is None else list(names).index(self.background))

    def views(self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Sequence[Any]:
        """Two views cropped, mirrored and coloured at random; of a sample with attributes the first one is the picture itself."""
        from contralto.views.batched import BatchView

        colours = (self.jitter, self.jitter, self.jitter, self.jitter / 4)
        distorted = BatchView(size, scale=(self.crop, 1.0), jitter=colours, grey=0.2, mean=mean, std=std)
        plain = BatchView(size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, mean=mean, std=std)
        return [plain if self.attributes else distorted, distorted]

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch of two views."""
        views = self.checked(batch, 2)
        if self.attributes and "attributes" not in batch:
            raise UsageError("SepCLR with attributes needs 'attributes' in every batch")
        target = self._target(batch)
        features = self.encoder(torch.cat(views))
        heads = self.common_head(self.to_common(features)).chunk(2)
        shown = views[:1] if self.attributes else views
        others = self.salient_head(self.to_salient(self.salient_encoder(torch.cat(shown)))).chunk(len(shown))
        common, salient = ([gather_with_gradient(h) for h in several] for several in (heads, others))  # of all ranks
        member = gather_rows(target)
        if self.attributes:
            out = self.attribute_losses(common, salient[0], member, gather_rows(batch["attributes"]))
        else:
            out = self.losses(common, salient, member)
        return out | {"features": features[: len(target)].detach()}

    def losses(self, common: Sequence[Tensor], salient: Sequence[Tensor], target: Tensor) -> dict[str, Tensor]:
        """The objective on the heads of two views.

        Parameters
        ----------
        common, salient : two Tensors (B, common_dim), (B, salient_dim)
            Raw; common heads are scaled to length one here, salient ones never.
        target : Tensor (B,) bool
            False = background.
        """
        informative = [s * target.unsqueeze(1) for s in salient]  # the background's codes are the origin
        found = self._common(common) | {
            "salient_align": alignment(*salient, tau=self.tau, where=target, normalize=False),
            "salient_uniform": _mean(uniformity(t, tau=self.tau, normalize=False) for t in informative),
            "salient_reg": _mean(alignment(s, tau=self.tau, where=~target, normalize=False) for s in salient),
            "jem": _mean(self._jem(c, t) for c, t in zip(common, informative, strict=True)),
        }
        of_salient = found["salient_align"] + self.salient_weight * found["salient_uniform"]
        return self._total(found, self.beta_salient * of_salient + self.beta_reg * found["salient_reg"])

    def attribute_losses(
        self, common: Sequence[Tensor], salient: Tensor, target: Tensor, attributes: Tensor
    ) -> dict[str, Tensor]:
        """The supervised objective; arguments as of `losses`, salient heads and attributes (B, A) of the undistorted view."""
        if attributes.shape != (len(target), len(self.attributes)):
            raise UsageError(
                f"attributes must be of shape {(len(target), len(self.attributes))}, got {tuple(attributes.shape)}"
            )
        informative = salient * target.unsqueeze(1)
        align, reg, uniform = [], [], []
        for k, kind in enumerate(self.attributes):
            own = salient[:, k : k + 1]
            align.append(attribute_alignment(own, attributes[:, k], tau=BANDWIDTH[kind], where=target))
            near = 0.5 if kind == "discrete" else BANDWIDTH[kind]
            reg.append(alignment(own, tau=near, where=~target, normalize=False))
            uniform.append(uniformity(informative[:, k : k + 1], tau=self.tau, normalize=False))
        found = self._common(common) | {
            "salient_align": _mean(align),
            "salient_uniform": _mean(uniform),
            "salient_reg": _mean(reg),
            "jem": self._jem(common[0], informative),
        }
        of_salient = (found["salient_align"] + found["salient_reg"]) / 2 + found["salient_uniform"]
        return self._total(found, self.beta_salient * of_salient)

    def _common(self, common: Sequence[Tensor]) -> dict[str, Tensor]:
        return {
            "common_align": alignment(*common, tau=self.tau),
            "common_uniform": _mean(uniformity(c, tau=self.tau) for c in common),
        }

    def _jem(self, common: Tensor, informative: Tensor) -> Tensor:
        return -joint_entropy(F.normalize(common, dim=1), informative, tau=self.tau)

    def _total(self, found: dict[str, Tensor], of_salient: Tensor) -> dict[str, Tensor]:
        of_common = found["common_align"] + self.common_weight * found["common_uniform"]
        return {"loss": of_common + of_salient + self.lambda_jem * found["jem"]} | found

    def _target(self, batch: Batch) -> Tensor:
        """Which samples are of the target set (B,)."""
        label: Tensor = batch["label"]
        if self.background_label < 0:
            raise UsageError(f"which label is {self.background!r} is not known: take_classes must be told the names")
        wrong = (label != 0) & (label != 1)
        if wrong.any():
            which = batch["index"][wrong][0].item()
            raise DataError(
                f"sample {which} has label {label[wrong][0].item()}: SepCLR needs to know of every sample whether it belongs "
                f"to the background or to the target"
            )
        return label != self.background_label

    # What is used afterwards.

    def common(self, x: Tensor) -> Tensor:
        """The representation of what both sets share (N, common_dim)."""
        representation: Tensor = self.to_common(self.encoder(x))
        return representation

    def salient(self, x: Tensor) -> Tensor:
        """The representation of what only the target shows (N, salient_dim)."""
        representation: Tensor = self.to_salient(self.salient_encoder(x))
        return representation

    def embed(self, x: Tensor) -> Tensor:
        """Both representations side by side (N, common_dim + salient_dim), or the one that `use` names."""
        if self.use != "both":
            return self.common(x) if self.use == "common" else self.salient(x)
        return torch.cat([self.common(x), self.salient(x)], 1)


def _mean(values: Any) -> Tensor:
    return torch.stack(list(values)).mean()
