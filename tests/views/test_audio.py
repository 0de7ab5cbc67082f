"""Spectrograms against their definition, and views that depend on (seed, epoch, index) alone and never on padding."""

import numpy as np
import pytest
import torch

from contralto.data.manifest import SKIPPED_SCHEMA
from contralto.data.sounds import SOUND_SCHEMA, Sounds
from contralto.errors import DataError, UsageError
from contralto.views.audio import AudioView, LogMel, draw_audio, mel_filters, normalize_waves, spectrograms

RATE = 8000


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bins", "mels", "rate"), [(129, 40, 8000), (257, 80, 16000)])
def test_filters_are_those_of_transformers(bins, mels, rate):
    audio_utils = pytest.importorskip("transformers.audio_utils")
    expected = audio_utils.mel_filter_bank(bins, mels, 20.0, rate / 2, rate, norm=None, mel_scale="htk")
    assert np.abs(mel_filters(bins, mels, rate).numpy() - expected).max() < 1e-6


def test_a_spectrogram_is_the_logarithm_of_windowed_power_in_bands():
    form = LogMel(RATE, mels=20, normalize=False)
    wave = 0.1 * noise(0, 1, 1000)
    found, lengths = form(wave, torch.tensor([1000]))
    assert lengths.tolist() == [13]  # a frame for every 80 samples that have begun
    padded = np.pad(wave[0].numpy().astype(np.float64), (128, 256))
    taper = np.pad(np.sin(np.pi * np.arange(200) / 200) ** 2, 28)
    for frame in (0, 5, 12):
        power = np.abs(np.fft.rfft(padded[frame * 80 : frame * 80 + 256] * taper)) ** 2
        expected = np.log(np.maximum(power @ mel_filters(129, 20, RATE).numpy().astype(np.float64), 1e-6))
        assert np.abs(found[0, frame].numpy() - expected).max() < 1e-3


def test_a_tone_is_loudest_in_its_own_band():
    t = torch.arange(RATE) / RATE
    form = LogMel(RATE, mels=40, normalize=False)
    for hertz in (300, 1000, 3000):
        found, _ = form(torch.sin(2 * torch.pi * hertz * t).unsqueeze(0), torch.tensor([RATE]))
        band = int(found[0, 50].argmax())
        assert int(mel_filters(129, 40, RATE)[round(hertz / RATE * 256)].argmax()) == band


def test_padding_changes_nothing():
    form, wave = LogMel(RATE), noise(0, 1, 3000)
    alone, _ = form(wave, torch.tensor([3000]))
    beside, lengths = form(
        torch.cat([torch.nn.functional.pad(wave, (0, 2000)), noise(1, 1, 5000)]), torch.tensor([3000, 5000])
    )
    assert torch.allclose(beside[0, : lengths[0]], alone[0], atol=1e-5)
    assert not beside[0, lengths[0] :].any()


def test_normalised_spectrograms_do_not_know_how_loud_the_recording_is():
    form, wave = LogMel(RATE), 0.1 * noise(0, 1, 4000)
    length = torch.tensor([4000])
    a, b = form(wave, length)[0], form(4 * wave, length)[0]
    assert torch.allclose(a, b, atol=1e-3)
    assert torch.allclose(a[0].mean(0), torch.zeros(40), atol=1e-4)
    assert abs(float(a.square().mean()) - 1) < 1e-3


def test_normalised_waves_have_mean_zero_and_variance_one_over_their_own_samples():
    waves = torch.zeros(2, 50)
    waves[0], waves[1, :20] = 3 + noise(0, 50), 7 + 5 * noise(1, 20)
    found = normalize_waves(waves, torch.tensor([50, 20]))
    for row, end in ((0, 50), (1, 20)):
        assert abs(float(found[row, :end].mean())) < 1e-5
        assert abs(float(found[row, :end].var(correction=0)) - 1) < 1e-4
    assert not found[1, 20:].any()


VIEW = AudioView(shift=3, noise=0.2, time_masks=2, time_width=6, band_masks=1, band_width=4)


def test_a_view_is_a_function_of_seed_epoch_and_index_in_any_batch():
    x, lengths = noise(0, 3, 30, 8), torch.tensor([30, 20, 25])
    x *= (torch.arange(30) < lengths[:, None]).unsqueeze(2)
    whole = draw_audio(VIEW, x, lengths, seed=1, epoch=2, index=[7, 3, 5])
    again = draw_audio(VIEW, x[[1]], lengths[[1]], seed=1, epoch=2, index=[3])
    assert torch.equal(whole[1], again[0])
    shorter = draw_audio(VIEW, x[[1], :20], lengths[[1]], seed=1, epoch=2, index=[3])
    assert torch.equal(whole[1, :20], shorter[0])
    for other in (
        {"seed": 2, "epoch": 2, "index": [3]},
        {"seed": 1, "epoch": 3, "index": [3]},
        {"seed": 1, "epoch": 2, "index": [4]},
    ):
        assert not torch.equal(draw_audio(VIEW, x[[1]], lengths[[1]], **other), again)
    assert not whole[1, 20:].any()


