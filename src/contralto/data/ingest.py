"""Ingest: one step from what people have to the manifest that everything else reads.

Every block of the data (`data.sources.find_blocks`) is looked at by itself, here or on a cluster: pictures are decoded, filtered
and hashed, and what is known of each becomes a row of a small table. From all these tables the manifest is made in one place,
because columns, classes, ids and duplicates can only be known from all of them.
"""

import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from contralto.cluster import map_blocks
from contralto.data.images import (
    ImageError,
    decode_image,
    duplicate_groups,
    filter_reason,
    perceptual_hash,
    probe_image,
)
from contralto.data.manifest import CLEAN_SETS, MANIFEST_SCHEMA, SKIPPED_SCHEMA, ClassInfo, Manifest
from contralto.data.sources import MAX_DEPTH, Block, Record, find_blocks, read_block, root_of
from contralto.errors import DataError

__all__ = ["ROLES", "clean_name", "find_columns", "ingest", "label_name", "unique_names"]

ROLES: dict[str, tuple[str, ...]] = {
    "id": ("id", "image_id", "uid", "uuid", "key"),
    "label": ("query", "web_label", "noisy_label", "given_label", "class_name", "class", "category", "label", "target"),
    "text": ("text", "caption", "title", "description", "alt", "alt_text", "tags"),
    "split": ("split", "partition", "subset"),
    "clean": ("clean_label", "true_label", "label_clean"),
    "group": ("group", "product", "author", "speaker"),
}
"""Common column names of every role; the first that is there is taken."""

_WEB_LABELS = ("query", "web_label", "noisy_label", "given_label")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_NAME = 200
MAX_HELD = 256 * 2**20
LOOKED_AT = pa.schema(
    [
        *(
            MANIFEST_SCHEMA.field(n)
            for n in ("id", "source", "container", "member", "offset", "length", "width", "height")
        ),
        *(MANIFEST_SCHEMA.field(n) for n in ("format", "sha256", "phash")),
        *(SKIPPED_SCHEMA.field(n) for n in ("row", "reason", "detail")),
        ("fields", pa.string()),
    ]
)
"""What is known of a picture before the others are; `reason` is null where it can be used, `fields` are JSON."""


def find_columns(
    names: Iterable[str], given: Mapping[str, str | None], *, several: Sequence[str] = ("text",)
) -> dict[str, list[str]]:
    """Which columns play which role.

    Parameters
    ----------
    names : iterable of str
        Columns that are there.
    given : mapping of role to column
        What the user named.
    several : sequence of str
        Roles for which several columns may be named, joined by commas.

    Returns
    -------
    dict of role to columns
        Empty where nothing fits. A web label (query, web_label, noisy_label, given_label) beside `label` makes `label` the
        clean one.

    Raises
    ------
    DataError
        If a named column is not there.

    Examples
    --------
    >>> find_columns(["image", "query", "label", "title"], {})["label"]
    ['query']
    >>> find_columns(["image", "query", "label", "title"], {})["clean"]
    ['label']
    """
    there = list(names)
    found: dict[str, list[str]] = {}
    for role, common in ROLES.items():
        wanted = given.get(role)
        if wanted:
            columns = [c.strip() for c in wanted.split(",")] if role in several else [wanted]
            missing = [c for c in columns if c not in there]
            if missing:
                raise DataError(
                    f"there is no column {missing[0]!r} for the {role}; the columns are {', '.join(there) or 'none'}"
                )
            found[role] = columns
        else:
            found[role] = [c for c in common if c in there][:1]
    if not found["clean"] and "label" in there and any(c in _WEB_LABELS for c in found["label"]):
        found["clean"] = ["label"]
    return found


