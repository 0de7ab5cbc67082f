"""The registry: every system by its name, with the problem it solves, the data it needs, and its paper."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from contralto.errors import UsageError

__all__ = ["SYSTEMS", "System", "get_job", "get_system"]


@dataclass(frozen=True)
class System:
    """An entry of the registry.

    Attributes
    ----------
    name : str
    title : str
        As the paper writes it.
    problem : str
        What it solves, in a few words.
    data : str
        What it needs.
    paper : str
    path : str
        ``module:class``.
    job : str
        ``module:class`` of the job behind ``contralto fit``; a job for many systems is made with the name of one.
    """

    name: str
    title: str
    problem: str
    data: str
    paper: str
    path: str
    job: str


SYSTEMS: dict[str, System] = {
    s.name: s
    for s in (
        System(
            name="capro",
            title="CAPro",
            problem="classifier, noise list and corrected labels from noisy web images",
            data="images with a web label each, texts, class definitions; clean test labels if there are any",
            paper="CAPro: Webly Supervised Learning with Cross-Modality Aligned Prototypes, NeurIPS 2023, arXiv 2310.09761",
            path="contralto.systems.webly.capro:CAPro",
            job="contralto.pipelines.capro:CAProJob",
        ),
        System(
            name="capro-multilabel",
            title="CAPro (multi-label)",
            problem="classifier of several labels and corrected sets of labels from noisy tags",
            data="images with tags or titles, class definitions; sets of right labels for testing if there are any",
            paper="CAPro: Webly Supervised Learning with Cross-Modality Aligned Prototypes, NeurIPS 2023, arXiv 2310.09761",
            path="contralto.systems.webly.capro_multilabel:CAProMultiLabel",
            job="contralto.pipelines.capro_multilabel:CAProMultiLabelJob",
        ),
        System(
            name="fopro",
            title="FoPro",
            problem="classifier, noise list and corrected labels from noisy web images, guided by a few labels of people",
            data="images with a web label each; a few images per class labelled by people (none will do); clean test labels",
            paper="FoPro: Few-Shot Guided Robust Webly-Supervised Prototypical Learning, AAAI 2023, arXiv 2212.00465",
            path="contralto.systems.webly.fopro:FoPro",
            job="contralto.pipelines.fopro:FoProJob",
        ),
        System(
            name="simclr",
            title="SimCLR",
            problem="encoder from unlabelled images",
            data="images; labels are only looked at",
            paper="A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020, arXiv 2002.05709",
            path="contralto.systems.selfsup.simclr:SimCLR",
            job="contralto.pipelines.pretrain:Pretraining",
        ),
        System(
            name="moco",
            title="MoCo v2",
            problem="encoder from unlabelled images",
            data="images; labels are only looked at",
            paper="Improved Baselines with Momentum Contrastive Learning, 2020, arXiv 2003.04297",
            path="contralto.systems.selfsup.moco:MoCo",
            job="contralto.pipelines.pretrain:Pretraining",
        ),
        System(
            name="byol",
            title="BYOL",
            problem="encoder from unlabelled images",
            data="images; labels are only looked at",
            paper="Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning, NeurIPS 2020, arXiv 2006.07733",
            path="contralto.systems.selfsup.byol:BYOL",
            job="contralto.pipelines.pretrain:Pretraining",
        ),
    )
}


def get_system(name: str) -> Any:
    """The class of a system.

    Examples
    --------
    >>> get_system("capro").__name__
    'CAPro'
    """
    return _load(name, "path")


def get_job(name: str) -> Any:
    """The job behind ``contralto fit`` for a system: a class with `fit`, `system` and its stages.

    Examples
    --------
    >>> get_job("fopro").fit.__name__
    'fit_fopro'
    """
    job = _load(name, "job")
    return job if hasattr(job, "name") else job(name)


def _load(name: str, attribute: str) -> Any:
    if name not in SYSTEMS:
        raise UsageError(f"no system is called {name!r}: there are {', '.join(SYSTEMS)}")
    module, _, found = getattr(SYSTEMS[name], attribute).partition(":")
    return getattr(import_module(module), found)
