"""The whole job, small, on the embedded model: every stage runs and the results say what they should."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conceptshift.cli.demo import demo
from conceptshift.concepts import load_dictionary, load_shift, load_steering_vectors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CAPTIONING = {"CIDEr", "BLEU-4", "ROUGE-L", "color_share"}
VQA = {"overall", "yes/no", "number", "other"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        # Lightning compares what it is given with the command line of the process.
        patch.setattr("sys.argv", ["conceptshift"])
        demo(str(out), images=1200)
    return out


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in _numbers(part)]
    return [float(value)] if isinstance(value, int | float) else []


def test_results_have_the_promised_form(results: dict[str, Any]) -> None:
    for task, measures, more in (("captioning", CAPTIONING, set()), ("vqa", VQA, {"target_answers"})):
        variants = {"original", "steered"} | ({"destination"} if task == "captioning" else set())
        assert set(results[task]) == variants
        for name, scores in results[task].items():
            compared = set() if name == "original" else {"changes"}
            assert set(scores) == measures | more | {"intervals"} | compared
            assert set(scores["intervals"]) == measures
            for measure in measures:
                low, high = scores["intervals"][measure]
                assert low <= scores[measure] <= high
                if compared:
                    change = scores["changes"][measure]["difference"]
                    assert change == pytest.approx(scores[measure] - results[task]["original"][measure])
    assert set(results["concepts"]) == {"semi_nmf", "kmeans"}
    for fitted in results["concepts"].values():
        assert set(fitted) == {"k", "explained_variance", "overlap", "words"}
        assert len(fitted["words"]) == fitted["k"]
    assert set(results["shift"]) == {
        "recovery_original", "recovery_shifted", "consistency", "matched_cosine_gain", "shifted_concepts",
    }  # fmt: skip
    assert set(results["visual_tokens"]) == {
        "say_their_object", "say_it_elsewhere", "wrong_without_object", "wrong_without_random",
    }  # fmt: skip
    assert all(math.isfinite(number) for number in _numbers(results))
    assert results["versions"]["conceptshift"]


def test_what_one_should_see(results: dict[str, Any]) -> None:
    captioning, vqa, shift = results["captioning"], results["vqa"], results["shift"]
    assert captioning["original"]["color_share"] < 0.2
    assert captioning["destination"]["color_share"] > 0.9
    assert captioning["steered"]["color_share"] > captioning["original"]["color_share"] + 0.3
    assert shift["recovery_shifted"] > shift["recovery_original"]
    assert shift["matched_cosine_gain"] > 0
    assert shift["shifted_concepts"] >= 8, "of 10; the others have few samples"
    assert vqa["steered"]["target_answers"] > 1.2 * vqa["original"]["target_answers"]
    for kept in ("number", "other"):
        assert vqa["steered"][kept] > vqa["original"][kept] - 0.05


def test_artifacts_load(folder: Path) -> None:
    dictionary = load_dictionary(folder / "concepts/original-kmeans/dictionary.safetensors")
    shift, metadata = load_shift(folder / "shift/kmeans/shift.safetensors")
    assert shift.vectors.shape == dictionary.dictionary.shape
    vectors = load_steering_vectors(folder / "answer_vectors/vectors/yes-no.safetensors").vectors
    assert {vector.shape for vector in vectors.values()} == {dictionary.dictionary.shape[1:]}
    assert list(vectors) == [f"lm.block.{block}" for block in range(6)]
    assert metadata["site"] in vectors


def test_sweeps_have_every_run_beside_its_controls(folder: Path) -> None:
    """Answers of all three types and three styles of captions: steering brings the target about, controls do not."""
    for name in ("vqa/no", "vqa/two", "vqa/blue", "caption/colors", "caption/sentiments", "back/places"):
        sweep = json.loads((folder / f"sweep_{name}" / "sweep.json").read_text())
        kinds = [run["kind"] for run in sweep["runs"]]
        assert kinds.count("unsteered") == 1
        assert kinds.count("steered") == kinds.count("random") == kinds.count("shuffled") > 2
        best = max(sweep["runs"], key=lambda run: run["scores"]["target"] if run["kind"] == "steered" else 0)
        change = best["changes"]["target"]
        assert change["difference"] > 0, name
        random = [run for run in sweep["runs"] if run["name"] == f"{best['name']}, random 0"]
        assert [change["difference"] > run["changes"]["target"]["difference"] for run in random] == [True]


def test_objects_are_in_their_visual_tokens(folder: Path, results: dict[str, Any]) -> None:
    found = results["visual_tokens"]
    assert found["say_their_object"] > 2 * found["say_it_elsewhere"]
    assert found["wrong_without_object"] > found["wrong_without_random"] + 0.3
    knockout = json.loads((folder / "visual_tokens/knockout/knockout.json").read_text())["variants"]["original"]
    accuracy = {(row["setting"], row["knockout"]): row["relative_accuracy"] for row in knockout["rows"]}
    assert accuracy["generative", "object+1 -> answer @ all"] < 0.5 < accuracy["generative", "image -> last_row @ all"]
    pages = list((folder / "logit_lens").glob("*.html"))
    assert len(pages) == 1 + 20
    assert all(b"destination" in page.read_bytes() for page in pages)


def test_tensorboard_shows_losses_scores_concepts_and_their_shift(folder: Path) -> None:
    training = EventAccumulator(str(folder / "logs/version_0"))
    training.Reload()
    assert {"loss/train", "loss/val", "caption/CIDEr"} <= set(training.Tags()["scalars"])
    shift = EventAccumulator(str(folder / "logs/version_1"))
    shift.Reload()
    assert {"concepts/original-kmeans", "shift/kmeans/words"} <= set(shift.Tags()["images"])
    assert "shift/kmeans/concept_00/magnitude" in shift.Tags()["scalars"]


def test_concepts_were_watched_while_the_model_trained(folder: Path) -> None:
    training = EventAccumulator(str(folder / "logs/version_0"))
    training.Reload()
    seen = training.Scalars("shift/circle/live/magnitude")
    assert [event.step for event in seen] == [30, 60, 90, 120]
    assert all(event.value > 0 for event in seen)
    path = json.loads((folder / "shift/circle/trajectory.json").read_text())
    assert path["points"][-1]["means"]["magnitude"] == pytest.approx(seen[-1].value, rel=1e-4)
    assert len(list((folder / "series").iterdir())) == 4


def test_report_shows_the_captions(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "data:image/" in page


def test_each_step_can_be_run_again(folder: Path) -> None:
    assert {path.name for path in (folder / "configs").iterdir()} >= {"finetune.yaml", "shift.yaml"}
    assert str(folder) in (folder / "configs" / "shift.yaml").read_text()
