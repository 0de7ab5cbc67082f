"""One function over many blocks: in this process, or on the machines of a Ray cluster, with the same results in the same order.

A block is a small description of work, such as the address of a tar; whoever works on it reads what it needs by itself. On a
cluster Ray Data deals out the blocks, does a block again whose worker died or whose store did not answer, and puts the results
in order. A result is kept once, whole, so nothing is lost or doubled.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from contralto.errors import ContraltoError, MissingExtraError, UsageError

__all__ = ["has_gpus", "map_blocks"]

RETRIES = 3
"""So often a block is done again when reading failed; where a worker died, Ray does it again without end."""


def map_blocks(
    work: Callable[..., Any],
    blocks: Iterable[Any],
    *,
    on: str | None = None,
    setup: tuple[Any, ...] | None = None,
    gpu: bool = False,
) -> Iterator[Any]:
    """What a function makes of every block, in the order of the blocks.

    Parameters
    ----------
    work : function or class
        Called with a block. With `setup`, a class: every worker makes one object of it, and calls that with blocks.
    blocks : iterable
        Descriptions of work; on a cluster all of them are known before the first is begun.
    on : str, optional
        None: in this process, one after the other. "ray": on the cluster that this machine belongs to or that the variable
        RAY_ADDRESS names, else on all cores of this machine. "ray://host:port": on the cluster with this address.
    setup : tuple, optional
        Arguments of the class, such as an encoder.
    gpu : bool
        On a cluster: every worker takes a GPU in place of a core.

    Yields
    ------
    object
        Results. An error by `work` is raised in the place of its result.

    Raises
    ------
    UsageError
        If `on` is something else, or no cluster answers.
    MissingExtraError
        If Ray is not installed.
    ContraltoError
        If a block fails on the cluster with anything but an error of ours.

    Examples
    --------
    >>> list(map_blocks(len, ["ab", "c"]))
    [2, 1]
    """
    if on is not None:
        return _on_ray(work, blocks, _connected(on), setup, gpu)
    return map(work if setup is None else work(*setup), blocks)


def has_gpus(on: str) -> bool:
    """Whether a cluster has a GPU."""
    return bool(_connected(on).cluster_resources().get("GPU", 0) >= 1)


def _connected(on: str) -> Any:
    """Ray, connected to the cluster; one that this process uses already stays."""
    if on != "ray" and not on.startswith("ray://"):
        raise UsageError(f'on must be "ray" or "ray://host:port", got {on!r}')
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("--on ray", extra="ray") from error
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports to nobody
        try:
            ray.init(address=None if on == "ray" else on, logging_level="WARNING")
        except (ConnectionError, RuntimeError) as error:
            raise UsageError(f"no Ray cluster answers at {on}: {error}") from error
    return ray


class _Whole:
    """Something that Ray carries as it is, because it does not know its type; tables and lists it would take apart."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Worker:
    """Works on one block after the other; an error of ours is a result, so that it is raised in the place of its block."""

    def __init__(self, work: Callable[..., Any], setup: tuple[Any, ...] | None) -> None:
        self.work = work if setup is None else work(*setup)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"item": _Whole(self.work(row["item"].value))}
        except ContraltoError as error:
            if isinstance(error.__cause__, OSError):  # the store may answer the next time
                raise
            return {"item": _Whole(error)}


def _on_ray(
    work: Callable[..., Any], blocks: Iterable[Any], ray: Any, setup: tuple[Any, ...] | None, gpu: bool
) -> Iterator[Any]:
    items = [_Whole(block) for block in blocks]
    if not items:
        return
    data = ray.data.from_items(items, override_num_blocks=len(items))
    data.context.execution_options.preserve_order = True
    data.context.enable_progress_bars = False
    data.context.retried_map_errors, data.context.max_map_retries = True, RETRIES
    if setup is None:
        done = data.map(_Worker(work, None), num_cpus=1)
    else:
        places = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1))
        done = data.map(
            _Worker,
            fn_constructor_args=(work, setup),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(places, len(items)))),
            num_cpus=0 if gpu else 1,
            num_gpus=1 if gpu else 0,
        )
    try:
        for row in done.iter_rows():
            value = row["item"].value
            if isinstance(value, ContraltoError):
                raise value
            yield value
    except ray.exceptions.RayError as error:
        raise _own(error) from error


def _own(error: Exception) -> ContraltoError:
    """What happened on a worker, as an error of ours."""
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, ContraltoError):
            return cause
        if inner is None or inner is cause:
            break
        cause = inner
    told = f"{type(cause).__name__}: {cause}".strip().splitlines()
    return ContraltoError(f"a worker of the Ray cluster failed: {told[-1] if told else cause}")
