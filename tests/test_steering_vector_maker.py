"""Steering vectors from stored states: which states, which method, and what is refused before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conceptshift.callbacks import OfConcept, StateSet, SteeringVectorMaker
from conceptshift.callbacks.parts.store_rows import store_rows
from conceptshift.concepts import (
    KMeans,
    cluster_vectors,
    load_dictionary,
    load_steering_vectors,
    principal_vector,
    probe_accuracy,
    probe_vector,
)
from conceptshift.datamodules import Batch, Sample
from conceptshift.datamodules.stored_features import FeatureShardWriter, FeatureStore, begin_store, merge_store
from conceptshift.lightning_modules import Extraction
from conceptshift.lightning_modules.backbone import Rows
from conceptshift.tests.results import measured

Run = Callable[..., Any]


@dataclass
class Planted:
    """What one sample's states are made of."""

    text: str
    label: str
    states: Sequence[Sequence[float]]


# Two states a sample; the second site has minus these.
SAMPLES = {
    "a": Planted("Yes", "safe", [[1, 0], [1, 1]]),
    "b": Planted("no", "unsafe", [[4, 0], [4, 3]]),
    "c": Planted("a red circle", "unsafe", [[0, 8], [1, 8]]),
    "d": Planted("snow", "", [[0, 9], [2, 9]]),
    "e": Planted("No.", "", [[6, 0], [6, 3]]),
}


def write_store(folder: Path, samples: dict[str, Planted] | None = None, offset: float = 0) -> FeatureStore:
    """A store of two sites and variants; the destination's states lie higher by `offset`."""
    samples = SAMPLES if samples is None else samples
    metadata = {
        "sites": ["lm.block.1", "lm.block.2"], "selectors": ["answer"], "variants": ["original", "destination"],
        "model_id": "tiny", "weights_hash": "w", "checkpoint_hashes": {"destination": "c"}, "data": {"split": "val"},
    }  # fmt: skip
    begin_store(folder, metadata, resumed=False, overwrite=True)
    writer = FeatureShardWriter(folder, 0, 4)
    for sample_id, planted in samples.items():
        for variant, more in (("original", 0.0), ("destination", offset)):
            of = {"sample_id": sample_id, "variant": variant}
            row = {**of, "image": "x.jpg", "prompt": "p", "text": planted.text, "references": [], "answers": [],
                   "label": planted.label}  # fmt: skip
            states = [
                {**of, "selector": "answer", "position": 7 + place, "token": "t"}
                for place in range(len(planted.states))
            ]
            Z = torch.tensor(planted.states) + more
            writer.add([row], states, {"lm.block.1": Z, "lm.block.2": -Z})
    writer.flush()
    merge_store(folder)
    return FeatureStore(folder)


def read(store: FeatureStore, **options: Any) -> list[list[float]]:
    states: list[list[float]] = StateSet("answer", **options).read(store, "lm.block.1").at("lm.block.1").tolist()
    return states


def fitted(path: Path, site: str, centres: Sequence[Sequence[float]]) -> Path:
    """A dictionary with these centres."""
    KMeans(len(centres)).fit(torch.tensor(centres).float()).save(path, {"site": site})
    return path


# --- which states ---------------------------------------------------------------------------------------


