"""Every shipped configuration opens with commands that the real classes accept."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conceptshift.cli.lightning_cli import ConceptShiftCLI
from conceptshift.cli.main import COMMANDS
from conceptshift.lightning_modules import VisionLanguageModel

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SUBCOMMANDS = [name for name, (module, _) in COMMANDS.items() if module == "lightning_cli"]


class ParseOnly(ConceptShiftCLI):
    """Reads and checks a command line, but makes nothing of it."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def commands(config: Path) -> Iterator[list[str]]:
    """The commands in the comment that a configuration opens with."""
    for line in config.read_text().splitlines():
        if not line.startswith("#"):
            return
        if line.startswith("#   conceptshift "):
            yield shlex.split(line.removeprefix("#   conceptshift "))


def test_there_are_configurations() -> None:
    assert len(CONFIGS) >= 10


@pytest.mark.parametrize("config", CONFIGS, ids=[str(path.relative_to(ROOT / "configs")) for path in CONFIGS])
def test_header_commands_parse(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # Lightning compares what it is given with the command line of the process.
    monkeypatch.setattr("sys.argv", ["conceptshift"])
    found = list(commands(config))
    named = str(config.relative_to(ROOT))
    assert any(named in command for command in found), f"{named} does not open with a command that runs it"
    for command in found:
        assert command[0] in COMMANDS
        if command[0] in SUBCOMMANDS:
            # `sweep` is a `predict` to Lightning.
            subcommand = "predict" if command[0] == "sweep" else command[0]
            ParseOnly(subclass_mode_model=True, subclass_mode_data=True, args=[subcommand, *command[1:]])


def test_a_wrong_key_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["conceptshift"])
    wrong = ["validate", "--config", "configs/vqa.yaml", "--model.init_args.no_such_key", "1"]
    with pytest.raises(SystemExit):
        ParseOnly(subclass_mode_model=True, subclass_mode_data=True, args=wrong)
    assert "no_such_key" in capsys.readouterr().err


@pytest.mark.parametrize(("pair", "preset"), [("colors", "all"), ("places", "vision_tower")])
def test_a_pair_is_trained_as_shipped(
    pair: str, preset: str, make_model: Callable[..., Path], shapes: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    """On a model as deep as LLaVA-1.5's vision tower, which is read before its last block too."""
    model = make_model(vision_layers=24, vision_width=32, text_layers=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vision_feature_layer": -2}))
    done = cli(
        "fit",
        f"--config={ROOT}/configs/pairs/llava-1.5-7b-{pair}.yaml",
        f"--config={ROOT}/configs/adapt/{preset}.yaml",
        f"--model.init_args.model_id={model}",
        f"--data.init_args.root={shapes / 'visual_genome'}",
        "--data.init_args.num_workers=0",
        "--data.init_args.batch_size=2",
        "--trainer.max_steps=3",
        "--trainer.limit_val_batches=0",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    )
    assert done.status == 0, done.err
    assert "fc1 × 23" in done.out
    adapter = tmp_path / "checkpoints" / "pairs" / pair / "adapter"
    VisionLanguageModel.load(str(model), adapter=str(adapter))
