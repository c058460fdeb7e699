"""The dictionaries of a report: measures, scores and concepts are those of the files, compared where they can be."""

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conceptshift.cli.main import main
from conceptshift.cli.report import write_report
from conceptshift.metrics import published_scores
from PIL import Image

Json = dict[str, Any]
EVIL = "<script>alert('x')</script>"
_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The text of every element, and what is in tables, articles and sections that fold."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.verdicts: list[tuple[str, str | None]] = []
        self.articles: list[str] = []
        self.images: list[list[dict[str, str | None]]] = []
        self.folds: list[dict[str, str | None]] = []
        self.ids: set[str | None] = set()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in _VOID:
            self.path.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "article":
            self.articles.append("")
            self.images.append([])
        elif tag == "img" and "article" in self.path:
            self.images[-1].append(attributes)
        elif tag == "details":
            self.folds.append(attributes)
        if "id" in attributes:
            self.ids.add(attributes["id"])

    def handle_endtag(self, tag: str) -> None:
        assert self.path.pop() == tag

    def handle_data(self, data: str) -> None:
        text = " ".join(data.split())
        self.text = f"{self.text} {text}"
        if {"td", "th"} & set(self.path):
            self.tables[-1][-1][-1] = f"{self.tables[-1][-1][-1]} {text}".strip()
        if "article" in self.path:
            self.articles[-1] = " ".join(f"{self.articles[-1]} {text}".split())

    def rows(self, table: int = 0) -> dict[str, list[str]]:
        """Name of a row, without its arrow → its values."""
        return {row[0].split(" ↑")[0].split(" ↓")[0]: row[1:] for row in self.tables[table]}


def dictionary(run: Path, name: str, concepts: int = 3, **changes: Any) -> Path:
    """A folder as DictionaryFitter leaves it; picture and heat-map of each concept and rank have their own color."""
    folder = run / "concepts" / name
    images = [[] for _ in range(concepts)]  # type: list[list[Json]]
    for k in range(min(concepts, 4)):
        for rank in range(2):
            picture, heat = folder / f"{k}-{rank}.png", f"heat_maps/{k}-{rank + 1}.jpg"
            (folder / "heat_maps").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (200, 100), (60 * k, 200 * rank, 0)).save(picture)
            Image.new("RGB", (200, 100), (60 * k, 200 * rank, 255)).save(folder / heat)
            row = {"sample_id": f"{k}{rank}", "image": str(picture), "text": f"picture {k}", "heat_map": heat}
            images[k].append({**row, "activation": 10.0 - k - rank / 4})
    content = {
        "method": "SemiNMF", "k": concepts, "variant": "original", "site": "lm.block.5",
        "selector": "token_of_interest:dog", "states": 390, "explained_variance": 0.7, "l0": 2.5, "dead_concepts": 0,
        "overlap": 0.125, "objective": 98765.4321, "iterations": 12, "sizes": [5 + k for k in range(concepts)],
        "words": [[f"word{k}", f"other{k}"] for k in range(concepts)], "images": images,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "concepts.json").write_text(json.dumps(content | changes))
    return folder


def scores(folder: Path, **changes: Any) -> None:
    """What GroundingScorer writes beside a dictionary."""
    content = json.loads((folder / "concepts.json").read_text())
    own = {"mean": 0.61, "std": 0.1, "interval": [0.59, 0.63], "n": 50}
    simple = {"mean": 0.55, "std": 0.1, "interval": [0.53, 0.57], "n": 50, "difference": 0.06, "p": 0.0004}
    random = {"mean": 0.62, "std": 0.1, "interval": [0.5, 0.7], "n": 50, "difference": -0.01, "p": 0.4}
    captions = {"mean": 0.8, "std": 0.1, "interval": [0.78, 0.82], "n": 50, "difference": -0.19, "p": 1e-9}
    column = {"SemiNMF": own, "Simple": simple, "Random words": random, "Ground-truth captions": captions}
    summary = {
        "method": "SemiNMF", "samples": 50, "methods": list(column), "scores": {"CLIPScore top-1": column},
        "overlap": {"SemiNMF": 0.125, "Simple": 0.5, "Random words": 0.01}, "words": {"SemiNMF": content["words"]},
        "published": published_scores(content["selector"]),
    }  # fmt: skip
    (folder / "scores.json").write_text(json.dumps(summary | changes))


