"""Several callbacks that look into one run: what one has seen, and another not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from conceptshift.tests.results import measured

Run = Callable[..., Any]
TRAINED = Path(__file__).parents[1] / "checkpoints" / "shapes-llava"
KNOCKOUT, SCORER, BOTH = "KnockoutMeter", "LensScorer", ("KnockoutMeter", "LensScorer")
RESULTS = {KNOCKOUT: "knockout.json", SCORER: "lens.json"}


@pytest.fixture
def look(cli: Run, shapes: Path) -> Run:
    """Look into the embedded model: `look([(folder, callback), ...])`."""

    def run(callbacks: Iterable[tuple[Path, str]]) -> Any:
        given: list[str] = []
        for out, name in callbacks:
            given += [f"--trainer.callbacks+={name}", f"--trainer.callbacks.out={out}"]
            given += ["--trainer.callbacks.knockouts=['image -> answer @ all']"] if name == KNOCKOUT else []
        return cli(
            "predict",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.logger=false",
            "--model=Inspection",
            f"--model.model_id={TRAINED}",
            "--model.max_new_tokens=4",
            "--data=ObjectDataModule",
            f"--data.root={shapes}",
            "--data.predict_split=train2014",
            "--data.settings=[polling]",
            "--data.polling_prompt=Is there {object}?\nAnswer the question using a single word or phrase.",
            "--data.limit=3",
            *given,
        )

    return run


def rows_of(out: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (out / "rows-00000.jsonl").read_text().splitlines()]
    return {row["sample_id"]: row for row in rows}


def test_what_one_callback_lacks_is_run_again_whatever_their_order(look: Run, tmp_path: Path) -> None:
    outs = {name: tmp_path / name for name in BOTH}
    assert look((out, name) for name, out in outs.items()).status == 0
    whole = {name: rows_of(out) for name, out in outs.items()}
    results = {name: measured(out / RESULTS[name]) for name, out in outs.items()}
    # A picture is one sample of the scorer, and its objects are several of the meter.
    assert 3 == len(whole[SCORER]) < len(whole[KNOCKOUT])
    # The one that came last needs fewer samples; now, the one that comes first lacks none.
    journal = outs[KNOCKOUT] / "rows-00000.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:1]))
    done = look((outs[name], name) for name in reversed(BOTH))
    assert done.status == 0, done.err
    for name, out in outs.items():
        assert rows_of(out) == whole[name]
        assert measured(out / RESULTS[name]) == results[name]


def test_two_callbacks_do_not_share_a_folder(look: Run, tmp_path: Path) -> None:
    error = look((tmp_path / "out", name) for name in BOTH).error
    assert f"would both write {tmp_path / 'out'}; name them" in error
    for first, second in (BOTH, BOTH[::-1]):
        assert look([(tmp_path / first, first)]).status == 0
        assert "holds another run" in look([(tmp_path / first, second)]).error
