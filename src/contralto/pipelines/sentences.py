"""An encoder of sentences from texts alone (`systems.text`): read -> vocabulary -> train -> embeddings of all texts.

The run folder holds `vocabulary.json`, `training/`, `embeddings.parquet` (row, text, embedding), `written.txt` (what the model
writes: some held-out sentences again, and new ones) and `metrics.json`.
"""

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from contralto.data.canvas import as_it_is
from contralto.data.dataset import Batch, EpochSampler
from contralto.data.texts import PAD, Vocabulary, read_texts
from contralto.encoders.recurrent import GRUEncoder
from contralto.errors import DataError, UsageError
from contralto.files import load_weights, naming, write_atomically, write_json
from contralto.pipelines.outputs import claim_run
from contralto.systems.registry import get_system
from contralto.systems.text.sentence_mim import SentenceMIM
from contralto.training.fit import fit_stage

__all__ = ["SentenceJob", "SentenceModel", "load_sentences"]

BUILT = ("self", "encoder", "num_features", "num_samples", "steps_per_epoch")
FREE = ("checkpoint_every",)
SHOWN = 10


class SentenceModel:
    """A trained model of sentences.

    Parameters
    ----------
    system : SentenceMIM
    vocabulary : Vocabulary
    """

    def __init__(self, system: SentenceMIM, vocabulary: Vocabulary) -> None:
        self.system, self.vocabulary = system.eval(), vocabulary
        self.length = system.decoder.shape[0]

    def numbers(self, texts: Sequence[str]) -> Tensor:
        """Texts as numbers of words (N, length)."""
        return torch.from_numpy(self.vocabulary.encode(texts, length=self.length))

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], *, batch_size: int = 256) -> npt.NDArray[np.float32]:
        """Embeddings (N, F) of texts, what `use` of the system says."""
        device = self.system.steps.device
        parts = [self.system.embed(x.to(device)).float().cpu().numpy() for x in self.numbers(texts).split(batch_size)]
        return np.concatenate(parts) if parts else np.zeros((0, self.system.num_features), np.float32)

    @torch.inference_mode()
    def rewrite(self, texts: Sequence[str]) -> list[str]:
        """The most likely sentences of the codes of texts."""
        return self.vocabulary.decode(
            self.system.reconstruct(self.numbers(texts).to(self.system.steps.device)).cpu().numpy()
        )

    @torch.inference_mode()
    def write(self, n: int, *, seed: int = 0) -> list[str]:
        """Sentences of codes drawn from the prior."""
        generator = torch.Generator().manual_seed(seed)
        return self.vocabulary.decode(self.system.generate(n, generator=generator).cpu().numpy())

    @torch.inference_mode()
    def nats(self, texts: Sequence[str], *, batch_size: int = 256) -> dict[str, float]:
        """How well texts are written again from the means of their codes: nats per sentence, and perplexity per word."""
        total, words = 0.0, 0
        for x in self.numbers(texts).to(self.system.steps.device).split(batch_size):
            total += float(self.system.decoder.nll(self.system.mean_code(x), x).sum())
            words += int((x != PAD).sum())
        return {"nll": total / max(len(texts), 1), "perplexity": float(np.exp(total / max(words, 1)))}


