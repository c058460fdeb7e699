"""The report's steering: which run is the best, what is told apart, what a reader must find, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conceptshift.callbacks.parts.sweep_figures import show_sweep
from conceptshift.callbacks.parts.sweep_scores import Target, score_sweep
from conceptshift.cli.main import main
from conceptshift.cli.report import write_report
from conceptshift.cli.report_steering import Sweep, steering_view
from conceptshift.datamodules.sample import Sample
from conceptshift.lightning_modules.sweep import SweepRun
from conceptshift.records.files import write_json
from PIL import Image

from .test_report_shift import EVIL, Json, Page

UNSTEERED = {"target": 0.2, "overall": 0.9, "yes/no": 0.95, "number": 0.8, "length": 1.0, "repetition": 0.0}


def run(vector: str, alpha: float, target: float, quality: float, kind: str = "steered", **more: Any) -> Json:
    """A run whose paired intervals are 0.02 to either side."""
    scores = UNSTEERED | {"target": target, "overall": quality, "CIDEr": quality}
    changes = {
        name: {"difference": score - was, "interval": [score - was - 0.02, score - was + 0.02]}
        for name, score in scores.items()
        for was in [UNSTEERED.get(name, 0.9)]
    }
    control = more.get("control", 0)
    site = more.get("site", "lm.block.1")
    return {
        "name": f"{vector} {alpha:g} at {site}, {kind} {control}", "kind": kind, "vector": vector, "site": site,
        "alpha": alpha, "positions": "last_prompt", "mode": "add", "control": control, "pareto": False,
        "scores": scores, "changes": changes,
        "intervals": {name: [score - 0.05, score + 0.05] for name, score in scores.items()},
        "rises": {}, "selection": {"clear": False, "targets": [], "gap": 0.0}, **more,
    }  # fmt: skip


def unsteered() -> Json:
    row = run("", 0.0, 0.2, 0.9, "unsteered", site="", positions="", pareto=True)
    return {**{key: value for key, value in row.items() if key != "changes"}, "name": "unsteered"}


def sweep(*runs: Json, **changes: Any) -> Json:
    return {"name": "no", "task": "vqa", "target": "no", "quality": "overall", "samples": 400, "skipped": {},
            "runs": [unsteered(), *runs], **changes}  # fmt: skip


def write_sweep(folder: Path, content: Json, texts: dict[str, dict[str, str]] | None = None) -> Path:
    """A folder as SweepScorer leaves it, without figures."""
    write_json(folder / "sweep.json", content)
    if texts is not None:
        rows = [
            {"run": name, "sample_id": i, "text": text} for name, of_run in texts.items() for i, text in of_run.items()
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")
    return folder


def only(content: Json) -> Json:
    (view,) = steering_view([Sweep("no", content)], {}, lambda path, alt: pytest.fail("no picture is known"))
    return view


# --- the best run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "best"),
    [
        # The last loses more than a tenth of 0.9.
        ([(0.5, 0.3, 0.88), (1.0, 0.4, 0.82), (2.0, 0.9, 0.80)], 1.0),
        ([(0.5, 0.3, 0.95), (1.0, 0.1, 0.99)], 0.5),
        ([(2.0, 0.9, 0.1), (-0.5, 0.7, 0.2), (1.0, 0.8, 0.3)], -0.5),
        ([(1.0, 0.4, 0.85), (0.5, 0.4, 0.88), (2.0, 0.4, 0.85)], 0.5),
        ([(1.0, 0.4, 0.85), (-0.5, 0.4, 0.85)], -0.5),
    ],
    ids=["keeps quality", "better quality alone is nothing", "smallest", "ties by quality", "then by strength"],
)
def test_the_best_run(runs: list[tuple[float, float, float]], best: float) -> None:
    content = sweep(*(run("v", *one) for one in runs), run("v", 0.1, 1.0, 0.9, "random"))
    for order in (content["runs"], content["runs"][::-1]):
        assert Sweep("no", content | {"runs": order}).best["alpha"] == best


def test_a_best_run_for_each_vector_and_place_and_the_best_of_them_is_the_best_of_all() -> None:
    rows = [run(v, a, t, q, site=f"lm.block.{b}")
            for v, b, a, t, q in [("x", 1, 0.5, 0.3, 0.9), ("x", 1, 1.0, 0.5, 0.89), ("x", 2, 0.5, 0.9, 0.1),
                                  ("x", 2, 1.0, 0.95, 0.1), ("y", 1, 1.0, 0.4, 0.9)]]  # fmt: skip
    view = only(sweep(*rows))
    assert [(row.vector, row.site, row.alpha, row.kept, row.best) for row in view["rows"]] == [
        ("unsteered", "", "", True, False),
        ("x", "lm.block.1", "1", True, True),
        ("x", "lm.block.2", "0.5", False, False),
        ("y", "lm.block.1", "1", True, False),
    ]
    assert view["best"] is view["rows"][1]


def test_of_many_candidates_the_best_are_shown_and_all_clear_targets_counted() -> None:
    def clear(k: int) -> Json:
        return {"clear": k % 2 == 0, "targets": ["blue" if k % 4 else "no"], "gap": float(k)}

    rows = [run(f"v{k}", 1.0, k / 100, 0.9, selection=clear(k)) for k in range(20)]
    view = only(sweep(*rows))
    assert [row.vector for row in view["rows"]] == ["unsteered", *(f"v{k}" for k in range(8, 20))]
    assert view["left_out"] == 8
    assert view["clear_targets"] == [("no", 5, rows[16]["name"], 16.0), ("blue", 5, rows[18]["name"], 18.0)]
    assert {row.vector: row.clear for row in view["rows"]}["v18"] == "blue"
    assert {row.vector: row.clear for row in view["rows"]}["v19"] == ""


# --- what is told apart -----------------------------------------------------------------------------------


def test_verdicts_need_an_interval_without_0() -> None:
    view = only(sweep(run("v", 1.0, 0.25, 0.89), run("w", 1.0, 0.21, 0.93), run("x", 1.0, 0.1, 0.885)))
    told = {row.vector: (row.changes["target"].verdict, row.changes["overall"].verdict) for row in view["rows"][1:]}
    assert told == {"v": ("better", ""), "w": ("", "better"), "x": ("worse", "")}
    assert view["rows"][1].changes["target"].text == "+5.0"
    assert view["rows"][1].changes["target"].interval == "[3.0, 7.0]"


def test_vectors_are_compared_where_they_steer_alike_and_only_as_far_as_intervals_tell() -> None:
    rows = [
        run("coarse", 1.0, 0.50, 0.85),
        run("probe", 0.5, 0.47, 0.90),
        run("fine", 2.0, 0.30, 0.86),
        run("worse", 2.0, 0.30, 0.85),
        run("far", 1.0, 0.99, 0.90, site="lm.block.2"),
    ]
    assert only(sweep(*rows))["comparison"] == [
        "At lm.block.1, coarse (α 1) against probe (α 0.5): target share not told apart, quality lower.",
        "At lm.block.1, coarse (α 1) against fine (α 2), worse (α 2): target share higher, quality not told apart.",
    ]
    assert only(sweep(rows[0], rows[4]))["comparison"] == []


def test_controls_of_the_same_strength_and_whether_they_do_as_well() -> None:
    rows = [
        run("v", 0.5, 0.6, 0.9),
        *(run("v", alpha, share, 0.9, kind, control=n)
          for alpha, kind, n, share in [(0.5, "random", 0, 0.2), (0.5, "random", 1, 0.3), (0.5, "shuffled", 0, 0.58),
                                        (1.0, "random", 0, 0.9), (1.0, "shuffled", 0, 0.9)]),
        run("w", 0.5, 0.4, 0.9),
        run("w", 0.5, 0.7, 0.9, "random"),
    ]  # fmt: skip
    _, v, w = only(sweep(*rows))["rows"]
    assert (v.controls["random"].text, v.controls["random"].interval) == ("25.0", "20.0–30.0, 2 draws")
    assert v.controls["random"].note == ""
    assert (v.controls["shuffled"].text, v.controls["shuffled"].note) == ("58.0", "not told apart")
    assert v.controls["shuffled"].interval == "[53.0, 63.0]"
    assert list(w.controls) == ["random"]
    assert w.controls["random"].note == "higher"


# --- the page ---------------------------------------------------------------------------------------------


def make_run(folder: Path) -> Path:
    """Two targets, with pictures and prompts for some samples."""
    selection = {"clear": True, "targets": ["no"], "gap": 71.0}
    rows = [
        run("yes-no", 1.0, 0.5, 0.85, pareto=True, rises={"moon": 2, "no": 71, "": 1}, selection=selection),
        run("yes-no", 2.0, 0.9, 0.3),
        run("yes-no", 1.0, 0.25, 0.9, "random"),
    ]
    before = {str(i): "yes" for i in range(20)}
    after = {i: "yes" if int(i) % 4 == 0 else "no" for i in before}
    content = sweep(*rows, skipped={"77": "truncated file"})
    texts = {"unsteered": before, rows[0]["name"]: after}
    show_sweep(content, write_sweep(folder / "sweep_vqa" / "no", content, texts), [])
    rows = [run("colors", 0.5, 0.7, 0.2, site="lm.block.3", pareto=True)]
    words = ["amber", "blue", "cream", "gold", "gray", "pink", "red"]
    content = sweep(*rows, task="caption", target=words, quality="CIDEr", name="colors")
    texts = {"unsteered": {"9": "a dog"}, rows[0]["name"]: {"9": "a red dog"}}
    write_sweep(folder / "sweep_caption" / "colors", content, texts)
    Image.new("RGB", (40, 30), (90, 0, 200)).save(folder / "one.png")
    prompt = "Is it red?\nAnswer the question using a single word or phrase."
    write_json(
        folder / "samples.json", {f"question/{i}": {"image": "one.png", "prompt": f"{i}: {prompt}"} for i in (1, 16)}
    )
    return folder


def test_a_run_with_sweeps_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--folder", str(make_run(tmp_path))]) == 0
    page = Page(Path(capsys.readouterr().out.strip()))
    assert page.sections == ["steering"]
    assert page.text.startswith("Steering report")
    targets = page.rows("Targets")
    assert targets["sweep_vqa/no"] == [
        "yes-no", "lm.block.1", "1 ◆ (on the Pareto front)", "20.0 → 50.0", "▲ +30.0 (better) [28.0, 32.0]",
        "90.0 → 85.0 VQA accuracy, %", "▼ −5.0 (worse) [−7.0, −3.0]",
    ]  # fmt: skip
    assert targets["sweep_caption/colors"][2] == "0.5 ◆ (on the Pareto front) smallest α"
    assert targets["sweep_caption/colors"][5] == "0.900 → 0.200 CIDEr"
    runs = page.rows("Runs of sweep_vqa/no")
    assert runs["unsteered"][:3] == ["", "◆ (on the Pareto front)", "20.0 [15.0, 25.0]"]
    assert runs["yes-no"][2] == "50.0 [45.0, 55.0]"
    assert runs["yes-no"][-3:] == ["0.0", "1.0", "25.0 [20.0, 30.0]"]
    assert "random direction, %" in runs["vector"]
    assert "shuffled labels, %" not in runs["vector"]
    answers = page.tables["Answers of sweep_vqa/no"]
    assert answers[0] == ["vector", "yes/no, %", "change", "number, %", "change", "rose most", "one clear target"]
    assert answers[2][0] == "yes-no lm.block.1, α 1"
    assert answers[2][-2:] == ["no +71, moon +2, (nothing) +1", "“no”"]
    assert "Answers of sweep_caption/colors" not in page.tables
    assert "captions with a word of the class (amber, blue, cream, gold, gray, pink, …)" in page.text
    assert "Samples 400 Vector yes-no Site lm.block.1 Positions last_prompt Mode add Strengths α 1, 2" in page.text
    assert "1 sample left out 77 truncated file" in page.text
    assert len(page.all("figure")) == 1  # one site: no map
    places = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {(link["href"] or "")[1:] for link in page.all("a")} == {"steering", "steering-1", "steering-2"} <= places


def test_examples_evenly_from_what_changes_and_one_that_does_not(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)))
    caption, *answers = page.articles
    assert caption == "unsteered a dog steered a red dog"
    assert "6 of 20 samples, unsteered → yes-no at lm.block.1, α 1, which changes 15" in page.text
    # Only for two samples is more known, one of them shown.
    assert answers == ["1: Is it red? unsteered yes steered no", *["unsteered yes steered no"] * 4,
                       "unsteered yes steered unchanged"]  # fmt: skip
    assert [image["alt"] for image in page.all("img") if "picture" in (image["alt"] or "")] == ["picture of sample 1"]


def test_the_folder_of_one_target_without_texts_or_figures(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "no", sweep(run("v", 1.0, 0.5, 0.85)))
    page = Page(write_report(folder))
    assert "Runs of no" in page.tables
    assert "Targets" not in page.tables
    assert not page.articles
    assert not page.all("figure")


def test_beside_results_there_is_everything(tmp_path: Path) -> None:
    write_json(make_run(tmp_path) / "results.json", {"captioning": {"original": {"CIDEr": 1.0}}})
    page = Page(write_report(tmp_path))
    assert page.sections == ["scores", "steering"]


def test_everything_from_models_and_data_is_escaped(tmp_path: Path) -> None:
    rows = [
        run(v, 1.0, 0.5, 0.85, site=EVIL, positions=EVIL, mode=EVIL, rises={EVIL: 3},
            selection={"clear": True, "targets": [v], "gap": 1.0})
        for v in (EVIL, f"{EVIL}2")
    ]  # fmt: skip
    texts = {"unsteered": {EVIL: EVIL, "2": EVIL}, rows[0]["name"]: {EVIL: f"{EVIL}!", "2": EVIL}}
    content = sweep(*rows, target=EVIL, skipped={EVIL: EVIL})
    write_sweep(tmp_path / EVIL.replace("/", ""), content, texts)
    write_json(tmp_path / "samples.json", {f"question/{EVIL}": {"image": f'/nowhere/x" onerror="{EVIL[:8]}',
                                                                "prompt": EVIL}})  # fmt: skip
    page = Page(write_report(tmp_path))
    assert not page.all("script")
    assert not [attributes for _, attributes in page.elements if "onerror" in attributes]
    assert page.text.count(EVIL) > 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": None}, "no 'runs' in it"),
        ({"runs": {}}, r"'runs' must be a list, got {}"),
        ({"runs": [{"name": "x"}]}, r"'runs\[0\]\.kind' must be a text, got None"),
        ({"runs": [run("v", 1.0, 0.5, 0.5)]}, "'runs' must have one unsteered run, and at least one steered"),
        ({"runs": [unsteered()]}, "'runs' must have one unsteered run, and at least one steered"),
        ({"quality": "CLIP"}, "the run 'unsteered' has no score 'CLIP'"),
        ({"runs": [unsteered(), run("v", 1.0, 0.5, 0.5, changes={})]}, "the run 'v .*' has no change of 'target'"),
        ({"skipped": ["3"]}, r"'skipped' must be an object"),
    ],
)
def test_a_broken_or_foreign_sweep_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Json, message: str
) -> None:
    write_sweep(tmp_path / "no", sweep(run("v", 1.0, 0.5, 0.85)) | change)
    assert main(["report", "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"^conceptshift: .*no/sweep\.json: .*{message}.*; run what writes it again, or remove it", error)
    assert error.count("\n") == 1


def test_broken_or_foreign_texts_are_named_in_one_line(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "no", sweep(run("v", 1.0, 0.5, 0.85)), {"unsteered": {"1": "a"}})
    with pytest.raises(ValueError, match=r"samples\.parquet: nothing of the run 'v 1 .*' of the sweep\.json beside it"):
        write_report(tmp_path)
    pq.write_table(pa.table({"run": [1], "text": ["a"]}), folder / "samples.parquet")
    with pytest.raises(ValueError, match=r"^[^\n]*samples\.parquet: no texts of a sweep \([^\n]*$"):
        write_report(tmp_path)
    (folder / "samples.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"^[^\n]*samples\.parquet: no texts of a sweep \([^\n]*$"):
        write_report(tmp_path)


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_what_the_scorer_writes_is_understood(tmp_path: Path, task: str) -> None:
    plain, wanted = ("a dog{}", "a red dog{}") if task == "caption" else ("no", "yes")
    samples = {
        str(i): Sample(str(i), Path("x.jpg"), "Is it?", "", references=(f"a red dog{i}",), answers=("yes",) * 10,
                       answer_type="yes/no", question_type="is it")
        for i in range(8)
    }  # fmt: skip
    runs = [
        SweepRun("unsteered", "unsteered"),
        SweepRun("v", "steered", "v", "lm.block.0", 1.0, "answer"),
        SweepRun("v, random 0", "random", "v", "lm.block.0", 1.0, "answer"),
    ]
    texts = {
        one.name: {i: (wanted if one.name == "v" and i != "3" else plain).format(i) for i in samples} for one in runs
    }
    target = Target(answer="yes") if task == "vqa" else Target(words=frozenset({"red"}))
    quality, rows, _ = score_sweep(runs, texts, samples, target)
    write_sweep(tmp_path, sweep() | {"task": task, "quality": quality, "runs": rows}, texts)
    page = Page(write_report(tmp_path))
    (v,) = (row for row in page.tables[f"Runs of {tmp_path.name}"] if row[0] == "v")
    assert v[2] == "1 ◆ (on the Pareto front)"
    assert v[3].startswith("87.5 [")
    assert v[4].startswith("▲ +87.5 (better) [")
    assert v[6].startswith("▲ +")
    assert v[-1].startswith("0.0 [")
    assert len(page.articles) == 6
    assert page.articles[-1] == f"unsteered {plain.format(3)} steered unchanged"
