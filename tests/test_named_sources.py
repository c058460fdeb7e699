"""Names of models and adapters: folders that are not there are told at once, embedded models are never a hub's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import FeatureExtraction, VisionLanguageModel
from conceptshift.lightning_modules.backbone.identity import model_hashes
from conceptshift.records.paths import located

Run = Callable[..., Any]
EMBEDDED = Path(__file__).parents[1] / "checkpoints" / "shapes-llava"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks a hub fails the test."""

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("a hub was asked")

    for name in ("transformers.utils.hub.hf_hub_download", "huggingface_hub.file_download.hf_hub_download"):
        monkeypatch.setattr(name, fail)


@pytest.mark.parametrize(
    "name",
    ["runs/a/model", "./model", "../model", "/nowhere/model", "~/nowhere", "model", "checkpoints/shapes-lava",
     "data/model", "here/model", "a/b/", "a\\b", "", "embedded", "a/b c"],
)  # fmt: skip
@pytest.mark.parametrize("option", ["model_id", "destination"])
def test_what_is_no_hub_id_is_told_at_once(
    name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predict: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(
        ValueError, match=r"^--it .*: no such folder.*; give a folder, owner/name on the hub, or embedded:"
    ):
        located(name, "--it")
    if option == "model_id":
        with pytest.raises(ValueError, match="no such folder"):
            VisionLanguageModel.load(name)
    elif option == "destination" and name:
        with pytest.raises(ValueError, match=r"--model\.init_args\.destination .*: no such folder"):
            FeatureExtraction("owner/model", ["lm.block.1"], ["answer"], destination=name)


def test_a_hub_id_is_left_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert located("llava-hf/llava-1.5-7b-hf", "") == "llava-hf/llava-1.5-7b-hf"
    (tmp_path / "llava-hf" / "llava-1.5-7b-hf").mkdir(parents=True)
    assert located("llava-hf/llava-1.5-7b-hf", "") == "llava-hf/llava-1.5-7b-hf", "the folder"
    with pytest.raises(ValueError, match=r"is 'llava-hf/llava-1\.5-7b-hf' meant\?"):
        located("llava-hf/llava-1.5-7b-fh", "")


def test_a_misspelt_model_is_told_before_the_data_are_read(cli: Run, tmp_path: Path) -> None:
    error = cli(
        "predict", "--model=FeatureExtraction", "--model.model_id=checkpoints/shapes-lava", "--model.sites=['lm.norm']",
        "--model.selectors=['answer']", "--data=CaptionDataModule", f"--data.root={tmp_path / 'none'}",
        "--trainer.accelerator=cpu",
    ).error  # fmt: skip
    assert "--model.init_args.model_id 'checkpoints/shapes-lava': no such folder" in error


def test_the_embedded_model_is_found_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predict: Run, cli: Run
) -> None:
    """Without a folder `checkpoints`, and beside a folder that has its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded:shapes-llava").mkdir()
    assert located("embedded:shapes-llava", "") == str(EMBEDDED)
    assert model_hashes("embedded:shapes-llava", None) == model_hashes(str(EMBEDDED), None) != {}
    done = predict(tmp_path / "store", "--data.limit=2", model="embedded:shapes-llava", site="lm.block.1")
    assert done.status == 0, done.err
    metadata = FeatureStore(tmp_path / "store").metadata
    assert metadata["model_id"] == "embedded:shapes-llava"
    assert metadata["weights_hash"] == model_hashes(str(EMBEDDED), None)["weights_hash"]
    assert "lm.block.5" in cli("sites", "--model", "embedded:shapes-llava").out
    error = cli("sites", "--model", "embedded:shapes-lava").error
    assert "'embedded:shapes-lava': no such model comes along; there is embedded:shapes-llava" in error
