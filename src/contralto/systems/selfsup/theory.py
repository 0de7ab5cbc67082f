"""What training makes of the features of a linear network under the spectral contrastive loss, in closed form.

Data are ``x = sum_i u_i e_i + noise`` with independent features, ``E u_i^2 = phi_i^2``, and noise of variance sigma^2 that is
drawn anew for every view; an augmentation destroys the share alpha_i of feature i between two views: ``E u_i u_i^+ = (1 -
alpha_i) phi_i^2``. A linear network W is trained by ``-2 E f(x).f(x^+) + E (f(x).f(x'))^2``. With ``a = (1 - alpha) phi^2`` and
``v = phi^2 + sigma^2``, the squared singular values of W at the minimum are ``c = a / v^2`` and its value is ``-sum a^2 / v^2``.
Gradient descent from a small or balanced start spreads them evenly over L layers: the first l of them have ``c^(l / 2L)``.

So the spread of weights grows with depth, and the layer before the last is closer to even: that is why it serves tasks better
whose features the training starves (Xue et al., ICLR 2024, arXiv 2403.11391; derived anew here, checked by gradient descent).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = ["SpectralWeights", "earlier_layer_wins", "feature_share", "share_gap", "spectral_weights"]

Array = npt.NDArray[np.float64]


class SpectralWeights(NamedTuple):
    """What `spectral_weights` finds: arrays (F,) over features, and the value of the loss.

    `product` and `layer` are singular values, of the whole network and of its first layers; `post` and `pre` are the sizes of the
    features there, ``singular value * phi``.
    """

    product: Array
    layer: Array
    post: Array
    pre: Array
    loss: float


def spectral_weights(phi: Any, alpha: Any, sigma: float, *, layer: int = 1, layers: int = 2) -> SpectralWeights:
    """Singular values and sizes of features at the minimum of the spectral contrastive loss.

    Parameters
    ----------
    phi : array (F,)
        Sizes of the features in the data.
    alpha : array (F,)
        Share of each that an augmentation destroys, in [0, 1].
    sigma : float
        Of the noise.
    layer, layers : int
        The layer after which `pre` is taken, and how many there are; 1 of 2 is an encoder below a head.

    Returns
    -------
    SpectralWeights

    Examples
    --------
    >>> found = spectral_weights([1.0, 1.0], [0.0, 0.9], sigma=0.3)
    >>> (found.pre[1] / found.pre[0]).round(3), (found.post[1] / found.post[0]).round(3)
    (np.float64(0.562), np.float64(0.316))
    """
    phi, alpha = np.asarray(phi, np.float64), np.asarray(alpha, np.float64)
    if (phi <= 0).any() or (alpha < 0).any() or (alpha > 1).any() or sigma < 0 or not 1 <= layer <= layers:
        raise UsageError("phi must be above 0, alpha in [0, 1], sigma at least 0 and layer from 1 to layers")
    a, v = (1 - alpha) * phi**2, phi**2 + sigma**2
    c = a / v**2
    product, part = c**0.5, c ** (layer / (2 * layers))
    return SpectralWeights(product, part, product * phi, part * phi, float(-(a**2 / v**2).sum()))


def feature_share(size: Any) -> Array:
    """Share of every feature in a representation, ``w_j^2 / sum_i w_i^2``: the larger, the fewer samples a classifier of j needs.

    Examples
    --------
    >>> feature_share([1.0, 3.0])
    array([0.1, 0.9])
    """
    square = np.asarray(size, np.float64) ** 2
    return np.asarray(square / square.sum(-1, keepdims=True))


def earlier_layer_wins(phi: Any, alpha: Any, sigma: float) -> npt.NDArray[np.bool_]:
    """Matrix (F, F): whether the layer before the head gives feature j (row) the larger part against feature i (column).

    That is where ``q_j > q_i`` with ``q = (phi + sigma^2 / phi) / sqrt(1 - alpha)``: where the augmentation disrupts j, where j
    is weaker than ``sigma^2 / phi_i``, or stronger than ``phi_i``.

    Examples
    --------
    >>> earlier_layer_wins([1.0, 0.5, 5.0], [0.0, 0.0, 0.0], sigma=0.3)[:, 0].tolist()
    [False, False, True]
    """
    phi, alpha = np.asarray(phi, np.float64), np.asarray(alpha, np.float64)
    with np.errstate(divide="ignore"):
        q = (phi + sigma**2 / phi) / np.sqrt(1 - alpha)
    return np.asarray(q[:, None] > q[None, :])


def share_gap(alpha: Any, phi: Any, *, others: int = 4, sigma: float = 0.3) -> Array:
    """How much larger the share of a feature is before the head than after it, for a grid of its alpha and phi.

    Parameters
    ----------
    alpha, phi : array (A,), (P,)
        Of the feature.
    others : int
        Further features, of size 1 and never destroyed.
    sigma : float

    Returns
    -------
    array (A, P)
        Above 0 where the layer before the head serves the feature better.

    Examples
    --------
    >>> share_gap([0.0, 0.9], [0.5, 1.0]).round(3)
    array([[-0.048,  0.   ],
           [ 0.021,  0.049]])
    """
    gap = np.empty((len(alpha), len(phi)))
    for place in np.ndindex(gap.shape):
        sizes, lost = np.append(phi[place[1]], np.ones(others)), np.append(alpha[place[0]], np.zeros(others))
        found = spectral_weights(sizes, lost, sigma)
        gap[place] = feature_share(found.pre)[0] - feature_share(found.post)[0]
    return gap
