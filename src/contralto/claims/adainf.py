"""Digits, real ones and generated ones: generated data should need weaker augmentation, and help with it.

The generator is a mixture of Gaussians on principal components, fitted on exactly the real digits that an arm learns from; it
gives twenty times as many. All arms take as many steps; they differ in what is drawn and in the strength of the views:

- `none, strong` and `none, weak`: real digits alone;
- `vanilla, strong` (adding them as they are) and `vanilla, weak`: every digit as often, real or generated;
- `adainf, strong` and `adainf, weak` (the method): real digits ten times as often.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from contralto.claims.digits import Split, batches, conv_encoder, digit_views, digits, features_of, pretrain
from contralto.data.mixture import MixtureSampler
from contralto.evaluation.representation import knn_right, probe_right
from contralto.systems.selfsup.adainf import AdaInf

__all__ = ["generate", "run", "strong_views"]


def generate(x: Tensor, count: int, *, components: int = 20, clusters: int = 10, seed: int = 0) -> Tensor:
    """Samples of a generator that knows nothing but `x`: principal components and a Gaussian mixture with full covariances.

    Parameters
    ----------
    x : Tensor (N, D)
        In [0, 1].
    count : int
    components : int
        Of the PCA.
    clusters : int
        Of the mixture.
    seed : int

    Returns
    -------
    Tensor (count, D)
        In [0, 1].

    Examples
    --------
    >>> generate(digits(0).train[:200], 50).shape
    torch.Size([50, 64])
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    data = x.numpy().astype(np.float64)
    pca = PCA(components, random_state=seed).fit(data)
    mixture = GaussianMixture(clusters, reg_covar=1e-3, random_state=seed).fit(pca.transform(data))
    drawn = pca.inverse_transform(mixture.sample(count)[0])
    order = np.random.default_rng(seed).permutation(count)  # they come cluster by cluster
    return torch.from_numpy(drawn[order].clip(0, 1).astype(np.float32))


def strong_views(x: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Views of digits whose strength is one number, as AdaInf halves that of colours and crops.

    Parameters
    ----------
    x : Tensor (B, 64)
    generator : torch.Generator
    strength : float
        1 is strong, 0.5 weak, 0 leaves a digit as it is.

    Examples
    --------
    >>> x = digits(0).train[:3]
    >>> torch.allclose(strong_views(x, torch.Generator(), 0.0), x, atol=1e-6)
    True
    """
    return digit_views(
        x, generator, degrees=40 * strength, scale=0.4 * strength, shift=2 * strength, noise=0.2 * strength,
        contrast=(1 - 0.6 * strength, 1 + 0.6 * strength),
    )  # fmt: skip


def run(
    arm: dict[str, Any],
    *,
    seed: int,
    data: str,
    budget: dict[str, Any],
    device: str,
    progress: Callable[[float], None],
) -> dict[str, Any]:
    """Train one arm on one seed, and measure its features on real digits.

    Returns
    -------
    dict
        `probe`, `knn` (N,): whether a test digit is named rightly by what the real digits of the training say.
    """
    found = digits(seed, test=1797 - budget["real"])
    real = found.train
    count = budget["generated"] if arm["dup"] else 0
    both = torch.cat([real, generate(real, count, clusters=budget["clusters"], seed=seed)]) if count else real
    labels = torch.cat([found.train_labels, torch.full((count,), -1)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = conv_encoder(budget["features"])
    size = budget["batch_size"]
    system = AdaInf(
        encoder, num_features=budget["features"], num_samples=len(both), steps_per_epoch=budget["steps"],
        epochs=arm.get("epochs", 1), seed=seed, batch_size=size, optimizer="adam", lr=budget["lr"], weight_decay=0.0,
        warmup_epochs=0.01, hidden=budget["hidden"], dim=budget["dim"], temperature=0.2, dup=max(arm["dup"], 1),
        strength=arm["strength"],
    )  # fmt: skip
    sampler = MixtureSampler([len(real), count], [system.dup, 1], seed=seed, length=size)

    def rows(step: int) -> npt.NDArray[np.int64]:
        progress(step / system.total_steps)
        sampler.set_epoch(step)
        return sampler.order()

    make = batches(
        Split(both, labels, found.test, found.test_labels), seed=seed, batch_size=size,
        view=lambda x, generator: strong_views(x, generator, system.strength), rows=rows,
    )  # fmt: skip
    pretrain(system, make, device=device)
    learn, test = features_of(system, real), features_of(system, found.test)
    parts = (learn, found.train_labels.numpy(), test, found.test_labels.numpy())
    return {"probe": probe_right(*parts), "knn": knn_right(*parts)}
