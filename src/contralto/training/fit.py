"""One training of one system, on Lightning: progress, a metrics file, a checkpoint after every epoch, and resume.

The folder of a training holds `last.ckpt` while it runs, `metrics.jsonl` (a JSON object per epoch), and at the end
`weights.safetensors` and `done.json`. Called again with the same folder, a finished training is loaded and an
interrupted one continues after its last whole epoch, with the same result as if nothing had happened.
"""

import json
import logging
import signal
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from contralto import distributed
from contralto.errors import ContraltoError, UsageError
from contralto.files import save_weights, write_atomically

__all__ = ["fit_stage"]


def fit_stage(
    module: LightningModule,
    loader: DataLoader[Any] | None,
    folder: str | Path,
    *,
    epochs: int,
    fingerprint: str,
    progress: bool = True,
    trainer: Mapping[str, Any] | None = None,
) -> LightningModule:
    """Train a module, or load or continue what the folder holds.

    Parameters
    ----------
    module : LightningModule
    loader : DataLoader, optional
        Its order and randomness must be functions of (seed, epoch), as those of `contralto.data.dataset` are.
        None is enough for a finished training.
    folder : path
        Belongs to this training alone.
    epochs : int
        Number of epochs; 0 leaves the module as it is.
    fingerprint : str
        What the result depends on (arguments, data, earlier stages). A folder with another one is refused.
    progress : bool
        Show a progress bar.
    trainer : mapping, optional
        Flags for `lightning.Trainer`: `accelerator`, `devices`, `precision`, `strategy`, ...

    Returns
    -------
    LightningModule
        The module, trained, in evaluation mode.

    Raises
    ------
    UsageError
        If the folder belongs to a training with other arguments or data.
    ContraltoError
        If the loss stops being a number; the last good checkpoint stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, fingerprint)
    if not (folder / "done.json").exists():
        if loader is None:
            raise UsageError(f"the training in {folder} is not finished: it needs its data")
        started = time.perf_counter()
        _train(module, loader, folder, epochs, progress, dict(trainer or {}))
        if distributed.is_main():
            save_weights(module, folder / "weights.safetensors")
            done = json.dumps({"epochs": epochs, "seconds": round(time.perf_counter() - started, 2)})
            write_atomically(folder / "done.json", lambda path: path.write_text(done, encoding="utf-8"))
            (folder / "last.ckpt").unlink(missing_ok=True)
    else:
        module.load_state_dict(load_file(folder / "weights.safetensors"))
    return module.eval()


def _claim(folder: Path, fingerprint: str) -> None:
    path = folder / "fingerprint"
    if path.exists() and path.read_text(encoding="utf-8") != fingerprint:
        raise UsageError(
            f"{folder} holds a training with other arguments or data: choose another --out, or delete that folder"
        )
    if distributed.is_main():
        write_atomically(path, lambda p: p.write_text(fingerprint, encoding="utf-8"))


def _train(
    module: LightningModule, loader: DataLoader[Any], folder: Path, epochs: int, progress: bool, flags: dict[str, Any]
) -> None:
    if epochs == 0:
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    callbacks: list[Callback] = [_Epochs(folder, loader)]
    if progress and distributed.is_main():
        callbacks.append(_Bar(folder.name, epochs))
    with warnings.catch_warnings():
        # The loaders here are in memory or bring their own workers; Lightning's advice on both does not apply.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*number of training batches.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=DeprecationWarning)
        trainer = Trainer(
            max_epochs=epochs,
            callbacks=callbacks,
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            num_sanity_val_steps=0,
            **{"accelerator": "auto", "devices": 1, **flags},
        )
        module.train()
        last = folder / "last.ckpt"
        handler = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, loader, ckpt_path=last if last.exists() else None, weights_only=True)
        except SystemExit as error:  # what Lightning makes of Ctrl+C, having switched the signal off
            raise KeyboardInterrupt from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)


class _Epochs(Checkpoint):
    """After every epoch: a line of metrics, a check of the loss, a checkpoint that replaces the last one whole.

    A `Checkpoint`, because those run after the module has logged its epoch.
    """

    def __init__(self, folder: Path, loader: DataLoader[Any]) -> None:
        self.folder, self.loader = folder, loader

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # The trainer sets the epoch after it has made the first iterator, and loader workers fetch ahead of that.
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(checkpoint["epoch"] + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {k: float(v) for k, v in sorted(trainer.callback_metrics.items())}
        if not all(map(torch.isfinite, map(torch.tensor, metrics.values()))):
            raise ContraltoError(
                f"the loss is not a number in epoch {trainer.current_epoch} of stage {self.folder.name}: {metrics}. "
                f"A smaller learning rate usually helps"
            )
        trainer.save_checkpoint(self.folder / ".last.part")
        if not trainer.is_global_zero:
            return
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        earlier = [line for line in lines if json.loads(line)["epoch"] < trainer.current_epoch]
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        now = json.dumps({"epoch": trainer.current_epoch, "lr": rate, **{k: round(v, 6) for k, v in metrics.items()}})
        write_atomically(path, lambda p: p.write_text("\n".join([*earlier, now]) + "\n", encoding="utf-8"))
        # Last: killed before this line, the epoch is done again and its line of metrics is written over.
        (self.folder / ".last.part").replace(self.folder / "last.ckpt")


class _Bar(Callback):
    """A progress bar over all steps of the training."""

    def __init__(self, name: str, epochs: int) -> None:
        self.name, self.epochs = name, epochs
        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.task = self.progress.add_task(
            self.name, total=self.epochs * int(trainer.num_training_batches), completed=trainer.global_step
        )
        self.progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self.progress.update(
            self.task, advance=1, description=f"{self.name}, epoch {trainer.current_epoch + 1} of {self.epochs}"
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.progress.stop()
