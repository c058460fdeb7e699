"""KnockoutMeter: shares that stay right, on the embedded model and Shapes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conceptshift.callbacks import KnockoutMeter
from conceptshift.callbacks.parts.trials import Trial, locate
from conceptshift.datamodules.object_names import ObjectNames
from conceptshift.datamodules.objects import ObjectDataModule
from conceptshift.lightning_modules import Inspection, VisionLanguageModel
from conceptshift.lightning_modules.backbone.knockout import AttentionKnockout
from conceptshift.tests.results import measured
from conceptshift.tests.test_ablation_meter import sample_of
from PIL import Image

Run = Callable[..., Any]
TRAINED = Path(__file__).parents[1] / "checkpoints" / "shapes-llava"
KNOCKOUTS = [
    "object -> last @ all",
    "image -> answer @ all",
    "object+1 -> last @ mid-late",
    "image-object+1 -> last_row @ 0-1",
    "registers -> last @ 5",
    "text -> last @ early",
]


def arguments(
    shapes: Path, out: Path, *more: object, knockouts: list[str] = KNOCKOUTS, batch_size: int = 8
) -> list[str]:
    """Of a run of the meter on three pictures of Shapes."""
    return [
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
        "--data.polling_prompt=Is there {object}?\nAnswer the question using a single word or phrase.",
        "--data.limit=3",
        f"--data.batch_size={batch_size}",
        "--trainer.callbacks+=KnockoutMeter",
        f"--trainer.callbacks.out={out}",
        f"--trainer.callbacks.knockouts={json.dumps(knockouts)}",
        *map(str, more),
    ]


@pytest.fixture
def knock(cli: Run, shapes: Path) -> Run:
    """Run the meter: `knock(out, *more, knockouts=[…], batch_size=…)`."""
    return lambda out, *more, **options: cli(*arguments(shapes, out, *more, **options))


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out / "samples.parquet").to_pylist()
    return sorted(rows, key=lambda row: (row["sample_id"], row["name"]))


def test_relative_accuracy_is_the_share_of_right_answers_that_stay_right(knock: Run, tmp_path: Path) -> None:
    ran = knock(tmp_path / "out")
    assert ran.status == 0, ran.err
    found = json.loads((tmp_path / "out" / "knockout.json").read_text())
    rows = rows_of(tmp_path / "out")
    (variant,) = found["variants"]
    assert variant == "original"
    told = found["variants"][variant]
    assert set(told["settings"]) == {"generative", "polling", "vqa"}
    for setting, counts in told["settings"].items():
        unaltered = [row for row in rows if row["setting"] == setting and row["name"] == "unaltered"]
        assert counts["samples"] == len(unaltered)
        assert counts["right"] == sum(row["right"] for row in unaltered) > 0
        assert counts["visual_tokens"] == 64
    for row in told["rows"]:
        mine = [one for one in rows if (one["setting"], one["name"]) == (row["setting"], row["knockout"])]
        assert row["samples"] == len(mine)
        assert row["samples"] + row["without"] == told["settings"][row["setting"]]["right"]
        assert row["relative_accuracy"] == pytest.approx(sum(one["right"] for one in mine) / len(mine))
        assert row["source_tokens"] == pytest.approx(sum(one["tokens"] for one in mine) / len(mine))
        low, high = row["interval"]
        assert 0 <= low <= row["relative_accuracy"] <= high <= 1
    blocks = {row["window"]: row["blocks"] for row in told["rows"]}
    assert blocks["mid-late"] == [3, 4]
    assert blocks["0-1"] == [0, 1]
    # Nobody can describe a picture of which the answer sees nothing.
    blind = {row["setting"]: row["relative_accuracy"] for row in told["rows"] if row["sources"] == "image"}
    assert blind["generative"] < 0.5
    assert (tmp_path / "out" / "figures" / "knockout.png").is_file()


def test_answers_are_those_of_a_knockout_by_hand(knock: Run, shapes: Path, tmp_path: Path) -> None:
    """The object's patches found by counting pixels, one sample alone, and eager attention."""
    name = "object -> answer @ 1-5"
    assert knock(tmp_path / "out", knockouts=[name]).status == 0
    rows = [row for row in rows_of(tmp_path / "out") if row["setting"] == "polling"]
    backbone = VisionLanguageModel.load(str(TRAINED), attention="eager")
    data = ObjectDataModule(str(shapes), predict_split="train2014", limit=3)
    data.setup("predict")
    images = {sample.sample_id: sample for sample in data.samples("predict")}
    checked = 0
    for row in rows:
        if row["name"] != name:
            continue
        sample = images[row["sample_id"]]
        mask = torch.zeros(64, 64, dtype=torch.bool)
        for instance in sample.instances:
            if instance.category == sample.object:
                mask |= torch.from_numpy(instance.mask())
        patches = mask.reshape(8, 8, 8, 8).any(dim=3).any(dim=1).flatten()
        article = "an" if sample.object[0] in "aeiou" else "a"
        prompt = f"Is there {article} {sample.object}?\nAnswer the question using a single word or phrase."
        inputs = backbone.encode([Image.open(sample.image).convert("RGB")], [prompt])
        sources = torch.isin(inputs["input_ids"], torch.tensor(backbone.encode.image_token_id))
        sources[sources.clone()] = patches
        with backbone.intervene(AttentionKnockout(sources, "answer", range(1, 6))):
            assert backbone.generate(inputs, 16).texts == [row["text"]]
        assert row["tokens"] == int(patches.sum())
        checked += 1
    assert checked > 1


