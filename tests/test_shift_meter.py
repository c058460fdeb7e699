"""ShiftMeter: pairs of one load and of two, series, visual tokens, and what chance would give."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.callbacks.parts.concept_states import ConceptStates
from conceptshift.callbacks.parts.paired_states import PairedStates
from conceptshift.callbacks.parts.shift_measure import ShiftOptions
from conceptshift.concepts import KMeans, concept_shift, load_dictionary, load_shift, strongest
from conceptshift.datamodules.stored_features import FeatureShardWriter, FeatureStore, begin_store, merge_store
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.readout import Readout
from conceptshift.tests.results import measured
from torch import Tensor

Run = Callable[..., Any]
D = 64  # width of the tiny model, whose readout stored states are read with


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def numbers(value: Any) -> Iterator[float]:
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from numbers(part)
    if isinstance(value, float):
        yield value


@pytest.fixture(scope="module")
def readout(tiny: Path) -> Readout:
    return Readout.from_model(VisionLanguageModel.load(str(tiny)))


@pytest.fixture
def store(tmp_path: Path, readout: Readout) -> Callable[..., Path]:
    """Write states of the tiny model to a store: `store(name, {variant: Z}, ids=…, positions=…)`."""

    def write(
        name: str, variants: dict[str, Tensor], ids: list[str] | None = None, positions: int = 1, **metadata: Any
    ) -> Path:
        folder = tmp_path / name
        about = {
            "sites": ["lm.block.2"], "selectors": ["answer"], "variants": list(variants), "data": {},
            "weights_hash": readout.weights_hash, "checkpoint_hashes": {}, **metadata,
        }  # fmt: skip
        begin_store(folder, about, False, overwrite=True)
        replace(readout, weights_hash=about["weights_hash"]).save(folder)
        writer = FeatureShardWriter(folder, 0, 1000)
        for variant, Z in variants.items():
            count = len(Z) // positions
            names = [f"{row:04d}" for row in range(count)] if ids is None else ids[:count]
            of = [{"sample_id": sample_id, "variant": variant} for sample_id in names]
            samples = [
                {**row, "image": f"{row['sample_id']}.jpg", "prompt": "", "text": "x", "references": [], "answers": []}
                for row in of
            ]
            states = [
                {**row, "selector": "answer", "position": place, "token": "t"}
                for row in of
                for place in range(positions)
            ]
            writer.add(samples, states, {"lm.block.2": Z})
        writer.flush()
        merge_store(folder)
        return folder

    return write


@pytest.fixture
def measure(cli: Run, tmp_path: Path) -> Callable[..., Any]:
    """Fit dictionaries to a store and measure the shift, without a model: `measure(store, *options)`."""

    def run(
        folder: Path, *options: str, concepts: int = 4, other: Path | None = None, last: str | None = "destination",
        name: str = "shift",
    ) -> Any:  # fmt: skip
        out = tmp_path / name

        def fitter(kind: str, variant: str) -> list[str]:
            return [
                "--trainer.callbacks+=DictionaryFitter", "--trainer.callbacks.site=lm.block.2",
                "--trainer.callbacks.selector=answer", "--trainer.callbacks.dictionary=KMeans",
                f"--trainer.callbacks.dictionary.n_concepts={concepts}", f"--trainer.callbacks.variant={variant}",
                f"--trainer.callbacks.out={out}-{kind}",
            ]  # fmt: skip

        def replay(of: Path, *callbacks: str) -> Any:
            return cli(
                "predict", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model=Replay",
                "--data=StoredFeatures", f"--data.folder={of}", *callbacks,
            )  # fmt: skip

        meter = [f"--trainer.callbacks.original={out}-original", f"--trainer.callbacks.out={out}"]
        meter += [f"--trainer.callbacks.destination={out}-destination"] if last is not None else []
        if other is not None:
            assert replay(other, *fitter("destination", str(last))).status == 0
            meter.append(f"--trainer.callbacks.destination_features={other}")
        fitters = fitter("original", "original")
        fitters += fitter("destination", last) if last is not None and other is None else []
        quick = ("--trainer.callbacks.options.word_draws=20", "--trainer.callbacks.grounding.candidates=15")
        return replay(folder, *fitters, "--trainer.callbacks+=ShiftMeter", *meter, *quick, *options)

    return run


def clusters(rows: int = 80, concepts: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """States around well separated centres, and which each is of."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(concepts, D, generator=generator)
    of = torch.arange(rows) % concepts
    return centres[of] + torch.randn(rows, D, generator=generator), of


