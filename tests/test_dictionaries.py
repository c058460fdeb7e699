"""What every dictionary promises: shards, processes, artifacts and errors are the same for all methods."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conceptshift.concepts import PCA, ConceptDictionary, KMeans, Overcomplete, SemiNMF, Simple, load_dictionary
from conceptshift.concepts.rows import Rows
from torch import Tensor

METHODS = [SemiNMF, KMeans, PCA, Simple]
_TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
from conceptshift import concepts

rank, store, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
Z = torch.load(f"{folder}/Z.pt", weights_only=True)
own = Z[:70] if rank == 0 else Z[70:]
for name in ("SemiNMF", "KMeans", "PCA", "Simple"):
    # The second process holds its rows in shards.
    rows = own if rank == 0 else list(own.split(100))
    model = getattr(concepts, name)(n_concepts=6).fit(rows, distributed=True)
    model.save(f"{folder}/{name}-{rank}.safetensors", {})
if rank == 1:
    own[3, 2] = float("nan")
try:
    concepts.KMeans(n_concepts=6).fit(own, distributed=True)
except ValueError as error:
    # Both processes fail: one alone would leave the other waiting.
    assert "process 1: `Z` must be finite, but 1 of 230 rows" in str(error), error
else:
    raise SystemExit("bad rows were accepted")
dist.destroy_process_group()
"""


def features(rows: int = 300, width: int = 24) -> Tensor:
    """Overlapping clusters around a large common mean, as hidden states have it."""
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(9, width, generator=generator)
    mean = 5 * torch.randn(width, generator=generator)
    labels = torch.randint(9, (rows,), generator=generator)
    return centres[labels] + mean + torch.randn(rows, width, generator=generator)


class Folder:
    """Shards that are read anew each time, as from disk."""

    def __init__(self, Z: Tensor, size: int) -> None:
        self.Z, self.size, self.passes = Z, size, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return iter(torch.split(self.Z, self.size))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 64, 1000])
def test_shards_give_the_dictionary_of_the_whole(method: type[ConceptDictionary], size: int) -> None:
    Z = features()
    whole, shards = method(n_concepts=6).fit(Z), method(n_concepts=6).fit(Folder(Z, size))
    torch.testing.assert_close(shards.dictionary, whole.dictionary, rtol=1e-5, atol=1e-5)
    assert shards.report.objective == pytest.approx(whole.report.objective, rel=1e-6)
    assert shards.report.explained_variance == pytest.approx(whole.report.explained_variance, rel=1e-5)
    assert shards.report.l0 == whole.report.l0
    assert shards.report.dead_concepts == whole.report.dead_concepts


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_keeps_what_encodes(method: type[ConceptDictionary], tmp_path: Path) -> None:
    Z = features()
    model = method(n_concepts=6).fit(Z)
    model.save(tmp_path / "dictionary.safetensors", {"site": "lm.block.3"})
    loaded = load_dictionary(tmp_path / "dictionary.safetensors")
    assert type(loaded) is method
    V = model.transform(Z)
    assert torch.equal(loaded.transform(Z), V)
    assert torch.equal(loaded.reconstruct(V), model.reconstruct(V))
    assert loaded.report == model.report


@pytest.mark.parametrize("method", METHODS)
def test_reported_variance_is_that_of_the_reconstruction(method: type[ConceptDictionary]) -> None:
    Z = features().double()
    model = method(n_concepts=6).fit(Z)
    residual = Z - model.reconstruct(model.transform(Z)).double()
    expected = 1 - float(residual.square().sum() / (Z - Z.mean(dim=0)).square().sum())
    assert model.report.explained_variance == pytest.approx(expected, rel=1e-5)
    assert model.explained_variance(Z) == pytest.approx(expected, rel=1e-5)


def test_lengths_are_the_mean_activations() -> None:
    Z = features()
    for model in (SemiNMF(n_concepts=6).fit(Z), PCA(n_concepts=6).fit(Z)):
        V, assignment = model.transform(Z), model.assign(Z)
        assignment = assignment.where(assignment != 2, -1)
        lengths = model.lengths(V, assignment)
        for k in range(6):
            own = V[assignment == k, k].abs()
            assert float(lengths[k]) == pytest.approx(1.0 if k == 2 else float(own.mean()), rel=1e-5)
        order = torch.randperm(len(V), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.lengths(V[order], assignment[order]), lengths)


def test_concepts_that_are_states_have_length_one() -> None:
    Z = features()
    for model in (KMeans(n_concepts=6).fit(Z), Simple(n_concepts=6).fit(Z)):
        assert torch.equal(model.lengths(model.transform(Z), model.assign(Z)), torch.ones(6))


