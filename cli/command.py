"""Turns a function into a command: options from its signature, help from its docstring."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jsonargparse import auto_cli


def run_command(function: Callable[..., None], args: Sequence[str]) -> None:
    """Run a function with the options in `args`, whose first word is the command's name."""
    name, *options = args
    auto_cli(function, args=options, as_positional=False, prog=f"conceptshift {name}", exit_on_error=False)
