"""AblationMeter: what becomes wrong without some visual tokens, on the embedded model and Shapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conceptshift.callbacks import AblationMeter
from conceptshift.callbacks.ablation_meter import _absent, noised, telling
from conceptshift.callbacks.parts.journal import Journal
from conceptshift.callbacks.parts.trial_scores import Pictures, compared
from conceptshift.callbacks.parts.trials import Asked, Place, check_objects, is_right, locate
from conceptshift.concepts import MeanToken
from conceptshift.datamodules.object_names import ObjectNames
from conceptshift.datamodules.objects import ObjectDataModule
from conceptshift.datamodules.sample import Batch, Instance, Sample
from conceptshift.lightning_modules import Answers, Inspection, VisionLanguageModel
from conceptshift.lightning_modules.backbone import Steering
from conceptshift.lightning_modules.backbone.attribution import integrated_gradients
from conceptshift.lightning_modules.backbone.knockout_names import TokenSet
from conceptshift.lightning_modules.backbone.patch_grid import PatchGrid
from conceptshift.lightning_modules.backbone.prompts import append_answers
from conceptshift.lightning_modules.backbone.token_map import Word
from conceptshift.metrics import bootstrap, published_ablation
from conceptshift.tests.results import measured
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import stats

Run = Callable[..., Any]
TRAINED = Path(__file__).parents[1] / "checkpoints" / "shapes-llava"
SETS = ["object", "object+1", "registers", "gradients:5", "random:5", "random:100"]
POLLING = "Is there {object}?\nAnswer the question using a single word or phrase."
NAMES = ObjectNames.from_categories(["dog", "hot dog", "arrow"])
TOLD = Sample("1", Path("1.jpg"), "", "", object="dog", setting="generative")
POLLED = replace(TOLD, setting="polling")
ASKED = replace(TOLD, setting="vqa", answers=("red",) * 2 + ("crimson",) * 8)


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mean token of nothing."""
    backbone = VisionLanguageModel.load(str(TRAINED))
    return save_mean_token(tmp_path_factory.mktemp("reference") / "zero.safetensors", backbone, torch.zeros(160))


@pytest.fixture
def ablate(cli: Run, shapes: Path, zero: Path) -> Run:
    """Run the meter on a few pictures of Shapes: `ablate(out, *more, sets=[…], limit=…)`."""

    def run(out: Path, *more: object, sets: Sequence[str] = SETS, limit: int = 3, least_area: float = 0.02) -> Any:
        return cli(
            "predict",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.logger=false",
            "--model=Inspection",
            f"--model.model_id={TRAINED}",
            "--model.max_new_tokens=16",
            "--data=ObjectDataModule",
            f"--data.root={shapes}",
            "--data.predict_split=train2014",
            f"--data.least_area={least_area}",
            f"--data.polling_prompt={POLLING}",
            f"--data.limit={limit}",
            "--trainer.callbacks+=AblationMeter",
            f"--trainer.callbacks.out={out}",
            f"--trainer.callbacks.sets={json.dumps(list(sets))}",
            "--trainer.callbacks.steps=4",
            f"--trainer.callbacks.reference={zero}",
            *more,
        )

    return run


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out / "samples.parquet").to_pylist()
    return sorted(rows, key=lambda row: (row["sample_id"], row["name"]))


def samples_of(shapes: Path, limit: int = 3) -> dict[str, Sample]:
    data = ObjectDataModule(
        str(shapes), predict_split="train2014", least_area=0.02, limit=limit, polling_prompt=POLLING
    )
    data.setup("predict")
    return {sample.sample_id: sample for sample in data.samples("predict")}


@pytest.mark.parametrize(
    ("sample", "text", "right"),
    [
        (TOLD, "A puppy and a hot dog.", True),
        (TOLD, "A man eats a hot dog.", False),
        (TOLD, "", False),
        (POLLED, "Yes, there is.", True),
        (POLLED, "Yesterday", False),
        (POLLED, "No. Yes.", False),
        (POLLED, "", False),
        (ASKED, "Red.", True),
        (ASKED, "blue", False),
        (replace(ASKED, answers=("the",) * 10), "", False),
    ],
)
def test_which_answers_are_right(sample: Sample, text: str, right: bool) -> None:
    assert is_right(sample, text, NAMES) is right


