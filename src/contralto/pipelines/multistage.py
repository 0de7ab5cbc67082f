"""Multistage contrastive learning over a run folder: every stage is a training of its own, which goes on where it stopped.

Beside what `Pretraining` leaves, the folder holds `stages/stage0`, `stages/stage1`, ... (trainings, all but the last),
`stages/codes0.npy`, ... (from which the stage after draws its batches) and what is known of them in `metrics.json`. The last
stage is `training`: it knows the encoders of all stages before, so that the run embeds by all of them.

`fit_dual_stages` is the form for pairs of images and texts, over any dual encoder: CLIP, or a small one of one's own.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader, Dataset

from contralto.cluster import map_blocks
from contralto.data.dataset import EpochSampler
from contralto.data.grouped import GroupBatchSampler
from contralto.encoders.features import EncodePictures, device_of
from contralto.encoders.image import ImageEncoder, concatenate
from contralto.encoders.pictures import picture_blocks
from contralto.files import naming
from contralto.pipelines.embedding import CROP
from contralto.pipelines.pretrain import Pretraining
from contralto.systems.base import EncoderSystem
from contralto.systems.selfsup.mcl_multistage import (
    DualStage,
    DualStages,
    MultiStage,
    first_weights,
    stage_seed,
    train_in_stages,
)
from contralto.training.fit import fit_stage
from contralto.views.image import EvalView

__all__ = ["Stages", "fit_dual_stages"]

Integers = npt.NDArray[np.int64]


class Stages(Pretraining):
    """The job behind ``contralto fit mcl_multistage``."""

    def learn(self) -> EncoderSystem:
        """All stages, one after the other; the last one holds the encoders of the others."""
        a = self.arguments
        self._codes: Integers | None = None
        self._of_data = self.fingerprint
        self.found = train_in_stages(
            self.stage,
            self.embed,
            stages=a["stages"],
            clusters=a["clusters"],
            batch_size=min(a["batch_size"], len(self.labels)),
            seed=a["seed"],
            keep=self.out / "stages",
        )
        return self.found[-1].learnt

    def stage(self, number: int, codes: Integers | None, before: list[MultiStage]) -> MultiStage:
        """Train the learner of one stage, or load or continue it."""
        a = self.arguments
        module = self.build(stage=number, seed=stage_seed(a["seed"], number))
        assert isinstance(module, MultiStage)
        for encoder, learnt in zip(module.earlier, before, strict=True):
            encoder.load_state_dict(learnt.encoder.state_dict())
        start = first_weights(self.encoder, [m.encoder for m in before], a["init"], a["seed"])
        module.encoder.load_state_dict(start.state_dict())
        self._codes = codes
        self.fingerprint = self._of_data
        if codes is not None:
            self.tell(self.report_of(number))
            text = f"{self._of_data} {number} {hashlib.sha256(codes.tobytes()).hexdigest()}"
            self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        last = number == a["stages"] - 1
        self.train(module, self.out / "training" if last else self.out / "stages" / f"stage{number}")
        return module

    def order(self, module: EncoderSystem) -> dict[str, Any]:
        """Batches of one code each, as many as there are without codes."""
        if self._codes is None:
            return super().order(module)
        sampler = GroupBatchSampler(
            self._codes,
            min(self.arguments["batch_size"], len(self.labels)),
            seed=module.seed,
            batches=module.steps_per_epoch,
            smallest=self.arguments["smallest"],
        )
        return {"batch_sampler": sampler}

    def embed(self, module: MultiStage) -> npt.NDArray[np.float16]:
        """What the training pictures are clustered by (N, D): as they are, without augmentation, by this stage alone."""
        encoder, a = module.encoder, self.arguments
        assert isinstance(encoder, ImageEncoder)
        view = EvalView(encoder.size, CROP, encoder.mean, encoder.std)
        device = device_of(a["accelerator"], a["on"])
        setup = (module.to_cluster().eval(), device, self.manifest.root, view)
        blocks = picture_blocks(self.manifest, self.rows)
        parts: Iterable[Any] = map_blocks(EncodePictures, blocks, on=a["on"], setup=setup, gpu=device == "cuda")
        terminal = self.progress and self.console.is_terminal
        told = f"  embedding by stage {module.stage}"
        found = list(track(parts, told, console=self.console, transient=True, disable=not terminal, total=len(blocks)))
        return np.concatenate(found)

    def report_of(self, number: int) -> dict[str, float]:
        """What stage `number` has to draw its batches from (`pool_report`)."""
        path = self.out / "stages" / f"codes{number - 1}.json"
        with naming(path):
            return dict(json.loads(path.read_text(encoding="utf-8")))

    def tell(self, report: dict[str, float]) -> None:
        """Say what the next stage draws from, and what to do if that is little."""
        told = (
            f"  {report['codes']:.0f} codes, {report['full_codes']:.0f} with a full batch, {report['covered']:.0%} of the "
            f"pictures in those; cosine {report['cosine']:.2f} over all"
        )
        if "cosine_within" in report:
            told += f", {report['cosine_within']:.2f} within a batch"
        self.console.print(told, highlight=False, soft_wrap=True)
        if report["covered"] < 0.5 and self.arguments["smallest"] is None:
            self.console.print(
                "  most pictures are in no full batch: a smaller --batch_size or fewer --clusters use more of them, and "
                "--smallest 8 takes what is left of a code as a batch",
                soft_wrap=True,
            )

    def whole(self) -> ImageEncoder:
        """The encoders of all stages side by side."""
        module: Any = self.module
        return concatenate([*module.earlier, module.encoder], normalize=module.unit_stages)

    def last_metrics(self) -> dict[str, Any]:
        """The last line of the log, and of every stage its first and last loss and what it drew from."""
        stages = []
        for number, stage in enumerate(self.found):
            last = number == len(self.found) - 1
            log = (self.out / "training" if last else self.out / "stages" / f"stage{number}") / "metrics.jsonl"
            with naming(log):
                lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
                losses = {
                    name: json.loads(lines[i])["loss"] for name, i in (("first_loss", 0), ("last_loss", -1)) if lines
                }
            stages.append(losses | stage.report)
        return super().last_metrics() | {"stages": stages}


def fit_dual_stages(
    dual: nn.Module,
    pairs: Dataset[Any],
    out: str | Path,
    *,
    num_features: int,
    stages: int = 4,
    pretrained: bool = True,
    clusters: int = 10,
    batch_size: int = 1000,
    smallest: int | None = None,
    epochs: int = 20,
    lr: float = 5e-4,
    weight_decay: float = 0.2,
    warmup: int = 600,
    init: Literal["base", "previous"] = "base",
    prepare: Callable[[nn.Module], None] | None = None,
    plain: Dataset[Any] | None = None,
    seed: int = 0,
    workers: int = 0,
    progress: bool = True,
    trainer: Mapping[str, Any] | None = None,
) -> DualStages:
    """Fine-tune a dual encoder in stages, each on batches of pairs whose images the stages before found alike.

    Parameters
    ----------
    dual : nn.Module
        Has `encode_image` and `encode_text`, which give raw embeddings (N, D), as models of open_clip do; it stays as it is.
    pairs : Dataset
        ``pairs[epoch, row]`` is a dict of `views` (image and text, as the encoder takes them) and `index`, the row.
    out : path
        Folder of this training; called again with the same arguments, it goes on where it stopped.
    num_features : int
        D.
    stages : int
        Encoders in the end; the paper has the pretrained one and up to three more.
    pretrained : bool
        The first stage is `dual` as it is; else it is trained first, on ordinary batches.
    clusters, smallest, init
        See `MultiStage`; every stage starts with the weights of `dual` ("base") or of the stage before.
    batch_size, epochs, lr, weight_decay, warmup
        See `DualStage`; an epoch takes every pair at most once.
    prepare : function, optional
        Called with the copy of `dual` that a stage starts with, to lock parts of it. As in the paper, for open_clip:
        ``lambda clip: (clip.lock_text_tower(), clip.lock_image_tower(unlocked_groups=6))``.
    plain : Dataset, optional
        Like `pairs`, without augmentation, to cluster by; default: `pairs`.
    seed, workers, progress
    trainer : mapping, optional
        Flags for `lightning.Trainer`.

    Returns
    -------
    DualStages
        In evaluation mode.
    """
    out, count = Path(out), len(pairs)  # type: ignore[arg-type]
    settings = [
        count,
        num_features,
        pretrained,
        clusters,
        batch_size,
        smallest,
        epochs,
        lr,
        weight_decay,
        warmup,
        init,
        seed,
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for value in dual.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    flags = {"accelerator": "auto", **(trainer or {})}
    device = device_of(flags["accelerator"])
    size = min(batch_size, count)

    def train(stage: int, codes: Integers | None, before: list[nn.Module]) -> nn.Module:
        encoder = first_weights(lambda _: copy.deepcopy(dual), before, init, seed)
        if stage == 0 and pretrained:
            return encoder.eval()
        if prepare is not None:
            prepare(encoder)
        own = stage_seed(seed, stage)
        order: dict[str, Any] = {"batch_size": size, "sampler": EpochSampler(count, seed=own), "drop_last": True}
        steps = count // size
        if codes is not None:
            sampler = GroupBatchSampler(codes, size, seed=own, smallest=smallest)
            order, steps = {"batch_sampler": sampler}, len(sampler)
        module = DualStage(
            encoder, num_features=num_features, num_samples=count, steps_per_epoch=steps, seed=own, epochs=epochs,
            batch_size=batch_size, lr=lr, weight_decay=weight_decay, warmup=warmup,
        )  # fmt: skip
        of_stage = f"{digest.hexdigest()} {stage} " + (
            "" if codes is None else hashlib.sha256(codes.tobytes()).hexdigest()
        )
        fit_stage(
            module, DataLoader(pairs, num_workers=workers, **order), out / f"stage{stage}", epochs=epochs,
            fingerprint=hashlib.sha256(of_stage.encode()).hexdigest()[:16], progress=progress, trainer=flags,
        )  # fmt: skip
        return module.encoder

    def embed(encoder: Any) -> npt.NDArray[np.float32]:
        encoder.to(device).eval()
        keys: Any = [(0, row) for row in range(count)]
        loader = DataLoader(pairs if plain is None else plain, batch_size=size, sampler=keys, num_workers=workers)
        with torch.inference_mode():
            return np.concatenate(
                [encoder.encode_image(b["views"][0].to(device)).float().cpu().numpy() for b in loader]
            )

    keep = (
        out / f"codes-{digest.hexdigest()[:16]}"
    )  # a folder may hold codes of other settings, whose trainings are refused
    found = train_in_stages(train, embed, stages=stages, clusters=clusters, batch_size=size, seed=seed, keep=keep)
    return DualStages([s.learnt for s in found]).eval()