def shifted(Z: Tensor, of: Tensor, moving: int, noise: float = 0.5, length: float = 8.0) -> Tensor:
    """The first concepts move, each along a direction of its own; all states are noisy."""
    generator = torch.Generator().manual_seed(9)
    directions = torch.nn.functional.normalize(torch.randn(4, D, generator=generator))
    return Z + length * directions[of] * (of < moving)[:, None] + noise * torch.randn(len(Z), D, generator=generator)


# --- significance -----------------------------------------------------------------------------------------


def test_an_identical_pair_has_no_shift(store: Callable[..., Path], measure: Run, tmp_path: Path) -> None:
    Z, _ = clusters()
    assert measure(store("s", {"original": Z, "destination": Z})).status == 0
    found = read(tmp_path / "shift" / "shift.json")
    assert found["means"]["magnitude"] == found["means"]["delta_cosine"] == found["means"]["recovery_gain"] == 0
    assert found["intervals"]["magnitude"] == [0, 0]
    assert set(found["tests"]) == {
        "magnitude", "consistency", "recovery_pairing", "recovery_direction", "words_pairing", "words_direction",
    }  # fmt: skip
    for test, counted in found["tests"].items():
        assert counted == {"significant": 0, "concepts": 4}, test
    assert all(p == 1 for row in found["concepts"] for p in row["p"].values())
    assert set(found["correlations"].values()) == {None}


def test_a_known_shift_is_found_and_nothing_else(store: Callable[..., Path], measure: Run, tmp_path: Path) -> None:
    """Two of four concepts move; the others are noise, and have to be told from it."""
    Z, of = clusters()
    assert measure(store("s", {"original": Z, "destination": shifted(Z, of, moving=2)})).status == 0
    found = read(tmp_path / "shift" / "shift.json")
    original = load_dictionary(tmp_path / "shift-original" / "dictionary.safetensors")
    concept_of = strongest(original.transform(Z[:4])).tolist()
    assert sorted(concept_of) == [0, 1, 2, 3]
    rows = {number: found["concepts"][concept] for number, concept in enumerate(concept_of)}
    for number, row in rows.items():
        assert (row["p_adjusted"]["magnitude"] <= 0.05) == (number < 2), number
        assert row["samples"] == 20
        low, high = row["intervals"]["consistency"]
        assert low <= high
    for number in (0, 1):
        row = rows[number]
        low, high = row["intervals"]["magnitude"]
        assert 7 < low < 8.3 < high + 0.6
        assert row["cosine_shifted"] > 0.999
        assert row["p_adjusted"]["recovery_direction"] <= 0.05
        assert row["p_adjusted"]["recovery_pairing"] <= 0.05
    assert found["tests"]["magnitude"] == {"significant": 2, "concepts": 4}
    assert all(math.isfinite(value) for value in numbers(found))
    seeds = found["seeds"]
    assert seeds["seeds"] == 1
    assert seeds["cosine_original"][0] > found["means"]["cosine_original"]


