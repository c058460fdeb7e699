"""Sweeps: every run is what `intervene` and `generate` give one by one; a sweep goes on where it was interrupted."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pyarrow.parquet as pq
import pytest
import torch
from conceptshift.callbacks import SweepScorer, SweepTarget
from conceptshift.concepts import KMeans, SteeringVectors, random_vector_like
from conceptshift.datamodules import VQADataModule
from conceptshift.datamodules.images import read_image
from conceptshift.lightning_modules import SteeringStep, SteeringSweep, VisionLanguageModel
from conceptshift.lightning_modules.backbone import Steering
from conceptshift.lightning_modules.backbone.generation import Prefilled
from conceptshift.tests.results import measured
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import Tensor

from .conftest import QUIET, Ran
from .test_distributed import DDP, conceptshift

Run = Callable[..., Ran]
Texts = dict[str, dict[str, str]]
NO = {"name": "no", "answer": "no"}


def vector(seed: int = 0, width: int = 64) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def given(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def command(model: Path, root: Path, **changes: object) -> list[str]:
    """`sweep` over the first seven questions; a name is an option of the model, `data_…` one of the data."""
    options = {
        "vectors": {"toward": "toward.safetensors"},
        "alphas": [6.0],
        "random": 0,
        "shuffled": 0,
        "max_new_tokens": 4,
        "targets": [NO],
        "out": "swept",
        "data": "VQADataModule",
        "data_limit": 7,
        "data_batch_size": 3,
        "data_predict_split": "train2014",
        **changes,
    }
    data, out, targets = (options.pop(name) for name in ("data", "out", "targets"))
    of_data = {name.removeprefix("data_"): options.pop(name) for name in list(options) if name.startswith("data_")}
    return [
        "sweep", "--trainer.enable_progress_bar=false", "--model=SteeringSweep", f"--model.model_id={model}",
        *(f"--model.{name}={given(value)}" for name, value in options.items()),
        f"--data={data}", f"--data.root={root}",
        *(f"--data.{name}={given(value)}" for name, value in of_data.items()),
        "--trainer.callbacks+=SweepScorer", f"--trainer.callbacks.out={out}",
        f"--trainer.callbacks.targets={json.dumps(targets)}",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Most files of vectors have no shuffled controls here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.fixture
def sweep(cli: Run, tiny: Path, shapes: Path, tmp_path: Path) -> Run:
    """`sweep(*more, **changes)` in a folder with vectors `toward` at block 0 and their shuffled controls."""
    controls = torch.stack([random_vector_like(vector(), seed) for seed in (11, 12)])
    SteeringVectors({"lm.block.0": vector()}, {"lm.block.0": controls}, {}).save(tmp_path / "toward.safetensors")

    def run(*more: object, model: Path = tiny, root: Path = shapes, **changes: object) -> Ran:
        return cli(*command(model, root, **changes), "--trainer.accelerator=cpu", *more)

    return run


def result(target: str = "no", out: str = "swept") -> dict[str, Any]:
    content: dict[str, Any] = measured(Path(out) / target / "sweep.json")
    return content


def texts_of(target: str = "no", out: str = "swept") -> Texts:
    texts: Texts = {}
    for row in pq.read_table(Path(out) / target / "samples.parquet").to_pylist():
        texts.setdefault(row["run"], {})[row["sample_id"]] = row["text"]
    return texts


def one_by_one(
    model: VisionLanguageModel, root: Path, ways: dict[str, Sequence[Steering]], limit: int, tokens: int = 4
) -> Texts:
    """The texts of each way to steer, sample by sample."""
    data = VQADataModule(str(root), predict_split="train2014", limit=limit)
    data.setup("predict")
    texts: Texts = {name: {} for name in ways}
    for sample in data.samples("predict"):
        inputs = model.encode([read_image(sample.image)], [sample.prompt])
        for name, steerings in ways.items():
            with model.intervene(*steerings):
                texts[name][sample.sample_id] = model.generate(inputs, tokens).texts[0]
    return texts


def test_visual_tokens_are_steered_where_they_stand(
    sweep: Run, shared_backbone: VisionLanguageModel, shapes: Path
) -> None:
    """At the projector: by `all` and `image` alike, by a range in part; the prompt in the cache does not serve."""
    SteeringVectors({"projector": 8 * vector(1)}, {}, {}).save("visual.safetensors")
    positions = ["all", "image", "0:30"]
    assert sweep(vectors={"v": "visual.safetensors"}, positions=positions, data_limit=3).status == 0
    ways: dict[str, Sequence[Steering]] = {"unsteered": ()} | {
        f"v add 6 at projector {where}": [Steering("projector", 8 * vector(1), 6.0, where)] for where in positions
    }
    texts = texts_of()
    assert texts == one_by_one(shared_backbone, shapes, ways, 3)
    whole, image, part = (texts[f"v add 6 at projector {where}"] for where in positions)
    assert whole == image != part
    assert texts["unsteered"] not in (image, part)
    error = sweep("--trainer.callbacks.overwrite=true", vectors={"v": "visual.safetensors"}, positions=["answer"]).error
    assert "positions 'answer' match nothing at 'projector'" in error


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_run_is_what_intervene_gives_one_by_one(
    sweep: Run, shared_backbone: VisionLanguageModel, shapes: Path, batch_size: int
) -> None:
    """Where the prompt in the cache serves and where it does not; with controls."""
    sites = {"lm.block.0": vector(), "lm.norm": -vector(2)}
    SteeringVectors(sites, {"lm.block.0": vector(3)[None]}, {}).save("several.safetensors")
    positions = ["answer", "last_prompt", "generated", "all", "image", "0:70"]
    done = sweep(
        vectors={"several": "several.safetensors"}, positions=positions, random=1, shuffled=1, data_limit=4,
        data_batch_size=batch_size,
    )  # fmt: skip
    assert done.status == 0, done.err
    ways: dict[str, Sequence[Steering]] = {"unsteered": ()}
    for site, s in sites.items():
        for where in positions:
            name = f"several add 6 at {site} {where}"
            ways[name] = [Steering(site, s, 6.0, where)]
            ways[f"{name}, random 0"] = [
                Steering(site, random_vector_like(s, crc32(f"several {site} 0 0".encode())), 6.0, where)
            ]
            if site == "lm.block.0":
                ways[f"{name}, shuffled 0"] = [Steering(site, vector(3), 6.0, where)]
    texts = texts_of()
    assert texts == one_by_one(shared_backbone, shapes, ways, 4)
    assert sorted(row["name"] for row in result()["runs"]) == sorted(ways)
    # The test would pass with no steering at all if these were the same.
    same = [name for name in texts if texts[name] == texts["unsteered"]]
    assert set(same) <= {"unsteered", *(name for name in ways if "lm.norm image" in name or "lm.norm 0:70" in name)}


def test_what_vectors_may_be(sweep: Run, shared_backbone: VisionLanguageModel, shapes: Path, tmp_path: Path) -> None:
    """One for each concept, a control vector of llama.cpp, a pattern; modes and a negative α; two targets."""
    states = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    KMeans(3, seed=0).fit(states).save(tmp_path / "dictionary.safetensors", {"site": "lm.block.1"})
    rows = torch.stack([vector(4), -vector(4), vector(5)])
    metadata = {"dictionary": "dictionary.safetensors"}
    SteeringVectors({"lm.block.1": rows}, {}, metadata).save("fine.safetensors")
    SteeringVectors({"lm.block.1": vector(6)}, {}, {}).save_gguf("toward.gguf", "llama")
    for name in "ab":
        SteeringVectors({"lm.block.2": vector(ord(name))}, {}, {}).save(f"one-{name}.safetensors")
    files = {"by concept": "fine.safetensors", "gguf": "toward.gguf", "many": "one-*.safetensors"}
    done = sweep(
        vectors=files, alphas=[-6.0, 0.0, 6.0, 6], modes=["add", "project_away"], data_limit=4,
        targets=[NO, {"name": "of-many", "answer": "yes", "vectors": ["many"]}],
    )  # fmt: skip
    assert done.status == 0, done.err
    found = {
        "by concept": ("fine.safetensors", "lm.block.1"),
        "gguf": ("toward.gguf", "lm.block.1"),
        "many/one-a": ("one-a.safetensors", "lm.block.2"),
        "many/one-b": ("one-b.safetensors", "lm.block.2"),
    }
    ways: dict[str, Sequence[Steering]] = {"unsteered": ()}
    for name, (file, site) in found.items():
        for mode in ("add", "project_away"):
            for alpha in (-6.0, 6.0):
                step = SteeringStep(file, alpha, "answer", mode)
                ways[f"{name} {mode} {alpha:g} at {site} answer"] = [step.load()]
    texts = texts_of()
    assert texts == one_by_one(shared_backbone, shapes, ways, 4)
    of_many = ["unsteered", *(name for name in ways if name.startswith("many/"))]
    assert [row["name"] for row in result("of-many")["runs"]] == of_many
    assert texts_of("of-many") == {name: texts[name] for name in of_many}
    assert (result("of-many")["target"], result()["target"]) == ("yes", "no")


def test_captions(sweep: Run) -> None:
    changes: dict[str, Any] = {"data": "CaptionDataModule", "data_predict_split": "train", "alphas": [0.5, 6.0]}
    done = sweep(targets=[{"name": "colors", "words": "colors"}], **changes)
    assert done.status == 0, done.err
    found = result("colors")
    assert found["task"] == "caption"
    assert found["quality"] == "CIDEr"
    assert found["samples"] == 7
    assert found["selected"] == []
    assert "red" in found["target"]
    assert {path.name for path in Path("swept/colors/figures").iterdir()} == {"pareto.png", "pareto.svg"}


def test_a_model_that_answers_otherwise_from_the_cache(sweep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts are read anew for each run, and the texts are the same."""
    changes: dict[str, Any] = {"positions": ["answer", "all"], "alphas": [3.0, 6.0]}
    assert sweep(**changes).status == 0
    prefill = VisionLanguageModel.prefill

    def another_picture(self: VisionLanguageModel, inputs: dict[str, Tensor]) -> Prefilled:
        inputs = {name: -value if name == "pixel_values" else value for name, value in inputs.items()}
        calls.append(len(inputs["input_ids"]))
        return prefill(self, inputs)

    calls: list[int] = []
    monkeypatch.setattr(VisionLanguageModel, "prefill", another_picture)
    with pytest.warns(UserWarning, match="this model answers otherwise from a prompt in the cache"):
        assert sweep(out="again", **changes).status == 0
    assert calls == [3], "tried once, on the first batch"
    assert texts_of(out="again") == texts_of()
    assert result(out="again") == result()


