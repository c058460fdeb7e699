"""Semi-NMF: its optimum, its constraints and its parity with scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conceptshift.concepts import SemiNMF, load_dictionary, match_concepts
from conceptshift.concepts.rows import Rows
from conceptshift.concepts.semi_nmf import _Descent, sweep_code, update_dictionary
from numpy.typing import NDArray
from sklearn.decomposition import DictionaryLearning
from torch import Tensor


def planted(
    seed: int, n_samples: int = 200, n_concepts: int = 6, width: int = 16, noise: float = 0.05, mean: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Features [N, D] of a known dictionary, and the dictionary [K, D]."""
    generator = np.random.default_rng(seed)
    U = generator.normal(size=(n_concepts, width))
    U /= np.linalg.norm(U, axis=1, keepdims=True)
    V = generator.gamma(2, 2, size=(n_samples, n_concepts)) * (generator.random((n_samples, n_concepts)) < 0.3)
    offset = generator.normal(size=(1, width))
    Z = V @ U + noise * generator.normal(size=(n_samples, width)) + mean * offset / np.linalg.norm(offset)
    return torch.tensor(Z, dtype=torch.float32), torch.tensor(U, dtype=torch.float32)


def objective(Z: Tensor, V: NDArray[np.float64], U: NDArray[np.float64], l1_weight: float) -> float:
    """½‖Z − VU‖² + λ‖V‖₁, written out once more in float64."""
    residual = Z.double().numpy() - V @ U
    return float(0.5 * np.square(residual).sum() + l1_weight * np.abs(V).sum())


def test_hand_worked_line() -> None:
    # On one direction, the best unit concept is that direction and v = |z| − λ.
    model = SemiNMF(n_concepts=1, l1_weight=1.0).fit(torch.tensor([[3.0, 0.0], [5.0, 0.0]]))
    torch.testing.assert_close(model.dictionary, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(model.transform(torch.tensor([[3.0, 4.0], [0.5, 9.0]])), torch.tensor([[2.0], [0.0]]))
    report = model.report
    assert report.objective == pytest.approx(0.5 * (1 + 1) + (2 + 4))
    assert report.explained_variance == pytest.approx(1 - (1 + 1) / (1 + 1))
    assert report.l0 == 1
    assert report.dead_concepts == 0
    assert report.converged
    torch.testing.assert_close(model.reconstruct(torch.tensor([[2.0]])), torch.tensor([[2.0, 0.0]]))


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_dictionary_is_recovered(seed: int) -> None:
    Z, planted_U = planted(seed, n_samples=400, noise=0.02)
    U = SemiNMF(n_concepts=6, l1_weight=0.05, seed=seed).fit(Z).dictionary
    matched = U[match_concepts(planted_U, U)]
    assert torch.nn.functional.cosine_similarity(matched, planted_U).min() > 0.99


@pytest.mark.parametrize(("seed", "l1_weight", "mean"), [(0, 1.0, 0.0), (1, 0.3, 0.0), (2, 1.0, 4.0), (3, 3.0, 4.0)])
def test_objective_is_not_above_scikit_learn(seed: int, l1_weight: float, mean: float) -> None:
    Z, _ = planted(seed, noise=0.3, mean=mean)
    reference = DictionaryLearning(
        n_components=6,
        positive_code=True,
        alpha=l1_weight,
        transform_alpha=l1_weight,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        transform_max_iter=5000,
        random_state=0,
    ).fit(Z.double().numpy())
    theirs = objective(Z, reference.transform(Z.double().numpy()), reference.components_, l1_weight)
    model = SemiNMF(n_concepts=6, l1_weight=l1_weight).fit(Z)
    ours = objective(Z, model.transform(Z).double().numpy(), model.dictionary.double().numpy(), l1_weight)
    assert ours <= theirs * 1.0001
    assert model.report.objective == pytest.approx(ours, rel=1e-6)


def test_objective_never_increases() -> None:
    Z, _ = planted(4, noise=0.5, mean=3.0)
    random_U = torch.nn.functional.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    descent = _Descent(Rows(Z), random_U[None], 1.0)
    descent.run(1000, 1e-7)
    own = torch.stack(descent.history)[:, 0].numpy()
    assert len(own) > 10
    assert (np.diff(own) <= 0).all()
    reported = np.array(SemiNMF(n_concepts=8).fit(Z).report.objective_history)
    assert (np.diff(reported[:-1]) <= 0).all()
    # The last value is measured anew, from the residuals in float32.
    assert reported[-1] <= reported[-2] * (1 + 1e-6)
    assert descent.converged
    assert own[-1] < 0.9 * own[0]


def test_each_half_step_decreases_the_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(50, 7, generator=generator, dtype=torch.float64) * 3
    U = torch.nn.functional.normalize(torch.randn(4, 7, generator=generator, dtype=torch.float64))
    Vt = torch.rand(4, 50, generator=generator, dtype=torch.float64)
    values = [objective(Z, Vt.T.numpy(), U.numpy(), 1.0)]
    for _ in range(5):
        sweep_code(Vt[None], (U @ Z.T)[None], (U @ U.T)[None], 1.0)
        values.append(objective(Z, Vt.T.numpy(), U.numpy(), 1.0))
        U = update_dictionary(U[None], (Vt @ Vt.T)[None], (Vt @ Z)[None], torch.tensor([False]))[0]
        values.append(objective(Z, Vt.T.numpy(), U.numpy(), 1.0))
    assert (np.diff(values) < 0).all()


def test_dictionary_step_is_a_projection_on_the_ball() -> None:
    # Unconstrained minima C / A: (0.5, 0) lies in the ball, (8, 6) does not, and nothing uses the last concept.
    U = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.3, 0.3]])
    A, C = torch.diag(torch.tensor([4.0, 1.0, 0.0])), torch.tensor([[2.0, 0.0], [8.0, 6.0], [0.0, 0.0]])
    U = update_dictionary(U[None], A[None], C[None], torch.tensor([True]))[0]
    torch.testing.assert_close(U, torch.tensor([[0.5, 0.0], [0.8, 0.6], [0.3, 0.3]]))


