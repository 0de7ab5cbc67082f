"""Regression over a run folder: an encoder is trained by contrast, a linear probe on it tells the number.

    contralto fit supremix TABLE_OR_PICTURES --target COLUMN --out RUN

From a table (.csv, .jsonl, .parquet) the other columns of numbers are the inputs; of pictures, in any form that is known, the
number is in a column or the name of their folder. Beside, least absolute error is trained from the same start, and both are
measured on what is kept aside. The run folder holds `manifest/`, `training/`, `baseline/`, `model/` (for `contralto.load`),
`predictions.parquet`, `metrics.json` and `report.html`. It goes on where it stopped.
"""

import hashlib
import inspect
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from contralto.data.canvas import CanvasDataset, as_it_is
from contralto.data.dataset import Batch
from contralto.data.manifest import Manifest
from contralto.data.tables import NumberTable, is_table, read_numbers
from contralto.encoders.features import device_of
from contralto.encoders.image import ImageEncoder, image_encoder
from contralto.encoders.pictures import PictureReader, picture_blocks
from contralto.encoders.tables import TableEncoder
from contralto.errors import DataError, UsageError
from contralto.evaluation.classification import Interval, paired_interval
from contralto.evaluation.regression import Probe, fit_probe, paired_errors, regression_scores
from contralto.files import load_weights, naming, save_weights, write_atomically, write_json
from contralto.pipelines.continual import held_out
from contralto.pipelines.embedding import CROP
from contralto.pipelines.outputs import peak_memory_gib
from contralto.pipelines.pretrain import Pretraining
from contralto.review.regression import write_regression_report
from contralto.systems.base import EncoderSystem
from contralto.systems.classifier import MAX_SIZE, as_tensor
from contralto.systems.regression.base import Regression
from contralto.views.image import EvalView

__all__ = ["RegressionJob", "Regressor", "load_regressor"]

Array = npt.NDArray[Any]
TOLD = {
    "mae": "mean absolute error",
    "rmse": "root mean square error",
    "gm": "geometric mean of errors",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}
ALIKE = {"many": "more than 100 are alike", "medium": "20 to 100 are alike", "few": "less than 20 are alike"}


