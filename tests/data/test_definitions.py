"""Definitions from files and from what is at hand."""

import pytest

from contralto.data.definitions import class_text, fill_definitions, find_senses, load_definitions, save_definitions
from contralto.data.manifest import ClassInfo
from contralto.errors import DataError, UsageError


def test_a_file_survives_a_round_trip_and_json_is_read_too(tmp_path):
    classes = (ClassInfo("crane", ("crane", "cranes"), "A bird: tall, grey."), ClassInfo("naïve café", (), ""))
    save_definitions(classes, tmp_path / "c.yaml")
    assert load_definitions(tmp_path / "c.yaml") == classes
    (tmp_path / "c.json").write_text('[{"name": "a", "query": "x", "definition": "d  e"}, {"name": 3}]')
    assert load_definitions(tmp_path / "c.json") == (ClassInfo("a", ("x",), "d e"), ClassInfo("3"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: [", "is not valid .yaml"),
        ("3", "expected a mapping"),
        ("{}", "names no class"),
        ("- {definition: x}", "entry 0 must have a name"),
        ("no: {definition: A refusal.}", "quote them"),
        ("a: {query: {b: c}}", "the query of 'a' must be text"),
        ("- {name: a}\n- {name: a}", "the class 'a' stands twice"),
        ("a: {definition: [1]}", "the definition of 'a' must be text"),
        ("a: !!python/object/apply:os.system ['true']", "is not valid .yaml"),
    ],
)
def test_bad_files_are_named(tmp_path, content, told):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(DataError, match=told) as caught:
        load_definitions(tmp_path / "c.yaml")
    assert "c.yaml" in str(caught.value)


def test_missing_definitions_are_filled_with_the_commonest_sense_and_senses_are_listed(monkeypatch):
    monkeypatch.delenv("CONTRALTO_DATA", raising=False)
    classes, senses = fill_definitions([ClassInfo("goldfish"), ClassInfo("qqqq"), ClassInfo("x", (), "given")])
    assert "freshwater fishes" in classes[0].definition
    assert classes[1].definition == ""
    assert classes[2].definition == "given"
    assert list(senses) == ["goldfish", "qqqq"]
    assert senses["qqqq"] == []
    assert [s.definition for s in find_senses("Gold-Fish")] == [] or find_senses("goldfish")


@pytest.mark.data
def test_an_ambiguous_word_shows_all_its_senses(data_folder):
    senses = find_senses("crane", wordnet=data_folder / "wordnet_nouns")
    assert len(senses) > 2
    assert any("bird" in s.definition for s in senses)
    assert any("lift" in s.definition for s in senses)
    with pytest.raises(DataError, match="no synsets"):
        find_senses("crane", wordnet=data_folder)


def test_forms_of_the_class_text():
    info = ClassInfo("crane", (), "A bird.")
    assert class_text(info, "definition") == "A bird."
    assert class_text(info, "name") == "crane"
    assert class_text(ClassInfo("crane"), "definition") == "crane"
    with pytest.raises(UsageError, match="class_text must be"):
        class_text(info, "poem")
