"""The models that users name first go through everything: fit, extract, dictionary, shift, steer, lens and score."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.cli.shapes_model import shapes_corpus
from conceptshift.concepts import load_dictionary
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.readout import Readout
from conceptshift.tests.families.crops import CROPS
from conceptshift.tests.families.dynamic import DYNAMIC
from conceptshift.tests.molmo_tiny import write_tiny_molmo
from PIL import Image

Run = Callable[..., Any]

QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false")
WORDS = "--trainer.callbacks.grounding.candidates=15"  # of 400 tokens
NAMED = ("llava", "idefics2", "qwen2_vl", "molmo")


@pytest.fixture(scope="module", params=NAMED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its real processor class, as `from_pretrained` finds one."""
    out: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "molmo":
        return write_tiny_molmo(out, itertools.islice(shapes_corpus(), 400))
    model, processor = {**CROPS, **DYNAMIC}[request.param]()
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def test_everything(folder: Path, shapes: Path, cli: Run, tmp_path: Path) -> None:
    data = ("--data=CaptionDataModule", f"--data.root={shapes}", "--data.batch_size=8")
    adapter, features, vector = tmp_path / "adapter", tmp_path / "features", tmp_path / "vector.safetensors"
    fitted = cli(
        "fit", *QUIET[:2], *data, "--model=FineTuning", f"--model.model_id={folder}", "--model.lora.rank=4",
        "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.03", "--trainer.max_steps=4",
        "--trainer.limit_val_batches=0", "--trainer.callbacks+=TrainingAudit",
        "--trainer.callbacks+=ModelExport", f"--trainer.callbacks.folder={adapter}",
    )  # fmt: skip
    assert fitted.status == 0, fitted.err

    last = len(VisionLanguageModel.load(str(folder)).structure.blocks) - 1
    fits = [
        option
        for variant in ("original", "destination")
        for option in (
            "--trainer.callbacks+=DictionaryFitter",
            f"--trainer.callbacks.site=lm.block.{last}",
            "--trainer.callbacks.selector=last_prompt",
            f"--trainer.callbacks.variant={variant}",
            "--trainer.callbacks.dictionary=KMeans",
            "--trainer.callbacks.dictionary.n_concepts=3",
            WORDS,
            f"--trainer.callbacks.out={tmp_path / variant}",
        )
    ]
    extracted = cli(
        "predict", *QUIET, *data, "--data.predict_split=train", "--model=FeatureExtraction",
        f"--model.model_id={folder}", f"--model.destination={adapter}", "--model.max_new_tokens=4",
        f"--model.sites=['lm.block.1','lm.block.{last}']", "--model.selectors=['last_prompt','answer']",
        "--trainer.callbacks+=FeatureWriter", f"--trainer.callbacks.folder={features}", *fits,
        "--trainer.callbacks+=ShiftMeter", WORDS, f"--trainer.callbacks.original={tmp_path / 'original'}",
        f"--trainer.callbacks.destination={tmp_path / 'destination'}", f"--trainer.callbacks.out={tmp_path / 'shift'}",
        "--trainer.callbacks+=SteeringVectorMaker", "--trainer.callbacks.site=lm.block.1",
        "--trainer.callbacks.target={selector: last_prompt, variant: destination}",
        "--trainer.callbacks.source={selector: last_prompt, variant: original}", f"--trainer.callbacks.out={vector}",
    )  # fmt: skip
    assert extracted.status == 0, extracted.err
    concepts = load_dictionary(tmp_path / "original" / "dictionary.safetensors")
    assert concepts.dictionary.shape[0] == 3
    assert concepts.dictionary.isfinite().all()
    assert list((tmp_path / "shift").iterdir())

    captions = tmp_path / "captions.json"
    score = ("--trainer.callbacks+=CaptionScorer", f"--trainer.callbacks.out={captions}")
    answers = {}
    for alpha in (0.0, 4.0):
        done = cli(
            "validate", *QUIET, *data, "--model=FineTuning", f"--model.model_id={folder}", "--model.max_new_tokens=4",
            "--trainer.callbacks+=Steerer",
            f"--trainer.callbacks.vectors=[{{file: {vector}, alpha: {alpha}, positions: all}}]", *score,
        )  # fmt: skip
        assert done.status == 0, done.err
        answers[alpha] = json.loads(captions.read_text())
        captions.unlink()
    assert answers[0.0] != answers[4.0]


def test_lens(folder: Path) -> None:
    """What states mean in words: at the last block it is what the model says, and the readout is the same."""
    model = VisionLanguageModel.load(str(folder))
    inputs = model.encode([Image.effect_noise((90, 60), 80).convert("RGB")], ["What is it?"])
    done = model.generate(inputs, 3, model.sites(["lm.block.*"]))
    lens = {name: model.unembed(model.final_norm(state)) for name, state in done.states.items()}
    start = int(done.token_map.answer_start[0])
    said = list(lens.values())[-1][0, start - 1 : start - 1 + len(done.token_map.answers[0])].argmax(dim=-1)
    assert said.tolist() == done.token_map.answers[0]
    readout = Readout.from_model(model)
    assert readout.norm is not None
    state = next(iter(done.states.values()))
    torch.testing.assert_close(
        readout.norm(state) @ readout.unembedding.T, next(iter(lens.values())), atol=1e-4, rtol=1e-4
    )
