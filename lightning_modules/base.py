"""What the modules that run a vision-language model share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from ..datamodules.sample import Batch, Sample
from ..records.paths import located, user_name
from .backbone import PromptEncoder, VisionLanguageModel
from .backbone.destinations import DESTINATION, ORIGINAL
from .backbone.identity import destination_hash, model_hashes
from .backbone.loading import DTYPES, DeviceMap, Quantization
from .backbone.prompts import IGNORED
from .backbone.readout import Readout

Output = TypeVar("Output")


class BackboneModule(L.LightningModule):
    """Loads the model once it is needed and gives the data module its encoder.

    Args:
        model_id: Folder in the Hugging Face layout, or hub id.
        revision: Commit or tag on the hub.
        adapter: PEFT adapter to attach: the destination of a pair original → destination.
        dtype: Precision of the weights: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        attention: Attention implementation: `sdpa`, `eager` or `flash_attention_2`.
        max_new_tokens: Tokens to generate at most.
        quantization: Store the linear layers in `4bit` (NF4) or `8bit` (LLM.int8()); they cannot be trained then, but
            LoRA beside them can.
        device_map: `auto` lays the layers of one copy of the model on all GPUs, and in main memory what is left.
        trust_remote_code: Run the Python that the model's repository ships, with all your rights: it can read, change
            and send whatever you can. Only for code that you have read, at the commit that `revision` names.
        allow_missing_weights: Take a model whose files lack tensors, which are random then.
    """

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        adapter: str | None = None,
        dtype: str = "auto",
        attention: str = "sdpa",
        max_new_tokens: int = 25,
        quantization: Quantization | None = None,
        device_map: DeviceMap | None = None,
        trust_remote_code: bool = False,
        allow_missing_weights: bool = False,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"--model.init_args.dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        if max_new_tokens < 1:
            raise ValueError(f"--model.init_args.max_new_tokens must be at least 1, got {max_new_tokens}")
        self.model_id = user_name(model_id)
        self.revision = revision
        self.adapter = None if adapter is None else user_name(adapter)
        self.dtype_name = dtype
        self.attention = attention
        self.max_new_tokens = max_new_tokens
        self.quantization = quantization
        self.device_map = device_map
        self.trust_remote_code = trust_remote_code
        self.allow_missing_weights = allow_missing_weights
        self._backbone: VisionLanguageModel | None = None
        self._most_batches = 0

    @property
    def backbone(self) -> VisionLanguageModel:
        """The model, from `configure_model` on."""
        if self._backbone is None:
            raise RuntimeError("the model is loaded by the Trainer; run the module through one")
        return self._backbone

    @property
    def encode(self) -> PromptEncoder:
        """Encodes batches for this model."""
        return self.backbone.encode

    @cached_property
    def readout(self) -> Readout:
        """How the original's states become words: one way for all variants, so that only concepts differ."""
        with self.backbone.running_as(ORIGINAL):
            return Readout.from_model(self.backbone)

    def check_places(self) -> None:
        """Make sure that what the arguments name can be there, before anything is read or asked of a hub.

        Raises:
            ValueError: A folder is missing.
        """
        located(self.model_id, "--model.init_args.model_id")
        if self.adapter is not None:
            located(self.adapter, "--model.init_args.adapter")

    def configure_model(self) -> None:
        """Load the model, on every process, once, and leave each with its pieces where the strategy shards.

        Raises:
            ValueError: The model cannot be placed as `device_map` and the Trainer's strategy say.
        """
        if self._backbone is None:
            self._check_placement()
            backbone = self.load()
            if backbone.processor.chat_template is None:
                rank_zero_info(f"{self.model_id} has no chat template: it is given prompts as they are")
            if self.device_mesh is not None:
                backbone.shard(self.device_mesh["data_parallel"], self.trainer.state.fn == "fit")
            self._backbone = backbone

    def _check_placement(self) -> None:
        if self._trainer is None:
            return
        if isinstance(self._trainer.strategy, FSDPStrategy):
            raise ValueError("--trainer.strategy fsdp is not supported, its successor is: --config configs/fsdp.yaml")
        if self.device_map is not None and self._trainer.world_size > 1:
            raise ValueError(
                "--model.init_args.device_map auto lays one model on all GPUs, so that there can be one process only: "
                "add --trainer.devices 1, or leave device_map out"
            )
        if self.device_mesh is not None and self.device_mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "--trainer.strategy.init_args.tensor_parallel_size must be 1, and .data_parallel_size the number of "
                "processes: models are sharded, not computed in parts"
            )
        if self.device_mesh is not None and self.quantization is not None:
            raise ValueError(
                "--model.init_args.quantization: packed weights cannot be sharded; use --trainer.strategy ddp, or "
                "leave quantization out"
            )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or convert the module; a model that `device_map` has laid out stays where it is."""
        return super()._apply(fn, recurse=recurse and self.device_map is None)  # type: ignore[no-untyped-call]

    def _root_device(self) -> torch.device | None:
        return None if self._trainer is None else self._trainer.strategy.root_device

    def check_lengths(self, batch: Batch) -> None:
        """Refuse what the model cannot read whole. Nothing is ever cut off: that could be visual tokens.

        Raises:
            ValueError: A sample is too long.
        """
        limit = self.context_length
        if limit is not None:
            kept = batch.inputs["attention_mask"].bool()
            prompts = kept.sum(dim=1) - batch.inputs["labels"].ne(IGNORED).sum(dim=1)
            apart = self.trainer.training or self.backbone.structure.is_encoder_decoder
            follow = 0 if apart else self.max_new_tokens - 1
            lengths = torch.maximum(kept.sum(dim=1), prompts + follow)
            longest = int(lengths.argmax())
            if lengths[longest] > limit:
                ids = batch.inputs["input_ids"][longest].tolist()
                raise ValueError(
                    f"sample {batch.sample_ids[longest]!r} takes {int(lengths[longest])} positions (its prompt "
                    f"{int(prompts[longest])}, of which image tokens {ids.count(self.encode.image_token_id)}), but "
                    f"{self.model_id} reads {limit}, and nothing is cut off; shorten the prompt, take smaller pictures "
                    "or lower --model.init_args.max_new_tokens"
                )

    @cached_property
    def context_length(self) -> int | None:
        """Positions that the language model can read, as far as its configuration or tokenizer tells."""
        text = self.backbone.model.config.get_text_config(decoder=True)
        length = getattr(text, "max_position_embeddings", None)
        told = self.backbone.tokenizer.model_max_length
        # A tokenizer that knows none has a huge number there.
        return length or (told if told < 10**9 else None)

    def describe(self) -> dict[str, Any]:
        """What its states and answers depend on, as far as it is known: before the model is loaded, from its files.

        `weights_hash` is the original's, whatever is attached to it; `adapter_hash` tells whether, and which, adapter
        speaks.
        """
        backbone = self._backbone
        if backbone is not None:
            hashes = {**backbone.hashes, "weights_hash": backbone.weights_hash()}
        else:
            hashes = {} if self.allow_missing_weights else model_hashes(self.model_id, self.revision)
        return {
            "model_id": self.model_id,
            "revision": self.revision,
            **hashes,
            "dtype": self.dtype_name,
            "quantization": self.quantization,
            "attention": self.attention,
            "max_new_tokens": self.max_new_tokens,
            "adapter": self.adapter,
            "adapter_hash": None if self.adapter is None else self._hash_of(self.adapter, DESTINATION),
        }

    def _hash_of(self, path: str, name: str) -> str | None:
        """Hash of a destination: as it was loaded, or of its files."""
        return destination_hash(path) if self._backbone is None else self._backbone.destination_hash(name)

    # --- processes that wait for each other ---------------------------------------------------------------

    def in_step(self, batch: Batch, run: Callable[[Batch], Output], nothing: Output) -> Output:
        """Run a batch. Of a sharded model every pass needs all processes, and so one without samples runs too.

        Args:
            batch: The batch, which may be empty.
            run: Runs a batch.
            nothing: What an empty batch gives.
        """
        if batch.samples:
            self.check_lengths(batch)
            return run(batch)
        if self.device_mesh is not None:
            run(self._blank_batch())
        return nothing

    def on_predict_start(self) -> None:
        """Check the model before any data is run, and learn how many batches the busiest process has."""
        if self.device_mesh is not None:
            numbers = [0.0] * self.trainer.world_size
            dist.all_gather_object(numbers, self.trainer.num_predict_batches[0])
            if math.isinf(max(numbers)):
                raise ValueError("a sharded model needs data of known length; leave --data.init_args.streaming out")
            self._most_batches = int(max(numbers))
        self.backbone.self_check()

    def on_predict_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After the last batch, go on with empty ones for the processes that have more."""
        if self.device_mesh is not None and batch_idx + 1 == self.trainer.num_predict_batches[0]:
            for number in range(batch_idx + 1, self._most_batches):
                self.predict_step(Batch([], {}), number)

    def _blank_batch(self) -> Batch:
        """A picture of nothing, which takes the same way through the model as any other."""
        inputs = self.encode([Image.new("RGB", (64, 64))], ["."], ["."])
        return Batch([Sample("", Path(), ".", ".")], inputs).to(self.device)

    def load(self) -> VisionLanguageModel:
        """Load the model as the arguments say, to where it will run."""
        backbone = VisionLanguageModel.load(
            self.model_id,
            revision=self.revision,
            dtype=self.dtype_name,
            attention=self.attention,
            quantization=self.quantization,
            device_map=self.device_map,
            trust_remote_code=self.trust_remote_code,
            allow_missing_weights=self.allow_missing_weights,
            # What is attached to it is checked where it will run, in a fraction of the time.
            device=None if self.device_map or self.device_mesh else self._root_device(),
        )
        if self.adapter is not None:
            backbone.load_adapter(self.adapter)
            backbone.speak_as(DESTINATION)
        return backbone