def test_controls_have_the_length_of_the_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = SteeringSweep("none", {"toward": "toward.safetensors"}, random=2, shuffled=2)
    SteeringVectors(
        {"lm.block.0": 7 * vector()}, {"lm.block.0": torch.stack([-7 * vector(), 7 * vector().flip(0)])}, {}
    ).save("toward.safetensors")
    lengths = {
        (run.kind, run.control): float(steering.vector.norm()) for run, steering in module.steerings.items() if steering
    }
    assert set(lengths) == {("steered", 0), *((kind, n) for kind in ("random", "shuffled") for n in (0, 1))}
    assert list(lengths.values()) == pytest.approx([7 * float(vector().norm())] * 5)
    names = [run.name for run in module.steerings]
    assert len(set(names)) == len(names) == 1 + 3 * 5


def test_runs_whose_strengths_hardly_differ_keep_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SteeringVectors({"lm.block.0": vector()}, {}, {}).save("toward.safetensors")
    module = SteeringSweep("none", {"v": "toward.safetensors"}, alphas=[0.1234567, 0.1234568], random=0, shuffled=0)
    assert len({run.name for run in module.steerings}) == len(module.steerings) == 3


# --- going on ---------------------------------------------------------------------------------------------


class Stop(ValueError):
    """Ends a run."""


