"""The README's commands, in their order, on fewer pictures: they run, and give what it says of them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conceptshift.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 200
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
# They need a model of the hub, or are tested elsewhere for minutes.
NOT_HERE = ("conceptshift architectures", "conceptshift predict --config configs/recipes/")
# What makes them short: the beginning of a command → more flags. Of several that fit, the longest counts.
LIMITS = {
    "shapes": ("--images", str(PICTURES)),
    "fit": ("--trainer.max_steps=12", "--trainer.val_check_interval=12", "--data.init_args.batch_size=8"),
    "fit --config configs/finetune.yaml --config configs/monitor.yaml": (
        "--trainer.max_steps=6", "--trainer.val_check_interval=6", "--callbacks.circle.init_args.every_n_steps=2",
        "--callbacks.circle.init_args.options.word_draws=20", "--callbacks.series.init_args.every_n_steps=2",
    ),
    "predict --config configs/series.yaml": ("--callbacks.circle.init_args.options.word_draws=20",),
    "predict --config configs/shift.yaml": ("--callbacks.kmeans.init_args.options.word_draws=20",),
    "predict --config configs/concepts.yaml": (
        "--callbacks.causal.init_args.samples=2", "--callbacks.causal.init_args.random=19",
        "--callbacks.causal-block-3.init_args.samples=2", "--callbacks.causal-block-3.init_args.random=19",
        "--callbacks.scores.init_args.noise_images=false",
    ),
    "predict --config configs/answer_vectors.yaml": ("--data.init_args.limit=300",),
    "validate --config configs/vqa.yaml": ("--data.init_args.limit=30",),
    "validate --config configs/steer_vqa.yaml": ("--data.init_args.limit=40",),
    "sweep": ("--data.init_args.limit=160", "--model.init_args.alphas=[1.0]", "--model.init_args.sites=[lm.block.5]"),
    "lens": ("--limit", "3"),
    "predict --config configs/lens_scores.yaml": ("--data.init_args.limit=6",),
    "predict --config configs/visual_tokens.yaml": (
        "--data.init_args.limit=2", "--callbacks.ablation.init_args.sets=[object, random:5]",
        "--callbacks.knockout.init_args.knockouts=[object -> answer @ all]",
    ),
}  # fmt: skip


def commands() -> list[str]:
    """Every command of conceptshift in the README's blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("conceptshift ")]


def shortened(command: str) -> list[str]:
    """A command with its limits."""
    words = shlex.split(command)[1:]
    given = " ".join(words)
    fitting = [start for start in LIMITS if given.startswith(start)]
    more = LIMITS[max(fitting, key=len)] if fitting else ()
    quiet = QUIET if words[0] in ("fit", "validate", "predict", "sweep") else ()
    return [*words, *more, *quiet]


def read(path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(path).read_text())
    return content


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[str]], int]]:
    """A fresh folder with what the repository has, in which the commands of the README have been run."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", folder / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["conceptshift"])
        ran = [command for command in ["conceptshift shapes --out data/shapes", *commands()] if _is_run(command)]
        for command in ran:
            words = shortened(command)
            if words[0] == "explain":
                # There are fewer pictures; one of the concepts' own will do.
                picture = read("checkpoints/concepts/concepts/semi_nmf/concepts.json")["images"][0][0]["image"]
                words[words.index("--image") + 1] = picture
            assert main(words) == 0, command
        yield main


def _is_run(command: str) -> bool:
    return not command.startswith(NOT_HERE)


def test_all_commands_are_known() -> None:
    found = commands()
    assert len(found) >= 25
    assert [command for command in found if not _is_run(command)], "nothing is left out that is not there"
    for start in LIMITS:
        if start != "shapes":
            assert any(command.startswith(f"conceptshift {start}") for command in found), start


def test_the_pictures_and_pages_are_there(run: Any) -> None:
    for name in ("checkpoints", "series", "concepts", "shift", "sweep_vqa", "visual_tokens"):
        if name != "checkpoints":
            assert Path(f"checkpoints/{name}/report.html").stat().st_size > 10_000, name
    assert len(list(Path("checkpoints/lens").glob("*.html"))) == 4
    for path in ("finetune/adapter", "monitor/adapter", "monitor/series", "shift/concepts", "shift/vectors"):
        assert any(Path(f"checkpoints/{path}").iterdir()), path
    folders = {path.name for path in Path.cwd().iterdir()}
    assert folders == {"checkpoints", "configs", "data", *(path.name for path in Path.cwd().glob("*-concepts.png"))}
    assert not list(Path("checkpoints").glob("*-trial"))


def test_the_steered_captions_are_compared_with_the_originals(run: Any) -> None:
    """Not with the fine-tuned model's, which were written last."""
    original, adapted, steered = (read(f"checkpoints/{name}/captions.json") for name in (
        "caption", "caption_finetuned", "steer_caption",
    ))  # fmt: skip
    assert original["provenance"]["destination_hash"] is None
    assert adapted["provenance"]["destination_hash"] is not None
    change = steered["changes"]["scores"]["CIDEr"]["difference"]
    assert change == pytest.approx(steered["scores"]["CIDEr"] - original["scores"]["CIDEr"])
    assert adapted["scores"]["CIDEr"] != original["scores"]["CIDEr"]


def test_a_limit_is_told(run: Any) -> None:
    answers = read("checkpoints/vqa/answers.json")
    samples, _, total = answers["coverage"].removesuffix(" (limit)").partition(" of ")
    assert (int(samples), answers["samples"]) == (30, 30)
    assert int(total) > 30
    assert read("checkpoints/steer_vqa/answers.json")["changes"]["samples"] == 30


def test_in_the_old_order_the_stranger_is_named(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """As the README had it: the fine-tuned model's captions in the place of the original's."""
    adapter = ("--model.init_args.adapter", "checkpoints/finetune/adapter")
    with pytest.warns(UserWarning, match="captions.json: replaces what another run wrote"):
        assert run(["validate", "--config", "configs/caption.yaml", *adapter, *QUIET]) == 0
    assert run(["validate", "--config", "configs/steer_caption.yaml", *QUIET]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "conceptshift: CaptionScorer.baseline: checkpoints/caption/captions.json was made by another run" in line
    assert "`destination_hash` was '" in line
    assert "and is None" in line
