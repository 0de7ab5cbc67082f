"""Texts from the web: cleaned of junk, bounded, and of words that say nothing about the class."""

import html
import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from contralto.errors import UsageError

__all__ = ["clean_text", "clean_texts", "drop_even_words", "names_in_texts", "stems_of", "words_of"]

MAX_CHARACTERS = 10_000
_SUFFIX = re.compile(r"\.(?:jpe?g|png|gif)\b")
_TAG = re.compile(r"<[^<>]{0,1000}>")
_ADDRESS = re.compile(
    r"\S{0,200}(?:https?:|www\.)\S{0,500}|\S{0,200}\.(?:com|net|org|uk|de|info|co|io|ru|fr|it|jp|cn)\b\S{0,200}"
)
_JOINT = re.compile(r"(?<=\w)[-'\u2019](?=\w)")
_DIGITS = re.compile(r"\d+")
_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """Lower-case words of a text, with hyphens and apostrophes inside words removed ("T-shirt" is "tshirt").

    Examples
    --------
    >>> words_of("Men's T-Shirt, size 40")
    ['mens', 'tshirt', 'size', '40']
    """
    return _WORD.findall(_JOINT.sub("", text.lower()))


def clean_text(text: str, *, keep: Collection[str] = frozenset(), words: Literal["english", "any"] = "english") -> str:
    """Clean one text (CAPro 0.4, in its order).

    Lower case; image suffixes, entities, tags, addresses and line breaks away; then word by word: digits away, words of at
    most two letters, with other signs, stop words and unknown words away. Words of `keep` always survive: names of
    classes such as "kurta" stand in no list of English words.

    Parameters
    ----------
    text : str
        Only the first 10,000 characters count.
    keep : collection of str
        Lower-case words that survive whatever the lists say.
    words : {"english", "any"}
        "any" asks for no known word and drops no short word of other scripts: for multilingual encoders.

    Returns
    -------
    str
        Words joined by spaces; a single space if nothing is left.

    Examples
    --------
    >>> clean_text("Fabindia Men&#39;s KURTA qxzzv <b>img_12.jpg</b> www.shop.com", keep={"kurta"})
    'mens kurta img'
    >>> clean_text("красная обувь 42", words="any")
    'красная обувь'
    """
    if words not in ("english", "any"):
        raise UsageError(f'words must be "english" or "any", got {words!r}')
    text = _SUFFIX.sub(" ", text[:MAX_CHARACTERS].lower())
    text = _ADDRESS.sub(" ", _TAG.sub(" ", html.unescape(text)))
    kept = []
    for word in words_of(text):
        bare = word if word in keep else _DIGITS.sub("", word)
        if bare in keep or (_known(bare) if words == "english" else _wordlike(bare)):
            kept.append(bare)
    return " ".join(kept) or " "


def clean_texts(
    texts: Sequence[str], *, keep: Collection[str] = frozenset(), words: Literal["english", "any"] = "english"
) -> list[str]:
    """`clean_text` for many; see there."""
    keep = frozenset(keep)
    return [clean_text(t, keep=keep, words=words) for t in texts]


@lru_cache(maxsize=200_000)
def _known(word: str) -> bool:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
    from wordfreq import zipf_frequency

    # Zipf 2 is one occurrence in ten million words: dictionary words pass, names of files and most misspellings do not.
    return len(word) > 2 and word.isalpha() and word not in ENGLISH_STOP_WORDS and zipf_frequency(word, "en") >= 2.0


@lru_cache(maxsize=200_000)
def _wordlike(word: str) -> bool:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return word.isalpha() and word not in ENGLISH_STOP_WORDS and (len(word) > 2 or not word.isascii())


def drop_even_words(
    texts: Sequence[str],
    labels: npt.NDArray[np.int64],
    num_classes: int,
    *,
    keep: Collection[str] = frozenset(),
    min_count: int = 20,
    evenness: float = 0.5,
) -> list[str]:
    """Remove words that are spread evenly over the classes, such as brands: they only add noise to a match.

    A word is even when the classes of its texts differ little from those of all texts: the mutual information of one
    occurrence with the class, KL(p(class | word) || p(class)), less what chance alone gives a word of that count
    ((C - 1) / (2 n), the expectation of the G statistic), is below `evenness` of the most that a word could say,
    the entropy of p(class).

    Parameters
    ----------
    texts : sequence of str
        Cleaned texts.
    labels : array (N,)
        Given labels in [0, num_classes); others are left out of the count.
    num_classes : int
    keep : collection of str
        Words never removed: those of class names, queries and definitions.
    min_count : int
        Rarer words are left alone; nothing can be said about them.
    evenness : float
        In [0, 1]; 0 removes almost nothing, 1 nearly everything.

    Returns
    -------
    list of str

    Examples
    --------
    >>> texts = ["acme shoe", "acme hat", "brio shoe", "brio hat"] * 30
    >>> drop_even_words(texts, np.array([0, 1, 0, 1] * 30), 2)[:2]
    ['shoe', 'hat']
    """
    from sklearn.feature_extraction.text import CountVectorizer

    valid = (labels >= 0) & (labels < num_classes)
    vectorizer = CountVectorizer(binary=True, tokenizer=str.split, token_pattern=None, lowercase=False)
    try:
        occurs = vectorizer.fit_transform([t for t, ok in zip(texts, valid, strict=True) if ok])
    except ValueError:
        return list(texts)  # not one word in all texts
    one_hot = np.eye(num_classes)[labels[valid]]
    table = occurs.T @ one_hot  # (words, classes)
    count = table.sum(1)
    prior = (one_hot.sum(0) + 0.5) / (len(one_hot) + 0.5 * num_classes)
    share = table / count[:, None]
    information = np.where(share > 0, share * np.log(np.where(share > 0, share, 1) / prior), 0).sum(1)
    most = -(prior * np.log(prior)).sum()
    even = (count >= min_count) & (information - (num_classes - 1) / (2 * count) < evenness * most)
    removed = {w for w, e in zip(vectorizer.get_feature_names_out(), even, strict=True) if e and w not in keep}
    return [" ".join(w for w in t.split() if w not in removed) or " " for t in texts]


def names_in_texts(texts: Sequence[str], names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Whether each text holds each class name as whole words, plural or not, hyphens aside (N, C).

    Examples
    --------
    >>> names_in_texts(["Nike T-Shirts", "a shirt", "catalogue"], ["Tshirts", "cat"]).tolist()
    [[True, False], [False, False], [False, False]]
    """
    unique, inverse = np.unique(np.asarray(list(texts), dtype=object).astype(str), return_inverse=True)
    lines = [f" {stems_of(t)} " for t in unique.tolist()]
    sought = [f" {stems_of(n)} " for n in names]
    found = np.array([[s in line for s in sought] for line in lines], dtype=bool).reshape(len(lines), len(sought))
    found[:, [not s.strip() for s in sought]] = False
    return found[inverse]


def stems_of(text: str) -> str:
    """Words of a text as `names_in_texts` compares them: lower-case letters, no hyphens, no plural.

    Examples
    --------
    >>> stems_of("Men's T-Shirts, 2 for 1")
    'men tshirt for'
    """
    words = re.findall(r"[^\W\d_]+", re.sub(r"[-'\u2019_]", "", text.lower()))
    return " ".join(_stem(w) for w in words)


def _stem(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word
