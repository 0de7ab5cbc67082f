"""Sounds: encoded bytes within bounds, and all recordings of a data set in one file of samples.

Recordings come in the forms of `contralto.data.sources`: folders of WAV, FLAC or Ogg files, tars, tables that name files, Parquet
with bytes. Each is checked by its header before anything is decoded, mixed to one channel, brought to one sampling rate and
appended to `waves.npy` (16 bit), which is mapped into memory afterwards. What cannot be used is left out and listed.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from io import BufferedWriter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from contralto.data.dataset import Batch, Key
from contralto.data.ingest import ROLES, clean_name, find_columns, label_name, unique_names
from contralto.data.manifest import SKIPPED_SCHEMA
from contralto.data.sources import Record, read_records
from contralto.data.texts import PAD
from contralto.errors import DataError, MissingExtraError, UsageError
from contralto.files import naming, write_json

__all__ = [
    "Ragged",
    "SoundDataset",
    "SoundError",
    "SoundInfo",
    "Sounds",
    "decode_sound",
    "load_sounds",
    "probe_sound",
    "read_sounds",
]

MAGIC = {b"RIFF": "WAV", b"fLaC": "FLAC", b"OggS": "OGG"}
MAX_BYTES = 64 * 2**20
MAX_SECONDS = 3600.0
MAX_CHANNELS = 8
RATES = (1000, 384_000)
MAX_TEXT = 10_000
SOUND_SCHEMA = pa.schema(
    [
        ("id", pa.string()), ("source", pa.string()), ("row", pa.int64()), ("label", pa.int32()), ("text", pa.string()),
        ("split", pa.string()), ("group", pa.string()), ("start", pa.int64()), ("samples", pa.int64()),
    ]
)  # fmt: skip


class SoundError(DataError):
    """A recording that cannot be used; `reason` is a short code that counts can be made of."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + (f" ({detail})" if detail else ""))
        self.reason, self.detail = reason, detail


class SoundInfo(NamedTuple):
    """What the header says: samples per second, channels, samples of a channel, and the format found in the bytes."""

    rate: int
    channels: int
    frames: int
    format: str


def probe_sound(data: bytes, *, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS) -> SoundInfo:
    """Read the header only.

    Parameters
    ----------
    data : bytes
    max_bytes : int
    max_seconds : float
        Bounds; beyond them the recording is refused.

    Raises
    ------
    SoundError
        If the bytes are no WAV, FLAC or Ogg file within the bounds.

    Examples
    --------
    >>> import io, wave
    >>> buffer = io.BytesIO()
    >>> with wave.open(buffer, "wb") as file:
    ...     file.setparams((1, 2, 8000, 0, "NONE", ""))
    ...     file.writeframes(bytes(200))
    >>> probe_sound(buffer.getvalue())
    SoundInfo(rate=8000, channels=1, frames=100, format='WAV')
    """
    with _open(data, max_bytes, max_seconds) as sound:
        return SoundInfo(sound.samplerate, sound.channels, sound.frames, MAGIC[data[:4]])


def decode_sound(
    data: bytes, *, rate: int, seconds: float = 30.0, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS
) -> npt.NDArray[np.float32]:
    """The beginning of a recording in one channel at a given rate, (T,) in [-1, 1].

    Parameters
    ----------
    data : bytes
    rate : int
        Samples per second of what comes out; another rate is resampled by a polyphase filter.
    seconds : float
        What comes later is not decoded.
    max_bytes, max_seconds
        See `probe_sound`.

    Raises
    ------
    SoundError
        If the bytes are no recording that can be used.
    """
    with _open(data, max_bytes, max_seconds) as sound:
        wanted = min(sound.frames, int(np.ceil(seconds * sound.samplerate)))
        try:
            samples = sound.read(wanted, dtype="float32", always_2d=True)
        except (RuntimeError, ValueError) as error:
            raise SoundError("broken sound", str(error)[:120]) from error
        given = sound.samplerate
    mono = np.asarray(samples, np.float32).mean(1)
    if not np.isfinite(mono).all():
        raise SoundError("broken sound", "samples that are no numbers")
    if given != rate:
        from scipy.signal import resample_poly

        ratio = Fraction(rate, given).limit_denominator(
            1000
        )  # two rates that share no factor need no filter of their length
        mono = resample_poly(mono, ratio.numerator, ratio.denominator)
    if not len(mono):
        raise SoundError("empty sound")
    return np.asarray(np.clip(mono, -1.0, 1.0), np.float32)


