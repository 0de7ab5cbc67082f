"""Texts without pictures: read from any of their usual files, and as numbers of words."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from contralto.data.sources import open_filesystem, read_lines, read_rows
from contralto.errors import DataError, UsageError

__all__ = ["END", "PAD", "START", "UNKNOWN", "Characters", "Vocabulary", "read_texts"]

PAD, START, END, UNKNOWN = range(4)
TEXT_COLUMNS = ("text", "sentence", "caption", "title", "content")
_WORD = re.compile(r"<unk>|\w+(?:['\u2019]\w+)*|[^\w\s]")


def read_texts(address: str, *, text_column: str | None = None) -> list[str]:
    r"""All texts of a file that are not blank: lines of .txt, or a column of .jsonl (both also .gz), .csv or .parquet.

    Parameters
    ----------
    address : str
        Path or fsspec address.
    text_column : str, optional
        Default: the first of text, sentence, caption, title, content that is there.

    Raises
    ------
    DataError
        Names the file, and the row where there is one.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> _ = path.write_text("one line\n\nanother\n")
    >>> read_texts(str(path))
    ['one line', 'another']
    """
    fs, path = open_filesystem(address)
    if not fs.isfile(path):
        raise DataError("there is no such file", file=address)
    kind = path.lower()
    if kind.endswith((".txt", ".txt.gz")):
        found = [line.strip() for line in read_lines(fs, path)]
    elif kind.endswith((".jsonl", ".jsonl.gz", ".csv")):
        found = []
        for row, fields in read_rows(fs, path):
            value = fields.get(_column(fields, text_column, path))
            if value is not None and not isinstance(value, str):
                raise DataError(f"a text was expected, got {type(value).__name__}", file=path, row=row)
            found.append((value or "").strip())
    elif kind.endswith(".parquet"):
        with fs.open(path, "rb") as file:
            try:
                parquet = pq.ParquetFile(file)
                column = _column(parquet.schema_arrow.names, text_column, path)
                found = [str(v or "").strip() for v in parquet.read(columns=[column]).column(0).to_pylist()]
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"is not a Parquet file that can be read ({error})"[:200], file=path) from error
    else:
        raise DataError("texts are read from .txt, .txt.gz, .jsonl, .jsonl.gz, .csv and .parquet", file=address)
    return [text for text in found if text]


def _column(names: Iterable[str], wanted: str | None, path: str) -> str:
    """The column of the texts among those there are."""
    there = list(names)
    for name in (wanted,) if wanted is not None else TEXT_COLUMNS:
        if name in there:
            return name
    told = (
        f"no column is called {wanted!r}"
        if wanted
        else "none of the columns is known to hold texts; name it: --text_column"
    )
    raise DataError(f"{told}; there are: {', '.join(there[:20])}", file=path)


class Vocabulary:
    """Words and marks by number.

    Parameters
    ----------
    words : sequence of str
        From number 4 on; before them are padding, start, end and the unknown word.

    Examples
    --------
    >>> known = Vocabulary.learn(["a cat sat", "A cat!"], least=1)
    >>> known.encode(["The cat sat."], length=6).tolist()
    [[3, 5, 7, 3, 2, 0]]
    >>> known.decode(known.encode(["a cat sat"], length=6))
    ['a cat sat']
    """

    between = " "

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._number = {word: i + 4 for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words) + 4

    @classmethod
    def learn(cls, texts: Iterable[str], *, size: int = 10_000, least: int = 2) -> "Vocabulary":
        """The most frequent words: at most `size`, each `least` times or more; of equally frequent ones the first by alphabet."""
        counts = Counter(word for text in texts for word in cls.split(text))
        counts.pop("<unk>", None)
        frequent = sorted((w for w, n in counts.items() if n >= least), key=lambda w: (-counts[w], w))[:size]
        if not frequent:
            raise UsageError(f"no word is there {least} times: there is nothing to learn from")
        return cls(frequent)

    def encode(self, texts: Sequence[str], *, length: int) -> npt.NDArray[np.int64]:
        """Numbers (N, length) of words in lower case; cut to leave room for the end, then padded."""
        out = np.full((len(texts), length), PAD, np.int64)
        for row, text in zip(out, texts, strict=True):
            numbers = [self._number.get(word, UNKNOWN) for word in self.split(text)][: length - 1]
            row[: len(numbers) + 1] = [*numbers, END]
        return out

    def decode(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """Texts: what stands before the end, put together again."""
        names = ["", "", "", "<unk>", *self.words]
        texts = []
        for row in rows.tolist():
            kept = row[: row.index(END)] if END in row else row
            texts.append(self.between.join(names[n] for n in kept if n not in (PAD, START)))
        return texts

    @staticmethod
    def split(text: str) -> list[str]:
        """The words and marks of a text, in lower case."""
        return _WORD.findall(text.lower())

    def longest(self, texts: Iterable[str]) -> int:
        """Places that the longest of some texts takes, its end included."""
        return max((len(self.split(text)) for text in texts), default=0) + 1


class Characters(Vocabulary):
    """Characters by number: for few and short texts.

    Examples
    --------
    >>> known = Characters.learn(["one", "two"], least=1)
    >>> known.words
    ['o', 'e', 'n', 't', 'w']
    >>> known.decode(known.encode(["town"], length=6))
    ['town']
    """

    between = ""

    @staticmethod
    def split(text: str) -> list[str]:
        """The characters of a text, in lower case."""
        return list(text.lower())
