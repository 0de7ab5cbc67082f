"""Recordings as pictures: a spectrogram in the colours of the pages."""

import numpy as np
import numpy.typing as npt
import torch

from contralto.data.sounds import Sounds
from contralto.views.audio import LogMel

__all__ = ["spectrogram_picture"]

SIDE, BANDS, RANGE = 96, 48, 8.0
"""Pixels; bands; how many powers of e from the loudest place down to the quietest that is told from silence."""
_QUIET, _LOUD = np.array([16.0, 20.0, 40.0]), np.array([255.0, 222.0, 120.0])


def spectrogram_picture(sounds: Sounds, row: int) -> npt.NDArray[np.uint8]:
    """The log-mel spectrogram of a recording as a square picture (96, 96, 3): time to the right, pitch upwards, loud is bright.

    Parameters
    ----------
    sounds : Sounds
    row : int
    """
    waves, samples = sounds.waves([row])
    form = LogMel(sounds.rate, BANDS, normalize=False)
    found, _ = form(torch.from_numpy(waves), torch.from_numpy(samples))
    loud = ((found[0] - found[0].max()) / RANGE + 1).clamp(0, 1).T.flip(0)  # (bands, frames)
    square = torch.nn.functional.interpolate(loud[None, None], size=(SIDE, SIDE), mode="bilinear", antialias=True)
    share = square[0, 0].numpy()[..., None]
    return np.asarray(np.round(_QUIET + share * (_LOUD - _QUIET)), np.uint8)
