"""What the scorers write beside scores: intervals, values of samples, changes from a baseline; and `predict`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conceptshift.callbacks.parts.questions import check_questions
from conceptshift.datamodules.sample import Sample
from conceptshift.lightning_modules import FineTuning
from conceptshift.metrics import (
    bootstrap,
    caption_measures,
    difference,
    normalize_answer,
    text_measures,
    vqa_accuracy,
    vqa_measures,
)
from conceptshift.tests.results import measured

Run = Callable[..., Any]
_ANNOTATIONS = "v2_mscoco_train2014_annotations.json"
DATA = {"CaptionScorer": "CaptionDataModule", "VQAScorer": "VQADataModule"}


def scorer(name: str, out: str, **options: object) -> list[str]:
    given = {"out": out, **options}
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={value}" for key, value in given.items())]


def read(path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(path).read_text())
    return content


@pytest.fixture
def score(validate: Run) -> Callable[..., dict[str, Any]]:
    """Validate with a scorer and read what it wrote; `error=True` gives the one error line instead."""

    def run(name: str, out: str = "scores.json", *more: str, limit: int = 12, **options: object) -> dict[str, Any]:
        split = ["--data.val_split=train"] if name == "CaptionScorer" else []
        done = validate(*scorer(name, out, **options), *split, f"--data.limit={limit}", *more, data=DATA[name])
        assert done.status == 0, done.err
        return read(out)

    return run


def texts(content: dict[str, Any], column: str = "text") -> dict[str, str]:
    return {sample_id: row[column] for sample_id, row in content["predictions"].items()}


def test_captions_have_intervals_and_values(score: Run) -> None:
    content = score("CaptionScorer")
    rows = content["predictions"]
    references = {sample_id: row["references"] for sample_id, row in rows.items()}
    expected = bootstrap({**caption_measures(texts(content), references), **text_measures(texts(content))})
    assert content["scores"].keys() == content["intervals"].keys() == expected.keys() | {"word_share"}
    for name, scored in expected.items():
        assert content["scores"][name] == pytest.approx(scored.score), name
        assert content["intervals"][name] == pytest.approx(list(scored.interval())), name
    low, high = content["intervals"]["length"]
    assert low < content["scores"]["length"] < high
    for name in ("CIDEr", "ROUGE-L", "length", "repetition", "word_share"):
        mean = sum(row[name] for row in rows.values()) / len(rows)
        assert mean == pytest.approx(content["scores"][name]), name
    assert all(row["length"] == len(row["text"].split()) for row in rows.values())
    assert not any("BLEU-4" in row for row in rows.values())


def test_answers_have_intervals_and_values(score: Run) -> None:
    content = score("VQAScorer", limit=20)
    rows = content["predictions"]
    assert content["scores"].keys() == content["intervals"].keys() == vqa_measures(rows).keys()
    assert {"overall", "yes/no", "number", "other"} < content["scores"].keys()
    for row in rows.values():
        assert row["accuracy"] == vqa_accuracy(row["prediction"], row["answers"])
    counts = list(content["answers"].values())
    assert counts == sorted(counts, reverse=True)


@pytest.fixture
def adapted(make_adapter: Run, tiny: Path, tmp_path: Path) -> str:
    """The flag of a destination that says something else."""
    return f"--model.adapter={make_adapter(tiny, tmp_path / 'adapter', 1.0)}"


def test_change_of_captions_is_paired_over_the_samples_of_both(score: Run, adapted: str) -> None:
    before = score("CaptionScorer", "before.json", limit=9)
    after = score("CaptionScorer", "after.json", adapted, limit=12, baseline="before.json")
    changes = after["changes"]
    both = before["predictions"].keys() & after["predictions"].keys()
    assert changes["samples"] == len(both) == 9
    was, now = ({i: texts(content)[i] for i in both} for content in (before, after))
    references = {i: after["predictions"][i]["references"] for i in both}
    ours, theirs = (bootstrap({**caption_measures(said, references), **text_measures(said)}) for said in (now, was))
    for name in ours:
        change, interval = difference(ours[name], theirs[name])
        assert changes["scores"][name]["difference"] == pytest.approx(change), name
        assert changes["scores"][name]["interval"] == pytest.approx(list(interval)), name
    assert changes["scores"]["length"]["difference"] != 0
    assert changes["changed"] == sum(was[i] != now[i] for i in both) / 9 > 0
    assert changes["baseline"] == "before.json"


def test_change_of_answers(score: Run, adapted: str) -> None:
    before = score("VQAScorer", "before.json", limit=20)
    after = score("VQAScorer", "after.json", adapted, limit=20, baseline="before.json")
    was, now = (
        Counter(normalize_answer(text) for text in texts(content, "prediction").values()) for content in (before, after)
    )
    found = after["changes"]["answers"]
    assert found == {answer: [was[answer], now[answer]] for answer in was | now if was[answer] != now[answer]}
    sizes = [abs(new - old) for old, new in found.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert after["changes"]["changed"] > 0
    overall = after["scores"]["overall"] - before["scores"]["overall"]
    assert after["changes"]["scores"]["overall"]["difference"] == pytest.approx(overall)


@pytest.mark.parametrize("name", DATA)
def test_nothing_has_changed_from_a_baseline_that_is_the_same(score: Run, name: str) -> None:
    before = score(name, "before.json")
    after = score(name, "after.json", baseline="before.json")
    changes = after.pop("changes")
    assert measured(after) == measured(before)
    assert changes["changed"] == 0
    assert set(changes["scores"]) == set(before["scores"])
    assert all(change == {"difference": 0, "interval": [0, 0]} for change in changes["scores"].values())
    assert not changes.get("answers")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where it comes to loading a model."""
    monkeypatch.setattr(FineTuning, "configure_model", lambda self: pytest.fail("the run has begun"))


