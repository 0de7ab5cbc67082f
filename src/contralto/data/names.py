"""Names that people give to classes which a machine found: one small file in the run folder, `names.json`.

It maps what the machine calls a class ("new 1") to what people call it; "" = not named yet. A person may edit it by hand, take
it from the static page, or name classes on the page of `contralto review`. Every reader checks it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from contralto.data.ingest import MAX_NAME, clean_name
from contralto.errors import DataError
from contralto.files import naming, write_json

__all__ = ["NAMES", "called", "new_names", "read_names", "save_names"]

NAMES = "names.json"
MAX_BYTES = 2**24


def new_names(count: int, taken: Iterable[str]) -> list[str]:
    """What classes are called before anybody has named them; no name that a known class has.

    Examples
    --------
    >>> new_names(3, ["cat", "new 2"])
    ['new 1', 'new 3', 'new 4']
    """
    before, number = set(taken), 0
    out: list[str] = []
    while len(out) < count:
        number += 1
        if f"new {number}" not in before:
            out.append(f"new {number}")
    return out


def read_names(run: str | Path) -> dict[str, str]:
    """The names of a run: what the machine calls a class, and what people do; without those that nobody has named.

    Parameters
    ----------
    run : path
        Run folder; a folder without `names.json` has no names.

    Raises
    ------
    DataError
        If the file is no such table.

    Examples
    --------
    >>> import tempfile
    >>> run = tempfile.mkdtemp()
    >>> save_names(run, {"new 1": "heron", "new 2": ""})
    >>> read_names(run)
    {'new 1': 'heron'}
    """
    path = Path(run) / NAMES
    if not path.is_file():
        return {}
    with naming(path):
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"is larger than {MAX_BYTES // 2**20} MiB: these are no names", file=str(path))
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise DataError('must map names to names, as in {"new 1": "heron"}', file=str(path))
    cleaned = {key: clean_name(name).strip() for key, name in found.items()}
    return {key: name for key, name in cleaned.items() if name}


def save_names(run: str | Path, names: Mapping[str, str]) -> None:
    """Write `names.json` whole, with names cleaned of control signs and cut to 200 characters."""
    write_json(Path(run) / NAMES, {key: clean_name(name[: 4 * MAX_NAME]).strip() for key, name in names.items()})


def called(classes: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """Classes by the names that people gave them; two may share one: then people say that they are the same.

    Examples
    --------
    >>> called(["cat", "new 1", "new 2"], {"new 1": "heron"})
    ['cat', 'heron', 'new 2']
    """
    return [names.get(c, c) for c in classes]
