"""`GroundingScorer`: every number of its table computed again from what is on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conceptshift.callbacks.parts import noise
from conceptshift.callbacks.parts.score_table import markdown, plain, score_rows
from conceptshift.concepts import KMeans, load_dictionary
from conceptshift.datamodules import CaptionDataModule, read_image
from conceptshift.datamodules.stored_features import FeatureStore, held_out_ids
from conceptshift.metrics import concept_overlap, published_scores
from PIL import Image
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics.functional.text import bert_score
from transformers import AutoModel, AutoProcessor, AutoTokenizer

Run = Callable[..., Any]

SITE, SELECTOR = "lm.block.1", "answer_mean"
COLUMNS = ["CLIPScore top-1", "CLIPScore top-3", "BERTScore top-1", "BERTScore top-3"]
METHODS = ["KMeans", "Simple", "Random words", "Ground-truth captions"]


def listed(callback: str, **options: object) -> list[str]:
    """A callback on the command line."""
    return [
        f"--trainer.callbacks+={callback}",
        *(f"--trainer.callbacks.{name}={value}" for name, value in options.items()),
    ]


def fitter(folder: Path, held_out: float = 0.4, method: str = "KMeans", candidates: int = 50) -> list[str]:
    return [
        *listed("DictionaryFitter", site=SITE, selector=SELECTOR, out=folder, dictionary=method),
        f"--trainer.callbacks.grounding.candidates={candidates}",
        "--trainer.callbacks.dictionary.n_concepts=4",
        f"--trainer.callbacks.held_out={held_out}",
    ]


@pytest.fixture
def scored(predict: Run, tmp_path: Path, tiny_clip: Path, tiny_bert: Path) -> Run:
    """Extract, fit and score in one run: `scored(*more, options of `fitter` and GroundingScorer)`."""

    def run(*more: object, held_out: float = 0.4, candidates: int = 50, **options: object) -> Any:
        given = {"dictionary": tmp_path / "concepts", "clip_model": tiny_clip, "bert_model": tiny_bert, **options}
        kept = {name: value for name, value in given.items() if value is not None}
        callbacks = [
            *fitter(tmp_path / "concepts", held_out, candidates=candidates),
            *listed("GroundingScorer", **kept),
        ]
        return predict(tmp_path / "store", *more, *callbacks, site=SITE, selector=SELECTOR)

    return run


def scores(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return content


def values(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Score → method → one value per sample, in the order of the samples."""
    table = pq.read_table(folder / "scores.parquet").to_pylist()
    return {
        column: {method: [row[column] for row in table if row["method"] == method] for method in METHODS}
        for column in COLUMNS
    }


def clip_by_hand(folder: Path, picture: Image.Image, texts: list[str]) -> list[float]:
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    with torch.inference_mode():
        found = [
            model(**processor(images=[picture], text=[text], truncation=True, return_tensors="pt")) for text in texts
        ]
    return [2.5 * max(float(torch.cosine_similarity(output.image_embeds, output.text_embeds)), 0.0) for output in found]


def bert_by_hand(folder: Path, text: str, references: list[str]) -> float:
    """The best reference, by torchmetrics, one pair at a time."""
    loaded = {"model": AutoModel.from_pretrained(folder), "user_tokenizer": AutoTokenizer.from_pretrained(folder)}
    pairs = [bert_score([text], [other], **loaded, max_length=32, truncation=True)["f1"] for other in references]
    return max(float(torch.as_tensor(f1)) for f1 in pairs)


def test_the_table_computed_again(scored: Run, tmp_path: Path, tiny_clip: Path, tiny_bert: Path) -> None:
    done = scored()
    assert done.status == 0, done.err
    folder = tmp_path / "concepts"
    summary, found = scores(folder), values(folder)
    store, dictionary = FeatureStore(tmp_path / "store"), load_dictionary(folder / "dictionary.safetensors")
    ids, Z = store.states(SITE, SELECTOR, "original")
    test = [row for row, sample_id in enumerate(ids) if sample_id in held_out_ids(ids, 0.4)]
    assert summary["samples"] == len(test) > 3
    assert summary["fitted_states"] == len(ids) - len(test)
    assert summary["methods"] == METHODS
    words = json.loads((folder / "concepts.json").read_text())["words"]
    assert summary["words"]["KMeans"] == words
    V = dictionary.transform(Z[test])
    for place, row in enumerate(test[:4]):
        sample = store.samples("original")[ids[row]]
        picture, references = read_image(Path(sample["image"])), sample["references"]
        order = sorted(range(4), key=lambda concept: -abs(float(V[place, concept])))[:3]
        texts = [f"A photo is described by the words {', '.join(words[concept])}." for concept in order]
        clip = clip_by_hand(tiny_clip, picture, texts)
        bert = [bert_by_hand(tiny_bert, ", ".join(words[concept]), references) for concept in order]
        captions = np.mean(clip_by_hand(tiny_clip, picture, references))
        others = np.mean(
            [
                bert_by_hand(tiny_bert, text, references[:index] + references[index + 1 :])
                for index, text in enumerate(references)
            ]
        )
        for name, expected, bound in zip(
            COLUMNS,
            (clip[0], np.mean(clip), bert[0], np.mean(bert)),
            (captions, captions, others, others),
            strict=True,
        ):
            assert found[name]["KMeans"][place] == pytest.approx(expected, abs=1e-5), name
            assert found[name]["Ground-truth captions"][place] == pytest.approx(bound, abs=1e-5), name


