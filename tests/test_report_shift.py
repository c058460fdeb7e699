"""The report's concept shifts: what a reader must find, what may be missing, and what is refused."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conceptshift.callbacks.parts.shift_figures import recovery_figure, save_figures, trajectory_figure
from conceptshift.cli.main import main
from conceptshift.cli.report import write_report
from conceptshift.cli.report_files import ANY, COUNT, NUMBER, NUMBERS, PAIR, TEXT, misfit
from conceptshift.records.files import write_json
from PIL import Image

Json = dict[str, Any]
EVIL = "<script>alert('x')</script>"
TESTS = ("magnitude", "consistency", "recovery_pairing", "recovery_direction", "words_pairing", "words_direction")


class Page(HTMLParser):
    """Text of the page, of its tables and articles, and every element's attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.articles: list[str] = []
        self._path: list[str] = []
        self._texts: list[str] = []
        self._caption = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in ("meta", "img"):
            self._path.append(tag)
        if tag == "div" and attributes.get("role") == "region":
            self._caption = attributes["aria-label"] or ""
        elif tag == "details":
            self._caption = ""
        elif tag == "table":
            self.tables.setdefault(self._caption, [])
        elif tag == "tr":
            self.tables[self._caption].append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append("")
        elif tag == "article":
            self.articles.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._path.pop() == tag

    def handle_data(self, data: str) -> None:
        text = " ".join(data.split())
        self._texts.append(text)
        if {"td", "th"} & set(self._path):
            row = self.tables[self._caption][-1]
            row[-1] = f"{row[-1]} {text}".strip()
        if "article" in self._path:
            self.articles[-1] = " ".join(f"{self.articles[-1]} {text}".split())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def rows(self, table: str) -> dict[str, list[str]]:
        return {row[0]: row[1:] for row in self.tables[table]}

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for attributes in self.all("section")]


def pictures(folder: Path, concept: int, name: str) -> list[Json]:
    path = folder / f"{name}-{concept}.png"
    Image.new("RGB", (40, 30), (20 * concept, 0, 200)).save(path)
    return [{"sample_id": f"{concept}", "image": str(path), "text": f"{name} of {concept}", "activation": 2.5}]


def concept(folder: Path, number: int, p: float = 0.004) -> Json:
    """The gain rises with the number."""
    values = {"recovery_original": 20.0, "recovery_shifted": 20.0 + 10 * number, "recovery_gain": 10.0 * number,
              "consistency": 0.5 + 0.1 * number, "magnitude": 2.0 + number}  # fmt: skip
    return {
        "concept": number, "samples": 9 + number, "matched": 10 + number, "words_original": ["dog", "sea"],
        "words_shifted": ["red", "sea"], "words_destination": ["red", "sea", "moon"], **values,
        "intervals": {"recovery_shifted": [10.0, 60.0], "recovery_gain": [-5.0, 45.0],
                      "consistency": [0.4, 0.95], "magnitude": [1.5, 6.0]},
        "p": dict.fromkeys(TESTS, p / 2), "p_adjusted": dict.fromkeys(TESTS, p),
        **{f"images_{name}": pictures(folder, number, name) for name in ("original", "shifted", "destination")},
    }  # fmt: skip


