"""`conceptshift explain`: the numbers of `predict`, for one picture, with a figure; and one line where it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.cli.explain_figure import Explanation, explain_figure
from conceptshift.concepts import load_dictionary
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import VisionLanguageModel
from peft import LoraConfig
from PIL import Image

Run = Callable[..., Any]


@pytest.fixture
def adapter(make_adapter: Run, tiny: Path, tmp_path: Path) -> Path:
    made: Path = make_adapter(tiny, tmp_path / "adapter", scale=0.2)
    return made


@pytest.fixture
def fitted(predict: Run, tmp_path: Path) -> Run:
    """Extract states of 12 pictures and learn a dictionary from them; gives the dictionary's folder."""

    def fit(
        *more: object,
        selector: str = "answer_mean",
        site: str = "lm.block.1",
        method: str = "KMeans",
        variant: str = "original",
    ) -> Path:
        done = predict(
            tmp_path / "store",
            "--data.limit=12",
            "--trainer.callbacks+=DictionaryFitter",
            f"--trainer.callbacks.features={tmp_path / 'store'}",
            f"--trainer.callbacks.site={site}",
            f"--trainer.callbacks.selector={selector}",
            f"--trainer.callbacks.dictionary={method}",
            "--trainer.callbacks.dictionary.n_concepts=4",
            f"--trainer.callbacks.variant={variant}",
            f"--trainer.callbacks.out={tmp_path / 'concepts'}",
            *more,
            site=site,
            selector=selector,
        )
        assert done.status == 0, done.err
        return tmp_path / "concepts"

    return fit


def picture_of(folder: Path, variant: str = "original") -> tuple[str, str, str]:
    """Id, picture and answer of one sample of the store beside a dictionary."""
    row = list(FeatureStore(folder.parent / "store").samples(variant).values())[3]
    return row["sample_id"], row["image"], row["text"]


# --- what it says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "site", "method"),
    [
        ("answer_mean", "lm.block.1", "KMeans"),
        ("answer", "lm.norm", "SemiNMF"),
        ("last_prompt", "lm.block.2", "PCA"),
        ("image", "projector", "KMeans"),
        ("image", "vision.block.0", "SemiNMF"),
    ],
)
def test_activations_are_those_of_predict(
    cli: Run, fitted: Run, tmp_path: Path, selector: str, site: str, method: str
) -> None:
    folder = fitted(selector=selector, site=site, method=method)
    sample_id, image, answer = picture_of(folder)
    done = cli("explain", "--image", image, "--dictionary", folder, "--json", "numbers.json", "--concepts", 3)
    assert done.status == 0, done.err
    ids, states = FeatureStore(tmp_path / "store").states(site, selector, "original")
    here = states[torch.tensor([name == sample_id for name in ids])]
    expected = load_dictionary(folder / "dictionary.safetensors").transform(here).mean(dim=0)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    torch.testing.assert_close(torch.tensor(numbers["activations"]), expected, atol=1e-3, rtol=1e-3)
    assert (numbers["answer"], numbers["selector"], numbers["site"]) == (answer, selector, site)
    assert numbers["words"] == json.loads((folder / "concepts.json").read_text())["words"]
    order = expected.abs().argsort(descending=True).tolist()
    assert numbers["top"] == [k for k in order if expected[k] != 0][:3]
    assert f"answer   {answer}" in done.out
    shown = [line.split() for line in done.out.splitlines() if line.startswith("    ")]
    assert [int(row[0]) for row in shown] == numbers["top"]
    assert [float(row[1]) for row in shown] == pytest.approx([float(expected[k]) for k in numbers["top"]], rel=1e-2)
    figure = Image.open(tmp_path / f"{Path(image).stem}-concepts.png")
    assert figure.format == "PNG"
    assert figure.width > 1000


