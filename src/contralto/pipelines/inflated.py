"""Pretraining on real pictures and on generated ones, which are drawn less often (AdaInf)."""

import hashlib
from typing import Any

import numpy as np

from contralto.data.manifest import Manifest
from contralto.data.mixture import MixtureSampler, source_shares
from contralto.errors import DataError
from contralto.pipelines.pretrain import Pretraining
from contralto.systems.base import EncoderSystem

__all__ = ["Inflated"]


class Inflated(Pretraining):
    """The job behind ``contralto fit adainf``.

    An epoch is as many draws as there are real pictures, and the run is as long with generated pictures as without. Generated
    pictures have the label -1, whatever folders they lie in: online probe and neighbours leave them out.
    """

    generated: Manifest | None = None

    def ingest(self) -> None:
        """Read the real pictures, and the generated ones after them.

        Raises
        ------
        DataError
            If no generated picture can be used, or one is a real picture that is kept for testing.
        """
        super().ingest()
        a = self.arguments
        self.sizes = [len(self.rows), 0]
        if a["generated"] is None:
            return
        found = self._read(a["generated"], self.out / "generated", columns=False)
        if not len(found):
            raise DataError("there is no picture that can be used", file=a["generated"])
        held = np.delete(self.manifest.column("sha256"), self.rows)
        leaked = np.flatnonzero(np.isin(found.column("sha256"), held))
        if len(leaked):
            raise DataError(
                f"{found.column('id')[leaked[0]]!r} is a picture that {self.data} keeps out of training ({len(leaked)} are): "
                f"what is learnt from it cannot be tested on it",
                file=a["generated"],
            )
        self.generated, self.sizes = found, [len(self.rows), len(found)]
        self.labels = np.concatenate([self.labels, np.full(len(found), -1)])
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} {found.fingerprint()}".encode()).hexdigest()[:16]
        real = source_shares(self.sizes, [a["dup"], 1])[0]
        self.console.print(
            f"  {len(found)} generated pictures, {found.skipped.num_rows} skipped; {real:.1%} of what is drawn is real",
            highlight=False,
            soft_wrap=True,
        )

    def source(self, row: int) -> tuple[Manifest, int]:
        """Real pictures come first."""
        if row < len(self.rows):
            return super().source(row)
        assert self.generated is not None
        return self.generated, row - len(self.rows)

    def order(self, module: EncoderSystem) -> dict[str, Any]:
        """Real pictures `dup` times as often as generated ones."""
        length = len(self.rows)
        sampler = MixtureSampler(self.sizes, [self.arguments["dup"], 1], seed=self.arguments["seed"], length=length)
        return {"batch_size": min(self.arguments["batch_size"], length), "sampler": sampler, "drop_last": True}

    def last_metrics(self) -> dict[str, Any]:
        """The last line of the log, and what was drawn."""
        real = float(source_shares(self.sizes, [self.arguments["dup"], 1])[0])
        return super().last_metrics() | {"generated": self.sizes[1], "real_share": real}
