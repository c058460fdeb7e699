"""Which classes of objects a text names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conceptshift.datamodules import ObjectNames
from conceptshift.datamodules.object_names import _SYNONYMS, with_article

CATEGORIES = [*_SYNONYMS, "vase", "zebra", "elephant"]


@pytest.fixture(scope="module")
def names() -> ObjectNames:
    return ObjectNames.from_categories(CATEGORIES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog, a DOG and two dogs.", ["dog"]),
        ("The dog sees a cat; then the dog leaves.", ["dog", "cat"]),
        ("a hot dog", ["hot dog"]),
        ("a Hot-Dog beside a dog", ["hot dog", "dog"]),
        ("traffic lights and a bright light", ["traffic light"]),
        ("a teddy bear, not a bear", ["teddy bear", "bear"]),
        ("three men, women, children and people", ["person"]),
        ("sheep, mice and buses", ["sheep", "mouse", "bus"]),
        ("policemen on motorbikes", ["person", "motorcycle"]),
        ("glasses of wine", ["wine glass"]),
        ("the man's ties", ["person", "tie"]),
        ("a baby elephant with a baby", ["elephant", "person"]),
        ("a catalog of a scarf, carpets and a buscuit", []),
        ("the train tracks at home plate", []),
        ("", []),
    ],
)
def test_texts_name_classes(names: ObjectNames, text: str, expected: list[str]) -> None:
    assert names.named(text) == expected


def test_every_way_to_say_a_class_names_it(names: ObjectNames) -> None:
    for category in CATEGORIES:
        assert names.words(category)[0] == category
        assert set(names.strict(category)) <= set(names.words(category))
        for word in names.words(category):
            assert names.named(f"here: {word.upper()}!") == [category], word


def test_other_classes_stand_for_themselves_and_before_synonyms() -> None:
    names = ObjectNames.from_categories(["star", "cross", "Man", "person", "glass", "glasses", "ice_cream"])
    assert names.words("star") == ("star", "stars")
    assert names.named("a man with a woman, crosses and two stars") == ["Man", "person", "cross", "star"]
    assert names.named("glasses, ice creams and a glass") == ["glasses", "ice_cream", "glass"]


@pytest.mark.parametrize("content", ['{"person": ["captain"]}', "person:\n  - Captain\n"])
def test_a_file_takes_the_place_of_what_is_built_in(tmp_path: Path, content: str) -> None:
    file = tmp_path / "words"
    file.write_text(content)
    names = ObjectNames.from_categories(["person", "dog"], file)
    assert names.words("person") == ("person", "people", "persons", "captain", "captains")
    assert names.named("a man, the captains and a puppy") == ["person", "dog"]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"perso": ["man"]}', "no class 'perso'; the data have person, dog"),
        ('{"person": "man"}', "expected lists of words"),
        ('{"person": ["dog"]}', "it stands for"),
        ('{"person": ["!"]}', "no letters"),
        ("{", "neither JSON nor YAML"),
        ("[]", "expected lists of words"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, error: str) -> None:
    file = tmp_path / "words.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=error) as raised:
        ObjectNames.from_categories(["person", "dog"], file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no\.json: cannot be read"):
        ObjectNames.from_categories(["person"], tmp_path / "no.json")


def test_a_word_of_two_given_classes_is_refused_and_its_json_is_enough() -> None:
    with pytest.raises(ValueError, match="cannot stand for 'b': it stands for 'a'"):
        ObjectNames({"a": ["x"], "b": json.loads('["X"]')})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("apple", "an apple"),
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("traffic light", "a traffic light"),
        ("scissors", "a pair of scissors"),
        ("broccoli", "broccoli"),
    ],
)
def test_articles(name: str, expected: str) -> None:
    assert with_article(name) == expected
