"""KMeans dictionaries: centres, activations, hard reconstruction."""

from pathlib import Path

import pytest
import torch
from conceptshift.concepts import KMeans, load_dictionary, match_concepts
from sklearn import cluster
from torch import Tensor


def clusters(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, D] in well separated clusters, the centres [K, D], and the cluster of each row [N]."""
    generator = torch.Generator().manual_seed(seed)
    centres = 20 * torch.randn(5, 8, generator=generator)
    labels = torch.arange(200) % 5
    return centres[labels] + torch.randn(200, 8, generator=generator), centres, labels


def test_planted_clusters_are_found() -> None:
    Z, centres, labels = clusters()
    model = KMeans(n_concepts=5).fit(Z)
    matching = match_concepts(centres, model.dictionary)
    assert torch.equal(model.assign(Z), matching[labels])
    means = torch.stack([Z[labels == k].mean(dim=0) for k in range(5)])
    torch.testing.assert_close(model.dictionary[matching], means, rtol=1e-4, atol=1e-4)


def test_hand_worked_activation_and_reconstruction() -> None:
    model = KMeans(n_concepts=2).fit(torch.tensor([[0.0, 0.0], [0.0, 2.0], [30.0, 0.0], [30.0, 2.0]]))
    first = int(model.dictionary[:, 0].argmin())
    V = model.transform(torch.tensor([[3.0, 5.0]]))
    # Distances to (0, 1) and (30, 1): 5 and √(27² + 4²).
    assert float(V[0, first]) == pytest.approx(1 / 6)
    assert float(V[0, 1 - first]) == pytest.approx(1 / (1 + 745**0.5))
    torch.testing.assert_close(model.reconstruct(V), torch.tensor([[0.0, 1.0]]))
    # ‖Z − centre‖² = 4, ‖Z − mean‖² = 4 · (15² + 1).
    assert model.report.objective == pytest.approx(4)
    assert model.report.explained_variance == pytest.approx(1 - 4 / 904)
    assert model.explained_variance(torch.tensor([[0.0, 1.0], [30.0, 1.0]])) == pytest.approx(1)
    assert model.report.l0 == 1
    assert model.report.dead_concepts == 0
    assert model.report.converged


def test_distance_of_a_centre_to_itself_is_zero() -> None:
    Z, _, _ = clusters()
    model = KMeans(n_concepts=5).fit(Z + 1000)
    torch.testing.assert_close(model.transform(model.dictionary).diagonal(), torch.ones(5))


def test_inertia_is_not_above_scikit_learns() -> None:
    Z = torch.randn(150, 6, generator=torch.Generator().manual_seed(1))
    reference = cluster.KMeans(n_clusters=7, random_state=4, n_init="auto").fit(Z.numpy())
    model = KMeans(n_concepts=7, seed=4).fit(Z)
    assert model.report.objective <= reference.inertia_ * 1.0001


def test_seed_reproduces_and_rows_are_independent() -> None:
    Z = torch.randn(150, 6, generator=torch.Generator().manual_seed(2))
    model = KMeans(n_concepts=7, seed=1).fit(Z)
    assert torch.equal(model.dictionary, KMeans(n_concepts=7, seed=1).fit(Z).dictionary)
    assert not torch.equal(model.dictionary, KMeans(n_concepts=7, seed=2).fit(Z).dictionary)
    assert torch.equal(torch.cat([model.transform(part) for part in torch.split(Z, 31)]), model.transform(Z))


def test_round_trip_is_exact(tmp_path: Path) -> None:
    Z, _, _ = clusters()
    model = KMeans(n_concepts=5, seed=2).fit(Z.bfloat16())
    model.save(tmp_path / "kmeans.safetensors", {"model": "toy"})
    loaded = load_dictionary(tmp_path / "kmeans.safetensors")
    assert type(loaded) is KMeans
    assert torch.equal(loaded.dictionary, model.dictionary)
    assert torch.equal(loaded.transform(Z), model.transform(Z))
    assert (loaded.n_concepts, loaded.seed, loaded.report) == (5, 2, model.report)


def test_bad_input() -> None:
    Z, _, _ = clusters()
    with pytest.raises(ValueError, match=r"`n_concepts` must be at least 1"):
        KMeans(n_concepts=0)
    with pytest.raises(ValueError, match=r"at least `n_concepts` = 20 rows, got 19"):
        KMeans().fit(Z[:19])
    with pytest.raises(ValueError, match="KMeans is not fitted"):
        KMeans().assign(Z)
    with pytest.raises(ValueError, match=r"width 8 .* got 7"):
        KMeans(n_concepts=5).fit(Z).explained_variance(Z[:, :7])
