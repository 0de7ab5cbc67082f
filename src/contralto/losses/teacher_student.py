"""Contrast against an older self, and of sounds with texts: the losses of COCONUT on the contrast engine.

Both have positives and negatives that a plain supervised contrast cannot express: positives may come from a frozen teacher and
negatives from the student, and one text may belong to many sounds.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from contralto.distributed import gather_rows, gather_with_gradient, own_places
from contralto.errors import UsageError
from contralto.losses.contrast import Gather, Reduction, contrast, is_across, mean_over_ranks

__all__ = ["Source", "audio_text", "teacher_student"]

Source = Literal["student", "teacher"]


def teacher_student(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    anchors: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    positive_from: Source = "teacher",
    negative_from: Source = "student",
    negatives: Literal["all", "new_only"] = "all",
    include_self_positive: bool = True,
    reduction: Reduction = "mean",
    gather: Gather = "none",
) -> Tensor:
    """Supervised contrast whose positives and negatives may come from different networks (COCONUT, 4 and 5).

    For an anchor k of the memory, with P(k) the samples of its class, a the student's rows and b the teacher's::

        l_k = mean over p in P(k) of  log sum_{i != k} exp(a_k a_i / t)  -  a_k b_p / t          (NSPT)

    The positive need not be among the terms of the denominator, so the loss may be below 0.

    Parameters
    ----------
    student : Tensor (N, D)
        Projections of the batch, new samples and those of the memory.
    teacher : Tensor (N, D), optional
        Projections of the same samples by the model as it was after the last task; never carries gradient. None is enough for
        "student" and "student".
    labels : Tensor (N,)
    anchors : Tensor (N,) of bool
        The samples of the memory: the teacher knows no others, and no others are pulled to it.
    temperature : float or Tensor
    positive_from, negative_from : {"teacher", "student"}
        NSPT is teacher and student, SCL (supervised contrast of the anchors) student and student, NTPT teacher and teacher.
    negatives : {"all", "new_only"}
        Whom the denominator holds: all others, or only samples that are not of the memory.
    include_self_positive : bool
        Whether the teacher's row of the anchor itself is one of its positives. The student's never is.
    reduction
        "mean" is over the anchors that have a positive.
    gather
        "all" contrasts with the rows of all processes; see `contrast`.

    Returns
    -------
    Tensor
        A scalar, or (N,) with 0 for who is no anchor. 0, with gradient, where there is no anchor.

    Raises
    ------
    UsageError
        If shapes do not fit, or the teacher's rows are asked for and not given.

    Examples
    --------
    >>> x, labels = torch.eye(4), torch.tensor([0, 1, 0, 2])
    >>> memory = torch.tensor([True, False, True, False])
    >>> teacher_student(x, x, labels, memory, temperature=1.0)
    tensor(0.5986)
    >>> teacher_student(x, x, labels, torch.zeros(4, dtype=torch.bool))
    tensor(0.)
    """
    _check(student, teacher, labels, anchors, positive_from, negative_from)
    if negatives not in ("all", "new_only"):
        raise UsageError(f'negatives must be "all" or "new_only", got {negatives!r}')
    across = is_across(gather)
    everyone = gather_with_gradient(student) if across else student
    sources = [everyone]
    if "teacher" in (positive_from, negative_from):
        assert teacher is not None
        sources.append(gather_rows(teacher) if across else teacher.detach())
    kind, old = (gather_rows(labels), gather_rows(anchors)) if across else (labels, anchors)
    own = own_places(student) if across else torch.arange(len(student), device=student.device)
    n = len(everyone)
    itself = include_self_positive and positive_from == "teacher"
    _, group, size = kind.unique(return_inverse=True, return_counts=True)
    count = size[group] - (0 if itself else 1)
    # who is no anchor has no positives, and so does not count
    share = old / count.clamp_min(1).to(torch.promote_types(student.dtype, torch.float32))

    def where(source: Source, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Which columns are of a source, and the sample that each of them is of."""
        return (columns >= n) == (source == "teacher"), columns % n

    def positives(rows: Tensor, columns: Tensor) -> Tensor:
        here, sample = where(positive_from, columns)
        row = own[rows]
        same = (group[row] == group[sample]) & here
        return torch.where(same if itself else same & (row != sample), share[row], 0.0)

    def weights(rows: Tensor, columns: Tensor) -> Tensor:
        here, sample = where(negative_from, columns)
        there = (own[rows] != sample) & here
        return there & ~old[sample] if negatives == "new_only" else there

    loss = contrast(
        student, torch.cat(sources), positives=positives, weights=weights, temperature=temperature, reduction=reduction
    )
    return mean_over_ranks(loss, (old & (count > 0))[own].sum(), reduction) if across else loss


