"""What dictionaries are learned from, and what is reported of them."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conceptshift.callbacks.dictionary_fitter import reproducibility, summarise
from conceptshift.callbacks.parts.concept_states import ConceptStates
from conceptshift.callbacks.parts.grounding import pictures_of
from conceptshift.concepts import KMeans, SemiNMF, load_dictionary
from conceptshift.datamodules.stored_features import (
    FeatureShardWriter,
    FeatureStore,
    begin_store,
    held_out_ids,
    merge_store,
)
from PIL import Image

Run = Callable[..., Any]
Stored = Callable[..., ConceptStates]
STAR = "token_of_interest:star"


# --- samples of a token of interest ---------------------------------------------------------------------


def write_store(
    folder: Path, references: Mapping[str, Sequence[str]], selectors: Sequence[str] = (STAR,)
) -> FeatureStore:
    """Every sample has one state of each selector, made of its number."""
    metadata = {"sites": ["s"], "selectors": list(selectors), "variants": ["original"]}
    begin_store(folder, metadata, resumed=False, overwrite=False)
    writer = FeatureShardWriter(folder, 0, 10)
    for number, (sample_id, texts) in enumerate(references.items()):
        sample = {"sample_id": sample_id, "variant": "original", "image": "x.jpg", "prompt": "p", "text": "a star",
                  "references": list(texts), "answers": []}  # fmt: skip
        states = [
            {"sample_id": sample_id, "variant": "original", "selector": name, "position": 1, "token": f"t{number}"}
            for name in selectors
        ]
        writer.add([sample], states, {"s": torch.full((len(selectors), 2), float(number))})
    writer.flush()
    merge_store(folder)
    return FeatureStore(folder)


REFERENCES = {
    "a": ["A circle.", "a Star, red"],
    "b": ["a circle", "many stars", "starry"],
    "c": [],
    "d": ["a star-shaped thing"],
}


def test_a_word_that_no_reference_has_is_left_out(tmp_path: Path) -> None:
    found = ConceptStates.read(write_store(tmp_path, REFERENCES), "s", STAR, "original")
    assert found.ids == ["a", "c", "d"]
    assert (found.matched, found.confirmed) == (4, 3)
    assert len(found.samples) == 4
    assert found.tokens == ["t0", "t2", "t3"]
    assert found.states[:, 0].tolist() == [0, 2, 3]


def test_other_selectors_do_not_ask_the_references(tmp_path: Path) -> None:
    store = write_store(tmp_path, REFERENCES, ["token_class:star,circle", "answer_mean"])
    for selector in ("token_class:star,circle", "answer_mean"):
        found = ConceptStates.read(store, "s", selector, "original")
        assert found.ids == ["a", "b", "c", "d"]
        assert (found.matched, found.confirmed) == (4, 4)


def test_a_word_in_no_reference_at_all(tmp_path: Path) -> None:
    store = write_store(tmp_path, {"a": ["a moon"], "b": ["stars"]})
    with pytest.raises(ValueError, match=r"matched 2 original samples, but none of them has the word in a reference"):
        ConceptStates.read(store, "s", STAR, "original")


# --- held-out samples -----------------------------------------------------------------------------------


def test_the_id_alone_decides_what_is_held_out() -> None:
    ids = [f"sample {number}" for number in range(4000)]
    chosen = held_out_ids(ids, 0.25)
    assert 0.22 < len(chosen) / len(ids) < 0.28
    shuffled = random.Random(0).sample(ids, len(ids))
    assert held_out_ids(shuffled, 0.25) == chosen
    assert held_out_ids(shuffled[:1000], 0.25) == chosen & set(shuffled[:1000])
    # A smaller share holds out some of the same samples.
    assert held_out_ids(ids, 0.1) < chosen
    assert held_out_ids(ids, 0.0) == set()


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(ValueError, match="held_out must be at least 0 and below 1"):
        held_out_ids([], share)


def test_held_out_samples_take_no_part(predict: Run, tmp_path: Path) -> None:
    fitter = (
        "--trainer.callbacks+=DictionaryFitter",
        "--trainer.callbacks.site=lm.block.1",
        "--trainer.callbacks.selector=answer",
        "--trainer.callbacks.dictionary=KMeans",
        "--trainer.callbacks.dictionary.n_concepts=2",
        "--trainer.callbacks.held_out=0.4",
        f"--trainer.callbacks.out={tmp_path / 'concepts'}",
    )
    assert predict(tmp_path / "store", "--data.limit=12", *fitter).status == 0
    ids, states = FeatureStore(tmp_path / "store").states("lm.block.1", "answer", "original")
    held_out = held_out_ids(ids, 0.4)
    assert 0 < len(held_out) < 12
    rows = [row for row, sample_id in enumerate(ids) if sample_id not in held_out]
    dictionary = load_dictionary(tmp_path / "concepts" / "dictionary.safetensors")
    assert dictionary.metadata["held_out"] == 0.4
    assert torch.equal(dictionary.dictionary, KMeans(2).fit(states[rows]).dictionary)
    summary = json.loads((tmp_path / "concepts" / "concepts.json").read_text())
    assert (summary["held_out"], summary["held_out_samples"]) == (0.4, len(held_out))
    assert summary["states"] == len(rows)
    assert not held_out & {picture["sample_id"] for row in summary["images"] for picture in row}


# --- the summary ----------------------------------------------------------------------------------------


def test_states_that_activate_nothing_belong_to_no_concept(stored_states: Stored) -> None:
    generator = torch.Generator().manual_seed(0)
    Z = torch.cat([torch.rand(30, 6, generator=generator) * 20, torch.zeros(5, 6)])
    dictionary = SemiNMF(3).fit(Z)
    found = stored_states(Z)
    summary = summarise(dictionary, found, dictionary.transform(found.states), [["a"], ["b"], ["c"]], images=2)
    assert sum(summary["sizes"]) == 30
    assert [len(row) for row in summary["images"]] == [2, 2, 2]


def test_a_sample_with_several_states_is_shown_once() -> None:
    V = torch.tensor([[5.0, 0.0], [-9.0, 1.0], [3.0, 2.0], [0.5, -4.0]])
    samples = {name: {"image": f"{name}.jpg", "text": name} for name in "ab"}
    found = pictures_of(V, ["a", "a", "b", "b"], samples, images=2)
    shown = [[(picture["sample_id"], picture["activation"]) for picture in row] for row in found]
    assert shown == [[("a", -9.0), ("b", 3.0)], [("b", -4.0), ("a", 1.0)]]


def test_reproducibility_fits_copies_with_other_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(4) * 50
    clear = torch.cat([centre + torch.randn(20, 4, generator=generator) for centre in centres])
    dictionary = KMeans(4, seed=3).fit(clear)
    before = dictionary.dictionary.clone()
    found = reproducibility(dictionary, clear, False, seeds=2)
    assert len(found["stability"]) == 4
    assert found["mean_stability"] == pytest.approx(1, abs=1e-4)
    assert dictionary.seed == 3
    assert torch.equal(dictionary.dictionary, before)
    noise = torch.randn(80, 30, generator=generator)
    assert reproducibility(KMeans(4).fit(noise), noise, False, seeds=2)["mean_stability"] < 0.95
    assert reproducibility(dictionary, clear, False, seeds=0) == {}


# --- TensorBoard ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", ["there", "gone"])
def test_the_projector_has_a_row_and_a_picture_for_each_state(
    predict: Run, cli: Run, tmp_path: Path, shapes: Path, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two dictionaries in one run; states are drawn where there are many, here more than 30."""
    monkeypatch.setattr("conceptshift.callbacks.parts.projector._STATES", 30)
    root = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    assert predict(tmp_path / "store", "--data.limit=9", root=root).status == 0
    if pictures == "gone":
        shutil.rmtree(root)
    options = []
    for name in ("one", "two"):
        options += [
            "--trainer.callbacks+=DictionaryFitter",
            "--trainer.callbacks.site=lm.block.1",
            "--trainer.callbacks.selector=answer",
            "--trainer.callbacks.dictionary=KMeans",
            "--trainer.callbacks.dictionary.n_concepts=2",
            f"--trainer.callbacks.out={tmp_path / name}",
        ]
    logger = ["--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.name=",
              "--trainer.logger.version=logs"]  # fmt: skip
    done = cli(
        "predict", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model=Replay",
        "--data=StoredFeatures", f"--data.folder={tmp_path / 'store'}", *options, *logger,
    )  # fmt: skip
    assert done.status == 0, done.err
    config = (tmp_path / "logs" / "projector_config.pbtxt").read_text()
    ids, states = FeatureStore(tmp_path / "store").states("lm.block.1", "answer", "original")
    assert len(ids) > 30
    for name in ("one", "two"):
        folder = tmp_path / "logs" / "00000" / name
        assert f"00000/{name}/tensors.tsv" in config
        vectors = np.loadtxt(folder / "tensors.tsv", delimiter="\t")
        assert vectors.shape == (30, states.shape[1])
        header, *rows = (line.split("\t") for line in (folder / "metadata.tsv").read_text().splitlines())
        assert header == ["concept", "words", "sample", "token"]
        assert len(rows) == 30
        dictionary = load_dictionary(tmp_path / name / "dictionary.safetensors")
        words = json.loads((tmp_path / name / "concepts.json").read_text())["words"]
        for vector, (concept, named, sample_id, token) in zip(vectors, rows, strict=True):
            assert int(dictionary.assign(torch.tensor(vector)[None].float())) == int(concept)
            assert named == " ".join(words[int(concept)][:3])
            (row,) = (torch.tensor(vector) - states).abs().sum(dim=1).lt(1e-3).nonzero()[:1].flatten().tolist() or [-1]
            assert ids[row] == sample_id
            assert len(token) > 2
        with Image.open(folder / "sprite.png") as sprite:
            # Six by six squares of 64 pixels hold 30.
            assert sprite.size == (6 * 64, 6 * 64)
            corner = np.asarray(sprite)[:64, :64].reshape(-1, 3)
        assert (corner.std() < 1) == (pictures == "gone")
    assert "single_image_dim: 64" in config