def stop_before(monkeypatch: pytest.MonkeyPatch, batch: int | None) -> list[list[str]]:
    """Stop sweeps before a batch; returns a list that fills with the ids of the batches that are run."""
    step, seen = SteeringSweep.predict_step, list[list[str]]()

    def predict_step(self: SteeringSweep, batch_: Any, batch_idx: int) -> Any:
        if batch_idx == batch:
            raise Stop("stopped")
        seen.append(batch_.sample_ids)
        return step(self, batch_, batch_idx)

    monkeypatch.setattr(SteeringSweep, "predict_step", predict_step)
    return seen


def files(out: str) -> dict[str, Any]:
    return {
        path.relative_to(out).as_posix(): measured(path) if path.suffix == ".json" else path.read_bytes()
        for path in Path(out).rglob("*")
        if path.name in ("sweep.json", "samples.parquet")
    }


def test_an_interrupted_sweep_goes_on(sweep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte by byte what an uninterrupted one writes; only what is missing is run, and a torn line is repaired."""
    changes: dict[str, Any] = {"random": 1, "shuffled": 1, "data_batch_size": 2}
    with monkeypatch.context() as patch:
        seen = stop_before(patch, 2)
        assert "stopped" in sweep(**changes).error
        first = [one for ids in seen for one in ids]
        assert not Path("swept/no").exists()
    written = Path("swept/rows-00000.jsonl")
    content = written.read_bytes()
    assert content.count(b"\n") == 4
    written.write_bytes(content[:-40])
    with monkeypatch.context() as patch:
        seen = stop_before(patch, None)
        assert sweep(**changes).status == 0
        second = [one for ids in seen for one in ids]
    assert len(first) == 4
    assert len(second) == 4
    assert set(first) & set(second) == {first[-1]}, "what was cut off is answered again, and nothing else"
    assert sweep(out="whole", **changes).status == 0
    assert files("swept") == files("whole")
    assert len(result()["runs"]) == 4


def test_finished_texts_are_only_scored_again(sweep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep().status == 0
    before = files("swept")
    seen = stop_before(monkeypatch, None)
    assert sweep(targets=[{"name": "said-yes", "answer": "Yes!"}, NO]).status == 0
    assert [len(ids) for ids in seen] == [1], "without a batch nothing would score"
    assert {name: content for name, content in files("swept").items() if name in before} == before
    assert result("said-yes")["target"] == "yes"
    assert texts_of("said-yes") == texts_of()


def test_another_run_is_refused(sweep: Run, tmp_path: Path, make_adapter: Callable[..., Path], tiny: Path) -> None:
    """A vector, the dictionary that says whose it is, α, prompt, data, adapter and weights, whatever their names."""
    states = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    dictionary = KMeans(3, seed=0).fit(states)
    dictionary.save(tmp_path / "dictionary.safetensors", {"site": "lm.block.1"})
    metadata = {"dictionary": "dictionary.safetensors"}
    SteeringVectors({"lm.block.1": torch.stack([vector()] * 3)}, {}, metadata).save("fine.safetensors")
    adapter = make_adapter(tiny, tmp_path / "adapter", 0.1)
    base: dict[str, Any] = {"vectors": {"v": "fine.safetensors"}, "adapter": str(adapter), "data_limit": 2}
    assert sweep(**base).status == 0
    before = files("swept")
    others: list[tuple[str, dict[str, Any]]] = [
        ("runs", {"alphas": [5.0]}),
        ("data.prompt` was ", {"data_prompt": "\nSay."}),
        ("max_new_tokens", {"max_new_tokens": 3}),
        ("adapter", {"adapter": None}),
    ]
    for key, change in others:
        error = sweep(**base | change).error
        assert "swept: holds another run (" in error
        assert f"`{key}" in error
    dictionary.with_concepts(-dictionary.dictionary).save(tmp_path / "dictionary.safetensors", {"site": "lm.block.1"})
    assert "holds another run (`vectors." in sweep(**base).error
    dictionary.save(tmp_path / "dictionary.safetensors", {"site": "lm.block.1"})
    make_adapter(tiny, adapter, 0.2)
    assert "holds another run (`adapter_hash` was " in sweep(**base).error
    assert files("swept") == before
    assert sweep("--trainer.callbacks.overwrite=true", **base).status == 0
    assert files("swept") != before


def test_other_weights_in_the_same_folder_are_refused(sweep: Run, make_model: Callable[..., Path]) -> None:
    model = make_model(seed=5)
    assert sweep(model=model, data_limit=2).status == 0
    other = VisionLanguageModel.load(str(model))
    with torch.no_grad():
        other.unembed.weight[:, :10] += 1
    other.save(model)
    assert "holds another run (`weights_hash` was " in sweep(model=model, data_limit=2).error


def test_what_fails_at_start_leaves_the_old_sweep(sweep: Run) -> None:
    """`overwrite` begins anew when it is known that the new sweep can run."""
    assert sweep(data_limit=2).status == 0
    before = files("swept")
    overwrite = "--trainer.callbacks.overwrite=true"
    assert "'900:' match nothing" in sweep(overwrite, data_limit=2, positions=["900:"]).error
    assert files("swept") == before
    assert sweep(data_limit=2).status == 0


def test_unreadable_pictures_are_listed(sweep: Run, shapes: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    for picture in root.glob("train2014/*"):
        if picture.stem.endswith(("1", "4")):
            picture.unlink()
    done = sweep(root=root, data_skip_bad_images=True, data_limit=9)
    assert done.status == 0, done.err
    found = result()
    assert found["skipped"]
    assert found["samples"] + len(found["skipped"]) == 9
    assert not set(texts_of()["unsteered"]) & set(found["skipped"])
    before = files("swept")
    assert sweep(root=root, data_skip_bad_images=True, data_limit=9).status == 0
    assert files("swept") == before


# --- two processes ------------------------------------------------------------------------------------------


def test_two_processes_write_what_one_writes(sweep: Run, tiny: Path, shapes: Path, tmp_path: Path) -> None:
    """Seven questions, so that one process has fewer than the other."""
    changes: dict[str, Any] = {"random": 1, "data_batch_size": 2}
    done = conceptshift(tmp_path, *command(tiny, shapes, out="two", **changes), *DDP)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr, "it ran as one process"
    assert len(list(Path("two").glob("rows-*.jsonl"))) == 2
    assert sweep(out="one", **changes).status == 0
    assert files("two") == files("one")


def test_two_processes_and_a_finished_sweep(sweep: Run, tiny: Path, shapes: Path, tmp_path: Path) -> None:
    """Each has a sample to answer again; where the first finds another run, the second does not wait for it."""
    assert sweep(data_limit=3).status == 0
    changes: dict[str, Any] = {"data_limit": 3, "targets": [{"name": "yes", "answer": "yes"}]}
    done = conceptshift(tmp_path, *command(tiny, shapes, **changes), *DDP)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(Path("swept").glob("rows-*.jsonl"))) == 2
    assert texts_of("yes") == texts_of("no")
    done = conceptshift(tmp_path, *command(tiny, shapes, **changes, alphas=[2.0]), *DDP)
    assert done.returncode != 0
    assert "swept: holds another run (`runs." in done.stderr


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vectors": {}}, "--model.init_args.vectors needs at least one entry"),
        ({"vectors": {"a/b": "toward.safetensors"}}, "'a/b' has a `/`"),
        (
            {"vectors": {"v": "none.safetensors"}},
            "none.safetensors must be an artifact file, but there is no such file",
        ),
        ({"vectors": {"v": "none-*.safetensors"}}, "vectors: no file matches 'none-*.safetensors'"),
        ({"vectors": {"v": "*/toward.safetensors"}}, "'*/toward.safetensors' matches files of the same name"),
        ({"vectors": {"v": "wide.safetensors"}}, "vector of width 65 at 'lm.block.0', where states have width 64"),
        ({"vectors": {"v": "deep.safetensors"}}, "site 'lm.block.9' not found: the model has"),
        ({"alphas": []}, "alphas needs at least one entry"),
        ({"alphas": [0.0]}, "alphas must be finite, and one at least not 0"),
        ({"sites": ["lm.block.1"]}, "sites: toward.safetensors has no vector for 'lm.block.1', only for lm.block.0"),
        ({"positions": ["nowhere"]}, "selector 'nowhere': expected one of"),
        ({"positions": ["answer_mean"]}, "known only after generation"),
        ({"positions": ["900:"]}, "positions '900:' match nothing"),
        ({"modes": ["multiply"]}, "modes"),
        ({"random": -1}, ".random and .shuffled are numbers of controls, at least 0"),
        ({"targets": []}, "SweepScorer.targets: expected at least one, with names of their own"),
        ({"targets": [NO, NO]}, "SweepScorer.targets: expected at least one, with names of their own"),
        ({"targets": [{**NO, "name": "../x"}]}, "target '../x': the name of a folder"),
        ({"targets": [{**NO, "name": ".."}]}, "target '..': the name of a folder"),
        ({"targets": [{"name": "x"}]}, "target 'x' needs either `answer` (for questions) or `words` (for captions)"),
        ({"targets": [{**NO, "words": "colors"}]}, "needs either `answer`"),
        ({"targets": [{"name": "x", "answer": "The"}]}, "nothing is left of 'The' after VQA normalisation"),
        ({"targets": [{"name": "x", "answer": "a zebra"}]}, "nobody answers 'zebra' in these questions; frequent are"),
        ({"targets": [{"name": "x", "words": "colors"}]}, "target 'x' needs `answer`: the data are questions"),
        ({"targets": [{**NO, "vectors": ["other"]}]}, "the sweep has no vector 'other', only toward"),
        ({"data": "CaptionDataModule", "data_predict_split": "train"}, "needs `words`: the data are captions"),
    ],
)
def test_what_is_told_at_start(sweep: Run, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    SteeringVectors({"lm.block.0": vector(width=65)}, {}, {}).save("wide.safetensors")
    SteeringVectors({"lm.block.9": vector()}, {}, {}).save("deep.safetensors")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        SteeringVectors({"lm.block.0": vector()}, {}, {}).save(tmp_path / folder / "toward.safetensors")
    error = sweep(**changes).error
    assert message in error
    assert not Path("swept").exists()


def test_strengths_that_are_no_numbers(cli: Run, sweep: Run, tiny: Path, shapes: Path) -> None:
    arguments = [one for one in command(tiny, shapes) if "alphas" not in one]
    at = arguments.index("--data=VQADataModule")
    for value in (".inf", ".nan"):
        done = cli(*arguments[:at], f"--model.alphas=[1.0, {value}]", *arguments[at:])
        assert "--model.init_args.alphas must be finite, and one at least not 0" in done.error


def test_a_sweep_and_its_scorer_need_each_other(
    cli: Run, sweep: Run, predict: Run, tiny: Path, shapes: Path, tmp_path: Path
) -> None:
    arguments = command(tiny, shapes)
    alone = cli(*arguments[: arguments.index("--trainer.callbacks+=SweepScorer")], *QUIET)
    assert "what it answers would be lost; add --trainer.callbacks+=SweepScorer" in alone.error
    scorer = ["--trainer.callbacks+=SweepScorer", "--trainer.callbacks.out=swept",
              f"--trainer.callbacks.targets={json.dumps([NO])}"]  # fmt: skip
    assert (
        "SweepScorer scores what SteeringSweep answers, got FeatureExtraction" in predict(tmp_path / "f", *scorer).error
    )
    assert "a SweepScorer beside it would change" in sweep(*scorer).error
    steps = json.dumps([{"file": "toward.safetensors"}])
    steerer = ["--trainer.callbacks+=Steerer", f"--trainer.callbacks.vectors={steps}"]
    assert "a Steerer beside it would change what this one scores" in sweep(*steerer).error
    module = SteeringSweep("none", {"v": "toward.safetensors"})
    nothing: Any = SimpleNamespace(callbacks=[], datamodule=None)
    with pytest.raises(TypeError, match="SweepScorer needs a data module of pictures"):
        SweepScorer([SweepTarget("no", "no")], "swept").setup(nothing, module, "predict")


def test_samples_left_out_by_the_trainer(sweep: Run) -> None:
    assert "4 samples were left out" in sweep("--trainer.limit_predict_batches=1").error
    # What was answered is kept, and the same command without the limit goes on.
    assert sweep().status == 0
    assert result()["samples"] == 7


# --- TensorBoard ------------------------------------------------------------------------------------------


def test_tensorboard_has_the_front_with_its_scores(sweep: Run) -> None:
    logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=.", "--trainer.logger.name=logs",
              "--trainer.logger.version=tb"]  # fmt: skip
    SteeringVectors({"lm.block.0": vector(), "lm.block.1": vector(1)}, {}, {}).save("two.safetensors")
    done = sweep(*logger, vectors={"v": "two.safetensors"}, random=1)
    assert done.status == 0, done.err
    whole = EventAccumulator("logs/tb")
    whole.Reload()
    assert whole.Tags()["images"] == ["sweep/no/pareto", "sweep/no/map"]
    assert {path.name for path in Path("swept/no/figures").iterdir()} == {
        f"{name}.{kind}" for name in ("pareto", "map") for kind in ("png", "svg")
    }
    rows = [row for row in result()["runs"] if row["pareto"] or row["kind"] == "unsteered"]
    assert rows[0]["kind"] == "unsteered"
    folders = sorted(Path("logs/tb/sweep/no").iterdir())
    assert 1 < len(folders) == len(rows) < len(result()["runs"])
    for folder, row in zip(folders, rows, strict=True):
        run = EventAccumulator(str(folder))
        run.Reload()
        found = {tag: run.Scalars(tag)[0].value for tag in run.Tags()["scalars"]}
        names = {tag.removeprefix("sweep/no/") for tag in found}
        assert {"target", "overall", "length", "repetition", "changed"} <= names <= set(row["scores"])
        for tag, value in found.items():
            assert value == pytest.approx(row["scores"][tag.removeprefix("sweep/no/")], rel=1e-5)
        content = run.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        given = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        known = {name: value.string_value or value.number_value for name, value in given.items()}
        assert known == {name: row[name] or (0 if name in ("alpha", "control") else 0.0) for name in known}
        assert set(known) == {"kind", "vector", "site", "alpha", "positions", "mode", "control"}


def test_answers_of_an_unknown_sweep_are_not_thrown_away(sweep: Run) -> None:
    assert sweep(data_limit=2).status == 0
    Path("swept/run.json").unlink()
    before = files("swept")
    assert "swept: holds rows, but not run.json, which says of what" in sweep(data_limit=2).error
    assert files("swept") == before
