"""`--config` files: merged before parsing, so that nothing is dropped and nothing inherited unsaid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conceptshift.cli.config_files import merge_configs, merged, read_config, same_class
from conceptshift.cli.lightning_cli import ConceptShiftCLI

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
Parse = Callable[..., Any]


class ParseOnly(ConceptShiftCLI):
    """Reads a command line, and makes nothing of it."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Configuration of a command: `parse("validate", "--config", …)`."""
    monkeypatch.setattr("sys.argv", ["conceptshift"])

    def run(*arguments: object) -> Any:
        given = [str(argument) for argument in arguments]
        found = ParseOnly(
            subclass_mode_model=True, subclass_mode_data=True, parser_kwargs={"exit_on_error": False}, args=given
        )
        return found.config[given[0]]

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration: `write(name, content)`."""

    def run(name: str, content: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return run


# --- a class does not inherit from another ------------------------------------------------------------------


@pytest.mark.parametrize("by", ["file", "flag", "class_path", "short flag"])
def test_data_do_not_inherit_from_another_class(parse: Parse, by: str) -> None:
    """vqa.yaml asks 1,200 of Shapes' questions; a folder's own are all asked."""
    folder = "conceptshift.datamodules.FolderDataModule"
    ways: dict[str, list[object]] = {
        "file": ["--config", CONFIGS / "data" / "folder.yaml"],
        "flag": ["--data", folder, "--data.init_args.root=p", "--data.init_args.prompt=What"],
        "class_path": [f"--data.class_path={folder}", "--data.init_args.root=p", "--data.init_args.prompt=What"],
        "short flag": ["--data=FolderDataModule", "--data.root=p", "--data.prompt=What"],
    }
    config = parse("validate", "--config", CONFIGS / "vqa.yaml", *ways[by])
    assert config.data.class_path == folder
    assert config.data.init_args.limit is None
    assert config.data.init_args.batch_size == 16


def test_the_same_class_by_another_name_keeps_its_options(parse: Parse) -> None:
    for name in ("VQADataModule", "conceptshift.datamodules.vqa.VQADataModule"):
        assert parse("validate", "--config", CONFIGS / "vqa.yaml", "--data", name).data.init_args.limit == 1200
    assert same_class("VQADataModule", "conceptshift.datamodules.VQADataModule")
    assert not same_class("elsewhere.VQADataModule", "conceptshift.datamodules.VQADataModule")
    assert not same_class("torch.optim.SGD", "torch.optim.AdamW")


def test_neither_does_a_class_within_another() -> None:
    earlier = {"o": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 9}}}
    later = {"o": {"class_path": "torch.optim.SGD", "init_args": {"momentum": 1}}}
    assert merged(earlier, later) == later
    merged_config, flags = merge_configs([f"--config={CONFIGS / 'finetune.yaml'}", "--model.optimizer=SGD"])
    assert "optimizer" not in merged_config["model"]["init_args"]
    assert flags == ["--model.optimizer=SGD"]


# --- callbacks by name --------------------------------------------------------------------------------------


def test_a_flag_reaches_a_callback_by_its_name(parse: Parse) -> None:
    for command in ("steer_vqa", "steer_caption"):
        vectors = '[{"file": "mine.safetensors", "alpha": 0.3}]'
        for key in ("init_args.vectors", "vectors"):
            found = parse("validate", "--config", CONFIGS / f"{command}.yaml", f"--callbacks.steer.{key}={vectors}")
            (step,) = found.callbacks["steer"].init_args.vectors
            assert (step.file, step.alpha) == ("mine.safetensors", 0.3)
            assert len(found.callbacks) == 2


def test_a_later_file_changes_one_and_keeps_the_others(parse: Parse, write: Callable[..., Path]) -> None:
    later = write("later", {"callbacks": {"original-kmeans": {"init_args": {"held_out": 0.5}}, "colors": None}})
    found = parse("predict", "--config", CONFIGS / "shift.yaml", "--config", later).callbacks
    before = parse("predict", "--config", CONFIGS / "shift.yaml").callbacks
    assert list(found) == list(before)
    assert found["original-kmeans"].init_args.held_out == 0.5
    assert found["original-kmeans"].init_args.site == before["original-kmeans"].init_args.site
    assert found["colors"] is None
    assert found["places"] == before["places"]
    more = ["--callbacks.extra=CaptionScorer", "--callbacks.extra.variant=destination", "--callbacks.places=null"]
    found = parse("predict", "--config", CONFIGS / "shift.yaml", *more).callbacks
    assert (list(found)[-1], found["extra"].init_args.variant, found["places"]) == ("extra", "destination", None)


def test_a_misspelled_name_is_told(write: Callable[..., Path]) -> None:
    file = f"--config={CONFIGS / 'steer_vqa.yaml'}"
    told = r"callbacks\.answer: there is no callback of that name, only steer, answers; give it a class"
    with pytest.raises(ValueError, match=told):
        merge_configs([file, "--callbacks.answer.init_args.baseline=x"])
    with pytest.raises(ValueError, match=told):
        merge_configs([file, f"--config={write('later', {'callbacks': {'answer': {'init_args': {'baseline': 'x'}}}})}"])
    for flags in (["--callbacks.answer=VQAScorer"], ["--callbacks.answer.class_path", "VQAScorer"], []):
        merge_configs([file, *flags, *(["--callbacks.answer.baseline=x"] if flags else [])])


def test_lists_of_old_still_parse(parse: Parse, write: Callable[..., Path]) -> None:
    old = {"trainer": {"callbacks": [{"class_path": "CaptionScorer"}]}}
    more = {"trainer": {"callbacks+": [{"class_path": "VQAScorer"}]}}
    given = ["--config", write("old", old), "--config", write("more", more), "--trainer.callbacks.baseline=b.json"]
    found = parse("validate", "--config", CONFIGS / "caption.yaml", *given)
    names = [one.class_path.rpartition(".")[2] for one in found.trainer.callbacks]
    assert names == ["CaptionScorer", "VQAScorer"]
    assert found.trainer.callbacks[1].init_args.baseline == "b.json"
    assert list(found.callbacks) == ["captions"]


# --- what is merged, and how --------------------------------------------------------------------------------


def test_structures_are_merged_and_dictionaries_and_lists_replaced(parse: Parse, write: Callable[..., Path]) -> None:
    later = write("later", {"model": {"init_args": {"lora": {"alpha": 4}}}})
    lora = parse("fit", "--config", CONFIGS / "finetune.yaml", "--config", later).model.init_args.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 4, 0.05)
    later = write("later", {"model": {"init_args": {"vectors": {"mine": "x"}, "alphas": [9.0]}}})
    model = parse("predict", "--config", CONFIGS / "sweep_vqa.yaml", "--config", later).model.init_args
    assert (model.vectors, model.alphas) == ({"mine": "x"}, [9.0])


def test_flags_win_wherever_they_stand(parse: Parse) -> None:
    for given in (
        ["--out=mine", "--config", CONFIGS / "caption.yaml"],
        ["--config", CONFIGS / "caption.yaml", "--out=mine"],
    ):
        assert parse("validate", *given).out == "mine"


def test_home_is_home(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    content = {
        "out": "~/results",
        "a": ["~/b", "~", "a~b", "~c"],
        "callbacks": {"x": {"init_args": {"dirpath": "~/d"}}},
    }
    assert read_config(str(write("home", content))) == {
        "out": "/home/me/results", "a": ["/home/me/b", "/home/me", "a~b", "~c"],
        "callbacks": {"x": {"init_args": {"dirpath": "/home/me/d"}}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: [1", "malformed YAML"),
        ("- a", "expected keys such as `model:` and `data:`, got list"),
        ("callbacks:\n  x: {a: 1}\n  y: 2\n  x: {b: 1}\n", "line 4: `x` stands already in line 2"),
    ],
)
def test_a_bad_file_is_told_by_its_name(write: Callable[..., Path], content: str, told: str) -> None:
    path = write("bad", content)
    with pytest.raises(ValueError, match=r"--config .*bad\.yaml") as error:
        read_config(str(path))
    assert told in str(error.value)
    with pytest.raises(ValueError, match=r"--config nowhere\.yaml: cannot be read"):
        read_config("nowhere.yaml")
