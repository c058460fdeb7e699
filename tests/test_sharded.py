"""Two real processes with a sharded model: the states, answers and weights of one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import FeatureExtraction, VisionLanguageModel
from lightning.pytorch.strategies import FSDPStrategy
from peft import LoraConfig
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

Run = Callable[..., Any]
ROOT = Path(__file__).resolve().parent.parent
SHARDED = (f"--config={ROOT}/configs/fsdp.yaml", "--trainer.accelerator=cpu")


def conceptshift(folder: Path, *arguments: object) -> str:
    """Run the installed command, which starts the second process itself; returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PL_")}
    program = shutil.which("conceptshift", path=str(Path(sys.executable).parent))
    assert program is not None
    done = subprocess.run(
        [program, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr, "it ran as one process"
    return done.stdout


def stores(folder: Path) -> dict[str, Any]:
    """Samples and states of a store."""
    store = FeatureStore(folder)
    found: dict[str, Any] = {variant: store.samples(variant) for variant in store.metadata["variants"]}
    for site in store.metadata["sites"]:
        for selector in store.metadata["selectors"]:
            for variant in store.metadata["variants"]:
                found[f"{site} {selector} {variant}"] = store.states(site, selector, variant)
    return found


@pytest.mark.parametrize(
    ("answers", "sites", "selectors"),
    [("generated", "'lm.block.*','lm.norm'", "answer,image"), ("target", "'vision.block.0','lm.block.0'", "image")],
)
def test_sharded_extraction_writes_the_store_of_one_process(
    cli: Run, tiny: Path, shapes: Path, make_adapter: Run, tmp_path: Path, answers: str, sites: str, selectors: str
) -> None:
    """Of five single batches the first process has three and the second two, one of them without a readable picture."""
    root = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    (root / "train2014" / "COCO_train2014_000000000004.jpg").unlink()
    adapter = make_adapter(tiny, tmp_path / "adapter", scale=0.2)
    arguments = [
        "predict", "--trainer.enable_progress_bar=false", "--model=FeatureExtraction", f"--model.model_id={tiny}",
        f"--model.destination={adapter}", f"--model.sites=[{sites}]",
        f"--model.selectors=[{selectors}]", "--model.max_new_tokens=6", f"--model.answers={answers}",
        "--data=CaptionDataModule", f"--data.root={root}", "--data.predict_split=train", "--data.batch_size=1",
        "--data.limit=5", "--data.skip_bad_images=true",
    ]  # fmt: skip
    if answers == "generated":
        # It waits for the other process as soon as its own has no batch left.
        arguments += ["--trainer.callbacks+=CaptionScorer", "--trainer.callbacks.out=scores.json"]
    writer = "--trainer.callbacks+=FeatureWriter"
    conceptshift(tmp_path, *arguments, writer, "--trainer.callbacks.folder=two", *SHARDED)
    assert cli(*arguments, writer, "--trainer.callbacks.folder=one", "--trainer.accelerator=cpu").status == 0
    assert len(list((tmp_path / "two").glob("rank-*"))) == 2
    two, one = stores(tmp_path / "two"), stores(tmp_path / "one")
    assert two.keys() == one.keys()
    assert len(one["original"]) == 4
    for name, wanted in one.items():
        if name in ("original", "destination"):
            assert two[name] == wanted
        else:
            assert two[name][0] == wanted[0]
            torch.testing.assert_close(two[name][1], wanted[1], rtol=1e-4, atol=1e-4)
    metadata = [FeatureStore(tmp_path / name).metadata for name in ("two", "one")]
    assert metadata[0]["weights_hash"] == metadata[1]["weights_hash"]
    assert metadata[0]["checkpoint_hashes"] == metadata[1]["checkpoint_hashes"]


@pytest.mark.parametrize(
    "trained", [("--model.lora.rank=4", "--model.lora.dropout=0"), ('--model.freeze=["*.post_layernorm"]',)]
)
def test_sharded_training_learns_what_one_process_learns(
    cli: Run, tiny: Path, shapes: Path, tmp_path: Path, trained: tuple[str, ...]
) -> None:
    """Two processes with batches of one are one process that adds up two batches. A validation comes first."""
    arguments = [
        "fit", "--trainer.enable_progress_bar=false", "--trainer.max_steps=3", "--trainer.limit_val_batches=1",
        "--trainer.gradient_clip_val=0.5", "--model=FineTuning", f"--model.model_id={tiny}",
        "--model.max_new_tokens=4", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.01", *trained,
        "--data=CaptionDataModule", f"--data.root={shapes}", "--data.batch_size=1",
        "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=3",
        "--trainer.callbacks.filename=last",
    ]  # fmt: skip
    conceptshift(tmp_path, *arguments, "--trainer.callbacks.dirpath=two", *SHARDED)
    alone = ("--trainer.accelerator=cpu", "--trainer.accumulate_grad_batches=2")
    assert cli(*arguments, "--trainer.callbacks.dirpath=one", *alone).status == 0
    two, one = (torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("two", "one"))
    assert two.keys() == one.keys()
    base = {f"_backbone.{name}": value for name, value in VisionLanguageModel.load(str(tiny)).state_dict().items()}
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
        assert "lora_A" in name or not torch.equal(value, base.get(name, torch.zeros_like(value))), name


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("lora", [True, False])
def test_a_sharded_model_is_saved_whole(alone: DeviceMesh, tiny: Path, tmp_path: Path, lora: bool) -> None:
    whole = VisionLanguageModel.load(str(tiny))
    if lora:
        torch.manual_seed(0)
        whole.add_lora(LoraConfig(r=2, task_type="CAUSAL_LM"))
    whole.save(tmp_path / "whole")
    hashes = whole.weights_hash(), whole.destination_hash("default")
    whole.shard(alone, trained=True)
    assert any(isinstance(one, DTensor) for one in whole.parameters())
    assert (whole.weights_hash(), whole.destination_hash("default")) == hashes
    whole.save(tmp_path / "gathered", whole.gathered_state())
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("gathered", "whole")]
    assert names[0] == names[1]
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    found, wanted = (load_file(tmp_path / folder / name) for folder in ("gathered", "whole"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_what_is_not_trained_outside_the_blocks_stays_whole(alone: DeviceMesh, tiny: Path) -> None:
    for trained in (True, False):
        backbone = VisionLanguageModel.load(str(tiny))
        backbone.shard(alone, trained)
        assert isinstance(backbone.structure.head.weight, DTensor) == trained
        assert all(isinstance(one, DTensor) for one in backbone.structure.blocks.parameters())


def test_a_whole_destination_is_not_sharded(alone: DeviceMesh, tiny: Path) -> None:
    backbone = VisionLanguageModel.load(str(tiny))
    backbone.add_destination(str(tiny))
    with pytest.raises(ValueError, match="is a whole model, which cannot be exchanged in pieces"):
        backbone.shard(alone, trained=False)


def test_what_cannot_be_sharded(tiny: Path) -> None:
    module = FeatureExtraction(str(tiny), ["lm.block.0"], ["answer"], quantization="8bit")
    trainer = SimpleNamespace(world_size=2, strategy=object.__new__(FSDPStrategy))
    module._trainer = trainer  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"--trainer\.strategy fsdp is not supported, its successor is: --config"):
        module.configure_model()
    trainer.strategy = None
    for processes, error in ((2, "tensor_parallel_size must be 1"), (1, "packed weights cannot be sharded")):
        mesh = SimpleNamespace(size=lambda processes=processes: processes)
        module._device_mesh = {"tensor_parallel": mesh}  # type: ignore[assignment]
        with pytest.raises(ValueError, match=error):
            module.configure_model()