def make_shift(run: Path, name: str = "kmeans", **changes: Any) -> Path:
    """A folder as ShiftMeter leaves it: two concepts, and one without a sample."""
    folder = run / "shift" / name
    folder.mkdir(parents=True)
    empty = dict.fromkeys(("recovery_shifted", "recovery_gain", "consistency", "magnitude"))
    rows: list[Json] = [
        {**concept(folder, 0), **empty, "samples": 0, "words_shifted": [], "intervals": {}, "p": {}, "p_adjusted": {},
         "images_shifted": []},
        concept(folder, 1, p=0.3),
        concept(folder, 2),
    ]  # fmt: skip
    found = {"pearson": 0.834, "pearson_interval": [0.6, 0.95], "pearson_p": 0.0004,
             "spearman": 0.5, "spearman_interval": None, "spearman_p": 0.25, "concepts": 2}  # fmt: skip
    content = {
        "method": "KMeans", "site": "lm.block.5", "selector": "last_prompt", "original": "original",
        "destination": "destination", "alpha": 1.0, "average": "median", "matching": "bijective", "pairs": 1234,
        "samples": 1200, "unpaired": {"original": 12, "destination": 3}, "empty_concepts": [0], "level": 0.95,
        "permutations": 1000, "resamples": 1000, "word_draws": 100,
        "means": {"recovery_original": 31.04, "recovery_shifted": 64.5, "recovery_gain": 33.46, "l2_original": 5.0,
                  "l2_shifted": 4.2, "delta_l2": 0.8, "consistency": 0.812, "magnitude": 3.25},
        "intervals": {"recovery_shifted": [51.0, 70.25], "consistency": [0.7, 0.9]},
        "correlations": {"consistency": found, "magnitude": None, "mean_magnitude": found, "pairwise_cosine": found},
        "tests": {test: {"significant": place, "concepts": 2} for place, test in enumerate(TESTS[:3])},
        "seeds": {"seeds": 2, "cosine_original": [0.93, 0.9], "recovery_original": [81.0, 79.5]},
        "seed_intervals": {"cosine_original": [0.85, 0.97]},
        "figures": {}, "concepts": rows,
    }  # fmt: skip
    content |= changes
    write_json(folder / "shift.json", content)
    return folder


def make_trajectory(run: Path, name: str = "kmeans", steps: tuple[int, ...] = (60, 120), **changes: Any) -> Path:
    """A folder as ShiftMonitor leaves it: concept 1 moves most, concept 2 has no sample."""
    folder = run / "shift" / name
    folder.mkdir(parents=True, exist_ok=True)
    measures = ("magnitude", "consistency", "aligned", "cosine_shifted", "recovery_shifted")
    points = []
    for place, step in enumerate(steps, start=1):
        rows: list[Json] = [
            {"concept": k, "samples": 5, **dict.fromkeys(measures, 0.1 * place * (k + 1)),
             "recovery_shifted": 30.0 + place, "words_shifted": ["dog", "red"][:place],
             "intervals": {"recovery_shifted": [25.0, 40.0]},
             "p_adjusted": {"magnitude": 0.01}}
            for k in range(2)
        ]  # fmt: skip
        rows.append({"concept": 2, "samples": 0, **dict.fromkeys(measures), "words_shifted": [], "intervals": {}})
        means = {**dict.fromkeys(measures, 0.25 * place), "recovery_shifted": 30.0 + place}
        points.append({"variant": f"step-{step:06d}", "step": step, "means": means, "concepts": rows,
                       "intervals": {"magnitude": [0.125, 0.5]}})  # fmt: skip
    start = {
        "means": {"magnitude": 0.0, "cosine_shifted": 0.125, "recovery_shifted": 12.5},
        "concepts": [{"concept": k, "samples": 5, "magnitude": 0.0, "recovery_shifted": 20.0} for k in range(2)],
    }
    content = {
        "method": "SemiNMF", "site": "lm.block.3", "selector": "answer", "alpha": 1.0, "average": "mean",
        "matching": "nearest", "pairs": 256, "level": 0.95, "empty_concepts": [2], "matched": [4, 3, 0],
        "words_original": [["dog", "cat"]] * 3, "words_destination": [["red", "cat"]] * 3,
        "images_original": [pictures(folder, k, "original") for k in range(3)],
        "images_destination": [pictures(folder, k, "destination") for k in range(3)], "figures": {}, "points": points,
        "start": start,
    }  # fmt: skip
    content |= changes
    write_json(folder / "trajectory.json", content)
    return folder


def change(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text()) | values)


# --- what a reader must find ------------------------------------------------------------------------------


