"""Pictures of a manifest on their way to an encoder: which, where, and what is drawn of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from contralto.data.manifest import Manifest
from contralto.data.sources import ByteReader
from contralto.views.image import EvalView, View, draw_views, view_generator

__all__ = ["PictureBlock", "PictureReader", "picture_blocks"]

BLOCK, BATCH = 512, 64


@dataclass(frozen=True)
class PictureBlock:
    """Some pictures of a manifest: their rows (N,), and where their bytes are, as arguments of `ByteReader.read`."""

    rows: npt.NDArray[np.int64]
    places: list[tuple[Any, ...]]

    def __len__(self) -> int:
        return len(self.places)


def picture_blocks(manifest: Manifest, rows: npt.NDArray[Any], *, size: int | None = None) -> list[PictureBlock]:
    """Rows of a manifest in blocks.

    Parameters
    ----------
    manifest : Manifest
    rows : array (N,)
        Numbers of the rows.
    size : int, optional
        Rows of a block, 512 by default; the last one may have fewer.

    Returns
    -------
    list of PictureBlock
        In the order of `rows`.
    """
    size = BLOCK if size is None else size
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [PictureBlock(part, manifest.places(part)) for part in parts]


class PictureReader:
    """Reads pictures by their places and draws one view of each.

    Parameters
    ----------
    root : str
        `Manifest.root`.
    view : View or EvalView
    variant : int
        Stands for the epoch in the drawing of views, whose seed is 0.
    """

    def __init__(self, root: str, view: View | EvalView, variant: int = 0) -> None:
        self._reader, self.view, self.variant = ByteReader(root), view, variant

    def batches(self, block: PictureBlock, size: int = BATCH) -> Iterator[Tensor]:
        """The pixels of a block in batches (B, 3, S, S).

        Raises
        ------
        DataError
            If a file is gone or has changed.
        """
        for start in range(0, len(block), size):
            part = slice(start, start + size)
            pictures = zip(block.rows[part].tolist(), block.places[part], strict=True)
            yield torch.stack([self._draw(row, place) for row, place in pictures])

    def _draw(self, row: int, place: tuple[Any, ...]) -> Tensor:
        generator = view_generator(0, self.variant, row, int(isinstance(self.view, View)))
        return draw_views(self._reader.read(*place), [self.view], [generator])[0]
