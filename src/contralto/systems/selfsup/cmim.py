"""cMIM: an encoder and a decoder that keep what is in a sample, with codes that stand apart in angle; no augmentation needed.

A probabilistic encoder q(z|x) and a decoder p(x|z) are trained as a mutual information machine: like a VAE, but with the opposite
sign of log q(z|x), so that confident codes are rewarded and do not collapse. cMIM adds a contrastive term in which
every code is its own positive and the others of the batch enter by their mean, so that it does not depend on the batch size.
Afterwards the hidden activations of the decoder, just before its output, serve as "informative embeddings".

cMIM: A Contrastive Mutual Information Framework for Unified Generative and Discriminative Representation Learning, 2025,
arXiv 2502.19642; MIM, arXiv 1910.03175. The objective follows the authors' molecule code (KERMT): cosine similarities of the
sampled codes, temperature 0.1, log-scales from -6 on. The contrastive term is at most log 2 per sample, against reconstructions
of tens of nats: expect mild effects of it.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.distributed import gather_with_gradient, mean_weight
from contralto.encoders.decoders import Decoder, Likelihood, PictureDecoder, VectorDecoder
from contralto.errors import DataError, UsageError
from contralto.losses.information import (
    LatentScaling,
    code_contrast,
    gaussian_log_density,
    latent_loss,
    score_function,
)
from contralto.losses.pairs import nt_xent
from contralto.systems.base import EncoderSystem, Optimizer
from contralto.views.batched import BatchView, uniforms

__all__ = ["CMIM"]

Mode = Literal["cmim", "amim", "smim", "vae", "infonce_aug"]
POSTERIOR, PRIOR, SAMPLE, RESAMPLE = range(1000, 1004)
"""Numbers of what is drawn for a sample beside its views."""


class CMIM(EncoderSystem):
    """A Gaussian latent-variable model whose loss has the forms of the MIM family.

    Parameters
    ----------
    encoder, **base
        See `EncoderSystem`.
    final_lr : float, optional
        Where half a cosine ends; default: the rate stays as it is.
    mode : {"cmim", "amim", "smim", "vae", "infonce_aug"}
        "cmim": reconstruction, latent terms and contrast of codes. "amim": without the contrast. "smim": "amim", and the same on
        samples of the model itself. "vae": a VAE. "infonce_aug": the baseline without a decoder but with augmented views,
        NT-Xent of the means of two of them.
    dim : int
        Width d of the codes.
    hidden : int
        Width of the decoder: of its layers for vectors, of its first map for pictures.
    side : int, optional
        Side of the pictures that are reconstructed; default: that of the encoder's input, at most 64.
    vector : int, optional
        Width of the samples, where they are vectors instead of pictures; they come as they are.
    likelihood : {"bernoulli", "gaussian"}
        Of pixels or values given the code; for "bernoulli" they are in [0, 1].
    temperature : float
    min_log_scale : float
        Lower clamp of the logarithm of the posterior's standard deviation.
    scaling : {"none", "gradient", "loss"}
        See `contralto.losses.information.latent_loss`.
    use : {"informative", "mean"}
        What `embed` gives: hidden activations of the decoder at the mean of the code, or that mean.

    Attributes
    ----------
    decoder : Decoder

    Examples
    --------
    >>> system = CMIM(nn.Linear(8, 16), num_features=16, dim=4, hidden=12, vector=8)
    >>> out = system.step({"views": [torch.rand(6, 8)], "index": torch.arange(6)})
    >>> sorted(out)
    ['contrast', 'cosine', 'features', 'log_prior', 'log_q', 'loss', 'nll']
    >>> system.embed(torch.rand(6, 8)).shape, system.generate(2).shape
    (torch.Size([6, 12]), torch.Size([2, 8]))
    """

    decoder: Decoder

    def __init__(
        self,
        encoder: nn.Module,
        *,
        batch_size: int = 128,
        optimizer: Optimizer = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        final_lr: float | None = None,
        mode: Mode = "cmim",
        dim: int = 64,
        hidden: int = 256,
        side: int | None = None,
        vector: int | None = None,
        likelihood: Likelihood = "bernoulli",
        temperature: float = 0.1,
        min_log_scale: float = -6.0,
        scaling: LatentScaling = "none",
        use: Literal["informative", "mean"] = "informative",
        **base: Any,
    ) -> None:
        super().__init__(
            encoder,
            batch_size=batch_size,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            final_lr=lr if final_lr is None else final_lr,
            **base,
        )
        if mode not in get_args(Mode):
            raise UsageError(f"mode must be one of {', '.join(get_args(Mode))}; got {mode!r}")
        if use not in ("informative", "mean"):
            raise UsageError(f"use must be informative or mean; got {use!r}")
        self.mode, self.dim, self.temperature, self.min_log_scale = mode, dim, temperature, min_log_scale
        self.scaling, self.use = scaling, use
        with self.seeded():
            self.to_posterior = nn.Linear(self.num_features, 2 * dim)
            self.decoder = self.build_decoder(dim, hidden, side, vector, likelihood)

    def build_decoder(
        self, dim: int, hidden: int, side: int | None, vector: int | None, likelihood: Likelihood
    ) -> Decoder:
        """The decoder for the kind of samples there is."""
        if vector is not None:
            return VectorDecoder(dim, hidden, vector, likelihood)
        if side is None:
            if not hasattr(self.encoder, "size"):
                raise UsageError("name what is reconstructed: the side of pictures, or vector, the width of vectors")
            side = min(int(self.encoder.size), 64)  # type: ignore[arg-type]
        return PictureDecoder(dim, hidden, side, likelihood=likelihood)

    # Training.

    def views(self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Sequence[Any]:
        """The picture as it is (its middle, if it is not square); two augmented views for "infonce_aug"."""
        if self.mode == "infonce_aug":
            return super().views(size, mean, std)
        return [BatchView(size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, mean=mean, std=std)]

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch of one view, or of two for "infonce_aug"."""
        if self.mode == "infonce_aug":
            return self._contrast_of_views(self.checked(batch, 2))
        [view] = self.checked(batch, 1)
        features, mean, log_scale = self.encode(view)
        z = mean + log_scale.exp() * self.normal(batch["index"], POSTERIOR, self.dim, mean)
        x = self.target(view)
        self._check_range(x, batch)
        nll = self.decoder.nll(z, x)
        mode: Literal["vae", "amim"] = "vae" if self.mode == "vae" else "amim"
        own = latent_loss(nll, z, mean, log_scale, mode=mode, scaling=self.scaling)
        if self.mode == "smim":
            own = own + self._own_samples(batch["index"], mean)
        loss = own.mean() * mean_weight(torch.tensor(len(z), device=z.device))
        contrast = code_contrast(gather_with_gradient(z), temperature=self.temperature)  # codes of all ranks
        if self.mode == "cmim":
            loss = loss + contrast
        told = {
            "nll": nll, "log_q": gaussian_log_density(z, mean, log_scale), "log_prior": gaussian_log_density(z),
            "contrast": contrast, "cosine": _mean_cosine(z),
        }  # fmt: skip
        return {"loss": loss, "features": features.detach()} | {k: v.detach().mean() for k, v in told.items()}

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, F) of the encoder, mean and log-scale (B, dim) of q(z|x)."""
        features: Tensor = self.encoder(x)
        mean, log_scale = self.to_posterior(features).chunk(2, 1)
        return features, mean, log_scale.clamp_min(self.min_log_scale)

    def target(self, view: Tensor) -> Tensor:
        """What the decoder is to reconstruct of an input of the encoder: vectors themselves, pictures as values in [0, 1]."""
        if not isinstance(self.decoder, PictureDecoder):
            return view
        mean, std = self._scale(view)
        pixels = view * std + mean
        side = self.decoder.shape[-1]
        if pixels.shape[-1] != side:
            pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        return pixels.clamp(0, 1)  # NaN stays

    def as_input(self, x: Tensor) -> Tensor:
        """The other way round: what the decoder made as an input of the encoder."""
        if not isinstance(self.decoder, PictureDecoder):
            return x
        size = getattr(self.encoder, "size", x.shape[-1])
        if size != x.shape[-1]:
            x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        mean, std = self._scale(x)
        return (x - mean) / std

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = getattr(self.encoder, "mean", (0.0,) * 3), getattr(self.encoder, "std", (1.0,) * 3)
        return like.new_tensor(mean).view(-1, 1, 1), like.new_tensor(std).view(-1, 1, 1)

    def _check_range(self, x: Tensor, batch: Batch) -> None:
        if not self.decoder.discrete or not x.is_floating_point():
            return
        wrong = ((x < 0) | (x > 1)).flatten(1).any(1)
        if wrong.any():
            raise DataError(
                f"sample {batch['index'][wrong.to(batch['index'].device)][0].item()} has values outside of [0, 1], which "
                f'likelihood="bernoulli" cannot reconstruct: scale them, or take "gaussian"'
            )

    def uniform(self, index: Tensor, what: int, count: int, like: Tensor) -> Tensor:
        """Numbers in (0, 1) (B, count): a function of seed, step, sample and what they are for."""
        drawn = uniforms(self.seed, self.done, index.cpu().numpy(), what, count)
        return torch.from_numpy(drawn).add_(2.0**-54).to(like.device, like.dtype).clamp(1e-7, 1 - 1e-7)

    def normal(self, index: Tensor, what: int, count: int, like: Tensor) -> Tensor:
        """Normal numbers (B, count), drawn like `uniform`."""
        drawn: Tensor = torch.special.ndtri(self.uniform(index, what, count, like))
        return drawn

    def _own_samples(self, index: Tensor, like: Tensor) -> Tensor:
        """The A-MIM loss (B,) of samples z ~ P(z), x ~ p(x|z), whose code is drawn again from q(z|x) (sym-MIM)."""
        prior = self.normal(index, PRIOR, self.dim, like)
        x = self.decoder.sample(prior, self.uniform(index, SAMPLE, self.decoder.draws, like))
        _, mean, log_scale = self.encode(self.as_input(x))
        z = mean + log_scale.exp() * self.normal(index, RESAMPLE, self.dim, like)
        loss = latent_loss(self.decoder.nll(z, x), z, mean, log_scale, mode="amim", scaling=self.scaling)
        return loss + score_function(loss, -self.decoder.nll(prior, x)) if self.decoder.discrete else loss

    def _contrast_of_views(self, views: list[Tensor]) -> dict[str, Tensor]:
        features, mean, _ = self.encode(torch.cat(views))
        z0, z1 = (gather_with_gradient(z) for z in mean.chunk(2))
        loss = nt_xent(z0, z1, temperature=self.temperature)
        return {"loss": loss, "features": features[: len(views[0])].detach()}

    # What is used afterwards.

    def mean_code(self, x: Tensor) -> Tensor:
        """The mean of the code (N, dim)."""
        return self.encode(x)[1]

    def informative(self, x: Tensor) -> Tensor:
        """Hidden activations (N, H) of the decoder just before its output, at the mean of the code."""
        return self.decoder.hidden(self.mean_code(x), x)

    def embed(self, x: Tensor) -> Tensor:
        """The informative embedding, or the mean of the code where `use` says so or no decoder was trained."""
        return self.informative(x) if self.use == "informative" and self.mode != "infonce_aug" else self.mean_code(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The expected sample at the mean of the code, as `target` would have it."""
        return self.decoder.mean(self.mean_code(x))

    def generate(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Expected samples of n codes drawn from the prior, whose standard deviation is `temperature`."""
        weight = self.to_posterior.weight
        z = torch.randn(n, self.dim, generator=generator).to(weight.device, weight.dtype)
        return self.decoder.mean(temperature * z)


def _mean_cosine(z: Tensor) -> Tensor:
    """Mean cosine between different rows."""
    with torch.no_grad():
        unit, n = F.normalize(z, dim=1), len(z)
        return (unit.sum(0).square().sum() - n) / (n * (n - 1))