def test_every_sample_has_parameters_of_its_own():
    x = torch.arange(1.0, 21).view(1, 20, 1).expand(200, 20, 4)
    moved = draw_audio(AudioView(shift=2), x, torch.full((200,), 20), seed=0, epoch=0, index=np.arange(200))
    by = 10 - moved[:, 10, 0].long() + 1
    counts = torch.bincount(by + 2, minlength=5)
    assert by.min() == -2
    assert by.max() == 2
    assert counts.min() > 20
    assert not moved[by == 2][:, :2].any()  # silence comes in


def test_noise_is_normal_and_masks_are_as_wide_as_they_may_be():
    x, lengths = torch.zeros(50, 40, 10), torch.full((50,), 40)
    found = draw_audio(AudioView(noise=0.5), x, lengths, seed=0, epoch=0, index=np.arange(50))
    assert abs(float(found.std()) - 0.5) < 0.01
    assert abs(float(found.mean())) < 0.01
    masked = (
        draw_audio(AudioView(time_masks=1, time_width=5), x + 1, lengths, seed=0, epoch=0, index=np.arange(50)) == 0
    )
    width = masked[:, :, 0].sum(1)
    assert width.max() == 5
    assert width.min() == 0
    bands = draw_audio(AudioView(band_masks=1, band_width=3), x + 1, lengths, seed=0, epoch=0, index=np.arange(50)) == 0
    assert bands[:, 0].sum(1).max() == 3
    assert torch.equal(bands[:, :1].expand_as(bands), bands)
    short = draw_audio(
        AudioView(time_masks=1, time_width=9),
        x[:, :10] + 1,
        torch.full((50,), 10),
        seed=0,
        epoch=0,
        index=np.arange(50),
    )
    assert (short[:, :, 0] == 0).sum(1).max() == 2  # a fifth at most


def some_sounds(tmp_path, lengths=(900, 50, 2000)):
    rng = np.random.default_rng(0)
    wave = rng.integers(-9000, 9000, sum(lengths)).astype(np.int16)
    start = np.cumsum([0, *lengths[:-1]])
    n = len(lengths)
    table = {"id": list(map(str, range(n))), "source": [""] * n, "row": range(n), "label": [0] * n, "text": [""] * n}
    table |= {"split": ["train"] * n, "group": [""] * n, "start": start, "samples": lengths}
    import pyarrow as pa

    return Sounds(pa.table(table, schema=SOUND_SCHEMA), ("a",), RATE, wave, SKIPPED_SCHEMA.empty_table())


def test_spectrograms_of_all_are_made_once_and_are_those_of_each(tmp_path):
    sounds, form, file = some_sounds(tmp_path), LogMel(RATE), tmp_path / "frames.npy"
    found = spectrograms(sounds, form, file, block=2)
    for row in range(3):
        waves, lengths = sounds.waves([row])
        expected, frames = form(torch.from_numpy(waves), torch.from_numpy(lengths))
        taken, length = found.take([row])
        assert length.tolist() == frames.tolist()
        assert np.abs(taken[0] - expected[0].numpy()).max() < 1e-5
    before = file.stat().st_mtime_ns
    assert np.array_equal(spectrograms(sounds, form, file).flat, spectrograms(sounds, form, block=2).flat)
    assert file.stat().st_mtime_ns == before


def test_what_does_not_fit_is_named(tmp_path):
    sounds = some_sounds(tmp_path)
    np.save(tmp_path / "frames.npy", np.zeros((3, 40), np.float32), allow_pickle=False)
    with pytest.raises(DataError, match=r"frames\.npy: holds"):
        spectrograms(sounds, LogMel(RATE), tmp_path / "frames.npy")
    with pytest.raises(UsageError, match="samples a second"):
        spectrograms(sounds, LogMel(16000))
    with pytest.raises(UsageError, match="at least 0"):
        AudioView(shift=-1)
    with pytest.raises(UsageError, match="hop"):
        LogMel(RATE, hop=0.1)
    with pytest.raises(UsageError, match="bands lie between"):
        mel_filters(10, 4, 8000, 100.0, 9000.0)
