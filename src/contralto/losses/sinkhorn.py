"""Balanced soft assignment: the Sinkhorn algorithm with uniform marginals, in the log domain, over one or several processes."""

import torch
from torch import Tensor

from contralto.distributed import reduce_over_ranks
from contralto.errors import UsageError

__all__ = ["sinkhorn"]


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Assign rows to columns softly, so that all columns get about as much (SwAV, arXiv 2006.09882, section 3).

    ``exp(scores / epsilon)`` is scaled in turn to equal column totals, over the rows of *all* processes, and to rows that sum
    to 1. The last scaling is that of the rows, so their sums are exact and the column totals near rows / columns only.

    Parameters
    ----------
    scores : Tensor (B, K)
        Rows of this process, such as cosines of samples to prototypes. The processes may hold different numbers of rows.
    epsilon : float
        Strength of the entropy; the smaller, the harder the assignment.
    iterations : int
        0 balances nothing: a softmax of ``scores / epsilon``.

    Returns
    -------
    Tensor (B, K)
        Rows that sum to 1, without gradient; float32 at least, whatever the precision of the scores.

    Raises
    ------
    UsageError
        If there are no rows, or an argument cannot be.

    Notes
    -----
    In logarithms nothing overflows, however small `epsilon` is.

    Examples
    --------
    >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    >>> sinkhorn(scores, epsilon=0.1)
    tensor([[0.9526, 0.0474],
            [0.7311, 0.2689],
            [0.2689, 0.7311],
            [0.0474, 0.9526]])
    >>> sinkhorn(scores, epsilon=0.1, iterations=0).sum(0)
    tensor([3.8600, 0.1400])
    """
    if scores.ndim != 2 or 0 in scores.shape:
        raise UsageError(
            f"scores must be of shape (samples, prototypes) with at least one each, got {tuple(scores.shape)}"
        )
    if not epsilon > 0 or iterations < 0:
        raise UsageError(f"epsilon must be above 0 and iterations at least 0, got {epsilon} and {iterations}")
    log_q = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
    for _ in range(iterations):
        log_q = log_q - _log_totals(log_q)
        log_q = log_q.log_softmax(1)
    return log_q.softmax(1)


def _log_totals(log_q: Tensor) -> Tensor:
    """Logarithm of the column totals over all processes, (K,)."""
    highest = reduce_over_ranks(log_q.amax(0), "max")
    return reduce_over_ranks((log_q - highest).exp().sum(0)).log() + highest