def test_constraints_hold() -> None:
    Z, _ = planted(5, noise=0.3)
    model = SemiNMF(n_concepts=6).fit(Z)
    norms = model.dictionary.norm(dim=1)
    assert norms.max() <= 1 + 1e-6
    # The penalty on V makes every used concept as long as it may be.
    assert norms.min() > 1 - 1e-5
    V = model.transform(Z)
    assert V.min() == 0
    assert model.report.l0 == pytest.approx(float((V > 0).sum(dim=1).float().mean()))


@pytest.mark.parametrize("mean", [0.0, 20.0])
def test_transform_solves_the_lasso(mean: float) -> None:
    Z, _ = planted(6, noise=0.3, mean=mean)
    model = SemiNMF(n_concepts=6, l1_weight=0.7).fit(Z[:150])
    V = model.transform(Z).double()
    U = model.dictionary.double()
    gradient = (V @ U - Z.double()) @ U.T + 0.7
    # Karush-Kuhn-Tucker: no gradient where v > 0, no descent where v = 0.
    scale = (Z.double() @ U.T).abs().amax(dim=1, keepdim=True)
    assert (gradient[V > 0].abs().max() / scale.min()) < 1e-4
    assert (gradient / scale)[V == 0].min() > -1e-5
    assert 0 < (V == 0).float().mean() < 1