class Regressor(nn.Module):
    """An encoder of rows or pictures, and a linear output that tells a number.

    Parameters
    ----------
    encoder : TableEncoder or ImageEncoder
    config : dict
        As in `config.json`: `target`, `columns` (of a table), `num_features`, and what builds the encoder.

    Attributes
    ----------
    kind : {"table", "image"}
        What it takes.

    Examples
    --------
    >>> config = {"target": "weight", "columns": ["width", "height"], "num_features": 8}
    >>> model = Regressor(TableEncoder(2, width=8), config)
    >>> model.predict([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).shape
    (3,)
    """

    def __init__(self, encoder: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config
        self.kind: Literal["table", "image"] = "image" if config["columns"] is None else "table"
        self.output = nn.Linear(config["num_features"], 1, dtype=torch.float64)

    @torch.no_grad()
    def take(self, probe: Probe) -> None:
        """Use a probe for the output."""
        self.output.weight.copy_(torch.from_numpy(probe.weight)[None])
        self.output.bias.fill_(probe.bias)

    def predict(self, samples: Any) -> npt.NDArray[np.float64]:
        """The number of every sample (N,).

        Parameters
        ----------
        samples : array (N, F), or sequence of pictures
            See `embed`.
        """
        return self.tell(self.embed(samples))

    def answers(self, samples: Any, *, threshold: float = 0.0) -> dict[str, pa.Array]:
        """What `predict` says, as a column of a table: `number`.

        Raises
        ------
        UsageError
            If there is a threshold.
        """
        if threshold > 0:
            raise UsageError("a number comes without a probability: leave threshold out")
        return {"number": pa.array(self.predict(samples), pa.float64())}

    def embed(self, samples: Any, *, batch_size: int = 64) -> npt.NDArray[np.float32]:
        """Features (N, num_features).

        Parameters
        ----------
        samples : array (N, F), or sequence of pictures
            Of a table: its rows, in the order of `config["columns"]`. Else paths, encoded bytes, uint8 arrays (H, W, 3) or PIL
            images.
        batch_size : int
            Pictures at a time.

        Raises
        ------
        UsageError
            If rows have other columns, or cells that are no numbers.
        """
        if self.kind == "table":
            return self.embed_rows(samples)
        view, places = self._view(), range(0, len(samples), batch_size)
        return self._embed(torch.stack([view(as_tensor(p)) for p in samples[i : i + batch_size]]) for i in places)

    @torch.inference_mode()
    def tell(self, features: Array) -> npt.NDArray[np.float64]:
        """Numbers (N,) of features (N, F)."""
        found = self.output(torch.from_numpy(np.asarray(features, np.float64)).to(self.output.weight.device))
        return np.asarray(found.squeeze(1).cpu().numpy())

    def embed_rows(self, rows: Array, *, batch_size: int = 4096) -> npt.NDArray[np.float32]:
        """Features (N, F) of rows as they are in the table, in the order of its columns."""
        assert isinstance(self.encoder, TableEncoder)
        x, columns = np.array(rows, np.float64, order="C"), self.config["columns"]
        if x.ndim != 2 or x.shape[1] != len(columns) or not np.isfinite(x).all():
            raise UsageError(
                f"rows must be numbers of the shape (N, {len(columns)}), the columns {', '.join(columns)}; got {x.shape}"
            )
        standardized = self.encoder.standardize(torch.from_numpy(x).to(self.encoder.center.device))
        return self._embed(standardized.split(batch_size))

    def embed_pictures(self, manifest: Manifest, rows: Array, *, device: str = "cpu") -> npt.NDArray[np.float32]:
        """Features (N, F) of pictures of a manifest."""
        self.encoder.to(device)
        reader = PictureReader(manifest.root, self._view())
        found = self._embed(x for block in picture_blocks(manifest, rows) for x in reader.batches(block))
        self.encoder.to("cpu")
        return found

    def _view(self) -> EvalView:
        encoder = self.encoder
        assert isinstance(encoder, ImageEncoder)
        return EvalView(encoder.size, CROP, encoder.mean, encoder.std)

    @torch.inference_mode()
    def _embed(self, batches: Iterable[Tensor]) -> npt.NDArray[np.float32]:
        """Features (N, F) of batches of what the encoder takes."""
        device = next(self.encoder.parameters()).device
        found = [self.encoder(x.to(device)).float().cpu().numpy() for x in batches]
        return np.concatenate(found) if found else np.zeros((0, self.config["num_features"]), np.float32)

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self, folder / "model.safetensors")
        write_json(folder / "config.json", self.config)


def load_regressor(run: str | Path, *, device: str = "cpu") -> Regressor:
    """What a run learnt, for use.

    Parameters
    ----------
    run : path
        A run folder, or its `model` folder.
    device : str

    Raises
    ------
    DataError
        If there is no regressor, or it is damaged.
    """
    folder = Path(run)
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise DataError(
            "there is no regressor here (config.json and model.safetensors); is the run finished?", file=str(run)
        )
    with naming(folder / "config.json"):
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        sizes = [config[k] for k in ("num_features", "size" if config["columns"] is None else "depth")]
        if not all(type(s) is int and 0 < s <= MAX_SIZE for s in sizes):
            raise ValueError(f"odd sizes {sizes}")
        encoder: nn.Module
        if config["columns"] is not None:
            encoder = TableEncoder(
                len(config["columns"]), width=int(config["num_features"]), depth=int(config["depth"])
            )
        else:
            pictures = image_encoder(config["encoder"], pretrained=False, size=int(config["size"]))
            pictures.mean, pictures.std = tuple(config["mean"]), tuple(config["std"])
            encoder = pictures
        model = Regressor(encoder, config)
    load_weights(model, folder / "model.safetensors")
    return model.eval().to(device)


