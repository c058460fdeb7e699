"""Caption scores against pycocoevalcap itself, and over batches and two real processes."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.metrics import (
    CaptionScores,
    VQAAccuracy,
    bootstrap,
    caption_measures,
    caption_scores,
    text_measures,
    word_share,
    word_share_measure,
)
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

# id → prediction, references; then what the Java tokenizer (CoreNLP 3.4.1) makes of each, as in test_ptb.py.
CAPTIONS = {
    "1": (
        "A man riding a wave on top of a surfboard.",
        ["A man is riding a wave on a surfboard.", "A surfer rides a large wave in the ocean."],
    ),
    "2": (
        "Two dogs don't share a red frisbee",
        ["Two dogs fight over a red frisbee.", "The dogs don't want to share their frisbee!"],
    ),
    "3": (
        "a cat sitting on a laptop computer's keyboard",
        ["A cat sits on the keyboard of a laptop.", "Mr. Whiskers, a cat, is lying on a laptop."],
    ),
    "4": (
        "a street sign on 5th Ave. in the U.S.",
        ["A street sign at the corner of 5th Ave.", "Traffic signs (one-way) in the U.S., at 5 p.m."],
    ),
    "5": (
        "A plate of food with 1/2 of a sandwich",
        ["A white plate with half a sandwich, etc.", "There's 1/2 of a sandwich on the plate."],
    ),
    "6": (
        "a black-and-white photo of a train",
        ["A black-and-white photo of an old train", "An old steam train—in black & white."],
    ),
    "7": (
        "a group of people standing around a table",
        ["People gather around a table with a cake.", "A family's celebrating a birthday at a table!!"],
    ),
}
JAVA_TOKENS = {
    "1": (
        "a man riding a wave on top of a surfboard",
        ["a man is riding a wave on a surfboard", "a surfer rides a large wave in the ocean"],
    ),
    "2": (
        "two dogs do n't share a red frisbee",
        ["two dogs fight over a red frisbee", "the dogs do n't want to share their frisbee"],
    ),
    "3": (
        "a cat sitting on a laptop computer 's keyboard",
        ["a cat sits on the keyboard of a laptop", "mr. whiskers a cat is lying on a laptop"],
    ),
    "4": (
        "a street sign on 5th ave. in the u.s.",
        ["a street sign at the corner of 5th ave.", "traffic signs -lrb- one-way -rrb- in the u.s. at 5 p.m."],
    ),
    "5": (
        "a plate of food with 1/2 of a sandwich",
        ["a white plate with half a sandwich etc.", "there 's 1/2 of a sandwich on the plate"],
    ),
    "6": (
        "a black-and-white photo of a train",
        ["a black-and-white photo of an old train", "an old steam train in black & white"],
    ),
    "7": (
        "a group of people standing around a table",
        ["people gather around a table with a cake", "a family 's celebrating a birthday at a table !!"],
    ),
}

PREDICTIONS = {i: prediction for i, (prediction, _) in CAPTIONS.items()}
REFERENCES = {i: references for i, (_, references) in CAPTIONS.items()}
NAMES = {"CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"}


def independent_scores() -> dict[str, float]:
    """Score the stored Java tokens with pycocoevalcap, past our code."""
    hypotheses = {i: [prediction] for i, (prediction, _) in JAVA_TOKENS.items()}
    targets = {i: references for i, (_, references) in JAVA_TOKENS.items()}
    bleu, _ = Bleu(4).compute_score(targets, hypotheses, verbose=0)
    scores = {f"BLEU-{n + 1}": bleu[n] for n in range(4)}
    return scores | {
        "CIDEr": Cider().compute_score(targets, hypotheses)[0],
        "ROUGE-L": Rouge().compute_score(targets, hypotheses)[0],
    }


def computed(metric: CaptionScores) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def update(metric: CaptionScores, ids: list[str]) -> None:
    metric.update(ids, [PREDICTIONS[i] for i in ids], [REFERENCES[i] for i in ids])


def test_equals_pycocoevalcap_on_java_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    scores = caption_scores(PREDICTIONS, REFERENCES)
    assert scores.keys() == NAMES
    assert scores == pytest.approx(independent_scores(), abs=1e-12)
    assert 0.1 < scores["BLEU-4"] < 0.9
    assert 0.5 < scores["CIDEr"] < 5
    assert capsys.readouterr().out == ""


def test_perfect_captions() -> None:
    scores = caption_scores({i: texts[0] for i, texts in REFERENCES.items()}, REFERENCES)
    assert [scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx([1.0] * 4)
    assert scores["ROUGE-L"] == pytest.approx(1.0)
    # One reference that is the prediction: cosine 1 for each n-gram length, times 10.
    single = {i: texts[:1] for i, texts in REFERENCES.items()}
    assert caption_scores({i: texts[0] for i, texts in single.items()}, single)["CIDEr"] == pytest.approx(10.0)


def per_sample(predictions: dict[str, str], name: str) -> dict[str, float]:
    statistics = caption_measures(predictions, REFERENCES)[name].statistics
    assert statistics[:, 1].tolist() == [1.0] * len(predictions)
    return dict(zip(sorted(predictions), statistics[:, 0].tolist(), strict=True))


def test_measures_are_the_scores_of_the_set() -> None:
    whole, measures = caption_scores(PREDICTIONS, REFERENCES), caption_measures(PREDICTIONS, REFERENCES)
    assert list(measures) == list(whole)
    assert {name: measure.value for name, measure in measures.items()} == pytest.approx(whole, rel=1e-12)
    for name in ("CIDEr", "ROUGE-L"):
        scores, worse = per_sample(PREDICTIONS, name), per_sample(PREDICTIONS | {"7": "a spoon"}, name)
        assert [i for i in worse if worse[i] != scores[i]] == ["7"]


def test_resampled_bleu_is_that_of_the_resampled_set() -> None:
    """The library scores each resample as a set of its own, with repeated samples."""
    ids = sorted(JAVA_TOKENS)
    measures = {n: caption_measures(PREDICTIONS, REFERENCES)[f"BLEU-{n}"] for n in (1, 2, 3, 4)}
    pick = random.Random(0)
    for _ in range(20):
        drawn = [pick.randrange(len(ids)) for _ in ids]
        samples = {str(place): JAVA_TOKENS[ids[number]] for place, number in enumerate(drawn)}
        bleu, _ = Bleu(4).compute_score(
            {i: references for i, (_, references) in samples.items()},
            {i: [prediction] for i, (prediction, _) in samples.items()},
            verbose=0,
        )
        for n, measure in measures.items():
            assert measure.score(measure.statistics[drawn].sum(axis=0)) == pytest.approx(bleu[n - 1], rel=1e-12)


def test_bleu_of_empty_and_unmatched_captions_is_that_of_the_library() -> None:
    for prediction in ("", "zebra zebra", "."):
        predictions = dict.fromkeys(PREDICTIONS, prediction)
        scores, measures = caption_scores(predictions, REFERENCES), caption_measures(predictions, REFERENCES)
        for n in (1, 2, 3, 4):
            assert measures[f"BLEU-{n}"].value == pytest.approx(scores[f"BLEU-{n}"], rel=1e-9, abs=1e-15)


def test_intervals_hold_the_scores() -> None:
    scored = bootstrap(caption_measures(PREDICTIONS, REFERENCES))
    for name, score in scored.items():
        low, high = score.interval()
        assert low < score.score < high, name


def test_each_caption_is_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def tokens(caption: str) -> list[str]:
        seen.append(caption)
        return caption.split()

    monkeypatch.setattr("conceptshift.metrics.ptb._tokens", tokens)
    # Captions of this test only: their tokens stay in the cache.
    predictions = {i: f"{text} (once)" for i, text in PREDICTIONS.items()}
    references = {i: [f"{text} (once)" for text in texts] for i, texts in REFERENCES.items()}
    first = caption_scores(predictions, references)
    assert caption_scores(predictions, references) == first
    assert len(seen) == len(predictions) + sum(map(len, references.values()))


def test_order_of_ids_does_not_matter_to_the_last_bit() -> None:
    ids = list(PREDICTIONS)
    random.Random(1).shuffle(ids)
    shuffled = caption_scores({i: PREDICTIONS[i] for i in ids}, {i: REFERENCES[i] for i in reversed(ids)})
    assert shuffled == caption_scores(PREDICTIONS, REFERENCES)


def test_batches_order_and_duplicates_do_not_matter() -> None:
    once = CaptionScores()
    update(once, list(PREDICTIONS))
    expected = computed(once)
    assert expected == pytest.approx(caption_scores(PREDICTIONS, REFERENCES), rel=1e-6)
    ids = list(PREDICTIONS)
    random.Random(2).shuffle(ids)
    split = CaptionScores()
    for batch in (ids[:1], ids[1:4], ids[4:], ids[2:5], []):
        update(split, batch)
    assert computed(split) == expected


def test_rows_come_back_after_compute_and_go_with_reset() -> None:
    metric = CaptionScores()
    update(metric, ["2", "1"])
    assert metric.rows == {}
    metric.compute()
    assert list(metric.rows.items()) == [(i, {"text": PREDICTIONS[i], "references": REFERENCES[i]}) for i in ("1", "2")]
    metric.reset()
    assert metric.rows == {}
    update(metric, ["3", "4"])
    metric.compute()
    assert list(metric.rows) == ["3", "4"]


def test_any_text_survives() -> None:
    text = 'line\nbreak \u2028 "quoted" \\ 東京 😀 \ud83d \x00 {"id": 1}'
    metric = CaptionScores()
    update(metric, ["1"])
    metric.update(["odd\n"], [text], [[text, ""]])
    metric.compute()
    assert metric.rows["odd\n"] == {"text": text, "references": [text, ""]}


def test_same_id_with_another_text_is_an_error() -> None:
    metric = CaptionScores()
    update(metric, ["1", "2"])
    metric.update(["1"], ["something else"], [REFERENCES["1"]])
    with pytest.raises(ValueError, match="sample id '1' came with two different `text`") as error:
        metric.compute()
    assert "\n" not in str(error.value)


def test_errors_name_the_way_out() -> None:
    with pytest.raises(ValueError, match="must have the same ids"):
        caption_scores({"1": "a"}, {"1": ["a"], "2": ["b"]})
    with pytest.raises(ValueError, match="at least one"):
        caption_scores({}, {})
    with pytest.raises(ValueError, match="'2' has none"):
        caption_scores({"1": "a", "2": "b"}, {"1": ["a"], "2": []})
    with pytest.raises(ValueError, match="no word at all"):
        caption_scores({"1": "a"}, {"1": ["."]})
    with pytest.raises(ValueError, match="use 'python'"):
        caption_scores(PREDICTIONS, REFERENCES, tokenizer="nltk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`text` must have one entry per sample id"):
        CaptionScores().update(["1", "2"], ["a"], [["a"], ["b"]])
    empty = CaptionScores()
    empty.update([], [], [])
    with pytest.raises(ValueError, match="has no rows"):
        empty.compute()


def test_empty_prediction_scores_zero() -> None:
    predictions = PREDICTIONS | {"1": ""}
    assert per_sample(predictions, "CIDEr")["1"] == per_sample(predictions, "ROUGE-L")["1"] == 0.0


def test_java_option_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = CaptionScores(tokenizer="java")
    assert metric.tokenizer == "java"
    assert CaptionScores().tokenizer == "python"
    update(metric, ["1", "2"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="needs `java`"):
        metric.compute()


@pytest.mark.skipif(shutil.which("java") is None, reason="the comparison runs the Java tokenizer")
def test_both_tokenizers_give_the_same_scores() -> None:
    assert caption_scores(PREDICTIONS, REFERENCES, "java") == caption_scores(PREDICTIONS, REFERENCES, "python")


def test_metric_contract() -> None:
    for metric in (CaptionScores(), VQAAccuracy()):
        assert metric.higher_is_better is True
        assert metric.full_state_update is False
        assert metric.is_differentiable is False


def test_word_share() -> None:
    captions = ["A RED bus.", "a tired man", "the redder one", "dark-blue sea", "light  blue", "plain"]
    assert word_share(captions, ["red", "blue"]) == pytest.approx(3 / 6)
    assert word_share(captions, {"dark-blue"}) == pytest.approx(1 / 6)
    assert word_share(captions, ["a.c"]) == 0.0
    with pytest.raises(ValueError, match="must not be empty"):
        word_share([], ["red"])
    with pytest.raises(ValueError, match="must not be empty"):
        word_share(captions, [])
    measure = word_share_measure(dict(zip("badcfe", captions, strict=True)), ["red", "blue"])
    assert measure.value == pytest.approx(3 / 6)
    # By sorted id: a is the second caption.
    assert measure.statistics[:, 0].tolist() == [0, 1, 1, 0, 0, 1]


def test_length_and_repetition() -> None:
    texts = {"b": "a red bus", "a": "the dog the dog the dog", "c": "", "d": "bus"}
    measures = text_measures(texts)
    assert measures["length"].statistics[:, 0].tolist() == [6, 3, 0, 1]
    # "the dog" and "dog the" are all there is among five bigrams.
    assert measures["repetition"].statistics[:, 0].tolist() == pytest.approx([3 / 5, 0, 0, 0])
    assert measures["length"].value == pytest.approx(10 / 4)


WORKER = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from conceptshift.metrics import CaptionScores, VQAAccuracy

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
work = json.loads((folder / "work.json").read_text())
captions, lone, answers = CaptionScores(), CaptionScores(), VQAAccuracy()
for batch in work["captions"][rank]:
    captions.update(*batch)
if rank == 1:  # rank 0 sees no batch at all
    for batch in work["captions"][0] + work["captions"][1]:
        lone.update(*batch)
answers.update(*work["answers"][rank])
own = sum(len(batch[0]) for batch in work["captions"][rank])
scores = [{k: v.item() for k, v in metric.compute().items()} for metric in (captions, lone, answers)]
result = {"world": dist.get_world_size(), "own": own, "scores": scores, "rows": captions.rows}
again = {k: v.item() for k, v in captions.compute().items()}
result["unsynced"] = again == scores[0] and not captions._is_synced
(folder / f"result{rank}.json").write_text(json.dumps(result))
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    ids = list(PREDICTIONS)
    assert len(ids) % 2 == 1

    def batch(chosen: list[str]) -> list[Any]:
        return [chosen, [PREDICTIONS[i] for i in chosen], [REFERENCES[i] for i in chosen]]

    # Strided as a distributed sampler does it, with one sample repeated to fill up, in uneven batches.
    first, second = ids[::2], [*ids[1::2], ids[0]]
    vqa_ids = ["a", "b", "c"]
    vqa: list[list[Any]] = [vqa_ids, ["yes", "no", "2"], [["yes"] * 10, ["yes"] * 8 + ["no"] * 2, ["2"] * 10]]
    vqa.append(["yes/no", "yes/no", "number"])
    work = {
        "captions": [[batch(first[:3]), batch(first[3:])], [batch(second)]],
        "answers": [[column[:2] for column in vqa], [column[1:] for column in vqa]],
    }
    (tmp_path / "work.json").write_text(json.dumps(work))
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "worker.py"), str(tmp_path), str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()

    one = CaptionScores()
    update(one, ids)
    expected = computed(one)
    answers = VQAAccuracy()
    answers.update(*vqa)
    expected_answers = {name: value.item() for name, value in answers.compute().items()}
    for rank in range(2):
        result = json.loads((tmp_path / f"result{rank}.json").read_text())
        assert result["world"] == 2
        assert result["own"] < len(ids)
        assert result["scores"] == [expected, expected, expected_answers]
        assert result["rows"] == one.rows
        assert result["unsynced"]


def test_state_follows_the_device_and_the_dtype_does_not() -> None:
    metric = CaptionScores()
    update(metric, list(PREDICTIONS))
    expected = computed(metric)
    metric.half()
    metric.to("cpu")
    assert isinstance(metric.encoded_rows, list)
    assert {state.dtype for state in metric.encoded_rows} == {torch.uint8}
    metric._computed = None
    assert computed(metric) == expected
