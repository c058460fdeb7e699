"""`CausalChecker`: what it writes is computed again, does not depend on the batch, and is never empty-handed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conceptshift.callbacks import CausalChecker
from conceptshift.callbacks.causal_checker import choose_cases, read_words
from conceptshift.callbacks.parts.concept_states import ConceptStates
from conceptshift.concepts import KMeans, load_dictionary
from conceptshift.concepts.pca import PCA
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import FeatureExtraction
from lightning.pytorch.strategies import ModelParallelStrategy
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Run = Callable[..., Any]

SITE = "lm.block.1"


def listed(callback: str, **options: object) -> list[str]:
    """A callback on the command line."""
    return [
        f"--trainer.callbacks+={callback}",
        *(f"--trainer.callbacks.{name}={value}" for name, value in options.items()),
    ]


@pytest.fixture
def checked(predict: Run, tmp_path: Path) -> Run:
    """Extract, fit and check in one run: `checked(*more, options of CausalChecker)`."""

    def run(
        *more: object,
        site: str = SITE,
        selector: str = "answer",
        method: str = "KMeans",
        concepts: int = 3,
        fitter: dict[str, object] | None = None,
        **options: object,
    ) -> Any:
        out = tmp_path / "concepts"
        given = {"dictionary": out, "samples": 4, "random": 19, **options}
        return predict(
            tmp_path / "store",
            "--data.limit=16",
            *listed("DictionaryFitter", site=site, selector=selector, out=out, dictionary=method, **(fitter or {})),
            f"--trainer.callbacks.dictionary.n_concepts={concepts}",
            *listed("CausalChecker", **given),
            *more,
            site=site,
            selector=selector,
        )

    return run


def causal(tmp_path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tmp_path / "concepts" / "causal.json").read_text())
    return content


def test_what_is_reported(checked: Run, tmp_path: Path) -> None:
    done = checked()
    assert done.status == 0, done.err
    found, fitted = causal(tmp_path), json.loads((tmp_path / "concepts" / "concepts.json").read_text())
    assert (found["site"], found["selector"], found["variant"]) == (SITE, "answer", "original")
    assert (found["method"], found["k"], found["not_read_again"]) == ("KMeans", 3, 0)
    rows = found["concepts"]
    assert len(rows) >= 2
    assert sorted([row["concept"] for row in rows] + [row["concept"] for row in found["left_out"]]) == [0, 1, 2]
    ids, states = FeatureStore(tmp_path / "store").states(SITE, "answer", "original")
    assigned = load_dictionary(tmp_path / "concepts" / "dictionary.safetensors").assign(states).tolist()
    for row in rows:
        own = {sample_id for sample_id, concept in zip(ids, assigned, strict=True) if concept == row["concept"]}
        assert row["samples"] == min(4, len(own))
        assert row["words"] == fitted["words"][row["concept"]]
        assert row["log_probability"] < 0
        assert 0 < row["own_share"] <= 1
        assert row["random_std"] > 0
        assert row["p"] * 20 == pytest.approx(round(row["p"] * 20))
    assert found["cases"] == sum(row["samples"] for row in rows)
    adjusted = stats.false_discovery_control([row["p"] for row in rows])
    assert [row["p_adjusted"] for row in rows] == pytest.approx(adjusted.tolist())
    assert found["significant"] == sum(adjusted <= 0.05)
    low, high = found["mean_fall_interval"]
    assert low <= found["mean_fall"] <= high
    assert found["mean_fall"] == pytest.approx(sum(row["fall"] for row in rows) / len(rows))


def test_nothing_depends_on_the_batch_size(checked: Run, tmp_path: Path) -> None:
    assert checked(batch_size=3).status == 0
    first = causal(tmp_path)
    assert checked(batch_size=32).status == 0
    second = causal(tmp_path)
    for one, other in zip(first["concepts"], second["concepts"], strict=True):
        for name in ("fall", "random_mean", "random_std", "others_mean", "log_probability"):
            assert one[name] == pytest.approx(other[name], abs=1e-3), name


@pytest.mark.parametrize(
    ("site", "selector", "method"),
    [
        ("lm.norm", "answer_mean", "SemiNMF"),
        ("lm.block.2", "token_class:star,heart,moon,picture,shapes", "Simple"),
        ("lm.block.0", "last_prompt", "PCA"),
        ("projector", "image", "KMeans"),
    ],
)
def test_every_kind_of_site_state_and_dictionary(
    checked: Run, tmp_path: Path, site: str, selector: str, method: str
) -> None:
    done = checked(site=site, selector=selector, method=method)
    assert done.status == 0, done.err
    found = causal(tmp_path)
    assert found["method"] == method
    assert found["not_read_again"] == 0
    assert len(found["concepts"]) + len(found["left_out"]) == 3


def test_the_token_of_interest_is_no_word_of_a_concept(tmp_path: Path) -> None:
    path = tmp_path / "concepts.json"
    fitted, other = (KMeans(3, seed=seed).fit(torch.randn(9, 2)) for seed in (0, 1))
    words = {"words": [["star", "stars", "blue"], ["star"], []], "dictionary_hash": fitted.content_hash}
    path.write_text(json.dumps(words))
    assert read_words(path, "token_of_interest:Star", fitted) == [["stars", "blue"], [], []]
    for selector in ("token_class:star,moon", "answer"):
        assert read_words(path, selector, fitted) == [["star", "stars", "blue"], ["star"], []]
    with pytest.raises(ValueError, match=f"{fitted.content_hash}.*{other.content_hash}"):
        read_words(path, "answer", other)


def test_concepts_without_words_are_listed(checked: Run, tmp_path: Path) -> None:
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text("zebra\n")
    done = checked(fitter={"grounding.lexicon": lexicon})
    assert done.status == 0, done.err
    found = causal(tmp_path)
    assert found["left_out"] == [{"concept": concept, "reason": "no word"} for concept in range(3)]
    assert (found["tried"], found["significant"], found["concepts"]) == (0, 0, [])
    assert found["mean_fall"] is None


def test_a_concept_that_is_the_mean_is_listed(checked: Run, tmp_path: Path) -> None:
    """The centre of all states is what they share, and nothing of its own."""
    assert checked(concepts=1).status == 0
    assert causal(tmp_path)["left_out"] == [{"concept": 0, "reason": "no direction of its own"}]


def test_a_pair_of_models(checked: Run, make_adapter: Run, tmp_path: Path, tiny: Path) -> None:
    """Each variant is checked in the model that it was read in: all states are read again."""
    make_adapter(tiny, tmp_path / "adapter", scale=0.3)
    for variant in ("original", "destination"):
        done = checked(f"--model.destination={tmp_path / 'adapter'}", fitter={"variant": variant})
        assert done.status == 0, done.err
        found = causal(tmp_path)
        assert found["variant"] == variant
        assert found["not_read_again"] == 0
        assert len(found["concepts"]) >= 2


def test_what_tensorboard_shows(checked: Run, tmp_path: Path) -> None:
    assert checked("--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path / 'logs'}").status == 0
    (events,) = (tmp_path / "logs").rglob("events.*")
    log = EventAccumulator(str(events))
    log.Reload()
    assert "causal/concepts" in log.Tags()["images"]
    found = causal(tmp_path)
    assert log.Scalars("causal/concepts/mean_fall")[0].value == pytest.approx(found["mean_fall"], rel=1e-5)
    for row in found["concepts"]:
        (point,) = log.Scalars(f"causal/concepts/fall/concept_{row['concept']:02d}")
        assert point.value == pytest.approx(row["fall"], rel=1e-5)


def test_the_strongest_states_on_the_side_of_the_words(stored_states: Callable[..., ConceptStates]) -> None:
    """One a sample, and counted among the sample's states: those that the selector chooses in it."""
    Z = torch.tensor([[9.0, 0], [8, 0], [-20, 0], [7, 1], [-1, 0.5], [0, -6], [0, 5], [-3, -0.5]])
    ids = ["a", "a", "b", "b", "c", "d", "d", "e"]
    states = stored_states(Z, ids)
    fitted = PCA(n_concepts=2).fit(Z)
    V = fitted.transform(Z)
    assert (V.abs().argmax(dim=1) == torch.tensor([0, 0, 0, 0, 0, 1, 1, 0])).all()
    right, up = (V[0, 0] > 0), (V[6, 1] > 0)
    cases, left_out = choose_cases(fitted, states, [["x"], ["y"]], fitted.dictionary, samples=2)
    chosen = [[(case.row, case.nth) for case in cases if case.concept == k] for k in range(2)]
    assert chosen == [[(0, 0), (3, 1)] if right else [(2, 0), (7, 0)], [(6, 1)] if up else [(5, 0)]]
    assert left_out == []
    without = [{"concept": 0, "reason": "no word"}, {"concept": 1, "reason": "no direction of its own"}]
    assert choose_cases(fitted, states, [[], ["y"]], torch.zeros(2, 2), samples=2) == ([], without)