def test_the_same_numbers_as_computed_directly(store: Callable[..., Path], measure: Run, tmp_path: Path) -> None:
    Z, of = clusters()
    B = shifted(Z, of, moving=3)
    for average in ("mean", "median", "trimmed_mean"):
        done = measure(
            store("s", {"original": Z, "destination": B}), f"--trainer.callbacks.options.average={average}",
            "--trainer.callbacks.options.resamples=20", "--trainer.callbacks.options.permutations=20",
        )  # fmt: skip
        assert done.status == 0, done.err
        original = load_dictionary(tmp_path / "shift-original" / "dictionary.safetensors")
        wanted = concept_shift(Z, B, original.assign(Z), 4, average)
        found, metadata = load_shift(tmp_path / "shift" / "shift.safetensors")
        torch.testing.assert_close(found.vectors, wanted.vectors)
        assert metadata["destination"] == "destination"
        summary = read(tmp_path / "shift" / "shift.json")
        assert summary["average"] == average
        assert [row["consistency"] for row in summary["concepts"]] == pytest.approx(wanted.consistency.tolist())


def test_an_empty_concept_is_reported_as_one(store: Callable[..., Path], measure: Run, tmp_path: Path) -> None:
    """The states of one concept have no counterpart in the destination."""
    Z, of = clusters()
    B = shifted(Z, of, moving=4)
    order = torch.cat([(of != 2).nonzero().flatten(), (of == 2).nonzero().flatten()])
    ids = [f"{row:04d}" for row in range(len(Z))]
    folder = store("s", {"original": Z[order], "destination": B[order][:60]}, ids)
    assert measure(folder).status == 0
    found = read(tmp_path / "shift" / "shift.json")
    (empty,) = found["empty_concepts"]
    row = found["concepts"][empty]
    assert row["samples"] == 0
    assert row["magnitude"] is row["recovery_shifted"] is row["consistency"] is None
    assert row["p"] == row["intervals"] == {}
    assert row["words_shifted"] == []
    assert found["unpaired"] == {"original": 20, "destination": 0}
    assert found["tests"]["magnitude"]["concepts"] == 3
    assert all(math.isfinite(value) for value in numbers(found))


# --- pairs ------------------------------------------------------------------------------------------------


def test_two_models_that_were_extracted_apart(store: Callable[..., Path], measure: Run, tmp_path: Path) -> None:
    """Paired by sample id, whatever the order and however many are in one only."""
    Z, of = clusters()
    B = shifted(Z, of, moving=4)
    ids = [f"{row:04d}" for row in range(80)]
    together = store("s", {"original": Z, "destination": B}, ids)
    assert measure(together, name="together").status == 0
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    other = store("b", {"original": B[order]}, [ids[row] for row in order.tolist()], weights_hash="another model")
    done = measure(store("a", {"original": Z}, ids), other=other, last="original", name="apart")
    assert done.status == 0, done.err
    ours, wanted = (load_shift(tmp_path / name / "shift.safetensors")[0] for name in ("apart", "together"))
    torch.testing.assert_close(ours.vectors, wanted.vectors)
    assert read(tmp_path / "apart" / "shift.json")["pairs"] == 80