def causal(folder: Path) -> None:
    """What CausalChecker writes beside a dictionary of three concepts."""
    row = {"random_mean": 0.3, "samples": 16}
    rows = [
        {**row, "concept": 0, "words": ["word0"], "fall": 3.674, "p_adjusted": 0.025, "significant": True},
        {**row, "concept": 2, "words": ["other2"], "fall": -0.358, "p_adjusted": 0.96, "significant": False},
    ]
    summary = {
        "concepts": rows, "left_out": [{"concept": 1, "reason": "no sample"}], "tried": 2, "significant": 1,
        "mean_fall": 1.658, "mean_fall_interval": [-0.358, 3.674], "mean_random_fall": 0.3,
    }  # fmt: skip
    (folder / "causal.json").write_text(json.dumps(summary))


def test_measures_side_by_side(tmp_path: Path) -> None:
    dictionary(tmp_path, "b", method="KMeans", explained_variance=0.5, l0=1.0, mean_stability=0.94, dead_concepts=1)
    dictionary(tmp_path, "nested/a", concepts=4, site="lm.block.20")
    dictionary(tmp_path, "c", method="TopKSAE")
    page = Page(write_report(tmp_path))
    groups, columns = page.tables[0][:2]
    where = ("lm.block.5 · token_of_interest:dog · original", "lm.block.20 · token_of_interest:dog · original")
    assert groups == ["", *where]
    assert columns == ["Measure", "KMeans b", "TopKSAE c", "SemiNMF nested/a"]
    assert dict(list(page.rows().items())[2:]) == {
        "Concepts": ["3", "3", "4"],
        "States": ["390", "390", "390"],
        "Explained variance": ["0.500", "0.700 (best)", "0.700"],
        "Concepts per state (L0)": ["1.00", "2.50", "2.50"],
        "Dead concepts": ["1", "0 (best)", "0"],
        "Overlap": ["0.125", "0.125", "0.125"],
        "Stability over seeds": ["0.940", "–", "–"],
        "Objective": ["98,765", "98,765", "98,765"],
        "Iterations": ["12", "12", "12"],
    }


def test_the_best_is_only_told_of_the_same_states(tmp_path: Path) -> None:
    dictionary(tmp_path, "a", overlap=0.3)
    dictionary(tmp_path, "b", overlap=0.2)
    dictionary(tmp_path, "c", overlap=0.2001)
    dictionary(tmp_path, "d", overlap=0.1, states=389)
    dictionary(tmp_path, "e", overlap=0.0, variant="destination")
    page = Page(write_report(tmp_path))
    assert page.rows()["Overlap"] == ["0.300", "0.200 (best)", "0.200 (best)", "0.100", "0.000"]
    assert page.tables[0][0][-1].endswith("fine-tuned")


def test_scores_beside_baselines_and_the_paper(tmp_path: Path) -> None:
    dictionary(tmp_path, "a", method="KMeans")
    scores(dictionary(tmp_path, "dog"))
    page = Page(write_report(tmp_path))
    side = page.rows()
    assert side["CLIPScore top-1"] == ["–", "0.610 [0.590, 0.630]"]
    assert side["CLIPScore, published"] == ["–", "0.610"]
    assert side["Overlap, published"] == ["–", "0.086"]
    assert "Published: CoX-LMM" in page.text
    assert "Scores on 50 samples" in page.text
    assert page.rows(1) == {
        "Method": ["CLIPScore top-1", "CLIPScore, published", "Overlap", "Overlap, published"],
        "SemiNMF": ["0.610 [0.590, 0.630]", "0.610", "0.125", "0.086"],
        "Simple": ["0.550 [0.530, 0.570] ▲ +0.060, p < 0.001", "0.546", "0.500", "0.371"],
        "Random words": ["0.620 [0.500, 0.700] −0.010, p 0.400", "0.519", "0.010", "–"],
        # No rival: behind it one always is.
        "Ground-truth captions": ["0.800 [0.780, 0.820] −0.190, p < 0.001", "0.783", "–", "–"],
        "PCA": ["–", "–", "–", "0.004"],
        "KMeans": ["–", "–", "–", "0.501"],
    }


