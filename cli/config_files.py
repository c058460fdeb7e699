"""The `--config` files of a command, merged before anything is parsed: later ones win, and flags over all.

jsonargparse parses one file after the other. A second file that names one callback would drop the others; and where a
file changes a class, options that both classes have would stay, though nobody said them of the new one.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import get_loader

from ..records.paths import user_name, user_path

Config = dict[str, Any]

CLASS, OPTIONS = "class_path", "init_args"
_FLAG = re.compile(r"--(?P<key>[\w.+-]+?)(?:=(?P<value>.*))?$", re.DOTALL)
# Where classes are looked for that are given without their module.
_ROOMS = ("callbacks", "datamodules", "lightning_modules", "concepts")
_MODULES = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.strategies", "torch.optim")


def merge_configs(arguments: Sequence[str]) -> tuple[Config, list[str]]:
    """Read the `--config` files among the arguments of a command, and merge them.

    Args:
        arguments: Flags of the command.

    Returns:
        What the files say together, without the options of classes that a flag exchanges for another; and the flags.

    Raises:
        ValueError: A file is missing, no YAML, or says something twice; names it.
    """
    config: Config = {}
    flags: list[str] = []
    given = iter(arguments)
    for argument in given:
        name, has_value, value = argument.partition("=")
        if name in ("--config", "-c"):
            config = merged(config, read_config(value if has_value else next(given, "")))
        else:
            flags.append(argument)
    for key, value in _values(flags):
        _exchange_class(config, key.removesuffix(f".{CLASS}"), value)
    _check_names(config.get("callbacks"), flags)
    return config, flags


def read_config(given: str) -> Config:
    """Read one file.

    Raises:
        ValueError: It is missing, no YAML, no mapping, or has a key twice.
    """
    path = user_path(given)
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_twice(yaml.compose(text, Loader=yaml.SafeLoader), str(path))
        content = get_loader("yaml")(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"--config {given}: cannot be read ({reason}); give a YAML file") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = "" if place is None else f", line {place.line + 1}"
        raise ValueError(f"--config {given}{where}: malformed YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {given}: expected keys such as `model:` and `data:`, got {type(content).__name__}")
    return dict(_home(content))


def merged(earlier: Config, later: Mapping[str, Any]) -> Config:
    """Two configurations as one: what the later one says wins, and what it does not say stays.

    Options of a class stay only where the class does. A list is replaced, unless its key ends in `+`; so is the value
    of an option that is a dictionary itself.
    """
    return _merged(earlier, later, None)


def _merged(earlier: Mapping[str, Any], later: Mapping[str, Any], of_class: str | None) -> Config:
    result = dict(earlier)
    for key, value in later.items():
        before = result.get(key)
        if key.endswith("+") and isinstance(value, list):
            before = result.get(key[:-1]) or []
            result[key[:-1]] = [*(before if isinstance(before, list) else [before]), *value]
        elif isinstance(before, dict) and isinstance(value, dict) and not _is_dictionary(of_class, key):
            result[key] = _merged_value(before, value)
        else:
            result[key] = value
    return result


def _merged_value(before: Config, value: Config) -> Config:
    if CLASS in before and CLASS in value and not same_class(before[CLASS], value[CLASS]):
        return value
    result = _merged(before, {name: part for name, part in value.items() if name != OPTIONS}, None)
    if OPTIONS in value:
        result[OPTIONS] = _merged(before.get(OPTIONS) or {}, value[OPTIONS] or {}, result.get(CLASS))
    return result


def same_class(one: str, other: str) -> bool:
    """Whether two class paths name the same class, one of them perhaps without its module."""
    if one == other:
        return True
    if one.rpartition(".")[2] != other.rpartition(".")[2]:
        return False
    found = [find_class(path) for path in (one, other)]
    return found[0] is found[1]


def find_class(path: Any) -> Any:
    """The class that a class path names; nothing where there is none, of which parsing will tell."""
    if not isinstance(path, str):
        return None
    module, _, name = path.rpartition(".")
    package = (__package__ or "").rpartition(".")[0]
    modules = [module] if module else [*(f"{package}.{room}" for room in _ROOMS), *_MODULES]
    for candidate in modules:
        try:
            found = getattr(importlib.import_module(candidate), name, None)
        except (ImportError, ValueError):
            continue
        if found is not None:
            return found
    return None


def _is_dictionary(of_class: str | None, option: str) -> bool:
    """Whether an option of a class is a dictionary of any keys, and not a structure with some of its own."""
    found = find_class(of_class)
    parameters = {} if found is None else inspect.signature(found).parameters
    annotation = str(parameters[option].annotation) if option in parameters else ""
    return re.search(r"\b[Dd]ict\[|\bMapping\[", annotation) is not None


def _check_names(callbacks: Any, flags: Sequence[str]) -> None:
    """Refuse options of a callback that nobody has said the class of: its name is misspelled, most likely."""
    callbacks = callbacks if isinstance(callbacks, dict) else {}
    given = {key: value for key, value in _values(flags) if key.startswith("callbacks.")}
    names = dict.fromkeys([*callbacks, *(key.split(".")[1] for key in given)])
    known = [
        name
        for name in names
        if (isinstance(callbacks.get(name), dict) and CLASS in callbacks[name])
        or {f"callbacks.{name}", f"callbacks.{name}.{CLASS}"} & given.keys()
    ]
    for name in names:
        if name not in known and callbacks.get(name, {}) is not None and name != "help":
            raise ValueError(
                f"callbacks.{name}: there is no callback of that name, only {', '.join(known) or 'none'}; give it a "
                f"class (--callbacks.{name} CLASS), or mend the name"
            )


# --- flags ----------------------------------------------------------------------------------------------------


def flag_values(flags: Sequence[str], key: str) -> list[str]:
    """What the flags give for a key, in their order."""
    return [value for name, value in _values(flags) if name == key]


def _values(flags: Sequence[str]) -> list[tuple[str, str]]:
    """Key and value of each flag that has one."""
    found = []
    for place, flag in enumerate(flags):
        match = _FLAG.match(flag)
        if match is None:
            continue
        value, following = match["value"], flags[place + 1] if place + 1 < len(flags) else None
        if value is None and following is not None and not following.startswith("--"):
            value = following
        if value is not None:
            found.append((match["key"], value))
    return found


def _exchange_class(config: Config, key: str, value: str) -> None:
    """Where a flag gives a class in place of another, forget the other with its options."""
    *path, last = key.split(".")
    holder: Any = config
    for name in path:
        holder = _within(holder, name)
    holder = _holding(holder, last)
    spec = holder.get(last) if isinstance(holder, dict) else None
    is_name = re.fullmatch(r"[A-Za-z_][\w.]*", value) is not None and value not in ("null", "true", "false")
    if isinstance(spec, dict) and CLASS in spec and is_name and not same_class(spec[CLASS], value):
        del holder[last]


def _within(holder: Any, name: str) -> Any:
    """What a key leads to; `init_args` may be left out."""
    holder = _holding(holder, name)
    return holder.get(name) if isinstance(holder, dict) else None


def _holding(holder: Any, name: str) -> Any:
    if isinstance(holder, dict) and name not in holder and isinstance(holder.get(OPTIONS), dict):
        return holder[OPTIONS]
    return holder


# --- paths ----------------------------------------------------------------------------------------------------


def _home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _home(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_home(part) for part in value]
    return user_name(value) if isinstance(value, str) else value


# --- what is said twice ---------------------------------------------------------------------------------------


def _refuse_twice(node: Any, path: str) -> None:
    """YAML takes the last of two equal keys; here that would be a callback, or half of the model, without a word."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen and key.value != "<<":
                raise ValueError(
                    f"--config {path}, line {line}: `{key.value}` stands already in line {seen[key.value]}; a key can "
                    "be given once"
                )
            seen[str(key.value)] = line
            _refuse_twice(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, path)


def as_argument(config: Mapping[str, Any]) -> str:
    """A configuration as a flag; JSON is YAML, of a line."""
    return f"--config={json.dumps(config)}"
