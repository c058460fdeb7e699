"""The variants of a model: the original, and the destinations beside it, from one load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig

from .destinations import DESTINATION, ORIGINAL, changed_weights, exchanged, is_adapter
from .loading import tensor_hash
from .parts import lora_targets
from .sharding import gathered, shard_model
from .structure import Structure

# Beside an adapter: which base it was trained on.
_BASE_NOTE = "base_model.json"


class Variants(nn.Module):
    """A model that can be switched between an original and its destinations, saved, and left to processes in pieces.

    Args:
        model: The transformers model.
        processor: Its processor.
        source: What it was loaded from, for messages and metadata.
    """

    def __init__(self, model: Any, processor: Any, source: str) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.source = source
        self.structure = Structure(model)
        # PEFT injects its layers into `model` in place; the handle only switches and saves them. It is kept out
        # of the module tree, where every parameter would be registered twice.
        self._peft: list[PeftModel] = []
        self._changed: dict[str, dict[str, Tensor]] = {}
        # Of a sharded model, what no process can compute alone: hashes of its weights and of each destination.
        self._hashes: dict[str | None, str | None] | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether this process has only pieces of the model."""
        return self._hashes is not None

    # --- adapters -----------------------------------------------------------------------------------------

    def add_lora(self, config: LoraConfig) -> None:
        """Attach a new LoRA adapter and freeze everything else.

        Args:
            config: Its options; without `target_modules` it adapts the linear layers in the language model's blocks.

        Raises:
            ValueError: `config.target_modules` matches nothing.
        """
        config.target_modules = config.target_modules or lora_targets(self.model, ["language_model"])
        self._peft = [get_peft_model(self.model, config)]

    def add_destination(self, path: str, name: str = DESTINATION) -> None:
        """Take a fine-tuned model beside the original, frozen: see `running_as`.

        Args:
            path: A PEFT adapter, or a whole model of the same structure, of which the tensors that differ are kept.
            name: What it is called.

        Raises:
            ValueError: It is missing, or was made for a model of another structure.
        """
        if is_adapter(path) or not _is_model(path):
            self.load_adapter(path, name)
        else:
            self._changed[name] = changed_weights(self.model, path, self.model.config._attn_implementation)

    def load_adapter(self, adapter: str, name: str = DESTINATION) -> None:
        """Attach a saved PEFT adapter, frozen.

        Raises:
            ValueError: It is missing, or was made for a model of another structure.
        """
        try:
            if self._peft:
                self._peft[0].load_adapter(adapter, name)
            else:
                self._peft = [PeftModel.from_pretrained(self.model, adapter, adapter_name=name)]
            self._check_adapter(adapter, name)
        except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
            first = str(error).strip().splitlines()[0]
            state = "does not fit" if Path(adapter).exists() else "is no folder here, nor a hub id that fits"
            raise ValueError(
                f"adapter {adapter!r} {state} {self.source!r} ({first}); give a PEFT folder made from this model"
            ) from error

    def _check_adapter(self, adapter: str, name: str) -> None:
        """Refuse what PEFT loads in part, or on another base of the same shape."""
        loaded = get_peft_model_state_dict(self._peft[0], adapter_name=name)
        odd = set(load_peft_weights(adapter, device="cpu")) ^ set(loaded)
        if odd:
            raise ValueError(f"its layers are not this model's, e.g. {sorted(odd)[0]}")
        note = Path(adapter) / _BASE_NOTE
        made_for = json.loads(note.read_text()) if note.is_file() else {}
        # In another precision the same weights have other values.
        if made_for.get("dtype") == self._precision and made_for["weights_hash"] != self.weights_hash():
            raise ValueError("it was trained on other weights")

    @contextmanager
    def running_as(self, variant: str) -> Iterator[None]:
        """Within the context the model computes as one of those that it was loaded with.

        Args:
            variant: `original`, or the name of a destination.

        Raises:
            ValueError: It has no destination of that name.
        """
        if variant == ORIGINAL or variant in self._changed:
            changed = self._changed.get(variant, {})
            with self._peft[0].disable_adapter() if self._peft else nullcontext(), exchanged(self.model, changed):
                yield
            return
        self._check_variant(variant)
        self._peft[0].set_adapter(variant)
        yield

    def _check_variant(self, variant: str) -> None:
        adapters = list(self._peft[0].peft_config) if self._peft else []
        if variant not in (known := [ORIGINAL, *adapters, *self._changed]):
            raise ValueError(
                f"{self.source}: loaded without {variant!r}, only with {', '.join(known)}; name it with "
                "--model.init_args.destination"
            )

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write the adapter in PEFT's layout, or the whole model and processor where there is no adapter.

        Args:
            folder: Where to.
            state: Of a sharded model, what `gathered_state` gave.
        """
        if self._peft:
            self._peft[0].save_pretrained(str(folder), state_dict=state)
            base = {"weights_hash": self.weights_hash(), "dtype": self._precision, "model_id": self.source}
            (folder / _BASE_NOTE).write_text(json.dumps(base, indent=1))
            return
        self.model.save_pretrained(folder, state_dict=state)
        self.processor.save_pretrained(folder)

    @property
    def _precision(self) -> str:
        packed = getattr(self.model.config, "quantization_config", None)
        bits = "" if packed is None else " 4bit" if getattr(packed, "load_in_4bit", False) else " 8bit"
        return f"{self.model.dtype}{bits}"

    def destination_hash(self, variant: str) -> str | None:
        """SHA-256 over what a destination has of its own; nothing where there is no such destination.

        Args:
            variant: Its name.
        """
        if self._hashes is not None:
            return self._hashes.get(variant)
        if variant in self._changed:
            return tensor_hash({name: value.flatten()[:64] for name, value in self._changed[variant].items()})
        if not self._peft or variant not in self._peft[0].peft_config:
            return None
        return tensor_hash(get_peft_model_state_dict(self._peft[0], adapter_name=variant))

    def weights_hash(self) -> str:
        """SHA-256 over the first values of every tensor of the model: tells two models apart without reading all."""
        if self._hashes is not None:
            return cast(str, self._hashes[None])
        return tensor_hash(
            {
                name.replace(".base_layer", ""): value.flatten()[:64]
                for name, value in self.model.state_dict().items()
                if "lora_" not in name
            }
        )

    # --- pieces -------------------------------------------------------------------------------------------

    def shard(self, mesh: DeviceMesh, trained: bool) -> None:
        """Leave every process with its pieces; from now on all of them must make every pass together.

        Args:
            mesh: The processes, one dimension.
            trained: Whether the parameters that require gradients are trained.

        Raises:
            ValueError: A destination is a whole model, of which there are no pieces.
        """
        if self._changed:
            raise ValueError(
                f"destination {next(iter(self._changed))!r} is a whole model, which cannot be exchanged in pieces; use "
                "--trainer.strategy ddp, or give an adapter"
            )
        adapters = list(self._peft[0].peft_config) if self._peft else []
        self._hashes = {None: self.weights_hash(), **{name: self.destination_hash(name) for name in adapters}}
        shard_model(self.structure, mesh, trained)

    def gathered_state(self) -> dict[str, Tensor] | None:
        """What `save` needs of a sharded model, on all processes together; nothing where it is whole."""
        if self._hashes is None:
            return None
        return gathered(self._peft[0], "lora_") if self._peft else gathered(self.model)


def _is_model(path: str) -> bool:
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):
        return False
    return True
