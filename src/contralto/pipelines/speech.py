"""A stream of tasks from recordings: learn to write what is said, class after class of utterances.

    contralto fit coconut RECORDINGS --tasks 5 --out RUN

The run folder is that of `pipelines.continual`, with `sounds/` (all recordings at one rate), `spectrograms.npy` and, in place of
a classifier, `model/`: what writes, for `load_speech`.
"""

import hashlib
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from lightning import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from contralto.data.canvas import as_it_is
from contralto.data.sounds import Ragged, SoundDataset, Sounds, decode_sound, load_sounds, read_sounds
from contralto.data.sources import Kind
from contralto.data.texts import PAD, Characters, Vocabulary
from contralto.encoders.audio import AudioEncoder, ConvGRUEncoder, Wav2Vec2Encoder
from contralto.encoders.features import device_of
from contralto.errors import DataError
from contralto.files import load_weights, naming, save_weights, write_atomically, write_json
from contralto.pipelines.continual import Answers, Continual, Stream
from contralto.pipelines.outputs import peak_memory_gib
from contralto.systems.base import EncoderSystem
from contralto.systems.classifier import UNKNOWN, Predictions
from contralto.systems.continual.base import ContinualSystem
from contralto.systems.continual.coconut import COCONUT
from contralto.systems.registry import SYSTEMS, get_system
from contralto.views.audio import LogMel, spectrograms

__all__ = ["SpeechJob", "SpeechModel", "load_speech"]

Target = Literal["text", "label", "label_text"]
Sound = bytes | str | Path | npt.NDArray[np.float32]
SEPARATOR = " | "
BATCH = 64
SMALL = "conv-gru"
VOCABULARIES: dict[str, type[Vocabulary]] = {"characters": Characters, "words": Vocabulary}
NOT_OF_THE_DATA = ("checkpoint_every",)


def targets(texts: Sequence[str], names: Sequence[str], target: Target) -> list[str]:
    """What is to be written of every recording.

    Parameters
    ----------
    texts, names : sequence of str (N,)
        What is said, and the name of its class.
    target : {"text", "label", "label_text"}

    Examples
    --------
    >>> targets(["turn it up"], ["volume"], "label_text")
    ['volume | turn it up']
    """
    if target == "label_text":
        wrong = sorted({name for name in names if SEPARATOR.strip() in name})
        if wrong:
            raise DataError(f"the class {wrong[0]!r} holds {SEPARATOR.strip()!r}, which stands between class and text")
        return [f"{name}{SEPARATOR}{text}" for text, name in zip(texts, names, strict=True)]
    return list(texts if target == "text" else names)


def intents(written: Sequence[str], vocabulary: type[Vocabulary]) -> list[str]:
    """What stands before the first separator, or all, as the vocabulary writes it: what a recording is judged by.

    Examples
    --------
    >>> intents(["volume | turn it up", "Stop!", "a|b"], Vocabulary)
    ['volume', 'stop !', 'a']
    """
    plain = [vocabulary.between.join(vocabulary.split(text)).partition(SEPARATOR.strip())[0] for text in written]
    return [" ".join(text.split()) for text in plain]


