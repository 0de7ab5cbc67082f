"""Contralto: learning by contrast and with prototypes from data as it is found.

``contralto.fit_capro(data, run)`` trains a classifier on noisy web images and says which of them are wrong;
``contralto.fit_fopro`` does so with a few labels by people;
``contralto.load(run).predict(images)`` uses it. ``contralto.clean_with_model(data, folder, embeddings=...)`` says
which labels are wrong by the features of a model that you have. Everything else is in submodules, loaded when asked for.
"""

from importlib import import_module, metadata
from typing import Any

__all__ = ["clean_with_model", "fit_capro", "fit_fopro", "load", "load_preset"]

__version__ = metadata.version("contralto")

_LAZY = {
    "clean_with_model": "contralto.pipelines.cleaning",
    "load": "contralto.pipelines.loading",
    "fit_capro": "contralto.pipelines.capro",
    "fit_fopro": "contralto.pipelines.fopro",
    "load_preset": "contralto.pipelines.job",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'contralto' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