def audio_text(
    audio: Tensor,
    text: Tensor,
    which: Tensor | None = None,
    *,
    pooled: Literal["mean", "sum"] = "mean",
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    gather: Gather = "none",
) -> Tensor:
    """InfoNCE between sounds and texts in both directions, half of each, where one text may belong to many sounds (COCONUT, 6).

    Parameters
    ----------
    audio, text : Tensor (N, D)
        Row i of one belongs to row i of the other.
    which : Tensor (N,) of int, optional
        Number of the text: rows with the same number are positives of each other, all to the same part. None: every row is
        another text.
    pooled : {"mean", "sum"}
        What several positives give: the mean of the logarithms of their probabilities, or, beyond the paper, the logarithm of
        their sum.
    temperature : float or Tensor
    reduction
        See `contrast`.
    gather
        "all" contrasts with the rows of all processes; see `contrast`.

    Notes
    -----
    Where equal texts have equal rows, the mean of logarithms over them is what every row alone gives, so that `which` changes
    nothing with "mean": sounds with equal texts still stand in each other's denominators. Only "sum" takes them out.

    Examples
    --------
    >>> audio_text(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.5514)
    >>> audio_text(torch.eye(2)[[0, 0, 1]], torch.eye(2)[[0, 0, 1]], torch.tensor([7, 7, 2]), temperature=1.0)
    tensor(0.7585)
    """
    if audio.ndim != 2 or audio.shape != text.shape:
        raise UsageError(
            f"audio and text must be of one shape (N, D), got {tuple(audio.shape)} and {tuple(text.shape)}"
        )
    if which is not None and which.shape != audio.shape[:1]:
        raise UsageError(f"which must be of shape ({len(audio)},), got {tuple(which.shape)}")
    if pooled not in ("mean", "sum"):
        raise UsageError(f'pooled must be "mean" or "sum", got {pooled!r}')
    across = is_across(gather)
    own = own_places(audio) if across else torch.arange(len(audio), device=audio.device)
    positives: Tensor | Callable[[Tensor, Tensor], Tensor] = own
    if which is not None:
        everyone = gather_rows(which) if across else which
        _, number, size = everyone.unique(return_inverse=True, return_counts=True)
        share = 1 / size[number].to(torch.promote_types(audio.dtype, torch.float32))
        share = torch.ones_like(share) if pooled == "sum" else share

        def positives(rows: Tensor, columns: Tensor) -> Tensor:
            row = own[rows]
            return torch.where(number[row] == number[columns], share[row], 0.0)

    summed = pooled == "sum" and which is not None
    there, back = (
        contrast(
            x, gather_with_gradient(y) if across else y, positives=positives, temperature=temperature, reduction=reduction,
            log_outside=summed,
        )
        for x, y in ((audio, text), (text, audio))
    )  # fmt: skip
    loss = (there + back) / 2
    return mean_over_ranks(loss, torch.tensor(len(audio)), reduction) if across else loss


def _check(
    student: Tensor, teacher: Tensor | None, labels: Tensor, anchors: Tensor, positive_from: str, negative_from: str
) -> None:
    for name, value in (("positive_from", positive_from), ("negative_from", negative_from)):
        if value not in get_args(Source):
            raise UsageError(f'{name} must be "student" or "teacher", got {value!r}')
    if student.ndim != 2 or labels.shape != student.shape[:1] or anchors.shape != student.shape[:1]:
        raise UsageError(
            f"student must be of shape (N, D), labels and anchors (N,); got {tuple(student.shape)}, {tuple(labels.shape)} "
            f"and {tuple(anchors.shape)}"
        )
    if "teacher" not in (positive_from, negative_from):
        return
    if teacher is None or teacher.shape != student.shape:
        got = None if teacher is None else tuple(teacher.shape)
        raise UsageError(f"teacher must hold the same samples as student, {tuple(student.shape)}; got {got}")
