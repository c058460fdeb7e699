"""CHAIR: named objects that are not there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conceptshift.metrics import bootstrap, chair_measures, chair_scores


def test_hallucinated_objects_and_the_captions_that_have_them() -> None:
    named = {"a": ["dog", "cat"], "b": ["dog"], "c": [], "d": ["bus", "car", "person"]}
    there = {"a": {"dog"}, "b": {"dog", "cat"}, "c": {"person"}, "d": {"person"}}
    assert chair_scores(named, there) == {"chair_i": 3 / 6, "chair_s": 2 / 4}


def test_a_class_counts_once_in_a_caption() -> None:
    assert chair_scores({"a": ["cat", "cat", "dog"]}, {"a": ["dog"]}) == {"chair_i": 1 / 2, "chair_s": 1.0}


def test_captions_that_name_nothing_are_sentences_still() -> None:
    scores = chair_scores({"a": [], "b": []}, {"a": ["dog"], "b": []})
    assert math.isnan(scores["chair_i"])
    assert scores["chair_s"] == 0


def test_resamples_are_scored_as_sets_of_their_own() -> None:
    rng = np.random.default_rng(0)
    classes = np.array(["dog", "cat", "bus", "car"])
    named = {str(i): classes[rng.random(4) < 0.5].tolist() for i in range(30)}
    there = {str(i): classes[rng.random(4) < 0.5].tolist() for i in range(30)}
    drawn = rng.integers(30, size=30)
    ids = sorted(named)
    again = chair_scores(*({str(at): side[ids[i]] for at, i in enumerate(drawn)} for side in (named, there)))
    for name, measure in chair_measures(named, there).items():
        assert float(measure.score(measure.statistics[drawn].sum(axis=0))) == pytest.approx(again[name])
        low, high = bootstrap({name: measure})[name].interval()
        assert low < measure.value < high


@pytest.mark.parametrize(("named", "there"), [({}, {}), ({"a": ["dog"]}, {"b": ["dog"]})])
def test_captions_need_their_pictures(named: dict[str, list[str]], there: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="of the same ids"):
        chair_scores(named, there)
