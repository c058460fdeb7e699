"""What made a result, compared: what counts, what does not, and what an error says of it."""

from __future__ import annotations

import sys

import pytest
from conceptshift.records.provenance import command, commanded, coverage, data_coverage, made_now, mismatch

MADE = {
    "model_id": "a", "weights_hash": "w", "adapter": None, "adapter_hash": None, "seed": 0, "max_new_tokens": 5,
    "checkpoints": {"destination": "x"}, "checkpoint_hashes": {"destination": "h"}, "command": "c", "date": "d",
    "data": {"root": "r", "split": "val", "limit": None, "samples": 4, "of": 4, "hash": "s"},
}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"command": "other", "date": "later", "seed": 1},
        {"model_id": "moved", "checkpoints": {"destination": "moved"}},
        {"data": {"root": "moved", "split": "other name", "hash": "s"}},
    ],
    ids=["nothing", "incidental", "places", "data of the same content"],
)
def test_what_does_not_count(changed: dict[str, object]) -> None:
    assert mismatch(MADE, {**MADE, **changed}) is None


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"weights_hash": "v"}, "`weights_hash` was 'w', and is 'v'"),
        ({"max_new_tokens": 6}, "`max_new_tokens` was 5, and is 6"),
        ({"adapter_hash": "h"}, "`adapter_hash` was None, and is 'h'"),
        ({"checkpoint_hashes": {"destination": "i"}}, "`checkpoint_hashes.destination` was 'h', and is 'i'"),
        ({"data": {**MADE["data"], "hash": "t", "limit": 2}}, "`data.limit` was None, and is 2"),  # type: ignore[dict-item]
        ({"data": {**MADE["data"], "hash": "t"}}, "`data.hash` was 's', and is 't'"),  # type: ignore[dict-item]
        ({"model_id": "b", "weights_hash": None}, "`model_id` was 'a', and is 'b'"),
        ({"new_option": 1}, "`new_option` was None, and is 1"),
    ],
)
def test_what_counts_is_told_with_both_values(changed: dict[str, object], told: str) -> None:
    assert mismatch(MADE, {**MADE, **changed}) == told


def test_what_is_not_known_yet_and_what_is_not_asked_do_not_count() -> None:
    assert mismatch(MADE, {"max_new_tokens": 5}) is None
    assert mismatch(MADE, {**MADE, "max_new_tokens": 6}, ["weights_hash"]) is None
    steps = [{"alpha": 1, "hash": "a"}, {"alpha": 1, "hash": "b"}]
    other = [steps[0], {"alpha": 1, "hash": "c"}]
    assert mismatch({"steering": steps}, {"steering": other}) == "`steering.1.hash` was 'b', and is 'c'"
    long = mismatch({"runs": list(range(500))}, {"runs": []})
    assert long is not None
    assert len(long) < 150


def test_a_result_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/notebook", "a b"])
    assert command() == "notebook 'a b'"
    with commanded(["fit", "--config", "my file.yaml"]):
        made = made_now()
        assert made["command"] == "conceptshift fit --config 'my file.yaml'"
        with commanded(["predict"]):
            assert command() == "conceptshift predict"
    assert command() == "notebook 'a b'"
    assert set(made["versions"]) == {"python", "conceptshift", "torch", "transformers", "peft", "lightning"}
    assert made["date"].endswith("+00:00")


def test_how_much_of_the_data() -> None:
    assert coverage(1500, 1500) == "1,500"
    assert coverage(1200, 1500, ["limit"]) == "1,200 of 1,500 (limit)"
    assert coverage(8, None, ["limit"]) == "8 (limit)"
    assert coverage(1500, 1500, ["limit"]) == "1,500"
    assert coverage(3, 5, ["limit", "unreadable pictures"]) == "3 of 5 (limit, unreadable pictures)"
    data = {"samples": 1200, "of": 1500, "limit": 1200}
    assert data_coverage({"data": data}) == "1,200 of 1,500 (limit)"
    limited = {"data": {**data, "limit": None}, "limits": {"limit_predict_batches": 3}}
    assert data_coverage(limited) == "1,200 of 1,500 (limit_predict_batches)"
    assert data_coverage({"data": {"hash": "of a stream"}}) == data_coverage({}) == ""