def test_means_with_intervals_tests_correlations_and_other_seeds(tmp_path: Path) -> None:
    make_shift(tmp_path)
    page = Page(write_report(tmp_path))
    assert page.sections == ["concepts"]
    means = page.rows("Means of KMeans")
    assert means["Recovery of words, %"] == ["31.0", "64.5 [51.0, 70.2]", "+33.5"]
    assert means["Distance to the matched concept"] == ["5.0", "4.2", "+0.8"]
    assert "Recovery of pictures, %" not in means
    singles = page.rows("The shifts of KMeans")
    assert singles["Consistency: mean cosine of the samples’ shifts with Δ"] == ["0.812 [0.700, 0.900]"]
    assert singles["Magnitude of Δ"] == ["3.2"]
    assert (
        "0 of 2 concepts shift : its pairs differ by more than where original and fine-tuned states are swapped"
        in page.text
    )
    assert "1 of 2 concepts move consistently" in page.text
    assert "2 of 2 concepts come nearer to their match through their own samples" in page.text
    assert "p ≤ 0.05, Benjamini–Hochberg over the concepts; 1,000 draws, 100 where words are read" in page.text
    assert page.rows("Correlations of KMeans") == {
        "Measure": ["Pearson r", "Spearman ρ", "concepts"],
        **{
            name: ["0.83 [0.60, 0.95] p < 0.001", "0.50 p 0.250", "2"]
            for name in (
                "Consistency", "Mean cosine between the shifts of two samples", "Mean magnitude of the samples’ shifts",
            )
        },
    }  # fmt: skip
    assert "too few samples to test" not in page.text
    assert page.rows("Other seeds of KMeans") == {
        "Further seeds": ["2"],
        "Original’s concepts and the original’s of another seed: cosine": ["0.930, 0.900 [0.850, 0.970]"],
        "the same: words in common, %": ["81.0, 79.5"],
    }
    for fact in (
        "Pairs of states 1,234 of 1,200 samples", "Left without a pair 3 destination, 12 original",
        "Shift Δ of a concept median of its samples’ shifts", "Strength α 1.00", "matched one to one, by cosine",
        "Concepts without a sample 1", "Hidden states lm.block.5 · last_prompt",
    ):  # fmt: skip
        assert fact in page.text


def test_concepts_by_gain_with_words_pictures_intervals_and_significance(tmp_path: Path) -> None:
    make_shift(tmp_path)
    page = Page(write_report(tmp_path))
    first, second, last = page.articles
    assert first.startswith("Concept 2 11 samples +20 points of recovery original dog sea (shared)")
    assert "shifted: original + its shift vector red (recovered) sea (shared)" in first
    assert "fine-tuned: its concept 12 red (recovered) sea (shared) moon" in first
    assert "recovery 20 → 40 % [10, 60]" in first
    assert "consistency 0.70 [0.40, 0.95] magnitude 4.00 [1.50, 6.00]" in first
    assert "★ significant shift p 0.004" in first
    assert "test p adjusted shift 0.002 0.004 move consistently 0.002 0.004" in first
    assert second.startswith("Concept 1 10 samples +10 points")
    assert "shift not significant p 0.300" in second
    assert "★" not in second
    assert last == "Concept 0 no sample, no shift vector original dog sea"
    assert [summary.get("title") for summary in page.all("summary")] == ["adjusted p 0.004", "adjusted p 0.300"]
    shown = [image["alt"] for image in page.all("img")]
    assert shown == [*(f"{name} of {k}" for k in (2, 1) for name in ("original", "shifted", "destination")),
                     "original of 0"]  # fmt: skip


