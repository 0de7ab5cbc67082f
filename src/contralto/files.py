"""Files of a run: written so that a process that is killed leaves whole files, or none; read so that damage is named."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from contralto.errors import ContraltoError, DataError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "load_weights",
    "naming",
    "plain_json",
    "remove_leftovers",
    "save_array",
    "save_weights",
    "write_atomically",
    "write_json",
]


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path, then put the finished file in its place: never half a file under its name.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_atomically(target, lambda path: path.write_text("whole"))
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # the name must not point at bytes that a power cut can still lose
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def plain_json(value: Any, **how: Any) -> str:
    """JSON that every reader takes: NaN and infinity, which it has no words for, are null.

    Parameters
    ----------
    value
        Dictionaries, lists, strings and numbers; what is none of these is told by `str`.
    **how
        Of `json.dumps`.

    Examples
    --------
    >>> plain_json({"precision": float("nan"), "n": [3]})
    '{"precision": null, "n": [3]}'
    """

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [plain(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, default=str, **how)


def write_json(path: str | Path, value: Any) -> None:
    """Write `plain_json` of a value, a line for every entry, atomically."""
    text = plain_json(value, indent=1) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name the file of a run whose damaged bytes raise something while it is read: nearly any error can come of them.

    Raises
    ------
    DataError

    Examples
    --------
    >>> with naming("metrics.json"):
    ...     {}["test"]
    Traceback (most recent call last):
    ...
    contralto.errors.DataError: metrics.json: is damaged or of another version (KeyError: 'test')
    """
    try:
        yield
    except ContraltoError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
        raise DataError(f"is damaged or of another version ({told})", file=str(path)) from error


def save_array(array: npt.NDArray[Any], path: str | Path) -> None:
    """Write an array as `.npy`.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.npy"
    >>> save_array(np.arange(3), target)
    >>> np.load(target)
    array([0, 1, 2])
    """

    def write(part: Path) -> None:
        with part.open("wb") as file:  # np.save would add a suffix to a path
            np.save(file, array, allow_pickle=False)

    write_atomically(path, write)


def save_weights(module: "nn.Module", path: str | Path) -> None:
    """Write parameters and buffers as safetensors, on the CPU and contiguous.

    Examples
    --------
    >>> import tempfile
    >>> from torch import nn
    >>> target = Path(tempfile.mkdtemp()) / "w.safetensors"
    >>> save_weights(nn.Linear(2, 2), target)
    >>> target.exists()
    True
    """
    from safetensors import SafetensorError  # these bring torch, for which who only reads pictures need not wait
    from safetensors.torch import save_file

    weights = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}

    def write(part: Path) -> None:
        try:
            save_file(weights, part)
        except SafetensorError as error:  # a full disk among others
            raise OSError(f"{path} cannot be written: {error}") from error

    write_atomically(path, write)


def load_weights(module: "nn.Module", path: str | Path) -> None:
    """Read what `save_weights` wrote into a module of the same shape.

    Raises
    ------
    DataError
        If the file is damaged, or of another module.

    Examples
    --------
    >>> import tempfile
    >>> from torch import nn
    >>> target = Path(tempfile.mkdtemp()) / "w.safetensors"
    >>> save_weights(nn.Linear(2, 2), target)
    >>> load_weights(nn.Linear(2, 3), target)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    contralto.errors.DataError: ...w.safetensors: is damaged or of another version ...
    """
    from safetensors.torch import load_file

    with naming(path):
        module.load_state_dict(load_file(path))


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed writers left half done under a folder that belongs to this process alone.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / ".a.txt.123.part").write_text("ha")
    >>> remove_leftovers(folder)
    >>> list(folder.iterdir())
    []
    """
    for path in Path(folder).rglob(".*.part"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
