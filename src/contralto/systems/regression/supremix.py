"""SupReMix: supervised contrast for regression, with pairs that are mixed to be hard and in order.

Plain supervised contrast takes samples of the same number for positives and repels all others alike, whether a year away or
fifty, and most of its pairs are easy. SupReMix adds mixtures of embeddings: of the anchor with others (hard negatives), and of
two samples on either side of it, so mixed that they have its number (hard positives); what is farther weighs more in the
denominator. Afterwards a linear probe on the encoder tells the number.

Mixup Your Own Pairs: Supervised Contrastive Learning for Regression with Mixup, Wu et al. 2023, arXiv 2309.16633. Its baselines
are methods of the same system: both kinds of mixtures alone, supervised contrast on equal numbers with and without weights, and
Rank-N-Contrast (Zha et al., NeurIPS 2023, arXiv 2210.01189). Where the released code differs:

- It lowers logits of rows and of mixtures by their own maximum each before they share a denominator, so the hardest mixture
  counts like the row itself; here there is one softmax, as in the equation (`shift="blocks"` is the code).
- It builds every mixture, (2 B)^3 of them; here their products with the anchor are mixed.
- A text variant counts one positive too many, and the squared weights of mixtures have their 1 within the square; not so here.

Numbers are taken in their units: `window` and weights depend on them. Those of a fine scale are rounded to `bin` first, else a
sample has no other of its number.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from contralto.data.dataset import Batch
from contralto.distributed import gather_rows, gather_with_gradient
from contralto.encoders.heads import mlp
from contralto.errors import UsageError
from contralto.losses.regression import Weight, mixing_shares, rank_n_contrast, sup_con_numbers, sup_re_mix
from contralto.systems.regression.base import Regression

__all__ = ["METHODS", "Method", "SupReMix"]

Method = Literal["supremix", "mix_neg", "mix_pos", "supcon", "weighted_supcon", "rnc", "l1"]
METHODS: tuple[Method, ...] = ("supremix", "mix_neg", "mix_pos", "supcon", "weighted_supcon", "rnc", "l1")


class SupReMix(Regression):
    """Contrast over both views of a batch by one of its methods; an output is probed afterwards.

    Parameters
    ----------
    encoder, **base
        See `Regression`.
    method : {"supremix", "mix_neg", "mix_pos", "supcon", "weighted_supcon", "rnc", "l1"}
        All mixtures; negative or positive ones alone; none, with or without weights by distance; Rank-N-Contrast, on the features
        of the encoder as they are; least absolute error, which is `Regression`.
    window : float
        Hard positives are mixed of samples whose numbers are nearer than this, in units of `bin`.
    alpha, beta : float
        The anchor's share in a hard negative is from Beta(alpha, beta); 2 and 8 in the paper, or 8 and 2, or 5 and 5.
    weight : {"l1", "squared", "none"}
        Of the denominator, for the methods that have weights.
    temperature : float, optional
        Default: 0.3, and 2 for "rnc".
    hidden, dim : int
        Widths of the head; hidden = 0 makes it linear.
    bin : float
        Numbers are rounded to multiples of this, which is then their unit: 1 leaves integers as they are, 0 all numbers.
    parts : int
        The batch is split in so many parts, each mixed by itself.
    shift : {"joint", "blocks"}
    nearest : int, optional
        See `losses.regression.sup_re_mix`.

    Examples
    --------
    >>> system = SupReMix(nn.Linear(8, 4), num_features=4)
    >>> batch = {"views": [torch.randn(6, 8), torch.randn(6, 8)], "index": torch.arange(6), "number": torch.arange(6.0)}
    >>> sorted(system.step(batch))
    ['features', 'loss']
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        method: Method = "supremix",
        window: float = 5.0,
        alpha: float = 2.0,
        beta: float = 8.0,
        weight: Weight = "l1",
        temperature: float | None = None,
        hidden: int = 0,
        dim: int = 128,
        bin: float = 1.0,  # noqa: A002 (the word of the field)
        parts: int = 1,
        shift: Literal["joint", "blocks"] = "joint",
        nearest: int | None = None,
        **base: Any,
    ) -> None:
        super().__init__(encoder, **base)
        if method not in METHODS:
            raise UsageError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
        if bin < 0 or parts < 1 or not window > 0:
            raise UsageError(f"bin is at least 0, parts at least 1, window above 0; got {bin}, {parts}, {window}")
        self.method: Method = method
        self.window, self.alpha, self.beta, self.bin, self.parts = window, alpha, beta, bin, parts
        self.weight: Weight = weight
        self.shift: Literal["joint", "blocks"] = shift
        self.nearest = nearest
        self.temperature = temperature if temperature is not None else 2.0 if method == "rnc" else 0.3
        if method != "l1":
            del self.output  # a probe takes its place
        with self.seeded():
            widths = [self.num_features, *([hidden] if hidden else []), dim]
            self.projector: nn.Module = nn.Identity() if method in ("l1", "rnc") else mlp(widths)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of two views; what is drawn is a function of the seed and the step."""
        if self.method == "l1":
            return super().step(batch)
        features, numbers = self.features_of(batch)
        views = [gather_with_gradient(z) for z in self.projector(features).chunk(2)]  # rows of all processes
        units = gather_rows(torch.round(numbers / self.bin) if self.bin else numbers)
        drawn = torch.Generator().manual_seed((self.seed << 32) + self.done)
        rows = torch.arange(len(units), device=units.device).tensor_split(min(self.parts, len(units) // 2))
        each = [self._contrast(torch.cat([z[part] for z in views]), units[part].repeat(2), drawn) for part in rows]
        return {"loss": torch.stack(each).mean(), "features": features[: len(numbers)].detach()}

    def _contrast(self, z: Tensor, units: Tensor, drawn: torch.Generator) -> Tensor:
        """The loss of rows (R, D) of both views and their numbers (R,)."""
        if self.method == "rnc":
            return rank_n_contrast(z, units, temperature=self.temperature)
        if self.method in ("supcon", "weighted_supcon"):
            weight: Weight = self.weight if self.method == "weighted_supcon" else "none"
            return sup_con_numbers(z, units, temperature=self.temperature, weight=weight)
        shares = None
        if self.method != "mix_pos":
            shares = mixing_shares(len(z), alpha=self.alpha, beta=self.beta, generator=drawn, dtype=z.dtype)
        return sup_re_mix(
            z, units, shares, window=None if self.method == "mix_neg" else self.window, temperature=self.temperature,
            weight=self.weight, shift=self.shift, nearest=self.nearest,
        )  # fmt: skip

    def tell(self, x: Tensor) -> Tensor:
        """Numbers (N,), of the method "l1" alone.

        Raises
        ------
        UsageError
            If there is no output: a contrastive method leaves an encoder, and a probe tells the number.
        """
        if self.method != "l1":
            raise UsageError(f"the method {self.method} trains an encoder: fit a probe on `embed`")
        return super().tell(x)
