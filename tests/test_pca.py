"""PCA and Simple dictionaries: the baselines' own rules."""

import numpy as np
import pytest
import torch
from conceptshift.concepts import PCA, Simple
from sklearn import decomposition
from torch import Tensor


def features(rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    scales = torch.linspace(3, 0.3, width)
    return torch.randn(rows, width, generator=generator) * scales + 10 * torch.randn(width, generator=generator)


@pytest.mark.parametrize(("rows", "width", "n_concepts"), [(200, 40, 5), (30, 40, 29), (200, 12, 12)])
def test_axes_are_scikit_learns(rows: int, width: int, n_concepts: int) -> None:
    Z = features(rows, width)
    reference = decomposition.PCA(n_components=n_concepts, svd_solver="full").fit(Z.double().numpy())
    model = PCA(n_concepts=n_concepts).fit(Z)
    signs = np.sign((model.dictionary.numpy() * reference.components_).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(model.dictionary.numpy() * signs, reference.components_, atol=2e-4)
    np.testing.assert_allclose(
        model.transform(Z).numpy() * signs.T, reference.transform(Z.double().numpy()), rtol=1e-3, atol=5e-3
    )
    assert model.report.explained_variance == pytest.approx(reference.explained_variance_ratio_.sum(), rel=1e-5)
    largest = model.dictionary.gather(1, model.dictionary.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()


def test_signed_activations_of_two_opposite_rows() -> None:
    Z = torch.tensor([[1.0, 5.0], [7.0, 5.0], [4.0, 5.5], [4.0, 4.5]])
    model = PCA(n_concepts=1).fit(Z)
    torch.testing.assert_close(model.dictionary, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(model.transform(Z), torch.tensor([[-3.0], [3.0], [0.0], [0.0]]))
    torch.testing.assert_close(model.reconstruct(torch.tensor([[2.0]])), torch.tensor([[6.0, 5.0]]))
    assert model.report.objective == pytest.approx(0.5)


def test_more_axes_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"`n_concepts` = 9 is more than the 8 axes that 9 rows of width 40 have"):
        PCA(n_concepts=9).fit(features(9, 40))


def test_simple_takes_the_longest_distinct_rows() -> None:
    Z = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 0.0], [0.0, 5.0], [0.0, -3.0]])
    model = Simple(n_concepts=3).fit(Z)
    assert model.dictionary.tolist() == [[0.0, 5.0], [3.0, 0.0], [0.0, -3.0]]
    # Only the first row is not among them: it is nearest to (3, 0).
    assert model.report.objective == pytest.approx(4)
    assert float(model.transform(Z[:1])[0, 1]) == pytest.approx(1 / 3)
    assert model.assign(Z).tolist() == [1, 0, 1, 0, 2]