def test_a_concept_with_too_few_samples_is_not_called_not_significant(tmp_path: Path) -> None:
    folder = make_shift(tmp_path)
    rows = json.loads((folder / "shift.json").read_text())["concepts"]
    rows[1] |= {"samples": 5, "too_few_samples": True, "p": {}, "p_adjusted": {}}
    change(
        folder / "shift.json",
        concepts=rows,
        untested_concepts=[0, 1],
        tests={"magnitude": {"significant": 1, "concepts": 1}},
    )
    page = Page(write_report(tmp_path))
    assert re.search(r"1 of 1 concepts shift : [^.]*\. \(1 has too few samples to test\.\)", page.text)
    _, second, empty = page.articles
    assert second.endswith("too few samples to test")
    assert "not significant" not in page.text
    assert empty == "Concept 0 no sample, no shift vector original dog sea"


def test_a_trajectory_of_an_older_file_has_no_start(tmp_path: Path) -> None:
    make_trajectory(tmp_path, start=None)
    page = Page(write_report(tmp_path))
    assert list(page.rows("Means at each checkpoint")) == ["checkpoint", "step 60", "step 120"]
    assert page.rows("Words of concept 1 over the training")["original"] == ["dog cat (shared)", "", ""]


def test_trajectory_without_a_shift(tmp_path: Path) -> None:
    make_trajectory(tmp_path, "finetune")
    page = Page(write_report(tmp_path))
    assert page.sections == ["trajectory"]
    assert "Hidden states lm.block.3 · answer" in page.text
    assert "States compared 256" in page.text
    assert page.rows("Means at each checkpoint")["original"] == ["0.000", "–", "–", "0.125", "12.5"]
    assert page.rows("Means at each checkpoint")["step 120"] == [
        "0.500 [0.125, 0.500]",
        "0.500",
        "0.500",
        "0.500",
        "32.0",
    ]
    assert [article.split(" checkpoint")[0] for article in page.articles] == [
        "Concept 1 → fine-tuned concept 3", "Concept 0 → fine-tuned concept 4",
    ]  # fmt: skip
    assert page.rows("Words of concept 1 over the training") == {
        "checkpoint": ["words", "recovery, %", "magnitude"],
        "original": ["dog cat (shared)", "20", "0.00"],
        "step 60": ["dog", "31 [25, 40]", "0.20"],
        "step 120": ["dog red (recovered)", "32 [25, 40]", "0.40"],
        "fine-tuned": ["red (recovered) cat", "", ""],
    }
    assert [image["alt"] for image in page.all("img")][:2] == ["original of 1", "destination of 1"]


def test_of_many_checkpoints_some_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    make_trajectory(tmp_path, steps=tuple(range(10, 210, 10)))
    page = Page(write_report(tmp_path))
    words = list(page.rows("Words of concept 0 over the training"))
    assert words[:3] == ["checkpoint", "original", "step 10"]
    assert words[-2:] == ["step 200", "fine-tuned"]
    assert len(words) == 3 + 8
    assert "12 checkpoints between these are left out" in page.text
    assert len(page.tables["Means at each checkpoint"]) == 2 + 20


def test_a_monitored_run_has_both_and_shifts_lie_at_any_depth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shift(tmp_path, "finetune")
    make_trajectory(tmp_path, "finetune")
    make_shift(tmp_path, "layers/semi_nmf")
    make_shift(tmp_path, "semi_nmf")
    assert main(["report", "--folder", str(tmp_path)]) == 0
    page = Page(Path(capsys.readouterr().out.strip()))
    assert page.sections == ["concepts", "trajectory"]
    titles = ["layers/semi_nmf", "Semi-NMF", "finetune"]
    assert [name.removeprefix("Means of ") for name in page.tables if name.startswith("Means of")] == titles
    assert len(page.articles) == 3 * 3 + 2
    places = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert [link["href"] for link in page.all("a")] == ["#concepts", "#trajectory"]
    assert {"concepts", "trajectory"} <= places


def test_many_concepts_are_cut_and_counted(tmp_path: Path) -> None:
    folder = make_shift(tmp_path)
    rows = [concept(folder, 1) | {"concept": k} for k in range(53)]
    change(folder / "shift.json", concepts=rows, empty_concepts=[])
    page = Page(write_report(tmp_path))
    assert len(page.articles) == 50
    assert "The first 50 of 53 concepts" in page.text