def test_transform_treats_each_row_alone() -> None:
    Z, _ = planted(7, mean=5.0)
    model = SemiNMF(n_concepts=6).fit(Z)
    V = model.transform(Z)
    order = torch.randperm(len(Z), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.transform(Z[order]), V[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.cat([model.transform(part) for part in torch.split(Z, 33)]), V, rtol=1e-4, atol=1e-5
    )
    assert model.transform(Z[:0]).shape == (0, 6)


def test_dead_concepts_are_restarted() -> None:
    Z = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]]).repeat(10, 1)
    # The second concept points away from every row, so nothing activates it; the descent must not stop there.
    descent = _Descent(Rows(Z), torch.tensor([[[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]]), 1.0)
    descent.run(50, 1e-7)
    torch.testing.assert_close(descent.U[0].float(), torch.eye(3)[:2])
    history = torch.stack(descent.history)[:, 0].tolist()
    assert history[0] == pytest.approx(10 * (0.5 + 4) + 10 * 12.5)
    assert history[-1] == pytest.approx(20 * (0.5 + 4))
    assert descent.converged


def test_descents_side_by_side_are_those_alone() -> None:
    Z, _ = planted(4, noise=0.5, mean=3.0)
    generator = torch.Generator().manual_seed(1)
    starts = torch.nn.functional.normalize(torch.randn(3, 8, 16, generator=generator), dim=2)
    together = _Descent(Rows(Z), starts, 1.0)
    together.run(20, 0)
    for s in range(3):
        alone = _Descent(Rows(Z), starts[s : s + 1], 1.0)
        alone.run(20, 0)
        torch.testing.assert_close(together.U[s], alone.U[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.E[s], alone.E[0], rtol=1e-6, atol=0)


def test_concepts_that_cannot_help_stay_dead_and_are_reported() -> None:
    Z = torch.tensor([[3.0, 0.0], [5.0, 0.0], [4.0, 0.0]])
    report = SemiNMF(n_concepts=2).fit(Z).report
    assert report.objective == pytest.approx(3 * 0.5 + 2 + 4 + 3)
    assert report.converged
    assert report.dead_concepts == 1


def test_limit_of_iterations_is_reported() -> None:
    Z, _ = planted(9, noise=1.0)
    report = SemiNMF(n_concepts=6, max_iterations=3, tolerance=0).fit(Z).report
    # Three within the leading axes, three on all features, and the final activations.
    assert report.iterations == 6
    assert not report.converged
    assert len(report.objective_history) == 7


def test_seed_decides_everything_and_nothing_else_is_touched() -> None:
    Z, _ = planted(10, noise=0.5)
    state = torch.get_rng_state()
    first, again, other = (SemiNMF(n_concepts=6, seed=seed).fit(Z) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.dictionary, again.dictionary)
    assert first.report == again.report
    assert not torch.equal(first.dictionary, other.dictionary)


def test_low_precision_features_and_callers_are_computed_in_float32() -> None:
    Z = planted(11)[0].bfloat16()
    expected = SemiNMF(n_concepts=6).fit(Z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = SemiNMF(n_concepts=6).fit(Z)
        V = model.transform(Z)
    assert V.dtype == torch.float32
    assert torch.equal(model.dictionary, expected.dictionary)
    assert torch.equal(V, expected.transform(Z.float()))


def test_matmul_precision_of_the_caller_is_kept() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        SemiNMF(n_concepts=2).fit(planted(12)[0])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_explained_variance_and_assignment_follow_their_formulas() -> None:
    Z, _ = planted(13)
    model = SemiNMF(n_concepts=6, l1_weight=0.1).fit(Z)
    V = model.transform(Z)
    residual = (Z - V @ model.dictionary).double().square().sum()
    total = (Z - Z.mean(dim=0)).double().square().sum()
    assert model.explained_variance(Z) == pytest.approx(float(1 - residual / total), rel=1e-6)
    assert model.explained_variance(Z) == pytest.approx(model.report.explained_variance, rel=1e-6)
    assert model.explained_variance(Z[:1].repeat(5, 1)) == 0
    idle = (V == 0).all(dim=1)
    assert idle.any()
    assert torch.equal(model.assign(Z), torch.where(idle, -1, V.abs().argmax(dim=1)))


def test_round_trip_is_exact(tmp_path: Path) -> None:
    Z, _ = planted(14)
    model = SemiNMF(n_concepts=6, l1_weight=0.5, seed=3, max_iterations=50, tolerance=1e-5).fit(Z)
    model.save(tmp_path / "dictionary.safetensors", {"site": "lm.block.3", "samples": 200})
    loaded = load_dictionary(tmp_path / "dictionary.safetensors")
    assert type(loaded) is SemiNMF
    assert torch.equal(loaded.dictionary, model.dictionary)
    assert torch.equal(loaded.transform(Z), model.transform(Z))
    assert loaded.report == model.report
    assert loaded.metadata == {"site": "lm.block.3", "samples": 200}
    assert (loaded.n_concepts, loaded.l1_weight, loaded.seed) == (6, 0.5, 3)
    assert (loaded.max_iterations, loaded.tolerance) == (50, 1e-5)


def test_features_that_no_dictionary_fits_are_refused_at_once() -> None:
    Z, _ = planted(8)
    with pytest.raises(ValueError, match=r"`l1_weight` = 10000 leaves every activation at zero.*the norm [\d.]+:"):
        SemiNMF(n_concepts=3, l1_weight=1e4).fit(Z)
    with pytest.raises(ValueError, match=r"3 distinct rows, but most of the 200 rows of `Z` are equal"):
        SemiNMF(n_concepts=3).fit(Z[:2].repeat(100, 1))
    with pytest.raises(ValueError, match=r"2 distinct rows"):
        SemiNMF(n_concepts=2).fit(torch.ones(50, 3))
    assert SemiNMF(n_concepts=2).fit(Z[:2].repeat(100, 1)).report.explained_variance > 0.5


def test_bad_features() -> None:
    Z, _ = planted(15)
    broken = Z.clone()
    broken[3, 1] = float("nan")
    broken[5] = float("inf")
    with pytest.raises(ValueError, match=r"`Z` must be finite, but 2 of 200 rows"):
        SemiNMF(n_concepts=6).fit(broken)
    with pytest.raises(ValueError, match=r"at least `n_concepts` = 6 rows, got 5"):
        SemiNMF(n_concepts=6).fit(Z[:5])
    with pytest.raises(ValueError, match=r"floating tensor \[rows, width\], got torch.int64"):
        SemiNMF(n_concepts=6).fit(Z.long())
    with pytest.raises(ValueError, match=r"floating tensor \[rows, width\], got torch.float32 \[16\]"):
        SemiNMF(n_concepts=6).fit(Z[0])
    model = SemiNMF(n_concepts=6, max_iterations=2).fit(Z)
    with pytest.raises(ValueError, match=r"width 16 that the dictionary was fitted on, got 15"):
        model.transform(Z[:, 1:])
    with pytest.raises(ValueError, match=r"6 columns, one a concept, got 5"):
        model.reconstruct(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"1 of 200 rows"):
        model.transform(torch.where(torch.arange(200)[:, None] == 7, torch.nan, Z))


def test_unfitted_dictionary(tmp_path: Path) -> None:
    model = SemiNMF()
    for use in (
        lambda: model.dictionary,
        lambda: model.report,
        lambda: model.transform(torch.ones(2, 3)),
        lambda: model.reconstruct(torch.ones(2, 20)),
        lambda: model.save(tmp_path / "dictionary.safetensors", {}),
    ):
        with pytest.raises(ValueError, match=r"SemiNMF is not fitted: call `fit\(Z\)`"):
            use()


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("n_concepts", lambda: SemiNMF(n_concepts=0)),
        ("l1_weight", lambda: SemiNMF(l1_weight=-0.1)),
        ("l1_weight", lambda: SemiNMF(l1_weight=float("nan"))),
        ("max_iterations", lambda: SemiNMF(max_iterations=0)),
        ("tolerance", lambda: SemiNMF(tolerance=-1e-9)),
    ],
)
def test_bad_settings(name: str, build: type[SemiNMF]) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be at least"):
        build()
