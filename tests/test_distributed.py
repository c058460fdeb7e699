"""Two real processes: the same stores, scores and errors as with one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.tests.results import measured

Run = Callable[..., Any]
DDP = ("--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.accelerator=cpu")


def conceptshift(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the installed command, which starts the second process itself."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PL_")}
    program = shutil.which("conceptshift", path=str(Path(sys.executable).parent))
    assert program is not None
    return subprocess.run(
        [program, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=150,
    )  # fmt: skip


def extraction(model: Path, root: Path, store: Path) -> list[str]:
    return [
        "predict",
        "--trainer.enable_progress_bar=false",
        "--model=FeatureExtraction",
        f"--model.model_id={model}",
        "--model.sites=['lm.block.*']",
        "--model.selectors=[answer,image,last_prompt]",
        "--model.max_new_tokens=4",
        "--data=CaptionDataModule",
        f"--data.root={root}",
        "--data.predict_split=train",
        "--data.batch_size=3",
        "--data.limit=11",
        "--trainer.callbacks+=FeatureWriter",
        f"--trainer.callbacks.folder={store}",
    ]


def test_two_processes_write_the_store_that_one_writes(cli: Run, tiny: Path, shapes: Path, tmp_path: Path) -> None:
    """Eleven samples, one of whose pictures is missing: neither process has as many as the other."""
    root = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    (root / "train2014" / "COCO_train2014_000000000004.jpg").unlink()
    fitter = [
        "--data.skip_bad_images=true",
        "--trainer.callbacks+=DictionaryFitter",
        "--trainer.callbacks.site=lm.block.2",
        "--trainer.callbacks.selector=last_prompt",
        "--trainer.callbacks.dictionary=KMeans",
        "--trainer.callbacks.dictionary.n_concepts=2",
    ]
    concepts = {}
    for name in ("two", "one"):
        more = [
            f"--trainer.callbacks.features={tmp_path / name}",
            f"--trainer.callbacks.out={tmp_path / name}-concepts",
            "--trainer.callbacks+=CaptionScorer",
            f"--trainer.callbacks.out={tmp_path / name}-scores.json",
        ]
        arguments = [*extraction(tiny, root, tmp_path / name), *fitter, *more]
        if name == "two":
            done = conceptshift(tmp_path, *arguments, *DDP)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            assert cli(*arguments, "--trainer.accelerator=cpu").status == 0
        concepts[name] = measured(tmp_path / f"{name}-concepts" / "concepts.json")
    assert len(list((tmp_path / "two").glob("rank-*"))) == 2, "it ran as one process"
    assert len(list((tmp_path / "one").glob("rank-*"))) == 1
    two, one = FeatureStore(tmp_path / "two"), FeatureStore(tmp_path / "one")
    assert two.samples("original") == one.samples("original")
    assert len(two.samples("original")) == 10
    for site in ("lm.block.0", "lm.block.1", "lm.block.2"):
        for selector in ("answer", "image", "last_prompt"):
            (ids, states), (wanted_ids, wanted) = (store.states(site, selector, "original") for store in (two, one))
            assert ids == wanted_ids
            torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-4)
    skipped = [json.loads((tmp_path / name / "skipped.json").read_text()) for name in ("two", "one")]
    assert skipped[0] == skipped[1]
    assert [row["sample_id"] for row in skipped[0]] == ["4"]
    scores = [measured(tmp_path / f"{name}-scores.json") for name in ("two", "one")]
    assert scores[0] == scores[1]
    assert scores[0]["samples"] == 10
    assert list(scores[0]["skipped"]) == ["4"]
    assert concepts["two"]["words"] == concepts["one"]["words"]
    assert concepts["two"]["sizes"] == concepts["one"]["sizes"]


def test_two_processes_score_as_one_does(cli: Run, tiny: Path, shapes: Path, tmp_path: Path) -> None:
    """Eleven captions: Lightning pads the second process with a sample that the first one has too."""
    arguments = [
        "validate", "--trainer.enable_progress_bar=false", "--model=FineTuning", f"--model.model_id={tiny}",
        "--model.max_new_tokens=4", "--data=CaptionDataModule", f"--data.root={shapes}", "--data.val_split=train",
        "--data.limit=11", "--data.batch_size=3", "--trainer.callbacks+=CaptionScorer",
    ]  # fmt: skip
    done = conceptshift(tmp_path, *arguments, "--trainer.callbacks.out=two.json", *DDP)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr, "it ran as one process"
    single = cli(*arguments, "--trainer.callbacks.out=one.json", "--trainer.accelerator=cpu")
    assert single.status == 0
    two, one = (measured(tmp_path / f"{name}.json") for name in ("two", "one"))
    assert one["samples"] == 11
    assert two == one
    losses = [
        float(line.split("│")[2])
        for out in (done.stdout, single.out)
        for line in out.splitlines()
        if "loss/val" in line
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_full_fine_tuning_without_a_search_for_unused_parameters(tiny: Path, shapes: Path, tmp_path: Path) -> None:
    """Plain DDP would stop in the second step if a trained parameter got no gradient."""
    done = conceptshift(
        tmp_path,
        "fit", "--trainer.enable_progress_bar=false", "--trainer.max_steps=3", "--trainer.enable_checkpointing=false",
        "--trainer.limit_val_batches=0", "--model=FineTuning", f"--model.model_id={tiny}",
        '--model.freeze=["*.post_layernorm"]', "--data=CaptionDataModule", f"--data.root={shapes}",
        "--data.batch_size=2", "--trainer.callbacks+=TrainingAudit", *DDP,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr, "it ran as one process"
    assert done.stdout.count("trained modules") == 1


def test_an_error_in_one_process_ends_both(tiny: Path, shapes: Path, tmp_path: Path) -> None:
    """The second picture is the first one of the second process."""
    root = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    path = root / "train2014" / "COCO_train2014_000000000002.jpg"
    path.unlink()
    done = conceptshift(tmp_path, *extraction(tiny, root, tmp_path / "store"), *DDP)
    assert done.returncode != 0
    assert f"conceptshift: {path}: no such picture" in done.stderr
    assert not (tmp_path / "store" / "states.parquet").exists()
    assert not _running(tmp_path)


def _running(folder: Path) -> list[str]:
    """Processes that still have the folder in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found
