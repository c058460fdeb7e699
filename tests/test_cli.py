"""The command line: what it prints, what it refuses, and that real photographs go through it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conceptshift.cli import main as entry
from conceptshift.datamodules import images
from conceptshift.datamodules.stored_features import FeatureStore
from PIL import Image

Run = Callable[..., Any]


# --- the overview ---------------------------------------------------------------------------------------


def test_help_is_printed_without_importing_what_is_slow() -> None:
    script = (
        "import sys\nfrom conceptshift.cli.main import main\nstatus = main(['--help'])\n"
        "slow = {'torch', 'lightning', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in entry.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_the_overview(cli: Run, arguments: list[str]) -> None:
    done = cli(*arguments)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("usage: conceptshift COMMAND")


@pytest.mark.parametrize("command", ["fits", "", "--version", "Fit"])
def test_an_unknown_command(cli: Run, command: str) -> None:
    done = cli(command)
    assert done.error == f"conceptshift: no command {command!r}; there are {', '.join(entry.COMMANDS)}"
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "shapes", "shapes-model", "sites"])
def test_every_command_explains_itself(cli: Run, command: str) -> None:
    done = cli(command, "--help")
    assert done.status == 0
    assert "usage" in done.out
    assert len(done.out) > 200


def test_a_traceback_on_demand(cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "at least 40" in cli("shapes", "--out", tmp_path / "x", "--images", 3).error
    monkeypatch.setenv("CONCEPTSHIFT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="at least 40"):
        cli("shapes", "--out", tmp_path / "x", "--images", 3)
    assert not (tmp_path / "x").exists()


def test_shapes_and_its_model(cli: Run, tmp_path: Path, shapes: Path) -> None:
    done = cli("shapes", "--out", tmp_path / "shapes", "--images", 40)
    assert (done.status, done.out.strip()) == (0, str(tmp_path / "shapes"))
    assert (tmp_path / "shapes" / "dataset_coco.json").read_bytes() == (shapes / "dataset_coco.json").read_bytes()
    assert cli("shapes-model", "--out", tmp_path / "model").status == 0
    done = cli("sites", "--model", tmp_path / "model")
    assert done.status == 0
    assert "lm.block.5" in done.out
    assert "no image-text-to-text model" in cli("sites", "--model", tmp_path / "shapes").error


# --- what is refused ------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, shapes: Path) -> Path:
    """A copy of Shapes to spoil."""
    return Path(shutil.copytree(shapes, tmp_path / "shapes"))


def _remove_folder(root: Path) -> str:
    shutil.rmtree(root)
    return f"{root}: no such data folder; set --data.init_args.root"


def _remove_annotations(root: Path) -> str:
    (root / "dataset_coco.json").unlink()
    return f"{root / 'dataset_coco.json'}: no such annotation file; is --data.init_args.root right?"


def _cut_annotations(root: Path) -> str:
    path = root / "dataset_coco.json"
    path.write_text(path.read_text()[:1000])
    return f"{path}: malformed JSON"


def _rename_split(root: Path) -> str:
    path = root / "dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"] = [row for row in content["images"] if row["split"] != "val"]
    path.write_text(json.dumps(content))
    return f"{path}: no split 'val'; it has restval, test, train"


def _leave_the_folder(root: Path) -> str:
    content = json.loads((root / "dataset_coco.json").read_text())
    for row in content["images"]:
        row["filepath"] = "../val2014"
    (root / "dataset_coco.json").write_text(json.dumps(content))
    return f"an annotation names a file outside {root}"


def _remove_picture(root: Path) -> str:
    path = sorted((root / "val2014").glob("*.jpg"))[2]
    path.unlink()
    return f"{path}: no such picture; mend it, or leave such pictures out with --data.init_args.skip_bad_images=true"


def _cut_picture(root: Path) -> str:
    path = sorted((root / "val2014").glob("*.jpg"))[2]
    path.write_bytes(path.read_bytes()[:700])
    return f"{path}: truncated or damaged picture"


def _no_picture(root: Path) -> str:
    path = sorted((root / "val2014").glob("*.jpg"))[2]
    path.write_text("moved")
    return f"{path}: not a picture that Pillow can read"


SPOILT = [
    _remove_folder, _remove_annotations, _cut_annotations, _rename_split, _leave_the_folder, _remove_picture,
    _cut_picture, _no_picture,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT)
def test_unusable_data_is_one_line(predict: Run, root: Path, tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    message = spoil(root)
    error = predict(tmp_path / "store", root=root, split="val").error
    assert message in error
    assert not list(tmp_path.rglob("states.parquet"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_is_too_large(
    predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    error = predict(tmp_path / "store", f"--data.num_workers={workers}", split="val").error
    assert "64 x 64 pixels, more than 1,000; mend it, or leave such pictures out" in error


def test_pictures_of_every_kind_are_read(predict: Run, root: Path, tmp_path: Path) -> None:
    """Grayscale, CMYK and turned pictures; the upright and the turned one look the same to the model."""
    paths = sorted((root / "val2014").glob("*.jpg"))
    picture = Image.open(paths[0]).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    lossless: dict[str, Any] = {"quality": 100, "subsampling": 0}
    picture.convert("L").save(paths[1], **lossless)
    picture.convert("CMYK").save(paths[2], **lossless)
    picture.save(paths[3], format="PNG")
    picture.transpose(Image.Transpose.ROTATE_90).save(paths[4], format="PNG", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_90).save(paths[5], format="PNG")
    done = predict(tmp_path / "store", root=root, split="restval+val+test", selector="last_prompt")
    assert done.status == 0, done.err
    ids, states = FeatureStore(tmp_path / "store").states("lm.block.1", "last_prompt", "original")
    by_picture = {int(key): state for key, state in zip(ids, states, strict=True)}
    numbers = [int(path.stem.split("_")[-1]) for path in paths]
    upright, turned, left = (by_picture[number] for number in numbers[3:6])
    assert (upright - turned).abs().max() == 0
    assert (upright - left).abs().max() > 1e-3
    assert len(ids) == 8


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--data.rooot=x"], "rooot"),
        (["--data.batch_size=many"], "batch_size"),
        (["--model.sitez=[]"], "sitez"),
        (["--trainer.max_stepz=3"], "max_stepz"),
        (["--trainer.callbacks+=FeatureReader"], "FeatureReader"),
        (["--data=CocoDataModule"], "CocoDataModule"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--config=malformed.yaml"], "--config malformed.yaml, line 1: malformed YAML"),
        (["--config=unknown.yaml"], "modle"),
        (["--data.batch_size=0"], "--data.init_args.batch_size must be at least 1, got 0"),
        (["--data.caption_words=fruits"], "no word class 'fruits'"),
    ],
)
def test_bad_configuration_is_one_line(predict: Run, tmp_path: Path, options: list[str], named: str) -> None:
    (tmp_path / "malformed.yaml").write_text("model: [")
    (tmp_path / "unknown.yaml").write_text("modle: 3\n")
    error = predict(tmp_path / "store", *options).error
    assert named in error
    assert len(error) < 600
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["options.average=mode"],
            "trainer.callbacks: conceptshift.callbacks.ShiftMeter: options.average: Expected a typing.Literal['mean', "
            "'median', 'trimmed_mean']. Got value: mode",
        ),
        (
            ["options.alpha=nan"],
            "trainer.callbacks: conceptshift.callbacks.ShiftMeter: options.alpha: Expected a <class 'float'>. "
            "Got value: nan",
        ),
        (["nope=1"], "trainer.callbacks: conceptshift.callbacks.ShiftMeter: Option 'nope' is not accepted"),
        (
            ["destination_features=f"],
            "ShiftMeter: `destination_features` needs `destination`, the dictionary of its states",
        ),
    ],
)
def test_of_what_the_parser_tried_the_innermost_reason_is_left(cli: Run, options: list[str], message: str) -> None:
    meter = ("--trainer.callbacks+=ShiftMeter", "--trainer.callbacks.original=o", "--trainer.callbacks.out=out")
    given = [f"--trainer.callbacks.{option}" for option in options]
    error = cli("predict", "--model=Replay", "--data=StoredFeatures", "--data.folder=none", *meter, *given).error
    assert error == f"conceptshift: {message}"


def test_a_required_option_is_named(cli: Run, shapes: Path) -> None:
    error = cli("predict", "--model=FeatureExtraction", "--data=CaptionDataModule", f"--data.root={shapes}").error
    assert "model_id" in error


def test_configurations_compose(cli: Run, tmp_path: Path, tiny: Path, shapes: Path) -> None:
    model, data = {"class_path": "FeatureExtraction"}, {"class_path": "CaptionDataModule"}
    writer = {"class_path": "FeatureWriter", "init_args": {"folder": str(tmp_path / "store")}}
    first = {
        "model": {**model, "init_args": {"model_id": str(tiny), "sites": ["lm.norm"], "selectors": ["last_prompt"]}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "callbacks": [writer]},
    }
    second = {"data": {**data, "init_args": {"root": str(shapes), "limit": 2}}}
    for name, content in (("first", first), ("second", second)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
    files = [f"--config={tmp_path / name}.yaml" for name in ("first", "second")]
    done = cli("predict", *files, "--data.init_args.limit=3", "--model.init_args.max_new_tokens=2")
    assert done.status == 0, done.err
    assert len(FeatureStore(tmp_path / "store").samples("original")) == 3


# --- real photographs -----------------------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """The two photographs that scikit-learn ships, in Karpathy's format."""
    spec = find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    root = tmp_path / "photographs"
    (root / "images").mkdir(parents=True)
    captions = {"china.jpg": ["A temple on a hill", "red and gold roofs"], "flower.jpg": ["A pink flower in a field"]}
    rows = []
    for number, (name, texts) in enumerate(captions.items()):
        shutil.copy(Path(spec.origin).parent / "datasets" / "images" / name, root / "images" / name)
        for split in ("train", "val"):
            rows.append(
                {"filepath": "images", "filename": name, "imgid": number, "split": split,
                 "sentences": [{"raw": text} for text in texts]}
            )  # fmt: skip
    (root / "dataset_coco.json").write_text(json.dumps({"images": rows}))
    return root


