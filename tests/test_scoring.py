"""`conceptshift validate`: scores of the whole set, steered and not, whatever the batches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.concepts import SteeringVectors
from conceptshift.datamodules import VQADataModule
from conceptshift.lightning_modules import FineTuning, VisionLanguageModel
from conceptshift.metrics import caption_scores, vqa_accuracy
from conceptshift.tests.results import measured

Run = Callable[..., Any]
VQA = ("--trainer.callbacks+=VQAScorer", "--trainer.callbacks.out=scores.json")
CAPTIONS = ("--trainer.callbacks+=CaptionScorer", "--trainer.callbacks.out=scores.json")


def scores() -> dict[str, Any]:
    content: dict[str, Any] = measured(Path("scores.json"))
    return content


def steerer(vector: Path, alpha: float, **options: object) -> list[str]:
    step = {"file": str(vector), "alpha": alpha, **options}
    return ["--trainer.callbacks+=Steerer", f"--trainer.callbacks.vectors={json.dumps([step])}"]


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    path = tmp_path / "vector.safetensors"
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0))
    SteeringVectors({"lm.block.0": direction}, {}, {}).save(path)
    return path


@pytest.mark.parametrize(("data", "scorer"), [("CaptionDataModule", CAPTIONS), ("VQADataModule", VQA)])
@pytest.mark.parametrize("steered", [False, True])
def test_scores_do_not_depend_on_the_batch_size(
    validate: Run, data: str, scorer: tuple[str, ...], steered: bool, vector: Path
) -> None:
    found = []
    for size in (1, 3, 8):
        more = steerer(vector, 3.0) if steered else []
        split = ["--data.val_split=train"] if data == "CaptionDataModule" else []
        done = validate(*scorer, *more, *split, "--data.limit=11", f"--data.batch_size={size}", data=data)
        assert done.status == 0, done.err
        found.append(scores())
    assert found[0]["samples"] == len(found[0]["predictions"]) == 11
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_the_logged_loss_does_not_depend_on_the_batch_size(validate: Run) -> None:
    """It is a mean over answer tokens, so batches with longer answers must count for more."""
    losses = []
    for size in (1, 3, 8):
        done = validate(*CAPTIONS, "--data.val_split=train", "--data.limit=11", f"--data.batch_size={size}")
        (line,) = [line for line in done.out.splitlines() if "loss/val" in line]
        losses.append(float(line.split("│")[2]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_captions_are_scored_as_the_metric_scores_them(validate: Run, tiny: Path) -> None:
    assert validate(*CAPTIONS, "--data.val_split=train", "--data.limit=8").status == 0
    content = scores()
    rows = content["predictions"]
    texts, references = ({key: row[name] for key, row in rows.items()} for name in ("text", "references"))
    expected = caption_scores(texts, references)
    assert expected.keys() <= content["scores"].keys()
    for name, value in expected.items():
        assert content["scores"][name] == pytest.approx(float(value)), name
    colors = {"red", "blue", "yellow"}
    share = content["scores"]["word_share"]
    assert (share > 0) == any(colors & set(row["text"].split()) for row in rows.values())
    assert len({row["text"] for row in rows.values()}) > 3


def test_answers_are_scored_as_the_metric_scores_them(validate: Run, shapes: Path) -> None:
    assert validate(*VQA, "--data.limit=20", data="VQADataModule").status == 0
    content = scores()
    data = VQADataModule(str(shapes), limit=20)
    data.setup("validate")
    accuracy = [
        vqa_accuracy(content["predictions"][sample.sample_id]["prediction"], sample.answers)
        for sample in data.samples("validate")
    ]
    assert content["scores"]["overall"] == pytest.approx(sum(accuracy) / 20)
    assert sum(content["answers"].values()) == 20


@pytest.mark.parametrize("command", ["validate", "test"])
def test_zero_strength_scores_as_unsteered(cli: Run, tiny: Path, shapes: Path, vector: Path, command: str) -> None:
    found = []
    for alpha in (None, 0.0, 4.0, None):
        more = [] if alpha is None else steerer(vector, alpha)
        done = cli(
            command, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model=FineTuning",
            f"--model.model_id={tiny}", "--model.max_new_tokens=4", "--data=VQADataModule", f"--data.root={shapes}",
            "--data.limit=9", *more, *VQA,
        )  # fmt: skip
        assert done.status == 0, done.err
        found.append(scores())
    plain, zero, steered, again = found
    assert zero == plain == again
    assert steered["answers"] != plain["answers"]


def test_the_loss_is_that_of_the_unsteered_or_the_steered_model_but_there_is_one(validate: Run, vector: Path) -> None:
    done = validate(*steerer(vector, 1.0), *CAPTIONS, "--data.limit=2")
    assert done.status == 0, done.err
    assert "loss/val" in done.out


def test_steering_ends_with_an_exception(validate: Run, vector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard of all tests sees the hooks that a callback forgets."""
    loaded: list[VisionLanguageModel] = []

    def fail(self: FineTuning, batch: Any, batch_idx: int) -> None:
        loaded.append(self.backbone)
        assert _own_hooks(self.backbone) == 1
        raise ValueError("broken on purpose")

    monkeypatch.setattr(FineTuning, "validation_step", fail)
    assert "broken on purpose" in validate(*steerer(vector, 1.0)).error
    assert _own_hooks(loaded[0]) == 0


