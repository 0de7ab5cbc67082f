"""Sounds for encoders: normalised waves, log-mel spectrograms, and views of a batch of them.

A batch of sounds is a tensor padded with zeros and the length of each: waves (B, T), spectrograms (B, T, F). What is drawn is a
function of (seed, epoch, sample index, view), as for pictures (`views.batched`).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import ndtri
from torch import Tensor
from torch.nn import functional as F

from contralto.data.sounds import Ragged, Sounds
from contralto.errors import DataError, UsageError
from contralto.files import naming, write_atomically
from contralto.views.batched import uniforms

__all__ = ["AudioView", "LogMel", "draw_audio", "frames_there", "mel_filters", "normalize_waves", "spectrograms"]

FLOOR = 1e-6
"""Smallest power of a band: quieter than the last bit of a 16 bit recording."""


def frames_there(lengths: Tensor, width: int) -> Tensor:
    """Which places of padded rows are no padding (B, width).

    Examples
    --------
    >>> frames_there(torch.tensor([1, 3]), 3).tolist()
    [[True, False, False], [True, True, True]]
    """
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)


def normalize_waves(waves: Tensor, lengths: Tensor) -> Tensor:
    """Every wave with mean 0 and variance 1 over its own samples, as wav2vec 2.0 wants it; padding stays 0.

    Parameters
    ----------
    waves : Tensor (B, T)
    lengths : Tensor (B,)

    Examples
    --------
    >>> normalize_waves(torch.tensor([[1.0, 3.0]]), torch.tensor([2])).round(decimals=3).tolist()
    [[-1.0, 1.0]]
    """
    there = frames_there(lengths, waves.shape[1])
    count = lengths.clamp_min(1).unsqueeze(1)
    mean = (waves * there).sum(1, keepdim=True) / count
    centred = (waves - mean) * there
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / (variance + 1e-7).sqrt()


@lru_cache(maxsize=8)
def mel_filters(bins: int, mels: int, rate: int, low: float = 20.0, high: float | None = None) -> Tensor:
    """Triangles (bins, mels) that sum the power of frequencies to bands of equal width on the mel scale (HTK's form).

    Parameters
    ----------
    bins : int
        Frequencies of the Fourier transform, from 0 to half the sampling rate.
    mels : int
        Bands.
    rate : int
        Samples per second.
    low, high : float
        In hertz; default: up to half the sampling rate.

    Examples
    --------
    >>> mel_filters(129, 40, 8000).shape
    torch.Size([129, 40])
    """
    high = rate / 2 if high is None else high
    if not 0 <= low < high <= rate / 2 or mels < 1 or bins < 2:
        raise UsageError(
            f"bands lie between 0 and {rate / 2:g} Hz, the lower edge first; got {low:g} to {high:g} in {mels} bands"
        )
    edges = torch.linspace(_mel(low), _mel(high), mels + 2, dtype=torch.float64)
    hertz = 700 * (10 ** (edges / 2595) - 1)
    place = torch.linspace(0, rate / 2, bins, dtype=torch.float64).unsqueeze(1)
    up = (place - hertz[:-2]) / (hertz[1:-1] - hertz[:-2])
    down = (hertz[2:] - place) / (hertz[2:] - hertz[1:-1])
    return torch.minimum(up, down).clamp_min(0).float()


def _mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


@dataclass(frozen=True)
class LogMel:
    """Waves to log-mel spectrograms: how loud each of some bands of frequency is, over time.

    Parameters
    ----------
    rate : int
        Samples per second.
    mels : int
        Bands.
    window, hop : float
        Length of a frame, and the time from one to the next, in seconds.
    low, high : float
        See `mel_filters`.
    normalize : bool
        Take the mean of every band over the recording away, and divide by one standard deviation for all bands: how loud a
        recording is, and the colour of its microphone, are then gone.

    Examples
    --------
    >>> spectrogram, lengths = LogMel(8000)(torch.randn(2, 8000), torch.tensor([8000, 4000]))
    >>> spectrogram.shape, lengths.tolist()
    (torch.Size([2, 100, 40]), [100, 50])
    """

    rate: int
    mels: int = 40
    window: float = 0.025
    hop: float = 0.01
    low: float = 20.0
    high: float | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.rate < 1 or not 0 < self.hop <= self.window or round(self.hop * self.rate) < 1:
            raise UsageError(
                f"rate must be above 0 and 0 < hop <= window, at least a sample; got {self.rate}, {self.hop}, {self.window}"
            )

    def lengths(self, samples: Tensor) -> Tensor:
        """How many frames waves of so many samples have: one for every hop that has begun."""
        hop = round(self.hop * self.rate)
        return (samples + hop - 1) // hop

    def __call__(self, waves: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Spectrograms (B, T, mels) of waves (B, S) with their numbers of samples (B,), and their numbers of frames (B,)."""
        hop, width = round(self.hop * self.rate), round(self.window * self.rate)
        size = 2 ** math.ceil(math.log2(width))
        frames = self.lengths(samples)
        count = int(frames.max()) if len(frames) else 0
        # frame i is centred at sample i hop; a wave ends in silence
        padded = F.pad(waves, (size // 2, max(0, (count - 1) * hop + size // 2 - waves.shape[1])))
        taper = torch.hann_window(width, device=waves.device)
        spectrum = torch.stft(padded, size, hop, width, taper, center=False, return_complex=True)
        power = spectrum.abs().square().transpose(1, 2)[:, :count]  # (B, T, bins)
        bands = power @ mel_filters(size // 2 + 1, self.mels, self.rate, self.low, self.high).to(waves.device)
        there = frames_there(frames, count).unsqueeze(2)
        logs = bands.clamp_min(FLOOR).log()
        if self.normalize:
            total = frames.clamp_min(1).view(-1, 1, 1)
            centred = logs - (logs * there).sum(1, keepdim=True) / total
            variance = (centred.square() * there).sum((1, 2), keepdim=True) / (total * self.mels)
            logs = centred / (variance + 1e-5).sqrt()
        return logs * there, frames


def spectrograms(sounds: Sounds, form: LogMel, cache: str | Path | None = None, *, block: int = 256) -> Ragged:
    """The log-mel spectrograms of all recordings, computed once.

    Parameters
    ----------
    sounds : Sounds
    form : LogMel
        For their sampling rate.
    cache : path, optional
        A file (`.npy`) that is made where it is missing and mapped into memory; without it they are held there.
    block : int
        Recordings that are transformed at a time.

    Raises
    ------
    DataError
        If the file is of other recordings.
    """
    if form.rate != sounds.rate:
        raise UsageError(f"the recordings have {sounds.rate} samples a second, the spectrograms are for {form.rate}")
    length = form.lengths(torch.from_numpy(sounds.column("samples").copy())).numpy()
    start = length.cumsum() - length
    shape = (int(length.sum()), form.mels)
    if cache is None:
        return Ragged(_transform(sounds, form, np.empty(shape, np.float32), block), start, length)
    path = Path(cache)
    if not path.exists():

        def write(part: Path) -> None:
            flat = np.lib.format.open_memmap(part, "w+", np.float32, shape)
            _transform(sounds, form, flat, block)
            flat.flush()

        write_atomically(path, write)
    with naming(path):
        flat = np.load(path, mmap_mode="r", allow_pickle=False)
    if flat.shape != shape or flat.dtype != np.float32:
        raise DataError(f"holds {flat.shape} frames, not {shape}: remove it, so that it is made again", file=str(path))
    return Ragged(flat, start, length)


def _transform(sounds: Sounds, form: LogMel, flat: npt.NDArray[np.float32], block: int) -> npt.NDArray[np.float32]:
    """Fill an array (all frames, mels)."""
    end = 0
    for first in range(0, len(sounds), block):
        waves, samples = sounds.waves(np.arange(first, min(first + block, len(sounds))))
        found, frames = form(torch.from_numpy(waves), torch.from_numpy(samples))
        rows = found[frames_there(frames, found.shape[1])].numpy()
        flat[end : end + len(rows)] = rows
        end += len(rows)
    return flat


@dataclass(frozen=True)
class AudioView:
    """A random view of a spectrogram, drawn for each of a batch.

    Parameters
    ----------
    shift : int
        Largest move in time, in frames to either side; what leaves is gone, silence comes in.
    noise : float
        Standard deviation of what is added to every value.
    time_masks, time_width : int
        SpecAugment (Park et al. 2019): so many stretches of time, each of 0 to `time_width` frames and at most a fifth of the
        recording, are set to 0.
    band_masks, band_width : int
        The same for neighbouring bands.

    Examples
    --------
    >>> view = AudioView(shift=1, noise=0.1, time_masks=1, time_width=4)
    >>> x, lengths = torch.ones(2, 20, 8), torch.tensor([20, 12])
    >>> drawn = draw_audio(view, x, lengths, seed=0, epoch=0, index=[4, 7])
    >>> drawn.shape, float(drawn[1, 12:].abs().sum())
    (torch.Size([2, 20, 8]), 0.0)
    """

    shift: int = 0
    noise: float = 0.0
    time_masks: int = 0
    time_width: int = 10
    band_masks: int = 0
    band_width: int = 8

    def __post_init__(self) -> None:
        if min(self.shift, self.time_masks, self.time_width, self.band_masks, self.band_width) < 0 or self.noise < 0:
            raise UsageError(f"all numbers of a view are at least 0; got {self}")


def draw_audio(
    view: AudioView, x: Tensor, lengths: Tensor, *, seed: int, epoch: Any, index: Any, number: int = 0
) -> Tensor:
    """A view of a batch of spectrograms.

    Parameters
    ----------
    view : AudioView
    x : Tensor (B, T, F)
    lengths : Tensor (B,)
        Frames of each; what is behind them is 0, before and after.
    seed : int
    epoch, index : integer or integers (B,)
    number : int
        Of the view, where there are several.

    Returns
    -------
    Tensor (B, T, F)
    """
    width, bands = x.shape[1:]
    fixed = 1 + 2 * view.time_masks + 2 * view.band_masks
    # The noise of a value depends on its place alone, not on how much padding the batch has.
    drawn = uniforms(seed, epoch, index, number, fixed + (width * bands if view.noise else 0))
    u = torch.from_numpy(drawn[:, :fixed]).to(x.device)
    there = frames_there(lengths, width)
    if view.shift:
        x = _shifted(x, lengths, (u[:, 0] * (2 * view.shift + 1)).floor().long() - view.shift)
    if view.noise:
        normal = ndtri(np.clip(drawn[:, fixed:], 2.0**-53, None)).astype(np.float32)
        x = x + view.noise * torch.from_numpy(normal).to(x).view(len(x), width, bands)
    kept = there
    for mask in range(view.time_masks):
        longest = torch.minimum(torch.full_like(lengths, view.time_width), lengths // 5)
        kept = kept & ~_stretch(u[:, 1 + 2 * mask : 3 + 2 * mask], lengths, longest, width)
    x = x * kept.unsqueeze(2)
    for mask in range(view.band_masks):
        first = 1 + 2 * view.time_masks + 2 * mask
        most = torch.full_like(lengths, min(view.band_width, bands))
        x = x * ~_stretch(u[:, first : first + 2], torch.full_like(lengths, bands), most, bands).unsqueeze(1)
    return x


def _shifted(x: Tensor, lengths: Tensor, by: Tensor) -> Tensor:
    """Every row moved by so many frames, within its own length."""
    place = torch.arange(x.shape[1], device=x.device) - by.unsqueeze(1)
    inside = (place >= 0) & (place < lengths.unsqueeze(1)) & frames_there(lengths, x.shape[1])
    taken = x.gather(1, place.clamp(0, x.shape[1] - 1).unsqueeze(2).expand_as(x))
    return taken * inside.unsqueeze(2)


def _stretch(u: Tensor, lengths: Tensor, longest: Tensor, width: int) -> Tensor:
    """A stretch (B, width) of 0 to `longest` places that lies within each row's length."""
    long = (u[:, 0] * (longest + 1)).floor().long()
    start = (u[:, 1] * (lengths - long + 1)).floor().long()
    place = torch.arange(width, device=u.device)
    return (place >= start.unsqueeze(1)) & (place < (start + long).unsqueeze(1))
