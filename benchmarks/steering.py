"""What steering costs, and what a sweep saves.

    python benchmarks/steering.py

Generation with a steering hook against generation without one, in pairs one after the other: the vector is so short
that every answer has as many tokens. And the runs of a sweep, which share the prompts, against as many generations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from conceptshift.concepts import KMeans
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone import Condition, Steering
from PIL import Image

_PROMPT = "Provide a one-sentence caption for the provided image."


def measure(model: str, batch: int, tokens: int, repeats: int, runs: int, dtype: str, device: str) -> dict[str, object]:
    """Ratios of time, each the median over pairs, with the quartiles."""
    backbone = VisionLanguageModel.load(model, dtype=dtype)
    backbone.model.to(device)
    # Nothing ends before the last token, whatever is steered.
    backbone.model.generation_config.min_new_tokens = tokens
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (batch, 64, 64, 3), generator=generator, dtype=torch.uint8)
    encoded = backbone.encode([Image.fromarray(one.numpy()) for one in noise], [_PROMPT] * batch)
    inputs = {name: value.to(device) for name, value in encoded.items()}
    blocks = [site.name for site in backbone.sites(["lm.block.*"])]
    site, width = blocks[len(blocks) // 2], backbone.model.config.get_text_config().hidden_size
    vector = 1e-6 * torch.randn(width, generator=generator)
    concepts = KMeans(2, seed=0).fit(torch.randn(50, width, generator=generator))
    ways = {
        "add, answer": Steering(site, vector, positions="answer"),
        "add, all positions": Steering(site, vector),
        "add, schedule": Steering(site, vector, [1.0, 0.5, 0.25], "answer"),
        "project away, answer": Steering(site, vector, 1e-6, "answer", "project_away"),
        "by concept, answer": Steering(site, vector.repeat(2, 1), positions="answer", condition=Condition(concepts)),
    }

    def generate() -> None:
        assert backbone.generate(inputs, tokens).token_map.roles.shape[1] == inputs["input_ids"].shape[1] + tokens

    def steered(steering: Steering) -> Callable[[], None]:
        def run() -> None:
            with backbone.intervene(steering):
                generate()

        return run

    def alone() -> None:
        for _ in range(runs):
            steered(ways["add, answer"])()

    def shared() -> None:
        prefilled = backbone.prefill(inputs)
        for _ in range(runs):
            with backbone.intervene(ways["add, answer"]):
                backbone.generate(prefilled, tokens)

    result: dict[str, object] = {
        "model": model, "batch": batch, "tokens": tokens, "dtype": dtype, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }  # fmt: skip
    result["steered / unsteered"] = {name: compare(steered(way), generate, repeats) for name, way in ways.items()}
    result[f"{runs} runs, prompts shared / each for itself"] = compare(shared, alone, max(3, repeats // 10))
    return result


def compare(one: Callable[[], None], other: Callable[[], None], repeats: int) -> dict[str, float]:
    """Median and quartiles of the ratio of times; in turns first, so that neither gains by it."""
    one()
    other()
    ratios, seconds = [], []
    for number in range(repeats):
        order = (one, other) if number % 2 else (other, one)
        taken = {run: _seconds(run) for run in order}
        ratios.append(taken[one] / taken[other])
        seconds.append(taken[other])
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(median, 3),
        "from": round(low, 3),
        "to": round(high, 3),
        "seconds": round(statistics.median(seconds), 3),
    }


def _seconds(run: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent.parent / "checkpoints/shapes-llava"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=60, help="pairs of generations")
    parser.add_argument("--runs", type=int, default=10, help="runs of the sweep")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write")
    given = parser.parse_args()
    result = measure(given.model, given.batch, given.tokens, given.repeats, given.runs, given.dtype, given.device)
    print(json.dumps(result, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
