"""Fine-tunes a vision-language model, fully or by LoRA, and validates it by what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from peft import LoraConfig
from torch import Tensor
from transformers import get_scheduler

from ..datamodules.sample import Batch
from .backbone import VisionLanguageModel
from .backbone.loading import DeviceMap, Quantization
from .backbone.parts import PARTS, Part, lora_targets, train_only
from .base import BackboneModule

# Of a checkpoint: which model was trained.
_BASE = "base_model"


@dataclass
class LoraOptions:
    """A LoRA adapter.

    Attributes:
        rank: Rank of the update.
        alpha: Scale; the update is multiplied by alpha / rank.
        dropout: Dropout before the update.
        target_modules: Names or name endings of the layers to adapt, instead of all linear layers of `parts`.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: list[str] | None = None


class FineTuning(BackboneModule):
    """Learns answers: full fine-tuning, or LoRA where `lora` is given. The loss counts answer tokens only.

    `validate` and `test` generate greedily and hand the texts to the scoring callbacks. Checkpoints hold the
    trainable parameters only.

    Args:
        model_id: Folder in the Hugging Face layout, or hub id.
        revision: Commit or tag on the hub.
        adapter: PEFT adapter to attach, frozen, for `validate` and `test`.
        dtype: Precision of the weights: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        attention: Attention implementation: `sdpa`, `eager` or `flash_attention_2`.
        max_new_tokens: Tokens to generate at most in validation.
        lora: Train a LoRA adapter instead of the model's own weights.
        parts: What is adapted: `vision_tower` (the image encoder), `projector`, `language_model`. By default LoRA
            adapts the linear layers in the blocks of the language model, and full fine-tuning trains everything.
        freeze: Names or `*` wildcards of modules or parameters of these parts to leave as they are, such as blocks
            that the loss does not depend on: LLaVA-1.5 reads its vision tower before the last block.
        random_weights: Train from scratch: take only configuration and processor from `model_id`.
        optimizer: Optimizer of the trainable parameters.
        schedule: Learning-rate schedule, by its name in transformers (`cosine`, `linear`, `constant`, …).
        warmup: Share of all steps in which the learning rate rises from 0.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        quantization: Store the linear layers in `4bit` (NF4) or `8bit` (LLM.int8()); only `lora` can be trained then.
        device_map: `auto` lays the layers of the model on all GPUs of this machine, in one process.
        trust_remote_code: Run the Python that the model's repository ships, with all your rights: it can read, change
            and send whatever you can. Only for code that you have read, at the commit that `revision` names.
        allow_missing_weights: Take a model whose files lack tensors, which are random then.
    """

    strict_loading = False

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        adapter: str | None = None,
        dtype: str = "auto",
        attention: str = "sdpa",
        max_new_tokens: int = 25,
        lora: LoraOptions | None = None,
        parts: list[Part] | None = None,
        freeze: list[str] | None = None,
        random_weights: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: str = "cosine",
        warmup: float = 0.03,
        gradient_checkpointing: bool = False,
        quantization: Quantization | None = None,
        device_map: DeviceMap | None = None,
        trust_remote_code: bool = False,
        allow_missing_weights: bool = False,
    ) -> None:
        super().__init__(
            model_id,
            revision,
            adapter,
            dtype,
            attention,
            max_new_tokens,
            quantization,
            device_map,
            trust_remote_code,
            allow_missing_weights,
        )
        if lora is not None and adapter is not None:
            raise ValueError("give either --model.init_args.lora (train a new adapter) or .adapter (use one), not both")
        if parts is not None and (not parts or not set(parts) <= set(PARTS)):
            raise ValueError(f"--model.init_args.parts: expected some of {', '.join(PARTS)}, got {parts}")
        if parts is not None and lora is not None and lora.target_modules is not None:
            raise ValueError(
                "give either --model.init_args.parts or .lora.target_modules: both say which layers LoRA adapts"
            )
        if random_weights and (quantization is not None or device_map is not None):
            raise ValueError(
                "--model.init_args.random_weights trains from scratch: leave out .quantization and .device_map"
            )
        self.lora = lora
        self.parts = parts
        self.frozen = freeze or []  # `freeze` is a method of LightningModule
        self.random_weights = random_weights
        self.optimizer = optimizer
        self.schedule = schedule
        self.warmup = warmup
        self.gradient_checkpointing = gradient_checkpointing

    def setup(self, stage: str) -> None:
        """Refuse to train weights that are packed.

        Raises:
            ValueError: They are.
        """
        if stage == "fit" and self.quantization is not None and self.lora is None:
            raise ValueError(
                f"--model.init_args.quantization {self.quantization}: packed weights cannot be trained; train LoRA "
                "beside them with --model.init_args.lora.rank 16, or leave quantization out"
            )

    def load(self) -> VisionLanguageModel:
        """Load the model, and attach a new adapter or freeze what is not to be trained."""
        if self.random_weights:
            backbone = VisionLanguageModel.load(
                self.model_id,
                revision=self.revision,
                attention=self.attention,
                random_weights=True,
                trust_remote_code=self.trust_remote_code,
            )
        else:
            backbone = super().load()
        self.choose_trainable(backbone)
        return backbone

    def choose_trainable(self, backbone: VisionLanguageModel) -> None:
        """Attach a new adapter to a model, or freeze what of it is not to be trained."""
        if self.lora is None:
            train_only(backbone.model, self.parts, self.frozen)
            return
        parts: list[Part] = self.parts or ["language_model"]
        backbone.add_lora(
            LoraConfig(
                r=self.lora.rank,
                lora_alpha=self.lora.alpha,
                lora_dropout=self.lora.dropout,
                target_modules=lora_targets(backbone.model, parts, self.lora.target_modules, self.frozen),
                task_type="CAUSAL_LM",
            )
        )

    def configure_model(self) -> None:
        """Load the model and prepare it for training where the Trainer fits."""
        super().configure_model()
        if self.gradient_checkpointing:
            self.backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.backbone.model.enable_input_require_grads()

    def on_fit_start(self) -> None:
        """Switch to training mode: models arrive in evaluation mode, and Lightning keeps what it finds."""
        self.backbone.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss per answer token of one batch."""
        if not batch.samples:
            reasons = "; ".join(item.reason for item in batch.skipped)
            raise ValueError(f"no readable picture in a whole training batch: {reasons}")
        self.check_lengths(batch)
        loss: Tensor = self.backbone(batch.inputs).loss
        self.log("loss/train", loss, prog_bar=True, batch_size=len(batch.samples))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Generate for one batch: `texts`, and `losses` (sum, number of tokens) of the data's own answers."""
        return self.in_step(batch, self._answer, {"texts": [], "losses": []})

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """As in validation."""
        return self.validation_step(batch, batch_idx)

    def _answer(self, batch: Batch) -> dict[str, Any]:
        return {
            "texts": self.backbone.generate(batch.inputs, self.max_new_tokens).texts,
            "losses": self.backbone.answer_losses(batch.inputs),
        }

    def configure_optimizers(self) -> Any:
        """The optimizer over the trainable parameters, with its schedule stepped every batch."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trainable:
            raise ValueError(
                "nothing to train: an adapter given by --model.init_args.adapter is frozen (use .lora), and so is what "
                "--model.init_args.freeze matches"
            )
        optimizer = self.optimizer(trainable)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = get_scheduler(self.schedule, optimizer, round(self.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- checkpoints hold what is trained -----------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which model is trained: without it, the trainable parameters are good for nothing."""
        checkpoint[_BASE] = {"model_id": self.model_id, "weights_hash": self.backbone.weights_hash()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another model of the same shapes.

        Raises:
            ValueError: The checkpoint is of another one; names both.
        """
        base, own = checkpoint.get(_BASE), self.backbone.weights_hash()
        # A model without files has other weights as soon as it is trained.
        if base is not None and base["weights_hash"] != own and not (self.random_weights or self.allow_missing_weights):
            raise ValueError(
                f"--ckpt_path: of a training of {base['model_id']} (weights {base['weights_hash']}), not of "
                f"{self.model_id} (weights {own}); resume with the model of the run that wrote it"
            )

    def _trainable(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trainable parameters only; a checkpoint of a LoRA run is as small as its adapter."""
        trainable = self._trainable()
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name in trainable}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the trainable parameters.

        Raises:
            ValueError: The checkpoint's parameters are not exactly the trainable ones of this module.
        """
        expected, found = self._trainable(), set(state_dict)
        if expected != found:
            odd = sorted(expected ^ found)[0]
            raise ValueError(
                f"--ckpt_path: {len(found)} parameters for the {len(expected)} that this configuration trains (first "
                f"difference: {odd}); resume with the model, parts and LoRA options of the run that wrote it"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)
