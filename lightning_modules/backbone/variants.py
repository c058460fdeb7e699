"""The variants of a model: the original, and the destinations beside it, from one load."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig

from ...records.hashes import value_hash
from ...records.paths import is_hub_id, located
from .adapters import AdapterReader, attach, live_module, noted, saves_parts, switch
from .destinations import DESTINATION, ORIGINAL, TRAINED, check_checkpoint, is_adapter
from .exchange import Exchange, Original, differing
from .identity import BASE_NOTE, OF_TENSORS, adapter_settings, base_note, check_reachable, destination_hash
from .loading import quantization_of, reason_of, tensor_hash
from .parts import lora_targets
from .sharding import gathered, shard_model
from .structure import Structure
from .whole_models import grown_tokenizer, whole_model


class Variants(nn.Module, ABC):
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
        self.variant = ORIGINAL
        """Which of them speaks; `running_as` changes it for a while."""
        self.learn_structure()
        self._read_adapter = AdapterReader(model)
        # Those of the original's tensors that have a row for each token, and may have more of them in a destination.
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        weights = {f"{name}.weight" for name, module in self._original.modules.items() if module in ends}
        self._vocabulary = weights & set(self._original.tensors())
        # PEFT injects its layers into `model` in place; the handle only switches and saves them. It is kept out
        # of the module tree, where every parameter would be registered twice.
        self._peft: list[PeftModel] = []
        # What PEFT calls each: it looks for a name within names of tensors, so that no name may be a part of another.
        self._adapters: dict[str, str] = {}
        self._saves_parts = False
        self._trained: str | None = None
        # What each destination has otherwise than the original, beside its adapter.
        self._exchanges: dict[str, Exchange] = {}
        self._kept = Exchange()
        self._tokenizers: dict[str, Any] = {}
        self.is_sharded = False
        """Whether this process has only pieces of the model."""
        # Of the original, whatever is attached to it later; and of each destination.
        self.hashes = dict(hashes or {})
        self._destination_hashes: dict[str, str] = {}

    def learn_structure(self) -> None:
        """Note where the original's modules and tensors are, while nothing is attached to it."""
        self._original = Original(self.model)

    @abstractmethod
    def ask(self) -> Tensor:
        """Logits of a small prompt with a picture, as the variant that speaks."""

    @abstractmethod
    def speak(self) -> str:
        """A few words about a picture of nothing, as the variant that speaks."""

    # --- destinations -------------------------------------------------------------------------------------

    def add_lora(self, config: LoraConfig) -> None:
        """Attach a new LoRA adapter, freeze everything else, and speak as it from now on.

        Args:
            config: Its options; without `target_modules` it adapts the linear layers in the language model's blocks.

        Raises:
            ValueError: `config.target_modules` matches nothing, or it trains the original's own biases.
        """
        if config.bias != "none":
            raise ValueError(
                f"LoRA with bias={config.bias!r} trains the original's own biases, so that there is no original to "
                "compare with; use lora_bias=True"
            )
        self._keep_hash()
        config.target_modules = config.target_modules or lora_targets(self.model, ["language_model"])
        with self._guarded() as written:
            peft = get_peft_model(self.model, config, adapter_name=TRAINED)
            switch(peft, None)
        self._peft, self._trained = [peft], TRAINED
        self._adapters[TRAINED] = TRAINED
        self._exchanges[TRAINED] = Exchange(written)
        self.structure.forget()
        self.speak_as(TRAINED)

    def add_destination(self, path: str, name: str = DESTINATION) -> None:
        """Take a fine-tuned model beside the original, frozen: see `running_as`. The original goes on speaking.

        Args:
            path: A PEFT adapter, or a whole model of the same structure, of which the tensors and settings that differ
                are kept.
            name: What it is called.

        Raises:
            ValueError: It is missing, was made for a model of another structure, or `name` is taken.
        """
        path = self._found(path, name)
        check_checkpoint(path)
        if is_adapter(path) or not (Path(path).is_dir() or _is_model(path)):
            self.load_adapter(path, name)
            return
        try:
            self._check_base(path)
            with self.running_as(ORIGINAL):
                exchange = whole_model(path, self.model, self.processor, self._original, self._vocabulary)
            self._add(path, name, exchange)
        except Exception as error:  # models say in all kinds of ways that a part is not theirs, and PEFT too
            self._forget(name)
            raise ValueError(
                f"destination {path!r}: {reason_of(error)}; give a model that was fine-tuned from {self.source!r}"
            ) from error

    def load_adapter(self, adapter: str, name: str = DESTINATION) -> None:
        """Attach a saved PEFT adapter, frozen. Whoever speaks goes on speaking.

        What it writes into the original (PiSSA, OLoRA, trained biases, a grown vocabulary) is taken out again, and is
        there while it speaks.

        Raises:
            ValueError: It is missing, was made for a model of another structure, or does not act in the model's layers.
        """
        adapter = self._found(adapter, name)
        self._keep_hash()
        self._adapters[name] = f"variant_{len(self._adapters):04d}"
        before, tree = list(self._peft), self._original.tree()
        try:
            self._check_base(adapter)
            with self.running_as(ORIGINAL):
                exchange = self._attach(adapter, name)
            self._add(adapter, name, exchange)
        except Exception as error:
            self._forget(name)
            self._peft = before
            self._original.restore(tree)
            state = "does not fit" if Path(adapter).exists() else "is no folder here, nor a hub id that fits"
            why = " ".join(filter(None, (noted(adapter, "peft_type"), reason_of(error))))
            raise ValueError(
                f"adapter {adapter!r} {state} {self.source!r} ({why}); give a PEFT folder made from this model"
            ) from error

    def _found(self, path: str, name: str) -> str:
        """Where a destination is that is to be called something.

        Raises:
            ValueError: It is nowhere, or something else is called so.
        """
        if name == ORIGINAL or name in self._exchanges:
            raise ValueError(f"destination {path!r}: there is one called {name!r} already; give it another name")
        place = located(path, "destination")
        check_reachable(place)
        return place

    def _attach(self, adapter: str, name: str) -> Exchange:
        """Attach an adapter; gives what it has otherwise of the original's own."""
        peft, tensors = self._peft[0] if self._peft else None, self._original.tensors()
        vocabulary = {name: tensors[name] for name in self._vocabulary}
        with self._read_adapter.read(adapter, vocabulary, self._original.is_whole) as (folder, more):
            # PEFT makes its layers as large as those that they are for.
            sizes = {
                (outer, key): len(value)
                for name, value in more.items()
                for outer, module in self._original.modules.items()
                for key in ("out_features", "num_embeddings")
                if key in vars(module) and module.weight is tensors[name]
            }
            exchange = Exchange(more, dict(sizes))
            kept = self._original.put(exchange)
            devices = [self.model.device] if self.model.device.type == "cuda" else []
            try:
                # Some draw what they begin from: alike in every load, and without a trace in what is drawn later.
                with self._guarded() as written, torch.random.fork_rng(devices):
                    torch.manual_seed(0)
                    self._peft = [attach(self.model, peft, folder, self._adapters[name])]
            finally:
                self._original.put(kept)
        return replace(exchange, tensors={key: value.cpu() for key, value in {**more, **written}.items()})

    def _guarded(self) -> AbstractContextManager[dict[str, Tensor]]:
        return self._original.guarded() if self._original.is_whole else self._unchanged()

    @contextmanager
    def _unchanged(self) -> Iterator[dict[str, Tensor]]:
        """Within the context nothing may be written into a model of which a part is fetched when it runs.

        Raises:
            ValueError: Something was.
        """
        before = None if self.model.device.type == "meta" else self.ask()
        yield {}
        if before is not None and not torch.equal(before, self.ask()):
            raise ValueError(
                "it writes into the original, of which a part lies in main memory or on disk, and cannot be taken out "
                "again; load the model anew, whole, or with a plain LoRA adapter"
            )

    def _forget(self, name: str) -> None:
        """Remove what there is of a destination that could not be taken in."""
        for known in (self._exchanges, self._tokenizers, self._destination_hashes):
            known.pop(name, None)
        adapter = self._adapters.pop(name, None)
        if self._peft and adapter in self._peft[0].peft_config:
            self._peft[0].delete_adapter(adapter)
        self.structure.forget()

    def _add(self, path: str, name: str, exchange: Exchange) -> None:
        """Take a destination in, and say if it says nothing else than the original."""
        self._exchanges[name] = exchange
        self._saves_parts = saves_parts(self.model)
        self.structure.forget()
        self._note_hash(path, name)
        tensors = self._original.tensors()
        if any(len(value) > len(tensors[key]) for key, value in exchange.tensors.items() if key in self._vocabulary):
            self._tokenizers[name] = grown_tokenizer(path, self.processor.tokenizer)
        if self.model.device.type == "meta":
            return
        with self.running_as(ORIGINAL):
            own = self.ask()
        try:
            said = self._said(name)
        except Exception as error:
            raise ValueError(
                f"it cannot answer as the original is asked ({reason_of(error)}){self._other_settings(exchange)}"
            ) from error
        if own.shape == said.shape and torch.equal(own, said):
            warnings.warn(
                f"destination {path!r} ({name}) gives a prompt with a picture the same logits as the original: as far "
                "as one prompt tells, it changes nothing, and no concept will shift",
                stacklevel=4,
            )

    def _other_settings(self, exchange: Exchange) -> str:
        """The entries of a destination's configuration that are not as the original's."""
        theirs = exchange.settings.get(("", "config"))
        if theirs is None:
            return ""
        found = differing(self.model.config.to_dict(), theirs.to_dict())
        return ": " + ", ".join(f"{key} is {value!r}, not {own!r}" for key, (own, value) in found.items())

    def _said(self, name: str) -> Tensor:
        """What a destination says, as PEFT says it too."""
        with self.running_as(name):
            said = self.ask()
            if name in self._adapters:
                own, self.model = self.model, self._peft[0]
                try:
                    of_peft = self.ask()
                finally:
                    self.model = own
                if said.shape != of_peft.shape or not torch.allclose(said, of_peft, 1e-3, 1e-3, equal_nan=True):
                    kind = self._peft[0].peft_config[self._adapters[name]].peft_type
                    raise ValueError(f"{getattr(kind, 'value', kind)} acts in PEFT's own forward; give another adapter")
            if said.isnan().any():
                raise ValueError("its logits are not finite numbers; train it anew, with a smaller learning rate")
            if self._exchanges[name].settings:
                self.speak()
        return said

    def _keep_hash(self) -> None:
        """Find the hash of a model that came from no files while nothing is attached to it."""
        if self.model.device.type != "meta":
            self.hashes.setdefault("weights_hash", self.weights_hash())

    def _note_hash(self, path: str, name: str) -> None:
        if (found := destination_hash(path)) is not None:
            self._destination_hashes[name] = found

    def _check_base(self, path: str) -> None:
        """Refuse what says of itself that it was trained from another model."""
        made_for = base_note(Path(path))
        trained_on, own = str(made_for.get("weights_hash", "")), self.weights_hash()
        # Hashes over different things, as older versions took them, tell nothing.
        if trained_on.partition(":")[0] == own.partition(":")[0] and trained_on != own:
            raise ValueError(
                f"it was trained on other weights: {made_for.get('model_id')}, {trained_on}, and these are {own}"
            )
        told = noted(path, "base_model_name_or_path")
        # Folders have other names elsewhere; ids on the hub have not.
        if not trained_on and is_hub_id(told) and is_hub_id(self.source) and told != self.source:
            warnings.warn(
                f"{path!r} says that it was trained from {told!r}, and this is {self.source!r}: if they are not one "
                "model under two names, what it says means nothing",
                stacklevel=5,
            )

    # --- who speaks ---------------------------------------------------------------------------------------

    @contextmanager
    def running_as(self, variant: str) -> Iterator[None]:
        """Within the context the model computes as one of those that it was loaded with; then as before.

        Args:
            variant: `original`, or the name of a destination.

        Raises:
            ValueError: It has no destination of that name.
        """
        before = self.variant
        self.speak_as(variant)
        try:
            yield
        finally:
            self.speak_as(before)

    def speak_as(self, variant: str) -> None:
        """Let the model compute as one of those that it was loaded with, from now on.

        Args:
            variant: `original`, or the name of a destination.

        Raises:
            ValueError: It has no destination of that name.
        """
        if variant not in (known := [ORIGINAL, *self._exchanges]):
            raise ValueError(
                f"{self.source}: loaded without {variant!r}, only with {', '.join(known)}; name it with "
                "--model.init_args.destination"
            )
        if variant == self.variant:
            return
        self._original.put(self._kept)
        if self._peft:
            switch(self._peft[0], self._adapters.get(variant), trained=variant == self._trained)
        self._kept = self._original.put(self._exchanges.get(variant, Exchange()))
        self.variant = variant
        if self._saves_parts:
            self.structure.forget()

    def live_module(self, name: str) -> nn.Module:
        """The module of who speaks that stands under a name of the original's."""
        return live_module(self.model, name)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer: the model's, or of a destination with more tokens its own."""
        return self._tokenizers.get(self.variant) or self.processor.tokenizer

    @property
    def widest_tokenizer(self) -> Any:
        """The tokenizer with the tokens of all variants: those of the original have the same numbers in each."""
        return max((self.processor.tokenizer, *self._tokenizers.values()), key=len)

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
        bits = [bits for bits in ("4bit", "8bit") if getattr(packed, f"load_in_{bits}", False)]
        method = bits[0] if bits else quantization_of(self.model)
        return str(self.model.dtype) if method is None else f"{self.model.dtype} {method}"

    def destination_hash(self, variant: str) -> str | None:
        """SHA-256 of a destination, all of its weights and settings; nothing where there is no such destination.

        Args:
            variant: Its name.
        """
        if variant in self._destination_hashes:
            return self._destination_hashes[variant]
        if variant not in self._adapters:
            exchange = self._exchanges.get(variant)
            return None if exchange is None else f"{OF_TENSORS}:{tensor_hash(exchange.tensors)}"
        weights = tensor_hash(get_peft_model_state_dict(self._peft[0], adapter_name=self._adapters[variant]))
        settings = adapter_settings(self._peft[0].peft_config[self._adapters[variant]].to_dict())
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
        if odd := [name for name, exchange in self._exchanges.items() if exchange or name not in self._adapters]:
            kind = "an adapter that writes into the original" if odd[0] in self._adapters else "a whole model"
            raise ValueError(
                f"destination {odd[0]!r} is {kind}, which cannot be exchanged in pieces; use --trainer.strategy ddp, "
                "or give a plain LoRA adapter"
            )
        self._keep_hash()
        # No process can compute them alone later.
        self._destination_hashes |= {name: found for name in self._adapters if (found := self.destination_hash(name))}
        self.is_sharded = True
        shard_model(self.structure, mesh, trained)

    def gathered_state(self) -> dict[str, Tensor] | None:
        """What `save` needs of a sharded model, on all processes together; nothing where it is whole."""
        if not self.is_sharded:
            return None
        return gathered(self._peft[0], "lora_") if self._peft else gathered(self.model)


def _is_model(path: str) -> bool:
    """Whether a repository of the hub has a model."""
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception:  # also of its validators
        return False
    return True
