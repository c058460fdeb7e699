"""The HTML report of a run: what it says, what it leaves out, and that it needs and runs nothing else."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conceptshift.cli.report import run, write_report
from conceptshift.cli.report_samples import color_parts
from conceptshift.cli.report_values import duration, figures, fixed
from conceptshift.datamodules.shapes import COLORS, KINDS, PLACES, write_shapes

Json = dict[str, Any]
EVIL = "<script>alert('x')</script>"
WORDS = [*KINDS, *PLACES, *COLORS]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", 40, 0)


@pytest.fixture
def folder(tmp_path: Path, shapes: Path) -> Path:
    return make_run(tmp_path / "run", shapes, concepts=6)


def make_run(folder: Path, shapes: Path, concepts: int) -> Path:
    """A whole run as the demo leaves it, with numbers from no model."""
    samples, captions, answers = _predictions(shapes)
    pictures = [sample["image"] for key, sample in samples.items() if key.startswith("caption/")]
    _write(folder / "results.json", _results(concepts))
    _write(folder / "samples.json", samples)
    for variant, texts in captions.items():
        _write(folder / f"captions-{variant}.json", {"predictions": texts, "scores": {}})
    for variant, rows in answers.items():
        _write(folder / f"answers-{variant}.json", {"predictions": rows, "scores": {}})
    for method in ("kmeans", "semi_nmf"):
        rows = [_concept(number, concepts, pictures) for number in range(concepts)]
        shift = {"pairs": 1234, "site": "lm.block.2", "selector": "last_prompt", "empty_concepts": [concepts - 1]}
        means = {"recovery_original": 31.0, "recovery_shifted": 64.5, "consistency": 0.8123, "magnitude": 3.25}
        _write(folder / "shift" / method / "shift.json", {**shift, **means, "concepts": rows})
        for variant in ("original", "destination"):
            fitted = {"k": concepts, "explained_variance": 0.71, "overlap": 0.125, "dead_concepts": 1}
            words = [row[f"words_{variant}"] for row in rows]
            _write(folder / "concepts" / f"{variant}-{method}" / "concepts.json", {**fitted, "words": words})
    return folder


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _predictions(shapes: Path) -> tuple[Json, Json, Json]:
    """Samples, captions and answers of the pictures outside `train`."""
    samples: Json = {}
    captions: Json = {"original": {}, "destination": {}, "steered": {}}
    answers: Json = {"original": {}, "steered": {}}
    for image in json.loads((shapes / "dataset_coco.json").read_text())["images"]:
        key, texts = str(image["cocoid"]), [sentence["raw"] for sentence in image["sentences"]]
        path = str(shapes / image["filepath"] / image["filename"])
        samples[f"caption/{key}"] = {"image": path, "prompt": "Provide a one-sentence caption."}
        said = {"original": texts[0], "destination": texts[2], "steered": texts[2 if image["cocoid"] % 3 else 0]}
        for variant, text in said.items():
            captions[variant][key] = {"text": text, "references": texts}
    questions = json.loads((shapes / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    rows = json.loads((shapes / "v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    for question, row in zip(questions, rows, strict=True):
        key, people = str(row["question_id"]), [answer["answer"] for answer in row["answers"]]
        image = f"COCO_val2014_{row['image_id']:012d}.jpg"
        prompt = question["question"] + "\nAnswer the question using a single word or phrase."
        samples[f"question/{key}"] = {"image": str(shapes / "val2014" / image), "prompt": prompt}
        before = row["multiple_choice_answer"]
        for variant, answer in (("original", before), ("steered", "no" if before == "yes" else before)):
            answers[variant][key] = {"prediction": answer, "answers": people, "answer_type": row["answer_type"]}
    return samples, captions, answers


def _concept(number: int, concepts: int, pictures: list[str]) -> Json:
    """The last one is empty; recovery rises more the higher the number."""
    gain = min(number, 5)
    original = [WORDS[(3 * number + step) % 18] for step in range(10)]
    destination = [*list(COLORS)[:6], *original[:4]]
    images = [
        {"sample_id": str(step), "image": pictures[(7 * number + step) % 40], "text": f"a {original[step]}"}
        for step in range(5)
    ]
    return {
        "concept": number,
        "matched": concepts - 1 - number,
        "samples": 0 if number == concepts - 1 else 200 - 7 * number,
        "words_original": original,
        "words_shifted": [*list(COLORS)[:gain], *original[: 10 - gain]],
        "words_destination": destination,
        "recovery_original": 40.0,
        "recovery_shifted": 40.0 + 10 * gain,
        "consistency": 0.6 + 0.01 * number,
        "magnitude": 2.5 + 0.1 * number,
        "images_original": images,
        "images_destination": images[::-1],
    }


def _results(concepts: int) -> Json:
    caption = {"CIDEr": 1.234, "BLEU-4": 0.412, "ROUGE-L": 0.633, "color_share": 0.125}
    other = {"CIDEr": 1.034, "BLEU-4": 0.412, "ROUGE-L": 0.653, "color_share": 0.984}
    vqa = {"overall": 0.7321, "yes/no": 0.8, "number": 0.512, "other": 0.611, "target_answers": 210}
    steered = {"overall": 0.6521, "yes/no": 0.61, "number": 0.509, "other": None, "target_answers": 333}
    found = {"k": concepts, "explained_variance": 0.71, "overlap": 0.1, "words": [["red", "star"]]}
    return {
        "captioning": {"original": caption, "destination": other, "steered": {**caption, "color_share": 0.57}},
        "vqa": {"original": vqa, "steered": steered},
        "concepts": {"kmeans": found},
        "shift": {"recovery_original": 31.0, "recovery_shifted": 64.5, "consistency": 0.8123,
                  "matched_cosine_gain": 0.057},
        "seconds": {"extract": 75.4, "fit": 3.21},
        "versions": {"torch": "2.9.1"},
        "skipped": {"METEOR": "needs java"},
    }  # fmt: skip


class Page(HTMLParser):
    """Elements with their attributes, and the text that a reader sees."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self._texts.append(data)

    @property
    def text(self) -> str:
        """Every element's text on its own, one space between."""
        return " ".join(" ".join(self._texts).split())

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for tag, attributes in self.elements if tag == "section"]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def change(path: Path, **values: Any) -> None:
    _write(path, json.loads(path.read_text()) | values)


