"""Recordings in every form give the same table and samples; what is hostile, broken or too large is refused, named and listed."""

import io
import json
import tarfile
import wave

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from contralto.data.sounds import Ragged, SoundDataset, SoundError, decode_sound, load_sounds, probe_sound, read_sounds
from contralto.errors import DataError, UsageError

sf = pytest.importorskip("soundfile")
RATE = 8000


def tone(pitch, seconds=0.1, rate=RATE):
    """A tone that fills half of the range, in whole numbers of 16 bit."""
    t = np.arange(int(seconds * rate)) / rate
    return np.round(16000 * np.sin(2 * np.pi * pitch * t)).astype(np.int16)


def encoded(samples, rate=RATE, kind="WAV", subtype="PCM_16"):
    buffer = io.BytesIO()
    sf.write(buffer, samples, rate, subtype=subtype, format=kind)
    return buffer.getvalue()


ROWS = [
    {"class": name, "key": f"{name}{i}", "text": f"{name}  nr\n{i}", "samples": tone(pitch * (i + 1), 0.05 * (i + 1))}
    for name, pitch in (("low", 100), ("high", 900))
    for i in range(2)
]


def as_folder(root):
    for number, r in enumerate(ROWS):
        (root / r["class"]).mkdir(parents=True, exist_ok=True)
        kind = "flac" if number % 2 else "wav"
        (root / r["class"] / f"{r['key']}.{kind}").write_bytes(encoded(r["samples"], kind=kind.upper()))
        (root / r["class"] / f"{r['key']}.txt").write_text(r["text"])
    return root