def test_scores_without_encoders_are_overlaps(tmp_path: Path) -> None:
    scores(dictionary(tmp_path, "star", selector="token_of_interest:star"), scores={})
    page = Page(write_report(tmp_path))
    assert page.rows(1) == {"Method": ["Overlap"], "SemiNMF": ["0.125"], "Simple": ["0.500"], "Random words": ["0.010"]}
    assert "published" not in page.text.lower()
    assert "upper bound" not in page.text


def test_causal_check(tmp_path: Path) -> None:
    causal(dictionary(tmp_path, "a"))
    dictionary(tmp_path, "b")
    page = Page(write_report(tmp_path))
    assert page.rows()["Fall of log-probability (nats)"] == ["1.66 [−0.36, 3.67]", "–"]
    assert page.rows()["Fall by random directions"] == ["0.30", "–"]
    assert page.rows()["Concepts whose fall is significant"] == ["1 of 2", "–"]
    two, one, zero = page.articles[:3]
    assert "fall without it −0.36 nats, random 0.30, p 0.960 " in two + " "
    assert "fall without it not tried: no sample" in one
    assert "fall without it 3.67 nats, random 0.30, p 0.025: significant" in zero
    assert not any("fall" in article for article in page.articles[3:])


def test_parts_without_files_are_left_out(tmp_path: Path) -> None:
    dictionary(tmp_path, "a", images=[], sizes=None)
    page = Page(write_report(tmp_path))
    assert [tag for tag, _ in page.tags].count("section") == 1
    assert len(page.tables) == 1
    assert not any(page.images)
    for absent in ("tability", "CLIPScore", "log-probability", "heat", "Below each picture", "activat"):
        assert absent not in page.text
    assert page.articles[0] == "Concept 0 word0 other0"


def test_largest_concept_first_with_pictures_over_their_heat_maps(tmp_path: Path) -> None:
    dictionary(tmp_path, "a", sizes=[7, 9, 1], stability=[0.5, 1.0000001, 0.25])
    page = Page(write_report(tmp_path))
    assert page.articles == [
        "Concept 1 9 states word1 other1 stability 1.00 activation 9.00 activation 8.75",
        "Concept 0 7 states word0 other0 stability 0.50 activation 10.0 activation 9.75",
        "Concept 2 1 state word2 other2 stability 0.25 activation 8.00 activation 7.75",
    ]
    for k, shown in zip((1, 0, 2), page.images, strict=True):
        colors = [(60 * k, 200 * rank, blue) for rank in range(2) for blue in (0, 255)]
        assert [image["alt"] for image in shown] == [f"picture {k}", f"where concept {k} is in it"] * 2
        for image, color in zip(shown, colors, strict=True):
            kind, _, data = (image["src"] or "").partition(",")
            drawn = Image.open(io.BytesIO(base64.b64decode(data)))
            assert kind == "data:image/jpeg;base64"
            assert max(drawn.size) == 96
            pixel = drawn.getpixel((40, 20))
            assert isinstance(pixel, tuple)
            assert all(abs(seen - true) < 12 for seen, true in zip(pixel, color, strict=True))


