"""Tags as web labels: words that users glued together, and which classes a picture's tags name."""

import re
from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from contralto.data.manifest import ClassInfo
from contralto.data.text import stems_of, words_of

__all__ = ["split_glued", "tag_labels"]

LONGEST = 24
"""Letters of the longest word that is looked for inside a tag."""


def split_glued(text: str, *, keep: Collection[str] = frozenset()) -> str:
    """Split tags such as "bluesky" into words (CAPro 0.4): the most probable segmentation by frequencies of English words.

    Parameters
    ----------
    text : str
        Words of letters are looked at; others stay as they are.
    keep : collection of str
        Lower-case words that count as common, such as those of the classes.

    Returns
    -------
    str
        Lower-case words joined by spaces.

    Examples
    --------
    >>> split_glued("newyorkcity #bluesky sunset")
    'new york city blue sky sunset'
    >>> split_glued("redkurta", keep={"kurta"})
    'red kurta'
    """
    keep = frozenset(keep)
    return " ".join(part for word in words_of(text) for part in _segments(word, keep))


@lru_cache(maxsize=200_000)
def _segments(word: str, keep: frozenset[str]) -> tuple[str, ...]:
    """The split of one word with the highest product of word probabilities (a Viterbi search over its letters)."""
    if len(word) < 4 or len(word) > 200 or not (word.isascii() and word.isalpha()) or word in keep:
        return (word,)
    best: list[tuple[float, int]] = [(0.0, 0)]  # log-probability of the first n letters, and where the last word starts
    for end in range(1, len(word) + 1):
        starts = range(max(0, end - LONGEST), end)
        best.append(max((best[s][0] + _log_probability(word[s:end], keep), s) for s in starts))
    parts, end = [], len(word)
    while end:
        start = best[end][1]
        parts.append(word[start:end])
        end = start
    return tuple(reversed(parts))


@lru_cache(maxsize=500_000)
def _log_probability(word: str, keep: frozenset[str]) -> float:
    """Logarithm to base ten; a word that nobody knows gets less with every letter (Norvig 2009)."""
    from wordfreq import zipf_frequency

    if word in keep:
        return -4.0
    zipf = float(zipf_frequency(word, "en"))
    known = zipf >= 2.5 and (len(word) > 2 or word in _SHORT)
    return zipf - 9.0 if known else -8.0 - len(word)


_SHORT = frozenset(
    ("a", "i", "am", "an", "as", "at", "be", "by", "do", "go", "he", "if", "in", "is", "it", "me", "my", "no", "of", "on",
     "or", "so", "to", "up", "us", "we")
)  # fmt: skip
"""Words of one or two letters; all other short strings that a list of frequencies knows are abbreviations."""


def tag_labels(
    texts: Sequence[str], classes: Sequence[ClassInfo], *, glued: bool = True, specific: bool = False
) -> npt.NDArray[np.bool_]:
    """Which classes the tags of every picture name: their name or one of their search words, as whole words.

    Parameters
    ----------
    texts : sequence of str (N,)
        Tags, titles, captions.
    classes : sequence of ClassInfo (C,)
    glued : bool
        Split glued tags first.
    specific : bool
        A word that ends a longer name of another class names that class alone: "blue" in "navy blue" is no blue. For classes
        that exclude each other; where a school bus is to be a bus as well, it is wrong.

    Returns
    -------
    array (N, C) bool

    Examples
    --------
    >>> classes = [ClassInfo("sky"), ClassInfo("dog", ("dog", "puppy"))]
    >>> tag_labels(["bluesky sea", "two puppies", "skyline"], classes).tolist()
    [[True, False], [False, True], [False, False]]
    >>> tag_labels(["navy blue", "navy"], [ClassInfo("blue"), ClassInfo("navy blue")], specific=True).tolist()
    [[False, True], [False, False]]
    """
    keep = {w for c in classes for s in (c.name, *c.queries) for w in words_of(s)}
    lines = [f" {stems_of(f'{t} {split_glued(t, keep=keep)}' if glued else t)} " for t in texts]
    names = [{stems_of(s) for s in (c.name, *c.queries)} - {""} for c in classes]
    out = np.zeros((len(lines), len(classes)), bool)
    for c, own in enumerate(names):
        longer = {n for other in names for n in other if any(n.endswith(f" {s}") for s in own)} - own
        read = [_without_heads(line, longer, own) for line in lines] if specific and longer else lines
        out[:, c] = [any(f" {name} " in line for name in own) for line in read]
    return out


def _without_heads(line: str, longer: Collection[str], own: Collection[str]) -> str:
    """A line in which longer names have lost their last words, where those are a name of one's own."""
    for name in longer:
        head = max((s for s in own if name.endswith(f" {s}")), key=len)
        line = re.sub(rf"\b({re.escape(name.removesuffix(f' {head}'))}) {re.escape(head)}\b", r"\1", line)
    return line
