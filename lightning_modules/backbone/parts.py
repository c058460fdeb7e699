"""The parts of a vision-language model that are adapted or left as they are, found by role."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import nn

from .sites import find_sites
from .structure import Structure

Part = Literal["vision_tower", "projector", "language_model"]
"""`vision_tower`: the image encoder. `language_model`: the decoder with its embeddings and the unembedding.
`projector`: everything else."""

PARTS: tuple[Part, ...] = get_args(Part)


def part_finder(model: Any) -> Callable[[str], Part]:
    """How to tell the part that a module or parameter belongs to from its name.

    Args:
        model: The transformers model, with or without an adapter.
    """
    structure = Structure(model)
    names = {id(module): name for name, module in model.named_modules()}
    language = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    owners: dict[str, Part] = {names[id(module)]: "language_model" for module in language if module is not None}
    if structure.image_encoder is not None:
        owners[names[id(structure.image_encoder)]] = "vision_tower"
    # One may lie in the other: the innermost owner decides.
    return lambda name: next((owners[outer] for outer in enclosing(name) if outer in owners), "projector")


def enclosing(name: str) -> Iterator[str]:
    """The name itself, then those of the modules around it, from the inside out; the last is the whole model."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def lora_targets(
    model: Any, parts: Sequence[Part], names: Sequence[str] | None = None, freeze: Sequence[str] = ()
) -> list[str]:
    """Names of the modules that LoRA adapts.

    Args:
        model: The transformers model.
        parts: Parts whose linear layers it adapts; of the language model only those in its blocks, never the
            unembedding.
        names: Names or name endings of modules to adapt instead.
        freeze: Names or `*` wildcards of modules to leave out.

    Raises:
        ValueError: A part has no linear layers, a name or wildcard matches nothing, or nothing is left.
    """
    modules, frozen = dict(model.named_modules()), frozen_finder(model, freeze)
    if names is None:
        part, blocks = part_finder(model), {id(module) for module in Structure(model).blocks.modules()}
        owners = {
            name: part(name)
            for name, module in modules.items()
            if isinstance(module, nn.Linear) and (part(name) != "language_model" or id(module) in blocks)
        }
        _check_present(model, parts, set(owners.values()), "linear layers")
        found = [name for name, owner in owners.items() if owner in parts]
    else:
        found = [name for name in modules if any(f".{name}".endswith(f".{ending}") for ending in names)]
        for ending in names:
            if not any(f".{name}".endswith(f".{ending}") for name in found):
                raise ValueError(
                    f"--model.init_args.lora.target_modules: {ending!r} matches no module of {type(model).__name__}, "
                    f"which has {_example(model)} and the like"
                )
    kept = [name for name in found if not frozen(name)]
    if not kept:
        raise ValueError("--model.init_args.freeze leaves out every module that LoRA would adapt; leave out fewer")
    return kept


def train_only(model: Any, parts: Sequence[Part] | None, freeze: Sequence[str] = ()) -> None:
    """Freeze all parameters but those of some parts.

    Args:
        model: The transformers model.
        parts: Parts to train; all by default.
        freeze: Names or `*` wildcards of modules or parameters to freeze all the same.

    Raises:
        ValueError: A part has no parameters, or a wildcard matches nothing.
    """
    part, frozen = part_finder(model), frozen_finder(model, freeze)
    # With duplicates: tied weights are frozen by either of their names.
    owners = {name: part(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    if parts is not None:
        _check_present(model, parts, set(owners.values()), "parameters")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if frozen(name) or (parts is not None and owners[name] not in parts):
            parameter.requires_grad_(False)


def frozen_finder(model: Any, patterns: Sequence[str]) -> Callable[[str], bool]:
    """How to tell whether a module or parameter is frozen: a pattern matches it, or a module around it.

    Args:
        model: The transformers model.
        patterns: Names or `*` wildcards of modules or parameters.

    Raises:
        ValueError: A pattern matches nothing.
    """
    named = [*model.named_modules(), *model.named_parameters(remove_duplicate=False)]
    frozen: set[str] = set()
    for pattern in patterns:
        matched = {name for name, _ in named if name and fnmatchcase(name, pattern)}
        if not matched:
            raise ValueError(
                f"--model.init_args.freeze: {pattern!r} matches no module or parameter of {type(model).__name__}, "
                f"which has {_example(model)} and the like"
            )
        frozen |= matched
    return lambda name: any(outer in frozen for outer in enclosing(name))


def _check_present(model: Any, parts: Sequence[Part], present: set[Part], what: str) -> None:
    for part in parts:
        if part not in present:
            having = ", ".join(other for other in PARTS if other in present) or "none of them"
            raise ValueError(
                f"--model.init_args.parts: the {part} of {type(model).__name__} has no {what}; choose among {having}"
            )


def _example(model: Any) -> str:
    """The name that a block has in this model."""
    block = next(iter(find_sites(Structure(model)).values())).module
    return str(next(name for name, module in model.named_modules() if module is block))
