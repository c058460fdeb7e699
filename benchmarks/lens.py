"""What a page of the logit lens costs: beside the norm, unembedding and top-k that it cannot avoid, in one run.

    OMP_NUM_THREADS=1 python benchmarks/lens.py              # on a CUDA machine, LLaVA-1.5-7B's sizes instead
    OMP_NUM_THREADS=1 python benchmarks/lens.py --blocks 2 --width 64 --repeats 1    # its code, anywhere

A page: Inspection and LogitLens in a Trainer, from the batch that is given to the model to the page on disk, all layers
and positions, less the same pass without a lens. Bare: norm, unembedding and top-k of the same states, in the same
chunks. Weights are random, and so are the tokens of a page; its tokenizer is as large as LLaVA-1.5's. Where the patches
lie has been found beforehand, which is done once for each size of pictures.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from conceptshift.callbacks import LogitLens
from conceptshift.datamodules import PicturesDataModule
from conceptshift.datamodules.sample import Batch
from conceptshift.lightning_modules import Inspection, VisionLanguageModel
from conceptshift.lightning_modules.backbone.logit_lens import LensQuery
from conceptshift.lightning_modules.backbone.tiny import write_tiny_llava
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from PIL import Image
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

# Seconds, and those of the processor [2].
Times = NDArray[np.float64]

_TOKENS = 32064
_TOP_K = 5
_MIB = 2**20


class _Prepared(Inspection):
    """Inspection of a model that is there already."""

    def __init__(self, backbone: VisionLanguageModel, tokens: int) -> None:
        super().__init__(backbone.source, max_new_tokens=tokens)
        self._prepared = [backbone]

    def load(self) -> VisionLanguageModel:
        return self._prepared[0]


class _Clock(Callback):
    """How long batches take, from the model's input on; it must come last."""

    def __init__(self) -> None:
        self.taken: Times = np.zeros(2)
        self._start: Times = np.zeros(2)

    def on_predict_batch_start(self, *given: Any, **more: Any) -> None:
        self._start = _now()

    def on_predict_batch_end(self, *given: Any, **more: Any) -> None:
        self.taken += _now() - self._start


