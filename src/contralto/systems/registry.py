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


def _encoder(
    name: str,
    title: str,
    path: str,
    problem: str,
    paper: str,
    *,
    data: str = "images; labels are only looked at",
    job: str = "contralto.pipelines.pretrain:Pretraining",
) -> System:
    """An entry of a self-supervised system."""
    return System(name, title, problem, data, paper, f"contralto.systems.selfsup.{path}", job)


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
        _encoder(
            "simclr",
            "SimCLR",
            "simclr:SimCLR",
            "encoder from unlabelled images",
            "A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020, arXiv 2002.05709",
        ),
        _encoder(
            "moco",
            "MoCo v2",
            "moco:MoCo",
            "encoder from unlabelled images, small batches",
            "Improved Baselines with Momentum Contrastive Learning, 2020, arXiv 2003.04297",
        ),
        _encoder(
            "byol",
            "BYOL",
            "byol:BYOL",
            "encoder from unlabelled images, without negatives",
            "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning, NeurIPS 2020, arXiv 2006.07733",
        ),
        _encoder(
            "swav",
            "SwAV",
            "swav:SwAV",
            "encoder and clusters from unlabelled images, several crops of each",
            "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, NeurIPS 2020, arXiv 2006.09882",
        ),
        _encoder(
            "dcl",
            "DCL",
            "dcl:DecoupledContrast",
            "encoder from unlabelled images, small batches and few epochs",
            "Decoupled Contrastive Learning, ECCV 2022, arXiv 2110.06848",
        ),
        _encoder(
            "isogclr",
            "iSogCLR",
            "isogclr:ISogCLR",
            "encoder from unlabelled images with a long tail, a temperature for every image",
            "Not All Semantics are Created Equal: "
            "Contrastive Self-supervised Learning with Automatic Temperature Individualization, ICML 2023, arXiv 2305.11965",
        ),
        _encoder(
            "cacr",
            "CACR",
            "cacr:CACR",
            "encoder from unlabelled images, several views of each",
            "Contrastive Attraction and Contrastive Repulsion for Representation Learning, TMLR 2023, arXiv 2105.03746",
        ),
        _encoder(
            "groco",
            "GroCo",
            "groco:GroCo",
            "encoder from unlabelled images whose nearest neighbours are right",
            "Learning by Sorting: Self-supervised Learning with Group Ordering Constraints, ICCV 2023, arXiv 2301.02009",
        ),
        _encoder(
            "contrastive_behaviour",
            "behaviour of contrastive loss",
            "contrastive_behaviour:ContrastiveBehaviour",
            "four losses that tell softmax from hardness, and instruments for any encoder",
            "Understanding the Behaviour of Contrastive Loss, CVPR 2021, arXiv 2012.09740",
        ),
        _encoder(
            "projection_head",
            "projection head",
            "projection_head:ProjectionHead",
            "encoder with a head of a chosen kind, and what the head keeps from it",
            "Investigating the Benefits of Projection Head for Representation Learning, ICLR 2024, arXiv 2403.11391",
        ),
        _encoder(
            "hydra",
            "Hydra",
            "hydra:Hydra",
            "encoder and relations of classes, from positive pairs of different classes",
            "Rethinking Positive Pairs in Contrastive Learning, 2024, arXiv 2410.18200",
            data="images with labels",
        ),
        _encoder(
            "pixpro",
            "PixPro",
            "pixpro:PixPro",
            "encoder with good feature maps, for detection and segmentation",
            "Propagate Yourself: "
            "Exploring Pixel-Level Consistency for Unsupervised Visual Representation Learning, CVPR 2021, arXiv 2011.10043",
        ),
        _encoder(
            "adainf",
            "AdaInf",
            "adainf:AdaInf",
            "encoder from real images and many generated ones",
            "Do Generated Data Always Help Contrastive Learning?, ICLR 2024, arXiv 2403.12448",
            data="images, and generated images of the same kind",
            job="contralto.pipelines.inflated:Inflated",
        ),
        _encoder(
            "mcl_multistage",
            "MCL",
            "mcl_multistage:MultiStage",
            "encoders in stages, each for what the ones before left out",
            "Learning the Unlearned: Mitigating Feature Suppression in Contrastive Learning, ECCV 2024, arXiv 2402.11816",
            job="contralto.pipelines.multistage:Stages",
        ),
        _encoder(
            "cmim",
            "cMIM",
            "cmim:CMIM",
            "encoder and decoder without augmentation",
            "cMIM: A Contrastive Mutual Information Framework for Unified Generative and Discriminative Representation "
            "Learning, 2025, arXiv 2502.19642",
        ),
        _encoder(
            "sepclr",
            "SepCLR",
            "sepclr:SepCLR",
            "what two sets of images share, and what only one of them shows",
            "Separating common from salient patterns with Contrastive Representation Learning, ICLR 2024, arXiv 2402.11928",
            data="images with one of two labels: background and target",
        ),
        *(
            System(
                name=name,
                title=title,
                problem="new classes among images of which some have labels; how many, and which",
                data="images, some with the label of an old class",
                paper=paper,
                path=f"contralto.systems.discovery.{path}",
                job="contralto.pipelines.discovery:Discovery",
            )
            for name, title, path, paper in (
                (
                    "gcd",
                    "GCD",
                    "base:DiscoverySystem",
                    "Generalized Category Discovery, CVPR 2022, arXiv 2201.02609",
                ),
                (
                    "protogcd",
                    "ProtoGCD",
                    "protogcd:ProtoGCD",
                    "ProtoGCD: Unified and Unbiased Prototype Learning for Generalized Category Discovery, "
                    "TPAMI 2025, arXiv 2504.03755",
                ),
                (
                    "gpc",
                    "GPC",
                    "gpc:GPC",
                    "Learning Semi-supervised Gaussian Mixture Models for Generalized Category Discovery, "
                    "ICCV 2023, arXiv 2305.06144",
                ),
            )
        ),
        *(
            System(
                name=name,
                title=title,
                problem=problem,
                data="images with labels",
                paper=paper,
                path=f"contralto.systems.continual.{path}",
                job="contralto.pipelines.continual:Continual",
            )
            for name, title, path, problem, paper in (
                (
                    "prd",
                    "PRD",
                    "prd:PRD",
                    "classes learnt task by task, of which no sample is kept",
                    "Prototype-Sample Relation Distillation: Towards Replay-Free Continual Learning, "
                    "ICML 2023, arXiv 2303.14771",
                ),
                (
                    "lwf",
                    "LwF",
                    "baselines:LwF",
                    "classes learnt task by task, by the answers of the model before",
                    "Learning without Forgetting, ECCV 2016, arXiv 1606.09282",
                ),
                (
                    "replay",
                    "replay",
                    "baselines:Replay",
                    "classes learnt task by task, with a few samples of those before",
                    "On Tiny Episodic Memories in Continual Learning, 2019, arXiv 1902.10486",
                ),
                (
                    "finetune",
                    "fine-tuning task by task",
                    "baselines:FineTuning",
                    "what is forgotten if nothing is done about it",
                    "lower bound of continual learning",
                ),
                (
                    "joint",
                    "joint training",
                    "baselines:Joint",
                    "what could be known if all samples were kept",
                    "upper bound of continual learning",
                ),
            )
        ),
        *(
            System(
                name=name,
                title=title,
                problem=problem,
                data="images with labels, of which some classes are kept for testing",
                paper=paper,
                path=f"contralto.systems.fewshot.{path}",
                job="contralto.pipelines.fewshot:FewShotJob",
            )
            for name, title, path, problem, paper in (
                (
                    "susana",
                    "SuSana",
                    "susana:SuSana",
                    "encoder for new classes of which a few images are known, with margins between classes",
                    "SuSana Distancia is all you need: Enforcing class separability in metric learning via two novel "
                    "distance-based loss functions for few-shot image classification, 2023, arXiv 2305.09062",
                ),
                (
                    "protonet",
                    "prototypical network",
                    "protonet:ProtoNet",
                    "encoder for new classes of which a few images are known",
                    "Prototypical Networks for Few-shot Learning, NeurIPS 2017, arXiv 1703.05175",
                ),
                (
                    "base_classifier",
                    "classifier of base classes",
                    "base_classifier:BaseClassifier",
                    "encoder for new classes, learnt by classifying others",
                    "A Closer Look at Few-shot Classification, ICLR 2019, arXiv 1904.04232",
                ),
            )
        ),
        System(
            name="coconut",
            title="COCONUT",
            problem="spoken language understood task by task, with a few recordings kept of those before",
            data="recordings with a label and a text each",
            paper="Continual Contrastive Spoken Language Understanding, ACL Findings 2024, arXiv 2310.02699",
            path="contralto.systems.continual.coconut:COCONUT",
            job="contralto.pipelines.speech:SpeechJob",
        ),
        System(
            name="core_tuning",
            title="Core-tuning",
            problem="classifier from a pretrained encoder, with contrast on mixed features",
            data="images with labels",
            paper="Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning, "
            "NeurIPS 2021, arXiv 2102.06605",
            path="contralto.systems.finetuning.core_tuning:CoreTuning",
            job="contralto.pipelines.finetuning:FineTuningJob",
        ),
        System(
            name="finetuning",
            title="fine-tuning",
            problem="classifier from a pretrained encoder",
            data="images with labels",
            paper="cross-entropy, the baseline of Core-tuning; with supervised contrast, NeurIPS 2020, arXiv 2004.11362",
            path="contralto.systems.finetuning.base:FineTuning",
            job="contralto.pipelines.finetuning:FineTuningJob",
        ),
        System(
            name="supremix",
            title="SupReMix",
            problem="encoder for a number, by contrast with mixed embeddings",
            data="images or rows of numbers, each with a number to predict",
            paper="Mixup Your Own Pairs, 2023, arXiv 2309.16633",
            path="contralto.systems.regression.supremix:SupReMix",
            job="contralto.pipelines.regression:RegressionJob",
        ),
        System(
            name="tmv_hlp",
            title="TMV-HLP",
            problem="classes of all unlabelled images at once, from a few labelled ones or from words",
            data="images, a few of each class with labels; or names and definitions of the classes",
            paper="Transductive Multi-view Zero-Shot Learning, TPAMI 2015, arXiv 1501.04560",
            path="contralto.systems.zeroshot.tmv_hlp:TMVHLP",
            job="contralto.pipelines.transductive:Transductive",
        ),
        System(
            name="sentence-mim",
            title="SentenceMIM",
            problem="encoder and writer of sentences, from texts alone",
            data="texts: lines, or a column of JSON lines, CSV or Parquet",
            paper="SentenceMIM: A Latent Variable Language Model, 2020, arXiv 2003.02645; cMIM, 2025, arXiv 2502.19642",
            path="contralto.systems.text.sentence_mim:SentenceMIM",
            job="contralto.pipelines.sentences:SentenceJob",
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
