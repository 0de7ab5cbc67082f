"""What a run that knows classes hands over for use: encoder, classifier and prototypes, without the training stack.

A model folder holds `config.json` (JSON), `model.safetensors` and a model card `README.md`; nothing in it is unpickled.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.images import decode_image
from contralto.data.names import called, read_names
from contralto.encoders.heads import mlp
from contralto.encoders.image import ImageEncoder, image_encoder
from contralto.errors import DataError, UsageError
from contralto.files import load_weights, naming, save_weights, write_atomically, write_json
from contralto.views.image import EvalView

__all__ = ["UNKNOWN", "Classifier", "Predictions", "Rule", "as_tensor", "load"]

Pictures = Sequence[Any]
Rule = Literal["linear", "cosine", "distance"]
UNKNOWN = "unknown"
"""What is said of a picture whose surest class is not sure enough."""
MAX_SIZE = 2**20
"""Widths and sides above this are no model but damage."""


class Predictions(list[Any]):
    """Class names, one per picture (of a model of several labels: a list of them), with `probabilities` (N, C) beside them."""

    def __init__(self, names: list[Any], probabilities: npt.NDArray[np.float32]) -> None:
        super().__init__(names)
        self.probabilities = probabilities


class Classifier(nn.Module):
    """Encoder and classes of a finished run; of a webly one, also projector and prototypes.

    What a class scores on features f (N, D), by its row w of the classifier's weight and the temperature T::

        rule "linear"      w . f
        rule "cosine"      cos(w, f) / T           w is a direction
        rule "distance"    -|w - f|^2 / T          w is a centre

    Parameters
    ----------
    config : dict
        As in `config.json`: `encoder` (name), `num_features`, `size`, `crop`, `mean`, `std`, `classes`, `hidden`, `dim` (of the
        projector; 0 = none), `temperature`, `rule` ("linear" if missing), and `multilabel` where every class is a yes or no of
        its own.
    encoder : nn.Module, optional
        The image encoder; built from its name without weights if not given.

    Examples
    --------
    >>> config = {"encoder": "resnet8", "num_features": 128, "size": 32, "crop": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3,
    ...           "classes": ["cat", "dog"], "hidden": 16, "dim": 8, "temperature": 0.1}
    >>> model = Classifier(config).eval()
    >>> prediction = model.predict([np.zeros((40, 40, 3), dtype=np.uint8)])
    >>> prediction[0] in ("cat", "dog"), prediction.probabilities.shape
    (True, (1, 2))
    """

    prototypes: Tensor
    kind: ClassVar[Literal["image"]] = "image"

    def __init__(self, config: dict[str, Any], encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.classes: list[str] = list(config["classes"])
        self.encoder = (
            image_encoder(config["encoder"], pretrained=False, size=config["size"]) if encoder is None else encoder
        )
        self.classifier = nn.Linear(config["num_features"], len(self.classes), bias=False)
        hidden = [config["hidden"]] if config["hidden"] else []
        widths = [config["num_features"], *hidden, config["dim"]]
        self.projector: nn.Module = mlp(widths, normalize=True) if config["dim"] else nn.Identity()
        self.rule: Rule = config.get("rule", "linear")
        self.multilabel = bool(config.get("multilabel", False))
        sides = (2,) if self.multilabel else ()
        self.register_buffer("prototypes", torch.zeros(len(self.classes), *sides, config["dim"]))
        self.view = EvalView(config["size"], config["crop"], tuple(config["mean"]), tuple(config["std"]))

    @classmethod
    def of(
        cls,
        encoder: ImageEncoder,
        name: str,
        classes: Sequence[str],
        weight: Tensor,
        *,
        rule: Rule = "linear",
        temperature: float = 1.0,
        crop: float = 0.875,
    ) -> "Classifier":
        """A classifier on the features of an encoder.

        Parameters
        ----------
        encoder : ImageEncoder
        name : str
            By which `image_encoder` builds it.
        classes : sequence of str
        weight : Tensor (C, D)
        rule : {"linear", "cosine", "distance"}
        temperature : float
        crop : float
            Share of a picture's sides that is looked at.

        Returns
        -------
        Classifier
            In evaluation mode.

        Examples
        --------
        >>> encoder = image_encoder("resnet8")
        >>> Classifier.of(encoder, "resnet8", ["cat", "dog"], torch.randn(2, 128), rule="cosine", temperature=0.1).classes
        ['cat', 'dog']
        """
        config = {
            "encoder": name, "num_features": encoder.num_features, "size": encoder.size, "crop": crop,
            "mean": list(encoder.mean), "std": list(encoder.std), "classes": list(classes), "hidden": 0, "dim": 0,
            "temperature": temperature, "rule": rule,
        }  # fmt: skip
        model = cls(config, encoder)
        with torch.no_grad():
            model.classifier.weight.copy_(weight)
        return model.eval()

    def logits(self, features: Tensor) -> Tensor:
        """What every class scores on features (N, D), (N, C)."""
        w: Tensor = self.classifier.weight
        scores: Tensor
        if self.rule == "cosine":
            scores = F.normalize(features, dim=1) @ F.normalize(w, dim=1).T / self.config["temperature"]
            return scores
        if self.rule == "distance":
            squares = features.square().sum(1, keepdim=True) - 2 * features @ w.T + w.square().sum(1)
            scores = -squares / self.config["temperature"]
            return scores
        scores = self.classifier(features)
        return scores

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (N, 3, S, S) to class probabilities (N, C)."""
        logits = self.logits(self.encoder(pixels))
        probabilities: Tensor = logits.sigmoid() if self.multilabel else logits.softmax(1)
        return probabilities

    def predict(self, pictures: Pictures, *, threshold: float = 0.0, batch_size: int = 64) -> Predictions:
        """Classify pictures, or say that they are unknown.

        Parameters
        ----------
        pictures : sequence
            Paths, encoded bytes, uint8 arrays (H, W, 3) or PIL images, mixed as you like.
        threshold : float
            The answer is "unknown" where no probability is above it; 0 = never. `evaluation.openset` shows what a value does.
            With several labels: a class is there when its probability is above it; 0 = one half.
        batch_size : int

        Returns
        -------
        Predictions
            A list of class names (or of lists of them), with `.probabilities` (N, C).

        Raises
        ------
        DataError
            If a file is not a picture; the message names it.
        """
        if isinstance(pictures, (str, bytes, Path)):
            raise UsageError("predict takes a list of pictures; put the single one into a list")
        if not 0 <= threshold <= 1:
            raise UsageError(f"threshold must be in [0, 1], got {threshold}")
        if threshold > 0 and UNKNOWN in self.classes and not self.multilabel:
            raise UsageError(f"a class is called {UNKNOWN!r} itself: leave threshold out, and use .probabilities")
        with torch.inference_mode():
            parts = [self(x) for x in self._batches(pictures, batch_size)]
        probabilities = torch.cat(parts) if parts else torch.zeros(0, len(self.classes))
        found = probabilities.cpu().numpy()
        if self.multilabel:
            there = found > (threshold or 0.5)
            return Predictions([[self.classes[c] for c in np.flatnonzero(row)] for row in there], found)
        answers = zip(found.argmax(1).tolist(), found.max(1).tolist(), strict=True) if parts else ()
        return Predictions([self.classes[i] if p > threshold or threshold == 0 else UNKNOWN for i, p in answers], found)

    def answers(self, pictures: Pictures, *, threshold: float = 0.0) -> dict[str, pa.Array]:
        """What `predict` says, as columns of a table: `label` (of several labels: a list) and the `confidence` in the surest."""
        found = self.predict(pictures, threshold=threshold)
        kind = pa.list_(pa.string()) if self.multilabel else pa.string()
        return {"label": pa.array(list(found), kind), "confidence": pa.array(found.probabilities.max(1, initial=0.0))}

    def embed(self, pictures: Pictures, *, batch_size: int = 64) -> npt.NDArray[np.float32]:
        """Unit embeddings (N, dim) in the space of the prototypes; without a projector, the raw features (N, D)."""
        with torch.inference_mode():
            parts = [self.projector(self.encoder(x)) for x in self._batches(pictures, batch_size)]
        width = self.config["dim"] or self.config["num_features"]
        return (torch.cat(parts) if parts else torch.zeros(0, width)).cpu().numpy()

    def export(self, path: str | Path) -> Path:
        """Write a `torch.export` program (pixels (N, 3, S, S) to probabilities), with any batch size.

        Returns
        -------
        Path
            The file; `torch.export.load(path).module()` runs it without this library.
        """
        example = torch.zeros(2, 3, self.config["size"], self.config["size"])
        program = torch.export.export(
            self.eval(), (example,), dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1, max=65536)}}
        )
        torch.export.save(program, path)
        return Path(path)

    def save(self, folder: str | Path, card: str = "") -> None:
        """Write `config.json`, `model.safetensors` and the model card into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self, folder / "model.safetensors")
        write_json(folder / "config.json", self.config)
        write_atomically(folder / "README.md", lambda path: path.write_text(card, encoding="utf-8"))

    def _batches(self, pictures: Pictures, batch_size: int) -> Iterator[Tensor]:
        device = self.classifier.weight.device
        for start in range(0, len(pictures), batch_size):
            pixels = [self.view(as_tensor(p)) for p in pictures[start : start + batch_size]]
            yield torch.stack(pixels).to(device)


def as_tensor(picture: Any) -> Tensor:
    """A picture in any form (path, encoded bytes, uint8 array (H, W, 3), PIL image) as uint8 (3, H, W)."""
    if isinstance(picture, (str, Path)):
        try:
            picture = decode_image(Path(picture).read_bytes())
        except DataError as error:
            raise DataError(str(error), file=str(picture)) from error
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", file=str(picture)) from error
    elif isinstance(picture, bytes):
        picture = decode_image(picture)
    array = np.array(picture.convert("RGB") if hasattr(picture, "convert") else picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UsageError(f"a picture must be uint8 (H, W, 3), got {array.dtype} {array.shape}")
    return torch.from_numpy(array).permute(2, 0, 1)


def load(folder: str | Path, *, device: str = "cpu") -> Classifier:
    """Load the model of a run for inference: ``contralto.load(run).predict(images)``.

    Parameters
    ----------
    folder : path
        A run folder, or its `model` folder.
    device : str

    Returns
    -------
    Classifier
        In evaluation mode.

    Raises
    ------
    DataError
        If there is no model in the folder.
    """
    folder = Path(folder)
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise DataError(
            "there is no model here (config.json and model.safetensors); is the run finished?", file=str(folder)
        )
    with naming(folder / "config.json"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _check_config(config)
        model = Classifier(config)
    load_weights(model, folder / "model.safetensors")
    if folder.name == "model":  # what people call classes that were found stands beside it
        model.classes = called(model.classes, read_names(folder.parent))
    return model.eval().to(device)


def _check_config(config: dict[str, Any]) -> None:
    """Refuse values that no model has, before anything of that size is made of them."""

    def number(value: Any, low: float, high: float) -> bool:
        return type(value) in (int, float) and low < value <= high  # NaN is neither

    sizes = [config[k] for k in ("num_features", "size")]
    right = {
        "sizes": all(type(s) is int and 0 < s <= MAX_SIZE for s in sizes),
        "hidden": type(config["hidden"]) is int and 0 <= config["hidden"] <= MAX_SIZE,
        "dim": type(config["dim"]) is int and 0 <= config["dim"] <= MAX_SIZE,
        "temperature": number(config["temperature"], 0, 1e6),
        "rule": config.get("rule", "linear") in ("linear", "cosine", "distance"),
        "crop": number(config["crop"], 0.05, 1),
        "mean": len(config["mean"]) == 3 and all(number(x, -1000, 1000) for x in config["mean"]),
        "std": len(config["std"]) == 3 and all(number(x, 0, 1000) for x in config["std"]),
        "classes": isinstance(config["classes"], list) and all(isinstance(c, str) for c in config["classes"]),
        "encoder": isinstance(config["encoder"], str),
    }
    wrong = [name for name, holds in right.items() if not holds]
    if wrong:
        raise ValueError(f"odd values of {', '.join(wrong)}")
