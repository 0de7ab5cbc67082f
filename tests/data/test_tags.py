"""Glued tags, and the classes that they name."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contralto.data.manifest import ClassInfo
from contralto.data.tags import _log_probability, _segments, split_glued, tag_labels


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("newyorkcity", "new york city"), ("bluesky", "blue sky"), ("goldengatebridge", "golden gate bridge"),
        ("blackandwhite", "black and white"), ("sunset", "sunset"), ("butterfly", "butterfly"), ("nikon", "nikon"),
        ("img1234", "img1234"), ("2009", "2009"), ("красныйцвет", "красныйцвет"), ("", ""),
    ],
)  # fmt: skip
def test_common_tags_are_split_as_people_read_them(tag, words):
    assert split_glued(tag) == words


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abcdeorst", min_size=4, max_size=9))
def test_the_split_is_the_most_probable_of_all(word):
    keep = frozenset()
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, len(word)), n) for n in range(len(word)))
    every = [[word[a:b] for a, b in itertools.pairwise((0, *c, len(word)))] for c in cuts]
    best = max(sum(_log_probability(p, keep) for p in parts) for parts in every)
    found = _segments(word, keep)
    assert "".join(found) == word
    assert sum(_log_probability(p, keep) for p in found) == pytest.approx(best)


def test_a_class_is_named_by_its_name_or_a_search_word_as_a_whole_word():
    classes = [ClassInfo("Casual Shoes", ("shoe", "sneaker")), ClassInfo("red"), ClassInfo("kurta", ("kurta", "kurti"))]
    texts = ["Red sneakers", "redkurta for women", "shoehorn", "casual shoes", "predator", ""]
    expected = [[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    found = tag_labels(texts, classes)
    assert found[[0, 1, 3, 4, 5]].tolist() == np.array(expected, bool)[[0, 1, 3, 4, 5]].tolist()
    assert not tag_labels(texts, classes, glued=False)[1].any()
    assert tag_labels([], classes).shape == (0, 3)


def test_the_most_specific_name_counts_where_classes_exclude_each_other():
    classes = [
        ClassInfo("Casual Shoes", ("shoe",)), ClassInfo("Sports Shoes", ("sports shoe",)), ClassInfo("Sports"),
        ClassInfo("Blue"), ClassInfo("Navy Blue"), ClassInfo("dark navy blue"), ClassInfo("2009"),
    ]  # fmt: skip
    texts = [
        "navy blue sports shoes",
        "blue casual shoe",
        "navy-blue, blue",
        "dark navy blue navy blue",
        "sports, shoe",
        "2009",
    ]
    found = tag_labels(texts, classes, glued=False, specific=True).astype(int).tolist()
    assert found == [
        [0, 1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0],
        [0] * 7,
    ]  # fmt: skip
    every = tag_labels(texts, classes, glued=False)
    assert every[0].tolist() == [True, True, True, True, True, False, False]
    assert (every >= np.array(found, bool)).all()
    assert tag_labels(["darknavy skyblue"], classes, specific=True)[0].tolist() == [False] * 3 + [True] + [False] * 3


def test_a_long_word_takes_no_long_time():
    assert len(split_glued("a" * 5000)) == 5000
    split_glued("ab" * 100)
