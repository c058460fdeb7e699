"""Reads PEFT adapters of any age for a model, and refuses those that do not act inside it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper, get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from .exchange import grown
from .identity import ADAPTER_CONFIG

_PREFIX = "base_model.model."
# What PEFT says of adapters that write into the model, and of weights that lack: undone or refused here.
_HANDLED = r"(?s).*(changes the base weights of|disabling adapter layers with bias|Found missing adapter keys)"


class AdapterReader:
    """Reads adapters for one model, whatever its modules were called when they were saved.

    Args:
        model: The transformers model, with nothing attached to it.
    """

    def __init__(self, model: Any) -> None:
        self._modules = dict(model.named_modules())
        self._own = {name: list(module.parameters(recurse=False)) for name, module in self._modules.items()}
        self._renamings = [
            one for one in get_model_conversion_mapping(model, add_legacy=False) if isinstance(one, WeightRenaming)
        ]

    @contextmanager
    def read(self, path: str, vocabulary: Mapping[str, Tensor], whole: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Within the context a folder that PEFT can load into the model.

        Args:
            path: Folder or hub id.
            vocabulary: Name → tensor of the model with a row for each token.
            whole: Whether the model is, and no part of it is fetched when it runs.

        Yields:
            The folder or hub id itself, or a copy with today's names; and those of `vocabulary` of which the adapter
            has more rows, by their names.

        Raises:
            ValueError: The adapter acts outside the model.
        """
        config = PeftConfig.from_pretrained(path)
        check_kind(config, whole)
        weights = load_peft_weights(path, device="cpu")
        renamed = {key: self._renamed(key) for key in weights}
        own = {key: name.removeprefix(_PREFIX).replace(".base_layer.", ".") for key, name in renamed.items()}
        more = {own[key]: value for key, value in weights.items() if grown(vocabulary.get(own[key]), value)}
        if all(old == new for old, new in renamed.items()):
            yield path, more
            return
        with TemporaryDirectory() as folder:
            kept = {renamed[key]: value.contiguous() for key, value in weights.items()}
            save_file(kept, Path(folder, SAFETENSORS_WEIGHTS_NAME))
            self._rename_targets(config, renamed)
            config.save_pretrained(folder)
            yield folder, more

    def _renamed(self, key: str) -> str:
        """A key of the weights under today's name; unchanged where it fits, or where no name for it is known."""
        if not key.startswith(_PREFIX) or self._fits(key.removeprefix(_PREFIX)):
            return key
        name, _ = rename_source_key(key.removeprefix(_PREFIX), self._renamings, [])
        return _PREFIX + name if self._fits(name) else key

    def _fits(self, key: str) -> bool:
        """Whether a key is of a module with parameters of its own, or of what stands in its place."""
        return any(self._own.get(outer) for outer in _outer(key))

    def _rename_targets(self, config: Any, renamed: Mapping[str, str]) -> None:
        """Name the modules of a configuration by what was matched when it was saved: a pattern cannot be translated."""
        names = {}
        for old, new in renamed.items():
            for before in _outer(old.removeprefix(_PREFIX)):
                after = new.removeprefix(_PREFIX).removesuffix(old.removeprefix(_PREFIX).removeprefix(before))
                if after in self._modules:
                    names[before] = after
        if getattr(config, "feedforward_modules", None):
            config.feedforward_modules = {
                after for before, after in names.items() if _matches(config.feedforward_modules, before)
            }
        if getattr(config, "target_modules", None):
            # An empty match stays as it was, for PEFT to say so.
            config.target_modules = {
                after for before, after in names.items() if check_target_module_exists(config, before)
            } or config.target_modules
            for option in ("exclude_modules", "layers_to_transform", "layers_pattern"):
                if hasattr(config, option):
                    setattr(config, option, None)
        if getattr(config, "modules_to_save", None):
            named = {one: {names[old] for old in names if _matches([one], old)} for one in config.modules_to_save}
            config.modules_to_save = sorted(after for one, found in named.items() for after in found or {one})
        if getattr(config, "target_parameters", None):
            paths = [one.rpartition(".") for one in config.target_parameters]
            config.target_parameters = [f"{names.get(module, module)}.{one}" for module, _, one in paths]
        if isinstance(given := getattr(config, "trainable_token_indices", None), dict):
            config.trainable_token_indices = {names.get(name, name): value for name, value in given.items()}
        # Ranks and scales of some modules, by expressions over their names.
        for option, given in vars(config).items():
            if option.endswith("_pattern") and isinstance(given, dict):
                matched = {after: get_pattern_key(list(given), before) for before, after in names.items()}
                setattr(config, option, {after: given[key] for after, key in matched.items() if key in given})


def _outer(key: str) -> Iterator[str]:
    """The names of the modules around a key, from the inside out."""
    while key := key.rpartition(".")[0]:
        yield key