@pytest.mark.parametrize("method", [*METHODS, "ConvexNMF", "SkICA", "SkKMeans", "TopKSAE"])
def test_a_move_over_the_length_moves_the_states_by_itself(method: type[ConceptDictionary] | str) -> None:
    """What is added to a concept arrives in its states as many times as long as the concept is in them."""
    if isinstance(method, str) and (find_spec("overcomplete") is None or find_spec("einops") is None):
        pytest.skip('needs pip install "conceptshift[overcomplete]"')
    Z, move = features(), torch.randn(24, generator=torch.Generator().manual_seed(1))
    model = Overcomplete(method, n_concepts=6) if isinstance(method, str) else method(n_concepts=6)
    model.fit(Z)
    V, assignment = model.transform(Z), model.assign(Z)
    lengths = model.lengths(V, assignment)
    for k in set(assignment.tolist()):
        U = model.dictionary.clone()
        U[k] += move / lengths[k]
        own = V[assignment == k]
        arrived = (model.with_concepts(U).reconstruct(own) - model.reconstruct(own)).norm(dim=1).mean()
        assert float(arrived) == pytest.approx(float(move.norm()), rel=1e-3)


def test_bad_activations_have_no_lengths() -> None:
    Z = features()
    model = SemiNMF(n_concepts=6)
    with pytest.raises(ValueError, match="SemiNMF is not fitted"):
        model.lengths(torch.ones(3, 6), torch.zeros(3).long())
    V = model.fit(Z).transform(Z)
    with pytest.raises(ValueError, match=r"`V` must have 6 columns, one a concept, got 5"):
        model.lengths(V[:, :5], model.assign(Z))
    with pytest.raises(ValueError, match=r"`assignment` must be an integer tensor \[300\], .* got torch.int64 \[299\]"):
        model.lengths(V, model.assign(Z)[1:])
    with pytest.raises(ValueError, match=r"`assignment` must lie in −1 … 5, got values from 6 to 6"):
        model.lengths(V, torch.full((300,), 6))


def test_two_processes_give_the_dictionary_of_one(tmp_path: Path) -> None:
    Z = features()
    torch.save(Z, tmp_path / "Z.pt")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _TWO_PROCESSES, str(rank), str(tmp_path / "store"), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    for method in METHODS:
        one = method(n_concepts=6).fit(Z)
        first, second = (load_dictionary(tmp_path / f"{method.__name__}-{rank}.safetensors") for rank in range(2))
        assert torch.equal(first.dictionary, second.dictionary)
        assert first.report == second.report
        torch.testing.assert_close(first.dictionary, one.dictionary, rtol=1e-5, atol=1e-5)
        assert first.report.explained_variance == pytest.approx(one.report.explained_variance, rel=1e-5)
        assert (first.report.l0, first.report.dead_concepts) == (one.report.l0, one.report.dead_concepts)


def test_bad_shards() -> None:
    Z = features()
    with pytest.raises(TypeError, match="gone through several times: give a list"):
        SemiNMF(n_concepts=6).fit(shard for shard in torch.split(Z, 50))
    with pytest.raises(ValueError, match=r"`Z\[1\]` must be \[rows, 24\] on cpu as the first shard, got \[50, 20\]"):
        SemiNMF(n_concepts=6).fit([Z[:50], Z[50:100, :20]])
    broken = Z.clone()
    broken[60, 3] = torch.inf
    with pytest.raises(ValueError, match=r"`Z\[1\]` must be finite, but 1 of 50 rows"):
        SemiNMF(n_concepts=6).fit(list(torch.split(broken, 50)))
    with pytest.raises(ValueError, match="at least one shard"):
        KMeans(n_concepts=6).fit([])
    with pytest.raises(ValueError, match="at least `n_concepts` = 6 rows, got 4"):
        KMeans(n_concepts=6).fit([Z[:2], Z[2:4]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_concepts", [0, -1, 2.5, True])
def test_number_of_concepts_must_be_whole_and_positive(method: type[ConceptDictionary], n_concepts: int) -> None:
    with pytest.raises(ValueError, match="`n_concepts` must be"):
        method(n_concepts=n_concepts)


@pytest.mark.parametrize("method", [SemiNMF, KMeans, Simple])
def test_duplicate_rows_count_once(method: type[ConceptDictionary]) -> None:
    Z = features(rows=4)
    with pytest.raises(ValueError, match="5 distinct rows, but most of the 120 rows of `Z` are equal"):
        method(n_concepts=5).fit(Z.repeat(30, 1))
    four = method(n_concepts=4).fit(Z.repeat(30, 1))
    assert four.report.explained_variance > 0.9


def test_a_sample_of_rows_does_not_depend_on_shards() -> None:
    Z = features()
    whole, shards = (Rows(part).sample(40, torch.Generator().manual_seed(3)) for part in (Z, torch.split(Z, 7)))
    assert torch.equal(whole, shards)
    assert len(torch.unique(whole, dim=0)) == 40
