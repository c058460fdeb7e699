"""`--preflight`: what a run will need of memory and disk, computed from configurations before any weight is read."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from accelerate.utils import get_max_memory
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from transformers.quantizers.base import get_keys_to_not_convert

from ..callbacks import FeatureWriter
from ..datamodules.base import PictureDataModule
from ..datamodules.sample import Batch, Sample
from ..lightning_modules import FeatureExtraction, FineTuning, VisionLanguageModel
from ..lightning_modules.backbone import Selector
from ..lightning_modules.backbone.destinations import is_adapter
from ..lightning_modules.backbone.loading import Quantization, load_skeleton
from ..lightning_modules.backbone.prompts import IGNORED
from ..lightning_modules.base import BackboneModule

GIB = 2**30
# Samples whose prompts and pictures are encoded to learn how long they are.
_MEASURED = 16
# Measured: bytes of a state in an index, bytes of the readout's lists of words, and what libraries and the English word
# list take of main memory.
_INDEX_ROW, _WORDS, _PROGRAM = 7, 900_000, 300 * 2**20


@dataclass(frozen=True)
class Need:
    """One thing that takes memory.

    Attributes:
        name: What it is.
        bytes: How much of it.
        remedy: What makes it smaller.
    """

    name: str
    bytes: int
    remedy: str


@dataclass(frozen=True)
class Lengths:
    """Positions of a sample.

    Attributes:
        prompt: Of the longest prompt, visual tokens included.
        image: Visual tokens of a picture, on average.
        target: Of the longest answer in the data.
    """

    prompt: int
    image: float
    target: int


def preflight(subcommand: str, module: L.LightningModule, data: Any, trainer: L.Trainer) -> None:
    """Print what a run will need beside what there is.

    Args:
        subcommand: `fit`, `validate`, `test` or `predict`.
        module: What would run.
        data: What it would run on.
        trainer: What would run it.

    Raises:
        ValueError: It cannot fit, or the run has no model whose needs could be computed.
    """
    if not isinstance(module, BackboneModule) or not isinstance(data, PictureDataModule):
        raise ValueError("--preflight: this run loads no model; run it without")
    if data.streaming:
        raise ValueError("--preflight: a stream has no known number of samples; run it without `streaming`")
    backbone = skeleton(module)
    data.setup(subcommand)
    samples = data.samples(subcommand)
    lengths = measured(samples, data, backbone)
    needs = memory_needs(subcommand, backbone, module, data.batch_size, lengths, trainer)
    where, free = _free_memory(module, trainer)
    print(f"{module.model_id}: {_precision(backbone, module)}; {trainer.world_size} process(es) on {where}")
    print(
        f"{len(samples)} samples in batches of {data.batch_size}; prompts of up to {lengths.prompt} positions, "
        f"of which {lengths.image:.0f} image tokens, as {min(len(samples), _MEASURED)} samples show"
    )
    for need in needs:
        print(_line(need.name, need.bytes))
    refused = []
    total, largest = sum(need.bytes for need in needs), max(needs, key=lambda need: need.bytes)
    if not _fits(f"memory of a process on {where}", total, free):
        refused.append(f"a process needs more memory than is free, most of it for {largest.name}; {largest.remedy}")
    if where.startswith("cuda"):
        # Every process reads the weights into main memory first.
        loading = trainer.num_devices * sum(weight_bytes(backbone.model, module.quantization).values())
        if not _fits("main memory to load", loading, _free_on("cpu")):
            refused.append("the processes cannot load their copies of the model at once; lower --trainer.devices")
    for writer in cast(Any, trainer).callbacks:
        if isinstance(writer, FeatureWriter) and isinstance(module, FeatureExtraction):
            size = disk_need(module, backbone, samples, lengths)
            folder = writer.planned(cast(Any, trainer))
            if folder is None:
                raise ValueError("--preflight: FeatureWriter: where to write? Give the run a folder: --out")
            if not _fits(f"disk at most in {folder}", size, free_disk(folder)):
                refused.append(
                    f"{folder}: features can need more than is free; read at fewer --model.init_args.sites, "
                    "select `answer_mean` instead of `answer`, or choose another folder"
                )
    if refused:
        raise ValueError("--preflight: " + "; and ".join(refused))


def skeleton(module: BackboneModule) -> VisionLanguageModel:
    """The model of a run, on the meta device."""
    model, processor = load_skeleton(
        module.model_id,
        revision=module.revision,
        dtype=module.dtype_name,
        attention=module.attention,
        trust_remote_code=module.trust_remote_code,
    )
    return VisionLanguageModel(model, processor, module.model_id)


def weight_bytes(model: Any, quantization: Quantization | None) -> dict[str, int]:
    """Bytes of each parameter of a model, packed as bitsandbytes does it.

    Args:
        model: The transformers model, on any device, not quantised.
        quantization: How it will be packed.
    """
    sizes = {name: one.numel() * one.element_size() for name, one in model.named_parameters()}
    kept = get_keys_to_not_convert(model) if quantization else []
    for name, module in model.named_modules():
        if quantization and isinstance(module, nn.Linear) and name not in kept:
            sizes[f"{name}.weight"] = _packed(module.weight, quantization)
    return sizes


def _packed(weight: Tensor, quantization: Quantization) -> int:
    values = weight.numel()
    if quantization == "8bit":
        return values + 4 * len(weight)  # a float32 scale for each row
    # A scale for each 64 values, of one byte; one of float32 for each 256 of these; two tables, and an offset.
    scales = math.ceil(values / 64)
    return math.ceil(values / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)


def cache_bytes(config: Any, samples: int, positions: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of a batch, in a cache that keeps all of them.

    Args:
        config: The model's configuration.
        samples: B.
        positions: Positions of a sample, padding included.
        dtype: Precision of the keys and values.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * samples * positions * int(text.num_hidden_layers) * int(heads) * int(width) * dtype.itemsize


def memory_needs(
    subcommand: str,
    backbone: VisionLanguageModel,
    module: BackboneModule,
    batch_size: int,
    lengths: Lengths,
    trainer: L.Trainer,
) -> list[Need]:
    """What a process will hold at once."""
    is_fit = subcommand == "fit"
    weights = weight_bytes(backbone.model, module.quantization)
    dtype = backbone.model.dtype
    trained: list[nn.Parameter] = []
    if is_fit and isinstance(module, FineTuning):
        with torch.device("meta"):
            module.choose_trainable(backbone)
        trained = [one for one in backbone.parameters() if one.requires_grad]
        if module.lora is not None:
            weights["LoRA"] = _bytes(trained)
    pieces = trainer.world_size if isinstance(trainer.strategy, ModelParallelStrategy) else 1
    needs = [Need("weights", _held(backbone, weights, pieces), _smaller_weights(module, pieces))]
    if trained:
        lora = "train LoRA" if pieces > 1 else "train LoRA, or use --config configs/fsdp.yaml"
        needs.append(Need("gradients", _bytes(trained) // pieces, lora))
        needs.append(Need("optimizer states", optimizer_bytes(cast(FineTuning, module), trained) // pieces, lora))
    less = "lower --data.init_args.batch_size"
    columns = lengths.prompt + (lengths.target if is_fit else module.max_new_tokens - 1)
    if not is_fit:
        needs.append(Need("KV cache", cache_bytes(backbone.model.config, batch_size, columns, dtype), less))
    if isinstance(module, FeatureExtraction):
        widths = [_width(backbone, site.positions) for site in backbone.sites(module.site_patterns)]
        # Once as the blocks gave them, once joined.
        states = 2 * batch_size * columns * sum(widths) * dtype.itemsize
        # Of a whole model, what differs is kept beside the original: perhaps all of it.
        whole = [path for path in module.destinations.values() if Path(path).is_dir() and not is_adapter(path)]
        if whole:
            size = len(whole) * sum(weights.values())
            needs.append(Need("whole destinations", size, "give fewer --model.init_args.destination, or adapters"))
        needs.append(Need("captured states", states, f"{less}, or read at fewer --model.init_args.sites"))
    if trainer.strategy.root_device.type == "cpu":
        needs.append(Need("the program (rough)", _PROGRAM, "free some"))
    needs.append(Need("activations (rough)", _activations(backbone, module, batch_size, columns, is_fit), less))
    return needs


def _held(backbone: VisionLanguageModel, weights: dict[str, int], pieces: int) -> int:
    """Bytes of weights in one process: its share of the blocks, two blocks that run or come next, and the rest."""
    if pieces == 1:
        return sum(weights.values())
    blocks = [*backbone.structure.image_blocks, *backbone.structure.blocks]
    inside = [_bytes(block.parameters()) for block in blocks]
    return (sum(inside)) // pieces + 2 * max(inside) + max(sum(weights.values()) - sum(inside), 0)


def _smaller_weights(module: BackboneModule, pieces: int) -> str:
    ways = [] if module.dtype_name in ("bfloat16", "float16") else ["--model.init_args.dtype bfloat16"]
    ways += [] if module.quantization == "4bit" or pieces > 1 else ["--model.init_args.quantization 4bit"]
    ways += [] if pieces > 1 else ["--config configs/fsdp.yaml on several GPUs"]
    return ", or ".join(ways) or "take more GPUs, or a smaller model"


def optimizer_bytes(module: FineTuning, trained: list[nn.Parameter]) -> int:
    """Bytes of what the optimizer keeps of each parameter, seen in a step that moves nothing."""
    for one in trained:
        one.grad = torch.empty_like(one)
    optimizer = module.optimizer(trained)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return _bytes(state for state in states if state.is_meta)


def _activations(
    backbone: VisionLanguageModel, module: BackboneModule, samples: int, columns: int, is_fit: bool
) -> int:
    """Roughly what blocks and unembedding of the language model make on the way, by what was measured.

    Of a position some ten vectors of the hidden size and three of the inner size are alive at once. Training keeps
    three times as much of every block, or, where they are computed again, of one block beside its gradients. The loss,
    and all reading of given answers, has logits of every position in float32 beside those of the model.
    """
    text = backbone.model.config.get_text_config(decoder=True)
    hidden, tokens = int(text.hidden_size), int(text.vocab_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    size = int(backbone.model.dtype.itemsize)
    block = samples * columns * (10 * hidden + 3 * inner) * size
    logits = samples * columns * tokens * (size + 4)
    if not is_fit:
        reads = isinstance(module, FineTuning) or (isinstance(module, FeatureExtraction) and module.answers == "target")
        return block + (logits if reads else samples * tokens * (size + 4))
    blocks = len(backbone.structure.blocks)
    if cast(FineTuning, module).gradient_checkpointing:
        return 2 * 3 * block + blocks * samples * columns * hidden * size + 2 * logits
    return blocks * 3 * block + 2 * logits


def disk_need(module: FeatureExtraction, backbone: VisionLanguageModel, samples: list[Sample], lengths: Lengths) -> int:
    """Bytes that a feature store will have at most: states, indices, and the model's readout."""
    states = len(samples) * len(module.variants) * sum(_positions(one, module, lengths) for one in module.selectors)
    widths = [_width(backbone, site.positions) for site in backbone.sites(module.site_patterns)]
    texts = sum(
        len(sample.prompt) + len(str(sample.image)) + sum(map(len, (*sample.references, *sample.answers)))
        for sample in samples
    )
    size = backbone.model.dtype.itemsize
    # Each index is there twice, with the shards and merged; texts are compressed.
    index = 2 * _INDEX_ROW * states + len(module.variants) * texts + _WORDS
    return int(states * sum(widths) * size + index + _bytes([cast(Any, backbone.structure.head).weight]))


