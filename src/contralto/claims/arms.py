"""One arm of a claim on one seed, in a process of its own; what it measured is kept in a file.

The processes are spawned, have one thread each, and end with the one that started them. This module is what they import, so it
brings no more than numpy: the rest comes with the function that they run.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError
from contralto.files import naming, write_atomically

__all__ = ["Failure", "Task", "fingerprint", "keep", "load", "made_once", "measure", "run_tasks"]

Measurements = dict[str, npt.NDArray[Any]]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, eq=False)
class Task:
    """One arm on one seed.

    Parameters
    ----------
    claim : str
        Its name.
    run : str
        `module:function`.
    data, arm : str
    settings, budget : mapping
    seed : int
    device : str
    path : Path
        File of the measurements.
    shared : Path
        Folder that all arms and seeds on these data share, for what takes long to prepare; gone when all are done.
    """

    claim: str
    run: str
    data: str
    arm: str
    settings: Mapping[str, Any]
    budget: Mapping[str, Any]
    seed: int
    device: str
    path: Path
    shared: Path

    @property
    def log(self) -> Path:
        """File of what the arm printed."""
        return self.path.with_suffix(".log")

    def __str__(self) -> str:
        return f"{self.claim}: arm {self.arm!r}, seed {self.seed}, on {self.data}"


@dataclass(frozen=True)
class Failure:
    """An arm that could not be measured, and why."""

    task: Task
    reason: str

    def __str__(self) -> str:
        return f"{self.task}: {self.reason} ({self.task.log})"


def fingerprint(*parts: Any) -> str:
    """A short hash of what a measurement depends on.

    Examples
    --------
    >>> fingerprint({"steps": 3}, "digits") == fingerprint({"steps": 3}, "digits") != fingerprint({"steps": 4}, "digits")
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def keep(path: Path, found: Mapping[str, Any]) -> None:
    """Write measurements as `.npz`: numbers, and arrays of one length over the test samples.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "seed0.npz"
    >>> keep(path, {"knn": [1, 0, 1], "perplexity": 3.5})
    >>> sorted(load(path))
    ['knn', 'perplexity']
    """
    if not isinstance(found, Mapping) or not found:
        raise UsageError(f"the function of a claim must return a dict of measurements, got {found!r}")
    arrays: Measurements = {}
    for name, value in found.items():
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        if array.ndim > 1 or array.dtype.kind not in ("U" if name == "groups" else "biuf"):
            raise UsageError(
                f"measurement {name!r} must be a number or an array (N,) of numbers (groups: of texts), "
                f"got shape {array.shape} of {array.dtype}"
            )
        arrays[name] = array
    lengths = {name: len(a) for name, a in arrays.items() if a.ndim}
    if len(set(lengths.values())) > 1:
        raise UsageError(f"all arrays of one arm must be over the same test samples, got lengths {lengths}")

    def write(part: Path) -> None:
        with part.open("wb") as file:  # np.savez would add a suffix to a path
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def load(path: Path) -> Measurements:
    """Read what `keep` wrote."""
    with naming(path), np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def made_once(folder: Path, make: Callable[[Path], Any]) -> Path:
    """A folder that several arms share: made by the first that needs it, whole when it has its name.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "data"
    >>> _ = made_once(folder, lambda path: (path / "a.txt").write_text("once"))
    >>> (made_once(folder, lambda path: 1 / 0) / "a.txt").read_text()
    'once'
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            made = Path(part) / folder.name
            made.mkdir()
            make(made)
            with contextlib.suppress(OSError):  # another process was faster: its folder is the same
                made.rename(folder)
    return folder


def measure(task: Task, progress: Callable[[float], None]) -> None:
    """Train and measure one arm on one seed, and keep what was found."""
    module, _, name = task.run.partition(":")
    function = getattr(import_module(module), name)
    more = {}
    if "work" in signature(function).parameters:
        task.shared.mkdir(parents=True, exist_ok=True)
        more["work"] = task.shared
    found = function(
        dict(task.settings), seed=task.seed, data=task.data, budget=dict(task.budget), device=task.device,
        progress=progress, **more,
    )  # fmt: skip
    keep(task.path, found)


def run_tasks(tasks: Sequence[Task], *, jobs: int, told: Callable[[Task, float], None]) -> list[Failure]:
    """Run tasks in `jobs` processes at a time; a failure is noted and the others go on.

    Parameters
    ----------
    tasks : sequence of Task
    jobs : int
    told : callable
        Hears of every task which share of it is done; 1 when it is finished. What it raises ends everything.
    """
    context = get_context("spawn")
    waiting, failures = deque(tasks), []
    processes: dict[Connection, Any] = {}
    idle: list[Connection] = []
    busy: dict[Connection, Task] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                if not idle:
                    here, there = context.Pipe()
                    processes[here] = context.Process(target=_serve, args=(there,))
                    with _one_thread():
                        processes[here].start()
                    there.close()
                    idle.append(here)
                connection, task = idle.pop(), waiting.popleft()
                busy[connection] = task
                connection.send(task)
            for ready in wait(list(busy)):
                connection = cast("Connection", ready)
                task = busy[connection]
                try:
                    kind, what = connection.recv()
                except (EOFError, ConnectionResetError):
                    ended = processes.pop(connection)
                    ended.join()
                    kind, what = "failed", f"its process ended with code {ended.exitcode}"
                if kind != "share":
                    del busy[connection]
                    idle += [connection] if connection in processes else []
                if kind == "failed":
                    failures.append(Failure(task, what))
                told(task, what if kind == "share" else 1.0)
        for connection in idle:
            connection.send(None)
    finally:
        for process in processes.values() if busy or waiting else ():
            process.terminate()
        for process in processes.values():
            process.join(10)
            if process.is_alive():
                process.kill()
    return failures


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started within have one thread, so that results are the same however many run at a time."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection) -> None:
    """What a process does: task after task, until there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the one that started this, which then ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while (task := connection.recv()) is not None:
        task.path.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("w") as log:
            os.dup2(log.fileno(), 1)  # what libraries print must not get between the progress bar and the JSON
            os.dup2(log.fileno(), 2)
        try:
            measure(task, _sparing(connection))
        except Exception as error:
            traceback.print_exc()
            connection.send(("failed", f"{type(error).__name__}: {error}"))
        else:
            task.log.unlink()
            connection.send(("done", None))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def _sparing(connection: Connection) -> Callable[[float], None]:
    """Tells of every hundredth, not of every step."""
    last = [0.0]

    def progress(share: float) -> None:
        if share >= last[0] + 0.01:
            last[0] = share
            connection.send(("share", min(float(share), 1.0)))

    return progress


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
