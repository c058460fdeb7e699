"""Training: what is learned, what a checkpoint holds, and that an interruption changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conceptshift.datamodules import CaptionDataModule, MixtureDataModule, VQADataModule, read_image
from conceptshift.datamodules.sample import Batch, Sample
from conceptshift.lightning_modules import FineTuning, LoraOptions, VisionLanguageModel
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

Run = Callable[..., Any]
ADAMW = "--model.optimizer=torch.optim.AdamW"
LORA = ("--model.lora.rank=4", "--model.lora.dropout=0", ADAMW, "--model.optimizer.lr=0.01")


def training(
    model: Path,
    data: L.LightningDataModule,
    folder: Path,
    *callbacks: Callback,
    lora: LoraOptions | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> FineTuning:
    """Train through a Trainer without the command line."""
    module = FineTuning(
        str(model), lora=lora, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01), warmup=0.2
    )
    defaults = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "limit_val_batches": 0,
        "enable_model_summary": False, "enable_checkpointing": bool(callbacks),
    }  # fmt: skip
    L.seed_everything(0)
    trainer = L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**defaults, **options})
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


def trained(module: FineTuning) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def batch_of(model: VisionLanguageModel, root: Path, count: int) -> Batch:
    data = CaptionDataModule(str(root), limit=count)
    data.setup("fit")
    samples: list[Sample] = data.samples("fit")
    images = [read_image(sample.image) for sample in samples]
    return Batch(samples, model.encode(images, [s.prompt for s in samples], [s.target for s in samples]))


def test_the_loss_counts_answer_tokens_only(shared_backbone: VisionLanguageModel, shapes: Path) -> None:
    """Cross entropy by hand: of each answer token given everything before it."""
    model = shared_backbone
    batch = batch_of(model, shapes, 4)
    with torch.inference_mode():
        loss = model(batch.inputs).loss
        losses = []
        for row, sample in enumerate(batch.samples):
            prompt = model.encode([read_image(sample.image)], [sample.prompt])
            answer = model.tokenizer(f" {sample.target}</s>", add_special_tokens=False)["input_ids"]
            ids = torch.cat([prompt["input_ids"], torch.tensor([answer])], dim=1)
            logits = model.model(input_ids=ids, pixel_values=batch.inputs["pixel_values"][row : row + 1]).logits[0]
            predicted = logits[-len(answer) - 1 : -1].log_softmax(dim=1)
            losses += [-float(predicted[at, token]) for at, token in enumerate(answer)]
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


class _Watch(Callback):
    """Whether modules are in training mode while batches are learned and validated."""

    def __init__(self) -> None:
        self.train: list[bool] = []
        self.validate: list[bool] = []
        self.ids: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.train.append(all(module.training for module in pl_module.backbone.modules()))
        self.ids += batch.sample_ids

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        self.validate.append(any(module.training for module in pl_module.backbone.modules()))


def test_dropout_is_on_in_training_and_off_in_validation(tiny: Path, shapes: Path, tmp_path: Path) -> None:
    data = CaptionDataModule(str(shapes), batch_size=2, limit=4)
    watch = _Watch()
    training(
        tiny, data, tmp_path, watch, lora=LoraOptions(rank=2, dropout=0.5), max_epochs=2, limit_val_batches=1,
        val_check_interval=1, enable_checkpointing=False,
    )  # fmt: skip
    assert watch.train == [True] * 4
    assert len(watch.validate) >= 3
    assert not any(watch.validate)


def test_dropout_changes_the_loss(tiny: Path, shapes: Path) -> None:
    module = FineTuning(str(tiny), lora=LoraOptions(rank=4, dropout=0.5))
    module.configure_model()
    batch = batch_of(module.backbone, shapes, 2)
    with torch.no_grad():
        for name, parameter in module.backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        module.eval()
        evaluated = [float(module.backbone(batch.inputs).loss) for _ in range(2)]
        module.on_fit_start()
        learned = [float(module.backbone(batch.inputs).loss) for _ in range(2)]
    assert evaluated[0] == evaluated[1]
    assert learned[0] != learned[1]


def test_training_learns(fit: Run, tmp_path: Path, tiny: Path, shapes: Path) -> None:
    more = ("--trainer.callbacks+=ModelExport", f"--trainer.callbacks.folder={tmp_path / 'model'}")
    optimizer = ("--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.003")
    assert fit(*more, *optimizer, "--trainer.enable_checkpointing=false", steps=12).status == 0
    losses = []
    for folder in (tiny, tmp_path / "model"):
        model = VisionLanguageModel.load(str(folder))
        with torch.inference_mode():
            losses.append(float(model(batch_of(model, shapes, 8).inputs).loss))
    assert losses[1] < 0.8 * losses[0]


# --- LoRA -----------------------------------------------------------------------------------------------


def test_only_the_adapter_is_trained_saved_and_exported(fit: Run, tmp_path: Path, tiny: Path, shapes: Path) -> None:
    done = fit(
        *LORA,
        "--trainer.callbacks+=ModelCheckpoint",
        f"--trainer.callbacks.dirpath={tmp_path / 'checkpoints'}",
        "--trainer.callbacks.save_last=true",
        "--trainer.callbacks+=ModelExport",
        f"--trainer.callbacks.folder={tmp_path / 'adapter'}",
    )
    assert done.status == 0, done.err
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    # Two matrices for each of the seven linear layers of each of the three blocks.
    assert len(saved) == 2 * 7 * 3
    assert all("lora_" in name for name in saved)
    assert (tmp_path / "checkpoints" / "last.ckpt").stat().st_size < (tiny / "model.safetensors").stat().st_size
    plain = AutoModelForImageTextToText.from_pretrained(tiny)
    reference = {name: value.clone() for name, value in plain.state_dict().items()}
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    exported = {name.replace(".default", ""): value for name, value in loaded.state_dict().items() if "lora_" in name}
    assert len(exported) == len(saved)
    for name, value in saved.items():
        (match,) = [key for key in exported if key.endswith(name.split("language_model.")[1].replace(".default", ""))]
        assert torch.equal(exported[match], value)
    ours = VisionLanguageModel.load(str(tiny), adapter=str(tmp_path / "adapter"))
    inputs = batch_of(ours, shapes, 3).inputs
    with torch.inference_mode():
        theirs = loaded(**inputs).logits
        logits = ours(inputs).logits
        with ours.running_as("original"):
            without = ours(inputs).logits
    assert torch.equal(logits, theirs)
    assert not torch.equal(without, logits)
    untouched = AutoModelForImageTextToText.from_pretrained(tiny)
    assert all(torch.equal(value, reference[name]) for name, value in untouched.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(untouched(**inputs).logits, without)


def test_a_merged_adapter_equals_the_unmerged(tiny: Path, shapes: Path, tmp_path: Path) -> None:
    module = training(tiny, CaptionDataModule(str(shapes), batch_size=4), tmp_path, lora=LoraOptions(4), max_steps=2)
    module.backbone.eval()
    module.backbone.save(tmp_path / "adapter")
    inputs = batch_of(module.backbone, shapes, 3).inputs
    plain = AutoModelForImageTextToText.from_pretrained(tiny)
    merged = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).merge_and_unload()
    with torch.inference_mode():
        torch.testing.assert_close(merged(**inputs).logits, module.backbone(inputs).logits, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_another_configuration_is_refused(fit: Run, tmp_path: Path) -> None:
    more = ("--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path}",
            "--trainer.callbacks.filename=it")  # fmt: skip
    assert fit(*LORA, *more, steps=1).status == 0
    error = fit(*more, f"--ckpt_path={tmp_path / 'it.ckpt'}").error
    assert "--ckpt_path: 42 parameters for the " in error
    assert "LoRA options of the run that wrote it" in error
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "it.ckpt").read_bytes()[:5000])
    assert "cut.ckpt" in fit(*LORA, f"--ckpt_path={tmp_path / 'cut.ckpt'}").error
    assert "gone.ckpt" in fit(*LORA, f"--ckpt_path={tmp_path / 'gone.ckpt'}").error


def test_a_frozen_adapter_cannot_be_trained(fit: Run, tmp_path: Path, tiny: Path) -> None:
    from peft import LoraConfig

    model = VisionLanguageModel.load(str(tiny))
    model.add_lora(LoraConfig(r=2, task_type="CAUSAL_LM"))
    model.save(tmp_path / "adapter")
    error = fit(f"--model.adapter={tmp_path / 'adapter'}").error
    assert "adapter" in error
    error = fit(f"--model.adapter={tmp_path / 'adapter'}", "--model.lora.rank=2").error
    assert "not both" in error


def test_lora_layers_that_do_not_exist(fit: Run) -> None:
    assert "nothing_here" in fit("--model.lora.target_modules=[nothing_here]").error


def test_every_trained_parameter_gets_a_gradient(tiny: Path, shapes: Path) -> None:
    """Distributed training stops at a parameter without one."""
    module = FineTuning(str(tiny), lora=LoraOptions(rank=2))
    module.configure_model()
    module.backbone(batch_of(module.backbone, shapes, 2).inputs).loss.backward()
    without = [name for name, value in module.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []


# --- parts ----------------------------------------------------------------------------------------------


def test_a_part_is_trained_saved_and_resumed(fit: Run, tmp_path: Path, tiny: Path) -> None:
    part = ("--model.parts=[projector]", "--model.freeze=['*.linear_2']", "--model.optimizer=torch.optim.AdamW",
            "--model.optimizer.lr=0.01")  # fmt: skip
    more = ("--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path}",
            "--trainer.callbacks.save_last=true", "--trainer.callbacks+=ModelExport",
            f"--trainer.callbacks.folder={tmp_path / 'model'}")  # fmt: skip
    assert fit(*part, *more).status == 0
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split("_backbone.model.")[1] for name in saved} == {
        "model.multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_1.bias",
    }
    folders = (tiny, tmp_path / "model")
    before, after = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in folders)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name.split("_backbone.model.")[1] for name in saved}
    resumed = fit(*part, *more, f"--ckpt_path={tmp_path / 'last.ckpt'}", steps=3)
    assert resumed.status == 0, resumed.err
    error = fit("--model.parts=[projector]", *more, f"--ckpt_path={tmp_path / 'last.ckpt'}", steps=3).error
    assert "--ckpt_path: 2 parameters for the 4 that this configuration trains" in error
    assert "linear_2" in error


def test_an_adapter_of_every_part_is_exported_and_loaded(fit: Run, tmp_path: Path, tiny: Path, shapes: Path) -> None:
    done = fit(
        *LORA, "--model.parts=[vision_tower,projector,language_model]", "--trainer.enable_checkpointing=false",
        "--trainer.callbacks+=ModelExport", f"--trainer.callbacks.folder={tmp_path / 'adapter'}",
    )  # fmt: skip
    assert done.status == 0, done.err
    model = VisionLanguageModel.load(str(tiny), adapter=str(tmp_path / "adapter"))
    inputs = batch_of(model, shapes, 2).inputs
    tower = model.sites(["vision.block.1"])
    adapted = model.read(inputs, tower).states["vision.block.1"]
    with model.running_as("original"):
        original = model.read(inputs, tower).states["vision.block.1"]
    assert not torch.equal(torch.cat(list(adapted)), torch.cat(list(original)))


# --- resuming -------------------------------------------------------------------------------------------


class _Stop(Callback):
    """Ends the process's work behind a batch, as a scheduler does."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            raise ZeroDivisionError