def _matches(pattern: str | Collection[str], name: str) -> bool:
    """Whether an option of PEFT means a module: by a pattern, or by the end of its name."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(f".{name}".endswith(f".{one}") for one in pattern)


def check_kind(config: PeftConfig, whole: bool) -> None:
    """Refuse what acts in PEFT's own forward, and not in modules of the model.

    Args:
        config: Of the adapter.
        whole: Whether the model is: what an adapter writes into layers that are fetched when they run is lost.

    Raises:
        ValueError: It does, or writes where that is lost.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        raise ValueError(
            f"{kind} puts virtual tokens before the prompt, which are at none of the positions that states are read "
            "from; give an adapter of the model's layers, such as LoRA"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "activated LoRA acts only behind its invocation tokens, which PEFT looks for before it runs the model; "
            "give an adapter of all positions"
        )
    plain = (
        getattr(config, "init_lora_weights", True) in (True, False, "gaussian", "orthogonal")
        and getattr(config, "bias", "none") == "none"
        and not getattr(config, "kasa_config", None)
    )
    if not (whole or plain):
        raise ValueError(
            f"{kind} writes into the original with these options, of which a part lies in main memory or on disk; "
            "leave --model.init_args.device_map out, or give a plain LoRA adapter"
        )


def noted(path: str, entry: str) -> str:
    """What the configuration of an adapter says; empty where it says nothing, or is not here.

    Args:
        path: Its folder.
        entry: Of `adapter_config.json`: `peft_type`, `base_model_name_or_path`.
    """
    try:
        return str(json.loads(Path(path, ADAPTER_CONFIG).read_text(encoding="utf-8"))[entry] or "")
    except (OSError, ValueError, KeyError, TypeError):
        return ""


_tokens: Any = TrainableTokensWrapper.adapter_state_dict_load_map


def _own_tokens(wrapper: Any, adapter: str) -> Any:
    return _tokens(wrapper, adapter) if adapter in wrapper._adapters else {}


def attach(model: Any, peft: PeftModel | None, path: str, name: str) -> PeftModel:
    """Attach an adapter, frozen and switched off.

    Args:
        model: The transformers model.
        peft: What other adapters of it are in.
        path: Folder or hub id.
        name: What it is called.

    Returns:
        What it is in.

    Raises:
        ValueError: It was not loaded whole.
    """
    results: list[Any] = []

    def noting(*args: Any, **options: Any) -> Any:
        results.append(set_peft_model_state_dict(*args, **options))
        return results[-1]

    # What it did not find, PEFT tells only of adapters that are not the first; and it looks for the tokens of each one
    # in every adapter that comes later.
    with (
        warnings.catch_warnings(),
        patch("peft.peft_model.set_peft_model_state_dict", noting),
        patch.object(TrainableTokensWrapper, "adapter_state_dict_load_map", _own_tokens),
    ):
        warnings.filterwarnings("ignore", _HANDLED)
        if peft is None:
            peft = PeftModel.from_pretrained(model, path, adapter_name=name)
        else:
            peft.load_adapter(path, name)
    result = results[-1]
    if result.unexpected_keys:
        raise ValueError(f"its layers are not this model's, e.g. {sorted(result.unexpected_keys)[0]}")
    state = peft.state_dict()
    loaded = {value.data_ptr() for key, value in state.items() if key not in set(result.missing_keys)}
    if missing := sorted(key for key in result.missing_keys if state[key].data_ptr() not in loaded):
        raise ValueError(f"it has no weights for layers that its configuration names, e.g. {missing[0]}")
    switch(peft, None)
    return peft


def live_module(model: nn.Module, name: str) -> nn.Module:
    """The module that stands under a name: within one that an adapter has of its own, the one of who speaks.

    Args:
        model: The transformers model.
        name: The name that a module has with nothing attached.
    """
    module = model
    for part in name.split("."):
        if isinstance(module, ModulesToSaveWrapper):
            speaks = module.active_adapters and not module.disable_adapters
            module = module.modules_to_save[module.active_adapters[0]] if speaks else module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        module = module.get_submodule(part)
    return module


def saves_parts(model: nn.Module) -> bool:
    """Whether an adapter has modules of its own that others are in, such as a whole block."""
    saved = (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    return any([*module.original_module.children()] for module in saved)


def switch(peft: PeftModel, adapter: str | None, trained: bool = False) -> None:
    """Let one adapter act, or none.

    Args:
        peft: What they are in.
        adapter: Its name.
        trained: Whether its weights take gradients.
    """
    layers: Any = peft.base_model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _HANDLED)
        if adapter is None:
            layers.disable_adapter_layers()
            return
        layers.enable_adapter_layers()
        peft.set_adapter(adapter, inference_mode=not trained)
