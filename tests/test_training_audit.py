"""The audit of fine-tuning: what it counts, and which runs it stops."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conceptshift.callbacks import TrainingAudit, training_audit
from conceptshift.callbacks.training_audit import audit, audit_table, freeze_patterns
from conceptshift.datamodules import CaptionDataModule
from conceptshift.lightning_modules import FeatureExtraction, FineTuning, VisionLanguageModel
from conceptshift.lightning_modules.backbone.parts import PARTS
from lightning.pytorch.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Run = Callable[..., Any]
LORA = ("--model.lora.rank=2", "--model.lora.dropout=0")
AUDIT = ("--trainer.enable_checkpointing=false", "--trainer.callbacks+=TrainingAudit")


@pytest.fixture(scope="session")
def early(make_model: Callable[..., Path]) -> Path:
    """A model that, like LLaVA-1.5, reads its vision tower before the last block."""
    folder = make_model(vision_layers=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_feature_layer": -2}))
    return folder


def audited(fit: Run, *more: object, steps: int = 3) -> Any:
    return fit("--data.batch_size=2", "--data.limit=8", *AUDIT, *more, steps=steps)


# --- what is shown --------------------------------------------------------------------------------------


def test_the_table_counts_what_is_adapted(fit: Run, tmp_path: Path, tiny: Path) -> None:
    done = audited(
        fit, *LORA, "--model.parts=[projector,language_model]", f"--trainer.callbacks.out={tmp_path / 'audit.json'}",
        "--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.name=",
        "--trainer.logger.version=logs",
    )  # fmt: skip
    assert done.status == 0, done.err
    model = VisionLanguageModel.load(str(tiny)).model
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    # An adapter of rank 2 has 2 × (inputs + outputs) parameters.
    added = {
        "vision_tower": 0,
        "projector": sum(2 * sum(m.weight.shape) for name, m in linears.items() if "projector" in name),
        "language_model": sum(2 * sum(m.weight.shape) for name, m in linears.items() if "language_model" in name),
    }
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        named = {"multi_modal_projector": "projector", "vision_tower": "vision_tower"}
        part = named.get(name.split(".")[1], "language_model")
        sizes[part] += parameter.numel()  # type: ignore[index]
    written = json.loads((tmp_path / "audit.json").read_text())
    assert {part: row["trainable"] for part, row in written.items()} == added
    assert {part: row["parameters"] for part, row in written.items()} == {
        part: sizes[part] + added[part] for part in PARTS
    }
    assert written["vision_tower"]["modules"] == {}
    assert written["projector"]["modules"] == {"linear_1": 1, "linear_2": 1}
    assert written["language_model"]["modules"]["down_proj"] == 3
    share = sum(added.values()) / (sum(added.values()) + sum(sizes.values()))
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert "adapted modules" in lines["part"]
    assert lines["all"].endswith(f"{share:.2%}")
    assert "linear_1 × 1, linear_2 × 1" in lines["projector"]
    # TensorBoard shows the same text.
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    (text,) = events.Tensors("training_audit/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert lines["projector"] in shown


def test_the_table_counts_what_is_trained(fit: Run) -> None:
    done = audited(fit, "--model.parts=[vision_tower]", "--model.freeze=['*.post_layernorm', '*.mlp']", steps=2)
    assert done.status == 0, done.err
    (line,) = (line for line in done.out.splitlines() if line.startswith("vision_tower"))
    assert "trained modules" in done.out
    assert "q_proj × 2" in line
    assert "fc1" not in line
    assert "post_layernorm" not in line


def test_modules_with_numbers_for_names_are_told_apart() -> None:
    model = _Numbered()
    rows = audit(model)
    assert rows["projector"].modules == {"merger.0": 1, "merger.2": 1}
    assert rows["vision_tower"].parameters == 0
    assert "vision_tower            0           0" in audit_table(rows, "modules")


class _Numbered(torch.nn.Module):
    """A language model behind a projector without names."""

    def __init__(self) -> None:
        super().__init__()
        self.merger = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.GELU(), torch.nn.Linear(3, 4))
        self.decoder = torch.nn.Linear(4, 4)

    def get_decoder(self) -> torch.nn.Module:
        return self.decoder

    get_input_embeddings = get_output_embeddings = get_decoder

    def get_encoder(self, modality: str) -> torch.nn.Module:
        return self


# --- what passes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [[part] for part in PARTS] + [list(PARTS)], ids=lambda parts: "+".join(parts))
def test_lora_passes_in_every_part(fit: Run, parts: list[str]) -> None:
    done = audited(fit, *LORA, f"--model.parts=[{','.join(parts)}]", steps=4)
    assert done.status == 0, done.err


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        # B is 0, and A without a gradient, until the first step with a learning rate above 0.
        (["--model.warmup=0"], 1),
        (["--model.warmup=0.9"], 2),
        (["--trainer.accumulate_grad_batches=4"], 1),
        (["--trainer.accumulate_grad_batches=4"], 2),
        (["--trainer.precision=bf16-mixed"], 3),
        (["--model.gradient_checkpointing=true"], 3),
    ],
)
def test_a_late_start_is_no_error(fit: Run, options: list[str], steps: int) -> None:
    done = audited(fit, *LORA, "--model.parts=[vision_tower,language_model]", *options, steps=steps)
    assert done.status == 0, done.err


# --- what is stopped ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ([], ["encoder.layers.2", "post_layernorm"]),
        ([*LORA, "--model.parts=[vision_tower]"], ["encoder.layers.2"]),
        ([*LORA, "--model.lora.target_modules=[fc1,q_proj]"], ["encoder.layers.2"]),
        (["--model.parts=[vision_tower]", "--model.freeze=['*.layers.2']"], ["post_layernorm"]),
    ],
)
def test_the_suggested_freeze_is_what_is_missing(fit: Run, early: Path, options: list[str], modules: list[str]) -> None:
    error = audited(fit, f"--model.model_id={early}", *options).error
    assert re.search(r"\d+ of \d+ trainable parameters get no gradient: those of model\.vision_tower\.", error)
    (flag,) = shlex.split(error[error.index("'--model.init_args.freeze") :])
    named = json.loads(flag.partition("=")[2])
    assert named[-len(modules) :] == [f"model.vision_tower.{module}" for module in modules]
    rest = [option for option in options if "freeze" not in option]
    done = audited(fit, f"--model.model_id={early}", *rest, flag)
    assert done.status == 0, done.err


class _Deaf(FineTuning):
    """Multiplies what reaches one parameter by 0."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        parameters = dict(self.backbone.model.named_parameters())
        parameters["model.multi_modal_projector.linear_1.bias"].register_hook(torch.zeros_like)


