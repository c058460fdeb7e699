"""Several data modules as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conceptshift.datamodules import CaptionDataModule, MixtureDataModule, VQADataModule


def mixture(root: Path, limit: int = 3) -> MixtureDataModule:
    return MixtureDataModule([CaptionDataModule(str(root), limit=limit), VQADataModule(str(root), limit=2)])


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_samples_are_joined_with_unique_ids(shapes: Path, stage: str) -> None:
    data = mixture(shapes)
    data.setup(stage)
    found = data.samples(stage)
    parts = CaptionDataModule(str(shapes), limit=3), VQADataModule(str(shapes), limit=2)
    for part in parts:
        part.setup(stage)
    assert [sample.sample_id for sample in found] == [
        *(f"0/{sample.sample_id}" for sample in parts[0].samples(stage)),
        *(f"1/{sample.sample_id}" for sample in parts[1].samples(stage)),
    ]
    assert [sample.prompt for sample in found] == [sample.prompt for part in parts for sample in part.samples(stage)]
    assert len(found) == 5


def test_the_same_data_twice_stays_apart(shapes: Path) -> None:
    data = MixtureDataModule([CaptionDataModule(str(shapes)), CaptionDataModule(str(shapes))])
    data.setup("predict")
    ids = [sample.sample_id for sample in data.samples("predict")]
    assert len(set(ids)) == len(ids) == 6


def test_the_description_is_that_of_the_parts(shapes: Path) -> None:
    described = [json.dumps(mixture(shapes, limit).describe("predict")) for limit in (3, 3, 4)]
    assert described[0] == described[1] != described[2]


def test_no_parts() -> None:
    with pytest.raises(ValueError, match=r"--data\.init_args\.parts: expected at least one"):
        MixtureDataModule([])
