"""`conceptshift fit | validate | test | predict | sweep`: LightningCLI in subclass mode."""

from __future__ import annotations

import logging
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

# Importing the rooms makes their classes known by their short names.
from .. import callbacks, datamodules, lightning_modules  # noqa: F401
from ..callbacks.parts.run_description import left_out
from ..callbacks.parts.run_writer import RunWriter, run_folder, trial_place
from ..lightning_modules import BackboneModule
from ..records.files import write_whole
from ..records.paths import check_writable, user_path
from .config_files import as_argument, merge_configs
from .preflight import preflight
from .run_loggers import LOGS, hyper_parameters, log_hyper_parameters, logger_folder, without_folder

_SWEEP = """conceptshift sweep: steer a model in many ways over the same samples, and score each against the others.

It is `predict` with `--model SteeringSweep` (vectors, sites, strengths, controls; explained by `conceptshift sweep
--model.help SteeringSweep`) and the callback SweepScorer (targets, folder; docs/steering.md). Start from
configs/sweep_vqa.yaml or configs/sweep_caption.yaml. These are the options of `predict`:
"""


class ConceptShiftCLI(LightningCLI):
    """LightningCLI with a folder for each run, callbacks by name, and this framework's defaults."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Merge the `--config` files, parse, and check the checkpoint to resume from before anything reads it.

        Raises:
            ValueError: A file or the checkpoint is missing or damaged.
        """
        super().parse_arguments(parser, _with_one_config(args) if isinstance(args, list) else args)
        path = self.config[self.config["subcommand"]].get("ckpt_path")
        if path not in (None, "last", "best", "hpc") and not zipfile.is_zipfile(path):
            raise ValueError(f"--ckpt_path {path}: no checkpoint, or a damaged one; give a .ckpt file that `fit` wrote")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of this framework, and set the defaults that differ from Lightning's."""
        parser.set_defaults({"trainer.enable_model_summary": False, "trainer.logger": False})
        parser.add_argument(
            "--out",
            type=str | None,
            default=None,
            help="Folder of the run: everything that it writes lies in it, unless a callback is told otherwise.",
        )
        parser.add_argument(
            "--callbacks",
            type=dict[str, Callback | None],
            default={},
            help="Callbacks by names of your own, in their order; flags and later files change one by its name "
            "(--callbacks.NAME.init_args.OPTION VALUE), or leave it out (--callbacks.NAME null).",
        )
        parser.add_argument(
            "--preflight",
            action="store_true",
            help="Tell what the run will need of memory and disk, before any weight is read, and do not run.",
        )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the Trainer, with the callbacks by their names and everything in the run's folder.

        Raises:
            ValueError: The folder cannot be written.
        """
        config = dict(self._get(self.config_init, "trainer"))
        named: dict[str, Callback] = {
            name: callback for name, callback in (self._get(self.config_init, "callbacks") or {}).items() if callback
        }
        for name, callback in named.items():
            if isinstance(callback, RunWriter):
                callback.name = name
        out = _folder_of_run(self._get(self.config, "out"), config, str(self.subcommand))
        listed = config.get("callbacks") or []
        together = [*(listed if isinstance(listed, list) else [listed]), *named.values()]
        if out is not None:
            config["default_root_dir"] = str(out)
            for callback in together:
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                    callback.dirpath = str(out)
            config["logger"] = _with_folder(config.get("logger"), out)
        return self._instantiate_trainer({**config, **kwargs, "callbacks": together}, [])

    def _run_subcommand(self, subcommand: str) -> None:
        if isinstance(self.model, BackboneModule):
            self.model.check_places()
        if self._get(self.config_init, "preflight"):
            preflight(subcommand, self.model, self.datamodule, self.trainer)
        else:
            super()._run_subcommand(subcommand)


def _with_one_config(arguments: list[str]) -> list[str]:
    """Arguments of Lightning's parser, whose first is the subcommand, with all `--config` files as one."""
    subcommand, *rest = arguments
    config, flags = merge_configs(rest)
    flags += logger_folder(config, flags)
    return [subcommand, *([as_argument(config)] if config else []), *flags]


def _folder_of_run(given: str | None, trainer: dict[str, Any], subcommand: str) -> Path | None:
    """The folder of a run; one that leaves something out writes beside what is there from another."""
    root = trainer.get("default_root_dir")
    if given is not None and root is not None and user_path(given) != user_path(root):
        raise ValueError(f"--out {given} and --trainer.default_root_dir {root} are the same thing; give one of them")
    if given is None and root is None:
        return None
    out = user_path(given or str(root))
    less = left_out(trainer, TrainerFn(subcommand))
    if less and ("fast_dev_run" in less or (out.is_dir() and any(out.iterdir()))):
        out = trial_place(out)
        told = ", ".join(f"--trainer.{name} {value}" for name, value in less.items())
        rank_zero_warn(f"--out: {told} leaves something out of the run, so that it writes to {out} instead")
    check_writable(out, "--out")
    return out


def _with_folder(logger: Any, out: Path) -> Any:
    """A logger that was asked for by `true` is TensorBoard's, with a run of its own each time."""
    return TensorBoardLogger(str(out), name=LOGS) if logger is True else logger


class RunRecord(SaveConfigCallback):
    """Saves the configuration as `<subcommand>.yaml`, and gives it to the loggers as hyper-parameters."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save beside the run's logs; without a logger in the run's folder, if it has one."""
        # Asks all processes.
        folder = Path(trainer.log_dir or ".") if trainer.loggers else run_folder(trainer)
        if self.already_saved or folder is None or not trainer.is_global_zero:
            return
        self.already_saved = True
        content = yaml.safe_load(self.parser.dump(self.config, skip_validation=True))
        name = trainer.state.fn.value if trainer.state.fn else "config"
        text = yaml.safe_dump(without_folder(content), sort_keys=False)
        write_whole(folder / f"{name}.yaml", lambda working: working.write_text(text, encoding="utf-8"))
        parameters = hyper_parameters(content)
        for logger in trainer.loggers:
            log_hyper_parameters(logger, parameters)


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
        save_config_callback=RunRecord,
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
