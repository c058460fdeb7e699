"""`conceptshift fit | validate | test | predict | sweep`: LightningCLI in subclass mode."""

from __future__ import annotations

import logging
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

# Importing the rooms makes their classes known by their short names.
from .. import callbacks, datamodules, lightning_modules  # noqa: F401
from .preflight import preflight

_SWEEP = """conceptshift sweep: steer a model in many ways over the same samples, and score each against the others.

It is `predict` with `--model SteeringSweep` (vectors, sites, strengths, controls; explained by `conceptshift sweep
--model.help SteeringSweep`) and the callback SweepScorer (targets, folder; docs/steering.md). Start from
configs/sweep_vqa.yaml or configs/sweep_caption.yaml. These are the options of `predict`:
"""


class ConceptShiftCLI(LightningCLI):
    """LightningCLI with this framework's defaults."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and check the checkpoint to resume from before anything reads it.

        Raises:
            ValueError: It is missing or damaged.
        """
        super().parse_arguments(parser, args)
        path = self.config[self.config["subcommand"]].get("ckpt_path")
        if path not in (None, "last", "best", "hpc") and not zipfile.is_zipfile(path):
            raise ValueError(f"--ckpt_path {path}: no checkpoint, or a damaged one; give a .ckpt file that `fit` wrote")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the defaults that differ from Lightning's."""
        parser.set_defaults({"trainer.enable_model_summary": False, "trainer.logger": False})
        parser.add_argument(
            "--preflight",
            action="store_true",
            help="Tell what the run will need of memory and disk, before any weight is read, and do not run.",
        )

    def _run_subcommand(self, subcommand: str) -> None:
        if self._get(self.config_init, "preflight"):
            preflight(subcommand, self.model, self.datamodule, self.trainer)
        else:
            super()._run_subcommand(subcommand)


class SaveSubcommandConfig(SaveConfigCallback):
    """Saves the configuration as `<subcommand>.yaml`, so that several runs can share a folder."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Name the file and save it beside the run's logs; a run without a logger has no folder for it."""
        if trainer.logger is not None:
            self.config_filename = f"{trainer.state.fn.value}.yaml" if trainer.state.fn else "config.yaml"
            super().setup(trainer, pl_module, stage)


def run(args: Sequence[str]) -> None:
    """Run one of Lightning's subcommands; `sweep` is `predict` with a SteeringSweep and a SweepScorer."""
    hush()
    subcommand = "predict" if args[0] == "sweep" else args[0]
    if args[0] == "sweep" and "--help" in args:
        print(_SWEEP)
    return_predictions = ["--return_predictions=false"] if subcommand == "predict" and "--help" not in args else []
    ConceptShiftCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        # The optimizer is an option of the module, which knows its trainable parameters.
        auto_configure_optimizers=False,
        parser_kwargs={"exit_on_error": False},
        save_config_callback=SaveSubcommandConfig,
        save_config_kwargs={"overwrite": True},
        args=[subcommand, *return_predictions, *args[1:]],
    )


def hush() -> None:
    """Leave out messages that no user of this framework can act on."""
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
    )
