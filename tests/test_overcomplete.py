"""Overcomplete: every method of the library keeps the promises of a dictionary, and is what the library computes."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conceptshift.concepts import KMeans, Overcomplete, SemiNMF, load_dictionary, match_concepts
from conceptshift.concepts._overcomplete import library
from conceptshift.concepts._sae_training import Batches
from conceptshift.concepts.rows import Rows
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

if find_spec("overcomplete") is None or find_spec("einops") is None:
    pytest.skip('needs pip install "conceptshift[overcomplete]"', allow_module_level=True)

SAES = sorted(library().saes)
OPTIMISERS = sorted(library().optimisers)
NON_NEGATIVE = {"NMF", "SkNMF"}

_WITHOUT_PICTURES = """
import sys
import torch
from conceptshift.concepts import Overcomplete

def loaded(*names):
    return [name for name in sys.modules if name.partition(".")[0] in names]

assert not loaded("overcomplete", "einops"), "imported before it is needed"
pictures = ("torchvision", "timm", "cv2", "skimage")
before = loaded(*pictures)
Overcomplete("TopKSAE", n_concepts=2, epochs=1).fit(torch.randn(9, 4))
assert loaded(*pictures) == before
assert not loaded("overcomplete")
"""
_WITH_PICTURES = """
import sys
from unittest.mock import MagicMock

for name in ("torchvision", "timm", "cv2", "skimage", "skimage.transform", "matplotlib", "matplotlib.pyplot"):
    sys.modules[name] = MagicMock()
sys.modules["matplotlib.colors"] = MagicMock()
from conceptshift.concepts._overcomplete import library

if {first}:
    import overcomplete
    assert library().saes["TopKSAE"] is overcomplete.TopKSAE
else:
    library()
    import overcomplete
