"""Loggers of a run: where they write, and the hyper-parameters that they are given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from .config_files import CLASS, OPTIONS, Config, find_class, flag_values

LOGS = "logs"
"""Where in the folder of a run its loggers write."""

_FOLDER = "save_dir"
# What of a configuration tells one run from another.
_TOLD = ("seed_everything", "model", "data", "trainer", "callbacks")


def logger_folder(config: Config, flags: Sequence[str]) -> list[str]:
    """Let loggers that were told no folder of their own write into the run's.

    Args:
        config: Merged configuration; loggers in it get their folder.
        flags: Flags of the command.

    Returns:
        Flags that give the folder to a logger that is named by a flag.
    """
    out = next(iter(flag_values(flags, "out")[-1:]), config.get("out"))
    if out is None:
        return []
    folder = f"{out}/{LOGS}"
    given = config.get("trainer", {}).get("logger") if isinstance(config.get("trainer"), dict) else None
    for logger in given if isinstance(given, list) else [given]:
        if isinstance(logger, dict) and CLASS in logger and _takes_folder(logger[CLASS]):
            options = logger.setdefault(OPTIONS, {}) or {}
            if _FOLDER not in options:
                logger[OPTIONS] = {_FOLDER: folder, **options}
    named = [*flag_values(flags, "trainer.logger"), *flag_values(flags, f"trainer.logger.{CLASS}")][-1:]
    told = any(flag_values(flags, f"trainer.logger.{key}") for key in (_FOLDER, f"{OPTIONS}.{_FOLDER}"))
    return [f"--trainer.logger.{OPTIONS}.{_FOLDER}={folder}"] if named and not told and _takes_folder(named[0]) else []


def without_folder(config: Config) -> Config:
    """A configuration whose loggers have no folder but the run's, so that it can be run into another."""
    given = (config.get("trainer") or {}).get("logger")
    for logger in given if isinstance(given, list) else [given]:
        options = logger.get(OPTIONS) if isinstance(logger, dict) else None
        if options and options.get(_FOLDER) == f"{config.get('out')}/{LOGS}":
            del options[_FOLDER]
    return config


def _takes_folder(path: Any) -> bool:
    found = find_class(path)
    return found is not None and _FOLDER in inspect.signature(found).parameters


def hyper_parameters(config: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The options of a run, flat: `model.lora.rank`; without what leads to others, and what nobody has set."""
    return _flat({name: config[name] for name in _TOLD if name in config}, "")


def _flat(value: Any, name: str) -> dict[str, str | int | float | bool]:
    if isinstance(value, Mapping):
        flat: dict[str, str | int | float | bool] = {}
        for key, part in value.items():
            flat |= _flat(part, name if key == OPTIONS else f"{name}.{key}".lstrip("."))
        return flat
    if isinstance(value, str | int | float | bool):
        return {name: value}
    return {} if value is None else {name: str(value)}


def log_hyper_parameters(logger: Logger, parameters: dict[str, Any]) -> None:
    """Give a logger the hyper-parameters of a run.

    TensorBoard's are written so that it finds the scores beside them itself; Lightning would name one that no run has.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(parameters, metrics={})
        _, session_start, _ = hparams(parameters, {})  # type: ignore[no-untyped-call]
        logger.experiment._get_file_writer().add_summary(session_start)
    else:
        logger.log_hyperparams(parameters)
