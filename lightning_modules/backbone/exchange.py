"""The tensors and settings of an original: kept whatever is attached, exchanged while another model speaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, PreTrainedConfig

# What every module has for its own housekeeping, and what transformers and accelerate note on one: where it came from,
# how it is laid out. None of it decides what the model computes.
_HOUSEKEEPING = {
    *vars(nn.Module()), "name_or_path", "warnings_issued", "hf_device_map", "_hf_hook", "_old_forward", "forward",
    "_is_hf_initialized", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method",
    "hf_quantizer",
}  # fmt: skip
# Of a configuration: where it came from, and what generation is told by its own configuration.
_ORIGINS = {"_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype"}
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type, FunctionType)

_CHUNK = 1 << 20
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # an odd number of 64 bits, as torch takes them


@dataclass
class Exchange:
    """What one model has otherwise than another of the same structure.

    Attributes:
        tensors: Name → parameter or buffer.
        settings: Name of a module and of its attribute → value; the model itself has no name.
        functions: Name → module without tensors, such as an activation function.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[tuple[str, str], Any] = field(default_factory=dict)
    functions: dict[str, nn.Module] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tensors or self.settings or self.functions)


class Original:
    """Where the modules and tensors of a model are, under the names that they have before anything is attached.

    Whatever wraps a module later keeps it, so that it is found again.

    Args:
        model: The model, with nothing attached to it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        # As they are before anything runs: what a pass notes on a module is no setting.
        self._settings = {name: _settings(module) for name, module in self.modules.items()}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        seen: set[int] = set()
        for name, module in self.modules.items():
            for key, value in {**module._parameters, **module._buffers}.items():
                # Parameters that are tied are there once; buffers are exchanged one by one.
                if value is not None and (key in module._buffers or id(value) not in seen):
                    seen.add(id(value))
                    self._places[f"{name}.{key}".removeprefix(".")] = (module, key)

    def tensors(self) -> dict[str, Tensor]:
        """Name → parameter or buffer, as it is now; tied ones once."""
        return {name: getattr(module, key) for name, (module, key) in self._places.items()}

    @property
    def is_whole(self) -> bool:
        """Whether all tensors are there, and none is fetched from main memory or disk when its layer runs."""
        return not any(value.is_meta for value in self.tensors().values())

    def checksums(self) -> dict[str, int]:
        """Name → checksum over all bytes, taken where the tensor is."""
        return {name: checksum(value.data) for name, value in self.tensors().items()}

    def tree(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The modules and parameters in each module, with what is attached now: see `restore`."""
        kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for module in self.modules[""].modules():
            kept += [(found, dict(found)) for found in (module._modules, module._parameters)]
        return kept

    def restore(self, tree: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """Take out of the model what was attached to it since.

        Args:
            tree: What `tree` gave before.
        """
        for found, entries in tree:
            found.clear()
            found.update(entries)

    @contextmanager
    def guarded(self) -> Iterator[dict[str, Tensor]]:
        """Within the context something is attached to the model, which may write over its tensors.

        At its end they are what they were.

        Yields:
            Filled at the end: name → what was written.

        Raises:
            RuntimeError: Something was written in a way that could not be seen, so that the original is lost.
        """
        before, written = self.checksums(), dict[str, Tensor]()
        kept = {name: value.data for name, value in self.tensors().items()}
        copying = _Copying(kept)
        try:
            with copying:
                yield written
        finally:
            with torch.inference_mode(False):
                for name, value in self.tensors().items():
                    own, copy = kept[name], copying.copies.get(name)
                    if copy is None and _place(value) == _place(own) and value.shape == own.shape:
                        continue
                    if not _same(value.data, own if copy is None else copy):
                        written[name] = value.data.clone()
                    if copy is not None:
                        own.copy_(copy)
                    value.data = own
        after = self.checksums()
        if odd := [name for name, found in before.items() if after[name] != found]:
            raise RuntimeError(f"{odd[0]} of the original was written over, and cannot be brought back")

    def put(self, exchange: Exchange) -> Exchange:
        """Exchange tensors and settings; the model's own stay where they are in memory.

        Args:
            exchange: What to put in their place; tensors are brought to the device and precision of the model's own.

        Returns:
            What was there: putting that ends the exchange.
        """
        if not exchange:
            return Exchange()
        kept = Exchange(
            {name: self._given(name) for name in exchange.tensors},
            {(name, key): getattr(self.modules[name], key) for name, key in exchange.settings},
            {name: self._function(name) for name in exchange.functions},
        )
        # Gradients can be taken through them, whatever surrounds this.
        with torch.inference_mode(False):
            for name, value in exchange.tensors.items():
                self._give(name, value)
        for (name, key), setting in exchange.settings.items():
            setattr(self.modules[name], key, setting)
        for name, function in exchange.functions.items():
            holder, key = self._holder(name)
            holder._modules[key] = function
        return kept

    def _given(self, name: str) -> Tensor:
        module, key = self._places[name]
        tensor: Tensor = getattr(module, key)
        return tensor if key in module._buffers else tensor.data

    def _give(self, name: str, value: Tensor) -> None:
        module, key = self._places[name]
        own: Tensor = getattr(module, key)
        placed = value.to(device=own.device, dtype=own.dtype)
        if key in module._buffers:
            # Another object: rotary embeddings exchange their buffers themselves while they run.
            module._buffers[key] = placed
        else:
            own.data = placed

    def _function(self, name: str) -> nn.Module:
        holder, key = self._holder(name)
        return holder.get_submodule(key)

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        outer, _, key = name.rpartition(".")
        return self.modules[outer], key

    def compare(self, other: nn.Module, growing: set[str]) -> Exchange:
        """What another model has otherwise.

        Args:
            other: A model of the same class, on the CPU, with nothing attached to it.
            growing: Names of tensors that may have more rows there.

        Raises:
            ValueError: It is of another structure, or has a setting that cannot be exchanged; names the first.
        """
        theirs = Original(other)
        if odd := sorted(set(self.modules) ^ set(theirs.modules)):
            raise ValueError(f"it is of another structure (first difference: {odd[0]})")
        tensors = theirs.tensors()
        found = Exchange(self._changed(tensors, growing))
        for name, module in self.modules.items():
            counterpart = theirs.modules[name]
            if type(module) is not type(counterpart):
                if any([*one.parameters()] or [*one.buffers()] for one in (module, counterpart)):
                    kinds = f"a {type(counterpart).__name__}, not a {type(module).__name__}"
                    raise ValueError(f"it is of another structure ({name or 'the model'} is {kinds})")
                found.functions[name] = counterpart
                continue
            before, after = self._settings[name], theirs._settings[name]
            for key in before | after:
                own, value = before.get(key), after.get(key)
                if not _equal(own, value):
                    if not _exchangeable(value):
                        raise ValueError(
                            f"its setting {name}.{key} is {value!r:.80}, the original's {own!r:.80}, and cannot be "
                            "exchanged"
                        )
                    found.settings[name, key] = value
            if any((name, key) in found.settings for key in after):
                # What a pass changes on this module (rotary embeddings that depend on the length) is each one's own.
                found.settings |= {(name, key): value for key, value in after.items() if _exchangeable(value)}
                names = [f"{name}.{key}".removeprefix(".") for key in counterpart._buffers]
                found.tensors |= {one: tensors[one] for one in names if one in tensors}
        return found

    def _changed(self, theirs: Mapping[str, Tensor], growing: set[str]) -> dict[str, Tensor]:
        own = self.tensors()
        if odd := sorted(set(own) ^ set(theirs)):
            raise ValueError(f"it is of another structure (first difference: {odd[0]})")
        changed = {}
        for name, value in theirs.items():
            if value.shape != own[name].shape and not (name in growing and grown(own[name], value)):
                sizes = f"{list(value.shape)}, not {list(own[name].shape)}"
                raise ValueError(f"it is of another structure (first difference: {name} has the shape {sizes})")
            if not _same(value.data, own[name].data.cpu()):
                changed[name] = value.data
        return changed


def differing(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entry → its value in one configuration and in another, of those that differ.

    Args:
        own: One, as a dictionary; what is in a part of it is called `part.entry`.
        theirs: The other.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**own, **theirs}:
        one, other = own.get(key), theirs.get(key)
        if key in _ORIGINS or one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            found |= {f"{key}.{inner}": values for inner, values in differing(one, other).items()}
        else:
            found[key] = (one, other)
    return found


def grown(own: Tensor | None, value: Tensor) -> bool:
    """Whether a tensor has more rows than the original's, and is as wide."""
    return own is not None and value.shape[1:] == own.shape[1:] and len(value) > len(own)


def checksum(tensor: Tensor) -> int:
    """A sum over all bytes of a tensor, weighted by their places, modulo 2^64: any one changed number changes it.

    Args:
        tensor: On any device, of any type; the sum is taken there.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = len(flat) // 8 * 8
    numbers = flat[:whole].view(torch.int64)
    weights = torch.arange(max(8, min(_CHUNK, len(numbers))), device=flat.device).mul_(2).add_(1).mul_(_ODD)
    total = flat[whole:].long().mul(weights[: len(flat) - whole]).sum()
    for at, chunk in enumerate(torch.split(numbers, _CHUNK)):
        total += chunk.mul(weights[: len(chunk)]).sum() * (2 * at + 1)
    return int(total)


class _Copying(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies a tensor before an operation writes over it.

    Args:
        tensors: Name → tensor to look after.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors = tensors
        self._names: dict[int, list[str]] = {}
        for name, value in tensors.items():
            self._names.setdefault(_place(value), []).append(name)
        self.copies: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = given.get(argument.name)
                for one in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(one, Tensor):
                        self._keep(one)
        return func(*args, **kwargs)

    def _keep(self, value: Tensor) -> None:
        if value.device.type != "meta":
            for name in self._names.get(_place(value), []):
                if name not in self.copies:
                    self.copies[name] = self._tensors[name].clone()


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _same(value: Tensor, other: Tensor) -> bool:
    return value.dtype == other.dtype and value.shape == other.shape and torch.equal(value, other)


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if key not in _HOUSEKEEPING and not isinstance(value, MethodType)
    }


def _equal(own: Any, value: Any) -> bool:
    if own is value:
        return True
    if isinstance(own, Tensor) and isinstance(value, Tensor):
        return _same(own.cpu(), value.cpu())
    if isinstance(own, PreTrainedConfig | GenerationConfig) and type(own) is type(value):
        return not differing(own.to_dict(), value.to_dict())
    if isinstance(own, FunctionType) and isinstance(value, FunctionType):
        return own.__code__ is value.__code__
    if isinstance(own, list | tuple) and isinstance(value, list | tuple):
        return len(own) == len(value) and all(map(_equal, own, value))
    if isinstance(own, dict) and isinstance(value, dict):
        return own.keys() == value.keys() and all(_equal(own[key], value[key]) for key in own)
    if own is None or value is None or isinstance(own, (*_PLAIN, set, frozenset)):
        return bool(own == value)
    if type(own) is not type(value):
        return False
    # Objects of a library, without a meaning of their own for `==`: as alike as what they hold when they are new.
    held, holds = getattr(own, "__dict__", {}), getattr(value, "__dict__", {})
    return all(_equal(held.get(key), one) for key, one in holds.items())


def _exchangeable(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_exchangeable, value))
    if isinstance(value, dict):
        return all(map(_exchangeable, value.values()))
    return value is None or isinstance(value, (*_PLAIN, Tensor, PreTrainedConfig, GenerationConfig))
