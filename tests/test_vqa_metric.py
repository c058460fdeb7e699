"""VQA accuracy against hand-worked answers."""

from collections import Counter

import pytest
import torch
from conceptshift.metrics import (
    VQAAccuracy,
    answer_counts,
    bootstrap,
    learn_answer_types,
    normalize_answer,
    predicted_types,
    vqa_accuracy,
    vqa_measures,
    vqa_scores,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("  The\tred\ncar ", "red car"),
        ("Two", "2"),
        ("none", "0"),
        ("ten dogs and one cat", "10 dogs and 1 cat"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        # A comma inside a number makes every mark go without a space, wherever it stands.
        ("1,000 black-white", "1000 blackwhite"),
        ("black-white", "black white"),
        # Next to a space a mark is deleted, and the decision holds for all marks of its kind.
        ("black - white", "black white"),
        ("t-shirt - red", "tshirt red"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("yes!", "yes"),
        ("u.s.", "us"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("3. 5.", "3 5"),
        ("2:50 pm", "2:50 pm"),
        ("girl's", "girl's"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("twas 6 oclock", "'twas 6 o'clock"),
        ("somebody'd", "somebodyd"),
        # Not in the list of the evaluation: "lets" and "its" are words.
        ("lets its ill shed", "lets its ill shed"),
        ("a", ""),
        ("$5 & 50%", "$5 & 50%"),
    ],
)
def test_normalize_answer(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(("n_yes", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_by_number_of_matches(n_yes: int, expected: float) -> None:
    # With n matches, n of the ten sets hold n-1 of them and 10-n sets hold n; min(1, ·/3), then the mean.
    answers = ["yes"] * n_yes + ["no"] * (10 - n_yes)
    assert vqa_accuracy("yes", answers) == pytest.approx(expected)
    assert vqa_accuracy("yes", answers[::-1]) == pytest.approx(expected)


def test_normalises_both_sides() -> None:
    answers = ["the dog", "dog", "Dog.", "a dog"] + ["cat"] * 6
    assert vqa_accuracy("Dog!", answers) == 1.0
    assert vqa_accuracy("Two", ["2"] * 2 + ["two"] + ["3"] * 7) == pytest.approx(0.9)
    assert vqa_accuracy("snow", ["no"] * 9 + ["yes"]) == 0.0


def test_unanimous_answers_are_normalised_too() -> None:
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 1.0
    assert vqa_accuracy("1", ["one"] * 10) == 1.0


def test_errors_name_the_way_out() -> None:
    with pytest.raises(ValueError, match="needs the 10 human answers"):
        vqa_accuracy("yes", ["yes"])
    with pytest.raises(ValueError, match="`answer_type` must be one of"):
        vqa_scores([{"prediction": "yes", "answers": ["yes"] * 10, "answer_type": "yesno"}])
    with pytest.raises(ValueError, match="at least one question"):
        vqa_scores([])


IDS = ["q1", "q2", "q3", "q4", "q5"]
PREDICTIONS = ["Yes.", "no", "2", "red", "snow"]
ANSWERS = [
    ["yes"] * 10,
    ["no"] * 2 + ["yes"] * 8,
    ["two"] * 3 + ["3"] * 7,
    ["blue"] * 10,
    ["snow"] * 5 + ["ice"] * 5,
]
ANSWER_TYPES = ["yes/no", "yes/no", "number", "other", "other"]
QUESTION_TYPES = ["is the", "is the", "how many", "what color", "what"]
EXPECTED = {"overall": (1 + 0.6 + 0.9 + 0 + 1) / 5, "yes/no": 0.8, "number": 0.9, "other": 0.5}


def update(metric: VQAAccuracy, chosen: list[int]) -> None:
    metric.update(
        [IDS[i] for i in chosen],
        [PREDICTIONS[i] for i in chosen],
        [ANSWERS[i] for i in chosen],
        [ANSWER_TYPES[i] for i in chosen],
    )


def test_scores_by_type() -> None:
    metric = VQAAccuracy()
    update(metric, [0, 1, 2, 3, 4])
    scores = metric.compute()
    assert {name: value.item() for name, value in scores.items()} == pytest.approx(EXPECTED)
    assert all(value.shape == () and value.dtype == torch.float32 for value in scores.values())
    metric.reset()
    update(metric, [0, 1])
    assert metric.compute().keys() == {"overall", "yes/no"}


def test_scores_by_question_type() -> None:
    metric = VQAAccuracy()
    metric.update(IDS, PREDICTIONS, ANSWERS, ANSWER_TYPES, QUESTION_TYPES)
    scores = {name: value.item() for name, value in metric.compute().items()}
    by_question = {"is the": 0.8, "how many": 0.9, "what color": 0.0, "what": 1.0}
    assert scores == pytest.approx(EXPECTED | {f"question type/{name}": v for name, v in by_question.items()})


def test_measures_follow_the_sorted_ids() -> None:
    rows = {
        sample_id: {"prediction": prediction, "answers": answers, "answer_type": kind, "question_type": question}
        for sample_id, prediction, answers, kind, question in zip(
            IDS, PREDICTIONS, ANSWERS, ANSWER_TYPES, QUESTION_TYPES, strict=True
        )
    }
    measures = vqa_measures(dict(reversed(rows.items())))
    assert {name: measure.value for name, measure in measures.items()} == pytest.approx(vqa_scores(rows.values()))
    assert measures["overall"].statistics[:, 0].tolist() == pytest.approx([1, 0.6, 0.9, 0, 1])
    assert measures["number"].statistics.tolist() == [[0, 0], [0, 0], [pytest.approx(0.9), 1], [0, 0], [0, 0]]
    scored = bootstrap(measures)
    assert scored["number"].interval() == pytest.approx((0.9, 0.9))
    low, high = scored["yes/no"].interval()
    assert (low, high) == pytest.approx((0.6, 1.0))


def test_order_batches_and_duplicates_do_not_matter() -> None:
    metric = VQAAccuracy()
    for chosen in ([4, 1], [3], [0, 2, 1], [1]):
        update(metric, chosen)
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(EXPECTED)
    assert list(metric.rows) == IDS
    assert metric.rows["q3"]["prediction"] == "2"


def test_same_id_with_another_answer_is_an_error() -> None:
    metric = VQAAccuracy()
    update(metric, [0, 1])
    metric.update(["q1"], ["no"], [ANSWERS[0]], ["yes/no"])
    with pytest.raises(ValueError, match=r"sample id 'q1' came with two different `prediction`, 'Yes\.' and 'no'"):
        metric.compute()


def test_answers_are_counted_whole() -> None:
    counts = answer_counts(["No.", "no", "snow", "not no", "Two", "2"])
    assert counts == Counter({"no": 2, "2": 2, "snow": 1, "not no": 1})


def annotation(kind: str, *answers: str) -> dict[str, object]:
    return {"answer_type": kind, "answers": [{"answer": answer} for answer in answers]}


def test_an_answer_has_the_type_that_it_most_often_has() -> None:
    types = learn_answer_types(
        [
            annotation("yes/no", "Yes.", "yes", "no", "maybe"),
            annotation("other", "yes", "no", "red"),
            annotation("number", "Two", "2", "red", "maybe"),
        ]
    )
    # "no", "red" and "maybe" are tied; the fixed order is yes/no, number, other.
    assert types == {"yes": "yes/no", "no": "yes/no", "maybe": "yes/no", "red": "number", "2": "number"}
    rows = [
        {"prediction": prediction, "answer_type": kind}
        for prediction, kind in (("YES", "other"), ("two", "other"), ("a 2.", "other"), ("blue", "yes/no"))
    ]
    found = predicted_types(rows, types)
    assert found == {"yes/no": {"unknown": 1}, "other": {"number": 2, "yes/no": 1}}
    assert list(found["other"]) == ["number", "yes/no"]


def test_answers_without_a_type_of_vqa() -> None:
    with pytest.raises(ValueError, match="got 'color'"):
        learn_answer_types([annotation("color", "red")])
    with pytest.raises(ValueError, match="got 'no answer'"):
        learn_answer_types([])
