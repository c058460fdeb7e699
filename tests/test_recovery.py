"""Recovery of destination concepts by shifted ones, against numbers worked by hand."""

import pytest
import torch
from conceptshift.concepts import Recovery, recovery, t_overlap

NONE = torch.tensor([False, False, False])


def test_t_overlap_is_a_share_of_the_first_set() -> None:
    assert t_overlap(["dog", "cat", "cow", "ox"], ["cat", "hen", "dog"]) == 50
    assert t_overlap(["cat", "hen", "dog"], ["dog", "cat", "cow", "ox"]) == pytest.approx(200 / 3)
    assert t_overlap(["dog", "dog", "cat"], ["dog"]) == 50
    assert t_overlap(["dog"], ["dog"]) == 100
    assert t_overlap(["dog"], []) == 0
    assert t_overlap([], ["dog"]) == 0
    assert t_overlap([], []) == 0


def worked() -> Recovery:
    """Three concepts; the counterparts are stored as 2, 0, 1; the last concept is empty."""
    U_a = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    U_b = torch.tensor([[0.0, 3.0, 4.0], [0.0, 0.0, 1.0], [4.0, 3.0, 0.0]])
    U_shifted = torch.tensor([[4.0, 3.0, 0.0], [0.0, 4.0, 3.0], [9.0, 9.0, 9.0]])
    return recovery(
        U_a,
        U_shifted,
        U_b,
        words_a=[["red", "dog"], ["sea", "sky"], ["ball"]],
        words_shifted=[["dog", "cat"], ["sky", "sea", "sun", "sand"], ["x"]],
        words_b=[["sky", "sun", "sand"], ["ball"], ["dog", "cat", "cow"]],
        empty=torch.tensor([False, False, True]),
    )


def test_hand_worked_recovery() -> None:
    result = worked()
    assert result.matching.tolist() == [2, 0, 1]
    torch.testing.assert_close(result.recovery_original, torch.tensor([50.0, 50.0, 100.0]))
    torch.testing.assert_close(result.recovery_shifted, torch.tensor([100.0, 75.0, 0.0]))
    torch.testing.assert_close(result.cosine_original, torch.tensor([0.8, 0.6, 1.0]))
    torch.testing.assert_close(result.cosine_shifted[:2], torch.tensor([1.0, 0.96]))
    torch.testing.assert_close(result.l2_original, torch.tensor([18**0.5, 17**0.5, 0.0]))
    torch.testing.assert_close(result.l2_shifted[:2], torch.tensor([0.0, 2**0.5]))
    torch.testing.assert_close(result.delta_l2[:2], torch.tensor([18**0.5, 17**0.5 - 2**0.5]))
    torch.testing.assert_close(result.delta_l2_normalised, torch.tensor([1.0, 1 - (2 / 17) ** 0.5, 0.0]))
    torch.testing.assert_close(result.delta_cosine[:2], torch.tensor([0.2, 0.36]))
    torch.testing.assert_close(result.delta_cosine_normalised[:2], torch.tensor([0.25, 0.6]))


def test_means_leave_empty_concepts_out() -> None:
    result = worked()
    assert result.matched_cosine_gain == pytest.approx(0.28)
    means = result.means()
    assert means["delta_cosine"] == pytest.approx(0.28)
    assert means["delta_cosine_normalised"] == pytest.approx((0.25 + 0.6) / 2)
    assert means["recovery_original"] == pytest.approx(50)
    assert means["recovery_shifted"] == pytest.approx(87.5)
    assert means["cosine_original"] == pytest.approx(0.7)
    assert means["cosine_shifted"] == pytest.approx(0.98)
    assert means["l2_original"] == pytest.approx((18**0.5 + 17**0.5) / 2)
    assert means["l2_shifted"] == pytest.approx(2**0.5 / 2)
    assert means["delta_l2"] == pytest.approx((18**0.5 + 17**0.5 - 2**0.5) / 2)
    assert means["delta_l2_normalised"] == pytest.approx((2 - (2 / 17) ** 0.5) / 2)


def test_no_shift_recovers_nothing() -> None:
    U = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    words = [["a"], ["b"], ["c"]]
    result = recovery(U, U, U.flip(0), words, words, words, NONE)
    assert (result.delta_cosine == 0).all()
    assert (result.delta_l2 == 0).all()
    assert result.matched_cosine_gain == 0


def test_opposite_counterpart_keeps_the_sign_of_the_gain() -> None:
    U_a, U_b = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    result = recovery(U_a, U_b, U_b, [["a"]], [["a"]], [["a"]], torch.tensor([False]))
    assert result.delta_cosine_normalised.tolist() == [2.0]


def test_zero_concepts_give_no_nan() -> None:
    zeros, words = torch.zeros(3, 4), [["a"]] * 3
    result = recovery(zeros, zeros, zeros, words, words, words, NONE)
    assert all(value == value for value in result.means().values())
    assert result.delta_l2_normalised.tolist() == [0, 0, 0]
    assert result.delta_cosine_normalised.tolist() == [0, 0, 0]


def test_bad_input() -> None:
    U, words = torch.eye(3), [["a"], ["b"], ["c"]]
    with pytest.raises(ValueError, match=r"`U_shifted` must have the shape of `U_a`, \[3, 3\], got \[2, 3\]"):
        recovery(U, U[:2], U, words, words, words, NONE)
    with pytest.raises(ValueError, match=r"bijective matching of the 3 concepts"):
        recovery(U, U, U[:2], words, words, words[:2], NONE)
    for bad in ("a", "shifted", "b"):
        lists = {f"words_{name}": words[:2] if name == bad else words for name in ("a", "shifted", "b")}
        with pytest.raises(ValueError, match=rf"`words_{bad}` must have 3 entries, .* got 2"):
            recovery(U, U, U, **lists, empty=NONE)
    with pytest.raises(ValueError, match=r"`empty` must be a bool tensor \[3\], .* got torch.bool \[2\]"):
        recovery(U, U, U, words, words, words, NONE[:2])
    with pytest.raises(ValueError, match=r"got torch.int64 \[3\]"):
        recovery(U, U, U, words, words, words, NONE.long())
    with pytest.raises(ValueError, match=r"all 3 are empty"):
        recovery(U, U, U, words, words, words, ~NONE)
    with pytest.raises(ValueError, match=r"`U_shifted` must be finite"):
        recovery(U, U / 0, U, words, words, words, NONE)