# --- figures ----------------------------------------------------------------------------------------------


def test_the_lighter_of_both_figures_is_in_the_page(tmp_path: Path) -> None:
    folder = make_shift(tmp_path)
    make_trajectory(tmp_path)
    for name, figure in (("shift", recovery_figure), ("trajectory", trajectory_figure)):
        path = folder / f"{name}.json"
        drawn = "recovery" if name == "shift" else name
        change(path, figures=save_figures({drawn: figure(json.loads(path.read_text()))}, folder))
    (folder / "figures" / "trajectory.svg").write_text("<svg/>" + " " * 10_000_000)
    page = Page(write_report(tmp_path))
    uris = [image["src"] or "" for image in page.all("img") if not (image["src"] or "").startswith("data:image/jpeg")]
    kinds = [uri.split(";")[0] for uri in uris]
    files = [folder / "figures" / name for name in ("recovery.svg", "recovery.png", "trajectory.png")]
    lighter = min(files[:2], key=lambda path: path.stat().st_size)
    assert kinds == [f"data:image/{lighter.suffix[1:].replace('svg', 'svg+xml')}", "data:image/png"]
    assert [base64.b64decode(uri.split(",")[1]) for uri in uris] == [lighter.read_bytes(), files[2].read_bytes()]
    assert "A point is a concept" in page.text
    assert "A thin line is a concept" in page.text


def test_figures_that_are_gone_are_left_out_with_their_captions(tmp_path: Path) -> None:
    names = ("words", "recovery", "samples")
    make_shift(tmp_path, figures={name: f"figures/{name}.png" for name in names})
    make_trajectory(tmp_path, figures={"trajectory": "figures/trajectory.png"})
    page = Page(write_report(tmp_path))
    assert not page.all("figure")
    assert "All concepts in one figure" not in page.text
    assert page.sections == ["concepts", "trajectory"]


# --- what may be missing, and what is refused -------------------------------------------------------------


def test_an_older_file_still_shows(tmp_path: Path) -> None:
    row = {"concept": 0, "samples": 3, "words_original": ["dog"], "words_shifted": ["red"], "matched": 1,
           "words_destination": ["red"], "recovery_original": 0.0, "recovery_shifted": 100.0, "consistency": 0.75,
           "magnitude": 2.5}  # fmt: skip
    folder = tmp_path / "shift" / "kmeans"
    folder.mkdir(parents=True)
    content = {"pairs": 7, "recovery_original": 0.0, "recovery_shifted": 100.0, "consistency": 0.75, "concepts": [row]}
    (folder / "shift.json").write_text(json.dumps(content))
    page = Page(write_report(tmp_path))
    assert page.rows("Means of KMeans")["Recovery of words, %"] == ["0.0", "100.0", "+100.0"]
    (article,) = page.articles
    assert "recovery 0 → 100 % consistency 0.75 magnitude 2.50" in article
    assert "significant" not in article
    assert "Is it chance?" not in page.text
    assert "intervals" not in page.text


def test_null_is_nothing_rather_than_a_number(tmp_path: Path) -> None:
    nothing: Json = dict.fromkeys(("intervals", "seeds", "tests", "figures", "unpaired"))
    none = {"consistency": None, "magnitude": None}
    make_shift(tmp_path, **nothing, correlations=none, means=none)
    make_trajectory(tmp_path, steps=(), start=None)
    page = Page(write_report(tmp_path))
    assert "No checkpoint has been measured yet" in page.text
    assert not [name for name in page.tables if name and "Words" not in name]
    assert not re.search(r"\b(None|null|nan)\b", page.text)


