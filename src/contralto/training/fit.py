"""One training of one system, on Lightning: progress, a metrics file, checkpoints, and resume.

The folder of a training holds `last.ckpt` while it runs, `metrics.jsonl` (a JSON object per epoch), and at the end
`weights.safetensors` and `done.json`. Called again with the same folder, a finished training is loaded and an
interrupted one continues after its last checkpoint, with the same result as if nothing had happened: the order of an epoch
is a function of (seed, epoch), so the batches that were done are left out of it without being fetched again.
"""

import hashlib
import json
import logging
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from contralto import distributed
from contralto.errors import ContraltoError, DataError, UsageError
from contralto.files import load_weights, naming, save_weights, write_atomically, write_json

__all__ = ["fit_stage"]

SECONDS = 600
"""Slow steps are checkpointed after this time, however few they are."""


def fit_stage(
    module: LightningModule,
    loader: DataLoader[Any] | None,
    folder: str | Path,
    *,
    epochs: int,
    fingerprint: str,
    checkpoint_every: int = 1000,
    progress: bool = True,
    trainer: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> LightningModule:
    """Train a module, or load or continue what the folder holds.

    Parameters
    ----------
    module : LightningModule
        What it sums up over an epoch must be in its checkpoints (`on_save_checkpoint`), as other state is.
    loader : DataLoader, optional
        With an `EpochSampler`, or a `GroupBatchSampler` as its batch sampler, and randomness that is a function of
        (seed, epoch), as that of `contralto.data.dataset` is.
        None is enough for a finished training.
    folder : path
        Belongs to this training alone.
    epochs : int
        Number of epochs; 0 leaves the module as it is.
    fingerprint : str
        What the result depends on (arguments, data, earlier stages). A folder with another one is refused.
    checkpoint_every : int
        Steps between checkpoints, and so the most that a killed training does again; there is one after every epoch and
        every ten minutes anyhow. It changes nothing in the result.
    progress : bool
        Show a progress bar.
    trainer : mapping, optional
        Flags for `lightning.Trainer`: `accelerator`, `devices`, `precision`, `strategy`, ...
    callbacks : sequence of Callback
        Further ones, with what they keep in their `state_dict`.

    Returns
    -------
    LightningModule
        The module, trained, in evaluation mode.

    Raises
    ------
    UsageError
        If the folder belongs to a training with other arguments or data.
    DataError
        If a file of the folder is damaged.
    ContraltoError
        If the loss stops being a number; the last good checkpoint stays.
    KeyboardInterrupt
        After Ctrl+C (or SIGTERM): the running step is finished and kept in a checkpoint first; a second one stops at once.
    """
    if checkpoint_every < 1:
        raise UsageError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, fingerprint)
    if not (folder / "done.json").exists():
        if loader is None:
            raise UsageError(f"the training in {folder} is not finished: it needs its data")
        started = time.perf_counter()
        checkpoints = _Checkpoints(folder, loader, checkpoint_every, fingerprint)
        _train(module, loader, folder, epochs, progress, [*callbacks, checkpoints], dict(trainer or {}))
        if distributed.is_main():
            save_weights(module, folder / "weights.safetensors")
            write_json(folder / "done.json", {"epochs": epochs, "seconds": round(time.perf_counter() - started, 2)})
            (folder / "last.ckpt").unlink(missing_ok=True)
    else:
        load_weights(module, folder / "weights.safetensors")
    return module.eval()


def _claim(folder: Path, fingerprint: str) -> None:
    path = folder / "fingerprint"
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != fingerprint:
        raise UsageError(
            f"{folder} holds a training with other arguments or data: choose another --out, or delete that folder"
        )
    if distributed.is_main():
        write_atomically(path, lambda p: p.write_text(fingerprint, encoding="utf-8"))


def _train(
    module: LightningModule,
    loader: DataLoader[Any],
    folder: Path,
    epochs: int,
    progress: bool,
    callbacks: list[Callback],
    flags: dict[str, Any],
) -> None:
    if epochs == 0:
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    checkpoints = next(c for c in callbacks if isinstance(c, _Checkpoints))
    if progress and distributed.is_main():
        callbacks.append(_Bar(folder.name, epochs))
    if loader.worker_init_fn is None:
        loader.worker_init_fn = _ignore_interrupts
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), checkpoints.waiting_for_the_step():
        # The loaders here are in memory or bring their own workers; Lightning's advice on both does not apply. That a
        # loader could not go on within an epoch does not hold: its sampler is told where. Frozen parts are meant.
        for message in (
            ".*does not have many workers.*",
            ".*number of training batches.*",
            ".*Checkpoint directory.*",
            ".*your dataloader is not resumable.*",
            ".*in eval mode at the start.*",
        ):
            warnings.filterwarnings("ignore", message=message)
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
        if last.exists():
            _check_checkpoint(last)
        try:
            trainer.fit(module, loader, ckpt_path=last if last.exists() else None, weights_only=True)
        except SystemExit as error:  # what Lightning makes of Ctrl+C, having switched the signal off
            raise KeyboardInterrupt from error
        except (ContraltoError, RuntimeError) as error:
            told = _of_worker(error)
            if told:
                raise ContraltoError(told) from error
            raise