def test_what_is_not_shown(tmp_path: Path) -> None:
    folder = dictionary(tmp_path, "a", concepts=60, sizes=[0, *[1] * 59])
    content = json.loads((folder / "concepts.json").read_text())
    for row in content["images"][1]:
        row["activation"] = 0.0
    (folder / "concepts.json").write_text(json.dumps(content))
    (folder / "heat_maps" / "2-1.jpg").unlink()
    page = Page(write_report(tmp_path))
    assert "The 50 largest of 60 concepts" in page.text
    assert [article.split()[1] for article in page.articles] == [str(number) for number in range(1, 51)]
    assert page.images[0] == []
    assert len(page.images[1]) == 3
    assert "picture not found: 2-1.jpg" in [tag.get("aria-label") for _, tag in page.tags]


def test_the_first_is_open_and_links_lead_into_each(tmp_path: Path) -> None:
    for name in "abc":
        dictionary(tmp_path, name)
    page = Page(write_report(tmp_path))
    assert page.folds == [{"open": None}, {}, {}]
    links = [tag["href"] for name, tag in page.tags if name == "a"]
    assert links == ["#dictionaries", *(f"#dictionary-{number}" for number in (1, 2, 3))]
    assert {f"#{place}" for place in page.ids} == set(links)


def test_everything_is_escaped(tmp_path: Path) -> None:
    row = {"sample_id": EVIL, "image": f'/nowhere/x" onerror="{EVIL}', "text": f'"{EVIL}', "activation": EVIL}
    changes: Json = {"method": EVIL, "site": EVIL, "selector": EVIL, "variant": EVIL, "k": EVIL, "sizes": [2]}
    folder = dictionary(tmp_path, '"><script>', words=[[EVIL]], images=[[row]], **changes)
    shutil.copytree(folder, tmp_path / "concepts" / "other")
    published = {"source": EVIL, "CLIPScore": {EVIL: 1.0}}
    scores(folder, method=EVIL, words={EVIL: [[EVIL]]}, overlap={EVIL: 0.5}, published=published, methods=[EVIL])
    left = [{"concept": 0, "reason": EVIL}]
    (folder / "causal.json").write_text(json.dumps({"concepts": [], "left_out": left}))
    page = Page(write_report(tmp_path))
    assert "script" not in [name for name, _ in page.tags]
    assert not [tag for _, tag in page.tags if "onerror" in tag]
    assert page.text.count(EVIL) > 10
    assert '"><script>' in page.text


def test_same_files_same_bytes(tmp_path: Path) -> None:
    names = ["concept-10", "concept-9", "b", "a/x"]
    for run, order in ((tmp_path / "one" / "run", names), (tmp_path / "two" / "run", names[::-1])):
        for name in order:
            scores(dictionary(run, name))
    first, second = (write_report(tmp_path / name / "run").read_bytes() for name in ("one", "two"))
    assert first == second
    columns = Page(tmp_path / "one" / "run" / "report.html").tables[0][1]
    assert [column.split()[1] for column in columns[1:]] == ["a/x", "b", "concept-9", "concept-10"]


def test_the_folder_must_have_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "concepts" / "empty").mkdir(parents=True)
    assert main(["report", "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path}: neither results.json nor concepts/*/concepts.json nor shift/*/shift.json" in error
    dictionary(tmp_path, "a")
    assert main(["report", "--folder", str(tmp_path)]) == 0


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    folder = dictionary(tmp_path, "a")
    scores(folder)
    causal(folder)
    dictionary(tmp_path, "a", words=[["word0"], ["word1"], ["another"]])
    with pytest.raises(ValueError, match=r"a/scores\.json: of other concepts .*; run GroundingScorer again"):
        write_report(tmp_path)
    (folder / "scores.json").unlink()
    with pytest.raises(ValueError, match=r"a/causal\.json: of other concepts .*; run CausalChecker again"):
        write_report(tmp_path)
    (folder / "causal.json").write_text("{")
    with pytest.raises(ValueError, match=r"a/causal\.json: malformed JSON"):
        write_report(tmp_path)
    (folder / "concepts.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a/concepts\.json: no 'words'"):
        write_report(tmp_path)