class SpeechModel:
    """What a run learnt: recordings to texts.

    Parameters
    ----------
    system : COCONUT
    vocabulary : Vocabulary
    rate : int
        Samples per second of what it takes.
    seconds : float
        What comes later in a recording is not heard.
    form : LogMel, optional
        Of spectrograms; None for an encoder of waves.
    target : {"text", "label", "label_text"}
        What it learnt to write.
    """

    def __init__(
        self,
        system: COCONUT,
        vocabulary: Vocabulary,
        *,
        rate: int,
        seconds: float,
        form: LogMel | None,
        target: Target = "text",
    ) -> None:
        self.system, self.vocabulary = system.eval(), vocabulary
        self.rate, self.seconds, self.form, self.target = rate, seconds, form, target

    kind: ClassVar[Kind] = "sound"

    def decode(self, data: bytes) -> npt.NDArray[np.float32]:
        """The samples (T,) of an encoded recording, as the model takes them.

        Raises
        ------
        SoundError
            If it cannot be used.
        """
        return decode_sound(data, rate=self.rate, seconds=self.seconds)

    def write(self, sounds: Sequence[Sound], *, beam: int | None = None) -> list[str]:
        """What is said in some recordings.

        Parameters
        ----------
        sounds : sequence of bytes, path or array (N,)
            WAV, FLAC or Ogg, encoded; or samples as of `decode`.
        beam : int, optional
            Width of the search; default: that of the system, 1 is greedy.

        Raises
        ------
        SoundError
            If a recording cannot be used.
        """
        return [text for x, n in self._batches(sounds) for text in self.written(x, n, beam=beam)]

    @torch.inference_mode()
    def predict(self, sounds: Sequence[Sound], *, threshold: float = 0.0) -> Predictions:
        """What is said, with `probabilities` (N, 1): the geometric mean of those of the words or characters that were written.

        Parameters
        ----------
        sounds
            See `write`.
        threshold : float
            Below this probability: "unknown".
        """
        texts: list[str] = []
        sure: list[Tensor] = []
        for x, n in self._batches(sounds):
            x, n = x.to(self.system.device), n.to(self.system.device)
            numbers = self.system.write(x, n)
            logs = self.system.decoder(*self.system.encoder(x, n), numbers).log_softmax(2)
            said = logs.gather(2, numbers.unsqueeze(2)).squeeze(2)
            there = numbers != PAD
            sure.append(((said * there).sum(1) / there.sum(1).clamp_min(1)).exp().cpu())
            texts += self.vocabulary.decode(numbers.cpu().numpy())
        probabilities = torch.cat(sure).numpy() if sure else np.zeros(0, np.float32)
        told = [t if p >= threshold else UNKNOWN for t, p in zip(texts, probabilities, strict=True)]
        return Predictions(told, probabilities[:, None])

    def answers(self, sounds: Sequence[Sound], *, threshold: float = 0.0) -> dict[str, pa.Array]:
        """What `predict` says, as columns: `text`, the `intent` in it where names of classes are written, and `confidence`."""
        found = self.predict(sounds, threshold=threshold)
        columns = {"text": pa.array(list(found), pa.string())}
        if self.target != "text":
            columns["intent"] = pa.array(intents(found, type(self.vocabulary)), pa.string())
        return columns | {"confidence": pa.array(found.probabilities[:, 0])}

    @torch.inference_mode()
    def embed(self, sounds: Sequence[Sound]) -> npt.NDArray[np.float32]:
        """Features (N, F) of the encoder, their mean over time."""
        device = self.system.device
        parts = [self.system.embed(x.to(device), n.to(device)).float().cpu() for x, n in self._batches(sounds)]
        return torch.cat(parts).numpy() if parts else np.zeros((0, self.system.num_features), np.float32)

    @torch.inference_mode()
    def written(self, x: Tensor, lengths: Tensor, *, beam: int | None = None) -> list[str]:
        """What is said, from a padded batch of what the encoder takes."""
        device = self.system.device
        numbers = self.system.write(x.to(device), lengths.to(device), beam=beam)
        return self.vocabulary.decode(numbers.cpu().numpy())

    def to(self, device: str) -> "SpeechModel":
        """Work on this device."""
        self.system.to(device)
        return self

    def _batches(self, sounds: Sequence[Sound]) -> Iterator[tuple[Tensor, Tensor]]:
        """Padded batches of what the encoder takes."""
        for first in range(0, len(sounds), BATCH):
            waves = [self._samples(sound) for sound in sounds[first : first + BATCH]]
            length = np.array([len(wave) for wave in waves])
            taken, length = Ragged(np.concatenate(waves), length.cumsum() - length, length).take(np.arange(len(waves)))
            x, n = torch.from_numpy(taken), torch.from_numpy(length)
            yield (x, n) if self.form is None else self.form(x, n)

    def _samples(self, sound: Sound) -> npt.NDArray[np.float32]:
        if isinstance(sound, np.ndarray):
            return sound
        return self.decode(sound if isinstance(sound, bytes) else Path(sound).read_bytes())