def test_numbers_of_the_results(folder: Path) -> None:
    page = Page(write_report(folder))
    assert page.sections == ["scores", "concepts", "captions", "answers", "dictionaries", "run"]
    assert "captions with a color word 12.5 % → 98.4 %" in page.text
    assert "recovery 31.0 % → 64.5 %" in page.text
    assert "answers “no” 210 → 333" in page.text
    # Without an interval a difference is neither better nor worse.
    assert "CIDEr 1.234 1.034 −0.200 1.234 ±0" in page.text
    assert "ROUGE-L 0.633 0.653 +0.020" in page.text
    assert "Captions with a color word 12.5 % 98.4 % +85.9 57.0 % +44.5" in page.text
    assert "Accuracy, other 61.1 % –" in page.text
    assert "extract 1 min 15 s" in page.text
    assert "torch 2.9.1" in page.text
    assert "METEOR needs java" in page.text


def test_a_verdict_only_where_the_paired_interval_leaves_0_out(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    captioning = results["captioning"]
    captioning["original"]["intervals"] = {"CIDEr": [1.1, 1.3], "color_share": [0.1, 0.15]}
    captioning["destination"] |= {
        "intervals": {"CIDEr": [0.9, 1.2]},
        "changes": {
            "CIDEr": {"difference": -0.2, "interval": [-0.35, -0.05]},
            "BLEU-4": {"difference": 0.0, "interval": [-0.01, 0.01]},
            "ROUGE-L": {"difference": 0.02, "interval": [-0.01, 0.05]},
            "color_share": {"difference": 0.859, "interval": [0.8, 0.9]},
        },
    }
    results["vqa"]["steered"]["changes"] = {"overall": {"difference": -0.08, "interval": [-0.1, 0.0]},
                                            "yes/no": {"difference": -0.19, "interval": [-0.2, -0.1]}}  # fmt: skip
    _write(folder / "results.json", results)
    page = Page(write_report(folder))
    assert "CIDEr 1.234 [1.100, 1.300] 1.034 [0.900, 1.200] ▼ −0.200 (worse) [−0.350, −0.050] 1.234 ±0" in page.text
    assert "BLEU-4 0.412 0.412 ±0 [−0.010, 0.010]" in page.text
    assert "ROUGE-L 0.633 0.653 +0.020 [−0.010, 0.050]" in page.text
    assert "Captions with a color word 12.5 % [10.0, 15.0] 98.4 % ▲ +85.9 [80.0, 90.0] 57.0 % +44.5" in page.text
    assert "Accuracy, all questions 73.2 % 65.2 % −8.0 [−10.0, 0.0]" in page.text
    assert "Accuracy, yes/no 80.0 % 61.0 % ▼ −19.0 (worse) [−20.0, −10.0]" in page.text
    captioning["destination"]["intervals"]["CIDEr"] = [1]
    _write(folder / "results.json", results)
    with pytest.raises(ValueError, match=r"results\.json: 'captioning\.destination\.intervals\.CIDEr' must be two"):
        write_report(folder)


def test_concepts_by_gain_and_the_empty_one_last(folder: Path) -> None:
    page = Page(write_report(folder))
    shifts = page.text[: page.text.index("Dictionaries side by side")]
    kmeans, semi_nmf = shifts.split("Semi-NMF", maxsplit=1)
    assert re.findall(r"Concept (\d)", kmeans) == ["4", "3", "2", "1", "0", "5"]
    assert re.findall(r"Concept (\d)", semi_nmf) == ["4", "3", "2", "1", "0", "5"]
    empty = kmeans[kmeans.index("Concept 5") :]
    assert "no sample, no shift vector" in empty
    assert "recovery" not in empty
    assert "+40 points of recovery" in kmeans
    assert "recovery 40 → 80 %" in kmeans


def test_marks_shared_and_recovered_words(folder: Path) -> None:
    row = {"concept": 0, "samples": 3, "words_original": ["dog", "cat"], "words_shifted": ["cat", "red", "sea"],
           "words_destination": ["red", "cat"], "recovery_original": 50, "recovery_shifted": None}  # fmt: skip
    change(folder / "shift" / "kmeans" / "shift.json", concepts=[row])
    (folder / "shift" / "semi_nmf" / "shift.json").unlink()
    page = Page(write_report(folder))
    columns = page.text[page.text.index("Concept 0") : page.text.index("Captions 12")]
    assert "original dog cat (shared)" in columns
    assert "cat (shared) red (recovered) sea" in columns
    assert "recovery 50 → – %" in columns
    assert "Semi-NMF" not in columns


def test_captions_that_differ_come_first_with_their_colors_marked(folder: Path) -> None:
    for variant, texts in {"original": "ab", "destination": "ac", "steered": "ad"}.items():
        rows = {str(i): {"text": f"a blue {texts[i == 7]}", "references": []} for i in range(20)}
        _write(folder / f"captions-{variant}.json", {"predictions": rows})
    page = Page(write_report(folder))
    captions = page.text[page.text.index("Captions 12 of 20") :]
    assert captions.startswith("Captions 12 of 20 captions")
    assert "original a blue b fine-tuned a blue c steered a blue d" in captions
    assert captions.index("blue b") < captions.index("blue a")
    assert len(page.all("mark")) == 1 + 12 * 3


def test_answers_show_flips_then_what_stays(folder: Path) -> None:
    def row(answer: str, kind: str) -> Json:
        return {"prediction": answer, "answers": ["yes"] * 9 + ["no"], "answer_type": kind}

    original = {
        "1": row("Yes.", "yes/no"),
        "2": row("2", "number"),
        "3": row("snow", "other"),
        "4": row("no", "yes/no"),
    }
    steered = {**original, "1": row("no", "yes/no")}
    for variant, rows in (("original", original), ("steered", steered)):
        _write(folder / f"answers-{variant}.json", {"predictions": rows})
    page = Page(write_report(folder))
    answers = page.text[page.text.index("Over 4 questions") :]
    assert "turned from yes to no 1× and from no to yes 0×" in answers
    assert "yes/no 2 1 (50.0 %)" in answers
    assert answers.index("Yes. → no") < answers.index("2 unchanged") < answers.index("snow unchanged")
    assert "yes ×9 , no ×1" in answers


def test_needs_nothing_else_and_runs_nothing(folder: Path) -> None:
    path = write_report(folder)
    page = Page(path)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", path.read_text(), re.IGNORECASE)
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert all(image["alt"] is not None for image in page.all("img"))
    places = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert all((link["href"] or "").removeprefix("#") in places for link in page.all("a"))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert "default-src 'none'" in path.read_text()
    assert len(page.all("img")) > 12
    assert str(folder.parent) not in path.read_text()


def test_everything_from_the_run_is_escaped(folder: Path) -> None:
    evil = json.loads((folder / "results.json").read_text())
    evil |= {"model": EVIL, "data": EVIL, "seconds": {EVIL: EVIL}, "versions": {EVIL: EVIL}, "skipped": {EVIL: EVIL}}
    _write(folder / "results.json", evil)
    shift = json.loads((folder / "shift" / "kmeans" / "shift.json").read_text())
    picture = {"sample_id": EVIL, "image": f'/nowhere/{EVIL[:8]}" onerror="x', "text": f'"{EVIL}'}
    names = {f"words_{name}": [EVIL] for name in ("original", "shifted", "destination")}
    rows = [row | names | {"images_original": [picture], "images_destination": [picture]} for row in shift["concepts"]]
    change(folder / "shift" / "kmeans" / "shift.json", concepts=rows, site=EVIL, selector=EVIL, method=EVIL)
    for variant in ("original", "destination", "steered"):
        caption = {"text": f"red {EVIL}", "references": [EVIL]}
        _write(folder / f"captions-{variant}.json", {"predictions": {EVIL: caption}})
    for variant in ("original", "steered"):
        answer = {"prediction": EVIL, "answers": [EVIL], "answer_type": "other"}
        _write(folder / f"answers-{variant}.json", {"predictions": {EVIL: answer}})
    _write(folder / "samples.json", {f"question/{EVIL}": {"image": EVIL, "prompt": EVIL}})
    page = Page(write_report(folder))
    assert not page.all("script")
    assert not [attributes for _, attributes in page.elements if "onerror" in attributes]
    assert page.text.count(EVIL) > 20


@pytest.mark.parametrize(
    ("missing", "section"),
    [
        (["captions-original.json", "captions-destination.json", "captions-steered.json"], "captions"),
        (["answers-steered.json"], "answers"),
        (["shift/kmeans/shift.json", "shift/semi_nmf/shift.json"], "concepts"),
    ],
)
def test_leaves_out_a_section_without_its_files(folder: Path, missing: list[str], section: str) -> None:
    for name in missing:
        (folder / name).unlink()
    page = Page(write_report(folder))
    assert section not in page.sections
    assert len(page.sections) == 5
    assert f"#{section}" not in [link["href"] for link in page.all("a")]


def test_results_alone_are_enough(tmp_path: Path) -> None:
    _write(tmp_path / "results.json", {})
    assert Page(write_report(tmp_path)).sections == []
    _write(tmp_path / "results.json", {"captioning": {"destination": {"CIDEr": None}}, "vqa": None, "shift": None})
    page = Page(write_report(tmp_path))
    assert page.sections == ["scores"]
    assert "CIDEr –" in page.text
    _write(tmp_path / "results.json", {"concepts": {"kmeans": {"k": 7, "overlap": 0.25, "words": [["red", "sea"]]}}})
    page = Page(write_report(tmp_path))
    assert page.sections == ["dictionaries"]
    assert "Concepts 7" in page.text
    assert "Concept 0 red sea" in page.text


def test_placeholder_for_pictures_that_are_gone(folder: Path, shapes: Path) -> None:
    samples = json.loads((folder / "samples.json").read_text())
    broken = folder / "broken.jpg"
    broken.write_bytes(b"no picture")
    for sample in samples.values():
        sample["image"] = "broken.jpg" if "caption" in sample["prompt"] else "/nowhere/gone.jpg"
    _write(folder / "samples.json", samples)
    page = Page(write_report(folder))
    assert "broken.jpg" in page.text
    labels = [span.get("aria-label") for span in page.all("span")]
    assert labels.count("picture not found: broken.jpg") == 12
    assert "picture not found: gone.jpg" in labels
    (folder / "samples.json").unlink()
    assert "no path" in Page(write_report(folder)).text


def test_unusable_files_are_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: neither results\.json nor concepts/\*/concepts\.json"):
        write_report(folder / "nowhere")
    for text, message in (("{", "malformed JSON"), ("[]", "JSON object, got list"), ('{"vqa": [1]}', "'vqa' must be")):
        (folder / "results.json").write_text(text)
        with pytest.raises(ValueError, match=rf"results\.json: .*{message}") as error:
            write_report(folder)
        assert "\n" not in str(error.value)
    _write(folder / "results.json", {})
    _write(folder / "shift" / "kmeans" / "shift.json", {})
    with pytest.raises(ValueError, match=r"kmeans/shift\.json: no 'concepts'"):
        write_report(folder)


def test_same_run_same_bytes_and_the_command_writes_elsewhere(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_report(folder)
    assert first == folder / "report.html"
    out = tmp_path / "elsewhere" / "page.html"
    run(["report", "--folder", str(folder), "--out", str(out)])
    assert out.read_bytes() == first.read_bytes()
    assert capsys.readouterr().out.strip() == str(out)


def test_how_numbers_and_colors_are_written() -> None:
    assert [fixed(value) for value in (1234.56, -0.04, None, float("nan"), True, "9")] == [
        "1,234.6", "0.0", "–", "–", "–", "–",
    ]  # fmt: skip
    assert (fixed(0.5, 1, signed=True), fixed(-0.5, 1, signed=True)) == ("+0.5", "−0.5")
    assert [duration(value) for value in (4.21, 200, 3720, None)] == ["4.2 s", "3 min 20 s", "1 h 02 min", "–"]
    assert [figures(value) for value in (0.014169, -1.2345, 99.96, 123456.7, 0, None)] == [
        "0.0142", "−1.23", "100.0", "123,457", "0", "–",
    ]  # fmt: skip
    assert color_parts("A Red-hot tired rose") == [
        ("A ", False), ("Red", True), ("-hot tired ", False), ("rose", True),
    ]  # fmt: skip
