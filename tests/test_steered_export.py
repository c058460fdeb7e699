"""A steered model as an ordinary one: read by transformers alone it writes what hooks made the model write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.concepts import KMeans, SteeringVectors
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone import Condition, Steering, steered_export
from conceptshift.lightning_modules.backbone.steered_export import save_steered
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.llama.modeling_llama import LlamaMLP

from .conftest import Ran

Run = Callable[..., Ran]
PROMPTS = ["Where is this?", "How many shapes are there in this picture?", "Is the circle red or blue?", "Who?"]


def encoded(model: VisionLanguageModel, row: int) -> dict[str, Tensor]:
    noise = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(row), dtype=torch.uint8)
    return model.encode([Image.fromarray(noise.numpy()).resize((64, 64), Image.Resampling.NEAREST)], [PROMPTS[row]])


def check_equal(model: VisionLanguageModel, steering: Steering, folder: Path, tolerance: float) -> list[str]:
    """Compare with what transformers reads from the folder; returns the answers."""
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert plain.dtype == model.model.dtype
    answers = []
    for row in range(len(PROMPTS)):
        inputs = encoded(model, row)
        with model.intervene(steering):
            logits, text = model.logits(inputs), model.generate(inputs, 6).texts[0]
        with torch.inference_mode():
            ours = plain(**inputs).logits
            written = plain.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert float((ours - logits).abs().max() / logits.abs().max()) < tolerance
        answers.append(processor.decode(written, skip_special_tokens=True).strip())
        if tolerance < 1e-3:
            assert answers[-1] == text
    return answers


@pytest.mark.parametrize("alpha", [0.0, 5.0, -5.0])
@pytest.mark.parametrize("site", ["lm.block.0", "lm.block.2", "projector"])
def test_the_written_model_is_the_steered_one(
    shared_backbone: VisionLanguageModel, vector: Tensor, tmp_path: Path, site: str, alpha: float
) -> None:
    steering = Steering(site, vector, alpha)
    assert save_steered(shared_backbone, steering, tmp_path / "steered", encoded(shared_backbone, 0)) < 1e-5
    answers = check_equal(shared_backbone, steering, tmp_path / "steered", 1e-5)
    unsteered = [shared_backbone.generate(encoded(shared_backbone, row), 6).texts[0] for row in range(len(PROMPTS))]
    assert (answers == unsteered) == (alpha == 0), "the steering is too weak for the test"


@pytest.mark.parametrize("site", ["lm.block.1", "projector"])
def test_a_model_saved_in_low_precision_stays_there(
    tiny: Path, vector: Tensor, tmp_path: Path, cli: Run, site: str
) -> None:
    VisionLanguageModel.load(str(tiny), dtype="bfloat16").save(tmp_path / "low")
    SteeringVectors({"lm.block.1": vector, "projector": vector}, {}, {}).save(tmp_path / "v.safetensors")
    done = cli(
        "export-steered", "--model=low", "--vector=v.safetensors", "--out=steered", "--alpha=3", f"--site={site}"
    )
    assert done.status == 0, done.err
    assert f"steered: low with 3 times the vector of {site}; logits equal to" in done.out
    model = VisionLanguageModel.load("low")
    assert model.model.dtype == torch.bfloat16
    check_equal(model, Steering(site, vector, 3.0), Path("steered"), 3e-2)


def test_a_projector_without_biases_gets_them(make_model: Run, vector: Tensor, tmp_path: Path) -> None:
    """And a model whose unembedding is its embedding keeps that."""
    folder = Path(str(make_model()))
    config = json.loads((folder / "config.json").read_text())
    config |= {"multimodal_projector_bias": False, "tie_word_embeddings": True}
    config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    model = VisionLanguageModel.load(str(folder), random_weights=True)
    model.save(tmp_path / "bare")
    model = VisionLanguageModel.load(str(tmp_path / "bare"))
    assert not any("multi_modal_projector" in name and "bias" in name for name in model.model.state_dict())
    for site in ("projector", "lm.block.1"):
        steering = Steering(site, vector, 2.0)
        save_steered(model, steering, tmp_path / "steered", encoded(model, 0))
        check_equal(model, steering, tmp_path / "steered", 1e-5)


def bad(vector: Tensor) -> dict[str, tuple[Steering, str]]:
    dictionary = KMeans(2, seed=0).fit(torch.randn(20, 64, generator=torch.Generator().manual_seed(0)))
    constant = "a bias can only add one vector, with one α, at all positions"
    return {
        "positions": (Steering("lm.block.1", vector, positions="answer"), constant),
        "mode": (Steering("lm.block.1", vector, mode="project_away"), constant),
        "schedule": (Steering("lm.block.1", vector, [1.0, 0.0]), constant),
        "condition": (Steering("lm.block.1", vector, condition=Condition(dictionary, 1)), constant),
        "samples": (Steering("lm.block.1", vector[None]), constant),
        "norm": (Steering("lm.norm", vector), constant),
        "embed": (Steering("lm.embed", vector), constant),
        "vision": (Steering("vision.block.0", vector), constant),
        "width": (Steering("lm.block.1", vector[:63]), "no linear layer writes to lm.block.1"),
        "no site": (Steering("lm.block.9", vector), r"site 'lm\.block\.9' not found"),
    }


@pytest.mark.parametrize("case", sorted(bad(torch.ones(64))))
def test_what_no_bias_can_do(shared_backbone: VisionLanguageModel, vector: Tensor, tmp_path: Path, case: str) -> None:
    steering, message = bad(vector)[case]
    with pytest.raises(ValueError, match=message):
        save_steered(shared_backbone, steering, tmp_path / "steered", encoded(shared_backbone, 0))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def export(cli: Run, vector: Tensor, tiny: Path, tmp_path: Path) -> Run:
    SteeringVectors({"lm.block.1": vector}, {}, {}).save(tmp_path / "v.safetensors")

    def run(*more: object, out: str = "steered", model: Path = tiny) -> Ran:
        return cli("export-steered", f"--model={model}", "--vector=v.safetensors", f"--out={out}", *more)

    return run


def test_an_architecture_without_such_a_bias(export: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steered_export, "_BLOCK_BIAS", "output_bias")
    error = export().error
    assert "layers.1.mlp.down_proj has no bias, nor has its configuration an option `output_bias` for one" in error
    assert not Path("steered").exists()


@pytest.mark.parametrize(("dtype", "alpha"), [("float32", 3.0), ("bfloat16", 3.0), ("bfloat16", 0.03)])
def test_a_block_that_changes_what_its_last_layer_writes(
    export: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, alpha: float
) -> None:
    """As a norm after it does, or a factor; also where the difference is less than rounding may be."""
    VisionLanguageModel.load(str(tiny), dtype=dtype).save(tmp_path / "model")
    assert export(f"--alpha={alpha}", model=tmp_path / "model").status == 0
    before = (tmp_path / "steered" / "config.json").read_bytes()
    forward: Any = LlamaMLP.forward
    for change in (lambda x: 0.1 * x, lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:])):
        monkeypatch.setattr(LlamaMLP, "forward", lambda self, x, change=change: change(forward(self, x)))
        error = export(f"--alpha={alpha}", model=tmp_path / "model").error
        assert "mlp.down_proj the model's logits differ from the steered ones by" in error
        assert "this architecture changes what that layer writes" in error
    assert (tmp_path / "steered" / "config.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "steered", "v.safetensors"}


def test_folders_that_are_not_written_to(export: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert (
        "other: exists, and is no earlier export of a steered model; choose a new folder" in export(out="other").error
    )
    (tmp_path / "file").write_text("text")
    assert "file: exists, and is no earlier export" in export(out="file").error
    shutil.copytree(tiny, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert "model: exists, and is no earlier export" in export(out="model").error
    assert export(out="steered").status == 0
    assert export(out="steered").status == 0, "an earlier export is replaced"
    assert "steered: is the model that is steered" in export(out="./steered", model=tmp_path / "steered").error
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_what_is_told_at_start(export: Run, cli: Run) -> None:
    assert "it has none for the site 'lm.block.0'" in export("--site=lm.block.0").error
    assert "`alpha` must be a finite number" in export("--alpha=.inf").error
    assert "none.safetensors must be an artifact file" in export("--vector=none.safetensors").error
    assert not Path("steered").exists()
