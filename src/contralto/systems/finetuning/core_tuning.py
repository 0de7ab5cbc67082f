"""Core-tuning: fine-tuning of a self-supervised encoder with contrast on hard, mixed features, and a smooth boundary.

Contrast over single samples leaves classes scattered, and cross-entropy alone does not gather them. Core-tuning mixes the
features of every sample with those of another one, and its hardest positive with its hardest negative; a focal supervised
contrast learns from samples and mixtures, the more the harder a pair is, and the classifier learns the mixtures too.
Mining, mixing and contrast are on features after pooling, so one view of a picture is enough.

Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning, Zhang et al., NeurIPS
2021, arXiv 2102.06605. Where the released code differs:

- It looks for the hardest positive in cosines of which the others were set to 0, not left out: of features after a ReLU, whose
  cosines are all positive, it finds one of those, and mostly mixes the anchor itself. Here the search is that of the paper.
- It divides the contrast of an anchor by all 3 B rows, the paper by its positives; `over` says which, and `eta` depends on it.
- It recognises equal labels by a sum of powers of ten, which ends at 38 classes; here labels are compared.
- It steps its cosine after every epoch; here after every step.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from contralto.errors import UsageError
from contralto.losses.contrast import soft_cross_entropy
from contralto.losses.focal import focal_sup_con
from contralto.losses.mixing import draw_mixing, hard_mixtures
from contralto.systems.finetuning.base import FineTuning

__all__ = ["CoreTuning"]


class CoreTuning(FineTuning):
    """Soft cross-entropy and focal supervised contrast on samples, hard negatives and hard positives.

    Parameters
    ----------
    encoder, **base
        See `FineTuning`. Mining and mixing are within a part, so that `micro_batch` is part of the method.
    eta : float
        Weight of the contrast; the paper chooses among 0.1, 1 and 10. 0 leaves the smooth boundary alone.
    alpha : float
        Shares of mixtures are from Beta(alpha, alpha).
    floor : float
        The other sample's share in a hard negative is at least this.
    gamma : float
        Of the focal weight; 0 is plain supervised contrast.
    over : {"positives", "rows"}
        What the contrast of an anchor is divided by; see `losses.focal.focal_sup_con`.
    learn_original : bool
        Let the encoder learn through the unmixed rows too; in the released code they teach classifier and projector alone.

    Examples
    --------
    >>> system = CoreTuning(nn.Linear(8, 4), num_features=4, num_classes=3)
    >>> batch = {"views": [torch.randn(6, 8)], "index": torch.arange(6), "label": torch.arange(6) % 3}
    >>> sorted(system.step(batch))
    ['contrast', 'cross_entropy', 'features', 'loss']
    """

    mixes: ClassVar[bool] = True

    def __init__(
        self,
        encoder: nn.Module,
        *,
        eta: float = 0.1,
        alpha: float = 1.0,
        floor: float = 0.8,
        gamma: float = 1.0,
        over: Literal["positives", "rows"] = "positives",
        learn_original: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(encoder, eta=eta, **base)
        if not alpha > 0 or not 0 <= floor <= 1 or over not in ("positives", "rows"):
            raise UsageError(
                f'alpha is above 0, floor in [0, 1], over "positives" or "rows"; got {alpha}, {floor}, {over!r}'
            )
        self.alpha, self.floor, self.gamma = alpha, floor, gamma
        self.over: Literal["positives", "rows"] = over
        self.learn_original = learn_original

    def part_losses(self, features: Tensor, labels: Tensor, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same of a part and its mixtures."""
        draws = draw_mixing(len(features), alpha=self.alpha, floor=self.floor, generator=drawn)
        rows, targets = hard_mixtures(
            features, labels, self.num_classes, draws, detach_original=not self.learn_original
        )
        ce = soft_cross_entropy(self.classifier(rows), targets).mean()
        if not self.eta:
            return ce, ce.new_zeros(())
        con = focal_sup_con(
            self.projector(rows), targets, temperature=self.temperature, gamma=self.gamma, over=self.over
        )
        return ce, con
