"""Sites: their names, what they read, and the check that the last one means what the model says."""

from __future__ import annotations

import pytest
import torch
from conceptshift.cli import sites as sites_command
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone import Role, Selector, Site
from PIL import Image
from torch import Tensor

NAMES = [
    "vision.block.0", "vision.block.1", "projector", "lm.embed", "lm.block.0", "lm.block.1", "lm.block.2", "lm.norm",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(shared_backbone: VisionLanguageModel) -> dict[str, Tensor]:
    pictures = [Image.effect_noise((64, 64), 80).convert("RGB") for _ in range(2)]
    return shared_backbone.encode(pictures, ["Where is this?", "How many shapes are there?"], ["on the sea", "2"])


def test_names_in_the_order_of_computation(shared_backbone: VisionLanguageModel) -> None:
    assert [site.name for site in shared_backbone.sites(["*"])] == NAMES


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["lm.block.1"], ["lm.block.1"]),
        (["lm.block.*"], ["lm.block.0", "lm.block.1", "lm.block.2"]),
        (["*.block.0"], ["vision.block.0", "lm.block.0"]),
        (["lm.block.[02]"], ["lm.block.0", "lm.block.2"]),
        (["lm.norm", "projector", "lm.n*"], ["lm.norm", "projector"]),
        (["model.language_model.layers.0.mlp"], ["model.language_model.layers.0.mlp"]),
        (["*layers.?.mlp.down_proj"], [f"model.language_model.layers.{k}.mlp.down_proj" for k in range(3)]),
    ],
)
def test_patterns(shared_backbone: VisionLanguageModel, patterns: list[str], names: list[str]) -> None:
    assert [site.name for site in shared_backbone.sites(patterns)] == names


@pytest.mark.parametrize("pattern", ["lm.block.3", "lm.block", "LM.NORM", "", "layer.*"])
def test_a_pattern_that_matches_nothing(shared_backbone: VisionLanguageModel, pattern: str) -> None:
    with pytest.raises(
        ValueError, match=r"not found: the model has vision\.block\.0–1, projector, lm\.embed, lm\.block\.0–2"
    ) as e:
        shared_backbone.sites(["lm.norm", pattern])
    assert f"site {pattern!r}" in str(e.value)
    assert f"conceptshift sites --model {shared_backbone.source}" in str(e.value)


def test_states_are_those_of_the_model(shared_backbone: VisionLanguageModel, inputs: dict[str, Tensor]) -> None:
    """Compared with what transformers itself returns."""
    model = shared_backbone
    done = model.read(inputs, model.sites(["*"]))
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.inference_mode():
        theirs = model.model(**plain, output_hidden_states=True)
        towers = model.model.model.vision_tower(plain["pixel_values"], output_hidden_states=True).hidden_states
    for number, hidden in enumerate(theirs.hidden_states[:-1]):
        name = "lm.embed" if number == 0 else f"lm.block.{number - 1}"
        assert torch.equal(done.states[name], hidden), name
    # The last of transformers' states has passed the final norm already.
    assert torch.equal(done.states["lm.norm"], theirs.hidden_states[-1])
    assert torch.equal(model.final_norm(done.states["lm.block.2"]), done.states["lm.norm"])
    is_image = done.token_map.roles == Role.IMAGE
    assert is_image.sum(dim=1).tolist() == [64, 64]
    assert torch.equal(done.states["projector"][is_image], theirs.image_hidden_states.reshape(128, -1))
    for number in range(2):
        patches = towers[number + 1][:, 1:]  # without the class token
        assert torch.equal(done.states[f"vision.block.{number}"][is_image].reshape(2, 64, -1), patches)


@pytest.mark.parametrize("mode", ["generate", "read"])
def test_a_module_whose_rows_are_no_positions_is_refused(
    shared_backbone: VisionLanguageModel, inputs: dict[str, Tensor], mode: str
) -> None:
    """The vision tower has 65 rows a picture: to read row p as position p would be nonsense."""
    model = shared_backbone
    sites = model.sites(["model.vision_tower.*.0.mlp"])
    with pytest.raises(ValueError, match=r"model\.vision_tower\.[a-z.]*0\.mlp"):
        _select(model, inputs, sites, mode)


def test_a_module_that_is_never_called_is_refused(
    shared_backbone: VisionLanguageModel, inputs: dict[str, Tensor]
) -> None:
    sites = shared_backbone.sites(["model.language_model.layers"])
    with pytest.raises(ValueError, match=r"model\.language_model\.layers"):
        _select(shared_backbone, inputs, sites, "read")


def _select(model: VisionLanguageModel, inputs: dict[str, Tensor], sites: list[Site], mode: str) -> None:
    done = model.generate(inputs, 3, sites) if mode == "generate" else model.read(inputs, sites)
    done.select(Selector.parse("image"), model.vocabulary)


def test_self_check(backbone: VisionLanguageModel) -> None:
    backbone.self_check()
    with torch.no_grad():
        backbone.final_norm.weight.mul_(1.5)  # type: ignore[operator]
    backbone.self_check()  # still one model, with another norm


def test_self_check_finds_another_norm(backbone: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that is not the one before the unembedding, as in a model that keeps another under the same name."""
    other = torch.nn.LayerNorm(64)
    monkeypatch.setattr(VisionLanguageModel, "final_norm", other)
    with pytest.raises(ValueError, match=r"differs from the model's logits by .* entry in backbone/structure\.py"):
        backbone.self_check()


def test_self_check_finds_states_that_are_not_a_number(backbone: VisionLanguageModel) -> None:
    with torch.no_grad():
        backbone.final_norm.weight[3] = float("nan")  # type: ignore[operator]
    with pytest.raises(ValueError, match="differs from the model's logits"):
        backbone.self_check()


def test_the_command_lists_them(shared_backbone: VisionLanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    sites_command.run(["sites", "--model", shared_backbone.source])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert lines[0] == "vision.block.0    output of CLIPEncoderLayer, one state per patch of the picture"
    assert lines[3] == "lm.embed          input of LlamaDecoderLayer, one state per position of the sequence"