def test_a_dictionary_of_the_destination(cli: Run, fitted: Run, adapter: Path, tmp_path: Path) -> None:
    folder = fitted(f"--model.destination={adapter}", variant="destination")
    sample_id, image, answer = picture_of(folder, "destination")
    options = ("--image", image, "--dictionary", folder, "--json", "numbers.json")
    assert cli("explain", *options).status == 0
    ids, states = FeatureStore(tmp_path / "store").states("lm.block.1", "answer_mean", "destination")
    dictionary = load_dictionary(folder / "dictionary.safetensors")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    expected = dictionary.transform(states[ids.index(sample_id)][None])[0]
    torch.testing.assert_close(torch.tensor(numbers["activations"]), expected, atol=1e-3, rtol=1e-3)
    assert numbers["answer"] == answer
    moved = adapter.rename(tmp_path / "moved")
    assert "no such folder; give a folder" in cli("explain", *options).error
    assert cli("explain", *options, "--destination", moved).status == 0


def test_another_adapter_is_refused(cli: Run, fitted: Run, adapter: Path, tiny: Path, tmp_path: Path) -> None:
    folder = fitted(f"--model.destination={adapter}", variant="destination")
    model = VisionLanguageModel.load(str(tiny))
    model.add_lora(LoraConfig(r=4, task_type="CAUSAL_LM"))
    model.save(tmp_path / "other")
    _, image, _ = picture_of(folder)
    error = cli("explain", "--image", image, "--dictionary", folder, "--destination", tmp_path / "other").error
    assert f") than those in '{tmp_path / 'other'}' (" in error
    assert "--destination" in error


def test_the_precision_of_the_weights_is_remembered(cli: Run, fitted: Run) -> None:
    """In another precision they would not be the same weights."""
    folder = fitted("--model.dtype=bfloat16")
    done = cli("explain", "--image", picture_of(folder)[1], "--dictionary", folder)
    assert done.status == 0, done.err


def test_words_are_found_anew_where_none_lie_beside(cli: Run, fitted: Run, tmp_path: Path) -> None:
    folder = fitted(site="lm.norm")
    options = ("--image", picture_of(folder)[1], "--dictionary", folder / "dictionary.safetensors", "--json", "a.json")
    words = json.loads((folder / "concepts.json").read_text())["words"]
    assert any(words)
    (folder / "concepts.json").unlink()
    assert cli("explain", *options).status == 0
    assert json.loads((tmp_path / "a.json").read_text())["words"] == words


def test_prompt_and_selector_can_be_replaced(cli: Run, fitted: Run, tmp_path: Path) -> None:
    folder = fitted()
    _, image, answer = picture_of(folder)
    options = ("explain", "--image", image, "--dictionary", folder, "--json", "a.json")
    assert cli(*options, "--prompt", "Who is there?", "--selector", "last_prompt").status == 0
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert (numbers["prompt"], numbers["selector"]) == ("Who is there?", "last_prompt")
    assert numbers["answer"] != answer


def test_questions_get_what_followed_them(cli: Run, fitted: Run, tmp_path: Path) -> None:
    folder = fitted("--data=VQADataModule", "--data.predict_split=train2014", selector="last_prompt")
    sample_id, image, answer = picture_of(folder)
    row = FeatureStore(tmp_path / "store").samples("original")[sample_id]
    suffix = FeatureStore(tmp_path / "store").metadata["data"]["prompt"]
    options = ("explain", "--image", image, "--dictionary", folder, "--json", "a.json")
    assert "ask about this one with --prompt" in cli(*options).error
    assert cli(*options, "--prompt", row["prompt"].removesuffix(suffix)).status == 0
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert (numbers["prompt"], numbers["answer"]) == (row["prompt"], answer)


