"""A picture of few-shot episodes: what was taken for which class."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from contralto.review.encoder import enlarged
from contralto.review.report import thumbnail_of

__all__ = ["episode_sheet"]

RIGHT, WRONG, GREY = (34, 139, 34), (205, 38, 38), (150, 150, 150)
FRAME, GAP, BAND = 3, 14, 18


def episode_sheet(
    support: Sequence[npt.NDArray[np.uint8]],
    queries: Sequence[npt.NDArray[np.uint8]],
    truth: npt.NDArray[np.int64],
    answers: Sequence[tuple[str, npt.NDArray[np.int64]]],
    *,
    side: int = 44,
) -> Image.Image:
    """One episode under several classifiers, one below the other.

    A row is a class: its support picture in a grey frame, then the queries that were taken for it, right ones first in green
    frames, wrong ones in red.

    Parameters
    ----------
    support : sequence of uint8 arrays (H, W, 3)
        One of each class.
    queries : sequence of uint8 arrays (H, W, 3)
    truth : array (Q,)
        Class of every query.
    answers : sequence of (title, array (Q,))
        What each classifier said.
    side : int
        Of a thumbnail in pixels.

    Returns
    -------
    PIL image

    Examples
    --------
    >>> white = np.full((8, 8, 3), 255, np.uint8)
    >>> episode_sheet([white, white], [white] * 3, np.array([0, 1, 1]), [("before", np.array([0, 0, 1]))]).size
    (170, 122)
    """
    cell = side + 2 * FRAME
    widest = max(int(np.bincount(found, minlength=len(support)).max()) for _, found in answers)
    height = BAND + len(support) * cell
    sheet = Image.new("RGB", (cell + GAP + widest * cell + 6, len(answers) * height + 4), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)

    def put(picture: npt.NDArray[np.uint8], x: int, y: int, colour: tuple[int, int, int]) -> None:
        pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)
        sheet.paste(thumbnail_of(enlarged(picture, side), side - 1), (x + FRAME, y + FRAME))

    for number, (title, found) in enumerate(answers):
        top = number * height
        pen.text((4, top + 3), f"{title}: {int((found == truth).sum())} of {len(truth)} right", fill=(0, 0, 0))
        for row, picture in enumerate(support):
            y = top + BAND + row * cell
            put(picture, 2, y, GREY)
            taken = np.flatnonzero(found == row)
            for place, q in enumerate(taken[np.argsort(truth[taken] != row, kind="stable")]):
                put(queries[q], cell + GAP + place * cell, y, RIGHT if truth[q] == row else WRONG)
    return sheet
