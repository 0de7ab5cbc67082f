"""Sounds to sequences of features: a small encoder of spectrograms, and wav2vec 2.0 as it comes from transformers.

An audio encoder takes a padded batch and the length of each row, and gives both back: (B, T, F) or (B, S) to (B, T', D).
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from contralto.errors import ContraltoError, DataError, MissingExtraError, UsageError
from contralto.views.audio import frames_there, normalize_waves

__all__ = ["AudioEncoder", "ConvGRUEncoder", "Wav2Vec2Encoder", "mean_over_time"]


def mean_over_time(x: Tensor, lengths: Tensor) -> Tensor:
    """The mean of every row over its own frames: (B, T, D) to (B, D).

    Examples
    --------
    >>> mean_over_time(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([2]))
    tensor([[2.]])
    """
    there = frames_there(lengths, x.shape[1]).unsqueeze(2)
    return (x * there).sum(1) / lengths.clamp_min(1).unsqueeze(1)


class AudioEncoder(nn.Module):
    """Base: a padded batch of sounds to a padded batch of features.

    Attributes
    ----------
    num_features : int
        D.
    takes : {"spectrogram", "wave"}
        What it is given.
    """

    num_features: int
    takes: Literal["spectrogram", "wave"]

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Sounds and their lengths (B,) to features (B, T', D) and theirs (B,)."""
        raise NotImplementedError


class ConvGRUEncoder(AudioEncoder):
    """Two convolutions over time, each of which halves the number of frames, and a GRU in both directions.

    Parameters
    ----------
    mels : int
        Bands of the spectrograms.
    num_features : int
        Width of what comes out, half of it from each direction; even.
    dropout : float
        Of what comes out.

    Notes
    -----
    What stands behind the end of a recording changes nothing in its features.

    Examples
    --------
    >>> features, lengths = ConvGRUEncoder(40, 64)(torch.randn(2, 30, 40), torch.tensor([30, 9]))
    >>> features.shape, lengths.tolist()
    (torch.Size([2, 8, 64]), [8, 3])
    """

    takes = "spectrogram"

    def __init__(self, mels: int = 40, num_features: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        if num_features < 2 or num_features % 2:
            raise UsageError(f"num_features must be even, got {num_features}")
        self.num_features = num_features
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, num_features, 5, stride=2, padding=2) for width in (mels, num_features)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(num_features) for _ in self.convolutions)
        self.gru = nn.GRU(num_features, num_features // 2, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Spectrograms (B, T, mels) to features (B, T / 4, D)."""
        if x.ndim != 3 or lengths.shape != x.shape[:1]:
            raise UsageError(
                f"spectrograms are (B, T, F) with lengths (B,), got {tuple(x.shape)}, {tuple(lengths.shape)}"
            )
        if (lengths < 1).any():
            raise DataError(f"recording {int((lengths < 1).nonzero()[0])} of the batch has no frames")
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            lengths = (lengths + 1) // 2
            x = norm(convolution(x.transpose(1, 2)).transpose(1, 2)).relu()
            x = x * frames_there(lengths, x.shape[1]).unsqueeze(2)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.dropout(states), lengths


class Wav2Vec2Encoder(AudioEncoder):
    """wav2vec 2.0 of transformers, or a model of its kind with the same form (HuBERT, WavLM).

    Every wave is scaled to mean 0 and variance 1. The convolutions that make frames of samples are frozen and in evaluation mode,
    as in the paper; the transformer layers learn.

    Parameters
    ----------
    name : str
        A folder that holds a model, or its name on the hub, such as "facebook/wav2vec2-base-960h" (16,000 samples a second).
    pretrained : bool
        Take its weights. False: draw new ones of its shape.

    Examples
    --------
    >>> encoder = Wav2Vec2Encoder("facebook/wav2vec2-base-960h")  # doctest: +SKIP
    >>> encoder(torch.randn(2, 16000), torch.tensor([16000, 8000]))[0].shape  # doctest: +SKIP
    torch.Size([2, 49, 768])
    """

    takes = "wave"

    def __init__(self, name: str, pretrained: bool = True) -> None:
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModel
        except ImportError as error:
            raise MissingExtraError(f"the audio encoder {name}", extra="pretrained") from error
        local = Path(name).exists()
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=local)
            config.apply_spec_augment = False  # its masks come from a global state; `AudioView` has masks of its own
            config.layerdrop = 0.0  # a layer that a step leaves out has no gradient, and ranks would wait for it
            if pretrained:
                model = AutoModel.from_pretrained(name, config=config, local_files_only=local, use_safetensors=True)
            else:
                model = AutoModel.from_config(config)
        except (OSError, ValueError) as error:
            raise ContraltoError(
                f"the audio encoder {name!r} could not be loaded ({type(error).__name__}): name a folder that holds a model, or "
                "take conv-gru"
            ) from error
        if not hasattr(model, "feature_extractor") or not hasattr(config, "conv_stride"):
            raise UsageError(f"{name!r} is no audio encoder of the form of wav2vec 2.0, but a {type(model).__name__}")
        self.model, self.num_features = model, int(config.hidden_size)
        # Only models whose frames are normalised by layers, not over a recording, are told what is padding.
        self.masked = config.feat_extract_norm == "layer"
        self.model.feature_extractor.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "Wav2Vec2Encoder":
        """The convolutions stay in evaluation mode."""
        super().train(mode)
        self.model.feature_extractor.eval()
        return self

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Waves (B, S) to features (B, T', D)."""
        if x.ndim != 2 or lengths.shape != x.shape[:1]:
            raise UsageError(f"waves are (B, S) with lengths (B,), got {tuple(x.shape)}, {tuple(lengths.shape)}")
        frames = self._frames(lengths)
        if (frames < 1).any():
            raise DataError(f"recording {int((frames < 1).nonzero()[0])} of the batch is too short for one frame")
        there = frames_there(lengths, x.shape[1]).long()
        told: dict[str, Any] = {"attention_mask": there} if self.masked else {}
        states: Tensor = self.model(normalize_waves(x, lengths), **told).last_hidden_state
        return states, frames.clamp_max(states.shape[1])

    def _frames(self, samples: Tensor) -> Tensor:
        for width, stride in zip(self.model.config.conv_kernel, self.model.config.conv_stride, strict=True):
            samples = torch.div(samples - width, stride, rounding_mode="floor") + 1
        return samples.clamp_min(0)