def as_tar(root):
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as archive:
        for r in ROWS:
            for suffix, data in (
                ("wav", encoded(r["samples"])),
                ("txt", r["text"].encode()),
                ("cls", r["class"].encode()),
            ):
                info = tarfile.TarInfo(f"{r['key']}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return root


def as_parquet(root):
    root.mkdir()
    columns = {"class": [r["class"] for r in ROWS], "text": [r["text"] for r in ROWS], "id": [r["key"] for r in ROWS]}
    pq.write_table(pa.table({"audio": [encoded(r["samples"]) for r in ROWS]} | columns), root / "a.parquet")
    return root


def as_table(root):
    as_folder(root)
    files = {p.stem: str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in (".wav", ".flac")}
    lines = [
        json.dumps({"path": files[r["key"]], "class": r["class"], "text": r["text"], "id": r["key"]}) for r in ROWS
    ]
    (root / "a.jsonl").write_text("\n".join(lines))
    return root / "a.jsonl"


@pytest.mark.parametrize("form", [as_folder, as_tar, as_parquet, as_table])
def test_every_form_gives_the_same_recordings(form, tmp_path):
    sounds = read_sounds(str(form(tmp_path / "data")), tmp_path / "out", rate=RATE)
    assert sounds.classes == ("high", "low")
    found = {}
    for row in range(len(sounds)):
        waves, lengths = sounds.waves([row])
        name = sounds.classes[sounds.column("label")[row]], sounds.column("text")[row]
        found[name] = np.round(waves[0, : lengths[0]] * 32768).astype(np.int16)
    for r in ROWS:
        assert np.array_equal(found[r["class"], " ".join(r["text"].split())], r["samples"])
    assert sounds.skipped.num_rows == 0
    again = load_sounds(tmp_path / "out")
    assert again.table.equals(sounds.table)
    assert again.fingerprint() == sounds.fingerprint()


def test_classes_that_are_numbers_stand_by_their_value_and_name_what_has_no_text(tmp_path):
    table = {"audio": [encoded(tone(200))] * 3, "label": [10, 9, 2], "text": ["ten", None, ""], "split": ["test"] * 3}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    sounds = read_sounds(str(tmp_path / "a.parquet"), tmp_path / "out", rate=RATE)
    assert sounds.classes == ("2", "9", "10")
    assert sounds.column("text").tolist() == ["ten", "9", "2"]
    assert sounds.column("split").tolist() == ["test"] * 3


def test_channels_are_mixed_and_rates_converted():
    samples = tone(440, 0.5, 44100).astype(np.float32) / 32768
    stereo = encoded(np.stack([samples, 0 * samples], 1), 44100, subtype="FLOAT")
    found = decode_sound(stereo, rate=RATE)
    expected = tone(440, 0.5).astype(np.float32) / 65536
    assert len(found) == len(expected)
    inner = slice(200, -200)  # the filter's ends
    assert np.abs(found[inner] - expected[inner]).max() < 2e-3


def test_what_is_longer_is_cut_and_not_decoded(monkeypatch):
    asked = []
    read = sf.SoundFile.read
    monkeypatch.setattr(sf.SoundFile, "read", lambda self, frames, **o: asked.append(frames) or read(self, frames, **o))
    assert len(decode_sound(encoded(tone(100, 2.0)), rate=RATE, seconds=0.25)) == 2000
    assert asked == [2000]


def header(rate=RATE, channels=1, frames=10):
    """A WAV file whose header says what it likes."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2 * channels * frames))
    return buffer.getvalue()


BROKEN = {
    "empty file": b"",
    "not a sound": b"<html>not a sound</html>",
    "broken sound": b"RIFF\x00\x00\x00\x00WAVEjunkjunkjunk",
    "too many channels": header(channels=9),
    "odd sampling rate": header(rate=900_000),
    "empty sound": header(frames=0),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_hostile_bytes_are_refused_before_anything_is_decoded(reason, monkeypatch):
    monkeypatch.setattr(sf.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(SoundError, match=reason):
        decode_sound(BROKEN[reason], rate=RATE)


def test_bounds_of_bytes_and_seconds():
    data = encoded(tone(100, 2.0))
    with pytest.raises(SoundError, match="too many bytes"):
        probe_sound(data, max_bytes=100)
    with pytest.raises(SoundError, match="too long"):
        probe_sound(data, max_seconds=1.0)


def test_samples_that_are_no_numbers_are_refused():
    with pytest.raises(SoundError, match="no numbers"):
        decode_sound(encoded(np.array([0.0, np.nan], np.float32), subtype="FLOAT"), rate=RATE)


def test_a_recording_that_is_cut_off_is_used_or_refused_but_never_fatal():
    """A FLAC file that loses its end, at any byte."""
    whole = encoded(tone(300, 0.3), kind="FLAC")
    for end in range(4, len(whole), 97):
        try:
            found = decode_sound(whole[:end], rate=RATE)
        except SoundError:
            continue
        assert np.isfinite(found).all()


def test_what_cannot_be_used_is_listed_with_file_and_row(tmp_path):
    audio = [encoded(tone(100)), *BROKEN.values(), None]
    pq.write_table(pa.table({"audio": audio, "label": ["a"] * len(audio)}), tmp_path / "a.parquet")
    sounds = read_sounds(str(tmp_path), tmp_path / "out", rate=RATE)
    assert len(sounds) == 1
    told = sounds.skipped.to_pylist()
    assert [s["row"] for s in told] == list(range(1, len(audio)))
    assert {s["source"] for s in told} == {"a.parquet"}
    assert [s["reason"] for s in told] == [*BROKEN, "no sound in this row"]


def test_nothing_usable_is_an_error_that_counts(tmp_path):
    pq.write_table(pa.table({"audio": [b"x", b"y"], "label": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="not one usable recording: 2 not a sound"):
        read_sounds(str(tmp_path / "a.parquet"), tmp_path / "out")
    pq.write_table(pa.table({"noise": [b"x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"no column with sounds.*--sound_column"):
        read_sounds(str(tmp_path / "b.parquet"), tmp_path / "out")
    with pytest.raises(UsageError, match="rate"):
        read_sounds(str(tmp_path), tmp_path / "out", rate=3)


def test_a_path_that_leaves_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.wav").write_bytes(encoded(tone(100)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "in.wav").write_bytes(encoded(tone(100)))
    (tmp_path / "data" / "a.csv").write_text("path,label\n../secret.wav,a\nin.wav,b\n")
    sounds = read_sounds(str(tmp_path / "data" / "a.csv"), tmp_path / "out", rate=RATE)
    assert sounds.classes == ("b",)
    assert sounds.skipped.column("reason").to_pylist() == ["leads outside the data folder"]


def test_hostile_names_and_texts_are_cleaned_and_bounded(tmp_path):
    text = "a\u202eb\x07 " + "x" * 100_000
    pq.write_table(
        pa.table({"audio": [encoded(tone(100))], "label": ["a\u202e"], "text": [text]}), tmp_path / "a.parquet"
    )
    sounds = read_sounds(str(tmp_path / "a.parquet"), tmp_path / "out", rate=RATE)
    assert sounds.classes == ("a",)
    assert sounds.column("text")[0].startswith("ab xx")
    assert len(sounds.column("text")[0]) < 10_001


def test_damage_of_what_was_read_names_the_file(tmp_path):
    read_sounds(str(as_folder(tmp_path / "data")), tmp_path / "out", rate=RATE)
    np.save(tmp_path / "out" / "waves.npy", np.zeros(3, np.int16), allow_pickle=False)
    with pytest.raises(DataError, match=r"waves\.npy: is damaged"):
        load_sounds(tmp_path / "out")


def test_a_killed_reading_leaves_nothing_under_the_name_and_begins_anew(tmp_path, monkeypatch):
    data = str(as_folder(tmp_path / "data"))
    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            read_sounds(data, tmp_path / "out", rate=RATE)
    assert not (tmp_path / "out").exists()
    assert len(read_sounds(data, tmp_path / "out", rate=RATE)) == len(ROWS)


def test_batches_are_padded_with_zeros_and_know_who_is_replayed():
    ragged = Ragged(np.arange(1, 7, dtype=np.float32), np.array([0, 1, 3]), np.array([1, 2, 3]))
    text = torch.tensor([[4, 2, 0, 0], [4, 5, 2, 0], [4, 2, 0, 0]])
    dataset = SoundDataset(ragged.take, {"label": torch.tensor([0, 1, 0]), "text": text}, memory=[2])
    batch = dataset.__getitems__([(3, 0), (3, 2)])
    assert batch["sounds"].tolist() == [[1, 0, 0], [4, 5, 6]]
    assert batch["lengths"].tolist() == [1, 3]
    assert batch["replayed"].tolist() == [False, True]
    assert batch["text"].tolist() == [[4, 2], [4, 2]]
    assert batch["epoch"].tolist() == [3, 3]
    assert batch["label"].tolist() == [0, 0]