def load_speech(run: str | Path, *, device: str = "cpu") -> SpeechModel:
    """The model of a finished run.

    Parameters
    ----------
    run : path
        A run folder, or its `model` folder.
    device : str

    Raises
    ------
    DataError
        If a file is missing or damaged.
    """
    folder = Path(run) if (Path(run) / "speech.json").exists() else Path(run) / "model"
    with naming(folder / "speech.json"):
        told = json.loads((folder / "speech.json").read_text(encoding="utf-8"))
        vocabulary = VOCABULARIES[told["vocabulary"]](told["words"])
        kept = folder / "encoder"  # the form of an encoder from elsewhere
        name = str(kept) if kept.exists() else told["audio_encoder"]
        encoder = _encoder(name, told["mels"], told["encoder_dim"], pretrained=False, seed=0)
        system = get_system(told["system"])(encoder, **told["arguments"])
    load_weights(system, folder / "weights.safetensors")
    form = LogMel(told["rate"], told["mels"]) if encoder.takes == "spectrogram" else None
    about = {k: told[k] for k in ("rate", "seconds", "target")}
    return SpeechModel(system.to(device), vocabulary, form=form, **about)


def _encoder(name: str, mels: int, width: int, *, pretrained: bool, seed: int) -> AudioEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvGRUEncoder(mels, width) if name == SMALL else Wav2Vec2Encoder(name, pretrained=pretrained)