def test_two_of_ten_annotators_make_an_answer_right_by_half() -> None:
    """0.6 of VQA accuracy; one of them makes 0.3."""
    assert is_right(ASKED, "red", NAMES)
    assert not is_right(replace(ASKED, answers=("red",) + ("crimson",) * 9), "red", NAMES)


def test_gradients_are_of_the_word_that_names_the_object() -> None:
    words = [Word("a", 1, 1), Word("hot", 2, 2), Word("dog", 3, 3), Word("and", 4, 4), Word("puppies", 5, 7)]
    assert telling(TOLD, words, NAMES) == 5
    assert telling(replace(TOLD, object="hot dog"), words, NAMES) == 3
    assert telling(POLLED, [Word("yes", 1, 1)], NAMES) == 1, "what stands before the word says nothing"


def test_noise_is_in_the_patches_of_the_object_only() -> None:
    picture = Image.fromarray(np.full((40, 40, 3), 200, dtype=np.uint8))
    row, column = (one.flatten() for one in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    # Where the processor pads, boxes reach beyond the picture.
    boxes = torch.stack([column, row, column + 1, row + 1], dim=1) * 12.0 - 4
    tokens = torch.zeros(16, dtype=torch.bool)
    tokens[[0, 6]] = True
    place = Place(PatchGrid(torch.zeros_like(row), row, column, boxes), np.ones((40, 40), dtype=bool), tokens)
    changed = (np.asarray(noised(TOLD, place, picture)) != 200).any(axis=2)
    expected = np.zeros((40, 40), dtype=bool)
    expected[:8, :8] = expected[8:20, 20:32] = True
    assert not changed[~expected].any()
    assert changed[expected].mean() > 0.99


def test_intervals_draw_whole_pictures() -> None:
    """Asking ten times about each picture makes no interval narrower."""
    rng = np.random.default_rng(0)
    outcome = (rng.random(60) < 0.4).tolist()
    once = {f"{number}": replace(TOLD, image=Path(f"{number}.jpg")) for number in range(60)}
    often = {f"{number}/{copy}": sample for number, sample in once.items() for copy in range(10)}
    (few,) = bootstrap({"": Pictures(once).share(dict(zip(once, outcome, strict=True)))}).values()
    (many,) = bootstrap({"": Pictures(often).share({i: outcome[int(i.split("/")[0])] for i in often})}).values()
    assert few.score == pytest.approx(many.score) == pytest.approx(np.mean(outcome))
    # Pictures are sorted by name, so that both draw alike.
    assert few.interval() == pytest.approx(many.interval())


def test_differences_are_tested_by_the_samples_that_differ() -> None:
    ids = [str(number) for number in range(30)]
    wrong = {i: number < 12 for number, i in enumerate(ids)}
    controls = {i: 10 <= number < 13 for number, i in enumerate(ids)}
    pictures = Pictures({i: replace(TOLD, image=Path(i)) for i in ids})
    ours, theirs = bootstrap({"a": pictures.share(wrong), "b": pictures.share(controls)}).values()
    found = compared(ours, theirs, wrong, controls)
    assert found is not None
    assert found["value"] == pytest.approx((12 - 3) / 30)
    assert found["interval"][0] < found["value"] < found["interval"][1]
    # 10 became wrong with the set only, 1 with the control only: two tails of 11 tosses.
    assert found["p"] == pytest.approx(2 * stats.binom.cdf(1, 11, 0.5))


def test_an_object_smaller_than_a_patch_is_told(backbone: VisionLanguageModel) -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[10:17, 10:17] = 1
    instances = (Instance("dog", coco_mask.encode(np.asfortranarray(mask))),)
    with pytest.raises(
        ValueError, match=r"sample '1': its 'dog' has 49 pixels, less than a patch of 64; .*least_area 0"
    ):
        check_objects([replace(TOLD, instances=instances)], backbone)
    with pytest.raises(ValueError, match=r"49 pixels.*and so have 2 others; .*least_area 0.016"):
        check_objects([replace(TOLD, instances=instances)] * 3, backbone)
    with pytest.raises(ValueError, match=r"sample '1': the mask of no 'arrow' is known.*ObjectDataModule"):
        check_objects([replace(TOLD, instances=instances, object="arrow")], backbone)


def test_the_object_vanishes_with_its_tokens_and_not_with_others(ablate: Run, shapes: Path, tmp_path: Path) -> None:
    assert ablate(tmp_path / "out", limit=4).status == 0
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())
    rows, told = rows_of(tmp_path / "out"), found["variants"]["original"]
    assert found["nowhere"] == ["random:100"]
    by_set = {(row["setting"], row["set"]): row for row in told["rows"]}
    described = by_set["generative", "object"]
    assert described["became_wrong"] > 0.7
    assert described["control"]["became_wrong"] < 0.4
    assert described["difference"]["interval"][0] > 0.1
    assert by_set["generative", "random:5"]["control"] is None
    for (setting, name), row in by_set.items():
        mine = {one["sample_id"]: one for one in rows if (one["setting"], one["name"]) == (setting, name)}
        noise = {one["sample_id"]: one for one in rows if (one["setting"], one["name"]) == (setting, "noise")}
        kept = [one for i, one in mine.items() if not noise[i]["right"]]
        assert row["all"]["samples"] == len(mine)
        assert row["all"]["became_wrong"] == pytest.approx(np.mean([not one["right"] for one in mine.values()]))
        assert row["samples"] == len(kept)
        if kept:
            assert row["became_wrong"] == pytest.approx(np.mean([not one["right"] for one in kept]))
        counts = told["settings"][setting]
        assert row["all"]["samples"] + row["without"] == counts["right"] == counts["kept"] + counts["hallucinated"]
    tokens = {(one["sample_id"], one["name"]): one["tokens"] for one in rows}
    for sample_id, sample in samples_of(shapes, 4).items():
        if (sample_id, "object") in tokens:
            masks = [one.mask() for one in sample.instances if one.category == sample.object]
            patches = np.logical_or.reduce(masks).reshape(8, 8, 8, 8).any(axis=(1, 3))
            assert tokens[sample_id, "object"] == tokens[sample_id, "as many random as object"] == patches.sum()
    assert found["published"] == published_ablation()
    assert (tmp_path / "out" / "figures" / "ablation.svg").is_file()


