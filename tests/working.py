"""What the workers of a cluster do in tests; as light as can be, because every worker imports it."""

import os
import signal
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from contralto.errors import DataError, MissingExtraError


class Shop(LocalFileSystem):
    """A store with an address of its own, that fails or kills the worker who asks, once each, where a file beside says so."""

    protocol = "shop"
    is_worker = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("shop://"))  # older versions know their own name only

    def _open(self, path, mode="rb", **options):
        path = self._strip_protocol(path)
        for ending in (".dies", ".fails"):
            marker = Path(path + ending)
            if self.is_worker and marker.exists():
                marker.unlink()
                if ending == ".dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ConnectionError("the store is busy")
        return super()._open(path, mode, **options)


def open_shop(is_worker=True):
    Shop.is_worker = is_worker
    fsspec.register_implementation("shop", Shop, clobber=True)


def dying(marker, x):
    """Dies on the first try; afterwards a list that is not to be taken apart."""
    path = Path(f"{marker}{x}")
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [x, {"a": x}]


class Dying:
    def __init__(self, marker):
        self.marker, self.made = marker, os.getpid()

    def __call__(self, x):
        return dying(self.marker, x) if x == 3 else [x, {"a": x}]


def fail(x):
    if x == 2:
        raise DataError("is no good", file="a.csv", row=7)
    if x == 3:
        raise MissingExtraError("the thing", extra="graph")
    if x == 4:
        raise ZeroDivisionError("nothing to divide by")
    return x
