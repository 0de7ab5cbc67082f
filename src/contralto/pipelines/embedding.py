"""A pretrained system in use: embeddings of pictures, and how good they are by labels that it never saw."""

import inspect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from contralto.data.images import decode_image
from contralto.data.ingest import ingest
from contralto.data.manifest import Manifest
from contralto.encoders.image import image_encoder
from contralto.errors import DataError, UsageError
from contralto.evaluation.classification import accuracy_interval
from contralto.evaluation.representation import (
    alignment,
    clustering_nmi,
    effective_rank,
    knn_right,
    probe_right,
    uniformity,
)
from contralto.files import load_weights, naming
from contralto.review.encoder import write_encoder_report
from contralto.systems.base import EncoderSystem
from contralto.systems.classifier import as_tensor
from contralto.systems.registry import get_system
from contralto.views.image import EvalView, draw_views, strong_view, view_generator

__all__ = ["Embedder", "evaluate_encoder", "load_embedder", "report_encoder"]

Array = npt.NDArray[Any]
CROP = 0.875


class Embedder:
    """A pretrained system that embeds pictures.

    Parameters
    ----------
    system : EncoderSystem
        Trained; its encoder knows the size and normalisation of pictures.
    """

    kind: ClassVar[Literal["image"]] = "image"

    def __init__(self, system: EncoderSystem) -> None:
        self.system = system.eval()
        encoder: Any = system.encoder
        self.view = EvalView(encoder.size, CROP, tuple(encoder.mean), tuple(encoder.std))

    def embed(self, pictures: Sequence[Any], *, batch_size: int = 64) -> npt.NDArray[np.float32]:
        """Raw embeddings (N, F) of pictures: paths, encoded bytes, uint8 arrays (H, W, 3) or PIL images."""
        parts = (pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size))
        return self.embed_pixels(torch.stack([self.view(as_tensor(p)) for p in part]) for part in parts)

    def embed_pixels(self, batches: Iterable[Tensor]) -> npt.NDArray[np.float32]:
        """Raw embeddings (N, F) of batches of normalised pixels (B, 3, S, S)."""
        with torch.inference_mode():
            found = [self.system.embed(x.to(self.system.steps.device)).float().cpu().numpy() for x in batches]
        return np.concatenate(found) if found else np.zeros((0, self.system.num_features), np.float32)

    def predict(self, pictures: Sequence[Any], **_: Any) -> Any:
        """There are no classes to predict.

        Raises
        ------
        UsageError
        """
        raise UsageError(
            "a pretrained encoder knows no classes: use `contralto embed`, or `contralto evaluate` with labels"
        )

    answers = predict

    def to(self, device: str) -> "Embedder":
        """Move to a device."""
        self.system.to(device)
        return self


def load_embedder(folder: str | Path, *, device: str = "cpu") -> Embedder:
    """The trained system of a run folder, in evaluation mode.

    Raises
    ------
    DataError
        If it is not finished, or damaged.
    """
    folder = Path(folder)
    if not (folder / "built.json").is_file():
        raise DataError("there is no pretrained encoder here (built.json); is the run finished?", file=str(folder))
    with naming(folder / "built.json"):
        built = dict(json.loads((folder / "built.json").read_text(encoding="utf-8")))
    with naming(folder / "config.json"):
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        system = get_system(config["system"])
        arguments = config["arguments"]
        encoder = image_encoder(arguments["image_encoder"], pretrained=False, size=built["size"])
        encoder.mean, encoder.std = tuple(built["mean"]), tuple(built["std"])
        names = inspect.signature(system).parameters
        facts = {k: v for k, v in built.items() if k in names}
        module = system(encoder, **{k: v for k, v in arguments.items() if k in names}, **facts)
    load_weights(module, folder / "training" / "weights.safetensors")
    return Embedder(module).to(device)