def test_answers_are_those_of_tokens_replaced_by_hand(ablate: Run, shapes: Path, tmp_path: Path) -> None:
    """By a hook of our own behind the projector, one sample at a time, with patches found by counting pixels."""
    backbone = VisionLanguageModel.load(str(TRAINED))
    reference = torch.randn(160, generator=torch.Generator().manual_seed(0))
    file = save_mean_token(tmp_path / "mean.safetensors", backbone, reference)
    assert ablate(tmp_path / "out", f"--trainer.callbacks.reference={file}", sets=["object"]).status == 0
    samples = samples_of(shapes)
    checked = 0
    for row in rows_of(tmp_path / "out"):
        if row["name"] != "object":
            continue
        sample = samples[row["sample_id"]]
        masks = [one.mask() for one in sample.instances if one.category == sample.object]
        patches = torch.from_numpy(np.logical_or.reduce(masks)).reshape(8, 8, 8, 8).any(dim=3).any(dim=1).flatten()

        def replaced(module: Any, args: Any, output: Any, patches: torch.Tensor = patches) -> Any:
            return torch.where(patches[:, None], reference, output)

        projector = backbone.model.model.multi_modal_projector
        handle = projector.register_forward_hook(replaced)
        inputs = backbone.encode([Image.open(sample.image).convert("RGB")], [sample.prompt])
        ids = backbone.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        handle.remove()
        (text,) = backbone.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.strip() == row["text"]
        checked += 1
    assert checked > 3


def test_batches_do_not_matter_and_an_interrupted_run_goes_on(ablate: Run, tmp_path: Path) -> None:
    several, alone, few = tmp_path / "several", tmp_path / "alone", ("--data.settings=[polling,generative]",)
    assert ablate(several, *few, "--data.batch_size=5", sets=SETS[2:4], limit=1).status == 0
    assert ablate(alone, *few, "--data.batch_size=1", sets=SETS[2:4], limit=1).status == 0
    assert rows_of(several) == rows_of(alone)
    (journal,) = several.glob("rows-*.jsonl")
    whole = measured(several / "ablation.json")
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
    assert ablate(several, *few, sets=SETS[2:4], limit=1).status == 0
    assert measured(several / "ablation.json") == whole
    assert "AblationMeter.steps" in ablate(several, *few, "--trainer.callbacks.steps=5", sets=SETS[2:4], limit=1).error


