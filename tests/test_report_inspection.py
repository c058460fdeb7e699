"""The report's look inside pictures: what its tables say, of files as the callbacks write them."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from conceptshift.cli.report import write_report
from conceptshift.metrics.published import published_ablation, published_knockout, published_lens

Json = dict[str, Any]


def share(value: float | None) -> Json:
    return {"share": value, "interval": None if value is None else [value - 0.01, value + 0.02]}


def lens() -> Json:
    layers = ["lm.embed", "lm.block.0", "lm.block.1"]
    found = {
        "pictures": 1500,
        "objects": 2345,
        "strict": [share(0.0), share(0.25), share(0.125)],
        "lenient": [share(0.0), share(0.375), share(0.2)],
        "any": [share(0.0), share(0.5), share(0.4)],
        "background": [share(0.0), share(0.0625), share(None)],
        "best": {"layer": "lm.block.0", **share(0.25)},
        "peak_layer": {"layer": 1.25, "interval": [1.0, 1.5]},
        "segmentation": {
            name: {"mean": 0.3, "interval": [0.2, 0.4]} for name in ("iou", "average_precision", "baseline")
        },
        "confidence": None,
        "presence": {
            "auroc": {"value": 0.8125, "interval": [0.75, 0.875]},
            "average_precision": {"value": 0.5, "interval": None},
            "present": 10,
            "absent": 30,
        },
        "chair": {"chair_s": {"value": 0.125, "interval": [0.1, 0.2]}, "chair_i": {"value": None, "interval": None}},
    }
    return {
        "meter": "LensScorer",
        "model_id": "<script>alert(1)</script>",
        "layers": layers,
        "variants": {"original": found, "destination": found},
        "published": published_lens(),
        "left_out": {},
        "skipped": {},
    }


def set_row(setting: str, name: str, value: float, control: float | None, p: float) -> Json:
    return {
        "setting": setting,
        "set": name,
        "tokens": 13.7,
        "samples": 50,
        "became_wrong": value,
        "interval": [value - 0.1, value],
        "control": None if control is None else {"became_wrong": control, "interval": [control, control]},
        "difference": None if control is None else {"value": value - control, "interval": [0.0, 0.1], "p": p},
        "all": {"samples": 60, "became_wrong": value, "interval": [value, value]},
        "without": 3 if name == "registers" else 0,
    }


def ablation() -> Json:
    rows = [
        set_row("generative", "object", 0.95, 0.18, 1e-5),
        set_row("polling", "object", 0.5, 0.45, 0.3),
        set_row("polling", "registers", 0.2, 0.1, 0.01),
        set_row("polling", "random:5", 0.05, None, 1.0),
    ]
    away = [
        {
            "setting": "generative",
            "direction": "own direction",
            "samples": 50,
            "became_wrong": 0.64,
            "interval": [0.5, 0.7],
            "difference": None,
            "objects_kept": {"value": 0.88, "interval": [0.8, 0.9]},
            "words_kept": {"value": None, "interval": None},
        }
    ]
    counts = {"samples": 70, "visual_tokens": 64.0, "right": 60, "hallucinated": 10, "kept": 50}
    settings = {"generative": counts, "polling": counts}
    variants = {"original": {"settings": settings, "rows": rows, "project_away": away}}
    return {
        "meter": "AblationMeter",
        "model_id": "m",
        "reference": None,
        "variants": variants,
        "published": published_ablation(),
        "left_out": {"polling/1/dog": "cropped & gone"},
        "skipped": {},
    }


def knockout() -> Json:
    rows = [
        {
            "setting": "polling",
            "knockout": f"object+1 -> last @ {window}",
            "sources": "object+1",
            "targets": "last",
            "window": window,
            "blocks": blocks,
            "source_tokens": 20.0,
            "samples": 60,
            "relative_accuracy": value,
            "interval": [value - 0.1, value],
            "without": 0,
        }
        for window, blocks, value in (("mid-late", [3, 4], 0.8125), ("all", [0, 1, 2, 3, 4, 5], 0.5))
    ]
    settings = {"polling": {"samples": 70, "visual_tokens": 64.0, "right": 60}}
    return {
        "meter": "KnockoutMeter",
        "model_id": "m",
        "variants": {"original": {"settings": settings, "rows": rows}},
        "published": published_knockout(),
        "left_out": {},
        "skipped": {},
    }


def write(path: Path, content: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, content in (("lens", lens()), ("ablation", ablation()), ("knockout", knockout())):
        write(tmp_path / name / f"{name}.json", content)
    (tmp_path / "knockout" / "figures").mkdir()
    (tmp_path / "knockout" / "figures" / "knockout.png").write_bytes(b"\x89PNG")
    return tmp_path


def table(page: str, caption: str) -> list[list[str]]:
    """Cells of the table whose caption begins like that, as text; bold ones with a star."""
    (found,) = re.findall(rf"<table>\s*<caption>{re.escape(caption)}.*?</table>", page, re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", found, re.DOTALL)
    cells = [re.findall(r"<(t[hd])([^>]*)>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [
        [
            ("*" if 'class="more"' in attributes else "") + " ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split())
            for _, attributes, text in row
        ]
        for row in cells
    ]


def test_the_lens_by_layer_beside_the_published_share(run: Path) -> None:
    page = write_report(run).read_text()
    rows = table(page, "What patches decode to, % (original)")
    assert rows[2] == ["lm.block.0", "25.0 [24.0, 27.0]", "37.5 [36.5, 39.5]", "50.0 [49.0, 52.0]", "6.2 [5.2, 8.2]"]
    assert rows[3][4] == "–"
    assert rows[4][:2] == ["layer 25.7 of 33 published", "23.7"]
    measures = {
        row[0]: row[1:]
        for row in table(page, "Where the model is sure of an object, and whether it is there (fine-tuned)")
    }
    assert measures["classes that are there told from others, AUROC"][0] == "0.812 [0.750, 0.875]"
    assert measures["CHAIR, share of captions with a hallucinated object, %"][0] == "12.5 [10.0, 20.0]"
    # What has no value is left out, and not shown as nothing.
    assert not any("named objects" in name or "hallucinated ones" in name for name in measures)
    assert "1,500" in page
    assert "2,345" in page
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_ablation_marks_what_goes_beyond_random_tokens(run: Path) -> None:
    page = write_report(run).read_text()
    rows = {row[0]: row[1:] for row in table(page, "Right answers that become wrong")}
    assert rows["object"] == [
        "13.7",
        "*95.0 [85.0, 95.0] 18.0 [18.0, 18.0]",
        "50.0 [40.0, 50.0] 45.0 [45.0, 45.0]",
    ]
    assert rows["registers in 3 samples none"] == ["13.7", "–", "*20.0 [10.0, 20.0] 10.0 [10.0, 10.0]"]
    assert rows["random:5"] == ["13.7", "–", "5.0 [−5.0, 5.0]"]
    assert rows["object+1 published"] == ["", "71.8", "51.3"]
    away = table(page, "A direction projected away")
    assert away[1] == ["own direction", "generative", "50", "64.0 [50.0, 70.0]", "88.0 [80.0, 90.0]", "–"]
    assert "cropped &amp; gone" in page
    assert "60 of 70 right, 50 not with noise" in page


def test_knockout_by_window_beside_the_published_ones(run: Path) -> None:
    page = write_report(run).read_text()
    rows = table(page, "Relative accuracy without this attention (original, polling)")
    assert rows[0] == ["from → to", "mean number", "mid-late blocks 3–4", "all blocks 0–5"]
    assert rows[1] == [
        "object+1 → last",
        "20.0",
        "0.81 [0.71, 0.81] 0.82 (published)",
        "0.50 [0.40, 0.50] 0.67 (published)",
    ]
    assert "data:image/png;base64," in page


@pytest.mark.parametrize("kind", ["lens", "ablation", "knockout"])
def test_each_alone_makes_a_report(run: Path, kind: str) -> None:
    page = write_report(run / kind).read_text()
    assert "<title>What the image tokens carry</title>" in page
    assert page.count('<h3 id="inspection-') == 1


@pytest.mark.parametrize(
    ("kind", "keys", "value", "fault"),
    [
        ("lens", ("variants", "original", "strict", 0, "share"), "much", "'variants.original.strict[0].share'"),
        ("lens", ("variants", "original", "strict"), [share(0.5)], "'strict' of 'original' has 1 values for 3 layers"),
        ("ablation", ("variants", "original", "rows", 0, "set"), None, "'variants.original.rows[0].set'"),
        ("knockout", ("variants", "original", "rows", 0, "blocks"), [], "'blocks'"),
        ("knockout", ("variants",), None, "no 'variants' in it"),
    ],
)
def test_damaged_files_are_named(run: Path, kind: str, keys: tuple[Any, ...], value: Any, fault: str) -> None:
    path = run / kind / f"{kind}.json"
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    write(path, content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        write_report(run)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)
