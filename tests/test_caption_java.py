"""METEOR and SPICE, which run in Java."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from conceptshift.metrics import CaptionScores, bootstrap, caption_measures, caption_scores, check_scores
from pycocoevalcap.spice.spice import Spice

PREDICTIONS = {"1": "a dog runs", "2": "a café in the rain", "3": "two cats are sleeping"}
REFERENCES = {
    "1": ["the dog is running", "a dog on grass"],
    "2": ["A café, in rain.", "a cafe"],
    "3": ["a pair of sleeping cats", "Cats."],
}
# What could break the lines that the library exchanges with Java.
ODD = {
    "1 again": "a\ndog\r\nruns",
    "2 again": "a café \ud83d in the … rain",
    "empty": "",
    "bars": "a|||b ||| c",
    "no word": "SCORE ||| ",
    "same": '<a b="||| x"> dog',
}
ODD_REFERENCES = {
    "1 again": REFERENCES["1"],
    "2 again": REFERENCES["2"],
    "empty": ["a dog"],
    "bars": ["a ||| b", ""],
    "no word": ["EVAL 1"],
    "same": ['<a b="||| x"> dog'],
}
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR runs in Java")


def children() -> list[str]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().rpartition(")")
        except OSError:
            continue
        if rest.split()[1] == str(os.getpid()):
            found.append(name)
    return found


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def fake_java(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    java = folder / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@needs_java
def test_meteor_is_that_of_the_program_and_keeps_its_captions_apart() -> None:
    # As `java -jar meteor-1.5.jar test reference -l en -norm -r 2` scores the first three.
    whole = caption_scores(PREDICTIONS, REFERENCES, scores=["METEOR"])["METEOR"]
    assert whole == pytest.approx(0.35204979007990733, abs=1e-12)
    before, files = children(), open_files()
    metric = CaptionScores(scores=["METEOR", "ROUGE-L"])
    predictions, references = {**PREDICTIONS, **ODD}, {**REFERENCES, **ODD_REFERENCES}
    measures = metric.measures({i: {"text": predictions[i], "references": references[i]} for i in predictions})
    assert list(measures) == ["METEOR", "ROUGE-L"]
    assert children() == before
    assert open_files() == files
    measure = measures["METEOR"]
    samples = dict(zip(sorted(predictions), measure.statistics[:, 0].tolist(), strict=True))
    assert samples["1 again"] == samples["1"]
    assert samples["2 again"] == samples["2"]
    assert samples["empty"] == samples["no word"] == 0
    assert samples["same"] == 1
    assert measure.value != pytest.approx(sum(samples.values()) / len(samples), abs=1e-6), "it is no mean"
    low, high = bootstrap({"METEOR": measure})["METEOR"].interval()
    assert low < measure.value < high


@pytest.mark.parametrize("name", ["METEOR", "SPICE"])
def test_no_java(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=f"{name} needs `java` on the PATH.*default-jre-headless.*leave {name} out$"):
        check_scores([name])
    with pytest.raises(ValueError, match=f"{name} needs `java`"):
        caption_scores(PREDICTIONS, REFERENCES, scores=[name])  # type: ignore[list-item]


def test_java_that_stops_is_one_error_and_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, monkeypatch, "echo 'not enough memory' >&2; exit 1")
    before, files = children(), open_files()
    with pytest.raises(ValueError, match=r"METEOR: java gave no score \(not enough memory\)") as error:
        caption_scores(PREDICTIONS, REFERENCES, scores=["METEOR"])
    assert "\n" not in str(error.value)
    del error
    assert children() == before
    assert open_files() == files


def test_spice_never_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, monkeypatch, "exit 0")
    monkeypatch.setattr("pycocoevalcap.spice.get_stanford_models.urlretrieve", lambda *_, **__: pytest.fail("download"))
    monkeypatch.setattr("conceptshift.metrics.caption_scorers._spice_folder", lambda: tmp_path)
    (tmp_path / "stanford-corenlp-3.6.0.jar").touch()
    message = rf"SPICE needs stanford-corenlp-3\.6\.0-models\.jar in {tmp_path}: .*\.zip or leave SPICE out$"
    with pytest.raises(ValueError, match=message):
        caption_scores(PREDICTIONS, REFERENCES, scores=["SPICE"])


def test_spice_is_the_mean_over_captions_that_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own answer: categories, each with precision, recall and f, NaN where nothing was found."""
    f = [0.5, float("nan"), 0.25]
    fake_java(tmp_path, monkeypatch, "exit 0")
    monkeypatch.setattr("conceptshift.metrics.caption_scorers._SPICE_JARS", ())
    monkeypatch.setattr(Spice, "__init__", lambda self: None)
    answer = (float("nan"), [{"All": {"f": value}, "Color": {"f": 1.0}} for value in f])
    monkeypatch.setattr(Spice, "compute_score", lambda self, targets, hypotheses: answer)
    measure = caption_measures(PREDICTIONS, REFERENCES, scores=["SPICE"])["SPICE"]
    assert measure.value == 0.375
    assert measure.statistics.tolist() == [[0.5, 1], [0, 0], [0.25, 1]]


def test_unknown_scores() -> None:
    with pytest.raises(ValueError, match=r"some of CIDEr, BLEU, .*got \['meteor'\]"):
        check_scores(["CIDEr", "meteor"])
    with pytest.raises(ValueError, match=r"got \[\]: name at least one"):
        check_scores([])