def test_directions_are_projected_away_beside_two_controls(ablate: Run, shapes: Path, tmp_path: Path) -> None:
    """A direction that no visual token has takes nothing away; that of all of them takes the picture."""
    backbone = VisionLanguageModel.load(str(TRAINED))
    samples = samples_of(shapes)
    classes = sorted({sample.object for sample in samples.values()})
    directions = {
        name: torch.randn(160, generator=torch.Generator().manual_seed(at)) for at, name in enumerate(classes)
    }
    # What all tokens have of a direction stays: without it they are those below.
    mean = torch.randn(160, generator=torch.Generator().manual_seed(100))
    file = save_mean_token(tmp_path / "mean.safetensors", backbone, mean, directions)
    directions = {name: one - (one @ mean) / (mean @ mean) * mean for name, one in directions.items()}
    few = [f"--trainer.callbacks.directions={file}", "--trainer.callbacks.noise=false"]
    assert ablate(tmp_path / "out", *few, "--data.settings=[generative]", sets=["random:5"]).status == 0
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())["variants"]["original"]
    assert found["settings"]["generative"]["hallucinated"] is None
    assert [row["direction"] for row in found["project_away"]] == [
        "own direction",
        "direction of another class",
        "random direction",
    ]
    for row in found["project_away"]:
        assert 0 <= row["words_kept"]["value"] <= 1
        assert (row["difference"] is None) == (row["direction"] == "own direction")
    rows = {(row["sample_id"], row["name"]): row["text"] for row in rows_of(tmp_path / "out")}
    i, sample = next((i, sample) for i, sample in samples.items() if (i, "own direction") in rows)
    inputs = backbone.encode([Image.open(sample.image).convert("RGB")], [sample.prompt])
    unit = directions[sample.object] / directions[sample.object].norm()
    projector = backbone.model.model.multi_modal_projector

    def turned_round(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = output - 2 * (output @ unit).clamp(min=0)[..., None] * unit
        return changed

    handle = projector.register_forward_hook(turned_round)
    ids = backbone.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    handle.remove()
    (text,) = backbone.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.strip() == rows[i, "own direction"]


# --- parts of a run, on the tiny model ------------------------------------------------------------------


@pytest.fixture(scope="module")
def module(tiny: Path) -> Inspection:
    """What runs the tiny model."""
    loaded = Inspection(str(tiny), max_new_tokens=8)
    loaded.configure_model()
    return loaded


def sample_of(
    folder: Path, number: int, box: tuple[int, int, int, int], name: str = "dog", size: tuple[int, int] = (64, 64)
) -> Sample:
    """Sample `number` of a picture of noise [width, height], in which an object fills a box (x, y, x, y)."""
    noise = np.random.default_rng(number).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"{number}.png")
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    instances = (Instance(name, coco_mask.encode(np.asfortranarray(mask))),)
    image = folder / f"{number}.png"
    return Sample(str(number), image, "What is this?", "", instances=instances, object=name, setting="generative")


def asked_about(module: Inspection, samples: Sequence[Sample]) -> Asked:
    """Samples ready to be asked again, whatever was answered."""
    return Asked(module, samples, [locate(sample, module.backbone) for sample in samples], set())


def test_chance_is_of_each_sample(module: Inspection, tmp_path: Path) -> None:
    """Random sets of one size are other tokens in another sample, and so is noise; the same again in the same one."""
    samples = [sample_of(tmp_path, number, (8, 8, 24, 24)) for number in range(2)]
    asked = asked_about(module, samples)
    objects = [place.tokens for place in asked.places]
    first, second = asked.choose_as_many(objects)
    assert first.sum() == second.sum() == 4
    assert not torch.equal(first, second)
    assert all(map(torch.equal, asked.choose(TokenSet.parse("random:4")), (first, second)))
    one, other, again = (
        np.asarray(noised(samples[number], asked.places[0], asked.pictures[0])) for number in (0, 1, 0)
    )
    assert (one != other).any()
    assert (one == again).all()


