"""The mean visual token and directions of objects: streamed as at once, in batches and processes of any number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conceptshift.cli import mean_token as command
from conceptshift.concepts import MeanToken, TokenMoments, load_artifact, object_direction, save_artifact
from conceptshift.concepts.mean_token import Moments
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.tests.results import measured
from conceptshift.tests.test_distributed import conceptshift
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

Run = Callable[..., Any]
D = 6


@pytest.fixture
def rows() -> Tensor:
    """Rows far from zero, where squares minus the squared mean would lose the variance."""
    return 1000 + torch.randn(40, D, generator=torch.Generator().manual_seed(0))


# --- streaming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 1, 32]])
def test_moments_of_pieces_are_those_of_all(rows: Tensor, sizes: list[int]) -> None:
    first, *rest = (Moments.of(part) for part in torch.split(rows, sizes))
    for part in rest:
        first = first.joined(part)
    whole = rows.double().numpy()
    assert first.count == 40
    np.testing.assert_allclose(first.mean.numpy(), whole.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(first.variance.numpy(), whole.var(axis=0), rtol=1e-9)


def test_rows_that_are_not_finite_are_refused(rows: Tensor) -> None:
    rows[3, 2] = torch.inf
    with pytest.raises(ValueError, match="must be finite, but 1 of 40 rows"):
        Moments.of(rows)


def test_processes_do_not_matter(rows: Tensor) -> None:
    pictures = torch.split(rows, 8)
    on = [{"cat": torch.arange(8) < 3, "dog": torch.arange(8) == 7, "fox": torch.zeros(8).bool()}, {}] * 2 + [
        {"dog": torch.arange(8) > 2}
    ]
    one = TokenMoments()
    for states, objects in zip(pictures, on, strict=True):
        one.update(states, objects)
    joined = TokenMoments()
    for share in ([0, 2, 4], [1, 3], []):
        part = TokenMoments()
        for number in share:
            part.update(pictures[number], on[number])
        joined.merge(part)
    first, second = (moments.finish("projector", {}) for moments in (one, joined))
    torch.testing.assert_close(second.mean, first.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(second.variance, first.variance, rtol=1e-6, atol=0)
    assert first.objects.keys() == second.objects.keys() == {"cat", "dog"}
    for name, direction in first.objects.items():
        torch.testing.assert_close(second.objects[name], direction, rtol=1e-5, atol=1e-6)
    assert first.metadata == second.metadata
    assert first.metadata == {"pictures": 5, "tokens": 40, "object_tokens": {"cat": 6, "dog": 7}}


def test_a_direction_leads_from_other_objects_to_those_of_a_class(rows: Tensor) -> None:
    objects = {"cat": rows[:5], "dog": rows[5:7], "fox": rows[7:20]}
    moments = {name: Moments.of(one) for name, one in objects.items()}
    expected = rows[:5].double().mean(dim=0) - rows[5:20].double().mean(dim=0)
    torch.testing.assert_close(object_direction(moments, "cat"), expected)
    with pytest.raises(ValueError, match="the direction of 'cat' needs objects of other classes"):
        object_direction({"cat": moments["cat"]}, "cat")
    with pytest.raises(ValueError, match="at least one picture"):
        TokenMoments().finish("projector", {})


# --- the file -------------------------------------------------------------------------------------------


def test_saved_is_read_again(tmp_path: Path, rows: Tensor) -> None:
    token = MeanToken("lm.block.2", rows[0], rows[1], {"hot dog": rows[2]}, {"model_id": "tiny"})
    token.save(tmp_path / "mean.safetensors")
    found = MeanToken.load(tmp_path / "mean.safetensors")
    assert torch.equal(found.mean, rows[0])
    assert torch.equal(found.variance, rows[1])
    assert torch.equal(found.objects["hot dog"], rows[2])
    assert (found.site, found.metadata["model_id"]) == ("lm.block.2", "tiny")
    assert found.content_hash == token.content_hash
    assert found.content_hash != MeanToken("projector", rows[0], rows[1], {}, {}).content_hash


def test_other_files_are_refused(tmp_path: Path, rows: Tensor) -> None:
    path = tmp_path / "mean.safetensors"
    with pytest.raises(ValueError, match="no such file"):
        MeanToken.load(path)
    save_artifact(path, "dictionary", {"mean": rows[0]}, {})
    with pytest.raises(ValueError, match="must hold the artifact 'mean_token'"):
        MeanToken.load(path)
    save_artifact(path, "mean_token", {"mean": rows[0], "variance": rows[1, :3]}, {"site": "projector"})
    with pytest.raises(ValueError, match=r"mean.safetensors is damaged: 'variance' .* of shape \[6\], got \[3\]"):
        MeanToken.load(path)


# --- the command ----------------------------------------------------------------------------------------


def options(tiny: Path, shapes: Path, out: Path) -> list[str]:
    return ["mean-token", f"--model={tiny}", f"--images={shapes / 'train2014'}", f"--out={out}"]


def instances(shapes: Path) -> str:
    return f"--annotations={shapes / 'annotations' / 'instances_train2014.json'}"


def test_command_averages_what_the_model_is_given(cli: Run, tiny: Path, shapes: Path, tmp_path: Path) -> None:
    """Against passes over one picture at a time, and masks drawn at the size of the patches."""
    out = tmp_path / "mean.safetensors"
    done = cli(*options(tiny, shapes, out), instances(shapes), "--limit=6", "--batch_size=4")
    assert done.status == 0, done.err
    found = MeanToken.load(out)
    model = VisionLanguageModel.load(str(tiny))
    annotations = json.loads((shapes / "annotations" / "instances_train2014.json").read_text())
    names = {row["id"]: row["name"] for row in annotations["categories"]}
    tokens, objects = [], dict[str, list[Tensor]]()
    for path in sorted((shapes / "train2014").iterdir())[:6]:
        inputs = model.encode([Image.open(path).convert("RGB")], ["?"])
        generation = model.generate(inputs, 1, model.sites(["projector"]))
        here = torch.eq(inputs["input_ids"][0], model.encode.image_token_id or 0)
        states = generation.states["projector"][0][here]
        tokens.append(states)
        (image,) = (row for row in annotations["images"] if row["file_name"] == path.name)
        covered: dict[str, Any] = {}
        for row in (row for row in annotations["annotations"] if row["image_id"] == image["id"]):
            lengths = row["segmentation"]
            if isinstance(lengths, list):
                lengths = coco_mask.merge(coco_mask.frPyObjects(lengths, image["height"], image["width"]))
            elif isinstance(lengths["counts"], list):
                lengths = coco_mask.frPyObjects(lengths, image["height"], image["width"])
            patches = coco_mask.decode(lengths).reshape(8, image["height"] // 8, 8, image["width"] // 8)
            name = names[row["category_id"]]
            covered[name] = covered.get(name, False) | patches.any(axis=(1, 3))
        for name, patches in covered.items():
            objects.setdefault(name, []).append(states[torch.from_numpy(patches.flatten())])
    torch.testing.assert_close(found.mean, torch.cat(tokens).mean(dim=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.variance, torch.cat(tokens).var(dim=0, correction=0), atol=1e-4, rtol=1e-4)
    assert found.objects.keys() == objects.keys()
    for name, direction in found.objects.items():
        others = torch.cat([part for other, parts in objects.items() if other != name for part in parts])
        expected = torch.cat(objects[name]).mean(dim=0) - others.mean(dim=0)
        torch.testing.assert_close(direction, expected, atol=1e-4, rtol=1e-4)
    assert found.metadata["weights_hash"] == model.weights_hash()
    assert (found.site, found.metadata["pictures"], found.metadata["tokens"]) == ("projector", 6, 6 * 64)


def test_states_are_kept_where_asked_for(
    cli: Run, tiny: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, store = tmp_path / "mean.safetensors", tmp_path / "store"
    run = (*options(tiny, shapes, out), "--limit=5", "--site=lm.block.1", f"--states={store}")
    with monkeypatch.context() as patch:
        patch.setattr(command, "free_disk", lambda folder: 1000)
        refused = cli(*run)
    assert f"--states {store}: needs more than is free; lower --limit" in refused.error
    assert not store.exists()
    done = cli(*run, "--batch_size=2")
    assert done.status == 0, done.err
    assert f"{store}: 5 pictures x 64 visual tokens x 64 numbers x 4 bytes and an index: 0.00" in done.out
    ids, states = FeatureStore(store).states("lm.block.1", "image", "original")
    assert len(ids) == 5 * 64
    torch.testing.assert_close(MeanToken.load(out).mean, states.float().mean(dim=0), atol=1e-5, rtol=1e-5)
    assert f"--states {store}: not empty" in cli(*run).error


def test_two_processes_make_the_token_that_one_makes(cli: Run, tiny: Path, shapes: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    more = (instances(shapes), "--limit=7")
    assert cli(*options(tiny, shapes, one), *more, "--batch_size=16").status == 0
    done = conceptshift(tmp_path, *options(tiny, shapes, two), *more, "--batch_size=2", "--devices=2")
    assert done.returncode == 0, done.stderr
    tensors, metadata = load_artifact(one, "mean_token")
    others, described = load_artifact(two, "mean_token")
    torch.testing.assert_close(others, tensors, atol=1e-5, rtol=1e-4)
    # The command here has the seed that another test has left.
    assert measured({**described, "seed": 0}) == measured({**metadata, "seed": 0})
    assert metadata["pictures"] == 7


def test_bad_input_is_told_in_one_line(cli: Run, tiny: Path, shapes: Path, tmp_path: Path) -> None:
    run = options(tiny, shapes, tmp_path / "mean.safetensors")
    other = str(shapes / "annotations" / "instances_val2014.json")
    error = cli(*run, f"--annotations={other}", "--limit=2").error
    assert f"{other}: knows no picture 'COCO_train2014_000000000001.jpg'" in error
    assert "site 'lm.block.9' not found" in cli(*run, "--site=lm.block.9", "--limit=2").error
    for site, found in (("lm.block.[12]", "lm.block.1, lm.block.2"), ("vision.block.0", "vision.block.0")):
        error = cli(*run, f"--site={site}", "--limit=2").error
        assert f"--site must be one site of the language model, got {found}; choose `projector`" in error
    assert "no such folder or picture; set --images" in cli(*run[:2], "--images=nowhere", run[3]).error
    folder = Path(shutil.copytree(shapes / "train2014", tmp_path / "pictures"))
    next(folder.iterdir()).write_bytes(b"no picture")
    bad = [*run[:2], f"--images={folder}", run[3], "--limit=40"]
    assert "leave such pictures out with --skip_bad_images" in cli(*bad).error
    assert cli(*bad, "--skip_bad_images=true").status == 0
    assert MeanToken.load(tmp_path / "mean.safetensors").metadata["skipped"] == 1
