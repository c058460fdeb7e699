"""VQA v2 accuracy: the answer processing and the leave-one-out score of the VQA evaluation.

Source: https://visualqa.org/evaluation and its evaluation script; "VQA: Visual Question Answering"
(arXiv 1505.00468), "Making the V in VQA Matter" (arXiv 1612.00837).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from .bootstrap import Measure, mean_measure
from .rows import Record, RowMetric

ANSWER_TYPES = ("yes/no", "number", "other")
N_ANSWERS = 10
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WORDS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've "
    "you'll you're you've"
)
# The evaluation knows each contraction with one of its apostrophes missing ("couldnt've", "couldn'tve") ...
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTED.split()
    for i, character in enumerate(word)
    if character == "'"
}
# ... but takes the apostrophe out of this one.
_CONTRACTIONS["somebody'd"] = "somebodyd"


# A few answers make up most of what people and models say.
@lru_cache(maxsize=2**16)
def normalize_answer(text: str) -> str:
    r"""Process an answer as the VQA evaluation does.

    In this order: line breaks and tabs become spaces. Each of ; / [ ] " { } ( ) = + \ _ - > < @ ` , ? ! is
    deleted where the answer has it next to a space or has a comma between digits anywhere ("1,000"), and
    becomes a space otherwise. Periods go unless a digit follows. Then lower case, number words zero..ten and
    "none" to digits, articles out, missing apostrophes of contractions in. Apostrophes and colons stay.

    Args:
        text: The answer.

    Returns:
        The processed answer; "a" or "the" alone becomes the empty string.
    """
    text = _stripped(text)
    comma_in_number = re.search(r"\d,\d", text) is not None
    processed = text
    for mark in _PUNCTUATION:
        # The neighbourhood is that of the unprocessed answer.
        by_space = f"{mark} " in text or f" {mark}" in text
        processed = processed.replace(mark, "" if by_space or comma_in_number else " ")
    processed = re.sub(r"\.(?!\d)", "", processed)
    words = (_NUMBER_WORDS.get(word, word) for word in processed.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the VQA v2 accuracy of one answer: the mean over the 10 leave-one-out sets of min(1, matches/3).

    Prediction and answers are compared after `normalize_answer`. The evaluation script does so only when
    the ten answers differ; where they agree to the letter it compares unprocessed strings, so that "Yes."
    misses ten times "yes". For predictions that were normalised beforehand both give the same.

    Args:
        prediction: The generated answer.
        answers: The 10 human answers.

    Returns:
        Accuracy in 0..1: 0, 0.3, 0.6, 0.9 and 1 for 0, 1, 2, 3 and more matches.

    Raises:
        ValueError: If there are not 10 answers.
    """
    if len(answers) != N_ANSWERS:
        raise ValueError(
            f"VQA accuracy needs the {N_ANSWERS} human answers of a question, got {len(answers)}: repeat a single "
            f"true answer {N_ANSWERS} times"
        )
    prediction, *answers = (normalize_answer(text) for text in (prediction, *answers))
    matches = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(matches) - left_out) / 3) for left_out in matches) / len(matches)


def vqa_scores(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Average the accuracy over questions, overall and by type.

    Args:
        rows: One mapping per question: "prediction", "answers" (10), "answer_type" ("yes/no", "number" or
            "other") and, if it is to be reported, "question_type" ("what color", "how many", ...).

    Returns:
        "overall", each answer type and each "question type/…" that has questions: mean accuracy in 0..1.

    Raises:
        ValueError: If there is no row, an answer type is unknown, or as `vqa_accuracy`.
    """
    measures = vqa_measures({str(number): row for number, row in enumerate(rows)})
    return {name: measure.value for name, measure in measures.items()}


def vqa_measures(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Measure]:
    """Return the `vqa_scores` as measures, for intervals.

    Args:
        rows: id → row, as `vqa_scores` takes them.

    Returns:
        Name → mean over the questions of that type; the statistics of "overall" begin with each accuracy.

    Raises:
        ValueError: As `vqa_scores`.
    """
    if not rows:
        raise ValueError("VQA accuracy needs at least one question, got none: check the selection of samples")
    ids = sorted(rows)
    types = [_types(rows[i]) for i in ids]
    accuracies = [vqa_accuracy(rows[i]["prediction"], rows[i]["answers"]) for i in ids]
    return {
        name: mean_measure([value if name in own else None for value, own in zip(accuracies, types, strict=True)])
        for name in dict.fromkeys(name for own in types for name in own)
    }


def _types(row: Mapping[str, Any]) -> list[str]:
    """Names of the scores that a question counts in."""
    if row["answer_type"] not in ANSWER_TYPES:
        raise ValueError(
            f"`answer_type` must be one of {list(ANSWER_TYPES)}, got {row['answer_type']!r}: "
            "use 'other' for questions that are neither yes/no nor counting"
        )
    names = ["overall", row["answer_type"]]
    return names if row.get("question_type") is None else [*names, f"question type/{row['question_type']}"]


def answer_counts(predictions: Iterable[str]) -> Counter[str]:
    """Count answers, each as a whole and normalised: "No." counts for "no", "snow" does not.

    Args:
        predictions: The generated answers.

    Returns:
        Normalised answer → how often it was given.
    """
    return Counter(normalize_answer(prediction) for prediction in predictions)


def _stripped(text: str) -> str:
    """Return the text on one line without outer spaces, which the evaluation does to every answer."""
    return text.replace("\n", " ").replace("\t", " ").strip()


class VQAAccuracy(RowMetric):
    """The `vqa_scores` of all answers that came in, over batches and processes.

    Questions are keyed by id: repeated ones count once, and neither batches nor their order matter.
    `compute` fills `rows` with id → {"prediction", "answers", "answer_type", "question_type"}.
    """

    def update(
        self,
        sample_ids: Sequence[str],
        predictions: Sequence[str],
        answers: Sequence[Sequence[str]],
        answer_types: Sequence[str],
        question_types: Sequence[str] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            sample_ids: Id of each question, B of them.
            predictions: The B generated answers.
            answers: The 10 human answers of each of the B questions.
            answer_types: "yes/no", "number" or "other" for each of the B questions.
            question_types: Opening words of each of the B questions, if scores by question type are wanted.

        Raises:
            ValueError: If the columns are not equally long.
        """
        self._add(
            sample_ids,
            prediction=predictions,
            answers=[list(texts) for texts in answers],
            answer_type=answer_types,
            question_type=[None] * len(sample_ids) if question_types is None else question_types,
        )

    def measures(self, rows: Mapping[str, Record]) -> dict[str, Measure]:
        """Return the `vqa_measures` of rows.

        Raises:
            ValueError: As `vqa_scores`.
        """
        return vqa_measures(rows)
