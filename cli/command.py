"""Turns a function into a command: options from its signature, help from its docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from jsonargparse import auto_cli


def run_command(function: Callable[..., None], args: Sequence[str]) -> None:
    """Run a function with the options in `args`, whose first word is the command's name."""
    name, *options = args
    # Of itself jsonargparse shows the first line only.
    description = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")[0]
    auto_cli(
        function,
        args=options,
        as_positional=False,
        prog=f"conceptshift {name}",
        description=description,
        exit_on_error=False,
    )