assert overcomplete.optimization.NMF is overcomplete.NMF
assert overcomplete.sae.TopKSAE is overcomplete.TopKSAE
assert overcomplete.DinoV2
"""


def planted(rows: int = 400, seed: int = 0, concepts: int = 8, width: int = 16) -> tuple[Tensor, Tensor]:
    """Features [N, D] of two concepts each around a large common mean, and the concepts [K, D]."""
    generator = torch.Generator().manual_seed(seed)
    U = normalize(torch.randn(concepts, width, generator=generator))
    which = torch.rand(rows, concepts, generator=generator).topk(2).indices
    V = torch.zeros(rows, concepts).scatter(1, which, 3 + 3 * torch.rand(rows, 2, generator=generator))
    mean = 10 * normalize(torch.randn(1, width, generator=generator))
    return V @ U + mean + 0.05 * torch.randn(rows, width, generator=generator), U


def features(method: str) -> Tensor:
    Z, _ = planted(150)
    return Z.abs() if method in NON_NEGATIVE else Z


def small(method: str, seed: int = 0, **given: Any) -> Overcomplete:
    training = {"epochs": 5, "batch_size": 32} if method in SAES else {}
    return Overcomplete(method, n_concepts=5, seed=seed, **{**training, **given})


def test_the_library_has_what_we_think() -> None:
    assert {"NMF", "SemiNMF", "ConvexNMF", "SkPCA", "SkICA"} <= set(OPTIMISERS)
    assert {"SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE", "RATopKSAE", "RAJumpSAE", "MpSAE"} <= set(SAES)


@pytest.mark.parametrize("method", [*OPTIMISERS, *SAES])
def test_every_method_fits_and_encodes(method: str) -> None:
    Z = features(method)
    with torch.inference_mode():
        model = small(method).fit(Z)
    V = model.transform(Z)
    assert model.dictionary.shape == (5, 16)
    assert V.shape == (150, 5)
    assert V.isfinite().all()
    assert model.transform(Z[:0]).shape == (0, 5)
    # Each row on its own; of all methods, only scikit-learn's NMF stops for all rows at once.
    torch.testing.assert_close(model.transform(Z[30:37]), V[30:37], rtol=0.05 if method == "SkNMF" else 1e-3, atol=1e-3)
    residual = Z - model.reconstruct(V)
    explained = 1 - float(residual.square().sum() / (Z - Z.mean(dim=0)).square().sum())
    assert model.report.explained_variance == pytest.approx(explained, abs=1e-4)
    assert model.report.objective == pytest.approx(0.5 * float(residual.square().sum()), rel=1e-4)


@pytest.mark.parametrize("method", [*OPTIMISERS, *SAES])
def test_round_trip_is_exact(method: str, tmp_path: Path) -> None:
    Z = features(method)
    model = small(method).fit(Z)
    model.save(tmp_path / "dictionary.safetensors", {"site": "lm.block.3"})
    loaded = load_dictionary(tmp_path / "dictionary.safetensors")
    assert isinstance(loaded, Overcomplete)
    assert loaded.method == method
    V = model.transform(Z)
    assert torch.equal(loaded.transform(Z), V)
    assert torch.equal(loaded.reconstruct(V), model.reconstruct(V))
    assert loaded.report == model.report
    assert torch.equal(loaded.fit(Z).dictionary, model.dictionary)


@pytest.mark.parametrize("method", [*OPTIMISERS, *SAES])
def test_a_seed_gives_one_dictionary_and_the_generators_stay(method: str) -> None:
    Z = features(method)
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"], random.getstate()
    first = small(method, seed=3).fit(Z)
    V = first.transform(Z)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], states[1])
    assert random.getstate() == states[2]
    torch.rand(3), np.random.rand(3)
    again = small(method, seed=3).fit(Z)
    assert torch.equal(again.dictionary, first.dictionary)
    assert torch.equal(again.transform(Z), V)


@pytest.mark.parametrize("method", ["SemiNMF", "ConvexNMF", "SkKMeans", "TopKSAE", "RATopKSAE"])
def test_seeds_differ(method: str) -> None:
    Z = features(method)
    assert not torch.allclose(small(method, seed=0).fit(Z).dictionary, small(method, seed=1).fit(Z).dictionary)


@pytest.mark.parametrize(
    ("method", "options"),
    [("NMF", {}), ("NMF", {"solver": "mu", "max_iter": 40}), ("SemiNMF", {}), ("ConvexNMF", {"max_iter": 100})],
)
def test_factorisations_are_the_library_s(method: str, options: dict[str, Any]) -> None:
    Z = features(method)
    model = Overcomplete(method, n_concepts=5, seed=7, options=options).fit(Z)
    arguments = dict(options)
    limits = {name: arguments.pop(name) for name in ("max_iter",) if name in arguments}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        np.random.seed(7)
        theirs = library().optimisers[method](5, **arguments)
        codes, U = theirs.fit(Z, **limits)
    torch.testing.assert_close(model.dictionary, U)
    # With exact activations, the same concepts explain at least as much.
    assert 2 * model.report.objective <= float((Z - codes @ U).square().sum()) * 1.0001


def test_penalised_activations_minimise_the_library_s_objective() -> None:
    Z = features("SemiNMF")
    model = Overcomplete("SemiNMF", n_concepts=5, options={"solver": "pgd", "l1_penalty": 2.0}).fit(Z)
    V = model.transform(Z)

    def objective(codes: Tensor) -> float:
        return float((Z - codes @ model.dictionary).square().mean() + 2.0 * codes.abs().mean())

    assert objective(V) < objective(1.01 * V)
    assert objective(V) < objective(0.99 * V)
    assert objective(V) < objective(Overcomplete("SemiNMF", n_concepts=5).fit(Z).transform(Z))


def test_an_sae_is_the_library_s() -> None:
    Z, _ = planted()
    model = Overcomplete("TopKSAE", n_concepts=8, seed=4, options={"top_k": 2}, epochs=3, batch_size=50).fit(Z)
    mean, scale = Z.mean(dim=0), (Z - Z.mean(dim=0)).square().mean().sqrt()
    generator = torch.Generator().manual_seed(4)
    epochs = [
        [(Z[part] - mean) / scale for part in torch.split(torch.randperm(400, generator=generator), 50)]
        for _ in range(3)
    ]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        theirs = library().saes["TopKSAE"](16, 8, top_k=2)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=2e-3)
    losses = []
    for batches in epochs:
        logs = library().train_sae(
            theirs, batches, lambda x, x_hat, *_: (x - x_hat).square().mean(), optimizer, nb_epochs=1
        )
        losses += logs["avg_loss"]
    theirs.eval()
    torch.testing.assert_close(model.dictionary, theirs.get_dictionary(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.transform(Z), scale * theirs.encode((Z - mean) / scale)[1], rtol=1e-2, atol=1e-2)
    history = torch.tensor(model.report.objective_history[:-1])
    torch.testing.assert_close(history, 0.5 * Z.numel() * scale**2 * torch.tensor(losses), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["TopKSAE", "BatchTopKSAE", "RATopKSAE", "MpSAE"])
def test_training_finds_planted_concepts(method: str) -> None:
    Z, U = planted(800)
    options = {"k": 2} if method == "MpSAE" else {"top_k": 2}

    def found(**training: Any) -> tuple[float, Overcomplete]:
        model = Overcomplete(method, n_concepts=8, options=options, batch_size=40, **training).fit(Z)
        matched = model.dictionary[match_concepts(U, model.dictionary)]
        return float(cosine_similarity(matched, U).mean()), model

    before, start = found(epochs=1, learning_rate=1e-12)
    after, model = found(epochs=60)
    assert after > before + 0.2
    assert model.report.explained_variance > max(start.report.explained_variance, 0.5)
    assert model.report.objective < model.report.objective_history[0]
    assert model.report.l0 == pytest.approx(2, abs=0.3)


def test_history_and_objective_of_an_sae_are_in_one_unit() -> None:
    Z, _ = planted()
    model = Overcomplete("SAE", n_concepts=8, epochs=1, batch_size=400, learning_rate=1e-12, l1_weight=1.7).fit(Z)
    V = model.transform(Z)
    expected = 0.5 * float((Z - model.reconstruct(V)).square().sum()) + 1.7 * float(V.sum())
    assert model.report.objective_history == pytest.approx((expected, expected), rel=1e-4)


def test_l1_weight_makes_activations_sparse_at_any_scale_of_the_features() -> None:
    Z, _ = planted()
    dense, sparse = (Overcomplete("SAE", n_concepts=8, l1_weight=weight).fit(Z).report for weight in (0.0, 2.0))
    assert sparse.l0 < dense.l0 - 1
    scaled = Overcomplete("SAE", n_concepts=8, l1_weight=20.0).fit(10 * Z).report
    assert scaled.l0 == pytest.approx(sparse.l0, abs=0.05)
    assert scaled.objective == pytest.approx(100 * sparse.objective, rel=1e-2)


def test_semi_nmf_of_ours_is_not_worse() -> None:
    # Without the penalty, both minimise ‖Z − VU‖² over V ≥ 0: the bound on U only fixes its scale.
    for seed in range(3):
        Z, _ = planted(seed=seed)
        ours = SemiNMF(n_concepts=6, l1_weight=0.0).fit(Z)
        theirs = Overcomplete("SemiNMF", n_concepts=6, seed=seed).fit(Z)
        assert ours.report.objective <= theirs.report.objective * 1.001


def test_ica_spans_what_pca_spans() -> None:
    Z, _ = planted()
    ica, pca = (Overcomplete(method, n_concepts=5).fit(Z) for method in ("SkICA", "SkPCA"))
    assert ica.report.explained_variance == pytest.approx(pca.report.explained_variance, abs=1e-4)
    torch.testing.assert_close(pca.dictionary @ pca.dictionary.T, torch.eye(5), rtol=0, atol=1e-4)


def test_kmeans_assigns_the_nearest_centre() -> None:
    Z, _ = planted()
    model = Overcomplete("SkKMeans", n_concepts=8).fit(Z)
    assert torch.equal(model.assign(Z), torch.cdist(Z, model.dictionary).argmin(dim=1))
    assert model.report.objective == pytest.approx(KMeans(8).fit(Z).report.objective / 2, rel=0.05)


def test_archetypal_concepts_lie_between_rows() -> None:
    Z, _ = planted()
    options = {"delta": 1e-6, "use_multiplier": False, "points": 50, "top_k": 2}
    U = Overcomplete("RATopKSAE", n_concepts=8, options=options, epochs=20).fit(Z).dictionary
    X = (Z - Z.mean(dim=0)) / (Z - Z.mean(dim=0)).square().mean().sqrt()
    assert (U - X.amax(dim=0)).max() < 1e-4
    assert (X.amin(dim=0) - U).max() < 1e-4


class Folder:
    """Shards that are read anew each time, as from disk."""

    def __init__(self, Z: Tensor, size: int) -> None:
        self.Z, self.size = Z, size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.split(self.Z, self.size))


@pytest.mark.parametrize("method", ["SemiNMF", "SkPCA"])
def test_optimisers_do_not_see_shards(method: str) -> None:
    Z, _ = planted()
    whole, shards = (Overcomplete(method, n_concepts=5).fit(rows) for rows in (Z, Folder(Z, 64)))
    torch.testing.assert_close(shards.dictionary, whole.dictionary)


@pytest.mark.parametrize("size", [3, 64, 1000])
def test_saes_learn_from_shards(size: int) -> None:
    Z, _ = planted()
    whole, shards = (
        Overcomplete("TopKSAE", n_concepts=8, options={"top_k": 2}, batch_size=40).fit(rows)
        for rows in (Z, Folder(Z, size))
    )
    assert shards.report.explained_variance == pytest.approx(whole.report.explained_variance, abs=0.1)


@pytest.mark.parametrize("shard", [7, 30, 100])
def test_an_epoch_has_each_row_once_at_most_and_full_batches(shard: int) -> None:
    Z = torch.arange(100, dtype=torch.float32)[:, None].repeat(1, 3)
    batches = Batches(Rows(Folder(Z, shard)), 30, torch.Generator().manual_seed(0))
    first, second = (torch.stack(list(batches)) for _ in range(2))
    assert first.shape == (3, 30, 3)
    for epoch in (first, second):
        assert len(torch.unique(epoch[:, :, 0])) == 90
    assert not torch.equal(first, second)
    everything = batches.standardised(Z)
    assert float(everything.mean()) == pytest.approx(0, abs=1e-6)
    assert float(everything.square().mean()) == pytest.approx(1)


@pytest.mark.parametrize("method", sorted(NON_NEGATIVE))
def test_signed_features_are_refused_where_the_library_refuses_them(method: str) -> None:
    Z, _ = planted()
    with pytest.raises(ValueError, match=rf"'{method}' needs non-negative features, .* use 'SemiNMF' or 'ConvexNMF'"):
        small(method).fit([Z.abs(), Z])
    model = small(method).fit(Z.abs())
    with pytest.raises(ValueError, match="needs non-negative features"):
        model.transform(Z)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "TopSAE"}, r"`method` 'TopSAE' not found in overcomplete: its optimisers are ConvexNMF, .*TopKSAE"),
        ({"method": "BaseOptimDictionaryLearning"}, "not found in overcomplete"),
        (
            {"method": "NMF", "options": {"solvers": "mu"}},
            r"'NMF' has no option 'solvers': it has max_iter, solver, tol",
        ),
        ({"method": "NMF", "options": {"solver": "magic"}}, "'NMF' refuses `options` = .*Unknown solver magic"),
        ({"method": "SkPCA", "options": {"whitened": True}}, r"'SkPCA' has no option 'whitened': it has .*whiten"),
        ({"method": "SkPCA", "options": {"random_state": 3}}, "'SkPCA' has no option 'random_state'"),
        ({"method": "TopKSAE", "options": {"top_k": 9}}, "`options.top_k` = 9 is more than the `n_concepts` = 5"),
        ({"method": "BatchTopKSAE", "options": {"top_k": 0}}, "`options.top_k` must be at least 1"),
        (
            {"method": "TopKSAE", "options": {"encoder_module": "mlp"}},
            "'TopKSAE' refuses `options` = .*'mlp' not found",
        ),
        (
            {"method": "TopKSAE", "options": {"encoder_module": torch.nn.ReLU()}},
            "`options.encoder_module` must be JSON",
        ),
        ({"method": "RATopKSAE", "options": {"points": 4}}, "`options.points` must be at least 5"),
        ({"method": "RATopKSAE", "options": {"detla": 1}}, "'RATopKSAE' has no option 'detla': it has delta, .*top_k"),
        ({"method": "JumpSAE", "options": {"kernel": "magic"}}, "'JumpSAE' refuses `options`"),
        ({"method": "NMF", "epochs": 3}, "`epochs` is for SAEs and 'NMF' is an optimiser"),
        ({"method": "SAE", "epochs": 0}, "`epochs` must be at least 1"),
        ({"method": "SAE", "batch_size": 2.5}, "`batch_size` must be a whole number"),
        ({"method": "SAE", "l1_weight": -1.0}, "`l1_weight` must be at least 0"),
    ],
)
def test_bad_settings_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Overcomplete(**{"n_concepts": 5, **arguments})
    assert "\n" not in str(caught.value)


def test_bad_fits() -> None:
    Z, _ = planted()
    with pytest.raises(ValueError, match="'SkPCA' of overcomplete is fitted in one process: leave `distributed` out"):
        Overcomplete("SkPCA").fit(Z, distributed=True)
    with (
        pytest.warns(UserWarning, match="n_components is too large"),
        pytest.raises(ValueError, match="'SkICA' found 16 of `n_concepts` = 20 concepts in 400 rows of width 16"),
    ):
        Overcomplete("SkICA", n_concepts=20).fit(Z)
    with pytest.raises(ValueError, match="'QSAE' diverged: lower `learning_rate` = 1e\\+20"):
        Overcomplete("QSAE", learning_rate=1e20, epochs=3).fit(Z)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "overcomplete", None)
    library.cache_clear()
    try:
        with pytest.raises(ValueError, match=r'overcomplete not found: pip install "conceptshift\[overcomplete\]"'):
            Overcomplete("NMF")
    finally:
        library.cache_clear()


@pytest.mark.parametrize(
    "script", [_WITHOUT_PICTURES, _WITH_PICTURES.format(first=True), _WITH_PICTURES.format(first=False)]
)
def test_import_leaves_the_package_alone(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