def test_visual_tokens_are_paired_by_position(store: Callable[..., Path], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(30, D, generator=generator)
    folder = store("s", {"original": Z, "destination": Z[:24] + 1}, positions=3)
    opened = FeatureStore(folder)
    a, b = (ConceptStates.read(opened, "lm.block.2", "answer", name) for name in ("original", "destination"))
    pairs = PairedStates.of(a, b, torch.device("cpu"))
    torch.testing.assert_close(pairs.destination - pairs.original, torch.ones(24, D))
    assert pairs.samples.tolist() == [row // 3 for row in range(24)]
    assert pairs.n_samples == 8
    assert pairs.unpaired == {"original": 6, "destination": 0}
    # Where the first pictures are missing, samples are numbered as they are in the original.
    last = FeatureStore(
        store("t", {"destination": Z[6:] + 1}, [f"{number:04d}" for number in range(2, 10)], positions=3)
    )
    later = PairedStates.of(a, ConceptStates.read(last, "lm.block.2", "answer", "destination"), torch.device("cpu"))
    assert later.samples.tolist() == [row // 3 for row in range(6, 30)]
    torch.testing.assert_close(later.destination, Z[6:] + 1)


def test_visual_tokens_of_a_real_pair(predict: Run, make_adapter: Run, tiny: Path, tmp_path: Path) -> None:
    make_adapter(tiny, tmp_path / "adapter", scale=0.2)
    done = predict(
        tmp_path / "store", f"--model.destination={tmp_path / 'adapter'}", "--data.limit=6",
        "--trainer.callbacks+=DictionaryFitter", "--trainer.callbacks.site=lm.block.2",
        "--trainer.callbacks.selector=image", "--trainer.callbacks.dictionary=KMeans",
        "--trainer.callbacks.dictionary.n_concepts=5", f"--trainer.callbacks.out={tmp_path / 'original'}",
        "--trainer.callbacks+=ShiftMeter", f"--trainer.callbacks.original={tmp_path / 'original'}",
        f"--trainer.callbacks.out={tmp_path / 'shift'}", "--trainer.callbacks.options.word_draws=20",
        site="lm.block.2", selector="image",
    )  # fmt: skip
    assert done.status == 0, done.err
    found = read(tmp_path / "shift" / "shift.json")
    assert (found["pairs"], found["samples"]) == (6 * 64, 6)
    assert sum(row["samples"] for row in found["concepts"]) == 6 * 64
    assert found["means"]["magnitude"] > 0


# --- series -----------------------------------------------------------------------------------------------


def test_a_trajectory_goes_to_the_last_checkpoint(store: Callable[..., Path], measure: Run, tmp_path: Path) -> None:
    Z, of = clusters()
    B = shifted(Z, of, moving=3, noise=0.1)
    variants = {"original": Z, "step-000010": Z + 0.25 * (B - Z), "step-000020": Z + 0.5 * (B - Z), "step-000040": B}
    folder = store("s", variants)
    assert measure(folder, last=None, name="learned").status == 0
    assert measure(folder, last="step-000040", name="given").status == 0
    path, shift = read(tmp_path / "learned" / "trajectory.json"), read(tmp_path / "learned" / "shift.json")
    assert measured(path) == measured(read(tmp_path / "given" / "trajectory.json"))
    assert [point["step"] for point in path["points"]] == [10, 20, 40]
    for concept in range(4):
        magnitudes = [point["concepts"][concept]["magnitude"] for point in path["points"]]
        assert magnitudes[:2] == pytest.approx([0.25 * magnitudes[2], 0.5 * magnitudes[2]], rel=1e-4)
        assert [point["concepts"][concept]["aligned"] for point in path["points"]] == pytest.approx([1, 1, 1], abs=1e-4)
        assert path["points"][-1]["concepts"][concept]["words_shifted"] == shift["concepts"][concept]["words_shifted"]
        assert path["points"][-1]["concepts"][concept]["magnitude"] == shift["concepts"][concept]["magnitude"]
    assert shift["destination"] == "step-000040"
    # A checkpoint in the middle: what comes behind it is left out.
    assert measure(folder, last="step-000020", name="middle").status == 0
    assert len(read(tmp_path / "middle" / "trajectory.json")["points"]) == 2


# --- bad input --------------------------------------------------------------------------------------------


def test_what_does_not_fit_together(store: Callable[..., Path], measure: Run, tmp_path: Path) -> None:
    Z, of = clusters()
    a = store("a", {"original": Z})
    elsewhere = store("b", {"original": Z}, [f"other-{row}" for row in range(80)])
    error = measure(a, other=elsewhere, last="original", name="ids").error
    assert f"{a} and {elsewhere}: no sample is common to both" in error
    wide = store("wide", {"original": torch.randn(80, 2 * D)})
    error = measure(a, other=wide, last="original", name="wide").error
    assert f"{a} has states of width {D}, {wide} of width {2 * D}" in error
    assert not (tmp_path / "wide" / "shift.json").exists()
    gap = store("gap", {"original": Z, "step-000010": Z, "step-000020": Z[:70]})
    error = measure(gap, last=None, name="gap").error
    assert "step-000020 lacks 10 of 80 samples, '0070' first" in error
    assert "has no destination; extract with --model.init_args.destination" in measure(a, last=None, name="none").error
    pair = store("pair", {"original": Z, "destination": shifted(Z, of, 2)}, checkpoint_hashes={"destination": "one"})
    assert measure(pair, name="first").status == 0
    changed = read(pair / "metadata.json")
    changed["checkpoint_hashes"]["destination"] = "another"
    (pair / "metadata.json").write_text(json.dumps(changed))
    fitters = [f"--trainer.callbacks.{name}={tmp_path / 'first'}-{name}" for name in ("original", "destination")]
    error = measure(
        a, "--trainer.callbacks+=ShiftMeter", f"--trainer.callbacks.features={pair}", *fitters,
        f"--trainer.callbacks.out={tmp_path / 'again'}", last=None, name="other",
    ).error  # fmt: skip
    assert "has no destination" in error or "is of another model than the states in" in error


def test_a_dictionary_of_another_model_or_site(
    store: Callable[..., Path], measure: Run, cli: Run, tmp_path: Path
) -> None:
    Z, of = clusters()
    hashes = {"checkpoint_hashes": {"destination": "one"}}
    pair = store("pair", {"original": Z, "destination": shifted(Z, of, 2)}, **hashes)
    assert measure(pair, name="first").status == 0

    def again(folder: Path, original: str = "original", destination: str = "destination") -> str:
        error: str = cli(
            "predict", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model=Replay",
            "--data=StoredFeatures", f"--data.folder={folder}", "--trainer.callbacks+=ShiftMeter",
            f"--trainer.callbacks.original={tmp_path / 'first'}-{original}",
            f"--trainer.callbacks.out={tmp_path / 'x'}",
            f"--trainer.callbacks.destination={tmp_path / 'first'}-{destination}",
        ).error  # fmt: skip
        assert not (tmp_path / "x").exists()
        return error

    other = store("other", {"original": Z, "destination": Z}, checkpoint_hashes={"destination": "another"})
    told = f"its dictionary is of another model than the states in {other} (destination one and another)"
    assert f"first-destination: {told}" in again(other)
    for kind in ("original", "destination"):
        path = tmp_path / f"first-{kind}" / "dictionary.safetensors"
        dictionary = load_dictionary(path)
        metadata = {**dictionary.metadata, **({"site": "lm.block.1"} if kind == "destination" else {})}
        (tmp_path / f"first-{kind}-moved").mkdir()
        dictionary.save(tmp_path / f"first-{kind}-moved" / "dictionary.safetensors", metadata)
    assert "is of 'lm.block.1' and 'answer', the original's of 'lm.block.2' and 'answer'; fit both alike" in again(
        pair, destination="destination-moved"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"permutations": 18}, "options.permutations must be at least 19, got 18"),
        ({"seeds": -1}, "options.seeds must be at least 0, got -1"),
        ({"alpha": math.nan}, "options.alpha must be finite, got nan"),
        ({"average": "mode"}, "options.average must be one of mean, median, trimmed_mean, got 'mode'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShiftOptions(**options).check()


def test_pictures_of_shifted_concepts_are_those_of_moved_states() -> None:
    """A dictionary with other concepts encodes as one that was learned with them."""
    Z, _ = clusters()
    fitted = KMeans(4).fit(Z)
    moved = fitted.with_concepts(fitted.dictionary + 5)
    torch.testing.assert_close(moved.transform(Z + 5), fitted.transform(Z))
    with pytest.raises(ValueError, match=r"must have the shape of the dictionary, \[4, 64\], got \[3, 64\]"):
        fitted.with_concepts(torch.zeros(3, D))