def _positions(selector: Selector, module: FeatureExtraction, lengths: Lengths) -> float:
    """States of a sample that a selector picks at most."""
    answer = lengths.target if module.answers == "target" else module.max_new_tokens
    everything = lengths.prompt + answer - 1
    if selector.words or selector.name in ("answer_mean", "last_prompt"):
        return 1
    if selector.bounds is not None:
        return len(range(everything)[slice(*selector.bounds)])
    return {
        "all": everything,
        "prompt": lengths.prompt,
        "image": lengths.image,
        "text": everything - lengths.image,
        "answer": answer,
        "generated": answer - 1,
    }[selector.name]


def measured(samples: list[Sample], data: PictureDataModule, backbone: VisionLanguageModel) -> Lengths:
    """How long samples are, from some of them and the one with the longest texts."""
    step = max(len(samples) // _MEASURED, 1)
    longest = max(samples, key=lambda sample: len(sample.prompt) + len(sample.target))
    chosen = [longest, *samples[::step][: _MEASURED - 1]]
    prompts, targets, images = [], [], []
    # No token has a negative id.
    image = -1 if backbone.encode.image_token_id is None else backbone.encode.image_token_id
    batches: Iterable[Batch] = data.batches(chosen, backbone.encode)
    for batch in batches:
        if batch.samples:
            answers = batch.inputs["labels"].ne(IGNORED).sum(dim=1)
            targets += answers.tolist()
            prompts += (batch.inputs["attention_mask"].sum(dim=1) - answers).tolist()
            images += batch.inputs["input_ids"].eq(image).sum(dim=1).tolist()
    if not prompts:
        raise ValueError("--preflight: none of the pictures that it looked at can be read")
    return Lengths(max(prompts), sum(images) / len(images), max(targets))


def _width(backbone: VisionLanguageModel, positions: str) -> int:
    config = backbone.model.config
    if positions == "patches":
        return int(config.vision_config.hidden_size)
    return int(config.get_text_config(decoder=True).hidden_size)


def _precision(backbone: VisionLanguageModel, module: BackboneModule) -> str:
    dtype = str(backbone.model.dtype).removeprefix("torch.")
    return dtype if module.quantization is None else f"{dtype}, linear layers in {module.quantization}"


def _free_memory(module: BackboneModule, trainer: L.Trainer) -> tuple[str, int]:
    """Where the model will be, and the free bytes of each process there."""
    device = trainer.strategy.root_device
    if module.device_map is not None:
        return "all devices", sum(get_max_memory().values())
    if device.type == "cuda":
        return str(device), _free_on(device.index or 0)
    # Processes of this machine share its memory.
    return "cpu", _free_on("cpu") // trainer.num_devices


def _free_on(device: int | str) -> int:
    return int(get_max_memory()[device])


def free_disk(folder: Path) -> int:
    """Free bytes where a folder is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _fits(name: str, needed: float, free: int) -> bool:
    """Print what is needed beside what is free."""
    print(f"{_line(name, needed)}: {'fits' if needed <= free else 'does not fit'}, {free / GIB:.3f} GiB are free")
    return needed <= free


def _line(name: str, size: float) -> str:
    return f"{size / GIB:10.3f} GiB  {name}"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)