# --- errors -------------------------------------------------------------------------------------------------


def test_stored_features_alone_cannot_be_checked(checked: Run, cli: Run, tmp_path: Path) -> None:
    assert checked().status == 0
    done = cli(
        "predict",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--model=Replay",
        "--data=StoredFeatures",
        f"--data.folder={tmp_path / 'store'}",
        *listed("CausalChecker", dictionary=tmp_path / "concepts"),
    )
    assert "CausalChecker runs the model, and Replay has none; use --model FeatureExtraction" in done.error


def test_a_folder_without_words(checked: Run, tmp_path: Path, predict: Run) -> None:
    assert checked().status == 0
    (tmp_path / "concepts" / "concepts.json").unlink()
    checker = listed("CausalChecker", dictionary=tmp_path / "concepts")
    done = predict(tmp_path / "again", "--data.limit=4", *checker, site=SITE, selector="answer")
    assert f"{tmp_path / 'concepts' / 'concepts.json'}: no such file" in done.error


def test_a_site_of_the_vision_tower(checked: Run) -> None:
    done = checked(site="vision.block.1", selector="image")
    assert "hidden states can be changed at sites of the language model only" in done.error


@pytest.mark.parametrize(("name", "value", "least"), [("samples", 0, 1), ("random", 18, 19), ("batch_size", 0, 1)])
def test_numbers_that_are_too_small(name: str, value: int, least: int) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"CausalChecker\.{name} must be at least {least}, got {value}"):
        CausalChecker("concepts", **options)


def test_pieces_of_a_model_cannot_be_asked_outside_of_batches(tiny: Path) -> None:
    trainer: Any = SimpleNamespace(strategy=Mock(spec=ModelParallelStrategy))
    module = FeatureExtraction(str(tiny), ["lm.block.1"], ["answer"])
    with pytest.raises(ValueError, match=r"^CausalChecker runs the model outside of its batches, .* --trainer"):
        CausalChecker("nowhere").setup(trainer, module, "predict")
