"""ModelExport: what is replaced, what is kept, what is refused, and which steps a series has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from conceptshift.callbacks import ModelExport
from conceptshift.lightning_modules import FineTuning, VisionLanguageModel
from conceptshift.lightning_modules.backbone.destinations import check_checkpoint, is_adapter, name_destinations
from lightning.pytorch.strategies import DeepSpeedStrategy

Run = Callable[..., Any]
LORA = ("--model.lora.rank=2",)
NO_CHECKPOINT = "--trainer.enable_checkpointing=false"


def export(folder: Path, *more: str) -> tuple[str, ...]:
    return (NO_CHECKPOINT, "--trainer.callbacks+=ModelExport", f"--trainer.callbacks.folder={folder}", *more)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what is replaced -------------------------------------------------------------------------------------


def test_a_model_replaces_an_adapter_and_an_adapter_a_model(fit: Run, tmp_path: Path) -> None:
    """Else the stale one of the two would be loaded afterwards."""
    folder = tmp_path / "export"
    for train, adapted in ((LORA, True), ((), False), (LORA, True)):
        done = fit(*train, *export(folder))
        assert done.status == 0, done.err
        check_checkpoint(str(folder))
        assert is_adapter(str(folder)) is adapted
        assert (folder / "config.json").exists() is not adapted
        assert not [name for name in names(tmp_path) if "export" in name and name != "export"]


def test_a_link_stays(fit: Run, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "export").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert fit(*LORA, *export(tmp_path / "export")).status == 0
    assert (tmp_path / "export").is_symlink()
    check_checkpoint(str(tmp_path / "disk"))


def test_an_export_that_fails_leaves_the_earlier_one(fit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "export"
    assert fit(*LORA, *export(folder)).status == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def save_half(self: VisionLanguageModel, folder: Path, *more: object) -> None:
        (folder / "adapter_config.json").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(VisionLanguageModel, "save", save_half)
    assert "disk full" in fit(*LORA, *export(folder)).error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert ".export.part" not in names(tmp_path)


# --- what is kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [(), ("--trainer.callbacks.every_n_steps=1",)], ids=["once", "series"])
def test_a_folder_with_anything_else_is_refused_before_training(
    fit: Run, tmp_path: Path, every: tuple[str, ...]
) -> None:
    folder = tmp_path / "export"
    assert fit(*LORA, *export(folder, *every)).status == 0
    (exported,) = {path.parent for path in folder.rglob("adapter_config.json") if "2" in path.parent.name or not every}
    (exported / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    error = fit(*LORA, *export(folder, *every)).error
    assert f"{exported}: ModelExport would replace it, but notes.txt is no part of an export" in error
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_text_alone_is_no_export(fit: Run, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "README.md").write_text("mine")
    assert "README.md is no part of an export" in fit(*LORA, *export(tmp_path / "export")).error


def test_what_comes_while_it_trains_is_kept(fit: Run, tmp_path: Path) -> None:
    """Such as the checkpoints of a run that exports to its own folder."""
    folder = tmp_path / "run"
    with pytest.warns(UserWarning, match="c.ckpt has come into .*run; the export is in .*run-.* instead"):
        done = fit(
            *LORA, "--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={folder}",
            "--trainer.callbacks.filename=c", "--trainer.callbacks+=ModelExport",
            f"--trainer.callbacks.folder={folder}",
        )  # fmt: skip
    assert done.status == 0, done.err
    assert names(folder) == {"c.ckpt"}
    (beside,) = (path for path in tmp_path.iterdir() if path.name.startswith("run-"))
    check_checkpoint(str(beside))


# --- series -----------------------------------------------------------------------------------------------


def test_accumulated_gradients_make_no_step_0(fit: Run, tmp_path: Path) -> None:
    series = tmp_path / "series"
    options = ("--trainer.callbacks.every_n_steps=2", "--trainer.accumulate_grad_batches=2")
    assert fit(*LORA, *export(series, *options), steps=5).status == 0
    assert names(series) == {"step-000002", "step-000004", "step-000005"}
    assert list(name_destinations(str(series))) == ["step-000002", "step-000004", "step-000005"]


# --- what is refused --------------------------------------------------------------------------------------


def test_a_model_in_pieces_is_refused_before_training(tiny: Path, tmp_path: Path) -> None:
    """Of what process 0 alone has of it, no model could be made."""
    trainer: Any = SimpleNamespace(strategy=Mock(spec=DeepSpeedStrategy))
    callback, module = ModelExport(str(tmp_path / "export")), FineTuning(str(tiny))
    with pytest.raises(ValueError, match=r"a model that DeepSpeed has in pieces; use --trainer\.strategy ddp"):
        callback.setup(trainer, module, "fit")
    callback.setup(trainer, module, "validate")
