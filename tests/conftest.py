"""Fixtures: a tiny model, a small Shapes folder, the command line, and a guard against leaks."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from conceptshift.callbacks.parts.concept_states import ConceptStates
from conceptshift.cli.main import main
from conceptshift.cli.shapes_model import shapes_corpus
from conceptshift.datamodules.shapes import write_shapes
from conceptshift.datamodules.stored_features import FeatureShardWriter, FeatureStore, begin_store, merge_store
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.tiny import write_tiny_llava
from peft import LoraConfig
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)

# Lightning's seed_everything and OpenMP leave these behind by design.
_NOT_OURS = ("PL_", "PYTEST_", "KMP_")


@dataclass(frozen=True)
class Ran:
    """What one call of the command line did.

    Attributes:
        status: Exit status.
        out: Standard output.
        err: Standard error.
    """

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; fails where there is no error or more than a line."""
        assert self.status == 2, self
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("conceptshift: ")]
        assert len(lines) == 1, self.err
        assert self.err.rstrip().endswith(lines[0]), self.err
        return lines[0]


def _left(before: set[threading.Thread]) -> list[threading.Thread]:
    """New threads, without tqdm's own, which it keeps for good."""
    return [thread for thread in threading.enumerate() if thread not in before and type(thread).__name__ != "TMonitor"]


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves hooks of ours, threads, loader processes, variables or a process group behind."""
    handles: list[tuple[RemovableHandle, str]] = []

    def recorded(method: Callable[..., RemovableHandle]) -> Callable[..., RemovableHandle]:
        def register(module: torch.nn.Module, hook: Any, **options: Any) -> RemovableHandle:
            handle = method(module, hook, **options)
            if getattr(hook, "__module__", "").startswith("conceptshift."):
                handles.append((handle, hook.__qualname__))
            return handle

        return register

    threads, environment = set(threading.enumerate()), dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("register_forward_hook", "register_forward_pre_hook"):
            patch.setattr(torch.nn.Module, name, recorded(getattr(torch.nn.Module, name)))
        yield
    kept = [name for handle, name in handles if handle.id in (handle.hooks_dict_ref() or {})]
    assert not kept, f"hooks left on a model: {kept}"
    if _left(threads) or multiprocessing.active_children():
        # Loaders and TensorBoard writers end their threads when they are collected.
        gc.collect()
        for thread in _left(threads):
            thread.join(timeout=2)
    assert not _left(threads), f"threads still running: {_left(threads)}"
    assert not multiprocessing.active_children()
    ours = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_OURS)}
    before = {key: value for key, value in environment.items() if not key.startswith(_NOT_OURS)}
    for key in set(os.environ) - set(environment):
        if key.startswith(_NOT_OURS):
            del os.environ[key]
    assert ours == before
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Path]:
    """Write a LoRA adapter, `make_adapter(model, folder, scale)`: new ones are zero, `scale` makes them something."""

    def make(model: Path, folder: Path, scale: float, seed: int = 0, **options: Any) -> Path:
        torch.manual_seed(seed)
        loaded = VisionLanguageModel.load(str(model))
        loaded.add_lora(LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))
        with torch.no_grad():
            for name, parameter in loaded.named_parameters():
                if "lora_B" in name and scale:
                    parameter.normal_(std=scale)
        loaded.save(folder)
        return folder

    return make


def _speak_in_words(model: VisionLanguageModel) -> None:
    """Make an untrained model prefer whole words and the end of sequence to single bytes."""
    weight = model.unembed.weight
    assert isinstance(weight, torch.Tensor)
    with torch.no_grad():
        for token, text in enumerate(model.vocabulary):
            if text.startswith(" ") and text.strip().isalpha() and len(text) > 3:
                weight[token] *= 3
        weight[model.tokenizer.eos_token_id] *= 5


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a small LLaVA whose random answers differ between pictures and end after different numbers of words."""

    def make(seed: int = 5, **sizes: int) -> Path:
        folder: Path = tmp_path_factory.mktemp("model")
        defaults = {"vocabulary": 400, "vision_width": 64, "vision_layers": 2, "text_width": 64, "text_layers": 3}
        write_tiny_llava(folder, itertools.islice(shapes_corpus(), 400), **{**defaults, **sizes})
        torch.manual_seed(seed)
        model = VisionLanguageModel.load(str(folder), random_weights=True)
        _speak_in_words(model)
        model.save(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(make_model: Callable[..., Path]) -> Path:
    """Folder of a tiny LLaVA: 3 blocks, 64 wide, 8 x 8 visual tokens."""
    return make_model()


@pytest.fixture(scope="session")
def shared_backbone(tiny: Path) -> VisionLanguageModel:
    """The tiny model, loaded once; tests must not change it."""
    return VisionLanguageModel.load(str(tiny))


@pytest.fixture
def backbone(tiny: Path) -> VisionLanguageModel:
    """The tiny model, loaded for one test."""
    return VisionLanguageModel.load(str(tiny))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Shapes folder: 40 pictures, of which 32 train, 2 restval, 3 val, 3 test."""
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", images=40, seed=0)


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Five pictures of noise, 64 x 64 pixels."""
    noise = torch.randint(256, (5, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [Image.fromarray(one.numpy()).resize((64, 64), Image.Resampling.NEAREST) for one in noise]


@pytest.fixture(scope="session")
def vector() -> Tensor:
    """A vector as wide as the tiny model's states."""
    return torch.randn(64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ran]:
    """Call `conceptshift` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return call


QUIET = (
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_checkpointing=false",
)


@pytest.fixture
def predict(cli: Callable[..., Ran], tiny: Path, shapes: Path) -> Callable[..., Ran]:
    """Extract states of the tiny model to a store: `predict(folder, *more, site=…, selector=…)`."""

    def run(
        folder: Path,
        *more: object,
        site: str = "lm.block.1",
        selector: str = "answer",
        model: Path = tiny,
        root: Path = shapes,
        split: str = "train",
    ) -> Ran:
        return cli(
            "predict",
            *QUIET,
            "--model=FeatureExtraction",
            f"--model.model_id={model}",
            f"--model.sites=['{site}']",
            f"--model.selectors=['{selector}']",
            "--model.max_new_tokens=5",
            "--data=CaptionDataModule",
            f"--data.root={root}",
            f"--data.predict_split={split}",
            "--trainer.callbacks+=FeatureWriter",
            f"--trainer.callbacks.folder={folder}",
            *more,
        )

    return run


@pytest.fixture
def validate(cli: Callable[..., Ran], tiny: Path, shapes: Path) -> Callable[..., Ran]:
    """Let the tiny model write captions or answers: `validate(*more, data="VQADataModule")`."""

    def run(*more: object, data: str = "CaptionDataModule", model: Path = tiny, root: Path = shapes) -> Ran:
        return cli(
            "validate",
            *QUIET,
            "--model=FineTuning",
            f"--model.model_id={model}",
            "--model.max_new_tokens=5",
            f"--data={data}",
            f"--data.root={root}",
            *more,
        )

    return run


@pytest.fixture
def fit(cli: Callable[..., Ran], tiny: Path, shapes: Path) -> Callable[..., Ran]:
    """Train the tiny model: `fit(*more, steps=2)`."""

    def run(*more: object, steps: int = 2, data: str = "CaptionDataModule", root: Path = shapes) -> Ran:
        return cli(
            "fit",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            f"--trainer.max_steps={steps}",
            "--trainer.limit_val_batches=0",
            "--model=FineTuning",
            f"--model.model_id={tiny}",
            f"--data={data}",
            f"--data.root={root}",
            "--data.batch_size=4",
            *more,
        )

    return run


@pytest.fixture
def stored_states(tmp_path: Path) -> Callable[..., ConceptStates]:
    """Write states to a feature store, three a shard, and read them back in the order given."""

    def write(Z: Tensor, ids: Sequence[str] | None = None) -> ConceptStates:
        folder = tmp_path / "stored-states"
        begin_store(folder, {"sites": ["s"], "selectors": ["all"], "variants": ["original"]}, False, overwrite=True)
        writer = FeatureShardWriter(folder, 0, 3)
        ids = [f"{row:06d}" for row in range(len(Z))] if ids is None else ids
        for sample_id in dict.fromkeys(ids):
            rows = [row for row, other in enumerate(ids) if other == sample_id]
            of_sample = {"sample_id": sample_id, "variant": "original"}
            sample = {
                **of_sample,
                "image": f"{sample_id}.jpg",
                "prompt": "",
                "text": "x",
                "references": [],
                "answers": [],
            }
            states = [{**of_sample, "selector": "all", "position": row, "token": "t"} for row in rows]
            writer.add([sample], states, {"s": Z[rows]})
        writer.flush()
        merge_store(folder)
        return ConceptStates.read(FeatureStore(folder), "s", "all", "original")

    return write


def _word_tokenizer(first: str, last: str, length: int) -> PreTrainedTokenizerFast:
    """One token a word, between two special tokens; `last` also pads."""
    words = sorted({word.strip(".,?") for text in itertools.islice(shapes_corpus(), 400) for word in text.split()})
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([first, last, "[UNK]", ",", ".", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
    names = {"bos_token": first, "eos_token": last, "pad_token": last, "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **names)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random CLIP that takes 24 tokens and 32 x 32 pixels."""
    folder: Path = tmp_path_factory.mktemp("clip")
    tokenizer = _word_tokenizer("<start>", "<end>", length=24)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 24},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    # With this seed pictures and texts lie on the same side, as they do after training.
    torch.manual_seed(2)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random BERT that takes 32 tokens."""
    folder: Path = tmp_path_factory.mktemp("bert")
    tokenizer = _word_tokenizer("[CLS]", "[SEP]", length=32)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
