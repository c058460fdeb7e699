"""What extracting hidden states costs: the same answers with and without it, in one run.

    conceptshift shapes --out data/shapes --images 4000
    OMP_NUM_THREADS=1 python benchmarks/extraction.py       # shapes-llava; on a CUDA machine LLaVA-1.5-7B too
    OMP_NUM_THREADS=1 python benchmarks/extraction.py --workers 1   # pictures are read on another core
    python benchmarks/extraction.py --llava-blocks 1 --samples 2 --batch 2 --tokens 2 --repeats 3   # its code, anywhere

With: FeatureExtraction and FeatureWriter in a Trainer, from the first batch to the merged store, three sites, two
selectors. Without: a loop over the same batches with nothing but transformers' `generate`. Both read and encode their
pictures. What a run does once before its first batch is told apart.
LLaVA-1.5-7B has its architecture and random weights, so that nothing is downloaded; every answer has all its tokens.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from conceptshift.callbacks import FeatureWriter
from conceptshift.datamodules import CaptionDataModule
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import FeatureExtraction, VisionLanguageModel
from conceptshift.lightning_modules.backbone.prompts import prompts_only
from conceptshift.lightning_modules.backbone.tiny import write_tiny_llava
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

# Seconds, and those of the processor [2].
Times = NDArray[np.float64]

_SELECTORS = ["answer", "last_prompt"]
# Dense bfloat16 TFLOP/s as the maker states them; the first name that a card's has in it counts.
_PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121}


class _Prepared(FeatureExtraction):
    """Extraction from a model that is there already."""

    def __init__(self, backbone: VisionLanguageModel, sites: list[str], tokens: int) -> None:
        super().__init__(backbone.source, sites, _SELECTORS, max_new_tokens=tokens)
        self._prepared = [backbone]

    def load(self) -> VisionLanguageModel:
        return self._prepared[0]


@dataclass
class _Clock(Callback):
    """When a prediction began, came to its first batch and ended: one in front of all callbacks, one behind them."""

    at: dict[str, Times] = field(default_factory=dict)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at["start"] = _now()

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at["batches"] = _now()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at["end"] = _now()


def measure(backbone: VisionLanguageModel, options: argparse.Namespace) -> dict[str, Any]:
    """Samples per second with and without extraction, and the ratios of time, medians over pairs with the quartiles."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = [site.name for site in backbone.sites(["lm.block.*"])]
    sites = list(dict.fromkeys([blocks[len(blocks) // 4], blocks[len(blocks) // 2], blocks[-1]]))
    data = CaptionDataModule(
        options.data,
        predict_split="train",
        limit=options.samples,
        batch_size=options.batch,
        num_workers=options.workers,
    )
    data.setup("predict")
    samples = data.samples("predict")
    answers: dict[str, dict[str, str]] = {}

    def extract() -> dict[str, Times]:
        first, last = _Clock(), _Clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = L.Trainer(
                callbacks=[first, FeatureWriter(folder), last], devices=1, logger=False, enable_progress_bar=False,
                enable_model_summary=False, enable_checkpointing=False,
            )  # fmt: skip
            trainer.predict(_Prepared(backbone, sites, options.tokens), data, return_predictions=False)
            answers["with"] = {name: row["text"] for name, row in FeatureStore(folder).samples("original").items()}
        start, batches, end = first.at["start"], first.at["batches"], last.at["end"]
        return {"extraction": end - batches, "start": batches - start}

    def generate() -> dict[str, Times]:
        # A Trainer leaves the model in main memory.
        backbone.model.to(device)
        texts: dict[str, str] = {}
        alone, start = np.zeros(2), _now()
        for batch in data.batches(samples, backbone.encode):
            prompts = prompts_only(batch.to(device).inputs, backbone.tokenizer.pad_token_id)
            before = _now()
            with torch.inference_mode():
                found = backbone.model.generate(
                    **prompts,
                    max_new_tokens=options.tokens,
                    do_sample=False,
                    pad_token_id=backbone.tokenizer.pad_token_id,
                )
            alone += _now() - before
            said = backbone.tokenizer.batch_decode(found[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
            texts |= dict(zip(batch.sample_ids, said, strict=True))
        taken = {"loop": _now() - start, "generate": alone}
        answers["without"] = {name: text.strip() for name, text in texts.items()}
        return taken

    seconds = _in_turns(extract, generate, options.repeats)
    assert answers["with"] == answers["without"], "extraction must not change what the model says"
    rates = {
        name: round(len(samples) / float(np.median(seconds[name], axis=0)[0]), 2)
        for name in ("extraction", "loop", "generate")
    }
    # Loops that ran one right after the other.
    noise = _ratio(seconds["loop"][1::2], seconds["loop"][2::2])
    result: dict[str, Any] = {
        "model": backbone.source, "blocks": len(blocks), "sites": sites, "selectors": _SELECTORS,
        "samples": len(samples), "workers": options.workers, "batch": options.batch, "tokens": options.tokens,
        "repeats": options.repeats,
        "dtype": str(backbone.model.dtype), "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "samples per second": rates,
        "seconds before the first batch": round(float(np.median(seconds["start"], axis=0)[0]), 2),
        "extraction / loop": _ratio(seconds["extraction"], seconds["loop"]),
        "extraction / generate": _ratio(seconds["extraction"], seconds["generate"]),
        "noise: loop / loop": noise,
    }  # fmt: skip
    first = next(iter(data.batches(samples[:1], backbone.encode)))
    result["prompt"] = prompts_only(first.inputs, backbone.tokenizer.pad_token_id)["input_ids"].shape[1]
    return result


def llava_7b(blocks: int, tokens: int) -> VisionLanguageModel:
    """LLaVA-1.5-7B's architecture with random weights in bfloat16, and a small tokenizer.

    Args:
        blocks: Blocks of the language model, of which the whole has 32.
        tokens: Tokens that every answer has.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_llava(
            Path(folder), ["a picture of a star"], image_size=336, patch_size=14, vision_width=32, text_width=32
        )
        small = VisionLanguageModel.load(folder)
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    ids = {name: getattr(small.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=blocks, num_attention_heads=32,
        max_position_embeddings=4096, **ids,
    )  # fmt: skip
    image_token = small.model.config.image_token_index
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, image_seq_length=576,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config = small.model.generation_config
    model.generation_config.min_new_tokens = tokens
    # The random model writes nothing that its tokenizer lacks.
    model.generation_config.suppress_tokens = list(range(len(small.tokenizer), 32064))
    return VisionLanguageModel(model, small.processor, f"LLaVA-1.5-7B, {blocks} of 32 blocks, random weights")


def of_peak(backbone: VisionLanguageModel, result: dict[str, Any]) -> dict[str, float | None]:
    """What extraction from a LLaVA reaches in TFLOP/s, and which share of what the card can that is.

    A sample takes 2 floating-point operations a parameter and token, and in attention 4 a query, key and width.

    Args:
        backbone: The model.
        result: What `measure` found.
    """
    model, vision, text = backbone.model, backbone.model.config.vision_config, backbone.model.config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    tower = 2 * _parameters(model.model.vision_tower) * (patches + 1)
    tower += 4 * vision.num_hidden_layers * vision.hidden_size * (patches + 1) ** 2
    # The last token of an answer is not read.
    read = result["prompt"] + result["tokens"] - 1
    language = 2 * _parameters(model.model.language_model.layers) * read
    language += 4 * text.num_hidden_layers * text.hidden_size * read * (read + 1) // 2
    head = 2 * _parameters(model.lm_head) * result["tokens"]
    sample = tower + 2 * _parameters(model.model.multi_modal_projector) * patches + language + head
    reached = sample * result["samples per second"]["extraction"] / 1e12
    peak = next((value for name, value in _PEAKS.items() if name in result["device"]), None)
    return {"TFLOP/s": round(reached, 3), "share of the peak": None if peak is None else round(reached / peak, 3)}


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _in_turns(
    one: Callable[[], dict[str, Times]], other: Callable[[], dict[str, Times]], repeats: int
) -> dict[str, list[Times]]:
    """Times of pairs of runs after a warm-up, now one and now the other first, so that neither gains by it."""
    one()
    other()
    times: dict[str, list[Times]] = {}
    for number in range(repeats):
        for run in (one, other) if number % 2 else (other, one):
            for name, value in run().items():
                times.setdefault(name, []).append(value)
    return times


def _ratio(one: list[Times], other: list[Times]) -> dict[str, float]:
    """Medians of the ratios of pairs, and the quartiles of those of seconds."""
    pairs = min(len(one), len(other))
    ratios = np.array(one[:pairs]) / np.array(other[:pairs])
    low, median, high = np.quantile(ratios[:, 0], [0.25, 0.5, 0.75]).round(3).tolist()
    return {"ratio": median, "from": low, "to": high, "processor time": float(np.median(ratios[:, 1]).round(3))}


def _now() -> Times:
    """Seconds, and those of the processor, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root, cuda = Path(__file__).resolve().parent.parent, torch.cuda.is_available()
    parser.add_argument("--model", default=str(root / "checkpoints/shapes-llava"))
    parser.add_argument(
        "--llava-blocks", type=int, default=32 if cuda else 0, help="blocks of LLaVA-1.5-7B; 0: not at all"
    )
    parser.add_argument("--data", default=str(root / "data/shapes"), help="Shapes folder")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=25)
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures for the extraction")
    parser.add_argument("--repeats", type=int, default=20, help="pairs of runs")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = [measure(VisionLanguageModel.load(options.model), options)]
    if options.llava_blocks:
        llava = llava_7b(options.llava_blocks, options.tokens)
        result = measure(llava, options)
        results.append({**result, **of_peak(llava, result)})
    print(json.dumps(results, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
