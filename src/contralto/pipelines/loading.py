"""What a finished run learnt, for use: only what this kind of run needs is imported, so no training stack for a classifier."""

from pathlib import Path
from typing import TYPE_CHECKING

from contralto.systems.classifier import Classifier
from contralto.systems.classifier import load as load_classifier

if TYPE_CHECKING:
    from contralto.pipelines.embedding import Embedder
    from contralto.pipelines.speech import SpeechModel

__all__ = ["load"]


def load(folder: str | Path, *, device: str = "cpu") -> "Classifier | Embedder | SpeechModel":
    """Load what a run learnt: ``contralto.load(run).predict(images)``, ``.embed(images)`` of an encoder, ``.write(sounds)``.

    Parameters
    ----------
    folder : path
        A run folder; of a classifier, its `model` folder serves too.
    device : str

    Returns
    -------
    Classifier, Embedder or SpeechModel
        In evaluation mode.

    Raises
    ------
    DataError
        If there is nothing finished in the folder, or it is damaged.
    """
    if any((Path(folder) / name).is_file() for name in ("speech.json", "model/speech.json")):
        from contralto.pipelines.speech import load_speech

        return load_speech(folder, device=device)
    if not (Path(folder) / "built.json").is_file():
        return load_classifier(folder, device=device)
    from contralto.pipelines.embedding import load_embedder

    return load_embedder(folder, device=device)
