"""Destinations of one load: names, whole models beside the original, series of checkpoints, and gaps in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.destinations import check_checkpoint, name_destinations, step_of

Run = Callable[..., Any]


def make_series(folder: Path, *steps: int) -> Path:
    for step in steps:
        (folder / f"step-{step:06d}").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights in one block and in the unembedding."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    model = VisionLanguageModel.load(str(tiny))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1.mlp" in name or "lm_head" in name:
                parameter.add_(torch.randn_like(parameter) * parameter.std())
    model.save(folder)
    return folder


# --- names ------------------------------------------------------------------------------------------------


def test_one_is_called_destination_and_several_by_their_folders(tmp_path: Path) -> None:
    assert name_destinations("org/model") == {"destination": "org/model"}
    assert name_destinations(["runs/a/adapter"]) == {"destination": "runs/a/adapter"}
    assert name_destinations(["runs/a/adapter", "runs/b/adapter", "v1.5"]) == {
        "a": "runs/a/adapter",
        "b": "runs/b/adapter",
        "v1_5": "v1.5",
    }
    series = make_series(tmp_path / "series", 20, 40, 60, 70)
    assert list(name_destinations(str(series))) == ["step-000020", "step-000040", "step-000060", "step-000070"]
    assert [step_of(name) for name in ("step-000070", "destination", "my-step-3x")] == [70, None, None]


def test_step_0_of_a_series_is_the_original(tmp_path: Path) -> None:
    series = make_series(tmp_path / "series", 0, 20, 40)
    assert list(name_destinations(str(series))) == ["step-000020", "step-000040"]
    assert name_destinations(str(make_series(tmp_path / "only", 0))) == {"destination": str(tmp_path / "only")}


@pytest.mark.parametrize(
    ("steps", "missing"), [((20, 40, 80), 60), ((40, 60, 80), 20), ((20, 70), 40), ((20, 60, 80, 100), 40)]
)
def test_a_series_with_a_gap_is_refused_by_its_first_missing_step(
    tmp_path: Path, steps: tuple[int, ...], missing: int
) -> None:
    series = make_series(tmp_path / "series", *steps)
    with pytest.raises(ValueError, match=f"without step-{missing:06d}; export it again, or list"):
        name_destinations(str(series))
    listed = [str(path) for path in sorted(series.iterdir())]
    assert list(name_destinations(listed).values()) == listed, "a list is taken as it is"


@pytest.mark.parametrize("paths", [["a/x", "b/x"], ["original", "y"]])
def test_names_must_differ(paths: list[str]) -> None:
    with pytest.raises(ValueError, match="rename its folder"):
        name_destinations(paths)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="an empty list"):
        name_destinations([])


def test_a_checkpoint_that_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        check_checkpoint(str(tmp_path / "none"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="or not whole"):
        check_checkpoint(str(tmp_path))


def test_a_folder_with_an_adapter_and_a_model(tmp_path: Path) -> None:
    """Which of them is meant, nobody can tell."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "config.json"):
        (tmp_path / name).touch()
    check_checkpoint(str(tmp_path))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ValueError, match="both a PEFT adapter and a model; remove the one that is not meant"):
        check_checkpoint(str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    check_checkpoint(str(tmp_path))


def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("nope/run/adapter", "./adapter", "~/adapter", "/adapter", "runs/adapter", "adapter"):
        with pytest.raises(ValueError, match=f"destination '{path}': no such folder"):
            check_checkpoint(path)
    check_checkpoint("org/model")


def test_what_may_be_a_path_or_a_hub_id_is_called_both(tiny: Path) -> None:
    with pytest.raises(ValueError, match="'nope/adapter' is no folder here, nor a hub id that fits"):
        VisionLanguageModel.load(str(tiny)).add_destination("nope/adapter")


# --- running ----------------------------------------------------------------------------------------------


def states(folder: Path, variant: str, site: str = "lm.block.2") -> tuple[list[str], torch.Tensor]:
    return FeatureStore(folder).states(site, "answer", variant)


def test_each_variant_is_the_model_that_it_names(
    predict: Run, make_adapter: Run, tiny: Path, whole: Path, tmp_path: Path
) -> None:
    """A whole model and two adapters beside one original; each as if it had been loaded alone."""
    adapters = [
        make_adapter(tiny, tmp_path / name, scale=0.2, seed=seed) for seed, name in enumerate(("first", "second"))
    ]
    together = [*adapters, whole.parent / "model"]
    listed = ",".join(map(str, together))
    names = ["first", "second", whole.parent.name]
    common = ("--data.limit=6", "--data.batch_size=4")
    done = predict(tmp_path / "all", f"--model.destination=[{listed}]", *common, site="lm.block.2")
    assert done.status == 0, done.err
    store = FeatureStore(tmp_path / "all")
    assert store.metadata["variants"] == ["original", *names]
    hashes = store.metadata["checkpoint_hashes"]
    assert len({*hashes.values(), None}) == 4
    assert predict(tmp_path / "plain", *common, site="lm.block.2").status == 0
    reference = {"original": states(tmp_path / "plain", "original")}
    for name, path in zip(names[:2], adapters, strict=True):
        assert predict(tmp_path / f"-{name}", f"--model.destination={path}", *common, site="lm.block.2").status == 0
        reference[name] = states(tmp_path / f"-{name}", "destination")
        alone = FeatureStore(tmp_path / f"-{name}").metadata["checkpoint_hashes"]["destination"]
        assert alone == hashes[name], "the hash does not depend on the name"
    assert predict(tmp_path / "-whole", *common, site="lm.block.2", model=whole).status == 0
    reference[names[2]] = states(tmp_path / "-whole", "original")
    for name, (ids, values) in reference.items():
        found_ids, found = states(tmp_path / "all", name)
        assert found_ids == ids, name
        assert torch.equal(found, values), name
    assert len({values.sum().item() for _, values in reference.values()}) == 4, "all four differ"


def test_weights_come_back_whatever_happens(tiny: Path, whole: Path) -> None:
    model = VisionLanguageModel.load(str(tiny))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.add_destination(str(whole))
    weights = {name.removeprefix("model.") for name in before if name.endswith("weight")}
    assert set(model._exchanges["destination"].tensors) == {
        name for name in weights if "layers.1.mlp" in name or "lm_head" in name
    }

    def fail() -> None:
        with model.running_as("destination"):
            assert not torch.equal(model.state_dict()["model.lm_head.weight"], before["model.lm_head.weight"])
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"loaded without 'step-000001', only with original, destination"):
        model.running_as("step-000001").__enter__()