def test_attributions_are_to_the_word_that_names_the_object(module: Inspection, tmp_path: Path) -> None:
    """Not to the first word of the answer."""
    told = asked_about(module, [sample_of(tmp_path, number, (8, 8, 24, 24)) for number in range(2)])
    words = [of_answer[-1] for of_answer in told.unaltered.token_map.words]
    assert all(word.first > 0 for word in words)
    names = ObjectNames({word.text: [] for word in words})
    asked = asked_about(
        module, [sample_of(tmp_path, number, (8, 8, 24, 24), word.text) for number, word in enumerate(words)]
    )
    meter = AblationMeter(str(tmp_path / "out"), steps=2)
    meter._token = torch.stack(asked.states).flatten(0, 1).mean(dim=0)
    found = meter._attributions(asked, names)
    backbone, answers = module.backbone, asked.unaltered.token_map.answers
    inputs = append_answers(asked.inputs, answers, backbone.tokenizer.pad_token_id)
    columns = asked.inputs["attention_mask"].sum(dim=1)
    said = zip(asked.samples, asked.unaltered.token_map.words, strict=True)
    firsts = [telling(sample, of_answer, names) for sample, of_answer in said]
    assert all(first > 0 for first in firsts)
    expected, of_first = (
        integrated_gradients(backbone, inputs, meter._token, 2, columns + torch.tensor(shift))
        for shift in (firsts, [0, 0])
    )
    assert all(map(torch.equal, found, expected))
    assert not any(map(torch.allclose, found, of_first))


def test_the_other_direction_is_of_a_class_that_is_not_in_the_picture() -> None:
    one = torch.ones(2)
    directions = MeanToken("projector", one, one, dict.fromkeys(("dog", "cup", "arrow", "bus"), one), {})
    blank = coco_mask.encode(np.asfortranarray(np.ones((2, 2), dtype=np.uint8)))
    sample = replace(TOLD, instances=(Instance("arrow", blank), Instance("dog", blank), Instance("hat", blank)))
    assert _absent(sample, directions) == ["bus", "cup"]