def test_answers_match_as_a_whole(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    # Not "snow"; after normalisation "No." is "no".
    assert read(store, answer="no") == [[4, 0], [4, 3], [6, 0], [6, 3]]
    assert read(store, answer="YES!") == [[1, 0], [1, 1]]
    assert len(read(store)) == 10


def test_words_labels_and_concepts(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    assert read(store, words="colors") == read(store, words=["Circle", "moon"]) == [[0, 8], [1, 8]]
    assert read(store, label="unsafe") == [[4, 0], [4, 3], [0, 8], [1, 8]]
    path = fitted(tmp_path / "d" / "dictionary.safetensors", "lm.block.2", [[-1, 0], [0, -9], [-5, -1]])
    concepts = load_dictionary(path).assign(torch.tensor([[-1.0, 0], [0, -9], [-5, -1]])).tolist()
    for given in (path, path.parent):
        of = [OfConcept(str(given), index) for index in concepts]
        # The dictionary is of the other site, where states have the opposite sign.
        assert read(store, concept=of[0]) == [[1, 0], [1, 1]]
        assert read(store, concept=of[1]) == [[0, 8], [1, 8], [0, 9], [2, 9]]
        assert read(store, concept=of[2]) == read(store, answer="no")
    # All of them together.
    assert read(store, concept=of[2], label="unsafe", answer="no", words=["no"]) == [[4, 0], [4, 3]]


def test_the_filter_that_leaves_nothing_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    path = fitted(tmp_path / "dictionary.safetensors", "lm.block.1", [[1, 0], [900, 900]])
    far = int(load_dictionary(path).assign(torch.tensor([[900.0, 900.0]])))
    for options, message in (
        (
            {"answer": "frisbee"},
            "`answer` = 'frisbee' leaves none of 10 original states.*frequent are 'no', 'yes'",
        ),
        ({"words": ["moon"]}, r"`words` = \['moon'\] leaves none of 10 original states of 'answer'$"),
        ({"label": "odd"}, "`label` = 'odd' leaves none of 10 original states.*'unsafe', '', 'safe'"),
        ({"concept": OfConcept(str(path), far)}, "`concept` = OfConcept.* leaves none of 10"),
        ({"answer": "no", "label": "safe"}, "`label` = 'safe' leaves none of 4 original states"),
        ({"variant": "merged"}, "no variant 'merged'; the store has original, destination"),
    ):
        with pytest.raises(ValueError, match=message):
            read(store, **options)


def test_labels_come_from_the_samples_and_old_stores_have_none(tmp_path: Path) -> None:
    sample = Sample("a", Path("x.jpg"), "p", "t", label="unsafe")
    read_off = Extraction("original", ["yes"], [Rows("all", [0], [3], ["t"], {"s": torch.ones(1, 2)})])
    (row,), _, _ = store_rows([read_off], Batch([sample], {}))
    assert row["label"] == "unsafe"
    store = write_store(tmp_path / "store")
    assert [row["label"] for row in store.samples("original").values()] == ["safe", "unsafe", "unsafe", "", ""]
    path = store.folder / "samples.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["label"]), path)
    assert [row["label"] for row in FeatureStore(store.folder).samples("original").values()] == [""] * 5
    with pytest.raises(ValueError, match="`label` = 'safe' leaves none"):
        read(FeatureStore(store.folder), label="safe")


# --- pairs ----------------------------------------------------------------------------------------------


def test_pairs_are_of_one_sample_and_position(tmp_path: Path) -> None:
    # The second store lacks samples, has others, and of one sample fewer states.
    fewer = {
        "e": Planted("", "", [[60, 0], [60, 30]]), "x": Planted("", "", [[7, 7]]), "c": Planted("", "", [[0, 80]]),
    }  # fmt: skip
    first, second = write_store(tmp_path / "one"), write_store(tmp_path / "two", fewer)
    one, two = (StateSet("answer").read(store, "lm.block.1") for store in (first, second))
    target, source = one.paired_with(two)
    assert target.at("lm.block.1").tolist() == [[0, 8], [6, 0], [6, 3]]
    torch.testing.assert_close(source.at("lm.block.1"), 10 * target.at("lm.block.1"))
    with pytest.raises(ValueError, match=r"needs pairs.*0 of 2 target states in .* among 4 source"):
        StateSet("answer", answer="yes").read(first, "lm.block.1").paired_with(two)


def test_single_states_are_paired_whatever_their_position(tmp_path: Path) -> None:
    one, two = (
        write_store(tmp_path / name, {key: Planted("", "", [[scale * number, 1]]) for number, key in enumerate(keys)})
        for name, keys, scale in (("one", "abc", 1), ("two", "xabc", 1))
    )
    path = two.folder / "states.parquet"
    table = pq.read_table(path)
    moved = table["position"].combine_chunks().to_pandas() + 5
    pq.write_table(
        table.set_column(table.schema.get_field_index("position"), "position", [moved.astype("int32")]), path
    )
    pairs = (StateSet("answer").read(FeatureStore(store.folder), "lm.block.1") for store in (one, two))
    target, source = next(pairs).paired_with(next(pairs))
    torch.testing.assert_close(source.at("lm.block.1") - target.at("lm.block.1"), torch.tensor([[1.0, 0.0]] * 3))


# --- methods, by replay ---------------------------------------------------------------------------------


def maker(out: Path | str = "vector.safetensors", **options: Any) -> list[str]:
    options = {"site": "lm.block.1", "out": out, **options}
    return [
        "--trainer.callbacks+=SteeringVectorMaker",
        *(f"--trainer.callbacks.{name}={value}" for name, value in options.items()),
    ]


@pytest.fixture
def replay(cli: Run) -> Run:
    """Make a vector of a store: `replay(folder, *more, site=…, target=…)`."""

    def run(folder: Path, *more: object, **options: Any) -> Any:
        return cli(
            "predict", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model=Replay",
            "--data=StoredFeatures", f"--data.folder={folder}", *more, *maker(**options),
        )  # fmt: skip

    return run


YES_NO = {"target": "{selector: answer, answer: 'no'}", "source": "{selector: answer, answer: 'yes'}"}
SHIFTED = {"target": "{selector: answer, variant: destination}", "source": "{selector: answer}"}


def test_a_file_has_a_vector_for_each_site_and_says_what_it_is(replay: Run, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    done = replay(store.folder, **{**YES_NO, "site": "[lm.block.1,lm.block.2]"}, shuffled=3, seed=4)
    assert done.status == 0, done.err
    made = load_steering_vectors("vector.safetensors")
    assert {site: vector.tolist() for site, vector in made.vectors.items()} == {
        "lm.block.1": [4, 1],
        "lm.block.2": [-4, -1],
    }
    assert made.shuffled["lm.block.2"].shape == (3, 2)
    # The same labels are shuffled at every site.
    assert torch.equal(made.shuffled["lm.block.1"], -made.shuffled["lm.block.2"])
    torch.testing.assert_close(made.shuffled["lm.block.1"].norm(dim=1), torch.full((3,), 17**0.5))
    metadata = made.metadata
    assert metadata["target"].pop("store") == metadata["source"].pop("store") == store.metadata
    assert store.metadata["weights_hash"] == "w"
    side = {
        "selector": "answer", "features": str(store.folder), "variant": "original", "words": None, "concept": None,
        "label": None,
    }  # fmt: skip
    assert metadata["target"] == {**side, "answer": "no", "states": 4, "samples": 2}
    assert metadata["source"] == {**side, "answer": "yes", "states": 2, "samples": 1}
    assert metadata["length"] == dict.fromkeys(made.vectors, pytest.approx(17**0.5))
    assert [len(lengths) for lengths in metadata["shuffled_lengths"].values()] == [3, 3]
    wanted = {"sites": ["lm.block.1", "lm.block.2"], "method": "coarse", "norm": "natural", "seed": 4}
    assert wanted.items() <= metadata.items()


def test_unit_length_and_no_controls(replay: Run, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    assert replay(store.folder, **YES_NO, norm="unit", shuffled=0).status == 0
    made = load_steering_vectors("vector.safetensors")
    torch.testing.assert_close(made.vectors["lm.block.1"], torch.tensor([4.0, 1.0]) / 17**0.5)
    assert made.metadata["length"]["lm.block.1"] == pytest.approx(17**0.5)
    assert made.shuffled == {}


def test_principal(replay: Run, tmp_path: Path) -> None:
    noisy = {
        f"{number}": Planted("", "", torch.randn(2, 4, generator=torch.Generator().manual_seed(number)).tolist())
        for number in range(9)
    }
    store = write_store(tmp_path / "store", noisy, offset=3)
    assert replay(store.folder, **SHIFTED, method="principal", norm="unit").status == 0
    made = load_steering_vectors("vector.safetensors")
    torch.testing.assert_close(made.vectors["lm.block.1"], torch.full((4,), 0.5))
    assert made.metadata["state_pairs"] == 18
    assert made.metadata["length"]["lm.block.1"] == pytest.approx(6)
    # From one store to another that has some of the samples.
    some = write_store(tmp_path / "some", {key: noisy[key] for key in "2478"}, offset=5)
    two_stores = {"target": f"{{selector: answer, variant: destination, features: {some.folder}}}"}
    assert replay(store.folder, **{**SHIFTED, **two_stores}, method="principal").status == 0
    made = load_steering_vectors("vector.safetensors")
    assert made.metadata["state_pairs"] == 8
    target, source = (read(found, variant=name) for found, name in ((some, "destination"), (some, "original")))
    torch.testing.assert_close(made.vectors["lm.block.1"], principal_vector(torch.tensor(target), torch.tensor(source)))


def test_probe(replay: Run, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {**SAMPLES, "f": Planted("Yes", "safe", [[0, 1], [2, 1]])})
    assert (
        replay(store.folder, target="{selector: answer, label: unsafe}", source=YES_NO["source"], method="probe").status
        == 0
    )
    made = load_steering_vectors("vector.safetensors")
    target, source = torch.tensor(read(store, label="unsafe")), torch.tensor(read(store, answer="yes"))
    torch.testing.assert_close(made.vectors["lm.block.1"], probe_vector(target, source))
    ids = []
    for side in (StateSet("answer", label="unsafe"), StateSet("answer", answer="yes")):
        found = side.read(store, "lm.block.1")
        ids.append([found.ids[row] for row in found.rows])
    assert made.metadata["probe_accuracy"] == {"lm.block.1": probe_accuracy(target, source, ids[0], ids[1])}


def test_fine(replay: Run, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    path = fitted(tmp_path / "dictionary.safetensors", "lm.block.1", [[1, 0], [0, 9], [5, 1]])
    done = replay(store.folder, **YES_NO, method="fine", dictionary=path, shuffled=0)
    assert done.status == 0, done.err
    made = load_steering_vectors("vector.safetensors")
    dictionary = load_dictionary(path)
    sides = [dictionary.assign(torch.tensor(read(store, answer=answer))) for answer in ("no", "yes")]
    wanted, pairs = cluster_vectors(dictionary.dictionary, *sides)
    assert torch.equal(made.vectors["lm.block.1"], wanted)
    assert made.metadata["concept_pairs"] == {"lm.block.1": [list(pair) for pair in pairs]}
    assert len(pairs) == 1
    assert made.metadata["dictionary"] == str(path)
    assert made.metadata["dictionary_hash"] == dictionary.content_hash
    of_concept = f"{{selector: answer, concept: {{dictionary: {path}, index: {pairs[0][1]}}}}}"
    assert replay(store.folder, **{**YES_NO, "target": of_concept}).status == 0
    assert load_steering_vectors("vector.safetensors").vectors["lm.block.1"].tolist() == [4, 1]
    assert load_steering_vectors("vector.safetensors").metadata["target"]["concept"]["index"] == pairs[0][1]


def test_target_and_source_that_do_not_differ(replay: Run, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    assert "do not differ by more than rounding" in replay(store.folder, **{**YES_NO, "target": YES_NO["source"]}).error


# --- what is refused at the start -----------------------------------------------------------------------


def test_replay_is_refused_before_a_shard_is_read(replay: Run, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    for shard in store.folder.glob("rank-*/*.safetensors"):
        shard.unlink()
    elsewhere = fitted(tmp_path / "dictionary.safetensors", "lm.block.2", [[1, 0], [0, 9]])
    nameless = tmp_path / "nameless.safetensors"
    KMeans(1).fit(torch.ones(1, 2)).save(nameless, {})

    def source(text: str) -> dict[str, str]:
        return {"source": f"{{selector: answer, {text}}}"}

    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "missing or damaged"),  # the shards
        (source("answer: frisbee"), "`answer` = 'frisbee' leaves none of 10"),
        (source("label: odd"), "`label` = 'odd' leaves none"),
        (source("words: moods"), "no word class 'moods'"),
        (source("variant: merged"), "no variant 'merged'"),
        ({"source": "{selector: last_prompt}"}, "no selector 'last_prompt'; the store has answer"),
        (source("features: nowhere"), "nowhere: no feature store"),
        (source(f"concept: {{dictionary: {elsewhere}, index: 2}}"), "has no concept 2; its dictionary has 0 … 1"),
        (source("concept: {dictionary: nowhere, index: 2}"), "nowhere/dictionary.safetensors must be an artifact file"),
        ({"site": "[lm.block.1,lm.block.9]"}, "no site 'lm.block.9'"),
        ({"method": "fine", "dictionary": elsewhere}, "is of the site 'lm.block.2', the vector of 'lm.block.1'"),
        ({"method": "fine", "dictionary": nameless}, "does not say of which site it is"),
        ({"method": "fine", "dictionary": "gone.safetensors"}, "gone.safetensors must be an artifact file"),
    )
    for options, message in cases:
        assert message in replay(store.folder, **{**YES_NO, **options}).error


def test_options_that_do_not_go_together() -> None:
    side = StateSet("answer")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"site": []}, "at least one site"),
        ({"method": "fine"}, "the method fine needs a `dictionary`"),
        ({"dictionary": "d"}, "no other method takes one"),
        ({"method": "fine", "dictionary": "d", "site": ["a", "b"]}, "a dictionary is of one site, got a, b"),
        ({"shuffled": -1}, "shuffled must be at least 0"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            SteeringVectorMaker(**{"site": "a", **options}, target=side, source=side, out="o")


def test_a_run_with_a_model_is_refused_before_it_is_run(predict: Run, tmp_path: Path) -> None:
    good = "{selector: answer}"
    for options, message in (
        (
            {"source": "{selector: last_prompt}"},
            "selector 'last_prompt' is not read; --model.init_args.selectors",
        ),
        ({"source": "{selector: answer, variant: destination}"}, "variant 'destination' is not read"),
        ({"source": "{selector: answer, answer: frisbee}"}, "`answer` = 'frisbee' is an answer to none of 32 samples"),
        ({"source": "{selector: answer, label: unsafe}"}, "`label` = 'unsafe' is the label of none of 32 samples"),
        ({"source": "{selector: answer, words: moods}"}, "no word class 'moods'"),
        ({"site": "lm.block.2"}, "site 'lm.block.2' is not read; --model.init_args.sites has lm.block.1"),
        ({"method": "fine", "dictionary": "nowhere"}, "nowhere/dictionary.safetensors must be an artifact file"),
    ):
        done = predict(tmp_path / "store", *maker(**{"target": good, "source": good, **options}))
        assert message in done.error
        assert not list((tmp_path / "store").glob("rank-*/*"))


# --- with a model ---------------------------------------------------------------------------------------


def test_a_run_with_a_model_and_its_replay(
    predict: Run, replay: Run, make_adapter: Run, tiny: Path, tmp_path: Path
) -> None:
    """Dictionary and vectors come from the store that the same run writes."""
    folder = tmp_path / "store"
    adapter = make_adapter(tiny, tmp_path / "adapter", scale=0.1)
    fitter = [
        "--trainer.callbacks+=DictionaryFitter", "--trainer.callbacks.site=lm.block.1",
        "--trainer.callbacks.selector=answer_mean", "--trainer.callbacks.dictionary=KMeans",
        "--trainer.callbacks.dictionary.n_concepts=4", "--trainer.callbacks.heat_maps=false",
        f"--trainer.callbacks.out={tmp_path / 'concepts'}",
    ]  # fmt: skip
    shifted = {key: value.replace("answer", "answer_mean") for key, value in SHIFTED.items()}
    jobs: dict[str, dict[str, Any]] = {
        "fine": {**shifted, "method": "fine", "dictionary": tmp_path / "concepts"},
        "principal": {**shifted, "method": "principal"},
        "probe": {**shifted, "method": "probe", "norm": "unit"},
    }
    done = predict(
        folder, f"--model.destination={adapter}", "--model.selectors=[answer_mean]", *fitter,
        *(part for name, options in jobs.items() for part in maker(tmp_path / name, **options)),
    )  # fmt: skip
    assert done.status == 0, done.err
    store = FeatureStore(folder)
    target, source = (store.states("lm.block.1", "answer_mean", name)[1] for name in ("destination", "original"))
    live = {name: load_steering_vectors(tmp_path / name) for name in jobs}
    torch.testing.assert_close(live["principal"].vectors["lm.block.1"], principal_vector(target, source))
    assert live["principal"].metadata["state_pairs"] == 32
    assert live["fine"].vectors["lm.block.1"].shape == (4, 64)
    assert 0 <= live["probe"].metadata["probe_accuracy"]["lm.block.1"] <= 1
    assert live["probe"].metadata["target"]["store"] == store.metadata
    assert len(store.metadata["checkpoint_hashes"]["destination"]) > 20
    for name, options in jobs.items():
        assert replay(folder, **options, out="again").status == 0
        again = load_steering_vectors("again")
        assert measured(again.metadata) == measured(live[name].metadata)
        torch.testing.assert_close(
            (again.vectors, again.shuffled), (live[name].vectors, live[name].shuffled), rtol=0, atol=0
        )