class RegressionJob(Pretraining):
    """The job behind ``contralto fit`` for systems that learn to tell a number."""

    def fit(
        self,
        data: str,
        out: str | Path,
        *,
        target: str | None = None,
        columns: str | None = None,
        held: float = 0.2,
        linear: Literal["ridge", "l1"] = "ridge",
        baseline: bool = True,
        width: int = 128,
        depth: int = 2,
        **rest: Any,
    ) -> Path:
        """Train an encoder for a number, and tell the number by a linear probe on it.

        Parameters
        ----------
        target : str, optional
            Column of the number; of pictures by default the column of labels or the name of their folder.
        columns : str, optional
            Columns of a table to learn from, joined by commas; default: all others that hold numbers.
        held : float
            Share that is kept for testing where the data have no split `test`; samples of one group stay together.
        linear : {"ridge", "l1"}
            The probe: least squares with a penalty, or least absolute error.
        baseline : bool
            Train least absolute error from the same start as well, and tell the difference.
        width, depth : int
            Of the encoder of a table: width of its layers, and how many.
        """
        return super().fit(
            data, out, target=target, columns=columns, held=held, linear=linear, baseline=baseline, width=width,
            depth=depth, **rest,
        )  # fmt: skip

    # The data.

    def ingest(self) -> None:
        """Read the table, or the pictures with their numbers; keep some aside where no split says which.

        Raises
        ------
        DataError
            If a number is none, or too few are left; names the file, and the row or picture.
        """
        a = self.arguments
        if not 0 < a["held"] < 1:
            raise UsageError(f"held is a share in (0, 1), got {a['held']}")
        folder = self.out / "manifest"
        self.tabular = (folder / "table.parquet").is_file() or (not folder.exists() and is_table(self.data))
        every, splits, groups = self._table(folder) if self.tabular else self._pictures(folder)
        known = np.isfinite(every)
        wanted = splits == "test"
        if not (wanted & known).any():
            wanted = np.zeros(len(every), bool)
            rows = np.flatnonzero(known)
            wanted[rows] = held_out(np.zeros(len(rows), int), a["held"], groups=groups[rows], seed=a["seed"])
            learn = known & ~wanted
        else:
            learn = known & (splits == "train") if "train" in splits else known & ~wanted
        self.rows, self.test_rows = np.flatnonzero(learn), np.flatnonzero(known & wanted)
        if len(self.rows) < 4 or not len(self.test_rows):
            raise DataError(
                f"too few samples with a number: {len(self.rows)} to learn from, {len(self.test_rows)} for testing",
                file=self.data,
            )
        self.numbers, self.test_numbers = every[self.rows], every[self.test_rows]
        self.test_groups = groups[self.test_rows]
        self.labels = np.full(len(self.rows), -1, np.int64)
        if self.numbers.std() <= 0:
            raise DataError(f"all numbers to learn from are {self.numbers[0]:g}", file=self.data)
        told = {k: v for k, v in a.items() if k not in ("checkpoint_every", "on", "workers", "cache_gib", "probe")}
        text = json.dumps([self.data_fingerprint, told], sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        skipped = len(self.manifest.skipped) if self.tabular else self.manifest.skipped.num_rows
        self.console.print(
            f"  {len(self.rows)} samples to learn from, {len(self.test_rows)} kept for testing, {skipped} skipped; numbers "
            f"from {every[known].min():g} to {every[known].max():g}",
            highlight=False,
            soft_wrap=True,
        )

    def _table(self, folder: Path) -> tuple[Array, Array, Array]:
        """Numbers, splits and groups of the rows of a table."""
        a = self.arguments
        if a["target"] is None:
            raise UsageError("which column is to be told? Name it with --target")
        if not (folder / "table.parquet").exists():
            chosen = None if a["columns"] is None else [c.strip() for c in a["columns"].split(",")]
            named = {k: a[k] for k in ("id_column", "split_column", "group_column")}
            table = read_numbers(self.data, a["target"], columns=chosen, **named)
            part = folder.with_name(f".{folder.name}.part")
            table.save(part)
            part.rename(folder)
        self.manifest: Any = NumberTable.load(folder)
        self.target, self.data_fingerprint = self.manifest.target, self.manifest.fingerprint()
        self.ids = self.manifest.ids
        return self.manifest.numbers, self.manifest.splits, self.manifest.groups

    def _pictures(self, folder: Path) -> tuple[Array, Array, Array]:
        """Numbers, splits and groups of pictures: the number is their label."""
        a = self.arguments
        if a["columns"] is not None:
            raise UsageError("--columns are those of a table, and these are pictures")
        if a["target"] is not None:
            self.arguments = a | {"label_column": a["target"]}
        found = self._read(self.data, folder)
        self.arguments = a
        if not found.classes:
            raise DataError("no picture has a number: name their column with --target", file=self.data)
        values = np.array([_number_of(c.name, self.data) for c in found.classes] + [np.nan])
        self.data_fingerprint, self.target = found.fingerprint(), a["target"] or "number"
        self.manifest = replace(found, classes=(), clean_sets=None)  # numbers are no classes: nothing is to count them
        self.ids = found.column("id").astype(str)
        return values[found.right_labels], found.column("split").astype(str), found.column("group").astype(str)

    def facts(self, encoder: Any) -> dict[str, Any]:
        """What follows from encoder and data."""
        size = min(self.arguments["batch_size"], len(self.rows))
        return {
            "num_features": encoder.num_features, "num_samples": len(self.rows), "steps_per_epoch": len(self.rows) // size,
        }  # fmt: skip

    def build(self, **more: Any) -> EncoderSystem:
        """The system, which knows the scale of the numbers."""
        module = super().build(**more)
        assert isinstance(module, Regression)
        module.learn_scale(torch.from_numpy(self.numbers))
        return module

    def encoder(self, seed: int | None = None) -> Any:
        """The encoder as it is before the training."""
        if not self.tabular:
            return super().encoder(seed)
        a = self.arguments
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(a["seed"] if seed is None else seed)
            encoder = TableEncoder(len(self.manifest.columns), width=a["width"], depth=a["depth"])
        encoder.learn_scale(torch.from_numpy(self.manifest.inputs[self.rows]))
        return encoder

    def loader(self, module: EncoderSystem) -> DataLoader[Any]:
        """Batches of rows or pictures with their numbers."""
        if not self.tabular:
            return super().loader(module)
        encoder: Any = module.encoder
        x = encoder.standardize(torch.from_numpy(self.manifest.inputs[self.rows]))
        rows = _Rows(x, torch.from_numpy(self.numbers))
        return DataLoader(rows, collate_fn=as_it_is, **self.order(module))

    def dataset(self, size: int) -> CanvasDataset:
        """The pictures with their numbers."""
        found = super().dataset(size)
        found.fields["number"] = torch.from_numpy(self.numbers)
        return found

    # The training, and what comes of it.

    def learn(self) -> EncoderSystem:
        """Train the system, and the baseline where it is wanted and is another one."""
        a = self.arguments
        self.plain: Regression | None = None
        if a["baseline"] and self.system is not Regression and a.get("method") != "l1":
            encoder = self.encoder()
            names = inspect.signature(Regression).parameters
            given = {k: v for k, v in (a | self.facts(encoder)).items() if k in names}
            self.plain = Regression(encoder, **given)
            self.plain.learn_scale(torch.from_numpy(self.numbers))
            self.train(self.plain, self.out / "baseline")
        return super().learn()

    def finish(self) -> None:
        """Keep the regressor, measure it, and write tables and page."""
        model, told = self.regressor(self.module)
        columns: dict[str, Any] = {
            "id": self.ids[self.test_rows].tolist(), "number": self.test_numbers, "told": told,
        }  # fmt: skip
        scores = self.scores(told)
        if self.plain is not None:
            _, of_plain = self.regressor(self.plain)
            columns["baseline"] = of_plain
            scores |= {f"{name}, least absolute error": s for name, s in list(self.scores(of_plain).items())[:1]}
            gain = paired_interval(
                [paired_errors(self.test_numbers, told, of_plain)],
                groups=[self.test_groups],
                seed=self.arguments["seed"],
            )
            scores["smaller error than that, by"] = _score(gain)
        middle = np.abs(self.test_numbers - np.median(self.numbers)).mean()
        scores["mean absolute error of the median"] = {"value": float(middle)}
        model.save(self.out / "model")
        write_atomically(self.out / "predictions.parquet", lambda path: pq.write_table(pa.table(columns), path))
        memory = peak_memory_gib()
        files = {"what is told of every test sample": "predictions.parquet", "model": "model"}
        more: dict[str, Any] = {
            "learnt": len(self.rows), "tested": len(self.test_rows), "target": self.target, "seconds": self.seconds,
            "memory_gib": memory, "scores": scores, "files": files,
        }  # fmt: skip
        write_json(self.out / "metrics.json", self.last_metrics() | more)
        self.report(self.out)

    def report(self, run: str | Path, *, out: str | Path | None = None) -> Path:
        """The page of what is right and what is told."""
        return write_regression_report(run, out=out)

    def regressor(self, module: EncoderSystem) -> tuple[Regressor, Array]:
        """A trained system with its output or a probe, and what it tells of the test samples (N,)."""
        encoder: Any = module.encoder
        config = {"target": self.target, "num_features": encoder.num_features, "columns": None}
        if self.tabular:
            config |= {"columns": list(self.manifest.columns), "depth": self.arguments["depth"]}
        else:
            config |= {"encoder": encoder.name, "size": encoder.size, "mean": encoder.mean, "std": encoder.std}
        model = Regressor(encoder, config).eval()
        learnt, tested = (self._features(model, rows) for rows in (self.rows, self.test_rows))
        model.take(self._probe(module, learnt))
        return model, model.tell(tested)

    def _probe(self, module: EncoderSystem, features: Array) -> Probe:
        """The output that was trained, where there is one; else a linear probe on features of the training part."""
        output = getattr(module, "output", None)
        if not isinstance(output, nn.Linear):
            return fit_probe(features, self.numbers, kind=self.arguments["linear"], seed=self.arguments["seed"])
        assert isinstance(module, Regression)
        weight, bias = (p.detach().double().cpu().numpy() for p in (output.weight[0], output.bias))
        spread, center = float(module.spread), float(module.center)
        return Probe(spread * weight, spread * float(bias[0]) + center)

    def _features(self, model: Regressor, rows: Array) -> Array:
        if self.tabular:
            return model.embed_rows(self.manifest.inputs[rows])
        return model.embed_pictures(self.manifest, rows, device=device_of(self.arguments["accelerator"]))

    def scores(self, told: Array) -> dict[str, Any]:
        """Errors and correlations on the test samples, with intervals."""
        width = float(self.arguments.get("bin") or 1.0)
        found = regression_scores(
            self.test_numbers,
            told,
            learnt=self.numbers,
            bin=width,
            groups=self.test_groups,
            seed=self.arguments["seed"],
        )
        return {_name(k): _score(v) for k, v in found.items()}

    def evaluate(
        self,
        run: Path,
        data: str,
        *,
        label_column: str | None = None,
        image_column: str | None = None,
        group_column: str | None = None,
        split: str | None = None,
    ) -> dict[str, Any]:
        """Errors and correlations on other data with right numbers.

        Parameters
        ----------
        run : path
        data : str
            A table with the columns of the run, or pictures.
        label_column : str, optional
            Column of the numbers, where it has another name than in the run.
        image_column, group_column : str, optional
        split : str, optional
            Only this split; default: `test` if there is one, else all.

        Returns
        -------
        dict
            `scores`, and how many samples there were (`n`).
        """
        from contralto.data.ingest import ingest

        model = load_regressor(run)
        target = label_column or model.config["target"]
        if model.config["columns"] is not None:
            table = read_numbers(data, target, columns=model.config["columns"], group_column=group_column)
            numbers, splits, groups = table.numbers, table.splits, table.groups
        else:
            named = None if label_column is None and target == "number" else target
            found = ingest(
                data, label_column=named, image_column=image_column, group_column=group_column, image_filter=False
            )
            values = np.array([_number_of(c.name, data) for c in found.classes] + [np.nan])
            numbers, splits = values[found.right_labels], found.column("split").astype(str)
            groups = found.column("group").astype(str)
        wanted = split if split is not None else "test" if "test" in splits else None
        rows = np.flatnonzero(
            np.isfinite(numbers) & (np.ones(len(splits), bool) if wanted is None else splits == wanted)
        )
        if not len(rows):
            raise DataError(
                "no sample has a number" + ("" if wanted is None else f" in the split {wanted!r}"), file=data
            )
        features = (
            model.embed_rows(table.inputs[rows])
            if model.config["columns"] is not None
            else model.embed_pictures(found, rows)
        )
        scores = regression_scores(numbers[rows], model.tell(features), groups=groups[rows])
        return {"n": len(rows), "split": wanted, "scores": {_name(k): _score(v) for k, v in scores.items()}}


class _Rows(Dataset[Batch]):
    """Standardised rows and their numbers, a whole batch at a time."""

    cache = None

    def __init__(self, x: Tensor, numbers: Tensor) -> None:
        self.x, self.numbers = x, numbers

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        epoch, index = torch.tensor(keys).reshape(-1, 2).T
        return {"rows": self.x[index], "index": index, "epoch": epoch, "number": self.numbers[index]}


def _number_of(name: str, file: str) -> float:
    """The number that a label says."""
    try:
        found = float(name)
    except ValueError:
        found = np.nan
    if not np.isfinite(found):
        raise DataError(f"the label {name[:40]!r} is no number: name their column with --target", file=file)
    return found


def _name(key: str) -> str:
    first, _, part = key.partition(", ")
    return TOLD[first] + (f" where {ALIKE[part]}" if part else "")


def _score(interval: Interval) -> dict[str, Any]:
    value, low, high = (None if np.isnan(v) else v for v in interval)
    return {"value": value, "low": low, "high": high}
