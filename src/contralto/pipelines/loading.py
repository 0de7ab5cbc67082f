"""What a finished run learnt, for use: only what this kind of run needs is imported, so no training stack for a classifier."""

from pathlib import Path
from typing import TYPE_CHECKING

from contralto.systems.classifier import Classifier
from contralto.systems.classifier import load as load_classifier

if TYPE_CHECKING:
    from contralto.pipelines.embedding import Embedder

__all__ = ["load"]


def load(folder: str | Path, *, device: str = "cpu") -> "Classifier | Embedder":
    """Load what a run learnt: ``contralto.load(run).predict(images)``, or ``.embed(images)`` of a pretrained encoder.

    Parameters
    ----------
    folder : path
        A run folder; of a classifier, its `model` folder serves too.
    device : str

    Returns
    -------
    Classifier or Embedder
        In evaluation mode.

    Raises
    ------
    DataError
        If there is nothing finished in the folder, or it is damaged.
    """
    if not (Path(folder) / "built.json").is_file():
        return load_classifier(folder, device=device)
    from contralto.pipelines.embedding import load_embedder

    return load_embedder(folder, device=device)
