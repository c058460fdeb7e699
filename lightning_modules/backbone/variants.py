"""The variants of a model: the original, and the destinations beside it, from one load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig

from ...records.hashes import value_hash
from ...records.paths import user_name
from .destinations import DESTINATION, ORIGINAL, changed_weights, exchanged, is_adapter
from .identity import BASE_NOTE, OF_TENSORS, adapter_settings, base_note, destination_hash
from .loading import tensor_hash
from .parts import lora_targets
from .sharding import gathered, shard_model
from .structure import Structure


class Variants(nn.Module):
    """A model that can be switched between an original and its destinations, saved, and left to processes in pieces.

    Args:
        model: The transformers model.
        processor: Its processor.
        source: What it was loaded from, for messages and metadata.
        hashes: What it is, where it was loaded from files: see `identity.model_hashes`.
    """

    def __init__(self, model: Any, processor: Any, source: str, hashes: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.source = source
        self.structure = Structure(model)
        # PEFT injects its layers into `model` in place; the handle only switches and saves them. It is kept out
        # of the module tree, where every parameter would be registered twice.
        self._peft: list[PeftModel] = []
        self._changed: dict[str, dict[str, Tensor]] = {}
        self.is_sharded = False
        """Whether this process has only pieces of the model."""
        # Of the original, whatever is attached to it later; and of each destination.
        self.hashes = dict(hashes or {})
        self._destination_hashes: dict[str, str] = {}

    # --- adapters -----------------------------------------------------------------------------------------

    def add_lora(self, config: LoraConfig) -> None:
        """Attach a new LoRA adapter and freeze everything else.

        Args:
            config: Its options; without `target_modules` it adapts the linear layers in the language model's blocks.

        Raises:
            ValueError: `config.target_modules` matches nothing.
        """
        self._keep_hash()
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
        path = user_name(path)
        if is_adapter(path) or not _is_model(path):
            self.load_adapter(path, name)
            return
        try:
            self._check_base(path)
        except ValueError as error:
            raise ValueError(f"destination {path!r}: {error}; give a model that was fine-tuned from it") from error
        self._changed[name] = changed_weights(self.model, path, self.model.config._attn_implementation)
        self._note_hash(path, name)

    def load_adapter(self, adapter: str, name: str = DESTINATION) -> None:
        """Attach a saved PEFT adapter, frozen.

        Raises:
            ValueError: It is missing, or was made for a model of another structure.
        """
        adapter = user_name(adapter)
        self._keep_hash()
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
        self._note_hash(adapter, name)

    def _keep_hash(self) -> None:
        """Find the hash of a model that came from no files while nothing is attached to it."""
        if self.model.device.type != "meta":
            self.hashes.setdefault("weights_hash", self.weights_hash())

    def _note_hash(self, path: str, name: str) -> None:
        if (found := destination_hash(path)) is not None:
            self._destination_hashes[name] = found

    def _check_adapter(self, adapter: str, name: str) -> None:
        """Refuse what PEFT loads in part, or on another base of the same shape."""
        loaded = get_peft_model_state_dict(self._peft[0], adapter_name=name)
        odd = set(load_peft_weights(adapter, device="cpu")) ^ set(loaded)
        if odd:
            raise ValueError(f"its layers are not this model's, e.g. {sorted(odd)[0]}")
        self._check_base(adapter)

    def _check_base(self, path: str) -> None:
        """Refuse what says of itself that it was trained from another model."""
        made_for = base_note(Path(path))
        trained_on, own = str(made_for.get("weights_hash", "")), self.weights_hash()
        # Hashes over different things, as older versions took them, tell nothing.
        if trained_on.partition(":")[0] == own.partition(":")[0] and trained_on != own:
            raise ValueError(
                f"it was trained on other weights: {made_for.get('model_id')}, {trained_on}, and these are {own}"
            )

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

    def save(self, folder: Path, state: dict[str, Tensor] | None = None, made: Mapping[str, Any] | None = None) -> None:
        """Write the adapter in PEFT's layout, or the whole model and processor where there is no adapter.

        Args:
            folder: Where to.
            state: Of a sharded model, what `gathered_state` gave.
            made: What trained it, to be written beside it.
        """
        if self._peft:
            self._peft[0].save_pretrained(str(folder), state_dict=state)
        else:
            self.model.save_pretrained(folder, state_dict=state)
            self.processor.save_pretrained(folder)
        if self._peft or made is not None:
            base = {"weights_hash": self.weights_hash(), "dtype": self._precision, "model_id": self.source}
            (folder / BASE_NOTE).write_text(json.dumps({**(made or {}), **base}, indent=1), encoding="utf-8")

    @property
    def _precision(self) -> str:
        packed = getattr(self.model.config, "quantization_config", None)
        bits = "" if packed is None else " 4bit" if getattr(packed, "load_in_4bit", False) else " 8bit"
        return f"{self.model.dtype}{bits}"

    def destination_hash(self, variant: str) -> str | None:
        """SHA-256 of a destination, all of its weights and settings; nothing where there is no such destination.

        Args:
            variant: Its name.
        """
        if variant in self._destination_hashes:
            return self._destination_hashes[variant]
        if variant in self._changed:
            return f"{OF_TENSORS}:{tensor_hash(self._changed[variant])}"
        if not self._peft or variant not in self._peft[0].peft_config:
            return None
        weights = tensor_hash(get_peft_model_state_dict(self._peft[0], adapter_name=variant))
        settings = adapter_settings(self._peft[0].peft_config[variant].to_dict())
        return f"{OF_TENSORS}:{value_hash([weights, json.loads(json.dumps(settings, default=str))])}"

    def weights_hash(self) -> str:
        """SHA-256 of the original's weights: of the files they are from; of a model made in memory, of its tensors."""
        known = self.hashes.get("weights_hash")
        return known or f"{OF_TENSORS}:{tensor_hash(self.model.state_dict())}"

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
        self._keep_hash()
        # No process can compute them alone later.
        adapters = list(self._peft[0].peft_config) if self._peft else []
        self._destination_hashes |= {name: found for name in adapters if (found := self.destination_hash(name))}
        self.is_sharded = True
        shard_model(self.structure, mesh, trained)

    def gathered_state(self) -> dict[str, Tensor] | None:
        """What `save` needs of a sharded model, on all processes together; nothing where it is whole."""
        if not self.is_sharded:
            return None
        return gathered(self._peft[0], "lora_") if self._peft else gathered(self.model)


def _is_model(path: str) -> bool:
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):
        return False
    return True