def test_photographs_are_learned_described_and_read(
    fit: Run, validate: Run, predict: Run, photographs: Path, tmp_path: Path
) -> None:
    with Image.open(photographs / "images" / "china.jpg") as picture:
        assert picture.size == (640, 427)
    adapter = ("--trainer.callbacks+=ModelExport", f"--trainer.callbacks.folder={tmp_path / 'adapter'}")
    done = fit(
        "--model.lora.rank=2", *adapter, "--trainer.enable_checkpointing=false", "--data.batch_size=2", root=photographs
    )
    assert done.status == 0, done.err
    trained = f"--model.adapter={tmp_path / 'adapter'}"
    done = validate(
        trained, "--trainer.callbacks+=CaptionScorer", "--trainer.callbacks.out=scores.json", root=photographs
    )
    assert done.status == 0, done.err
    content = json.loads(Path("scores.json").read_text())
    assert [row["references"] for row in content["predictions"].values()] == [
        ["A temple on a hill", "red and gold roofs"], ["A pink flower in a field"]
    ]  # fmt: skip
    trained = f"--model.destination={tmp_path / 'adapter'}"
    done = predict(tmp_path / "store", trained, root=photographs, split="val", site="projector", selector="image")
    assert done.status == 0, done.err
    store = FeatureStore(tmp_path / "store")
    for variant in ("original", "destination"):
        ids, states = store.states("projector", "image", variant)
        assert [ids.count(name) for name in ("0", "1")] == [64, 64]
        assert states.isfinite().all()
    first, second = (states[:64], states[64:])
    assert (first - second).abs().max() > 1e-3
