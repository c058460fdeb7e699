"""Recovery of destination concepts by shifted ones, against numbers worked by hand."""

import pytest
import torch
from conceptshift.concepts import Groundings, Recovery, recovery, t_overlap

NONE = torch.tensor([False, False, False])
WORDS = Groundings(*([["a"], ["b"], ["c"]] for _ in range(3)))


def test_t_overlap_is_a_share_of_the_first_set() -> None:
    assert t_overlap(["dog", "cat", "cow", "ox"], ["cat", "hen", "dog"]) == 50
    assert t_overlap(["cat", "hen", "dog"], ["dog", "cat", "cow", "ox"]) == pytest.approx(200 / 3)
    assert t_overlap(["dog", "dog", "cat"], ["dog"]) == 50
    assert t_overlap(["dog"], ["dog"]) == 100
    assert t_overlap(["dog"], []) == 0
    assert t_overlap([], ["dog"]) == 0
    assert t_overlap([], []) == 0


def worked(images: bool = False) -> Recovery:
    """Three concepts; the counterparts are stored as 2, 0, 1; the last concept is empty."""
    U_a = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    U_b = torch.tensor([[0.0, 3.0, 4.0], [0.0, 0.0, 1.0], [4.0, 3.0, 0.0]])
    U_shifted = torch.tensor([[4.0, 3.0, 0.0], [0.0, 4.0, 3.0], [9.0, 9.0, 9.0]])
    return recovery(
        U_a,
        U_shifted,
        U_b,
        torch.tensor([False, False, True]),
        Groundings(
            original=[["red", "dog"], ["sea", "sky"], ["ball"]],
            shifted=[["dog", "cat"], ["sky", "sea", "sun", "sand"], ["x"]],
            destination=[["sky", "sun", "sand"], ["ball"], ["dog", "cat", "cow"]],
        ),
        Groundings([[1, 2, 3, 4], ["a"], [7]], [[1, 2, 5, 6], ["b"], [8]], [["b"], [7], [1, 2, 6, 9]])
        if images
        else None,
    )


def test_hand_worked_recovery() -> None:
    result = worked()
    assert result.matching.tolist() == [2, 0, 1]
    torch.testing.assert_close(result.recovery_original, torch.tensor([50.0, 50.0, 100.0]))
    torch.testing.assert_close(result.recovery_shifted, torch.tensor([100.0, 75.0, 0.0]))
    torch.testing.assert_close(result.recovery_gain, torch.tensor([50.0, 25.0, -100.0]))
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
    means = result.means()
    assert means["delta_cosine"] == pytest.approx(0.28)
    assert means["delta_cosine_normalised"] == pytest.approx((0.25 + 0.6) / 2)
    assert means["recovery_original"] == pytest.approx(50)
    assert means["recovery_shifted"] == pytest.approx(87.5)
    assert means["recovery_gain"] == pytest.approx(37.5)
    assert means["cosine_original"] == pytest.approx(0.7)
    assert means["cosine_shifted"] == pytest.approx(0.98)
    assert means["l2_original"] == pytest.approx((18**0.5 + 17**0.5) / 2)
    assert means["l2_shifted"] == pytest.approx(2**0.5 / 2)
    assert means["delta_l2"] == pytest.approx((18**0.5 + 17**0.5 - 2**0.5) / 2)
    assert means["delta_l2_normalised"] == pytest.approx((2 - (2 / 17) ** 0.5) / 2)


def test_pictures_recover_as_words_do() -> None:
    result, without = worked(images=True), worked()
    assert result.image_recovery_original is not None
    assert result.image_recovery_shifted is not None
    torch.testing.assert_close(result.image_recovery_original, torch.tensor([50.0, 0.0, 100.0]))
    torch.testing.assert_close(result.image_recovery_shifted, torch.tensor([75.0, 100.0, 0.0]))
    assert result.means()["image_recovery_original"] == 25
    assert result.means()["image_recovery_shifted"] == 87.5
    assert result.means()["image_recovery_gain"] == 62.5
    assert without.image_recovery_original is None
    assert without.image_recovery_gain is None
    of_images = {"image_recovery_original", "image_recovery_shifted", "image_recovery_gain"}
    assert without.means().keys() == result.means().keys() - of_images


def test_several_concepts_may_have_the_same_nearest_counterpart() -> None:
    U_a = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3]])
    U_b = torch.tensor([[2.0, 0.1], [0.0, 1.0]])
    words = Groundings([["a"], ["b"], ["c"]], [["a"], ["a"], ["c"]], [["a"], ["c"]])
    result = recovery(U_a, U_a, U_b, NONE, words, method="nearest")
    assert result.matching.tolist() == [0, 0, 0]
    assert result.recovery_original.tolist() == [100, 0, 0]
    assert result.recovery_shifted.tolist() == [100, 100, 0]
    one_each = recovery(U_a, U_a, torch.eye(3)[:, :2], NONE, Groundings(*([["a"]] * 3 for _ in range(3))))
    assert sorted(one_each.matching.tolist()) == [0, 1, 2]