@pytest.mark.parametrize(("steps", "seen"), [(30, 11), (3, 3)])
def test_a_gradient_that_stays_zero(tiny: Path, shapes: Path, tmp_path: Path, steps: int, seen: int) -> None:
    batches: list[int] = []

    class Count(L.Callback):
        def on_before_zero_grad(self, trainer: L.Trainer, *arguments: Any) -> None:
            batches.append(trainer.global_step)

    module = _Deaf(str(tiny), parts=["projector"], warmup=0.0)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
        enable_checkpointing=False, limit_val_batches=0, callbacks=[TrainingAudit(), Count()],
    )  # fmt: skip
    with pytest.raises(ValueError, match="1 of 4 trainable parameters get a gradient of exactly zero") as caught:
        trainer.fit(module, CaptionDataModule(str(shapes), batch_size=2, limit=8))
    assert '--model.init_args.freeze=["model.multi_modal_projector.linear_1.bias"]' in str(caught.value)
    assert len(batches) == seen


def test_a_parameter_that_another_process_uses_is_used(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    """Each of two processes misses the other's; both miss one."""
    module = FineTuning(str(tiny), parts=["projector"])
    module.configure_model()
    names = [name for name, value in module.backbone.model.named_parameters() if value.requires_grad]
    trainer: Any = SimpleNamespace(strategy=None, is_global_zero=False, default_root_dir=os.getcwd())
    linear = names[2].split(".")[2]
    for missing_there, message in ((names[2:], f"1 of 4 .* no gradient: those of .*{linear};"), ([], None)):
        callback = TrainingAudit()
        callback.on_fit_start(trainer, module)
        for name, value in module.backbone.model.named_parameters():
            value.grad = torch.ones_like(value) if name == names[3] else None
        monkeypatch.setattr(training_audit, "gather", lambda rows, there=missing_there: [*rows, there])
        if message is None:
            callback.on_after_backward(trainer, module)
        else:
            with pytest.raises(ValueError, match=message):
                callback.on_after_backward(trainer, module)


def test_patterns_name_the_outermost_modules_of_which_nothing_is_used() -> None:
    trainable = ["tower.blocks.0.a.weight", "tower.blocks.1.a.weight", "tower.blocks.1.b.weight", "tower.norm.weight",
                 "tower.norm.bias", "head.weight"]  # fmt: skip
    assert freeze_patterns(trainable, trainable[1:3]) == ["tower.blocks.1"]
    assert freeze_patterns(trainable, trainable[:5]) == ["tower"]
    assert freeze_patterns(trainable, [trainable[4], trainable[1]]) == ["tower.blocks.1.a", "tower.norm.bias"]
    adapters = [f"blocks.{number}.q.lora_{side}.default.weight" for number in range(2) for side in "AB"]
    assert freeze_patterns(adapters, adapters[2:]) == ["blocks.1"]
    assert freeze_patterns(adapters, adapters[3:]) == ["blocks.1.q"]


# --- what is not audited --------------------------------------------------------------------------------


def test_sharded_parameters_are_not_judged(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = FineTuning(str(tiny))
    module.configure_model()
    callback, trainer = (
        TrainingAudit(),
        SimpleNamespace(strategy=FSDPStrategy(), is_global_zero=True, default_root_dir=os.getcwd()),
    )
    with pytest.warns(UserWarning, match="FSDPStrategy shards parameters") as caught:
        callback.on_fit_start(trainer, module)  # type: ignore[arg-type]
    callback.on_after_backward(trainer, module)  # type: ignore[arg-type]
    callback.on_train_end(trainer, module)  # type: ignore[arg-type]
    assert len(caught) == 1
    assert "trainable" not in capsys.readouterr().out


def test_another_module(tiny: Path) -> None:
    with pytest.raises(TypeError, match="TrainingAudit audits a FineTuning module, got FeatureExtraction"):
        TrainingAudit().on_fit_start(L.Trainer(logger=False), FeatureExtraction(str(tiny), ["lm.norm"], ["answer"]))