def test_tokens_have_a_direction_that_are_more_so_than_the_mean_one(
    module: Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a direction that is mostly the mean token all have some; without that, about half of them have."""
    asked = asked_about(module, [sample_of(tmp_path, number, (8, 8, 24, 24)) for number in range(2)])
    mean = torch.stack(asked.states).flatten(0, 1).mean(dim=0)
    drawn = torch.randn(64, generator=torch.Generator().manual_seed(0))
    direction = 10 * mean + drawn / drawn.norm() * mean.norm()
    done: dict[str, Steering] = {}

    def noted(name: str, interventions: Sequence[Steering], control: bool) -> list[str]:
        (done[name],) = interventions
        assert control == (name != "own direction")
        return ["", ""]

    monkeypatch.setattr(asked, "answer", noted)
    meter = AblationMeter(str(tmp_path / "out"), strength=1.5)
    found = MeanToken("projector", mean, torch.ones(64), {"dog": direction}, {})
    ((name, counts, _), (chance, *_)) = meter._projected_away(asked, found)
    assert (name, chance) == ("own direction", "random direction")
    own = direction - (direction @ mean) / (mean @ mean) * mean
    steering = done[name]
    assert (steering.site, steering.mode, steering.alpha) == ("projector", "project_away", 1.5)
    torch.testing.assert_close(steering.vector, own.expand(2, 64), atol=1e-4, rtol=1e-4)
    assert isinstance(steering.positions, torch.Tensor)
    for row, tokens in enumerate(asked.states):
        having = tokens @ own > 0
        assert counts[row] == having.sum()
        assert 5 < counts[row] < 59
        ids = asked.inputs["input_ids"][row][asked.inputs["attention_mask"][row].bool()]
        chosen = steering.positions[row, : len(ids)]
        assert torch.equal(chosen[ids == module.backbone.encode.image_token_id], having)
        assert chosen.sum() == having.sum()
    vector = done[chance].vector
    torch.testing.assert_close(vector @ mean, torch.zeros(2), atol=1e-3, rtol=0)
    assert not torch.equal(vector[0], vector[1])


def test_an_object_that_is_cropped_away_is_left_out(module: Inspection, tmp_path: Path) -> None:
    """The model sees the middle of a wide picture."""
    boxes = [(0, 0, 16, 16), (56, 8, 72, 24)]
    samples = [sample_of(tmp_path, number, box, size=(128, 64)) for number, box in enumerate(boxes)]
    data = SimpleNamespace(names=NAMES, samples=lambda stage: samples)
    trainer: Any = SimpleNamespace(
        datamodule=data, global_rank=0, precision_plugin=SimpleNamespace(predict_step_context=nullcontext)
    )
    meter = AblationMeter(str(tmp_path), ["object"], noise=False)
    meter.journal = Journal(tmp_path)
    meter.check(module)
    meter._acting = {"original": set()}
    answers = [Answers("original", ["A dog.", "A dog."])]
    meter.on_predict_batch_end(trainer, module, answers, Batch(samples, {}), 0)
    found = meter._found(trainer, {})
    assert list(found.left_out) == ["0"]
    assert "cropped" in found.left_out["0"]
    assert list(found.samples) == ["1"]
    assert meter.journal.rows()["0"]["trials"] == []
    assert {name: list(by_id) for name, by_id in found.trials["original"].items()} == {
        name: ["1"] for name in ("unaltered", "object", "as many random as object")
    }


def test_what_does_not_fit_is_told_in_one_line(ablate: Run, cli: Run, shapes: Path, tmp_path: Path) -> None:
    backbone = VisionLanguageModel.load(str(TRAINED))
    narrow = save_mean_token(tmp_path / "narrow.safetensors", backbone, torch.zeros(8))
    deep = save_mean_token(tmp_path / "deep.safetensors", backbone, torch.zeros(160), site="lm.block.2")
    out = tmp_path / "out"
    assert "no set of visual tokens is called 'objects'" in ablate(out, sets=["objects"]).error
    without = ablate(out, "--trainer.callbacks.reference=null", sets=["gradients:5"])
    assert "AblationMeter.sets: 'gradients:5' needs a token from which the gradients begin; give `ref" in without.error
    assert "states of width 8" in ablate(out, f"--trainer.callbacks.reference={narrow}").error
    assert "states at 'lm.block.2'" in ablate(out, f"--trainer.callbacks.reference={deep}").error
    assert "has no directions of classes" in ablate(out, f"--trainer.callbacks.directions={deep}").error
    root = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    file = root / "annotations" / "instances_train2014.json"
    content = json.loads(file.read_text())
    dot = np.zeros((64, 64), dtype=np.uint8)
    dot[20:25, 20:25] = 1
    mask = coco_mask.encode(np.asfortranarray(dot))
    for one in content["annotations"]:
        if one["image_id"] == content["annotations"][-1]["image_id"]:
            one["segmentation"] = {**mask, "counts": mask["counts"].decode()}
    file.write_text(json.dumps(content))
    small = ablate(out, f"--data.root={root}", limit=40, least_area=0.0)
    assert "has 25 pixels, less than a patch of 64, and so have 6 others; leave such objects out" in small.error
    pictures = cli(
        "predict",
        "--trainer.accelerator=cpu",
        "--model=Inspection",
        f"--model.model_id={TRAINED}",
        "--data=CaptionDataModule",
        f"--data.root={shapes}",
        "--trainer.callbacks+=AblationMeter",
        f"--trainer.callbacks.out={out}",
    )
    assert "AblationMeter needs pictures with masks of their objects: --data ObjectDataModule" in pictures.error
    with pytest.raises(ValueError, match="steps must be at least 1"):
        AblationMeter(str(out), steps=0)


def save_mean_token(
    path: Path,
    backbone: VisionLanguageModel,
    mean: torch.Tensor,
    objects: dict[str, torch.Tensor] | None = None,
    site: str = "projector",
) -> Path:
    metadata = {"model_id": str(TRAINED), "weights_hash": backbone.weights_hash()}
    MeanToken(site, mean, torch.ones_like(mean), objects or {}, metadata).save(path)
    return path
