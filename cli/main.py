"""Entry point of `conceptshift`."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence

from ..records.paths import user_flag
from ..records.provenance import commanded

# Command → module in this package with `run(args)`, and what the overview says of it. Modules are imported when
# their command is called, so that `conceptshift --help` answers at once.
COMMANDS = {
    "fit": ("lightning_cli", "fine-tune a model (LoRA or full), or train one from scratch"),
    "validate": ("lightning_cli", "generate captions or answers and score them, steered or not"),
    "test": ("lightning_cli", "the same on the test split"),
    "predict": ("lightning_cli", "extract hidden states; fit dictionaries, measure shift, make steering vectors"),
    "sweep": ("lightning_cli", "steer a model in many ways over the same samples, and score each against the others"),
    "import-features": ("import_features", "make a feature store of hidden states that XL-VLMs saved"),
    "export-steered": ("export_steered", "save a steered model as an ordinary one"),
    "export-vector": ("export_vector", "write a steering vector as a control vector of llama.cpp"),
    "explain": ("explain", "show which concepts a picture activates, and where in it they are"),
    "lens": ("lens", "show in pages what every layer decodes at every patch of pictures, of several models at once"),
    "mean-token": ("mean_token", "average visual tokens over pictures, and find directions of the objects in them"),
    "shapes": ("shapes", "generate the embedded data set"),
    "shapes-model": ("shapes_model", "write a small untrained model for it"),
    "report": ("report", "write the HTML report of a run folder"),
    "architectures": ("architectures", "list the architectures of transformers, and which of their parts are found"),
    "sites": ("sites", "list the sites of a model"),
    "demo": ("demo", "run the whole job on the embedded data set and write a report"),
}
# How jsonargparse tells what else it tried, and what it was given.
_NOISE = (
    "Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>", "Expected a path but",
    "Not a valid subclass", "Subclass types", "a class path (str)", "a dict with",
)  # fmt: skip


def overview() -> str:
    """What `conceptshift --help` prints."""
    rows = "\n".join(f"  {name:<17}{text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: conceptshift COMMAND [options]\n\nWhat fine-tuning does to a vision-language model.\n\n"
        f"{rows}\n\n`conceptshift COMMAND --help` explains one."
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 2 unusable input)."""
    arguments = [user_flag(word) for word in (sys.argv[1:] if args is None else args)]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] not in COMMANDS:
        print(f"conceptshift: no command {arguments[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # What it says when it is imported is of kernels that are not needed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    command = importlib.import_module(f".{COMMANDS[arguments[0]][0]}", __package__)
    try:
        with commanded(arguments):
            command.run(arguments)
    except (ValueError, TypeError, OSError, ArgumentError) as error:
        if os.environ.get("CONCEPTSHIFT_TRACEBACK"):
            raise
        print(f"conceptshift: {_one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def _one_line(message: str) -> str:
    """What matters in an error's message of several lines."""
    given = [line for line in message.splitlines() if line.strip()] or ["failed"]
    lines = [line.strip().removeprefix("- ") for line in given]
    if any(line.startswith(("Parser key", "Given value")) for line in lines):
        return _innermost(lines, [len(line) - len(line.lstrip()) for line in given])
    if lines[0].startswith("Problems parsing config"):
        return " ".join(lines)
    # A loader process wraps an error in its traceback; the last line is the error itself, behind its class.
    return re.sub(r"^[\w.]+Error: ", "", lines[-1])


def _innermost(lines: Sequence[str], depths: Sequence[int]) -> str:
    """The deepest reason in what jsonargparse tells of everything that it tried, behind the keys that lead there."""
    is_reason = [not line.startswith(_NOISE) for line in lines]
    at = max(range(len(lines)), key=lambda line: (is_reason[line], depths[line], -line))
    chain, depth = [lines[at]], depths[at]
    for line in range(at - 1, -1, -1):
        if depths[line] < depth:
            depth = depths[line]
            chain += [lines[line]] if is_reason[line] else []
    return re.sub(r"Parser key \"(.+?)\":|Problem with given class_path '(.+?)':", r"\1\2:", " ".join(reversed(chain)))