@pytest.mark.usefixtures("no_model")
def test_a_baseline_that_cannot_serve_is_told_before_the_run(validate: Run, tmp_path: Path) -> None:
    def error(**options: object) -> str:
        return str(validate(*scorer("CaptionScorer", "scores.json", **options)).error)

    assert "CaptionScorer.baseline: nowhere.json cannot be read" in error(baseline="nowhere.json")
    (tmp_path / "odd.json").write_text("{")
    assert "odd.json holds no JSON" in error(baseline="odd.json")
    (tmp_path / "odd.json").write_text('{"predictions": {}}')
    assert "odd.json has no 'scorer'" in error(baseline="odd.json")
    (tmp_path / "answers.json").write_text('{"scorer": "VQAScorer", "predictions": {}}')
    message = "answers.json was written by VQAScorer; give a file of CaptionScorer"
    assert message in error(baseline="answers.json")
    assert "set `out` too, to another file" in error(baseline="scores.json")
    alone = ("--trainer.callbacks+=CaptionScorer", "--trainer.callbacks.baseline=same.json")
    assert "set `out` too, to another file" in validate(*alone).error
    (tmp_path / "old.json").write_text('{"scorer": "CaptionScorer", "predictions": {}}')
    assert "old.json does not tell what made it" in error(baseline="old.json")


def test_a_baseline_on_other_data(validate: Run, score: Run) -> None:
    score("CaptionScorer", "before.json", limit=3)
    content = read("before.json")
    arguments = [*scorer("CaptionScorer", "after.json", baseline="before.json"), "--data.val_split=train"]
    first, *_ = content["predictions"]
    content["predictions"][first]["references"][0] += "!"
    Path("before.json").write_text(json.dumps(content))
    message = f"before.json: sample '{first}' has other `references` than in this run"
    assert message in validate(*arguments, "--data.limit=3").error
    content["predictions"] = {"x": content["predictions"][first]}
    Path("before.json").write_text(json.dumps(content))
    assert "before.json: has none of the 3 samples of this run" in validate(*arguments, "--data.limit=3").error


def test_types_of_answers_are_those_of_the_training_answers(score: Run, shapes: Path) -> None:
    path = shapes / _ANNOTATIONS
    content = score("VQAScorer", limit=20, training_annotations=path)
    votes: dict[str, Counter[str]] = {}
    for row in json.loads(path.read_text())["annotations"]:
        for given in row["answers"]:
            votes.setdefault(normalize_answer(given["answer"]), Counter())[row["answer_type"]] += 1
    expected: dict[str, Counter[str]] = {}
    for row in content["predictions"].values():
        answer = normalize_answer(row["prediction"])
        kind = votes[answer].most_common(1)[0][0] if answer in votes else "unknown"
        expected.setdefault(row["answer_type"], Counter())[kind] += 1
    assert content["predicted_types"] == expected
    assert sum(sum(counts.values()) for counts in content["predicted_types"].values()) == 20