def test_batches_do_not_matter_and_an_interrupted_run_goes_on(knock: Run, tmp_path: Path) -> None:
    several, alone, few = tmp_path / "several", tmp_path / "alone", ("--data.limit=2", "--model.max_new_tokens=8")
    assert knock(several, *few, batch_size=5, knockouts=KNOCKOUTS[:2]).status == 0
    assert knock(alone, *few, batch_size=1, knockouts=KNOCKOUTS[:2]).status == 0
    assert rows_of(several) == rows_of(alone)
    (journal,) = several.glob("rows-*.jsonl")
    whole = measured(several / "knockout.json")
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:4]))
    assert knock(several, *few, batch_size=5, knockouts=KNOCKOUTS[:2]).status == 0
    assert measured(several / "knockout.json") == whole
    other = knock(several, *few, knockouts=KNOCKOUTS[3:])
    assert "holds another run" in other.error


def test_every_variant_is_measured_and_one_that_is_the_same_gives_the_same(
    knock: Run, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(TRAINED, tmp_path / "adapter", 0.0)
    few = (f"--model.destination={adapter}", "--data.settings=[polling]", "--data.limit=2")
    assert knock(tmp_path / "out", *few, knockouts=KNOCKOUTS[:1]).status == 0
    found = json.loads((tmp_path / "out" / "knockout.json").read_text())["variants"]
    assert list(found) == ["destination", "original"]
    assert found["destination"] == found["original"]
    assert found["original"]["settings"]["polling"]["right"] > 0


def test_a_sample_without_sources_or_targets_does_not_count(tiny: Path, tmp_path: Path) -> None:
    """Beside one that has them, in the same batch."""
    module = Inspection(str(tiny), max_new_tokens=4)
    module.configure_model()
    # The object is all of the first picture, and of the second a corner.
    samples = [sample_of(tmp_path, number, box) for number, box in enumerate([(0, 0, 64, 64), (48, 0, 64, 16)])]
    right = [(sample, locate(sample, module.backbone)) for sample in samples]
    names = ["object -> image-object @ 0-1", "image-object -> last @ all", "object -> last @ all"]
    meter = KnockoutMeter(str(tmp_path), names)
    meter._acting = {"original": set()}
    trials: dict[str, list[Trial]] = {sample.sample_id: [] for sample in samples}
    meter._ask(module, "original", right, ObjectNames({"dog": []}), trials)
    found = {i: {trial.name: trial.tokens for trial in given} for i, given in trials.items()}
    assert found == {"0": {names[2]: 64}, "1": dict(zip(names, (4, 60, 4), strict=True))}


def test_each_variant_is_asked_as_itself(make_adapter: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    """A destination that answers otherwise, by hand."""
    module = Inspection(str(tiny), destination=str(make_adapter(tiny, tmp_path / "adapter", 0.5)), max_new_tokens=6)
    module.configure_model()
    sample, name = sample_of(tmp_path, 0, (8, 8, 40, 40)), "object -> last @ 0-1"
    place, names = locate(sample, module.backbone), ObjectNames({"dog": []})
    meter = KnockoutMeter(str(tmp_path), [name])
    meter._acting = {variant: set() for variant in module.variants}
    trials: dict[str, list[Trial]] = {sample.sample_id: []}
    texts = []
    for variant in module.variants:
        meter._ask(module, variant, [(sample, place)], names, trials)
        inputs = module.encode([Image.open(sample.image)], [sample.prompt])
        sources = torch.isin(inputs["input_ids"], torch.tensor(module.backbone.encode.image_token_id))
        sources[sources.clone()] = place.tokens
        knockout = AttentionKnockout(sources, "last_prompt", [0, 1])
        with module.running_as(variant) as backbone, backbone.intervene(knockout):
            texts += backbone.generate(inputs, 6).texts
    assert [(trial.variant, trial.text) for trial in trials["0"]] == list(zip(module.variants, texts, strict=True))
    assert len(set(texts)) == 2, "the adapter changes no answer"


def test_two_processes_find_what_one_finds(knock: Run, tmp_path: Path) -> None:
    """An odd number of samples, so that neither process has as many as the other."""
    few = ("--data.settings=[polling]", "--data.limit=3", "--model.max_new_tokens=2", "--data.batch_size=2")
    assert knock(tmp_path / "one", *few, knockouts=KNOCKOUTS[:1]).status == 0
    # Forked, so that they need not import everything anew.
    forked = ("--trainer.strategy=ddp_fork", "--trainer.devices=2")
    assert knock(tmp_path / "two", *few, *forked, knockouts=KNOCKOUTS[:1]).status == 0
    del os.environ["MASTER_PORT"]
    assert len(list((tmp_path / "two").glob("rows-*.jsonl"))) == 2, "it ran as one process"
    one, two = (measured(tmp_path / name / "knockout.json") for name in ("one", "two"))
    assert one == two


def test_a_knockout_that_changes_nothing_is_an_error(knock: Run, tmp_path: Path) -> None:
    """What comes later is never attended to; what the lowest row learns in the last block nobody is told any more."""
    ran = knock(tmp_path / "out", knockouts=["last -> object @ all"])
    assert "'last -> object @ all' changes nothing" in ran.error
    ran = knock(tmp_path / "out", knockouts=["image -> last_row @ 5"])
    assert "'image -> last_row @ 5' changes no logit of an answer" in ran.error


@pytest.mark.parametrize(
    ("knockout", "told"),
    [
        ("object -> last @ dawn", "no window 'dawn'"),
        ("objects -> last @ all", "no set 'objects'"),
        ("gradients:5 -> last @ all", "wants a reference token"),
        ("object -> last @ 6", "no block 6"),
    ],
)
def test_bad_names_are_told_in_one_line(knock: Run, tmp_path: Path, knockout: str, told: str) -> None:
    assert told in knock(tmp_path / "out", knockouts=[knockout]).error