def ingest(
    address: str,
    *,
    classes: Sequence[ClassInfo] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    clean_column: str | None = None,
    group_column: str | None = None,
    image_filter: bool = True,
    min_side: int = 32,
    blank_share: float | None = 0.8,
    max_text: int = 10_000,
    multilabel: bool = False,
    unlabelled: bool = False,
    workers: int = 2,
    allow_outside: bool = False,
    on: str | None = None,
    progress: Callable[[int], None] | None = None,
    left_out: Callable[[int], None] | None = None,
) -> Manifest:
    """Read data in any of the known forms into a manifest.

    Parameters
    ----------
    address : str
        Path or fsspec address; the forms are listed in `contralto.data.sources`.
    classes : sequence of ClassInfo, optional
        The classes, in the order of their numbers; default: the given labels, sorted.
    image_column, label_column, text_column, id_column, split_column, clean_column, group_column : str, optional
        Columns or JSON keys; found by common names (`ROLES`) when not named. Several text columns are joined with commas.
    image_filter : bool
        Leave out pictures that are too small, too long or blank (CAPro 0.1), with `min_side` and `blank_share`.
    max_text : int
        Texts are cut to this many characters.
    multilabel : bool
        Pictures may show several classes: the given labels are left for `data.tags` to find in the texts, and the right ones are
        what the columns of `clean_column`, joined by commas, name among the classes or their search words.
    unlabelled : bool
        Do without given labels where there are none; there are no classes then.
    workers : int
        Threads that decode, in every process.
    allow_outside : bool
        Let tables name files outside their folder.
    on : str, optional
        Where pictures are read: see `contralto.cluster.map_blocks`. Changes nothing in what comes out.
    progress : function, optional
        Called with the number of pictures seen so far.
    left_out : function, optional
        Called with the place of every picture that cannot be used, counted from 0 in the order of reading.

    Returns
    -------
    Manifest
        What cannot be used is in `skipped`, with its reason. A missing given label is -1. A null clean label means out of
        set (-1) where the data have clean labels at all, else -2 (not known).

    Raises
    ------
    DataError
        If nothing usable is found, or a named column is not there.
    """
    named = {
        "id": id_column, "label": label_column, "text": text_column, "split": split_column, "clean": clean_column,
        "group": group_column,
    }  # fmt: skip
    kept = {c for given in named.values() if given for c in (given, *map(str.strip, given.split(",")))}
    look = partial(
        _look,
        options=_Options(
            image_column, allow_outside, image_filter, min_side, blank_share, 4 * max_text, workers,
            frozenset(kept.union(*ROLES.values())),
        ),
    )  # fmt: skip
    if on is None and progress is not None:
        numbers = count(1)
        look = partial(look, tick=lambda: progress(next(numbers)))
    tables: list[pa.Table] = []
    columns: dict[str, None] = {}
    seen = 0
    for table, names in map_blocks(look, find_blocks(str(address), image_column=image_column), on=on):
        tables.append(table)
        columns |= dict.fromkeys(names)
        if left_out is not None:
            for place in np.flatnonzero(table.column("reason").is_valid().to_numpy()):
                left_out(seen + int(place))
        seen += table.num_rows
        if on is not None and progress is not None:
            progress(seen)
    every = pa.concat_tables(tables) if tables else LOOKED_AT.empty_table()
    usable = every.column("reason").is_null()
    rows, skipped = every.filter(usable), every.filter(pc.invert(usable)).select(SKIPPED_SCHEMA.names)
    if not rows.num_rows:
        reasons = Counter(skipped.column("reason").to_pylist()).most_common(5)
        told = ", ".join(f"{n} {r}" for r, n in reasons) or "no pictures were found"
        raise DataError(f"not one usable picture: {told}", file=str(address))
    several = ("text", "clean") if multilabel else ("text",)
    roles = find_columns(columns, named, several=several)
    if multilabel:
        return _build_sets(str(address), rows, skipped, roles, classes, max_text)
    return _build(str(address), rows, skipped, roles, classes, max_text, unlabelled)


@dataclass(frozen=True)
class _Options:
    """How pictures are looked at; `kept` are the columns that may play a role."""

    image_column: str | None
    allow_outside: bool
    image_filter: bool
    min_side: int
    blank_share: float | None
    max_text: int
    workers: int
    kept: frozenset[str]


def _look(block: Block, *, options: _Options, tick: Callable[[], None] | None = None) -> tuple[pa.Table, list[str]]:
    """Decode, filter and hash the pictures of a block: a row of `LOOKED_AT` for each, and the names of all columns."""
    examine = partial(_examine, options=options)
    tables: list[pa.Table] = []
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    records = read_block(block, image_column=options.image_column, allow_outside=options.allow_outside)
    bounded = (_with_bounded_texts(record, options, names) for record in records)
    for record, result in _map_ordered(examine, bounded, options.workers):
        if "reason" in result:
            place = {"id": clean_name(record.id), "source": clean_name(record.source), "row": record.row}
        else:
            place = {k: getattr(record, k) for k in ("source", "container", "member", "offset", "row")}
            place |= {"id": clean_name(record.id), "fields": json.dumps(record.fields, default=str)}
        rows.append(place | result)
        record.data = b""
        if tick is not None:
            tick()
        if len(rows) == 1000:
            tables.append(pa.Table.from_pylist(rows, LOOKED_AT))
            rows = []
    return pa.concat_tables([*tables, pa.Table.from_pylist(rows, LOOKED_AT)]), list(names)