def test_a_model_whose_visual_tokens_cannot_be_placed(
    cli: Run, fitted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fitted()

    def unplaced(model: VisionLanguageModel, width: int, height: int) -> None:
        raise ValueError("patches cannot be placed")

    monkeypatch.setattr(VisionLanguageModel, "patch_grid", unplaced)
    done = cli("explain", "--image", picture_of(folder)[1], "--dictionary", folder, "--out", "a.pdf")
    assert done.status == 0
    assert "no heat-maps: patches cannot be placed" in done.out
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_any_answer_can_be_drawn(tmp_path: Path) -> None:
    """Also one with what looks like a formula, and a state that activates nothing."""
    picture = Image.new("RGB", (40, 30))
    for answer, top in (("it costs $5 or $x_{", [1, 0]), ("word " * 300, []), ("", [0])):
        overlays = [picture] * len(top)
        words = [["a" * 60, "b"], []]
        explained = Explanation(picture, "What?", answer, "answer, lm.norm", [-0.5, 2.0], top, words, overlays, True)
        explain_figure(explained).savefig(tmp_path / "figure.png")
        assert Image.open(tmp_path / "figure.png").size[0] > 500


def test_help_tells_a_newcomer_what_it_does(cli: Run) -> None:
    done = cli("explain", "--help")
    text = " ".join(done.out.split())
    assert "Show which concepts of a dictionary one picture activates" in text
    assert "a heat-map of each of these concepts." in text
    assert "explain" in cli("--help").out


# --- what it refuses --------------------------------------------------------------------------------------


def test_a_word_that_the_answer_lacks(cli: Run, fitted: Run, tmp_path: Path) -> None:
    folder = fitted()
    _, image, answer = picture_of(folder)
    options = ("explain", "--image", image, "--dictionary", folder, "--selector")
    error = cli(*options, "token_of_interest:xylophone").error
    assert f"'token_of_interest:xylophone' finds nothing in the answer {answer!r}" in error
    assert "--selector answer_mean, or another picture" in error
    assert "expected one of" in cli(*options, "nonsense").error
    assert not list(tmp_path.glob("*.png"))


def test_unusable_files(cli: Run, fitted: Run, tmp_path: Path) -> None:
    folder = fitted()
    _, image, _ = picture_of(folder)
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    for bad, message in ((tmp_path / "none.jpg", "no such picture"), (text, "not a picture that Pillow can read")):
        error = cli("explain", "--image", bad, "--dictionary", folder).error
        assert f"{bad}: {message}" in error
        assert error.endswith("give a picture with --image")
    for bad, message in ((tmp_path / "none", "no such file"), (text, "no safetensors file")):
        assert message in cli("explain", "--image", image, "--dictionary", bad).error
    (folder / "concepts.json").write_text("{")
    assert "concepts.json: malformed JSON" in cli("explain", "--image", image, "--dictionary", folder).error


def test_another_model(cli: Run, fitted: Run, make_model: Run, tmp_path: Path) -> None:
    folder = fitted()
    _, image, _ = picture_of(folder)
    options = ("explain", "--image", image, "--dictionary", folder)
    other = make_model(seed=6)
    error = cli(*options, "--model", other).error
    assert f") than those in '{other}' (files:" in error
    assert "--model" in error
    assert "no such folder; give a folder" in cli(*options, "--model", tmp_path / "none").error
    assert "leave --destination out" in cli(*options, "--destination", tmp_path / "none").error
    assert "--concepts must be at least 1, got 0" in cli(*options, "--concepts", 0).error


def test_metadata_that_do_not_suffice(cli: Run, fitted: Run, make_model: Run, tmp_path: Path) -> None:
    folder = fitted()
    _, image, _ = picture_of(folder)
    dictionary = load_dictionary(folder / "dictionary.safetensors")
    whole, bad = dictionary.metadata, tmp_path / "bad.safetensors"

    def error(metadata: dict[str, Any], *more: object) -> str:
        dictionary.save(bad, metadata)
        line = str(cli("explain", "--image", image, "--dictionary", bad, *more).error)
        assert str(bad) in line
        return line

    assert "metadata lack 'site'" in error({})
    assert "metadata lack 'features'" in error({key: whole[key] for key in ("site", "selector", "variant")})
    features = {key: value for key, value in whole["features"].items() if key != "model_id"}
    assert "metadata lack 'model_id'; give it with --model" in error({**whole, "features": features})
    assert "ask about this one with --prompt" in error({**whole, "features": {**features, "data": {}}})
    assert "metadata lack 'destination'; give it with --destination" in error(
        {**whole, "variant": "destination", "features": {**whole["features"], "checkpoints": {}}}
    )
    del features["weights_hash"]
    narrow = make_model(text_width=32)
    line = error({**whole, "features": features}, "--model", narrow)
    assert f"concepts of width 64, but the states of '{narrow}' at 'lm.block.1' have width 32" in line
    visual = {**whole, "site": "projector"}
    assert "states of visual tokens only; leave --selector out" in error(visual, "--selector", "answer_mean")
