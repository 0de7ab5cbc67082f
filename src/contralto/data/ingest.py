"""Ingest: one step from what people have to the manifest that everything else reads."""

import hashlib
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from contralto.data.images import (
    ImageError,
    decode_image,
    duplicate_groups,
    filter_reason,
    perceptual_hash,
    probe_image,
)
from contralto.data.manifest import CLEAN_SETS, MANIFEST_SCHEMA, SKIPPED_SCHEMA, ClassInfo, Manifest
from contralto.data.sources import Record, read_records, root_of
from contralto.errors import DataError

__all__ = ["ROLES", "clean_name", "find_columns", "ingest"]

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
    workers: int = 2,
    allow_outside: bool = False,
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
    workers : int
        Threads that decode.
    allow_outside : bool
        Let tables name files outside their folder.
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
    examine = _examiner(image_filter, min_side, blank_share)
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    columns: Counter[str] = Counter()
    found = read_records(str(address), image_column=image_column, allow_outside=allow_outside)
    records = (_with_bounded_texts(record, 4 * max_text) for record in found)
    for seen, (record, result) in enumerate(_map_ordered(examine, records, workers)):
        if progress is not None:
            progress(seen + 1)
        columns.update(record.fields.keys())
        if isinstance(result, str):
            if left_out is not None:
                left_out(seen)
            reason, _, detail = result.partition("\t")
            skipped.append(
                {
                    "id": clean_name(record.id),
                    "source": clean_name(record.source),
                    "row": record.row,
                    "reason": reason,
                    "detail": detail,
                }
            )
        else:
            rows.append({"record": record, **result})
        record.data = b""
    if not rows:
        reasons = Counter(s["reason"] for s in skipped).most_common(5)
        told = ", ".join(f"{n} {r}" for r, n in reasons) or "no pictures were found"
        raise DataError(f"not one usable picture: {told}", file=str(address))
    several = ("text", "clean") if multilabel else ("text",)
    roles = find_columns(columns, named, several=several)
    if multilabel:
        return _build_sets(str(address), rows, skipped, roles, classes, max_text)
    return _build(str(address), rows, skipped, roles, classes, max_text)


def _examiner(image_filter: bool, min_side: int, blank_share: float | None) -> Callable[[Record], dict[str, Any] | str]:
    def examine(record: Record) -> dict[str, Any] | str:
        if record.problem:
            return record.problem
        try:
            info = probe_image(record.data)
            image = decode_image(record.data)
        except ImageError as error:
            return f"{error.reason}\t{error.detail}"
        if image_filter:
            reason = filter_reason(image, min_side=min_side, blank_share=blank_share)
            if reason is not None:
                return f"{reason}\t{info.width} x {info.height}"
        return {
            "width": info.width,
            "height": info.height,
            "format": info.format,
            "length": len(record.data),
            "sha256": hashlib.sha256(record.data).hexdigest(),
            "phash": perceptual_hash(image),
        }

    return examine


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


def _with_bounded_texts(record: Record, limit: int) -> Record:
    record.fields = {k: _bounded(v, limit) for k, v in record.fields.items()}
    return record


def _bounded(value: Any, limit: int) -> Any:
    """A value of a text or of a list of texts, cut: all rows are held until the manifest is made."""
    if isinstance(value, (str, bytes)):
        return value[:limit]
    if isinstance(value, (list, tuple)):
        return [_bounded(v, limit) for v in value[:1000]]
    if isinstance(value, dict):
        return {k: _bounded(v, limit) for k, v in islice(value.items(), 1000)}
    return value


def clean_name(text: str) -> str:
    """A name from outside: control and direction signs away, bounded."""
    return _CONTROL.sub("", str(text))[:MAX_NAME]


def _value(fields: Mapping[str, Any], columns: Sequence[str]) -> Any:
    return next((fields[c] for c in columns if fields.get(c) is not None), None)


