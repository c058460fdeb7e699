"""Steering as the command line has it: what is applied, in every stage, and what is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.callbacks import Steerer
from conceptshift.concepts import KMeans, SteeringVectors, load_dictionary, load_steering_vectors
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import SteeringStep, VisionLanguageModel
from conceptshift.lightning_modules.backbone import Steering
from conceptshift.lightning_modules.backbone.identity import model_destination_hash, model_hashes
from torch import Tensor

Run = Callable[..., Any]
QUESTIONS = {"data": "VQADataModule"}
SCORER = ("--trainer.callbacks+=VQAScorer", "--trainer.callbacks.out=scores.json")


def steerer(*steps: Mapping[str, object]) -> list[str]:
    return ["--trainer.callbacks+=Steerer", f"--trainer.callbacks.vectors={json.dumps(list(steps))}"]


def answers() -> dict[str, str]:
    rows = json.loads(Path("scores.json").read_text())["predictions"]
    return {sample_id: row["prediction"] for sample_id, row in rows.items()}


@pytest.fixture
def direction() -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path: Path, direction: Tensor) -> str:
    path = tmp_path / "vectors.safetensors"
    SteeringVectors({"lm.block.0": direction, "lm.block.1": -direction}, {}, {}).save(path)
    return str(path)


def dictionary(folder: Path, width: int = 64, concepts: int = 3, site: str = "lm.block.1") -> Path:
    states = torch.randn(40, width, generator=torch.Generator().manual_seed(1))
    KMeans(concepts, seed=0).fit(states).save(folder / "dictionary.safetensors", {"site": site})
    return folder


def test_every_stage_is_steered_alike(validate: Run, file: str, tiny: Path, shapes: Path, cli: Run) -> None:
    """`validate`, `test` and `predict` give the same answers, which are not the unsteered ones."""
    step = {"file": file, "site": "lm.block.0", "alpha": 6.0}
    assert validate(*SCORER, "--data.limit=6", **QUESTIONS).status == 0
    unsteered = answers()
    done = validate(*SCORER, "--data.limit=6", *steerer(step), **QUESTIONS)
    assert done.status == 0, done.err
    validated = answers()
    common = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data=VQADataModule",
              f"--data.root={shapes}", "--data.limit=6"]  # fmt: skip
    model = ["--model=FineTuning", f"--model.model_id={tiny}", "--model.max_new_tokens=5"]
    assert cli("test", *common, *model, *SCORER, *steerer(step)).status == 0
    tested = answers()
    extraction = ["--model=FeatureExtraction", f"--model.model_id={tiny}", "--model.max_new_tokens=5",
                  "--model.sites=['lm.block.0','lm.block.2']", "--model.selectors=['last_prompt']"]  # fmt: skip
    writer = ["--trainer.callbacks+=FeatureWriter", "--trainer.callbacks.folder=features"]
    done = cli("predict", *common, *extraction, *writer, *steerer(step))
    assert done.status == 0, done.err
    store = FeatureStore(Path("features"))
    predicted = {sample_id: row["text"] for sample_id, row in store.samples("original").items()}
    assert validated == tested == predicted
    assert validated != unsteered
    # What was steered is what is stored, and the store says so: it is not gone on with under another steering.
    (noted,) = store.metadata["steering"]
    assert noted["alpha"] == 6.0
    _, states = store.states("lm.block.0", "last_prompt", "original")
    assert cli("predict", *common, *extraction, *writer).status == 2
    assert cli("predict", *common, *extraction, *writer, "--trainer.callbacks.overwrite=true").status == 0
    _, plain = FeatureStore(Path("features")).states("lm.block.0", "last_prompt", "original")
    vector = load_steering_vectors(file).vectors["lm.block.0"]
    torch.testing.assert_close(states, plain + 6 * vector, rtol=1e-4, atol=1e-3)


def test_several_vectors_are_what_intervene_makes_of_them(
    validate: Run, file: str, shared_backbone: VisionLanguageModel, direction: Tensor
) -> None:
    steps: list[dict[str, object]] = [
        {"file": file, "site": "lm.block.0", "alpha": [5.0, 0.0], "positions": "answer"},
        {"file": file, "site": "lm.block.0", "mode": "clamp", "positions": "generated"},
        {"file": file, "site": "lm.block.1", "alpha": 0.5, "mode": "replace", "positions": "last_prompt"},
    ]
    loaded = [SteeringStep(**step).load() for step in steps]  # type: ignore[arg-type]
    meant = [
        Steering("lm.block.0", direction, [5.0, 0.0], "answer"),
        Steering("lm.block.0", direction, 1.0, "generated", "clamp"),
        Steering("lm.block.1", -direction, 0.5, "last_prompt", "replace"),
    ]
    for one, other in zip(loaded, meant, strict=True):
        assert (one.site, one.strengths, one.positions, one.mode) == (
            other.site, other.strengths, other.positions, other.mode
        )  # fmt: skip
        assert torch.equal(one.vector, other.vector)
    assert validate(*SCORER, "--data.limit=6", *steerer(*steps), **QUESTIONS).status == 0
    assert validate(*SCORER, "--data.limit=6", "--data.batch_size=1", *steerer(*steps), **QUESTIONS).status == 0


def test_a_step_with_a_condition_loads_its_dictionary(tmp_path: Path, file: str, direction: Tensor) -> None:
    folder = dictionary(tmp_path)
    by_concept = tmp_path / "fine.safetensors"
    rows = torch.stack([direction, 2 * direction, 0 * direction])
    metadata = {"dictionary": str(folder / "dictionary.safetensors")}
    SteeringVectors({"lm.block.1": rows}, {}, metadata).save(by_concept)
    step = SteeringStep(str(by_concept)).load()
    assert step.by_concept
    assert torch.equal(step.vector, rows)
    known = load_dictionary(folder / "dictionary.safetensors")
    for concepts in (known, known.with_concepts(2 * known.dictionary)):
        noted = {**metadata, "dictionary_hash": concepts.content_hash}
        SteeringVectors({"lm.block.1": rows}, {}, noted).save(by_concept)
        if concepts is known:
            assert SteeringStep(str(by_concept)).load().by_concept
        else:
            with pytest.raises(ValueError, match="it was made for other concepts than those of"):
                SteeringStep(str(by_concept)).load()
    one = SteeringStep(file, site="lm.block.1", dictionary=str(folder), concept=2, threshold=0.1).load()
    assert one.condition is not None
    assert (one.condition.concept, one.condition.threshold, one.by_concept) == (2, 0.1, False)
    assert len(one.condition.dictionary.dictionary) == 3


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"file": "nowhere.safetensors"}, "nowhere.safetensors must be an artifact file, but there is no such file"),
        ({}, "its `site` must be named: it has vectors for lm.block.0, lm.block.1"),
        ({"site": "lm.block.2"}, "it has none for the site 'lm.block.2': it has vectors for lm.block.0, lm.block.1"),
        ({"site": "lm.block.0", "alpha": float("inf")}, "`alpha` must be a finite number"),
        ({"site": "lm.block.0", "positions": "answer_mean"}, "known only after generation"),
        ({"site": "lm.block.0", "positions": "everywhere"}, "selector 'everywhere': expected one of"),
        ({"site": "lm.block.0", "positions": "900:"}, "positions '900:' match nothing at 'lm.block.0': the prompt has"),
        ({"site": "lm.block.0", "concept": 1}, "`dictionary` must name the dictionary"),
        ({"site": "lm.block.0", "dictionary": "DICT"}, "`dictionary` needs a `concept`"),
        ({"site": "lm.block.0", "dictionary": "DICT", "concept": 9}, "`concept` must be one of 0 … 2"),
        ({"site": "lm.block.0", "dictionary": "WIDE", "concept": 0}, "but the concepts of"),
        ({"site": "lm.block.1", "dictionary": "DICT", "concept": 0}, "are of lm.block.0"),
    ],
)
def test_what_does_not_fit_is_told_at_start(
    validate: Run, file: str, tmp_path: Path, step: dict[str, object], message: str
) -> None:
    for name, width in (("DICT", 64), ("WIDE", 80)):
        (tmp_path / name).mkdir()
        dictionary(tmp_path / name, width, site="lm.block.0")
    step = {"file": file, **step}
    if "dictionary" in step:
        step["dictionary"] = str(tmp_path / str(step["dictionary"]))
    # As YAML writes it: JSON's Infinity is none of its numbers.
    given = [f"{key}: {'.inf' if value == float('inf') else json.dumps(value)}" for key, value in step.items()]
    done = validate(
        *SCORER, "--trainer.callbacks+=Steerer", f"--trainer.callbacks.vectors=[{{{', '.join(given)}}}]", **QUESTIONS
    )
    assert message in done.error
    assert not Path("scores.json").exists()


def test_the_order_of_two_steerers_is_unknown(validate: Run, file: str) -> None:
    first, second = ({"file": file, "site": f"lm.block.{block}"} for block in (0, 1))
    assert validate(*steerer(first), *steerer(second), "--data.limit=2").status == 0
    error = validate(*steerer(first), *steerer(second, first), "--data.limit=2").error
    assert "two Steerers at 'lm.block.0', in no known order: list both vectors under `vectors` of one Steerer" in error
    with pytest.raises(ValueError, match="at least one vector"):
        Steerer([])


def test_vectors_of_another_model_are_refused(
    validate: Run, tmp_path: Path, direction: Tensor, tiny: Path, make_model: Callable[..., Path]
) -> None:
    """Those of a pair steer both of its models; those that say nothing of a model pass."""
    own = VisionLanguageModel.load(str(tiny)).weights_hash()
    whole = model_destination_hash(model_hashes(str(tiny), None))
    for name, store in (
        ("ours", {"weights_hash": own}),
        ("of a pair", {"weights_hash": "else", "checkpoint_hashes": {"destination": whole}}),
        ("unknown", {}),
        ("theirs", {"weights_hash": "else", "model_id": "another-model"}),
    ):
        file = tmp_path / f"{name}.safetensors"
        SteeringVectors({"lm.block.0": direction}, {}, {"target": {"store": store}}).save(file)
        done = validate(*steerer({"file": str(file)}), "--data.limit=2")
        if name != "theirs":
            assert done.status == 0, done.err
            continue
        assert (
            f"{file}: made from the states of another-model (weights else), not of {tiny} (weights {own})" in done.error
        )


def test_a_strength_that_no_state_survives_is_refused(validate: Run, file: str) -> None:
    step = {"file": file, "site": "lm.block.0", "alpha": 1e38}
    assert "steering makes hidden states infinite; choose a smaller alpha" in validate(*steerer(step)).error