def measure(backbone: VisionLanguageModel, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of pages, and the ratio to what cannot be avoided: medians over pairs of runs, one after the other."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = [site.name for site in backbone.sites(["lm.embed", "lm.block.*"])]
    with tempfile.TemporaryDirectory() as folder:
        pictures, out = Path(folder, "pictures"), Path(folder, "pages")
        pictures.mkdir()
        for number in range(options.pictures):
            pixels = np.random.default_rng(number).integers(256, size=(48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((640, 480)).save(pictures / f"{number}.jpg")
        data = PicturesDataModule(str(pictures), batch_size=options.pictures)

        def pages() -> Times:
            clock = _Clock()
            trainer = L.Trainer(
                callbacks=[LogitLens(str(out), _TOP_K, overwrite=True), clock], devices=1, logger=False,
                enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            )  # fmt: skip
            trainer.predict(_Prepared(backbone, options.tokens), data, return_predictions=False)
            return clock.taken

        pages()  # a warm-up, which also finds the patches
        size = max(path.stat().st_size for path in out.glob("[0-9]*.html"))
        backbone.to(device)
        batch = next(iter(data.batches(data.samples("predict"), backbone.encode))).to(device)
        bare, rows, chunk = _unavoidable(backbone, batch, layers, options.tokens)

        def timed(run: Callable[[], object]) -> Times:
            # A Trainer leaves the model in main memory.
            backbone.to(device)
            start = _now()
            run()
            return _now() - start

        runs: dict[str, Callable[[], Times]] = {
            "pass": lambda: timed(lambda: backbone.generate(batch.inputs, options.tokens)),
            "pages with the pass": pages,
            "bare": lambda: timed(bare),
        }
        times: dict[str, list[Times]] = {name: [] for name in runs}
        for number in range(options.repeats):
            for name in list(runs) if number % 2 else list(runs)[::-1]:
                times[name].append(runs[name]())
        growth = _growth(backbone.to(device), batch, layers, options.tokens)
    taken = {name: np.array(values) for name, values in times.items()}
    ratios = (taken["pages with the pass"] - taken["pass"]) / taken["bare"]
    return {
        "model": backbone.source, "dtype": str(backbone.model.dtype), "layers": len(layers), "rows": rows,
        "vocabulary": len(backbone.unembed.weight), "pictures": options.pictures, "tokens": options.tokens,
        "repeats": options.repeats, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "seconds": {name: np.median(values, axis=0).round(2).tolist() for name, values in taken.items()},
        "page / bare": _ratio(ratios[:, 0]),
        "page / bare, processor time": _ratio(ratios[:, 1]),
        "page in MiB": round(size / _MIB, 2),
        "rows of a chunk": chunk,
        "memory in MiB": growth,
    }  # fmt: skip


def _unavoidable(
    backbone: VisionLanguageModel, batch: Batch, layers: list[str], tokens: int
) -> tuple[Callable[[], None], int, int]:
    """Norm, unembedding and top-k of all states of a batch in the lens's chunks; rows, and rows of a chunk."""
    chunk: int = backbone._lens_reader(LensQuery(tuple(layers), _TOP_K))._chunk
    states = backbone.generate(batch.inputs, tokens, backbone.sites(layers)).states
    rows = torch.cat([state.flatten(0, 1) for state in states.values()])
    parts = [rows[start : start + chunk] for start in range(0, len(rows), chunk)]
    norm, unembed = backbone.final_norm, backbone.unembed

    @torch.inference_mode()
    def run() -> None:
        for part in parts:
            unembed(norm(part)).topk(_TOP_K)

    return run, len(rows), chunk


def _growth(backbone: VisionLanguageModel, batch: Batch, layers: list[str], tokens: int) -> dict[str, float]:
    """How much memory a pass takes at most beyond the model, without a lens and with it, in MiB."""
    query = LensQuery(tuple(layers), _TOP_K)
    plain = _peak(lambda: backbone.generate(batch.inputs, tokens))
    lens = _peak(lambda: backbone.generate(batch.inputs, tokens, lens=query))
    chunk = backbone._lens_reader(query)._chunk * len(backbone.unembed.weight) * 4
    return {"pass": round(plain / _MIB), "pass with lens": round(lens / _MIB), "chunk": round(chunk / _MIB)}


def _peak(run: Callable[[], object]) -> int:
    """Bytes that a run takes at most."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the highest value
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def random_llava(blocks: int, width: int, ffn: int, dtype: torch.dtype) -> VisionLanguageModel:
    """A LLaVA with random weights, 576 visual tokens and 32,064 tokens; its vision tower is small.

    Args:
        blocks: Blocks of the language model.
        width: Their width, a multiple of 64.
        ffn: Width of their feed-forward layers.
        dtype: Precision.
    """
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    corpus = (" ".join("".join(draw.choices(letters, k=draw.randint(3, 8))) for _ in range(20)) for _ in range(4000))
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_llava(
            Path(folder), corpus, vocabulary=_TOKENS, image_size=336, patch_size=14, vision_width=64, vision_layers=2,
            text_width=32, text_layers=1,
        )  # fmt: skip
        small = VisionLanguageModel.load(folder)
    ids = {name: getattr(small.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = LlamaConfig(
        vocab_size=_TOKENS, hidden_size=width, intermediate_size=ffn, num_hidden_layers=blocks,
        num_attention_heads=max(width // 128, 1), max_position_embeddings=4096, tie_word_embeddings=False, **ids,
    )  # fmt: skip
    given = small.model.config
    config = LlavaConfig(
        vision_config=given.vision_config, text_config=text, image_token_index=given.image_token_index,
        image_seq_length=576, vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config = small.model.generation_config
    return VisionLanguageModel(model, small.processor, f"{blocks} blocks, {width} wide, random weights")


def _ratio(values: Times) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).round(3).tolist()
    return {"ratio": median, "from": low, "to": high}


def _now() -> Times:
    """Seconds, and those of the processor, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096 if cuda else 1024)
    parser.add_argument("--ffn", type=int, default=11008 if cuda else 1024)
    parser.add_argument("--pictures", type=int, default=4 if cuda else 1, help="pictures of the one batch")
    parser.add_argument("--tokens", type=int, default=5, help="tokens of an answer at most")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 3)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    backbone = random_llava(options.blocks, options.width, options.ffn, torch.bfloat16 if cuda else torch.float32)
    result = measure(backbone, options)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