def test_the_table_sums_up_its_samples(scored: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert scored().status == 0
    summary, found = scores(tmp_path / "concepts"), values(tmp_path / "concepts")
    assert list(summary["scores"]) == sorted(COLUMNS)
    for column, by_method in found.items():
        ours = np.array(by_method["KMeans"])
        for method, one in by_method.items():
            row = summary["scores"][column][method]
            assert row["mean"] == pytest.approx(np.mean(one))
            assert row["std"] == pytest.approx(np.std(one, ddof=1))
            assert row["n"] == summary["samples"]
            assert row["interval"][0] < row["mean"] < row["interval"][1]
            assert f"{column}  {method:21}  {row['mean']:.3f}  {row['std']:.3f}" in caplog.text
            if method != "KMeans":
                assert row["p"] == pytest.approx(stats.ttest_rel(ours, one).pvalue)
                assert row["difference"] == pytest.approx(np.mean(ours) - np.mean(one))
    for method, overlap in summary["overlap"].items():
        assert overlap == concept_overlap(summary["words"][method])
        assert f"Overlap          {method:21}  {overlap:.3f}\n" in caplog.text
    assert list(summary["overlap"]) == sorted(METHODS[:3])


def test_a_dictionary_has_the_scores_that_it_has_as_a_baseline(scored: Run, tmp_path: Path, tiny_clip: Path) -> None:
    """`Simple` is fitted on the same states and grounded in the same way."""
    folder = tmp_path / "simple"
    scorer = listed("GroundingScorer", dictionary=folder, clip_model=tiny_clip)
    assert scored(*fitter(folder, method="Simple"), *scorer).status == 0
    own, other = scores(folder), scores(tmp_path / "concepts")
    assert own["methods"] == ["Simple", "Random words", "Ground-truth captions"]
    assert own["words"]["Simple"] == other["words"]["Simple"]
    assert own["overlap"]["Simple"] == other["overlap"]["Simple"]
    table = pq.read_table(folder / "scores.parquet").to_pylist()
    for column in COLUMNS[:2]:
        ours = [row[column] for row in table if row["method"] == "Simple"]
        assert ours == values(tmp_path / "concepts")[column]["Simple"]


def test_random_words_are_as_many_as_those_of_the_concepts(scored: Run, tmp_path: Path) -> None:
    # So few candidates that most directions do not decode to ten words.
    assert scored(candidates=6, clip_model=None, bert_model=None).status == 0
    words = scores(tmp_path / "concepts")["words"]
    counts = [len(named) for named in words["KMeans"]]
    assert [len(named) for named in words["Random words"]] == counts
    assert 0 < sum(counts) < 40
    assert words["Random words"] != words["KMeans"]


def test_batches_change_nothing(scored: Run, tmp_path: Path) -> None:
    found = []
    for size in (1, 5, 32):
        done = scored("--data.limit=20", batch_size=size, noise_images=True, out=tmp_path / f"scores-{size}")
        assert done.status == 0, done.err
        found.append(scores(tmp_path / f"scores-{size}"))
    assert "Noise images" in found[0]["methods"]
    for other in found[1:]:
        for column, by_method in found[0]["scores"].items():
            for method, row in by_method.items():
                assert other["scores"][column][method]["mean"] == pytest.approx(row["mean"], abs=1e-5)
                assert other["scores"][column][method].get("p") == pytest.approx(row.get("p"), abs=1e-3)
        assert other["words"] == found[0]["words"]
        assert other["overlap"] == found[0]["overlap"]


def test_the_seed_draws_the_random_words(scored: Run, tmp_path: Path) -> None:
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert scored(out=tmp_path / name, seed=seed, clip_model=None, bert_model=None).status == 0
        drawn.append(scores(tmp_path / name)["words"]["Random words"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_without_models_overlap_alone(scored: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = scored(clip_model=None, bert_model=None)
    assert done.status == 0, done.err
    summary = scores(tmp_path / "concepts")
    assert summary["scores"] == {}
    assert set(summary["overlap"]) == {"KMeans", "Simple", "Random words"}
    assert "Overlap" in caplog.text
    assert "CLIPScore" not in caplog.text


def test_nothing_was_held_out(scored: Run, tmp_path: Path) -> None:
    error = scored(held_out=0.0).error
    assert f"{tmp_path / 'concepts'}: none of its 32 samples was held out from the fit" in error
    assert "set `held_out` of DictionaryFitter" in error
    assert not (tmp_path / "concepts" / "scores.json").exists()


# --- another store, and stored states ---------------------------------------------------------------------


@pytest.fixture
def two_stores(predict: Run, tmp_path: Path) -> Path:
    """Stores `train` and `test`, and a dictionary of the first without anything held out."""
    options = fitter(tmp_path / "concepts", held_out=0.0)
    assert predict(tmp_path / "train", *options, "--data.limit=20", site=SITE, selector=SELECTOR).status == 0
    assert predict(tmp_path / "test", split="val+test", site=SITE, selector=SELECTOR).status == 0
    return tmp_path


@pytest.fixture
def replayed(cli: Run, two_stores: Path, tiny_clip: Path) -> Run:
    """Score from the store `test` alone, without the model."""

    def run(**options: object) -> Any:
        given = {"dictionary": two_stores / "concepts", "clip_model": tiny_clip, **options}
        return cli(
            "predict",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_checkpointing=false",
            "--model=Replay",
            "--data=StoredFeatures",
            f"--data.folder={two_stores / 'test'}",
            *listed("GroundingScorer", **given),
        )

    return run


def test_all_samples_of_another_store(replayed: Run, two_stores: Path) -> None:
    done = replayed(fitted_on=two_stores / "train")
    assert done.status == 0, done.err
    summary = scores(two_stores / "concepts")
    assert summary["samples"] == len(FeatureStore(two_stores / "test").samples("original"))
    assert summary["fitted_states"] == 20
    assert summary["features"] == str(two_stores / "test")
    assert set(pq.read_table(two_stores / "concepts" / "scores.parquet")["sample_id"].to_pylist()) == set(
        FeatureStore(two_stores / "test").samples("original")
    )


def test_baselines_need_the_store_of_the_fit(replayed: Run, two_stores: Path) -> None:
    for options in ({}, {"fitted_on": two_stores / "test"}):
        error = replayed(**options).error
        assert f"{two_stores / 'test'}: not the store that {two_stores / 'concepts'} was fitted on" in error
        assert "give that one as `fitted_on`" in error


def test_noise_needs_the_model(replayed: Run) -> None:
    assert "noise_images needs the model; run with it instead of `Replay`" in replayed(noise_images=True).error


def test_states_of_another_model(
    predict: Run, make_model: Callable[..., Path], tmp_path: Path, tiny_clip: Path
) -> None:
    assert predict(tmp_path / "train", *fitter(tmp_path / "concepts"), site=SITE, selector=SELECTOR).status == 0
    scorer = listed("GroundingScorer", dictionary=tmp_path / "concepts", fitted_on=tmp_path / "train")
    other = predict(
        tmp_path / "other", *scorer, "--data.limit=6", model=make_model(seed=9), site=SITE, selector=SELECTOR
    )
    assert f"{tmp_path / 'other'}: its states are of another model than the dictionary" in other.error


# --- noise --------------------------------------------------------------------------------------------------


def test_noise_states_of_the_pictures_themselves_are_those_of_the_store(
    predict: Run, scored: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the pictures differ: with them put back, the dictionary of noise is the dictionary."""
    taken: Iterator[Image.Image] = iter(())

    def put_back(path: Path) -> Image.Image:
        nonlocal taken
        taken = iter([read_image(path)])
        return read_image(path)

    monkeypatch.setattr(noise, "read_image", put_back)
    monkeypatch.setattr(noise, "noise_picture", lambda size, sample_id, seed: next(taken))
    done = scored("--model.answers=target", noise_images=True, clip_model=None, bert_model=None)
    assert done.status == 0, done.err
    summary = scores(tmp_path / "concepts")
    assert summary["words"]["Noise images"] == summary["words"]["KMeans"]
    table = pq.read_table(tmp_path / "concepts" / "scores.parquet").to_pylist()
    named = {method: [row["concepts"] for row in table if row["method"] == method] for method in summary["methods"]}
    assert named["Noise images"] == named["KMeans"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert scored("--model.answers=target", noise_images=True, clip_model=None, bert_model=None).status == 0
    changed = pq.read_table(tmp_path / "concepts" / "scores.parquet").to_pylist()
    assert [row["concepts"] for row in changed if row["method"] == "Noise images"] != named["KMeans"]


def test_noise_pictures() -> None:
    picture = noise.noise_picture((70, 40), "7", seed=0)
    assert picture.size == (70, 40)
    same, other, reseeded = (noise.noise_picture((70, 40), name, seed) for name, seed in (("7", 0), ("8", 0), ("7", 1)))
    pixels = np.asarray(picture)
    assert np.array_equal(pixels, np.asarray(same))
    assert not np.array_equal(pixels, np.asarray(other))
    assert not np.array_equal(pixels, np.asarray(reseeded))
    assert (
        stats.kstest(pixels.ravel() + np.random.default_rng(0).uniform(size=pixels.size), "uniform", (0, 256)).pvalue
        > 0.01
    )


# --- what is shown ------------------------------------------------------------------------------------------


def test_text_in_tensorboard(scored: Run, tmp_path: Path) -> None:
    logger = ["--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path / 'logs'}"]
    assert scored(*logger, bert_model=None).status == 0
    (events,) = (tmp_path / "logs").rglob("events.*")
    log = EventAccumulator(str(events))
    log.Reload()
    (entry,) = log.Tensors("grounding/concepts/text_summary")
    text = entry.tensor_proto.string_val[0].decode()
    assert "| score | method | mean |" in text
    assert text.endswith(markdown(score_rows(scores(tmp_path / "concepts"))))


def test_published_scores_beside() -> None:
    row = {"mean": 0.61, "std": 0.05, "interval": [0.58, 0.64], "n": 9}
    summary = {
        "methods": ["SemiNMF", "Simple"],
        "scores": {"CLIPScore top-1": {"SemiNMF": row, "Simple": {**row, "p": 1e-9}}},
        "overlap": {"SemiNMF": 0.1, "Simple": 0.4},
        "published": published_scores("token_of_interest:cat"),
    }
    lines = plain(score_rows(summary)).splitlines()
    assert lines[1].split() == ["CLIPScore", "top-1", "SemiNMF", "0.610", "0.050", "[0.580,", "0.640]", "9"]
    assert lines[2].endswith("9  <0.001")
    assert "CLIPScore, published  SemiNMF                0.627" in lines
    assert "Overlap, published    KMeans                 0.500" in lines
    summary["published"] = None
    assert "published" not in plain(score_rows(summary))


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": "[0,1]"}, "top must name numbers of concepts from 1 on, got [0, 1]"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"clip_model": "/nowhere"}, "clip_model '/nowhere': no CLIP model can be loaded from it"),
        ({"bert_model": "/nowhere"}, "bert_model '/nowhere': no text encoder can be loaded from it"),
    ],
)
def test_what_cannot_work_stops_before_the_model_runs(
    scored: Run, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    assert message in scored(**options).error
    assert not (tmp_path / "store").exists()


def test_a_folder_without_dictionary(predict: Run, tmp_path: Path) -> None:
    scorer = listed("GroundingScorer", dictionary=tmp_path / "nothing")
    error = predict(tmp_path / "store", *scorer, "--data.limit=3", site=SITE, selector=SELECTOR).error
    assert str(tmp_path / "nothing" / "dictionary.safetensors") in error


def test_concepts_without_words(predict: Run, tmp_path: Path) -> None:
    """States of the vision tower are not as wide as those of the language model here, and are never words."""
    fitted = KMeans(2).fit(torch.eye(3))
    fitted.save(tmp_path / "dictionary.safetensors", {})
    concepts = {"words": [[], []], "grounding": {}, "dictionary_hash": fitted.content_hash}
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    scorer = listed("GroundingScorer", dictionary=tmp_path)
    error = predict(tmp_path / "store", *scorer, "--data.limit=3", site=SITE, selector=SELECTOR).error
    assert f"{tmp_path / 'concepts.json'}: no concept has a word that could be scored" in error


def test_fixture_data_have_several_captions(shapes: Path) -> None:
    """Else half of these tests would show nothing."""
    data = CaptionDataModule(str(shapes), predict_split="train")
    data.setup("predict")
    assert min(len(sample.references) for sample in data.samples("predict")) > 1
