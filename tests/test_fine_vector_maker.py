"""Fine vectors of a dictionary: u_j − u_i for every way, while a model runs and from stored states."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from conceptshift.callbacks import FineVectorMaker
from conceptshift.concepts import KMeans, load_dictionary, load_steering_vectors
from conceptshift.tests.results import measured

from .conftest import QUIET, Ran

Run = Callable[..., Ran]


def maker(out: str, dictionary: str = "concepts", site: str = "lm.block.1") -> list[str]:
    return [
        "--trainer.callbacks+=FineVectorMaker",
        f"--trainer.callbacks.site={site}",
        f"--trainer.callbacks.dictionary={dictionary}",
        f"--trainer.callbacks.out={out}",
    ]


def fitter(out: str, n_concepts: int = 3) -> list[str]:
    options = {
        "site": "lm.block.1", "selector": "answer", "dictionary": "KMeans", "dictionary.n_concepts": n_concepts,
        "grounding.candidates": 15, "out": out,
    }  # fmt: skip
    return ["--trainer.callbacks+=DictionaryFitter", *(f"--trainer.callbacks.{k}={v}" for k, v in options.items())]


def check(out: Path, dictionary: Path, concepts: int) -> None:
    U = load_dictionary(dictionary).dictionary
    ways = list(itertools.permutations(range(concepts), 2))
    assert {path.name for path in out.iterdir()} == {f"{i}-{j}.safetensors" for i, j in ways}
    for i, j in ways:
        found = load_steering_vectors(out / f"{i}-{j}.safetensors")
        assert list(found.vectors) == ["lm.block.1"]
        assert torch.equal(found.vectors["lm.block.1"], U[j] - U[i])
        assert float(found.vectors["lm.block.1"].norm()) > 0
        assert found.shuffled == {}
        assert found.metadata["concepts"] == [i, j]
        assert found.metadata["dictionary_file"] == str(dictionary)


def test_vectors_of_a_dictionary_of_the_same_run_and_of_a_replay(predict: Run, cli: Run) -> None:
    done = predict(Path("features"), "--data.limit=12", *fitter("concepts"), *maker("live"))
    assert done.status == 0, done.err
    check(Path("live"), Path("concepts/dictionary.safetensors"), 3)
    replay = ["predict", *QUIET, "--model=Replay", "--data=StoredFeatures", "--data.folder=features"]
    assert cli(*replay, *maker("again")).status == 0
    for path in Path("live").iterdir():
        one, other = (load_steering_vectors(folder / path.name) for folder in (Path("again"), Path("live")))
        assert torch.equal(one.vectors["lm.block.1"], other.vectors["lm.block.1"])
        assert measured(one.metadata) == measured(other.metadata)
    # Fewer concepts leave nothing of those before; two dictionaries may be taken in one run.
    done = cli(
        *replay, *fitter("fewer", 2), *maker("live", "fewer"), *maker("again", "concepts/dictionary.safetensors")
    )
    assert done.status == 0, done.err
    check(Path("live"), Path("fewer/dictionary.safetensors"), 2)
    check(Path("again"), Path("concepts/dictionary.safetensors"), 3)


def test_what_is_refused_at_start(predict: Run, tmp_path: Path) -> None:
    states = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    KMeans(2, seed=0).fit(states).save(tmp_path / "concepts" / "dictionary.safetensors", {"site": "lm.block.1"})
    small = "--data.limit=2"
    assert "none/dictionary.safetensors" in predict(Path("f"), small, *maker("out", "none")).error
    error = predict(Path("f"), small, *maker("out", site="lm.block.2")).error
    assert "its dictionary is of the site 'lm.block.1', the vector of 'lm.block.2'" in error
    # Its own dictionary lies there.
    error = predict(Path("f"), small, *maker("concepts")).error
    assert "concepts: holds other files than fine vectors; choose a new folder" in error
    assert (tmp_path / "concepts" / "dictionary.safetensors").is_file()
    assert not Path("f").exists()
    assert not Path("out").exists()


def test_those_of_two_dictionaries_are_told_apart() -> None:
    keys = {FineVectorMaker("lm.block.1", "concepts", out).state_key for out in ("a", "b")}
    assert len(keys) == 2
