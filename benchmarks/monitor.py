"""What watching concept shift costs: the same fine-tuning with and without ShiftMonitor, in one run.

    conceptshift shapes --out data/shapes --images 4000
    python benchmarks/monitor.py --json monitor.json     # 300 steps of LoRA, twice; ten minutes on two cores
    python benchmarks/monitor.py --full                  # the same with all weights

Everything counts: reading the probe set, the original's dictionary, the probes, and the tests and figures at the end.
Where others use the machine, the ratio of processor time tells more than that of seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from conceptshift.callbacks import GroundingOptions, ShiftMonitor
from conceptshift.concepts import KMeans
from conceptshift.datamodules import CaptionDataModule
from conceptshift.lightning_modules import FineTuning
from conceptshift.lightning_modules.finetuning import LoraOptions
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "shapes-llava"


def train(options: argparse.Namespace, steps: int, folder: Path, watched: bool) -> tuple[float, float, float]:
    """Fine-tune and return the seconds that it took, those of the processors, and the loss of the last step."""
    L.seed_everything(0, verbose=False)
    callbacks: list[Callback] = []
    if watched:
        probed = CaptionDataModule(options.data, predict_split="train", reference_words=["circle"], batch_size=64)
        callbacks.append(
            ShiftMonitor(
                probed, "lm.block.5", "token_of_interest:circle", KMeans(10), str(folder / "shift" / "circle"),
                every_n_steps=options.every, samples=options.samples, grounding=GroundingOptions(candidates=15),
            )
        )  # fmt: skip
    logger = TensorBoardLogger(str(folder), name="", version="")
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, limit_val_batches=0, callbacks=callbacks, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, logger=logger,
    )  # fmt: skip
    optimizer: Any = partial(torch.optim.AdamW, lr=1e-3 if not options.full else 1e-5)
    module = FineTuning(str(MODEL), lora=None if options.full else LoraOptions(), optimizer=optimizer)
    data = CaptionDataModule(options.data, caption_words="colors", batch_size=options.batch_size)
    start, used = time.perf_counter(), time.process_time()
    trainer.fit(module, data)
    took = time.perf_counter() - start, time.process_time() - used
    return *took, float(trainer.callback_metrics["loss/train"])


def main() -> None:
    """Train once to warm up, then with and without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/shapes", help="Shapes folder")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=32, help="captions per step")
    parser.add_argument("--every", type=int, default=100, help="steps between two probes (default: the callback's)")
    parser.add_argument("--samples", type=int, default=256, help="samples per probe (default: the callback's)")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        train(options, 2, Path(folder) / "warm", watched=True)
        plain, plain_used, loss = train(options, options.steps, Path(folder) / "plain", watched=False)
        watched, watched_used, loss_watched = train(options, options.steps, Path(folder) / "watched", watched=True)
    assert loss == loss_watched, "the training must not notice that it is watched"
    figures = {
        "what": "full fine-tuning" if options.full else "LoRA", "steps": options.steps, "batch": options.batch_size,
        "every": options.every, "samples": options.samples, "seconds": round(plain, 1),
        "seconds watched": round(watched, 1), "ratio": round(watched / plain, 3),
        "ratio of processor time": round(watched_used / plain_used, 3), "cores": os.cpu_count(),
        "torch": torch.__version__,
    }  # fmt: skip
    print(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
