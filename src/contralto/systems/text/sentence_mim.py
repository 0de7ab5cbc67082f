"""SentenceMIM: sentences as codes that keep what they say, with the loss of MIM or cMIM.

A GRU reads a sentence backwards into a Gaussian code, another one writes it again from that code. Trained as a mutual
information machine the code is not ignored, as it is in a VAE whose decoder can do without. The informative embedding is the mean
state of the decoder while it reads the sentence.

SentenceMIM: A Latent Variable Language Model, Livne, Swersky and Fleet, 2020, arXiv 2003.02645; `mode="amim"` is its loss,
without the constant log(batch size). The default adds cMIM's contrast of codes. Its code clamps the logarithm of the
variance at
-10, so that of the standard deviation at -5 here; it divides the learning rate by four whenever the validation does not improve,
where this one follows half a cosine to zero.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from contralto.encoders.decoders import Likelihood
from contralto.encoders.recurrent import GRUDecoder
from contralto.errors import UsageError
from contralto.losses.information import LatentScaling
from contralto.systems.base import Optimizer
from contralto.systems.selfsup.cmim import CMIM, Mode

__all__ = ["SentenceMIM"]


class SentenceMIM(CMIM):
    """cMIM of sentences, which are rows of word numbers (B, T).

    Parameters
    ----------
    encoder : nn.Module
        Word numbers (B, T) to features (B, num_features), such as `contralto.encoders.recurrent.GRUEncoder`.
    num_features, ..., weight_decay
        See `EncoderSystem`.
    words, length : int
        Size of the vocabulary, and of the rows.
    clip : float
        Largest norm of the gradient.
    mode, dim, temperature, min_log_scale, scaling, use
        See `CMIM`; "infonce_aug" is for pictures.
    embedding, hidden : int
        Width of word vectors, and of the decoder's state.
    dropout : float
        Of the decoder's word vectors.

    Examples
    --------
    >>> from contralto.encoders.recurrent import GRUEncoder
    >>> system = SentenceMIM(GRUEncoder(10, 4, 6), num_features=6, words=10, length=4, dim=3, embedding=4, hidden=6)
    >>> x = torch.tensor([[4, 5, 2, 0], [6, 2, 0, 0]])
    >>> system.step({"views": [x], "index": torch.arange(2)})["loss"].ndim, system.embed(x).shape
    (0, torch.Size([2, 6]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_features: int,
        words: int,
        length: int = 60,
        num_samples: int = 0,
        steps_per_epoch: int = 1,
        seed: int = 0,
        epochs: int = 20,
        batch_size: int = 20,
        optimizer: Optimizer = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        warmup_epochs: float = 0,
        final_lr: float | None = 0.0,
        clip: float = 0.25,
        mode: Mode = "cmim",
        dim: int = 128,
        embedding: int = 300,
        hidden: int = 256,
        dropout: float = 0.5,
        temperature: float = 0.1,
        min_log_scale: float = -5.0,
        scaling: LatentScaling = "none",
        use: Literal["informative", "mean"] = "informative",
    ) -> None:
        if mode == "infonce_aug":
            raise UsageError("infonce_aug needs augmented views, which sentences do not have")
        self._sizes = words, embedding, length, dropout  # what build_decoder takes
        super().__init__(
            encoder, num_features=num_features, num_samples=num_samples, steps_per_epoch=steps_per_epoch, seed=seed,
            epochs=epochs, batch_size=batch_size, optimizer=optimizer, lr=lr, weight_decay=weight_decay, momentum=momentum,
            warmup_epochs=warmup_epochs, final_lr=final_lr, mode=mode, dim=dim, hidden=hidden, temperature=temperature,
            min_log_scale=min_log_scale, scaling=scaling, use=use,
        )  # fmt: skip
        self.clip = clip

    def build_decoder(
        self, dim: int, hidden: int, side: int | None, vector: int | None, likelihood: Likelihood
    ) -> GRUDecoder:
        """The decoder of sentences."""
        words, embedding, length, dropout = self._sizes
        return GRUDecoder(words, dim, embedding, hidden, length, dropout)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient."""
        nn.utils.clip_grad_norm_([p for p in self.parameters() if p.grad is not None], self.clip)

    def generate(self, n: int, *, temperature: float | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Most likely sentences (n, length) of codes drawn from the prior; by default at a temperature of 1 / sqrt(dim)."""
        return super().generate(
            n, temperature=self.dim**-0.5 if temperature is None else temperature, generator=generator
        )
