"""One function over many blocks: in this process, or on the machines of a Ray cluster, with the same results in the same order.

A block is a small description of work, such as the address of a tar; whoever works on it reads what it needs by itself. On a
cluster Ray Data deals out the blocks, does a block again whose worker died or whose store did not answer, and puts the results
in order. A result is kept once, whole, so nothing is lost or doubled.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from contralto.errors import ContraltoError, MissingExtraError, UsageError

__all__ = ["has_gpus", "map_blocks"]

RETRIES = 3
"""So often a block is done again when reading failed; where a worker died, Ray does it again without end."""
AGAIN = "reading failed, to be tried again"


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
        ray = _ray()
    except ImportError as error:
        raise MissingExtraError("--on ray", extra="ray") from error
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports to nobody
        before = signal.getsignal(signal.SIGTERM)  # Ray takes it, and a training could not save its step any more
        try:
            ray.init(address=None if on == "ray" else on, logging_level=logging.WARNING)
        except ValueError as error:  # of Ray Client, where grpc is not there
            raise MissingExtraError(f"--on {on}", extra="ray") from error
        except (ConnectionError, RuntimeError) as error:
            raise UsageError(f"no Ray cluster answers at {on}: {error}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)
    return ray


class _AgainError(Exception):
    """Reading failed in a way that may pass; `error` is what is to be said when it does not."""

    def __init__(self, told: str, error: ContraltoError | None = None) -> None:
        super().__init__(told, error)
        self.error = error


def _ray() -> Any:
    """Imported late: most have no cluster."""
    import ray
    import ray.data

    return ray


class _Raised:
    """An error in the place of a result."""

    def __init__(self, error: ContraltoError) -> None:
        self.error = error


class _Worker:
    """Works on one block after the other; an error of ours is a result, so that it is raised in the place of its block."""

    def __init__(self, work: Callable[..., Any], setup: tuple[Any, ...] | None) -> None:
        self.work = work if setup is None else work(*setup)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from ray import cloudpickle

        try:
            return {"item": cloudpickle.dumps(self.work(cloudpickle.loads(row["item"])))}
        except ContraltoError as error:
            if isinstance(error.__cause__, OSError):
                raise _AgainError(AGAIN, error) from error
            return {"item": cloudpickle.dumps(_Raised(error))}
        except OSError as error:
            raise _AgainError(AGAIN, ContraltoError(f"cannot be read: {error}")) from error


def _on_ray(
    work: Callable[..., Any], blocks: Iterable[Any], ray: Any, setup: tuple[Any, ...] | None, gpu: bool
) -> Iterator[Any]:
    from ray import cloudpickle

    # Blocks and results travel in Ray's own serialisation: as bytes, so that Ray Data takes no list or table apart.
    items = [cloudpickle.dumps(block) for block in blocks]
    if not items:
        return
    deal = _deal_from_there if ray.util.client.ray.is_connected() else _deal
    try:
        for result in deal(items, work, setup, gpu):
            value = cloudpickle.loads(result)
            if isinstance(value, _Raised):
                raise value.error
            yield value
    except ray.exceptions.RayError as error:
        raise _own(error) from error


def _deal(items: list[bytes], work: Callable[..., Any], setup: tuple[Any, ...] | None, gpu: bool) -> Iterator[bytes]:
    """Have Ray Data work on all blocks; the results in order."""
    ray = _ray()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.retried_map_errors, context.max_map_retries = [AGAIN], RETRIES
    context.raise_original_map_exception = True
    context.enable_progress_bars = context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        data = ray.data.from_items(items, override_num_blocks=len(items))
        if setup is None:
            done = data.map(_Worker(work, None).__call__, num_cpus=1)
        else:
            places = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1))
            done = data.map(
                _Worker,
                fn_constructor_args=(work, setup),
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(places, len(items)))),
                num_cpus=0 if gpu else 1,
                num_gpus=1 if gpu else 0,
            )
    for row in done.iter_rows():
        yield row["item"]


def _deal_from_there(*arguments: Any) -> Iterator[bytes]:
    """`_deal` on the cluster itself: Ray Data does not run at the far end of a `ray://` connection."""
    ray = _ray()
    dealer = ray.remote(num_cpus=0)(_Dealer).remote(*arguments)
    coming = dealer.next.remote()
    while (result := ray.get(coming)) is not None:
        coming = dealer.next.remote()  # on its way while the caller has the one before
        yield result


class _Dealer:
    def __init__(self, *arguments: Any) -> None:
        self.results = _deal(*arguments)

    def next(self) -> bytes | None:
        return next(self.results, None)


def _own(error: Any) -> ContraltoError:
    """What happened on a worker, as an error of ours."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, _AgainError) and cause.error is not None:
        return cause.error
    told = str(cause).strip().partition("\n")[0]
    return ContraltoError(f"a worker of the Ray cluster failed with {type(cause).__name__}: {told}")