def test_intervals_are_those_of_the_concepts() -> None:
    n = 40
    generator = torch.Generator().manual_seed(0)
    U_a, U_b = torch.randn(n, 50, generator=generator), torch.randn(n, 50, generator=generator)
    words = Groundings(*([[str(k % 3)] for k in range(n)] for _ in range(3)))
    empty = torch.arange(n) >= 36
    result = recovery(U_a, (U_a + U_b) / 2, U_b, empty, words)
    intervals, means = result.intervals(level=0.9, resamples=20_000), result.means()
    assert intervals.keys() == means.keys()
    for name, (low, high) in intervals.items():
        assert low <= means[name] <= high, name
    values = result.l2_shifted[:36].double()
    error = float(values.std(correction=0)) / 6
    assert intervals["l2_shifted"] == pytest.approx(
        (means["l2_shifted"] - 1.645 * error, means["l2_shifted"] + 1.645 * error), abs=0.1 * error
    )
    again, other = result.intervals(seed=0), result.intervals(seed=1)
    assert again == result.intervals()
    assert again != other


def test_one_concept_has_an_interval_without_width() -> None:
    U = torch.tensor([[1.0, 2.0, 0.3]])
    words = Groundings([["a", "b", "c"]], [["a", "b", "x"]], [["a", "b"]])
    result = recovery(U, 2 * U + 0.1, 3 * U, torch.tensor([False]), words)
    means = result.means()
    for name, ends in result.intervals().items():
        assert ends == (means[name], means[name])
    with pytest.raises(ValueError, match=r"`level` must lie between 0 and 1, got 1"):
        result.intervals(level=1)
    with pytest.raises(ValueError, match=r"`resamples` must be at least 1"):
        result.intervals(resamples=0)


def test_no_shift_recovers_nothing() -> None:
    U = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    result = recovery(U, U, U.flip(0), NONE, WORDS)
    assert (result.delta_cosine == 0).all()
    assert (result.delta_l2 == 0).all()
    assert (result.recovery_gain == 0).all()


def test_opposite_counterpart_keeps_the_sign_of_the_gain() -> None:
    U_a, U_b = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    result = recovery(U_a, U_b, U_b, torch.tensor([False]), Groundings([["a"]], [["a"]], [["a"]]))
    assert result.delta_cosine_normalised.tolist() == [2.0]


def test_zero_concepts_give_no_nan() -> None:
    zeros = torch.zeros(3, 4)
    result = recovery(zeros, zeros, zeros, NONE, WORDS)
    assert all(value == value for value in result.means().values())
    assert result.delta_l2_normalised.tolist() == [0, 0, 0]
    assert result.delta_cosine_normalised.tolist() == [0, 0, 0]


def test_bad_input() -> None:
    U, two = torch.eye(3), [["a"], ["b"]]
    with pytest.raises(ValueError, match=r"`U_shifted` must have the shape of `U_a`, \[3, 3\], got \[2, 3\]"):
        recovery(U, U[:2], U, NONE, WORDS)
    with pytest.raises(ValueError, match=r"bijective matching of the 3 concepts"):
        recovery(U, U, U[:2], NONE, WORDS)
    with pytest.raises(ValueError, match=r"`method` must be 'bijective' or 'nearest', got 'any'"):
        recovery(U, U, U, NONE, WORDS, method="any")  # type: ignore[arg-type]
    for bad in Groundings._fields:
        short = WORDS._replace(**{bad: two})
        with pytest.raises(ValueError, match=rf"`words.{bad}` must have 3 entries, one for each concept, got 2"):
            recovery(U, U, U, NONE, short)
        with pytest.raises(ValueError, match=rf"`images.{bad}` must have 3 entries, one for each concept, got 2"):
            recovery(U, U, U, NONE, WORDS, short)
    with pytest.raises(ValueError, match=r"`empty` must be a bool tensor \[3\], .* got torch.bool \[2\]"):
        recovery(U, U, U, NONE[:2], WORDS)
    with pytest.raises(ValueError, match=r"got torch.int64 \[3\]"):
        recovery(U, U, U, NONE.long(), WORDS)
    with pytest.raises(ValueError, match=r"all 3 are empty"):
        recovery(U, U, U, ~NONE, WORDS)
    with pytest.raises(ValueError, match=r"`U_shifted` must be finite"):
        recovery(U, U / 0, U, NONE, WORDS)
