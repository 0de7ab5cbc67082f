"""Multistage contrastive learning over a run folder: every stage is a training of its own, which goes on where it stopped.

Beside what `Pretraining` leaves, the folder holds `stages/stage0`, `stages/stage1`, ... (trainings, all but the last),
`stages/codes0.npy`, ... (from which the stage after draws its batches) and what is known of them in `metrics.json`. The last
stage is `training`: it knows the encoders of all stages before, so that the run embeds by all of them.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import track

from contralto.cluster import map_blocks
from contralto.data.grouped import GroupBatchSampler
from contralto.encoders.features import EncodePictures, device_of
from contralto.encoders.image import ImageEncoder, concatenate
from contralto.encoders.pictures import picture_blocks
from contralto.files import naming
from contralto.pipelines.embedding import CROP
from contralto.pipelines.pretrain import Pretraining
from contralto.systems.selfsup.base import SelfSupervised
from contralto.systems.selfsup.mcl_multistage import MultiStage, first_weights, stage_seed, train_in_stages
from contralto.views.image import EvalView

__all__ = ["Stages"]

Integers = npt.NDArray[np.int64]


class Stages(Pretraining):
    """The job behind ``contralto fit mcl_multistage``."""

    def learn(self) -> SelfSupervised:
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

    def order(self, module: SelfSupervised) -> dict[str, Any]:
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
        self.console.print(
            f"  {report['codes']:.0f} codes, {report['full_codes']:.0f} with a full batch, {report['covered']:.0%} of the "
            f"pictures in those; cosine {report['cosine_within']:.2f} within a batch, {report['cosine']:.2f} over all",
            highlight=False,
            soft_wrap=True,
        )
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