def evaluate_encoder(
    model: Embedder,
    data: str,
    *,
    label_column: str | None = None,
    image_column: str | None = None,
    group_column: str | None = None,
    split: str | None = None,
    k: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure embeddings by labels: linear probe, nearest neighbours, clustering, and what needs no labels.

    Parameters
    ----------
    model : Embedder
    data : str
        Pictures with labels.
    label_column, image_column, group_column : str, optional
        Columns, where their names are not common ones.
    split : str, optional
        The pictures that are tested; the others are learnt from. By default `test` if there is one, else a fifth, drawn by `seed`
        with pictures of one group together.
    k : int
        Neighbours.
    seed : int

    Returns
    -------
    dict
        `probe`, `knn` (accuracies with 95 % intervals by bootstrap over test pictures or groups), `nmi`, `uniformity`,
        `alignment` (of the embeddings of two views of the test pictures), `effective_rank`.

    Raises
    ------
    DataError
        If there are not two classes with a label in both parts.
    """
    manifest = ingest(
        data, label_column=label_column, image_column=image_column, group_column=group_column, image_filter=False
    )
    labels, groups = manifest.right_labels, manifest.column("group").astype(str)
    wanted, tested = manifest.split_of(split)
    if wanted is None:
        tested = _a_fifth(groups, seed)
    learn, test = (np.flatnonzero(part & (labels >= 0)) for part in (~tested, tested))
    if len(learn) < 2 or len(test) < 1 or len(np.unique(labels[learn])) < 2:
        raise DataError(
            f"a probe needs pictures of two classes at least to learn from, and some to test; found {len(learn)} and "
            f"{len(test)} with labels",
            file=data,
        )
    rows = np.concatenate([learn, test])
    pictures = [manifest.read_bytes(int(r)) for r in rows]
    embedded = model.embed(pictures)
    parts = (embedded[: len(learn)], labels[learn], embedded[len(learn) :], labels[test])
    result: dict[str, Any] = {"learnt_from": len(learn), "tested": len(test), "split": wanted}
    for name, right in (("probe", probe_right(*parts)), ("knn", knn_right(*parts, k=k))):
        value = accuracy_interval(right, labels[test], groups=groups[test])
        result |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    views = [_views(model, pictures[len(learn) :][:2000], variant) for variant in range(2)]
    return result | {
        "nmi": clustering_nmi(parts[2], parts[3], seed=seed),
        "uniformity": uniformity(parts[2]),
        "alignment": alignment(*views),
        "effective_rank": effective_rank(parts[2]),
    }


def report_encoder(run: str | Path, *, out: str | Path | None = None, most: int = 600, seed: int = 0) -> Path:
    """Write the report of a finished pretraining, with at most so many of its pictures.

    Examples
    --------
    >>> report_encoder("nowhere")
    Traceback (most recent call last):
    ...
    contralto.errors.DataError: nowhere: there is no pretrained encoder here (built.json); is the run finished?
    """
    model = load_embedder(run)
    manifest = Manifest.load(Path(run) / "manifest")
    rows = np.sort(np.random.default_rng(seed).permutation(len(manifest))[:most])
    pictures = [decode_image(manifest.read_bytes(int(row))) for row in rows]
    names = manifest.class_names
    labels = [names[c] if c >= 0 else "" for c in manifest.labels[rows]]
    ids = [str(i) for i in manifest.column("id")[rows]]
    return write_encoder_report(run, model.embed(pictures), pictures, ids, labels, out=out, seed=seed)


def _a_fifth(groups: Array, seed: int) -> npt.NDArray[np.bool_]:
    """A fifth of all rows, those of a group together."""
    alone = np.where(groups == "", np.char.add("#", np.arange(len(groups)).astype(str)), groups)
    names, inverse = np.unique(alone, return_inverse=True)
    return np.asarray((np.random.default_rng(seed).random(len(names)) < 0.2)[inverse])


def _views(model: Embedder, pictures: list[bytes], variant: int) -> Array:
    """Embeddings of a random view of pictures: the same view whatever the system was trained on."""
    view = strong_view(model.view.size, model.view.mean, model.view.std)
    drawn = [draw_views(p, [view], [view_generator(0, variant, row, 0)])[0] for row, p in enumerate(pictures)]
    return model.embed_pixels(torch.stack(drawn).split(64))