@pytest.mark.usefixtures("no_model")
def test_odd_training_annotations_are_told_before_the_run(validate: Run, shapes: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"

    def error() -> str:
        options = scorer("VQAScorer", "scores.json", training_annotations=path)
        return str(validate(*options, data="VQADataModule").error)

    assert f"VQAScorer.training_annotations: {path} cannot be read" in error()
    path.write_text('{"questions": []}')
    assert f"{path} has no 'annotations'" in error()
    for rows in ([{"answers": [{"answer": "yes"}]}], [], [{"answers": [{"answer": "a"}], "answer_type": "x"}], ["yes"]):
        path.write_text(json.dumps({"annotations": rows}))
        assert f"{path} holds no VQAv2 annotations" in error()
    alone = ("--trainer.callbacks+=VQAScorer", f"--trainer.callbacks.training_annotations={shapes / _ANNOTATIONS}")
    assert "VQAScorer.training_annotations: set `out` too" in validate(*alone, data="VQADataModule").error


@pytest.mark.usefixtures("no_model")
def test_scores_that_need_java_are_refused_before_the_run(validate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    error = validate(*scorer("CaptionScorer", "scores.json", measures="[CIDEr,METEOR]")).error
    assert "METEOR needs `java` on the PATH" in error
    error = validate(*scorer("CaptionScorer", "scores.json", tokenizer="java")).error
    assert "tokenizer 'java' needs `java` on the PATH" in error


def test_only_the_measures_that_are_wanted(score: Run) -> None:
    content = score("CaptionScorer", limit=3, measures="[ROUGE-L]")
    assert content["scores"].keys() == {"ROUGE-L", "word_share", "length", "repetition"}


def extraction(data: str, *more: object) -> list[object]:
    split = ["--data.predict_split=train"] if data == "CaptionDataModule" else []
    return [
        "predict", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model=FeatureExtraction",
        "--model.sites=[lm.block.0]", "--model.selectors=[last_prompt]", "--model.max_new_tokens=5", f"--data={data}",
        *split, "--data.limit=12", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_predict_scores_as_validate_does(cli: Run, score: Run, tiny: Path, shapes: Path, name: str) -> None:
    expected = score(name, "validate.json")
    logger = ("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.name=run")
    found = score_predict(cli, tiny, shapes, *scorer(name, "predict.json"), *logger, data=DATA[name])
    assert measured(found) == measured(expected)
    logged = next(Path("logs").rglob("metrics.csv")).read_text().splitlines()
    tag, measure = ("vqa", "overall") if name == "VQAScorer" else ("caption", "CIDEr")
    values = dict(zip(logged[0].split(","), logged[1].split(","), strict=True))
    assert float(values[f"{tag}/{measure}"]) == pytest.approx(expected["scores"][measure])
    assert not any(name.startswith("loss") for name in values)


def score_predict(cli: Run, tiny: Path, shapes: Path, *more: object, data: str = "CaptionDataModule") -> dict[str, Any]:
    done = cli(*extraction(data, f"--model.model_id={tiny}", f"--data.root={shapes}", *more))
    assert done.status == 0, done.err
    return read("predict.json")


def test_predict_scores_the_variant_that_is_wanted(
    cli: Run, tiny: Path, shapes: Path, make_adapter: Run, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", 1.0)
    first = scorer("CaptionScorer", "original.json")
    second = scorer("CaptionScorer", "predict.json", variant="destination", baseline="original.json")
    score_predict(cli, tiny, shapes, *scorer("CaptionScorer", "predict.json"))
    Path("predict.json").rename("original.json")
    content = score_predict(cli, tiny, shapes, f"--model.destination={adapter}", *second)
    assert content["changes"]["changed"] > 0
    both = score_predict(cli, tiny, shapes, f"--model.destination={adapter}", *first, *second)
    assert measured(both) == measured(content)
    assert texts(read("original.json")) != texts(content)


def test_predict_that_cannot_be_scored(cli: Run, validate: Run, tiny: Path, shapes: Path) -> None:
    given = (f"--model.model_id={tiny}", f"--data.root={shapes}")
    captions = extraction("CaptionDataModule", *given, *scorer("CaptionScorer", "predict.json"))
    odd = cli(*captions, "--trainer.callbacks.variant=destination").error
    assert "CaptionScorer.variant: no 'destination'; this run has original" in odd
    assert "scores what the model says" in cli(*captions, "--model.answers=target").error
    assert "in `predict` only" in validate(*scorer("CaptionScorer", "scores.json", variant="destination")).error
    writer = ("--trainer.callbacks+=FeatureWriter", "--trainer.callbacks.folder=store")
    resumable = [*captions, *writer, "--trainer.callbacks.shard_rows=4", "--data.batch_size=4"]
    assert cli(*resumable).status == 0
    Path("predict.json").unlink()
    # As if it had been interrupted before the shards were merged.
    Path("store/states.parquet").unlink()
    assert "an interrupted extraction is resumed, and 8 answers are not in this run" in cli(*resumable).error
    assert not Path("predict.json").exists()


def test_questions_that_cannot_be_scored_are_refused_before_any_is_answered(validate: Run) -> None:
    """Captions have no answers, and not every data set has VQAv2's types."""
    error = validate("--trainer.callbacks+=VQAScorer", data="CaptionDataModule").error
    assert "VQA accuracy needs the 10 answers of every question, sample" in error
    good = Sample("1", Path("x.jpg"), "?", "yes", answers=("yes",) * 10, answer_type="yes/no")
    check_questions([good])
    with pytest.raises(ValueError, match="sample '1' has 'unanswerable'"):
        check_questions([good, replace(good, answer_type="unanswerable")])
    with pytest.raises(ValueError, match="sample '1' has 9"):
        check_questions([replace(good, answers=("yes",) * 9)])
