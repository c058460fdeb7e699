"""Scores of a sweep against an independent computation: paired intervals, the Pareto front, rises, selection."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conceptshift.callbacks.parts.sweep_figures import map_figure, pareto_figure, show_sweep
from conceptshift.callbacks.parts.sweep_scores import Target, clear_directions, score_sweep
from conceptshift.datamodules.sample import Sample
from conceptshift.lightning_modules.sweep import UNSTEERED, SweepRun
from conceptshift.metrics import caption_scores, normalize_answer, vqa_accuracy
from conceptshift.records.files import write_json

Row = dict[str, Any]
Texts = dict[str, dict[str, str]]
ANSWERS = ["yes", "no", "2", "red", "", "No.", "the red"]
RUNS = [
    SweepRun(UNSTEERED, "unsteered"),
    *(SweepRun(f"{site}-{alpha}", "steered", "v", site, alpha, "answer") for site in "ab" for alpha in (1.0, 2.0, 4.0)),
    SweepRun("a-1, random 0", "random", "v", "a", 1.0, "answer"),
]


def question(number: int) -> Sample:
    kind = ("yes/no", "number", "other")[number % 3]
    answers = [("yes", "2", "red")[number % 3]] * (number % 10) + ["no"] * (10 - number % 10)
    return Sample(
        f"q{number:02d}", Path(), "?", "", answers=tuple(answers), answer_type=kind, question_type=f"t{number % 2}"
    )


def vqa(count: int, seed: int = 0) -> tuple[Texts, dict[str, Sample]]:
    draw = random.Random(seed)
    samples = {sample.sample_id: sample for sample in map(question, range(count))}
    return {run.name: {i: draw.choice(ANSWERS) for i in samples} for run in RUNS}, samples


def scored(texts: Texts, samples: dict[str, Sample], target: Target) -> dict[str, Row]:
    _, rows, _ = score_sweep([run for run in RUNS if run.name in texts], texts, samples, target)
    return {row["name"]: row for row in rows}


def test_scores_changes_and_paired_intervals() -> None:
    """Against resamples of our own, of the same questions for both runs."""
    texts, samples = vqa(60)
    rows = scored(texts, samples, Target(answer="no"))
    ids = sorted(samples)

    def values(run: str, measure: str) -> list[float]:
        if measure == "target":
            return [float(texts[run][i] in ("no", "No.")) for i in ids]
        if measure == "changed":
            return [float(normalize_answer(texts[run][i]) != normalize_answer(texts[UNSTEERED][i])) for i in ids]
        return [vqa_accuracy(texts[run][i], samples[i].answers) for i in ids]

    draws = np.random.default_rng(99).integers(60, size=(20_000, 60))
    for run in ("a-1.0", "b-4.0", "a-1, random 0"):
        for measure in ("target", "overall", "changed"):
            one, before = (np.array(values(name, measure)) for name in (run, UNSTEERED))
            row = rows[run]
            assert row["scores"][measure] == pytest.approx(one.mean())
            change = row["changes"][measure]
            assert change["difference"] == pytest.approx(one.mean() - before.mean())
            for found, drawn in (
                (row["intervals"][measure], one[draws].mean(axis=1)),
                (change["interval"], (one - before)[draws].mean(axis=1)),
            ):
                assert found == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.02)
    kinds = [samples[i].answer_type == "number" for i in ids]
    number = np.array(values("a-1.0", "overall"))[kinds].mean()
    assert rows["a-1.0"]["scores"]["number"] == pytest.approx(number)
    assert "changes" not in rows[UNSTEERED]
    assert rows[UNSTEERED]["scores"]["changed"] == 0


@pytest.mark.parametrize("seed", range(10))
def test_pareto_front_rises_and_selection(seed: int) -> None:
    """By brute force; few questions, so that there are ties."""
    texts, samples = vqa(5, seed)
    quality, listed, _ = score_sweep(RUNS, texts, samples, Target(answer="no"))
    rows = {row["name"]: row for row in listed}
    compared = {name: row["scores"] for name, row in rows.items() if row["kind"] in ("unsteered", "steered")}
    for name, row in rows.items():
        mine = row["scores"]
        beaten = any(
            other["target"] >= mine["target"]
            and other[quality] >= mine[quality]
            and (other["target"] > mine["target"] or other[quality] > mine[quality])
            for other in compared.values()
        )
        assert row["pareto"] == (name in compared and not beaten)
    normal = {"No.": "no", "the red": "red"}
    counts = {name: Counter(normal.get(text, text) for text in of_run.values()) for name, of_run in texts.items()}
    for name, row in rows.items():
        rises = {answer: n - counts[UNSTEERED][answer] for answer, n in counts[name].items()}
        assert row["rises"] == {answer: rise for answer, rise in rises.items() if rise > 0}
        assert list(row["rises"].values()) == sorted(row["rises"].values(), reverse=True)
        targets = row["selection"]["targets"]
        assert row["selection"]["clear"] == (len(targets) == 1)
        assert set(targets) <= set(row["rises"])
    clear = clear_directions(list(rows.values()))
    assert {one["run"] for one in clear} == {
        name for name, row in rows.items() if row["kind"] == "steered" and row["selection"]["clear"]
    }
    assert [one["gap"] for one in clear] == sorted((one["gap"] for one in clear), reverse=True)
    json.dumps(list(rows.values()), allow_nan=False)


def test_equal_runs_share_the_front() -> None:
    texts, samples = vqa(9)
    same = dict.fromkeys(texts, texts[UNSTEERED])
    rows = scored(same, samples, Target(answer="no"))
    assert {name for name, row in rows.items() if row["pareto"]} == set(rows) - {"a-1, random 0"}
    for row in rows.values():
        if row["kind"] != "unsteered":
            assert all(one == {"difference": 0, "interval": [0, 0]} for one in row["changes"].values())
        assert row["rises"] == {}
        assert row["selection"]["clear"] is False


def captions(count: int) -> dict[str, Sample]:
    texts = ["a red circle on the beach", "two blue stars in space", "a dog", "a heart"]
    return {
        f"c{number}": Sample(f"c{number}", Path(), "?", "", references=(texts[number % 4], texts[(number + 1) % 4]))
        for number in range(count)
    }


def test_captions_are_scored_as_a_set() -> None:
    samples = captions(8)
    draw = random.Random(0)
    words = "a red blue circle star dog on the beach in space two".split()
    texts = {run.name: {i: " ".join(draw.choices(words, k=6)) for i in samples} for run in RUNS}
    quality, rows, values = score_sweep(RUNS, texts, samples, Target(words=frozenset({"red", "blue"})))
    references = {i: list(sample.references) for i, sample in samples.items()}
    assert quality == "CIDEr"
    for row in rows:
        wanted = caption_scores(texts[row["name"]], references)
        assert {name: row["scores"][name] for name in wanted} == pytest.approx(wanted)
        share = sum("red" in text or "blue" in text for text in texts[row["name"]].values()) / 8
        assert row["scores"]["target"] == share
        assert "selection" not in row
    assert clear_directions(rows) == []
    assert len(values) == len(RUNS) * 8
    for value in values:
        assert value["text"] == texts[value["run"]][value["sample_id"]]
        assert value["changed"] == (value["text"] != texts[UNSTEERED][value["sample_id"]])
        assert value["length"] == 6


@pytest.mark.parametrize("task", ["vqa", "caption"])
@pytest.mark.parametrize("count", [1, 2, 31])
@pytest.mark.parametrize("text", ["", "zebra", " . "])
def test_nothing_undefined_reaches_the_file(task: str, count: int, text: str, tmp_path: Path) -> None:
    """One sample, runs without a word, a target that the unsteered model never gives."""
    samples = captions(count) if task == "caption" else vqa(count)[1]
    target = Target(words=frozenset({"red"})) if task == "caption" else Target(answer="no")
    texts = {run.name: dict.fromkeys(samples, text) for run in RUNS}
    texts["a-2.0"] = dict.fromkeys(samples, "no red")
    _, rows, _ = score_sweep(RUNS, texts, samples, target)
    quality = "CIDEr" if task == "caption" else "overall"
    sweep = {"name": "x", "task": task, "target": "no", "quality": quality, "samples": count, "skipped": {},
             "runs": rows, "selected": clear_directions(rows)}  # fmt: skip
    write_json(tmp_path / "sweep.json", sweep)
    show_sweep(sweep, tmp_path, [])
    assert (tmp_path / "figures" / "pareto.png").is_file()


# --- figures ----------------------------------------------------------------------------------------------


def drawn(vectors: dict[str, list[str]], alphas: list[float]) -> dict[str, Any]:
    """A sweep in which the target rises with α, the vector and the block, and the quality falls with it."""
    rows: list[Row] = []
    for number, (vector, sites) in enumerate(vectors.items()):
        for depth, site in enumerate(sites):
            for alpha in alphas:
                target = alpha * (number + depth + 1) / 100
                run = SweepRun(f"{vector}-{site}-{alpha}", "steered", vector, site, alpha, "answer")
                rows.append({
                    **vars(run), "scores": {"target": target, "overall": 0.9 - target}, "pareto": True,
                    "intervals": {"target": [target, target], "overall": [0.8, 0.9]},
                    "changes": {name: {"difference": target} for name in ("target", "overall")},
                })  # fmt: skip
    plain = {**vars(RUNS[0]), "scores": {"target": 0.0, "overall": 0.9}, "pareto": True}
    return {"name": "x", "task": "vqa", "target": "no", "quality": "overall", "samples": 9, "runs": [plain, *rows]}


def test_many_lines_stay_legible() -> None:
    """A short legend that counts the rest, and no label of α over another."""
    sweep = drawn({f"v{number:02d}": ["lm.block.1"] for number in range(20)}, [0.1, 0.2, 0.3, 1.0])
    figure = pareto_figure(sweep)
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["v19", "v18", "v17", "v16", "16 others", "Pareto front", "unsteered"]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert 2 < len(boxes) < 80
    assert not any(one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[:at])


def test_maps_are_of_vectors_with_several_sites_in_the_order_of_depth() -> None:
    sites = [f"lm.block.{block}" for block in (1, 10, 2)]
    sweep = drawn({"alone": ["lm.block.4"], "few": sites[:2], "many": sites}, [1.0, 2.0])
    figure = map_figure(sweep)
    labels = [[text.get_text() for text in axes.get_yticklabels()] for axes in figure.axes]
    assert labels == [["lm.block.1", "lm.block.2", "lm.block.10"]] * 2 + [["lm.block.1", "lm.block.10"]] * 2
    assert figure.axes[0].get_title().startswith("many, add, answer\n")
    values = [text.get_text() for text in figure.axes[0].texts]
    assert values == ["+0.03", "+0.06", "+0.05", "+0.10", "+0.04", "+0.08"]
    assert len(map_figure(drawn({f"v{n}": sites for n in range(30)}, [1.0])).axes) == 2 * 6


def test_what_is_to_be_avoided_counts_where_it_is_absent() -> None:
    texts = {"unsteered": {"a": "No.", "b": "yes", "c": "yes"}, "s": {"a": "yes", "b": "yes", "c": "snow"}}
    samples = {i: question(0) for i in "abc"}
    runs = [SweepRun("unsteered", "unsteered"), SweepRun("s", "steered", alpha=1.0)]
    with_it, without = (
        score_sweep(runs, texts, samples, Target(answer="no", avoid=avoid))[1] for avoid in (False, True)
    )
    assert [row["scores"]["target"] for row in with_it] == pytest.approx([1 / 3, 0])
    assert [row["scores"]["target"] for row in without] == pytest.approx([2 / 3, 1])
    assert [row["pareto"] for row in with_it] == [True, False]
    assert [row["pareto"] for row in without] == [True, True]


def test_quality_is_the_accuracy_where_nothing_is_to_change() -> None:
    """Of answers on the questions of other types than the target's; overall where there are no others."""
    texts, samples = vqa(30)
    quality, rows, _ = score_sweep(RUNS, texts, samples, Target(answer="2"))
    assert quality == "elsewhere"
    for row in rows:
        others = [
            vqa_accuracy(texts[row["name"]][i], sample.answers)
            for i, sample in samples.items()
            if sample.answer_type != "number"
        ]
        assert row["scores"]["elsewhere"] == pytest.approx(np.mean(others))
    alone = {i: sample for i, sample in samples.items() if sample.answer_type == "number"}
    of_alone = {run: {i: of_run[i] for i in alone} for run, of_run in texts.items()}
    quality, rows, _ = score_sweep(RUNS, of_alone, alone, Target(answer="2"))
    assert quality == "overall"
    assert "elsewhere" not in rows[0]["scores"]
