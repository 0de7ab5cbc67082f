"""What a finished run learnt, for use: only what this kind of run needs is imported, so no training stack for a classifier."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from contralto.files import naming
from contralto.systems.classifier import Classifier
from contralto.systems.classifier import load as load_classifier

if TYPE_CHECKING:
    from contralto.pipelines.embedding import Embedder
    from contralto.pipelines.regression import Regressor
    from contralto.pipelines.speech import SpeechModel

__all__ = ["load"]


def load(folder: str | Path, *, device: str = "cpu") -> "Classifier | Embedder | Regressor | SpeechModel":
    """Load what a run learnt: ``contralto.load(run).predict(images)``, of a regressor also rows, ``.write(sounds)``, ``.embed``.

    Parameters
    ----------
    folder : path
        A run folder, or its `model` folder where it has one.
    device : str

    Returns
    -------
    Classifier, Embedder, Regressor or SpeechModel
        In evaluation mode.

    Raises
    ------
    DataError
        If there is nothing finished in the folder, or it is damaged.
    """
    folder = Path(folder)
    model = folder / "model" if (folder / "model").is_dir() else folder
    if (model / "speech.json").is_file():
        from contralto.pipelines.speech import load_speech

        return load_speech(folder, device=device)
    if (folder / "built.json").is_file():
        from contralto.pipelines.embedding import load_embedder

        return load_embedder(folder, device=device)
    if _tells_a_number(model / "config.json"):
        from contralto.pipelines.regression import load_regressor

        return load_regressor(folder, device=device)
    return load_classifier(folder, device=device)


def _tells_a_number(path: Path) -> bool:
    """Whether the model of this description has a number to tell in place of classes."""
    if not path.is_file():
        return False
    with naming(path):
        return "target" in json.loads(path.read_text(encoding="utf-8"))