def _name(value: Any, row: Record) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, (list, tuple, dict)):
        raise DataError(
            "several labels for one picture: use the system for multi-label data", file=row.source, row=row.row
        )
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return clean_name(str(value)).strip() or None


def _build(
    address: str,
    rows: list[dict[str, Any]],
    skipped: list[dict[str, Any]],
    roles: dict[str, list[str]],
    classes: Sequence[ClassInfo] | None,
    max_text: int,
) -> Manifest:
    records: list[Record] = [r["record"] for r in rows]
    given = [_name(_value(r.fields, roles["label"]), r) for r in records]
    clean = [_name(_value(r.fields, roles["clean"]), r) for r in records]
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
    if not names:
        raise DataError("no given labels were found; name their column with --label_column", file=address)
    out_of_set = -1 if roles["clean"] else -2
    numbers = [-1 if g is None else names[g] for g in given]
    right = [names.get(c, -1) if c is not None else out_of_set for c in clean]
    table = _table(rows, roles, numbers, right, max_text)
    return Manifest(table, tuple(classes), root_of(address), pa.Table.from_pylist(skipped, schema=SKIPPED_SCHEMA))


def _build_sets(
    address: str,
    rows: list[dict[str, Any]],
    skipped: list[dict[str, Any]],
    roles: dict[str, list[str]],
    classes: Sequence[ClassInfo] | None,
    max_text: int,
) -> Manifest:
    """The manifest of multi-label data: no given label, right ones as sets."""
    if classes is None:
        raise DataError("multi-label data need a file of definitions: it says what the classes are", file=address)
    number = {q.casefold(): i for i, c in enumerate(classes) for q in (*c.queries, c.name)}
    sets: list[list[int] | None] = []
    for r in rows:
        values = [r["record"].fields.get(c) for c in roles["clean"]]
        words = [w for v in values if v is not None for w in (v if isinstance(v, (list, tuple)) else [v])]
        found = {number[w] for w in (clean_name(str(w)).strip().casefold() for w in words) if w in number}
        sets.append(sorted(found) if words else None)
    table = _table(rows, roles, [-1] * len(rows), [-2] * len(rows), max_text)
    left_out = pa.Table.from_pylist(skipped, schema=SKIPPED_SCHEMA)
    return Manifest(table, tuple(classes), root_of(address), left_out, pa.array(sets, CLEAN_SETS))


def _table(
    rows: list[dict[str, Any]], roles: dict[str, list[str]], given: list[int], clean: list[int], max_text: int
) -> pa.Table:
    records: list[Record] = [r["record"] for r in rows]
    identities = _unique([clean_name(_value(r.fields, roles["id"]) if roles["id"] else r.id) for r in records])
    splits = [clean_name(_value(r.fields, roles["split"]) or "train") for r in records]
    texts = [
        _CONTROL.sub("", ". ".join(_as_text(r.fields[c]) for c in roles["text"] if r.fields.get(c)))[:max_text]
        for r in records
    ]
    sha256 = np.array([r["sha256"] for r in rows])
    phash = np.array([r["phash"] for r in rows], dtype=np.uint64)
    return pa.table(
        {
            "index": np.arange(len(rows)),
            "id": identities,
            "source": [r.source for r in records],
            "container": [r.container for r in records],
            "member": [r.member for r in records],
            "offset": [r.offset for r in records],
            "length": [r["length"] for r in rows],
            "width": [r["width"] for r in rows],
            "height": [r["height"] for r in rows],
            "format": [r["format"] for r in rows],
            "sha256": sha256.tolist(),
            "phash": phash,
            "duplicate_group": duplicate_groups(phash, sha256),
            "label": given,
            "text": texts,
            "split": splits,
            "clean_label": clean,
            "group": [clean_name(_value(r.fields, roles["group"]) or "") for r in records],
        },
        schema=MANIFEST_SCHEMA,
    )


def _as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _unique(identities: list[str]) -> list[str]:
    """Ids that occur again get "#2", "#3", ... so that every row keeps a name of its own."""
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