def _examine(record: Record, options: _Options) -> dict[str, Any]:
    """What the bytes of a picture say: columns of `LOOKED_AT`, or the reason why it cannot be used."""
    if record.problem:
        return {"reason": record.problem, "detail": ""}
    try:
        info = probe_image(record.data)
        image = decode_image(record.data)
    except ImageError as error:
        return {"reason": error.reason, "detail": error.detail}
    if options.image_filter:
        reason = filter_reason(image, min_side=options.min_side, blank_share=options.blank_share)
        if reason is not None:
            return {"reason": reason, "detail": f"{info.width} x {info.height}"}
    return {
        "width": info.width,
        "height": info.height,
        "format": info.format,
        "length": len(record.data),
        "sha256": hashlib.sha256(record.data).hexdigest(),
        "phash": perceptual_hash(image),
    }


def _map_ordered(
    function: Callable[[Record], Any], records: Iterator[Record], workers: int
) -> Iterator[tuple[Record, Any]]:
    """Map with threads, in order, holding only a few records and few bytes at a time."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting: deque[tuple[Record, Future[Any]]] = deque()
        held = 0
        for record in records:
            waiting.append((record, pool.submit(function, record)))
            held += len(record.data)
            while len(waiting) >= 64 or (held > MAX_HELD and waiting):
                first, future = waiting.popleft()
                held -= len(first.data)
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()


def _with_bounded_texts(record: Record, options: _Options, names: dict[str, None]) -> Record:
    """Enter the names of all columns into `names`, and keep those that may play a role, cut."""
    names |= dict.fromkeys(record.fields)
    record.fields = {k: _bounded(v, options.max_text) for k, v in record.fields.items() if k in options.kept}
    return record


def _bounded(value: Any, limit: int, depth: int = 0) -> Any:
    """A value of a text or of a list of texts, cut: all rows are held until the manifest is made."""
    if isinstance(value, (str, bytes)):
        return value[:limit]
    if depth == MAX_DEPTH:
        return None
    if isinstance(value, (list, tuple)):
        return [_bounded(v, limit, depth + 1) for v in value[:1000]]
    if isinstance(value, dict):
        return {k: _bounded(v, limit, depth + 1) for k, v in islice(value.items(), 1000)}
    return value


def clean_name(text: str, limit: int = MAX_NAME) -> str:
    """A name, or a text, from outside: control and direction signs away, bounded."""
    return _CONTROL.sub("", str(text))[:limit]


def _value(fields: Mapping[str, Any], columns: Sequence[str]) -> Any:
    return next((fields[c] for c in columns if fields.get(c) is not None), None)


def _names(rows: pa.Table, columns: Sequence[str]) -> list[str | None]:
    """The label of every picture, as a cleaned name."""
    places = zip(_fields(rows), rows.column("source").to_pylist(), rows.column("row").to_pylist(), strict=True)
    return [label_name(_value(fields, columns), source, row) for fields, source, row in places]


def _fields(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """The columns of every picture, one after the other: all at once may not fit into memory."""
    for chunk in rows.column("fields").chunks:
        yield from map(json.loads, chunk.to_pylist())


def label_name(value: Any, source: str, row: int) -> str | None:
    """The name of a class as a cell has it, cleaned; None where there is none.

    Raises
    ------
    DataError
        If the cell holds several.

    Examples
    --------
    >>> label_name(3.0, "a.csv", 0), label_name("", "a.csv", 1)
    ('3', None)
    """
    if value is None or value == "":
        return None
    if isinstance(value, (list, dict)):
        raise DataError("several labels in one row: use the system for multi-label data", file=source, row=row)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return clean_name(str(value)).strip() or None


def _build(
    address: str,
    rows: pa.Table,
    skipped: pa.Table,
    roles: dict[str, list[str]],
    classes: Sequence[ClassInfo] | None,
    max_text: int,
    unlabelled: bool,
) -> Manifest:
    given, clean = _names(rows, roles["label"]), _names(rows, roles["clean"])
    if classes is None:
        classes = [ClassInfo(name, (name,)) for name in sorted({g for g in given if g is not None})]
    names = {c.name: i for i, c in enumerate(classes)}
    if all(g is None or g.isdigit() for g in given) and not names.keys() & set(given):  # numbers of the classes
        names |= {str(i): i for i in range(len(classes))}
    unknown = sorted({g for g in given if g is not None and g not in names})
    if unknown:
        raise DataError(
            f"the given labels {', '.join(unknown[:5])} are not among the {len(classes)} classes of the definitions",
            file=address,
        )
    if not names and not unlabelled:
        raise DataError("no given labels were found; name their column with --label_column", file=address)
    out_of_set = -1 if roles["clean"] else -2
    numbers = [-1 if g is None else names[g] for g in given]
    right = [names.get(c, -1) if c is not None else out_of_set for c in clean]
    table = _table(rows, roles, numbers, right, max_text)
    return Manifest(table, tuple(classes), root_of(address), skipped)


def _build_sets(
    address: str,
    rows: pa.Table,
    skipped: pa.Table,
    roles: dict[str, list[str]],
    classes: Sequence[ClassInfo] | None,
    max_text: int,
) -> Manifest:
    """The manifest of multi-label data: no given label, right ones as sets."""
    if classes is None:
        raise DataError("multi-label data need a file of definitions: it says what the classes are", file=address)
    number = {q.casefold(): i for i, c in enumerate(classes) for q in (*c.queries, c.name)}
    sets: list[list[int] | None] = []
    for fields in _fields(rows):
        values = [fields.get(c) for c in roles["clean"]]
        words = [w for v in values if v is not None for w in (v if isinstance(v, list) else [v])]
        found = {number[w] for w in (clean_name(str(w)).strip().casefold() for w in words) if w in number}
        sets.append(sorted(found) if words else None)
    unknown = [-1] * len(sets), [-2] * len(sets)
    return Manifest(
        _table(rows, roles, *unknown, max_text), tuple(classes), root_of(address), skipped, pa.array(sets, CLEAN_SETS)
    )


def _table(rows: pa.Table, roles: dict[str, list[str]], given: list[int], clean: list[int], max_text: int) -> pa.Table:
    ids, texts, splits, groups = [], [], [], []
    for fields, found in zip(_fields(rows), rows.column("id").to_pylist(), strict=True):
        ids.append(clean_name(_value(fields, roles["id"])) if roles["id"] else found)
        text = ". ".join(_as_text(fields[c]) for c in roles["text"] if fields.get(c))
        texts.append(clean_name(text, max_text))
        splits.append(clean_name(_value(fields, roles["split"]) or "train"))
        group = _value(fields, roles["group"])
        groups.append(clean_name("" if group is None else group))  # 0 is a group like any other
    sha256 = rows.column("sha256").to_numpy(zero_copy_only=False).astype(str)
    phash = rows.column("phash").to_numpy()
    told: dict[str, Any] = {
        "index": np.arange(len(rows)),
        "id": unique_names(ids),
        "duplicate_group": duplicate_groups(phash, sha256),
        "label": given,
        "text": texts,
        "split": splits,
        "clean_label": clean,
        "group": groups,
    }
    found = {n: rows.column(n).combine_chunks() for n in MANIFEST_SCHEMA.names if n not in told}
    return pa.table({n: (told | found)[n] for n in MANIFEST_SCHEMA.names}, schema=MANIFEST_SCHEMA)


def _as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def unique_names(identities: list[str]) -> list[str]:
    """Ids that occur again get "#2", "#3", ... so that every row keeps a name of its own.

    Examples
    --------
    >>> unique_names(["a", "b", "a"])
    ['a', 'b', 'a#2']
    """
    seen: Counter[str] = Counter()
    out = []
    taken = set(identities)
    for identity in identities:
        seen[identity] += 1
        name = identity
        while seen[identity] > 1 and name in taken:
            name = f"{identity}#{seen[identity]}"
            if name in taken:
                seen[identity] += 1
        taken.add(name)
        out.append(name)
    return out