class SpeechJob(Continual):
    """The job behind ``contralto fit`` for systems that learn to write what is said, task by task."""

    things: ClassVar[str] = "recordings"
    use: ClassVar[str] = 'write(["a.wav", "b.flac"])'
    limits: ClassVar[str] = "It writes something of any sound: a text that it has learnt, or a mixture."
    protocols: ClassVar[dict[str, str]] = {"right": "recognised"}
    shown: ClassVar[dict[str, str]] = {
        "incremental": "mean over the stream (Avg)", "last": "after the last task (Last)", "forgetting": "forgetting",
        "backward": "backward transfer",
    }  # fmt: skip
    module: COCONUT

    @classmethod
    def own_parameters(cls) -> dict[str, inspect.Parameter]:
        """Named arguments of `fit`, which takes none of those of pictures."""
        every = inspect.signature(cls.fit).parameters.values()
        return {p.name: p for p in every if p.kind is p.KEYWORD_ONLY and p.name != "progress"}

    def fit(
        self,
        data: str,
        out: str | Path,
        *,
        tasks: int = 5,
        split_by: Literal["class", "domain", "drift"] = "class",
        shuffle_classes: bool = True,
        drift_width: float = 0.5,
        test_share: float = 0.2,
        sound_column: str | None = None,
        label_column: str | None = None,
        text_column: str | None = None,
        id_column: str | None = None,
        split_column: str | None = None,
        group_column: str | None = None,
        allow_outside: bool = False,
        target: Target = "text",
        vocabulary: Literal["characters", "words"] = "characters",
        rate: int = 16_000,
        seconds: float = 7.0,
        audio_encoder: str = SMALL,
        pretrained: bool = True,
        mels: int = 40,
        encoder_dim: int = 64,
        accelerator: str = "auto",
        devices: int = 1,
        precision: str = "32-true",
        strategy: str = "auto",
        seed: int = 0,
        checkpoint_every: int = 1000,
        progress: bool = True,
        **system: Any,
    ) -> Path:
        """Learn to write what is said in a stream of tasks, and measure after each what is recognised of all so far.

        Parameters
        ----------
        data : str
            Recordings in any form of `contralto.data.sources`, with a class each, and with what is said where that is another
            text. Those of the split `test` are for testing; without any, a share of every class is kept for it.
        out : path
            Run folder. Called again with the same arguments, the job continues where it stopped.
        tasks, split_by, shuffle_classes, drift_width, test_share
            See `Continual.fit`; the domain is what `group_column` says, the speaker for instance.
        sound_column, label_column, text_column, id_column, split_column, group_column : str, optional
            Columns, where their names are not common ones.
        allow_outside : bool
            Let tables name files outside their folder.
        target : {"text", "label", "label_text"}
            What is written: what is said, the name of the class, or that and then what is said. What is recognised is judged by
            the name where it is written, else by the whole text.
        vocabulary : {"characters", "words"}
            Of what a text is made.
        rate : int
            Samples per second.
        seconds : float
            Recordings are cut to this length.
        audio_encoder : str
            "conv-gru", a small one of spectrograms, or the folder or name of a wav2vec 2.0 model for transformers.
        pretrained : bool
            Whether the latter begins with its weights.
        mels, encoder_dim : int
            Bands of the spectrograms, and width of the small encoder.
        accelerator, devices, precision, strategy
            Of Lightning's Trainer; `devices` must be 1 yet.
        seed : int
            Of everything that is drawn.
        checkpoint_every : int
            Steps between checkpoints; it may change when a run goes on.
        progress : bool
            Show what is going on.
        **system
            Arguments of the system.

        Returns
        -------
        Path
            The run folder.

        Raises
        ------
        UsageError
            If arguments do not fit, or the folder belongs to another job.
        DataError
            If recordings lack classes, or a task has too few.
        """
        given = {k: v for k, v in locals().items() if k in self.own_parameters()} | system
        self.begin(str(data), Path(out), given, progress)
        self.ingest()
        module = self.learn()
        assert isinstance(module, COCONUT)
        self.module = module
        self.finish()
        return self.out

    # Data.

    def ingest(self) -> None:
        """Read the recordings, once; keep those for testing apart, and cut the others into tasks."""
        a = self.arguments
        self.sounds = self._read_sounds(self.data, self.out / "sounds")
        labels, splits = self.sounds.column("label").astype(np.int64), self.sounds.column("split").astype(str)
        self.rows = np.flatnonzero(splits == "train") if "train" in splits else np.arange(len(self.sounds))
        self.labels = labels[self.rows]
        if (self.labels < 0).any():
            raise DataError(
                f"{self.name} learns from labels, and {int((self.labels < 0).sum())} recordings have none; name their column "
                f"with --label_column",
                file=self.data,
            )
        wanted = "test" if "test" in splits else None
        groups = self.sounds.column("group").astype(str)
        self.divide(labels, groups, wanted, np.ones(len(splits), bool) if wanted is None else splits == wanted)
        self.texts = targets(self.sounds.column("text").tolist(), self._names(labels), a["target"])
        learnt = [self.texts[row] for row in self.rows]
        self.vocabulary = VOCABULARIES[a["vocabulary"]].learn(learnt, least=1)
        self.length = min(a["length"], self.vocabulary.longest(learnt))
        told = {k: v for k, v in a.items() if k not in NOT_OF_THE_DATA}
        self.fingerprint = hashlib.sha256(
            json.dumps([self.sounds.fingerprint(), told], sort_keys=True, default=str).encode()
        ).hexdigest()[:16]
        self.console.print(
            f"  {self.sounds.skipped.num_rows} skipped, {len(self.vocabulary.words)} different {a['vocabulary']}, texts of up "
            f"to {self.length - 1}",
            highlight=False,
            soft_wrap=True,
        )

    def _read_sounds(self, data: str, folder: Path) -> Sounds:
        """The recordings of an address, read into a folder once."""
        if folder.exists():
            return load_sounds(folder)
        a = self.arguments
        self.console.print(f"[bold]ingest[/bold]  reading {data}", highlight=False, soft_wrap=True)
        columns = {k: a[k] for k in a if k.endswith("_column")}
        with self.console.status("reading") as status:
            return read_sounds(
                data, folder, rate=a["rate"], seconds=a["seconds"], allow_outside=a["allow_outside"],
                progress=lambda n: status.update(f"{n} recordings read"), **columns,
            )  # fmt: skip

    def _names(self, labels: npt.NDArray[np.int64]) -> list[str]:
        names = [*self.sounds.classes, ""]
        return [names[label] for label in labels]

    @property
    def class_names(self) -> list[str]:
        """In the order of their numbers."""
        return list(self.sounds.classes)

    # Training.

    def build(self, **more: Any) -> EncoderSystem:
        """The system, for these recordings."""
        a = self.arguments
        encoder = _encoder(a["audio_encoder"], a["mels"], a["encoder_dim"], pretrained=a["pretrained"], seed=a["seed"])
        facts = {
            "num_features": encoder.num_features, "num_samples": len(self.labels), "num_classes": len(self.class_names),
            "vocabulary": len(self.vocabulary), "length": self.length,
        }  # fmt: skip
        names = inspect.signature(self.system).parameters
        self.built = {k: v for k, v in a.items() if k in names} | facts
        self.form = LogMel(a["rate"], a["mels"]) if encoder.takes == "spectrogram" else None
        self.read = self._reader()
        return self.system(encoder, **self.built)

    def _reader(self) -> Callable[[npt.ArrayLike], tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
        """Rows of the table to what the encoder takes."""
        if self.form is None:
            return self.sounds.waves
        return spectrograms(self.sounds, self.form, self.out / "spectrograms.npy").take

    def loader(self, module: EncoderSystem) -> DataLoader[Any]:
        """Batches of the task and of the memory; the system draws their views."""
        text = torch.from_numpy(self.vocabulary.encode([self.texts[row] for row in self.rows], length=self.length))
        fields = {"label": torch.from_numpy(self.labels), "text": text}
        memory = self.replayed.nonzero().squeeze(1).numpy()
        dataset = SoundDataset(lambda rows: self.read(self.rows[rows]), fields, memory)
        return DataLoader(dataset, collate_fn=as_it_is, **self.order(module))

    def callbacks(self, module: EncoderSystem) -> list[Callback]:
        """Nobody looks on: what matters is what is written at the end."""
        return []

    def _batches(self, rows: npt.NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
        """Recordings as they are, in padded batches."""
        for first in range(0, len(rows), BATCH):
            x, lengths = self.read(rows[first : first + BATCH])
            yield torch.from_numpy(np.asarray(x, np.float32)), torch.from_numpy(lengths)

    def embed(self, module: ContinualSystem, rows: npt.NDArray[np.int64]) -> Tensor:
        """Features (N, F) of recordings by the encoder as it is."""
        assert isinstance(module, COCONUT)
        module.eval().to(device_of(self.arguments["accelerator"]))
        with torch.inference_mode():
            parts = [
                module.embed(x.to(module.device), n.to(module.device)).float().cpu() for x, n in self._batches(rows)
            ]
        module.cpu()
        return torch.cat(parts)

    def ask(self, module: ContinualSystem, number: int) -> pa.Table:
        """What is written of the test recordings of all tasks so far."""
        assert isinstance(module, COCONUT)
        asked = np.flatnonzero(self.test_tasks <= number)
        rows = self.test_rows[asked]
        model = self._model(module.to(device_of(self.arguments["accelerator"])))
        written = [text for x, lengths in self._batches(rows) for text in model.written(x, lengths)]
        module.cpu()
        truth = [self.texts[row] for row in rows]
        return pa.table(
            {
                "index": rows, "id": self.sounds.column("id")[rows].tolist(), "task": self.test_tasks[asked], "label": truth,
                "predicted": written,
                "right": [w == t for w, t in zip(*(intents(x, type(self.vocabulary)) for x in (written, truth)), strict=True)],
            }
        )  # fmt: skip

    def _model(self, module: COCONUT) -> SpeechModel:
        a = self.arguments
        about = {k: a[k] for k in ("rate", "seconds", "target")}
        return SpeechModel(module, self.vocabulary, form=self.form, **about)

    # What comes out.

    def finish(self) -> None:
        """Keep the model, measures and page."""
        module, a = self.module.cpu(), self.arguments
        folder = self.out / "model"
        folder.mkdir(exist_ok=True)
        told = {k: a[k] for k in ("audio_encoder", "mels", "encoder_dim", "rate", "seconds", "target", "vocabulary")}
        told |= {"system": self.name, "words": self.vocabulary.words, "arguments": self.built}
        if isinstance(module.encoder, Wav2Vec2Encoder):
            module.encoder.model.config.save_pretrained(folder / "encoder")
        save_weights(module, folder / "weights.safetensors")
        write_json(folder / "speech.json", told)
        metrics = self.measures()
        card = self.card(self.class_names, metrics)
        write_atomically(folder / "README.md", lambda part: part.write_text(card, encoding="utf-8"))
        memory = peak_memory_gib()
        about = {
            "recordings": len(self.rows), "tested": len(self.test_rows), "skipped": self.sounds.skipped.num_rows,
            "seconds": self.seconds, "memory_gib": memory, "kept": 0 if module.memory is None else len(module.memory),
            "files": {
                "what was written": f"tasks/task{len(self.tasks)}/answers.parquet", "model": "model",
                "left out": "sounds/skipped.parquet",
            },
        }  # fmt: skip
        write_json(self.out / "metrics.json", about | metrics)
        self.report(self.out)

    def headline(self, names: list[str]) -> str:
        """What the model is, in a few words."""
        return "Writes what is said"

    def origin(self, names: list[str]) -> list[str]:
        """Lines on what it was learnt from."""
        return [
            f"Learnt by {SYSTEMS[self.name].title} from {len(self.rows)} recordings of {len(names)} classes at "
            f"{self.arguments['rate']} samples a second, one task after another; encoder {self.arguments['audio_encoder']}.",
        ]

    def answer(self, run: Path, data: str, split: str | None, columns: dict[str, Any], stream: Stream) -> Answers:
        """What a finished model writes of other recordings, and whether that is right. See `Continual.answer`.

        Raises
        ------
        DataError
            If there is nothing to measure.
        """
        from torchmetrics.functional.text import word_error_rate

        model, a = load_speech(run), stream.arguments
        with tempfile.TemporaryDirectory() as folder:
            sounds = read_sounds(
                data, Path(folder) / "sounds", rate=model.rate, seconds=model.seconds,
                sound_column=columns["image_column"] or a["sound_column"],
                label_column=columns["label_column"] or a["label_column"], text_column=a["text_column"],
                group_column=columns["group_column"],
            )  # fmt: skip
            splits = sounds.column("split").astype(str)
            wanted = split if split is not None else "test" if "test" in splits else None
            rows = np.flatnonzero(np.ones(len(sounds), bool) if wanted is None else splits == wanted)
            if not len(rows):
                raise DataError(f"no recording is of the split {wanted!r}", file=data)
            names = [*sounds.classes, ""]
            given = [names[label] for label in sounds.column("label")]
            texts = targets(sounds.column("text").tolist(), given, a["target"])
            written: list[str] = []
            for first in range(0, len(rows), BATCH):
                waves, samples = sounds.waves(rows[first : first + BATCH])
                x, lengths = torch.from_numpy(waves), torch.from_numpy(samples)
                written += model.written(*((x, lengths) if model.form is None else model.form(x, lengths)))
            groups = sounds.column("group").astype(str)[rows]
        kind = type(model.vocabulary)
        truth = [kind.between.join(kind.split(texts[row])) for row in rows]
        right = np.array([w == t for w, t in zip(intents(written, kind), intents(truth, kind), strict=True)], float)
        number = {name: place for place, name in enumerate(stream.names)}
        labels = np.array([number.get(given[row], -1) for row in rows], np.int64)
        wrong = {"word error rate": {"value": float(word_error_rate(written, truth)), "percent": True}}
        return Answers({self.protocols["right"]: right}, labels, stream.task_of(labels, groups), groups, wanted, wrong)
