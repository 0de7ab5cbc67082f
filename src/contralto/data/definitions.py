"""Class definitions: what each class means, from a small YAML file or from what is at hand.

The file maps names to entries::

    crane:
      query: [crane, cranes]
      definition: A machine that lifts heavy loads with a long arm.

Definitions decide which sense of a word is meant, so they come from dictionaries and never from the noisy page texts.
"""

import gzip
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from contralto.data.manifest import ClassInfo
from contralto.errors import DataError, UsageError

__all__ = [
    "ClassText",
    "Sense",
    "class_text",
    "fill_definitions",
    "find_senses",
    "load_definitions",
    "save_definitions",
]

ClassText = Literal["name+definition", "definition", "name"]
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Sense:
    """One meaning of a word: `id`, its `definition`, and where it was found."""

    id: str
    definition: str
    source: str


def load_definitions(path: str | Path) -> tuple[ClassInfo, ...]:
    """Read a definitions file (YAML or JSON).

    Raises
    ------
    DataError
        Naming the file and the entry.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "classes.yaml"
    >>> _ = file.write_text("crane: {query: crane, definition: A large wading bird.}")
    >>> load_definitions(file)
    (ClassInfo(name='crane', queries=('crane',), definition='A large wading bird.'),)
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=str(path)) from error
    if len(data) > MAX_BYTES:
        raise DataError(f"is larger than {MAX_BYTES} bytes", file=str(path))
    try:
        # JSON is read as JSON: YAML forbids some of what it allows, and aliases cannot blow it up.
        content = json.loads(data) if path.suffix == ".json" else yaml.safe_load(data)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"is not valid {path.suffix or 'YAML'}: {str(error)[:200]}", file=str(path)) from error
    if isinstance(content, dict):
        entries: list[Any] = [
            {"name": k, **v} if isinstance(v, dict) else {"name": k, "definition": v} for k, v in content.items()
        ]
    elif isinstance(content, list):
        entries = content
    else:
        raise DataError("expected a mapping from class names to entries", file=str(path))
    classes = tuple(_entry(e, number, path) for number, e in enumerate(entries))
    names = [c.name for c in classes]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None or not names:
        raise DataError(f"the class {twice!r} stands twice" if names else "names no class", file=str(path))
    return classes


def _entry(entry: Any, number: int, path: Path) -> ClassInfo:
    if not isinstance(entry, dict) or type(entry.get("name")) not in (str, int):
        hint = " (YAML reads yes, no, on and off as something else: quote them)" if isinstance(entry, dict) else ""
        raise DataError(f"entry {number} must have a name, got {str(entry)[:80]!r}{hint}", file=str(path))
    queries = entry.get("query", entry.get("queries")) or ()
    if isinstance(queries, (str, int)):
        queries = (queries,)
    if not isinstance(queries, (list, tuple)) or any(isinstance(q, (list, dict, bool)) for q in queries):
        raise DataError(f"the query of {entry['name']!r} must be text or a list of texts", file=str(path))
    queries = tuple(map(str, queries))
    definition = entry.get("definition") or ""
    if not isinstance(definition, str):
        raise DataError(f"the definition of {entry['name']!r} must be text", file=str(path))
    return ClassInfo(str(entry["name"]), queries, " ".join(definition.split()))


def save_definitions(classes: Sequence[ClassInfo], path: str | Path) -> None:
    """Write a definitions file, for a person to complete."""
    content = {c.name: {"query": list(c.queries), "definition": c.definition} for c in classes}
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")


def find_senses(name: str, *, wordnet: str | Path | None = None) -> list[Sense]:
    """Meanings of a class name, from what is at hand; WordNet has the commonest first.

    Looked for in: the WordNet nouns in `wordnet` (a folder with `synsets.jsonl.gz` and `senses.jsonl.gz`; default
    `$CONTRALTO_DATA/wordnet_nouns`), a local WordNet (Debian's `wordnet-base`), and the ImageNet synsets that timm ships,
    which stand in the order of their numbers.

    Examples
    --------
    >>> find_senses("goldfish")[0].definition
    'small golden or orange-red freshwater fishes of Eurasia used as pond or aquarium fishes'
    """
    forms = _word_forms(name)
    folder = Path(wordnet) if wordnet is not None else Path(os.environ.get("CONTRALTO_DATA", "")) / "wordnet_nouns"
    if wordnet is not None and not (folder / "synsets.jsonl.gz").is_file():
        raise DataError("there is no synsets.jsonl.gz in this folder", file=str(folder))
    lookups: list[Callable[[], dict[str, tuple[Sense, ...]]]] = [
        lambda: _nouns(str(folder)),
        lambda: _debian("/usr/share/wordnet"),
        _imagenet,
    ]
    for lookup in lookups:
        table = lookup()
        for form in forms:
            if form in table:
                return list(table[form])
    return []


def fill_definitions(
    classes: Iterable[ClassInfo], *, wordnet: str | Path | None = None
) -> tuple[tuple[ClassInfo, ...], dict[str, list[Sense]]]:
    """Complete missing definitions with the first sense of the name.

    Returns
    -------
    classes : tuple of ClassInfo
    senses : dict of name to list of Sense
        For every class that had no definition; more than one sense means that the word is ambiguous, none that the class
        still has no definition.
    """
    filled, found = [], {}
    for info in classes:
        if not info.definition:
            found[info.name] = find_senses(info.name, wordnet=wordnet)
            if found[info.name]:
                info = replace(info, definition=found[info.name][0].definition)
        filled.append(info)
    return tuple(filled), found


def class_text(info: ClassInfo, form: ClassText = "name+definition") -> str:
    """The text that stands for a class.

    Examples
    --------
    >>> class_text(ClassInfo("crane", ("crane",), "A large wading bird."))
    'crane. A large wading bird.'
    """
    if form not in ("name+definition", "definition", "name"):
        raise UsageError(f'class_text must be "name+definition", "definition" or "name", got {form!r}')
    parts = {"name+definition": (info.name, info.definition), "definition": (info.definition,), "name": (info.name,)}[
        form
    ]
    return ". ".join(p for p in parts if p) or info.name


def _word_forms(name: str) -> list[str]:
    word = re.sub(r"[_\s-]+", " ", name.lower()).strip()
    singular = re.sub(r"(?<=[^s])s$", "", word)
    return list(dict.fromkeys([word, singular, re.sub(r"es$", "", word), re.sub(r"ies$", "y", word)]))


@lru_cache(maxsize=4)
def _nouns(folder: str) -> dict[str, tuple[Sense, ...]]:
    if not (Path(folder) / "synsets.jsonl.gz").is_file() or not (Path(folder) / "senses.jsonl.gz").is_file():
        return {}
    glosses = {r["id"]: r["definition"] for r in _json_lines(Path(folder) / "synsets.jsonl.gz")}
    return {
        r["word"].replace("_", " "): tuple(Sense(i, glosses[i], "WordNet nouns") for i in r["senses"] if i in glosses)
        for r in _json_lines(Path(folder) / "senses.jsonl.gz")
    }


def _json_lines(path: Path) -> Iterator[Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


@lru_cache(maxsize=1)
def _debian(folder: str) -> dict[str, tuple[Sense, ...]]:
    """WordNet's own files: the index gives byte offsets into the data, whose lines end in ``| gloss``."""
    index, data = Path(folder) / "index.noun", Path(folder) / "data.noun"
    if not index.is_file() or not data.is_file():
        return {}
    content = data.read_bytes()
    table = {}
    for line in index.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        fields = line.split()
        senses = []
        for offset in fields[-int(fields[2]) :]:
            entry = content[int(offset) : content.index(b"\n", int(offset))].decode()
            gloss = entry.partition("|")[2].partition(";")[0].strip()
            senses.append(Sense(f"n{offset}", gloss, "WordNet"))
        table[fields[0].replace("_", " ")] = tuple(senses)
    return table


@lru_cache(maxsize=1)
def _imagenet() -> dict[str, tuple[Sense, ...]]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    table: dict[str, list[Sense]] = {}
    for synset in info.label_names():
        lemmas = info.label_name_to_description(synset, detailed=False)
        full = info.label_name_to_description(synset, detailed=True)
        sense = Sense(synset, full.removeprefix(lemmas).lstrip(": "), "ImageNet")
        for lemma in lemmas.split(","):
            table.setdefault(lemma.strip().lower(), []).append(sense)
    return {k: tuple(v) for k, v in table.items()}