def _own_hooks(backbone: VisionLanguageModel) -> int:
    """Hooks of ours; transformers leaves some of its own."""
    hooks = [hook for module in backbone.modules() for hook in module._forward_hooks.values()]
    return sum(hook.__module__.startswith("conceptshift.") for hook in hooks)


def test_a_steerer_that_cannot_work(validate: Run, tmp_path: Path, vector: Path) -> None:
    wrong = tmp_path / "wide.safetensors"
    SteeringVectors({"lm.block.0": torch.ones(80)}, {}, {}).save(wrong)
    message = "steering vector of width 80 at 'lm.block.0', where states have width 64; it was made for another model"
    assert message in validate(*steerer(wrong, 1.0)).error
    assert "nowhere.safetensors" in validate(*steerer(tmp_path / "nowhere.safetensors", 1.0)).error
    assert not Path("scores.json").exists()


@pytest.mark.parametrize(("data", "scorer"), [("CaptionDataModule", CAPTIONS), ("VQADataModule", VQA)])
def test_skipped_pictures_are_listed(
    validate: Run, tmp_path: Path, shapes: Path, data: str, scorer: tuple[str, ...]
) -> None:
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    pictures = sorted((root / "val2014").glob("*.jpg"))
    split = ["--data.val_split=restval+val+test"] if data == "CaptionDataModule" else []
    pictures[1].unlink()
    name = pictures[1].name
    assert f"{name}: no such picture" in validate(*scorer, *split, data=data, root=root).error
    assert not Path("scores.json").exists()
    done = validate(*scorer, *split, "--data.skip_bad_images=true", "--data.batch_size=1", data=data, root=root)
    assert done.status == 0, done.err
    content = scores()
    number = int(name.split("_")[-1].removesuffix(".jpg"))
    expected = [str(number)] if split else [str(10 * number + question) for question in range(6)]
    assert sorted(content["skipped"]) == sorted(expected)
    assert all("no such picture" in reason for reason in content["skipped"].values())
    assert content["samples"] == (8 if split else 48) - len(expected)
    assert not set(content["predictions"]) & set(expected)


def test_no_readable_picture_at_all(validate: Run, tmp_path: Path, shapes: Path) -> None:
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    shutil.rmtree(root / "val2014")
    error = validate(*CAPTIONS, "--data.skip_bad_images=true", root=root).error
    assert "picture" in error
    assert not Path("scores.json").exists()


def test_validation_within_fit_scores_too(fit: Run) -> None:
    options = ("--trainer.limit_val_batches=1", "--trainer.val_check_interval=1", "--model.max_new_tokens=3")
    done = fit(
        *options, *VQA, "--trainer.enable_checkpointing=false", "--trainer.num_sanity_val_steps=1", data="VQADataModule"
    )
    assert done.status == 0, done.err
    assert scores()["samples"] == 4
