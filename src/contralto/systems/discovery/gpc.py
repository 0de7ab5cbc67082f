"""GPC: discover classes by a Gaussian mixture that knows some labels, and learn by contrast with its centres.

Before every epoch the features of all samples are clustered by k-means that keeps labelled samples in their class. Clusters
without labels are split or merged where that makes the features likelier as Gaussians, so the number of classes may be unknown.
During the epoch, every sample is drawn to the centre of its cluster and away from the others, beside the losses of instances.

Learning Semi-supervised Gaussian Mixture Models for Generalized Category Discovery, Zhao et al., ICCV 2023, arXiv 2305.06144. The
paper projects features by PCA first, the released code does not: `pca_dim`. In the released code the number of clusters that was
found is forgotten before the next epoch, a mutual pair of clusters is merged twice, and split clusters are looked up by a number
that may be another cluster's; here the number is carried over and every pair is merged once. `nu` is 769 there, which is meant
for 768 features; here it follows their number.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, mean_weight
from contralto.errors import UsageError
from contralto.losses.units import full_precision
from contralto.neighbors.how_many import within_variance
from contralto.neighbors.kmeans import semi_supervised_kmeans
from contralto.neighbors.knn import unit_rows
from contralto.prototypes.bank import class_means, densities, ema_update, prototype_logits
from contralto.prototypes.gaussian import Round, fitted_psi, niw_prior, posterior_means, split_and_merge
from contralto.systems.discovery.base import Discovered, DiscoverySystem, Floats, Labels, nearest_prototypes

__all__ = ["GPC", "fitted_temperature"]


def fitted_temperature(cosines: Floats, labels: Labels, *, low: float = 0.01, high: float = 1.0) -> float:
    """The temperature under which labels are likeliest, given cosines to all prototypes.

    Parameters
    ----------
    cosines : array (N, K)
    labels : array (N,)
        In [0, K).
    low, high : float
        Bounds; `low` where all are right by far.

    Examples
    --------
    >>> fitted_temperature(np.array([[0.9, 0.5], [0.7, 0.6]]), np.array([0, 1])) > 0.2
    True
    """
    from scipy.optimize import minimize_scalar

    logits, right = torch.from_numpy(np.asarray(cosines, np.float64)), torch.from_numpy(labels)

    def wrong(log_t: float) -> float:
        return float(F.cross_entropy(logits / np.exp(log_t), right))

    found = minimize_scalar(wrong, bounds=(np.log(low), np.log(high)), method="bounded")
    return float(np.exp(found.x))


class GPC(DiscoverySystem):
    """Discovery by a semi-supervised Gaussian mixture.

    Parameters
    ----------
    encoder, **base
        See `DiscoverySystem`. `num_new` is where the number of new classes starts; it is found by splits and merges.
    temperature : float
        Mean of the prototypes' temperatures. 1 is that of the released code and very soft; such methods mostly take 0.1 to 0.2.
    prototype_weight : float
        Of the loss of the prototypes; 1 in the paper.
    prototype_momentum : float
        Prototypes follow the samples of every step with it, sample by sample; 1 = they stay within an epoch.
    wait_epochs, update_every : int
        Epochs without prototypes, then epochs between two clusterings.
    estimate : bool
        Split and merge; False keeps ``num_classes + num_new`` clusters.
    pca_dim : int, optional
        Cluster and compare in so many principal directions of the unit features, found anew at each clustering; default: in all.
    kappa, nu, psi : float
        Of the prior, see `niw_prior`. `nu`: default two more than the dimensions. `psi`: 0 takes the variance within the labelled
        classes; the found number depends on it. "auto", beyond the paper, takes at every clustering the value under which the
        labelled classes would be neither split nor merged, see `fitted_psi`.
    alpha, coin, smallest
        See `split_and_merge`. With a coin the number wanders; 0 makes it repeatable and can leave it where it started.
    kmeans_restarts, kmeans_iterations : int
        Of the clustering.

    Attributes
    ----------
    number : int
        Clusters now.

    Examples
    --------
    >>> system = GPC(nn.Linear(8, 4), num_features=4, num_classes=2, num_new=1, hidden=8, dim=4)
    >>> views = [torch.randn(6, 8), torch.randn(6, 8)]
    >>> labels = torch.tensor([0, 1, 0, -1, -1, -1])
    >>> system.at_epoch_start(np.random.default_rng(0).normal(size=(6, 4)), labels.numpy())
    >>> sorted(system.step({"views": views, "index": torch.arange(6), "label": labels}))
    ['clusters', 'features', 'instance', 'loss', 'prototypes']
    """

    prototypes: Tensor
    temperatures: Tensor
    assigned: Tensor
    numbers: Tensor
    directions: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        epochs: int = 60,
        batch_size: int = 256,
        dim: int = 128,
        temperature: float = 1.0,
        prototype_weight: float = 1.0,
        prototype_momentum: float = 1.0,
        wait_epochs: int = 1,
        update_every: int = 1,
        estimate: bool = True,
        pca_dim: int | None = None,
        kappa: float = 1e-4,
        nu: float | None = None,
        psi: float | Literal["auto"] = 0.005,
        alpha: float = 1.0,
        coin: float = 0.1,
        smallest: int = 5,
        kmeans_restarts: int = 10,
        kmeans_iterations: int = 100,
        **base: Any,
    ) -> None:
        super().__init__(encoder, epochs=epochs, batch_size=batch_size, dim=dim, **base)
        if self.num_classes + self.num_new < 1:
            raise UsageError(
                "num_new must be at least 1 where there are no old classes: it is where the number of clusters starts"
            )
        if temperature <= 0 or prototype_weight < 0 or not 0 <= prototype_momentum <= 1:
            raise UsageError("temperature must be above 0, prototype_weight at least 0, prototype_momentum in [0, 1]")
        if isinstance(psi, str) and psi != "auto":
            raise UsageError(f'psi must be a number or "auto", got {psi!r}')
        if wait_epochs < 0 or update_every < 1:
            raise UsageError(f"wait_epochs must be at least 0 and update_every 1, got {wait_epochs} and {update_every}")
        if pca_dim is not None and not 2 <= pca_dim <= self.num_features:
            raise UsageError(
                f"pca_dim must be between 2 and the number of features, {self.num_features}; got {pca_dim}"
            )
        self.temperature, self.prototype_weight, self.prototype_momentum = (
            temperature,
            prototype_weight,
            prototype_momentum,
        )
        self.wait_epochs, self.update_every, self.estimate, self.pca_dim = wait_epochs, update_every, estimate, pca_dim
        self.kappa, self.nu, self.psi, self.alpha = kappa, nu, psi, alpha
        self.coin, self.smallest = coin, smallest
        self.kmeans_restarts, self.kmeans_iterations = kmeans_restarts, kmeans_iterations
        self.register_buffer("prototypes", torch.zeros(0, pca_dim or self.num_features))
        self.register_buffer("temperatures", torch.zeros(0))
        self.register_buffer("assigned", torch.full((self.num_samples,), -1))
        self.register_buffer("numbers", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("directions", torch.zeros(pca_dim or 0, self.num_features if pca_dim else 0))

    @property
    def number(self) -> int:
        """Clusters now: old classes, and what is thought to be the new ones."""
        return int(self.numbers[-1]) if len(self.numbers) else self.num_classes + self.num_new

    def project(self, features: Tensor) -> Tensor:
        """Unit features (N, F) or, with `pca_dim`, their part in the principal directions, scaled to length one again."""
        z = F.normalize(features, dim=1)
        return F.normalize(z @ self.directions.to(z).T, dim=1) if self.pca_dim else z

    # E-step.

    def asks_features(self, epoch: int) -> bool:
        """Every `update_every` epochs after the first `wait_epochs`."""
        since = epoch - self.wait_epochs
        return since >= 0 and since % self.update_every == 0 and int(self.heard) != epoch

    @torch.no_grad()
    def at_epoch_start(self, features: Floats, labels: Labels) -> None:
        """Cluster all samples, split and merge, and take over centres, their temperatures and who belongs to them."""
        super().at_epoch_start(features, labels)
        x = self._fitted(features)
        generator = torch.Generator().manual_seed(self._drawn_seed(7, self.epoch))
        found = self._clustered(x, labels, generator)
        distance = (x - found.centres[found.labels].to(x)).norm(dim=1)
        number = len(found.centres)
        count = torch.bincount(found.labels, minlength=number)
        total = torch.zeros(number).index_add_(0, found.labels, distance)
        device = self.prototypes.device
        self.prototypes = F.normalize(found.centres, dim=1).float().to(device)
        self.temperatures = densities(total, count, target=self.temperature).to(device)
        self.assigned = found.labels.to(device)
        self.numbers = torch.cat([self.numbers, self.numbers.new_tensor([number])])

    def _clustered(self, x: Tensor, labels: Labels, generator: torch.Generator) -> Round:
        """Centres (K, D) and the cluster of every row, after one round of splits and merges where these are asked for."""
        own, number = self._means(x, labels, int(torch.randint(2**31, (), generator=generator)))
        fixed = torch.from_numpy(labels)
        psi = self.psi or within_variance(x.numpy(), labels)
        if isinstance(psi, str):
            psi = fitted_psi(x, fixed, kappa=self.kappa, nu=self.nu)
        prior = niw_prior(x, kappa=self.kappa, nu=self.nu, psi=psi)
        if not self.estimate:
            centres = posterior_means(x, own, number, prior)
            return Round(centres, own, 0, 0)
        return split_and_merge(
            x,
            own,
            number,
            prior,
            generator=generator,
            fixed=fixed,
            alpha=self.alpha,
            coin=self.coin,
            smallest=self.smallest,
        )

    def _means(self, x: Tensor, labels: Labels, seed: int) -> tuple[Tensor, int]:
        """The cluster of every row by k-means, and how many there are: as many as now, if there are so many rows."""
        there = np.bincount(labels[labels >= 0], minlength=self.num_classes)
        if len(there) > self.num_classes or (there == 0).any():
            wrong = int(labels.max()) if len(there) > self.num_classes else int(there.argmin())
            raise UsageError(
                f"every one of the {self.num_classes} old classes must have a labelled sample, and no other; see class {wrong}"
            )
        number = min(self.number, self.num_classes + int((labels < 0).sum()))
        found = semi_supervised_kmeans(
            x.numpy(), labels, number, seed=seed, restarts=self.kmeans_restarts, iterations=self.kmeans_iterations,
            normalize=False,
        )  # fmt: skip
        return torch.from_numpy(found.labels), number

    def _fitted(self, features: Floats) -> Tensor:
        """All features where they are clustered; the principal directions are found anew."""
        z = torch.from_numpy(unit_rows(features))
        if self.pca_dim:
            covariance = (z - z.mean(0)).T.double() @ (z - z.mean(0)).double()
            vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : self.pca_dim].T
            signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
            self.directions = (vectors * signs).float().to(self.prototypes.device)
        return self.project(z.to(self.prototypes.device)).cpu()

    def _drawn_seed(self, *which: int) -> int:
        return int(np.random.default_rng([self.seed, *which]).integers(2**62))

    # M-step.

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of instances of two views, and from the first clustering on that of the prototypes."""
        views, labels = self.checked(batch, 2), self.labels(batch)
        features = self.encoder(torch.cat(views))
        h1, h2 = self.projector(features).chunk(2)
        instance = self.instance_loss(h1, h2, labels)
        out = {"loss": instance, "features": features[: len(labels)].detach()}
        if not len(self.prototypes):
            return out
        own = self.assigned[batch["index"].to(self.assigned.device)]
        with full_precision(features):
            z = self.project(features.to(torch.promote_types(features.dtype, torch.float32)))
            logits = prototype_logits(z, self.prototypes.to(z), self.temperatures.to(z))
        drawn = F.cross_entropy(logits, own.repeat(2)) * mean_weight(torch.tensor(len(own), device=z.device))
        if self.prototype_momentum < 1:
            rows, labels_of = gather_rows(z[: len(own)].detach()), gather_rows(own)
            self.prototypes = ema_update(self.prototypes, rows.float(), labels_of, self.prototype_momentum)
        clusters = torch.tensor(float(len(self.prototypes)), device=z.device)
        loss = instance + self.prototype_weight * drawn
        return out | {"loss": loss, "instance": instance, "prototypes": drawn, "clusters": clusters}

    # Afterwards.

    @torch.no_grad()
    def discover(self, features: Floats, labels: Labels) -> Discovered:
        """Cluster once more, into as many clusters as there are now, and assign every sample to the nearest mean of a cluster.

        The temperature is the one under which the given labels are likeliest, 0.1 where there are none.
        """
        own, number = self._means(self._fitted(features), labels, seed=self._drawn_seed(8))
        rows = unit_rows(features)
        prototypes = class_means(torch.from_numpy(rows), own, number).numpy()
        known = labels >= 0
        temperature = fitted_temperature(rows[known] @ prototypes.T, labels[known]) if known.any() else 0.1
        best, confidence = nearest_prototypes(features, prototypes, temperature=temperature)
        return Discovered(best, confidence, prototypes, temperature, self.numbers.tolist() or [number])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """Take buffers as long as they were saved."""
        for name in ("prototypes", "temperatures", "assigned", "numbers", "directions"):
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape != own.shape:
                setattr(self, name, own.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
