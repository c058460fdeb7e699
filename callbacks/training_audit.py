"""Shows what a fine-tuning run trains, and stops it where something is trained in vain."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn import Parameter
from torch.optim import Optimizer

from ..lightning_modules import FineTuning
from ..lightning_modules.backbone.parts import PARTS, Part, enclosing, part_finder
from ..records.files import write_json
from .parts.figures import tensorboard
from .parts.numbers import log_numbers
from .parts.processes import SHARDING, gather
from .parts.run_writer import RunWriter

# After so many backward passes behind the first step, zero gradients are no accident: a gradient scaler skips fewer.
_PASSES = 10


@dataclass
class PartAudit:
    """What is trained of one part of a model.

    Attributes:
        modules: Kind of module → how many of them have trained parameters, or an adapter.
        trainable: Number of trainable parameters.
        parameters: Number of all parameters, with those of an adapter.
    """

    modules: Counter[str] = field(default_factory=Counter)
    trainable: int = 0
    parameters: int = 0


class TrainingAudit(RunWriter):
    """Prints what is trained as `fit` starts, and stops the run if a trainable parameter gets no gradient.

    The table has, for each part of the model, the kinds of modules that are trained or adapted, with their number, and
    the trainable share of the parameters; TensorBoard has it too, as a text. Then gradients are looked at. A parameter
    without any after the first backward pass is an error; so is one whose gradient has been exactly zero ten passes
    after the first step, or when training ends. (Before its first step LoRA's A has no other gradient: B is still 0.
    Steps with a learning rate of 0, as at the beginning of a warm-up, do not count.) With several processes a parameter
    counts as used if one of them uses it. Strategies that shard parameters are not audited.

    Args:
        out: JSON file to write the table to; by default `training_audit.json` in the run's folder, if it has one.
    """

    place = "training_audit.json"

    def __init__(self, out: str | None = None) -> None:
        super().__init__(out)
        self._watching = False
        self._unused: dict[str, Parameter] = {}
        self._stepped = False
        self._passes = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show what is trained."""
        if not isinstance(pl_module, FineTuning):
            raise TypeError(f"TrainingAudit audits a FineTuning module, got {type(pl_module).__name__}")
        self.locate(trainer, required=False)
        self._watching = not isinstance(trainer.strategy, SHARDING)
        if not self._watching:
            rank_zero_warn(
                f"TrainingAudit: {type(trainer.strategy).__name__} shards parameters and their gradients, which "
                "cannot be judged; audit a few steps on one device instead"
            )
            return
        model = pl_module.backbone.model
        self._unused = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._stepped, self._passes = False, 0
        if trainer.is_global_zero:
            self._show(trainer, audit(model), "trained modules" if pl_module.lora is None else "adapted modules")

    def _show(self, trainer: L.Trainer, rows: dict[Part, PartAudit], title: str) -> None:
        text = audit_table(rows, title)
        print(f"\n{text}\n", flush=True)
        log_numbers(trainer, {f"trainable_parameters/{part}": row.trainable for part, row in rows.items()})
        if (writer := tensorboard(trainer)) is not None:
            # Markdown takes lines behind four spaces as they are.
            writer.add_text("training_audit", "\n".join(f"    {line}" for line in text.splitlines()))
        if self.writes_at_all:
            write_json(self.out, {part: vars(row) for part, row in rows.items()})

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the gradients."""
        if not self._watching:
            return
        if not self._stepped and self._passes == 0:
            self._judge(pl_module, [name for name, value in self._unused.items() if value.grad is None], "no gradient")
        self._unused = {
            name: value for name, value in self._unused.items() if value.grad is None or not value.grad.any()
        }
        self._passes += 1
        if self._stepped and self._passes == _PASSES:
            self._finish(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Count passes from the first step on that changes anything."""
        if self._watching and not self._stepped and any(group["lr"] > 0 for group in optimizer.param_groups):
            self._stepped, self._passes = True, 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge a short run by the passes that it had."""
        if self._watching and self._stepped and self._passes > 0:
            self._finish(pl_module)

    def _finish(self, pl_module: L.LightningModule) -> None:
        self._watching = False
        self._judge(pl_module, list(self._unused), "a gradient of exactly zero")

    def _judge(self, pl_module: L.LightningModule, names: list[str], what: str) -> None:
        """Stop all processes if there are parameters that none of them uses."""
        assert isinstance(pl_module, FineTuning)
        unused = set.intersection(*(set(of_process) for of_process in gather([names])))
        if not unused:
            return
        trainable = [name for name, value in pl_module.backbone.model.named_parameters() if value.requires_grad]
        modules = list(dict.fromkeys(_module(name) for name in trainable if name in unused))
        patterns = json.dumps([*pl_module.frozen, *freeze_patterns(trainable, unused)])
        raise ValueError(
            f"{len(unused)} of {len(trainable)} trainable parameters get {what}: those of {', '.join(modules[:3])}"
            f"{', …' if len(modules) > 3 else ''}; leave them out with '--model.init_args.freeze={patterns}'"
        )


def audit(model: Any) -> dict[Part, PartAudit]:
    """Count what is trained of each part.

    Args:
        model: The transformers model, with an adapter where one is trained.
    """
    part = part_finder(model)
    rows: dict[Part, PartAudit] = {part: PartAudit() for part in PARTS}
    trained: dict[str, Part] = {}
    for name, parameter in model.named_parameters():
        row = rows[part(name)]
        row.parameters += parameter.numel()
        if parameter.requires_grad:
            row.trainable += parameter.numel()
            trained[_module(name)] = part(name)
    for module, owner in trained.items():
        rows[owner].modules[_kind(module)] += 1
    return rows


def audit_table(rows: Mapping[Part, PartAudit], title: str) -> str:
    """Lay out an audit as aligned text.

    Args:
        rows: The audit.
        title: What the column of modules is called.
    """
    total = PartAudit(
        trainable=sum(row.trainable for row in rows.values()), parameters=sum(row.parameters for row in rows.values())
    )
    table = [("part", "trainable", "parameters", "share", title)]
    for name, row in (*rows.items(), ("all", total)):
        share = f"{row.trainable / row.parameters:.2%}" if row.parameters else ""
        modules = ", ".join(f"{kind} × {count}" for kind, count in row.modules.items())
        table.append((name, f"{row.trainable:,}", f"{row.parameters:,}", share, modules))
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    lines = []
    for name, *numbers, modules in table:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells, modules]).rstrip())
    return "\n".join(lines)


def freeze_patterns(trainable: Collection[str], unused: Collection[str]) -> list[str]:
    """The outermost modules of which nothing is used.

    Args:
        trainable: Names of the trainable parameters.
        unused: Those among them that get no gradient.
    """
    used = {outer for name in trainable if name not in unused for outer in enclosing(_freezable(name))}
    found: dict[str, None] = {}
    for name in trainable:
        if name in unused:
            outside_in = reversed(list(enclosing(_freezable(name)))[:-1])
            found[next((outer for outer in outside_in if outer not in used), _freezable(name))] = None
    return list(found)


def _freezable(name: str) -> str:
    """What `freeze` can name: of an adapter's parameter the module that it adapts."""
    return name.split(".lora_")[0]


def _module(name: str) -> str:
    """The module that a parameter belongs to, or that an adapter's parameter adapts."""
    return _freezable(name) if ".lora_" in name else name.rpartition(".")[0]


def _kind(module: str) -> str:
    """`q_proj` of `model.layers.3.q_proj`; `mlp.0` where the last part of the name is a number."""
    outer, _, last = module.rpartition(".")
    return f"{outer.rpartition('.')[2]}.{last}" if last.isdigit() else last