def test_every_destination_is_checked_before_the_run(
    predict: Run, make_adapter: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may have an unembedding of its own."""
    checked: list[str] = []
    check = VisionLanguageModel.self_check

    def noting(model: VisionLanguageModel) -> None:
        checked.append(model.variant)
        check(model)

    monkeypatch.setattr(VisionLanguageModel, "self_check", noting)
    paths = [make_adapter(tiny, tmp_path / name, scale=0.2) for name in ("first", "second")]
    listed = ",".join(map(str, paths))
    assert predict(tmp_path / "store", f"--model.destination=[{listed}]", "--data.limit=2").status == 0
    assert checked == ["original", "first", "second"]


def test_a_name_is_taken_once(tiny: Path, make_adapter: Run, tmp_path: Path) -> None:
    adapter = str(make_adapter(tiny, tmp_path / "adapter", scale=0.2))
    model = VisionLanguageModel.load(str(tiny))
    model.add_destination(adapter, "colors")
    for name in ("colors", "original"):
        with pytest.raises(ValueError, match=f"there is one called '{name}' already"):
            model.add_destination(adapter, name)
    model.add_destination(adapter, "places")


def test_a_model_of_another_structure_is_refused(predict: Run, make_model: Callable[..., Path], tmp_path: Path) -> None:
    other = make_model(text_layers=2)
    error = predict(tmp_path / "store", f"--model.destination={other}", "--data.limit=2").error
    assert "of another structure (first difference: " in error
    assert not (tmp_path / "store").exists()