def test_everything_from_the_files_is_escaped(tmp_path: Path) -> None:
    folder = make_shift(
        tmp_path, EVIL.replace("/", ""), **dict.fromkeys(("method", "site", "selector", "average"), EVIL)
    )
    words = {f"words_{name}": [EVIL] for name in ("original", "shifted", "destination")}
    shown = [{"image": f'/nowhere/x" onerror="{EVIL[:8]}', "text": f'"{EVIL}'}]
    evil = {**words, "images_original": shown, "p": {EVIL: 0.1}, "p_adjusted": {EVIL: 0.1, "magnitude": 0.01}}
    rows = [row | evil for row in json.loads((folder / "shift.json").read_text())["concepts"]]
    tests = {EVIL: {"significant": 1, "concepts": 2}}
    change(folder / "shift.json", concepts=rows, tests=tests, unpaired={EVIL: 3}, seeds={EVIL: 2})
    make_trajectory(tmp_path, words_original=[[EVIL]] * 3, words_destination=[[EVIL]] * 3)
    page = Page(write_report(tmp_path))
    assert not page.all("script")
    assert not [attributes for _, attributes in page.elements if "onerror" in attributes]
    assert page.text.count(EVIL) > 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("shift", {"concepts": {}}, "'concepts' must be a list, got {}"),
        ("shift", {"concepts": [7]}, r"'concepts\[0\]' must be an object, got 7"),
        ("shift", {"concepts": [{}]}, r"'concepts\[0\]\.concept' must be a whole number from 0, got None"),
        (
            "shift",
            {"concepts": [{"concept": 0, "samples": 1.5}]},
            r"\.samples' must be a whole number from 0, got 1\.5",
        ),
        ("shift", {"concepts": [{"concept": 0, "words_shifted": "red"}]}, r"words_shifted' must be a list, got 'red'"),
        ("shift", {"concepts": [{"concept": 0, "intervals": {"consistency": [1]}}]}, "must be two numbers, got"),
        ("shift", {"means": {"magnitude": "long"}}, r"'means\.magnitude' must be a number, got 'long'"),
        (
            "shift",
            {"correlations": {"magnitude": {"pearson": True}}},
            r"magnitude\.pearson' must be a number, got True",
        ),
        ("shift", {"seeds": {"recovery_shifted": ["a"]}}, "must be a number or a list of numbers"),
        ("shift", {"figures": {"words": 3}}, r"'figures\.words' must be a text, got 3"),
        ("shift", {"concepts": None}, "no 'concepts' in it"),
        ("trajectory", {"points": None}, "no 'points' in it"),
        ("trajectory", {"points": [{"step": 3}]}, r"'points\[0\]\.concepts' must be a list, got None"),
        ("trajectory", {"points": [{"step": "3", "concepts": []}]}, r"'points\[0\]\.step' must be a whole number"),
        (
            "trajectory",
            {"start": {"means": {"magnitude": "0"}}},
            r"'start\.means\.magnitude' must be a number, got '0'",
        ),
        ("trajectory", {"words_original": ["dog"]}, r"'words_original\[0\]' must be a list, got 'dog'"),
    ],
)
def test_a_malformed_file_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: Json, message: str
) -> None:
    make_shift(tmp_path)
    folder = make_trajectory(tmp_path)
    change(folder / f"{name}.json", **content)
    assert main(["report", "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"^conceptshift: .*kmeans/{name}\.json: .*{message}", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_shapes_say_where_a_value_is_another() -> None:
    shape = {"n!": COUNT, "rows": [{ANY: [NUMBER]}], "name": TEXT, "ends": PAIR, "many": NUMBERS}
    fine: Json = {"n": 0, "rows": [{"a": [1, 2.5], "b": None}], "name": None, "ends": [0, 1], "other": object()}
    assert misfit(fine, shape) == ""
    assert misfit(fine | {"many": 2}, shape) == misfit(fine | {"many": [1, 2]}, shape) == ""
    assert misfit(fine | {"n": -1}, shape) == "'n' must be a whole number from 0, got -1"
    assert misfit(fine | {"rows": [{}, {"a": [1, None]}]}, shape) == "'rows[1].a[1]' must be a number, got None"
    assert misfit({}, shape) == "'n' must be a whole number from 0, got None"
