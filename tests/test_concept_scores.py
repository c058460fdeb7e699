"""Scores of grounded concepts on cases small enough to work by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conceptshift.metrics import (
    BertScorer,
    ClipEncoder,
    GroundedConcepts,
    clip_score,
    compare,
    paired_bootstrap_interval,
    published_scores,
    score_columns,
)
from conceptshift.metrics.concept_scores import CAPTIONS, description
from PIL import Image

WORDS = [["red", "star"], ["blue"], [], ["small", "green", "circle"]]
# The first sample activates three concepts, one negatively; the second none; the third one, and that has no words.
V = torch.tensor([[0.2, -0.9, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
REFERENCES = [["a small green circle", "a blue thing"], [], ["a red star"]]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]


def test_description() -> None:
    assert description(["red", "star"]) == "A photo is described by the words red, star."


def test_strongest_by_absolute_activation() -> None:
    concepts = GroundedConcepts(WORDS, V)
    assert concepts.strongest(3).tolist() == [[1, 3, 0], [0, 1, 2], [2, 0, 1]]
    assert concepts.strongest(9).shape == (3, 4)
    assert concepts.named(2) == [[1, 3], [], [2]]
    assert concepts.inactive == 1


def test_only_active_concepts_count(tiny_clip: Path, tiny_bert: Path, pictures: list[Image.Image]) -> None:
    clip, bert = ClipEncoder(str(tiny_clip)), BertScorer(str(tiny_bert))
    columns = score_columns({"ours": GroundedConcepts(WORDS, V)}, pictures, REFERENCES, (1, 2, 4), clip, bert)
    assert list(columns) == [f"{score} top-{top}" for score in ("CLIPScore", "BERTScore") for top in (1, 2, 4)]
    images = clip.images(pictures[:1])
    by_concept = [
        float(clip_score(images, clip.texts([f"A photo is described by the words {', '.join(WORDS[concept])}."])))
        for concept in (1, 3, 0)
    ]
    bert_by_concept = bert.f1(["blue", "small, green, circle", "red, star"], [REFERENCES[0]] * 3).tolist()
    for top, active in ((1, 1), (2, 2), (4, 3)):
        assert columns[f"CLIPScore top-{top}"]["ours"] == pytest.approx([np.mean(by_concept[:active]), 0, 0], abs=1e-6)
        ours, without_captions, wordless = columns[f"BERTScore top-{top}"]["ours"]
        assert ours == pytest.approx(np.mean(bert_by_concept[:active]), abs=1e-6)
        assert without_captions is None
        assert wordless == 0


def test_captions_are_compared_with_each_other(tiny_clip: Path, tiny_bert: Path, pictures: list[Image.Image]) -> None:
    clip, bert = ClipEncoder(str(tiny_clip)), BertScorer(str(tiny_bert))
    columns = score_columns({}, pictures, REFERENCES, (1, 3), clip, bert)
    first, second = REFERENCES[0]
    each = clip_score(clip.images(pictures[:1] * 2), clip.texts([first, second]))
    third = clip_score(clip.images(pictures[2:]), clip.texts(["a red star"]))
    expected = [float(each.mean()), None, float(third)]
    assert columns["CLIPScore top-1"][CAPTIONS] == pytest.approx(expected)
    assert columns["CLIPScore top-3"] == columns["CLIPScore top-1"]
    both_ways = float(bert.f1([first, second], [[second], [first]]).mean())
    assert columns["BERTScore top-1"][CAPTIONS] == pytest.approx([both_ways, None, None])


def test_samples_without_captions(tiny_clip: Path, tiny_bert: Path, pictures: list[Image.Image]) -> None:
    concepts = {"ours": GroundedConcepts(WORDS, V)}
    columns = score_columns(concepts, pictures, [[], [], []], (1,), ClipEncoder(str(tiny_clip)))
    assert list(columns) == ["CLIPScore top-1"]
    assert list(columns["CLIPScore top-1"]) == ["ours"]
    with pytest.raises(ValueError, match="`bert_model`: no test sample has reference captions"):
        score_columns(concepts, pictures, [[], [], []], (1,), bert=BertScorer(str(tiny_bert)))
    assert score_columns(concepts, pictures, REFERENCES, (1,)) == {}


def test_comparison_pairs_what_both_have() -> None:
    values: dict[str, list[float | None]] = {
        "ours": [0.5, 0.9, None, 0.4],
        "baseline": [0.1, None, 0.3, 0.2],
        "elsewhere": [None, None, 0.7, None],
        "nowhere": [None] * 4,
    }
    rows = compare(values, "ours", seed=3)
    assert list(rows) == ["ours", "baseline", "elsewhere"]
    assert rows["ours"]["mean"] == pytest.approx(0.6)
    assert rows["ours"]["std"] == pytest.approx(np.std([0.5, 0.9, 0.4], ddof=1))
    assert rows["ours"]["n"] == 3
    assert "p" not in rows["ours"]
    assert rows["baseline"]["difference"] == pytest.approx(0.3)
    assert rows["baseline"]["difference_interval"] == list(paired_bootstrap_interval([0.5, 0.4], [0.1, 0.2], seed=3))
    # Differences 0.4 and 0.2: t = 3 with one degree of freedom.
    assert rows["baseline"]["p"] == pytest.approx(2 * (0.5 - np.arctan(3) / np.pi))
    assert rows["elsewhere"] == {"mean": 0.7, "std": 0.0, "interval": [0.7, 0.7], "n": 1}


def test_published_scores_are_those_of_the_token() -> None:
    found = published_scores("token_of_interest:dog")
    assert found is not None
    assert found["CLIPScore"]["SemiNMF"] == 0.610
    assert found["CLIPScore"]["Ground-truth captions"] == 0.783
    assert found["Overlap"] == {"Simple": 0.371, "PCA": 0.004, "KMeans": 0.501, "SemiNMF": 0.086}
    assert published_scores("token_of_interest:star") is None
    assert published_scores("token_class:dog") is None