def _ignore_interrupts(worker: int) -> None:
    """In a worker of a loader: Ctrl+C reaches it too, and the running step still needs its pictures."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _of_worker(error: Exception) -> str:
    """What a worker of a loader met, without the traceback that torch writes into the message; "" if it was none."""
    text = str(error).strip()
    last = text.rsplit("\n", 1)[-1]
    if isinstance(error, ContraltoError):
        return last.partition(": ")[2] if "Original Traceback" in text else ""
    if "DataLoader worker" in text:
        return (
            f"a worker of the loader failed: {last[:300]}. Is memory or shared memory full? Fewer --workers need less"
        )
    return ""


def _check_checkpoint(path: Path) -> None:
    try:
        place = torch.load(path, weights_only=True, map_location="cpu", mmap=True)["place"]
        assert set(place) == {"epoch", "batches"}
    except Exception as error:  # damaged bytes raise nearly anything, and nothing of them was used yet
        raise DataError(
            f"is no checkpoint of this version ({type(error).__name__}): delete it, and this stage begins anew",
            file=str(path),
        ) from error


class _Checkpoints(Checkpoint):
    """Checkpoints within and after every epoch, each replacing the last one whole; a line of metrics after every epoch.

    A `Checkpoint`, because those run after the module has logged its epoch.
    """

    def __init__(self, folder: Path, loader: DataLoader[Any], every: int, fingerprint: str) -> None:
        self.folder, self.loader, self.every, self.fingerprint = folder, loader, every, fingerprint
        self.place = {"epoch": 0, "batches": 0}
        self.saved = time.monotonic()
        self.interrupted = False

    @contextmanager
    def waiting_for_the_step(self) -> Iterator[None]:
        """Let Ctrl+C wait for the end of the step, where a checkpoint can be made; the second one does not wait."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)
        if before is signal.default_int_handler:  # a handler of the caller's own keeps its say
            signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:  # the trainer leaves the signal switched off
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, *_: Any) -> None:
        if (
            self.interrupted or distributed.world_size() > 1
        ):  # a rank that saves alone would wait for the others for ever
            raise KeyboardInterrupt
        self.interrupted = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["place"] = dict(self.place)
        # What the start of an epoch may have set, and is not in a state dict: frozen parts.
        checkpoint["training"] = {name: part.training for name, part in pl_module.named_modules()}
        checkpoint["learning"] = {name: p.requires_grad for name, p in pl_module.named_parameters()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        place = checkpoint["place"]
        # The trainer sets the epoch after it has made the first iterator, and loader workers fetch ahead of that.
        order: Any = self.loader.sampler
        if self.loader.batch_size is None:  # batches of a sampler's own
            order = self.loader.batch_sampler
        order.start_at(place["epoch"], place["batches"] * (self.loader.batch_size or 1))
        if place["batches"]:
            for name, part in pl_module.named_modules():
                part.training = checkpoint["training"][name]
            for name, parameter in pl_module.named_parameters():
                parameter.requires_grad_(checkpoint["learning"][name])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Dropout and its like: a function of the step, so that an interruption changes nothing.
        name = f"{self.fingerprint} {trainer.current_epoch} {batch_idx} {distributed.rank()}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        stop = self.interrupted or (trainer.received_sigterm and distributed.world_size() == 1)
        late = distributed.world_size() == 1 and time.monotonic() - self.saved > SECONDS
        if done == trainer.num_training_batches or done % trainer.accumulate_grad_batches:
            return  # the end of the epoch saves; gradients that wait for more are in no checkpoint
        if stop or late or done % self.every == 0:
            self._save(trainer, trainer.current_epoch, done)
        if stop:
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {k: float(v) for k, v in sorted(trainer.callback_metrics.items())}
        if not all(map(torch.isfinite, map(torch.tensor, metrics.values()))):
            raise ContraltoError(
                f"the loss is not a number in epoch {trainer.current_epoch} of stage {self.folder.name}: {metrics}. "
                f"A smaller learning rate usually helps"
            )
        if trainer.is_global_zero:
            path = self.folder / "metrics.jsonl"
            with naming(path):
                lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
                # Killed before the checkpoint, the epoch is done again and its line written over.
                earlier = [line for line in lines if json.loads(line)["epoch"] < trainer.current_epoch]
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            rounded = {k: round(v, 6) for k, v in metrics.items()}
            now = json.dumps({"epoch": trainer.current_epoch, "lr": rate, **rounded})
            write_atomically(path, lambda p: p.write_text("\n".join([*earlier, now]) + "\n", encoding="utf-8"))
        self._save(trainer, trainer.current_epoch + 1, 0)
        if self.interrupted:
            raise KeyboardInterrupt

    def _save(self, trainer: Trainer, epoch: int, batches: int) -> None:
        """Save; the next step is number `batches` of `epoch`. All ranks come here, the first one writes."""
        self.place = {"epoch": epoch, "batches": batches}
        if trainer.is_global_zero:
            write_atomically(self.folder / "last.ckpt", trainer.save_checkpoint)
        else:
            trainer.save_checkpoint(self.folder / "last.ckpt")
        self.saved = time.monotonic()


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