class Ragged(NamedTuple):
    """Rows of different lengths in one array.

    Attributes
    ----------
    flat : array (sum of lengths, ...)
        All rows, one after the other; may be mapped from a file.
    start, length : array (N,) int64
        Where each lies.
    """

    flat: npt.NDArray[Any]
    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]

    def take(self, rows: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Some rows (B, T, ...), zeros behind their ends, and their lengths (B,).

        Examples
        --------
        >>> Ragged(np.array([1, 2, 3]), np.array([0, 1]), np.array([1, 2])).take([1, 0])
        (array([[2, 3],
               [1, 0]]), array([2, 1]))
        """
        rows = np.asarray(rows, np.int64)
        start, length = self.start[rows], self.length[rows]
        place = np.arange(int(length.max(initial=0)))
        there = place < length[:, None]
        taken = self.flat[np.where(there, start[:, None] + place, 0)]
        taken[~there] = 0
        return taken, length


@dataclass(frozen=True)
class Sounds:
    """Recordings of one sampling rate.

    Parameters
    ----------
    table : pyarrow.Table
        One row per recording: `id`, `source` and `row` (where it was found), `label` (index into `classes`, -1 = none), `text`
        (what is said, or what came along), `split`, `group` (the speaker, where that is known; "" = alone), `start` and `samples`
        (where it lies in `wave`).
    classes : tuple of str
    rate : int
        Samples per second.
    wave : array of int16
        All recordings, one after the other.
    skipped : pyarrow.Table
        What was found and left out: id, source, row, reason, detail.
    """

    table: pa.Table
    classes: tuple[str, ...]
    rate: int
    wave: npt.NDArray[np.int16]
    skipped: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> npt.NDArray[Any]:
        """One column as a NumPy array (N,)."""
        return np.asarray(self.table.column(name).to_numpy(zero_copy_only=False))

    @property
    def seconds(self) -> npt.NDArray[np.float64]:
        """Length of every recording (N,)."""
        return self.column("samples") / self.rate

    @cached_property
    def ragged(self) -> Ragged:
        """The recordings as rows of samples."""
        return Ragged(self.wave, self.column("start"), self.column("samples"))

    def waves(self, rows: npt.ArrayLike) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Some recordings (B, T) in [-1, 1], zeros behind their ends, and how many samples each has (B,)."""
        taken, length = self.ragged.take(rows)
        return np.asarray(taken / np.float32(32768), np.float32), length

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when recordings, texts, labels or classes change."""
        digest = hashlib.sha256(json.dumps([self.classes, self.rate]).encode())
        for name in ("id", "label", "text", "split", "samples"):
            digest.update(json.dumps(self.table.column(name).to_pylist()).encode())
        digest.update(np.ascontiguousarray(self.wave).data)
        return digest.hexdigest()[:16]


class SoundDataset(Dataset[Batch]):
    """Recordings a whole batch at a time, padded to the longest of it.

    Parameters
    ----------
    read : function
        Rows (B,) to sounds (B, T, ...) and their lengths (B,), such as `Sounds.waves` or `Ragged.take`.
    fields : mapping of str to Tensor (N, ...)
        What comes along with each row. Of `text`, rows of word numbers, what all of a batch have as padding is left out.
    memory : sequence of int
        Rows that are kept from earlier tasks: `replayed` says which of a batch are of these.

    Notes
    -----
    Keys are the (epoch, row) pairs of the samplers; use with ``collate_fn=as_it_is``.
    """

    def __init__(
        self,
        read: Callable[[npt.NDArray[np.int64]], tuple[npt.NDArray[Any], npt.NDArray[np.int64]]],
        fields: Mapping[str, Tensor],
        memory: npt.ArrayLike = (),
    ) -> None:
        self.read, self.fields = read, dict(fields)
        self.memory = torch.from_numpy(np.asarray(memory, np.int64))

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitems__(self, keys: list[Key]) -> Batch:
        epochs, rows = np.array(keys, np.int64).reshape(-1, 2).T
        sounds, lengths = self.read(rows)
        index = torch.from_numpy(rows.copy())
        fields = {k: v[index] for k, v in self.fields.items()}
        if "text" in fields:
            fields["text"] = fields["text"][:, : int((fields["text"] != PAD).sum(1).max())]
        return {
            "sounds": torch.from_numpy(np.asarray(sounds, np.float32)),
            "lengths": torch.from_numpy(lengths),
            "index": index,
            "epoch": torch.from_numpy(epochs.copy()),
            "replayed": torch.isin(index, self.memory),
            **fields,
        }

    def __getitem__(self, key: Key) -> Batch:
        return {k: v[0] for k, v in self.__getitems__([key]).items()}


def read_sounds(
    address: str,
    folder: str | Path,
    *,
    rate: int = 16_000,
    seconds: float = 7.0,
    sound_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
    allow_outside: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Sounds:
    """Read recordings in any of the known forms into a folder, and open it.

    Parameters
    ----------
    address : str
        Path or fsspec address; the forms are listed in `contralto.data.sources`.
    folder : path
        Where `waves.npy`, `sounds.parquet`, `skipped.parquet` and `sounds.json` are written; it appears when all are whole.
    rate : int
        Samples per second that are kept.
    seconds : float
        Recordings are cut to this length.
    sound_column, label_column, text_column, id_column, split_column, group_column : str, optional
        Columns or JSON keys; found by common names (`contralto.data.ingest.ROLES`) when not named.
    allow_outside : bool
        Let tables name files outside their folder.
    progress : function, optional
        Called with the number of recordings seen so far.

    Returns
    -------
    Sounds
        A recording without a text has the name of its class as its text.

    Raises
    ------
    DataError
        If nothing usable is found, or a named column is not there.
    """
    if not RATES[0] <= rate <= RATES[1]:
        raise UsageError(f"rate is samples per second, from {RATES[0]} to {RATES[1]}; got {rate}")
    if not 0 < seconds <= MAX_SECONDS:
        raise UsageError(f"seconds must be above 0 and at most {MAX_SECONDS:g}, got {seconds}")
    named = {
        "label": label_column, "text": text_column, "id": id_column, "split": split_column, "group": group_column,
    }  # fmt: skip
    kept = {c for c in named.values() if c}.union(*ROLES.values())  # what is held until the table is made
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    found: list[tuple[Record, int, int]] = []
    skipped: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    end = 0
    with (part / "waves.raw").open("wb") as file:
        records = read_records(address, image_column=sound_column, allow_outside=allow_outside, kind="sound")
        for seen, record in enumerate(records, 1):
            names |= dict.fromkeys(record.fields)
            samples = _kept(record, rate, seconds, skipped)
            if samples is not None:
                file.write(samples.tobytes())
                found.append((record, end, len(samples)))
                end += len(samples)
            record.data = b""
            record.fields = {
                k: v[:MAX_TEXT] if isinstance(v, str) else v for k, v in record.fields.items() if k in kept
            }
            if progress is not None:
                progress(seen)
        _sync(file)
    if not found:
        reasons = Counter(s["reason"] for s in skipped).most_common(5)
        told = ", ".join(f"{n} {r}" for r, n in reasons) or "no recordings were found"
        raise DataError(f"not one usable recording: {told}", file=str(address))
    table, classes = _rows(found, find_columns(names, named, several=()))
    np.save(part / "waves.npy", np.memmap(part / "waves.raw", np.int16, "r"), allow_pickle=False)
    (part / "waves.raw").unlink()
    pq.write_table(table, part / "sounds.parquet")
    pq.write_table(pa.Table.from_pylist(skipped, SKIPPED_SCHEMA), part / "skipped.parquet")
    write_json(part / "sounds.json", {"rate": rate, "classes": classes})
    part.rename(folder)
    return load_sounds(folder)


def load_sounds(folder: str | Path) -> Sounds:
    """Open what `read_sounds` wrote; the samples stay on the disk.

    Raises
    ------
    DataError
        If a file is missing or damaged.
    """
    folder = Path(folder)
    with naming(folder / "sounds.json"):
        about = json.loads((folder / "sounds.json").read_text(encoding="utf-8"))
        rate, classes = int(about["rate"]), tuple(map(str, about["classes"]))
    with naming(folder / "sounds.parquet"):
        table = pq.read_table(folder / "sounds.parquet").cast(SOUND_SCHEMA)
    with naming(folder / "skipped.parquet"):
        skipped = pq.read_table(folder / "skipped.parquet").cast(SKIPPED_SCHEMA)
    with naming(folder / "waves.npy"):
        wave = np.load(folder / "waves.npy", mmap_mode="r", allow_pickle=False)
        samples = table.column("samples").to_numpy()
        if wave.dtype != np.int16 or wave.ndim != 1 or len(wave) != samples.sum():
            raise ValueError("the samples do not fit the table")
    return Sounds(table, classes, rate, wave, skipped)


def _open(data: bytes, max_bytes: int, max_seconds: float) -> Any:
    """A file of soundfile whose header is within the bounds; nothing is decoded yet."""
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError("reading sounds", extra="sound") from error

    if not data:
        raise SoundError("empty file")
    if len(data) > max_bytes:
        raise SoundError("too many bytes", f"{len(data)} > {max_bytes}")
    if data[:4] not in MAGIC:
        raise SoundError("not a sound", "expected WAV, FLAC or Ogg")
    try:
        sound = soundfile.SoundFile(io.BytesIO(data))
    except (RuntimeError, ValueError, TypeError) as error:
        raise SoundError("broken sound", str(error).split(":")[-1].strip()[:120]) from error
    problem = _problem(sound.samplerate, sound.channels, sound.frames, max_seconds)
    if problem:
        sound.close()
        raise SoundError(*problem)
    return sound


def _problem(rate: int, channels: int, frames: int, max_seconds: float) -> tuple[str, str] | None:
    """Why a recording with such a header is refused."""
    if not RATES[0] <= rate <= RATES[1]:
        return "odd sampling rate", f"{rate} a second"
    if not 1 <= channels <= MAX_CHANNELS:
        return "too many channels", f"{channels} > {MAX_CHANNELS}"
    if frames < 1:
        return "empty sound", ""
    if frames > max_seconds * rate:
        return "too long", f"{frames / rate:.0f} s > {max_seconds:g} s"
    return None


def _kept(record: Record, rate: int, seconds: float, skipped: list[dict[str, Any]]) -> npt.NDArray[np.int16] | None:
    """The samples of a recording, or None and an entry in the list of what was left out."""
    reason, detail = record.problem, ""
    if not reason:
        try:
            samples = decode_sound(record.data, rate=rate, seconds=seconds)
            return np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2")
        except SoundError as error:
            reason, detail = error.reason, error.detail
    place = {"id": clean_name(record.id), "source": clean_name(record.source), "row": record.row}
    skipped.append(place | {"reason": reason, "detail": detail})
    return None


def _rows(found: Sequence[tuple[Record, int, int]], roles: dict[str, list[str]]) -> tuple[pa.Table, list[str]]:
    """The table of the recordings, and the names of the classes, sorted; numbers by their value."""
    fields = [{role: record.fields.get(c) for role, cs in roles.items() for c in cs[:1]} for record, _, _ in found]
    given = [label_name(f.get("label"), r.source, r.row) for f, (r, _, _) in zip(fields, found, strict=True)]
    names = sorted(
        {g for g in given if g is not None}, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n)
    )
    number = {name: i for i, name in enumerate(names)}
    told = {
        "id": unique_names([clean_name(f.get("id") or r.id) for f, (r, _, _) in zip(fields, found, strict=True)]),
        "source": [clean_name(r.source) for r, _, _ in found],
        "row": [r.row for r, _, _ in found],
        "label": [-1 if g is None else number[g] for g in given],
        "text": [_text(f.get("text"), g) for f, g in zip(fields, given, strict=True)],
        "split": [clean_name(f.get("split") or "train") for f in fields],
        "group": [clean_name(f.get("group") or "") for f in fields],
        "start": [start for _, start, _ in found],
        "samples": [length for _, _, length in found],
    }
    return pa.table(told, schema=SOUND_SCHEMA), names


def _text(text: Any, label: str | None) -> str:
    """A text as one line, bounded; the name of the class where there is none."""
    words = " ".join(clean_name("" if text is None else text, MAX_TEXT).split())
    return words or (label or "")


def _sync(file: BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