@pytest.mark.parametrize(
    ("stop", "workers", "accumulate", "lora", "every"),
    [
        # Six batches an epoch: in the middle of the first, at its end, in the middle of the second.
        (3, 0, 1, True, 1),
        (6, 0, 1, True, 1),
        (8, 0, 1, True, 1),
        (8, 1, 1, True, 1),
        (6, 1, 1, True, 1),
        (4, 0, 2, True, 1),
        (8, 0, 2, False, 1),
        # Saved two batches before the stop.
        (5, 0, 1, False, 3),
    ],
)
def test_an_interrupted_fit_ends_where_an_uninterrupted_one_does(
    tiny: Path, shapes: Path, tmp_path: Path, stop: int, workers: int, accumulate: int, lora: bool, every: int
) -> None:
    def data() -> CaptionDataModule:
        return CaptionDataModule(str(shapes), batch_size=3, limit=17, num_workers=workers, seed=7)

    options: dict[str, Any] = {
        "lora": LoraOptions(rank=4, dropout=0) if lora else None,
        "max_steps": 12 // accumulate,
        "accumulate_grad_batches": accumulate,
    }

    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=every)

    whole = _Watch()
    expected = trained(training(tiny, data(), tmp_path, whole, **options, enable_checkpointing=False))
    # The checkpoint is written first, so that it knows of the batch behind which the run stops.
    with pytest.raises(ZeroDivisionError):
        training(tiny, data(), tmp_path, checkpoint(), _Stop(stop), **options)
    rest = _Watch()
    resumed = training(tiny, data(), tmp_path, rest, checkpoint(), ckpt_path=tmp_path / "last.ckpt", **options)
    assert rest.ids == whole.ids[-len(rest.ids) :]
    assert 0 < len(rest.ids) < len(whole.ids)
    found = trained(resumed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_every_sample_is_learned_once_an_epoch_in_a_new_order(tiny: Path, shapes: Path, tmp_path: Path) -> None:
    orders = []
    for seed in (0, 0, 1):
        watch = _Watch()
        data = CaptionDataModule(str(shapes), batch_size=4, limit=10, seed=seed)
        training(tiny, data, tmp_path, watch, max_epochs=2, enable_checkpointing=False, lora=LoraOptions(2))
        first, second = watch.ids[:10], watch.ids[10:]
        assert sorted(first) == sorted(second)
        assert len(set(first)) == 10
        assert first != second
        orders.append(watch.ids)
    assert orders[0] == orders[1] != orders[2]


# --- options --------------------------------------------------------------------------------------------


def test_accumulated_gradients_equal_a_larger_batch(tiny: Path, shapes: Path, tmp_path: Path) -> None:
    """The mean over two batches of equally many answer tokens is the mean over both."""
    weights = []
    for size, accumulate in ((4, 1), (2, 2)):
        data = CaptionDataModule(str(shapes), batch_size=size, limit=4, caption_words=["shape", "shapes"])
        module = training(
            tiny, data, tmp_path, lora=LoraOptions(4, dropout=0), max_steps=1, accumulate_grad_batches=accumulate
        )
        weights.append(trained(module))
    assert weights[0].keys() == weights[1].keys()
    moved = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    assert moved < 0.02


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.precision=bf16-mixed"],
        ["--trainer.precision=bf16-true"],
        ["--trainer.precision=bf16-mixed", *LORA],
        ["--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=1.0"],
        ["--model.gradient_checkpointing=true"],
        ["--model.gradient_checkpointing=true", *LORA],
        ["--model.random_weights=true"],
        ["--trainer.limit_val_batches=1"],
    ],
)
def test_options_run(fit: Run, options: list[str], tmp_path: Path) -> None:
    more = ("--trainer.callbacks+=ModelExport", f"--trainer.callbacks.folder={tmp_path / 'model'}")
    done = fit(*more, *options, "--trainer.enable_checkpointing=false")
    assert done.status == 0, done.err
    assert any((tmp_path / "model").iterdir())


def test_gradient_checkpointing_changes_no_gradient(tiny: Path, shapes: Path, tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        module = FineTuning(str(tiny), lora=LoraOptions(4, dropout=0), gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        module.configure_model()
        module.on_fit_start()
        module.backbone(batch_of(module.backbone, shapes, 2).inputs).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_captions_and_questions_together(tiny: Path, shapes: Path, tmp_path: Path) -> None:
    parts = [CaptionDataModule(str(shapes), limit=3), VQADataModule(str(shapes), limit=3)]
    watch = _Watch()
    training(tiny, MixtureDataModule(parts, batch_size=2), tmp_path, watch, max_epochs=1, enable_checkpointing=False)
    assert sorted(identity.split("/")[0] for identity in watch.ids) == ["0"] * 3 + ["1"] * 3


def test_a_batch_without_a_readable_picture(fit: Run, tmp_path: Path, shapes: Path) -> None:
    import shutil

    shutil.copytree(shapes, tmp_path / "shapes")
    for path in (tmp_path / "shapes" / "train2014").glob("*.jpg"):
        path.write_bytes(b"")
    error = fit("--data.skip_bad_images=true", root=tmp_path / "shapes").error
    assert "no readable picture in a whole training batch" in error
    assert "COCO_train2014" in error