@dataclass
class SentenceJob:
    """The job behind ``contralto fit`` for systems that learn from texts.

    Parameters
    ----------
    name : str
        Of the system.
    """

    name: str
    multilabel = False

    @property
    def system(self) -> type[SentenceMIM]:
        """The class of the system."""
        found: type[SentenceMIM] = get_system(self.name)
        return found

    def fit(
        self,
        data: str,
        out: str | Path,
        *,
        text_column: str | None = None,
        words: int = 10_000,
        least: int = 2,
        held: float = 0.05,
        accelerator: str = "auto",
        devices: int = 1,
        precision: str = "32-true",
        strategy: str = "auto",
        seed: int = 0,
        checkpoint_every: int = 1000,
        progress: bool = True,
        **system: Any,
    ) -> Path:
        """Train a model of sentences on texts, and embed them.

        Parameters
        ----------
        data : str
            Path or fsspec address: .txt, .txt.gz (a text per line), .jsonl, .jsonl.gz, .csv or .parquet.
        out : path
            Run folder. Called again with the same arguments, the job continues where it stopped.
        text_column : str, optional
            Column of the texts, where its name is not a common one.
        words, least : int
            Largest size of the vocabulary, and how often a word must be there.
        held : float
            Share of the texts that is not learnt from but measured.
        accelerator, devices, precision, strategy
            Of Lightning's Trainer; `devices` must be 1 yet.
        seed : int
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
            If the data cannot be used.
        """
        out, given = (
            Path(out),
            {k: v for k, v in locals().items() if k not in ("self", "data", "out", "system", "progress")},
        )
        known = self.parameters()
        unknown = sorted(set(system) - set(known))
        if unknown:
            raise UsageError(f"{self.name} has no argument {unknown[0]!r}")
        a = {k: p.default for k, p in known.items() if p.default is not p.empty} | given | system
        if devices != 1:
            raise UsageError("this job trains on one device; the system runs on several under a Trainer of your own")
        if not 0 <= held < 1:
            raise UsageError(f"held is a share in [0, 1), got {held}")
        claim_run(out, self.name, str(data), dict(sorted(a.items())))
        console = Console(stderr=True, quiet=not progress)
        texts = read_texts(str(data), text_column=text_column)
        order = np.random.default_rng(seed).permutation(len(texts))
        kept, tested = np.split(order, [len(texts) - int(held * len(texts))])
        if len(kept) < 2:
            raise DataError(f"{self.name} compares texts with each other: at least two are needed", file=str(data))
        vocabulary = Vocabulary.learn((texts[i] for i in kept), size=words, least=least)
        write_json(out / "vocabulary.json", {"words": vocabulary.words})
        console.print(
            f"  {len(kept)} texts to learn from, {len(tested)} to test, {len(vocabulary.words)} words", highlight=False
        )
        numbers = torch.from_numpy(vocabulary.encode([texts[i] for i in kept], length=a["length"]))
        batch = min(a["batch_size"], len(kept))
        loader: DataLoader[Any] = DataLoader(
            _Sentences(numbers),
            batch_size=batch,
            sampler=EpochSampler(len(kept), seed=seed),
            collate_fn=as_it_is,  # batches come whole
            drop_last=True,
        )
        module = build(self.system, a, vocabulary, num_samples=len(kept), steps_per_epoch=len(kept) // batch)
        told = json.dumps([texts, {k: v for k, v in a.items() if k not in FREE}], sort_keys=True, default=str)
        fit_stage(
            module,
            loader,
            out / "training",
            epochs=module.epochs,
            fingerprint=hashlib.sha256(told.encode()).hexdigest()[:16],
            checkpoint_every=checkpoint_every,
            progress=progress,
            trainer={k: a[k] for k in ("accelerator", "devices", "precision", "strategy")},
        )
        _keep(SentenceModel(module, vocabulary), texts, [texts[i] for i in tested], out)
        return out

    def parameters(self) -> dict[str, inspect.Parameter]:
        """All arguments of system and job by name; those of the job win."""
        every = dict(inspect.signature(self.system).parameters) | dict(inspect.signature(self.fit).parameters)
        return {k: p for k, p in every.items() if k not in (*BUILT, "data", "out", "progress", "system")}


def load_sentences(run: str | Path, *, device: str = "cpu") -> SentenceModel:
    """The model of a finished run.

    Raises
    ------
    DataError
        If a file is missing or damaged.
    """
    run = Path(run)
    with naming(run / "config.json"):
        config = dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    with naming(run / "vocabulary.json"):
        vocabulary = Vocabulary(json.loads((run / "vocabulary.json").read_text(encoding="utf-8"))["words"])
    module = build(get_system(config["system"]), config["arguments"], vocabulary)
    load_weights(module, run / "training" / "weights.safetensors")
    return SentenceModel(module.to(device), vocabulary)


def build(system: type[SentenceMIM], arguments: dict[str, Any], vocabulary: Vocabulary, **facts: int) -> SentenceMIM:
    """A system for a vocabulary; drawn by the seed."""
    names = inspect.signature(system).parameters
    given = {k: v for k, v in arguments.items() if k in names and k != "words"} | facts
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(given["seed"])
        encoder = GRUEncoder(len(vocabulary), given["embedding"], given["hidden"])
    return system(encoder, num_features=given["hidden"], words=len(vocabulary), **given)


class _Sentences(Dataset[Batch]):
    """Word numbers by rows, a whole batch at a time, cut to its longest sentence."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.lengths = (numbers != PAD).sum(1)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        rows = torch.tensor([row for _, row in keys])
        return {"views": [self.numbers[rows, : int(self.lengths[rows].max())]], "index": rows}


def _keep(model: SentenceModel, texts: list[str], tested: list[str], out: Path) -> None:
    """What a run leaves: embeddings, something to read, and what was measured."""
    embedded = model.embed(texts)
    flat = pa.array(embedded.ravel(), pa.float32())
    column = pa.FixedSizeListArray.from_arrays(flat, embedded.shape[1])
    table = pa.table({"row": np.arange(len(texts)), "text": texts, "embedding": column})
    write_atomically(out / "embeddings.parquet", lambda path: pq.write_table(table, path))
    shown = tested[:SHOWN]
    lines = [f"{text}\n  -> {again}" for text, again in zip(shown, model.rewrite(shown), strict=True)]
    page = "\n".join(
        ["Held-out sentences, and what the model makes of them:", "", *lines, "", "New ones:", "", *model.write(SHOWN)]
    )
    write_atomically(out / "written.txt", lambda path: path.write_text(page + "\n", encoding="utf-8"))
    with naming(out / "training" / "metrics.jsonl"):
        last = (out / "training" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1:]
    trained = dict(json.loads(last[0])) if last else {}
    measured = {f"held_{k}": v for k, v in model.nats(tested).items()} if tested else {}
    write_json(out / "metrics.json", {"texts": len(texts), "words": len(model.vocabulary.words)} | trained | measured)
