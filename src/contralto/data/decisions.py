"""What people decided about the labels of a run: kept in SQLite, at once, with who and when.

An action is what a reviewer did in one go, for one picture or for many; it can be undone, and stays in the history then.
What holds for a picture is the last action of each reviewer that was not undone; where reviewers differ, the last one.
"""

import json
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock
from typing import Any

from contralto.errors import DataError

__all__ = ["DATABASE", "Action", "Decision", "Decisions"]

DATABASE = "review.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS actions (
    number INTEGER PRIMARY KEY AUTOINCREMENT, reviewer TEXT NOT NULL, time TEXT NOT NULL, told TEXT NOT NULL, undone TEXT
);
CREATE TABLE IF NOT EXISTS decisions (
    action INTEGER NOT NULL REFERENCES actions (number), id TEXT NOT NULL, labels TEXT NOT NULL,
    PRIMARY KEY (action, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_id ON decisions (id);
CREATE TABLE IF NOT EXISTS secret (value TEXT NOT NULL);
"""
_HOLDING = """
SELECT d.id, d.labels, a.reviewer, a.time, a.number FROM decisions d JOIN actions a ON a.number = d.action
WHERE a.undone IS NULL ORDER BY a.number
"""
_HOLDING_AGAIN = """
SELECT d.id, d.labels, a.reviewer, a.time, a.number FROM decisions u
JOIN decisions d ON d.id = u.id JOIN actions a ON a.number = d.action
WHERE u.action = ? AND a.reviewer = ? AND a.undone IS NULL ORDER BY a.number
"""
_HISTORY = """
SELECT a.number, a.reviewer, a.time, a.told, a.undone, COUNT(d.id) FROM actions a
LEFT JOIN decisions d ON d.action = a.number WHERE a.number BETWEEN ? AND ?
GROUP BY a.number ORDER BY a.number DESC LIMIT ?
"""


@dataclass(frozen=True)
class Decision:
    """The labels of one picture by one reviewer.

    Attributes
    ----------
    labels : tuple of str
        Names of classes; none for a picture of none of them.
    reviewer : str
    time : str
        UTC, ISO 8601.
    action : int
    """

    labels: tuple[str, ...]
    reviewer: str
    time: str
    action: int


@dataclass(frozen=True)
class Action:
    """One line of the history: what was done (`told`), to how many pictures, by whom and when, and when undone."""

    number: int
    reviewer: str
    time: str
    told: str
    undone: str | None
    pictures: int


class Decisions:
    """The decisions about one run; several threads and processes may use them at the same time.

    Parameters
    ----------
    run : path
        Run folder; the decisions are in `review.sqlite` there.
    changed : function, optional
        Called with the ids of pictures for which something new holds, whoever decided it, before anything is read.

    Raises
    ------
    DataError
        If the file is no such database.

    Examples
    --------
    >>> import tempfile
    >>> decisions = Decisions(tempfile.mkdtemp())
    >>> _ = decisions.decide({"a.jpg": ["crane"], "b.jpg": []}, reviewer="ada", told="two pictures")
    >>> _ = decisions.decide({"a.jpg": ["heron"]}, reviewer="ben", told="corrected to heron")
    >>> decisions.of("a.jpg").labels, decisions.of("b.jpg").labels
    (('heron',), ())
    >>> decisions.undo("ben").told
    'corrected to heron'
    >>> decisions.of("a.jpg").labels
    ('crane',)
    """

    def __init__(self, run: str | Path, *, changed: Callable[[Iterable[str]], None] = lambda _: None) -> None:
        self.path = Path(run) / DATABASE
        self._changed = changed
        if not self.path.exists():
            self.path.touch(mode=0o600)  # it holds the key of the sessions
        self._lock = RLock()
        self._version = -1
        self._last: dict[str, dict[str, Decision]] = {}
        try:
            self._connection = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            raise DataError(f"is no database of decisions ({error})", file=str(self.path)) from error

    def close(self) -> None:
        """Close the file; everything is in it already."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def secret(self) -> bytes:
        """A random key that stays the same for this run, for signing."""
        with self._transaction() as connection:
            found = connection.execute("SELECT value FROM secret").fetchone()
            if found is None:
                found = (secrets.token_hex(32),)
                connection.execute("INSERT INTO secret VALUES (?)", found)
        return bytes.fromhex(found[0])

    # Writing.

    def decide(self, labels: Mapping[str, Sequence[str]], *, reviewer: str, told: str) -> int:
        """Keep the labels of some pictures, on the disk when this returns.

        Parameters
        ----------
        labels : dict
            Id of a picture -> names of its classes.
        reviewer : str
        told : str
            What was done, for the history.

        Returns
        -------
        int
            Number of the action.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._transaction() as connection:
            self.refresh()
            cursor = connection.execute(
                "INSERT INTO actions (reviewer, time, told) VALUES (?, ?, ?)", (reviewer, time, told)
            )
            number = int(cursor.lastrowid or 0)
            rows = [(number, identity, json.dumps(list(names))) for identity, names in labels.items()]
            connection.executemany("INSERT INTO decisions VALUES (?, ?, ?)", rows)
        with self._lock:
            for identity, names in labels.items():
                self._put(identity, Decision(tuple(names), reviewer, time, number))
            self._changed(labels)
        return number

    def undo(self, reviewer: str) -> Action | None:
        """Take back the last action of a reviewer that is not undone; None if there is none."""
        with self._transaction() as connection:
            self.refresh()
            found = connection.execute(
                "SELECT MAX(number) FROM actions WHERE reviewer = ? AND undone IS NULL", (reviewer,)
            ).fetchone()
            if found[0] is None:
                return None
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            connection.execute("UPDATE actions SET undone = ? WHERE number = ?", (now, found[0]))
        with self._lock:
            ids = self.pictures_of(found[0])
            for identity in ids:
                if identity in self._last:
                    self._last[identity].pop(reviewer, None)
                    if not self._last[identity]:
                        del self._last[identity]
            self._read(_HOLDING_AGAIN, (found[0], reviewer))
            self._changed(ids)
        return self.history(first=found[0], last=found[0])[0]

    # Reading.

    def history(self, limit: int = 100, *, first: int = 0, last: int = 2**62) -> list[Action]:
        """At most `limit` actions with numbers from `first` to `last`, the last one first."""
        return [Action(*row) for row in self._rows(_HISTORY, (first, last, limit))]

    def pictures_of(self, action: int) -> list[str]:
        """Ids of the pictures that an action was about."""
        return [identity for (identity,) in self._rows("SELECT id FROM decisions WHERE action = ?", (action,))]

    def of(self, identity: str) -> Decision | None:
        """What holds for a picture; None if nobody decided."""
        every = self.by_reviewer(identity)
        return max(every.values(), key=lambda d: d.action) if every else None

    def by_reviewer(self, identity: str) -> dict[str, Decision]:
        """The last word of every reviewer on a picture."""
        with self._lock:
            self.refresh()
            return dict(self._last.get(identity, {}))

    def last(self, identity: str) -> dict[str, Decision]:
        """As `by_reviewer`, but as far as known: for `changed`, which must not read."""
        return self._last.get(identity, {})

    def every(self) -> dict[str, dict[str, Decision]]:
        """Id -> reviewer -> last word, of all pictures that somebody decided about."""
        with self._lock:
            self.refresh()
            return {identity: dict(found) for identity, found in self._last.items()}

    def holding(self) -> dict[str, Decision]:
        """Id -> what holds, of all pictures that somebody decided about."""
        return {identity: max(found.values(), key=lambda d: d.action) for identity, found in self.every().items()}

    def refresh(self) -> None:
        """Read everything again if another process wrote something."""
        with self._lock:
            version = self._rows("PRAGMA data_version")[0][0]
            if version != self._version:
                before, self._last = self._last, {}
                self._read(_HOLDING)
                self._version = version
                self._changed(before.keys() | self._last.keys())

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def _read(self, query: str, values: Sequence[Any] = ()) -> None:
        for identity, labels, reviewer, time, number in self._rows(query, values):
            self._put(identity, Decision(tuple(json.loads(labels)), reviewer, time, number))

    def _put(self, identity: str, decision: Decision) -> None:
        self._last.setdefault(identity, {})[decision.reviewer] = decision
