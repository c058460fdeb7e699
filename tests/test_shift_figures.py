"""Figures of concept shift: what is drawn of each concept, that it is the same each time, and where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conceptshift.callbacks.parts.figures import picture_grid
from conceptshift.callbacks.parts.shift_figures import (
    least_squares_band,
    most_moving,
    project_shifts,
    recovery_figure,
    samples_figure,
    save_figures,
    spread,
    trajectory_figure,
    words_figure,
)
from conceptshift.callbacks.parts.shift_projection import half_axes
from conceptshift.callbacks.parts.words_figure import word_marks
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

Json = dict[str, Any]
MEASURES = ("recovery_original", "recovery_shifted", "recovery_gain", "consistency", "magnitude")


def row(concept: int, gain: float = 10.0, p: float = 0.01, **changes: Any) -> Json:
    """A concept whose measures differ from those of others."""
    values = (40.0, 40.0 + gain, gain, 0.5 + 0.02 * concept, 2.0 + 0.1 * concept)
    content = {
        "concept": concept, "samples": 7 + concept, "matched": concept, "words_original": ["dog", "sea"],
        "words_shifted": ["red", "sea"], "words_destination": ["red", "sea", "moon"],
        **dict(zip(MEASURES, values, strict=True)), "p_adjusted": {"magnitude": p},
        "intervals": {"recovery_shifted": [30.0, 70.0], "recovery_gain": [gain - 5, gain + 3],
                      "consistency": [0.4, 0.9], "magnitude": [1.5, 5.0]},
    }  # fmt: skip
    return content | changes


def empty(concept: int) -> Json:
    changes: Json = dict.fromkeys(MEASURES[1:])
    return row(concept, samples=0, words_shifted=[], intervals={}, p_adjusted={}, **changes)


def untested(concept: int) -> Json:
    return row(concept, samples=5, too_few_samples=True, p_adjusted={})


def summary(rows: list[Json], correlation: Json | None = None) -> Json:
    return {"original": "original", "destination": "destination", "level": 0.95, "concepts": rows,
            "correlations": {"consistency": correlation, "magnitude": None}}  # fmt: skip


def trajectory(concepts: list[Json], steps: list[int]) -> Json:
    """Concepts that move more from point to point."""
    points = [
        {
            "variant": f"step-{step:06d}", "step": step,
            "means": {"magnitude": place + 1.0, "consistency": 0.5, "aligned": 0.9, "recovery_shifted": 50.0},
            "intervals": {"magnitude": [place + 0.5, place + 2.0], "consistency": None},
            "concepts": [
                {"concept": one["concept"], "words_shifted": one["words_shifted"], "aligned": one["magnitude"] and 0.9}
                | {name: one[name] and one[name] * (place + 1) for name in ("magnitude", "consistency")}
                | {"recovery_shifted": one["recovery_shifted"]}
                for one in concepts
            ],
        }
        for place, step in enumerate(steps)
    ]  # fmt: skip
    start = {
        "means": {"magnitude": 0.0, "recovery_shifted": 30.0},
        "concepts": [
            {"concept": one["concept"], "magnitude": one["magnitude"] and 0.0}
            | {"recovery_shifted": one["magnitude"] and one["recovery_original"]}
            for one in concepts
        ],
    }
    return {"level": 0.95, "start": start, "points": points}


def texts(figure: Figure) -> dict[str, Text]:
    """What is written, by its text."""
    return {text.get_text(): text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()}


def drawn(line: Line2D) -> NDArray[np.float64]:
    """Points of a line, [n, 2]."""
    return np.asarray(line.get_xydata(), dtype=float)


# --- words ------------------------------------------------------------------------------------------------


def test_marks_are_those_of_the_words_that_the_counterpart_has() -> None:
    assert word_marks(["dog", "red", "sea"], ["dog", "sea"], ["sea", "red"]) == ["", "new", "shared"]
    assert word_marks(["dog"], ["dog"], []) == [""]


def test_words_of_a_row_are_marked_once_each_and_the_star_means_significant() -> None:
    figure = words_figure(summary([row(3), row(4, gain=0.0, p=0.2), empty(5)]))
    written = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    looks = {name: [to_hex(text.get_color()) for text in written if text.get_text() == name] for name in ("red", "dog")}
    # Shifted and destination of two concepts; the destination of the empty one is neither.
    assert len(looks["red"]) == 5
    assert len({*looks["red"][:4]}) == 1
    assert looks["red"][0] not in (looks["dog"][0], looks["red"][4])
    boxed = [text.get_text() for text in written if text.get_bbox_patch() is not None]
    assert boxed.count("red") == 4
    assert "sea" not in boxed
    found = texts(figure)
    assert {"3 ★", "4", "5", "no sample", "n = 10", "40 → 50  [30, 70]", "40 → 40  [30, 70]"} <= set(found)
    assert found["3 ★"].get_position()[1] < found["4"].get_position()[1] < found["5"].get_position()[1]


def test_a_dagger_means_too_few_samples_to_test() -> None:
    found = texts(words_figure(summary([row(3), untested(4)])))
    assert {"3 ★", "4 †", "† too few samples to test"} <= set(found)
    assert "† too few samples to test" not in texts(words_figure(summary([row(3), row(4, p=0.2)])))


def test_words_stay_inside_their_column_and_a_dollar_is_a_dollar() -> None:
    words = ["$x_1$", r"\frac{", "w" * 90, *(f"word{number}" for number in range(12))]
    figure = words_figure(summary([row(0, words_original=words, words_shifted=words, words_destination=words)]))
    figure.draw_without_rendering()
    found = texts(figure)
    assert {"$x_1$", r"\frac{", "word11"} <= set(found)
    assert not found["$x_1$"].get_parse_math()
    axes = figure.axes[0]
    shown = [text for text in figure.findobj(Text) if text.get_text() == "word11" or text.get_text().endswith("…")]
    assert len(shown) == 6
    for text in shown:
        box = text.get_window_extent().transformed(axes.transData.inverted())
        left = max(left for left, _ in ((62, 0), (282, 0), (502, 0)) if left <= box.x0 + 1)
        assert box.x1 <= left + 212


def test_many_concepts_are_cut_and_counted() -> None:
    few, many = (words_figure(summary([row(k) for k in range(count)])) for count in (30, 50))
    assert "20 more concepts are left out" in texts(many)
    assert not [text for text in texts(few) if "left out" in text]
    assert many.get_figheight() < few.get_figheight() + 0.5


# --- recovery ---------------------------------------------------------------------------------------------


def test_a_point_a_concept_filled_if_significant_and_numbered() -> None:
    rows = [row(k, gain=5.0 * k, p=0.01 if k % 2 else 0.2) for k in range(5)]
    figure = recovery_figure(summary([*rows, empty(5)]))
    for axes, measure in zip(figure.axes, ("consistency", "magnitude"), strict=True):
        # Markers of the legend have no place.
        dots = [line for line in axes.lines if line.get_marker() == "o" and len(drawn(line))]
        points = {tuple(drawn(line)[0]): line.get_markerfacecolor() for line in dots}
        assert set(points) == {(one[measure], one["recovery_gain"]) for one in rows}
        faces = [points[one[measure], one["recovery_gain"]] for one in rows]
        assert [to_hex(face) == "#ffffff" for face in faces] == [True, False, True, False, True]
        numbers = [text.get_text() for text in axes.texts if isinstance(text, Annotation)]
        assert sorted(numbers) == list("01234")


def test_a_cross_is_a_concept_with_too_few_samples_and_the_consistency_of_one_sample_is_not_drawn() -> None:
    figure = recovery_figure(summary([row(0), row(1, p=0.2), untested(2), untested(3) | {"consistency": None}]))
    for axes, marks in zip(figure.axes, ("oox", "ooxx"), strict=True):
        points = [line for line in axes.lines if line.get_gid()]
        assert [line.get_marker() for line in points] == list(marks)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["significant shift (p ≤ 0.05)", "not significant", "too few samples to test"]
    assert len(recovery_figure(summary([row(0), row(1)])).legends[0].get_texts()) == 2


def test_title_says_the_correlation_or_that_there_is_none() -> None:
    found = {
        "pearson": 0.6234,
        "pearson_interval": [0.2, 0.8],
        "spearman": -0.5,
        "spearman_interval": None,
        "concepts": 4,
    }
    left, right = recovery_figure(summary([row(k) for k in range(4)], found)).axes
    assert left.get_title("left").splitlines() == [
        "Pearson r = 0.62 [0.20, 0.80]", "Spearman ρ = -0.50   (4 concepts, 95 % intervals)",
    ]  # fmt: skip
    assert right.get_title("left").startswith("no correlation")


@pytest.mark.parametrize(
    ("rows", "bands"),
    [
        ([row(k) for k in range(3)], 1),
        ([row(0), row(1)], 0),
        ([row(k, consistency=0.5, magnitude=2.0) for k in range(4)], 0),
    ],
)
def test_no_line_through_too_few_concepts_or_without_a_spread(rows: list[Json], bands: int) -> None:
    for axes in recovery_figure(summary(rows)).axes:
        assert sum(isinstance(one, FillBetweenPolyCollection) for one in axes.collections) == bands


def test_rounding_is_not_magnified() -> None:
    rows = [row(k, gain=1e-15 * k, intervals={}) for k in range(3)]
    for axes in recovery_figure(summary(rows)).axes:
        low, high = axes.get_ylim()
        assert low <= -5
        assert high >= 5


def test_the_band_covers_the_true_line_as_often_as_it_says() -> None:
    rng, x, at = np.random.default_rng(0), np.linspace(0, 1, 9), np.array([0.0, 0.3, 1.0])
    covered = 0.0
    for _ in range(2000):
        middle, half = least_squares_band(x, 2 * x + rng.normal(size=9), at, 0.95)
        covered += float(np.mean(np.abs(middle - 2 * at) <= half)) / 2000
    assert covered == pytest.approx(0.95, abs=0.015)


def test_the_band_is_that_of_the_textbook() -> None:
    rng = np.random.default_rng(1)
    x, y, at = rng.normal(size=12), rng.normal(size=12), np.array([-1.0, 0.0, 2.0])
    middle, half = least_squares_band(x, y, at, 0.9)
    X, at_rows = np.stack([np.ones(12), x], axis=1), np.stack([np.ones(3), at], axis=1)
    inverse = np.linalg.inv(X.T @ X)
    beta = inverse @ X.T @ y
    variance = ((y - X @ beta) ** 2).sum() / 10
    expected = stats.t.ppf(0.95, 10) * np.sqrt(variance * np.einsum("ij,jk,ik->i", at_rows, inverse, at_rows))
    np.testing.assert_allclose(middle, at_rows @ beta)
    np.testing.assert_allclose(half, expected)


# --- samples ----------------------------------------------------------------------------------------------


def shifts(M: int = 300, D: int = 40, K: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """δ with a shift that all have in common, and one of each concept."""
    generator = torch.Generator().manual_seed(0)
    assignment = torch.randint(K, (M,), generator=generator)
    of_concept = 3 * torch.randn(K, D, generator=generator) + 4 * torch.randn(D, generator=generator)
    delta = of_concept[assignment] + torch.randn(M, D, generator=generator)
    return delta, assignment, torch.stack([delta[assignment == k].mean(dim=0) for k in range(K)])


@pytest.mark.parametrize(("M", "D"), [(300, 40), (30, 400), (300, 12), (7, 5)])
def test_the_axes_are_those_of_the_uncentred_svd(M: int, D: int) -> None:
    delta, assignment, vectors = shifts(M, D, 3)
    points, concepts, arrows, explained = project_shifts(delta, assignment, vectors)
    _, singular, Vt = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    axes = Vt[:2] * np.sign(Vt[:2][[0, 1], np.abs(Vt[:2]).argmax(axis=1)])[:, None]
    order = np.argsort(assignment.numpy(), kind="stable")
    np.testing.assert_allclose(points, delta.double().numpy()[order] @ axes.T, atol=2e-3)
    np.testing.assert_array_equal(concepts, assignment.numpy()[order])
    np.testing.assert_allclose(arrows[:, 0], vectors.double().numpy() @ axes.T, atol=2e-3)
    np.testing.assert_allclose(explained, singular[:2] ** 2 / (singular**2).sum(), atol=1e-5)


def test_signs_do_not_depend_on_seed_or_order_and_nothing_draws_from_the_global_generator() -> None:
    delta, assignment, vectors = shifts()
    state = torch.get_rng_state()
    first = project_shifts(delta, assignment, vectors)
    assert torch.equal(torch.get_rng_state(), state)
    again = project_shifts(delta, assignment, vectors)
    other = project_shifts(delta.flip(0), assignment.flip(0), vectors, seed=3)
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, same)
    np.testing.assert_allclose(first[2], other[2], atol=1e-3)


def test_a_limit_keeps_every_concept_in_proportion() -> None:
    delta, assignment, vectors = shifts(1000)
    points, concepts, _, explained = project_shifts(delta, assignment, vectors, limit=100)
    assert len(points) == len(concepts) == 100
    shares = np.bincount(assignment.numpy(), minlength=5) / 10
    assert np.abs(np.bincount(concepts, minlength=5) - shares).max() <= 1
    assert explained == project_shifts(delta, assignment, vectors)[3]


def test_states_that_do_not_move_or_have_one_dimension() -> None:
    of_one = torch.zeros(4, dtype=torch.int64)
    still, _, arrows, explained = project_shifts(torch.zeros(4, 6), of_one, torch.zeros(2, 6))
    assert not still.any()
    assert not arrows.any()
    assert explained == (0.0, 0.0)
    points, _, _, alone = project_shifts(-torch.ones(4, 1).half(), of_one, torch.ones(1, 1))
    np.testing.assert_allclose(points, [[-1, 0]] * 4)
    assert alone == (1.0, 0.0)


def test_the_ellipse_holds_the_true_mean_as_often_as_it_says() -> None:
    """Of as few as six samples, whose two directions vary unlike and together."""
    rng, mix, held = np.random.default_rng(0), np.array([[3.0, 0.0], [1.0, 0.5]]), 0
    for _ in range(2000):
        points = rng.normal(size=(6, 2)) @ mix.T
        # In units of the half axes the ellipse is the unit circle.
        held += bool(np.linalg.norm(np.linalg.solve(half_axes(points, np.arange(6)).T, points.mean(axis=0))) <= 1)
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_several_rows_of_a_sample_do_not_make_the_ellipse_smaller() -> None:
    delta, assignment, vectors = shifts(60, 20, 2)
    samples = torch.arange(60)
    single = project_shifts(delta, assignment, vectors)[2]
    twice = project_shifts(
        delta.repeat_interleave(2, 0), assignment.repeat_interleave(2), vectors, samples.repeat_interleave(2)
    )[2]
    np.testing.assert_allclose(np.abs(twice[:, 1:]), np.abs(single[:, 1:]), rtol=1e-3, atol=1e-4)
    assert np.linalg.norm(single[:, 1:], axis=2).min() > 0.1
    few = project_shifts(delta, assignment, vectors, samples % 2)[2]
    assert not few[:, 1:].any()


def test_an_arrow_for_each_concept_that_has_a_shift_and_dots_for_all_samples() -> None:
    delta, assignment, vectors = shifts(400, 40, 12)
    vectors[3] = 0
    labels = [f"$word_{k}" for k in range(12)]
    points, concepts, arrows, explained = project_shifts(delta, assignment, vectors)
    figure = samples_figure(points, concepts, arrows, explained, labels)
    axes = figure.axes[0]
    tips = {text.get_gid(): text.xy for text in axes.texts if isinstance(text, Annotation) and text.get_gid()}
    assert set(tips) == {f"arrow-{k}" for k in range(12) if k != 3}
    for k in set(range(12)) - {3}:
        np.testing.assert_allclose(tips[f"arrow-{k}"], arrows[k, 0])
    assert sum(len(drawn(line)) for line in axes.lines if line.get_linestyle() == "None") == 400
    ellipses = {line.get_gid(): drawn(line) for line in axes.lines if str(line.get_gid()).startswith("ellipse")}
    for k in set(range(12)) - {3}:
        far = np.linalg.norm(ellipses[f"ellipse-{k}"] - arrows[k, 0], axis=1)
        np.testing.assert_allclose([far.min(), far.max()], np.linalg.norm(arrows[k, 1:], axis=1), rtol=0.02)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    longest = np.argsort(-np.hypot(*arrows[:, 0].T))[:7]
    assert legend == [*(f"{k}: $word_{k}" for k in longest), "4 other concepts"]
    assert f"({100 * explained[0]:.1f} % of" in axes.get_xlabel()
    assert axes.get_aspect() == 1
    figure.draw_without_rendering()


def test_samples_without_any_shift() -> None:
    zeros = np.zeros((3, 2))
    figure = samples_figure(zeros, np.zeros(3, dtype=np.int64), np.zeros((1, 3, 2)), (0.0, 0.0), ["red"])
    figure.draw_without_rendering()
    assert not figure.legends


# --- trajectory -------------------------------------------------------------------------------------------


def test_a_line_a_concept_and_their_mean_in_each_panel() -> None:
    content = trajectory([*(row(k) for k in range(8)), empty(8)], [60, 120, 200])
    figure = trajectory_figure(content)
    assert [axes.get_ylabel().split(" (")[0] for axes in figure.axes] == [
        "shift magnitude ‖Δ‖", "consistency", "alignment", "recovery of words",
    ]  # fmt: skip
    for axes in figure.axes:
        assert [line.get_gid() for line in axes.lines] == [*(f"concept-{k}" for k in range(8)), "mean"]
        assert all(list(drawn(line)[:, 0]) == [0, 60, 120, 200] for line in axes.lines)
    magnitude, consistency, _, recovery = (
        {line.get_gid(): list(drawn(line)[:, 1]) for line in axes.lines} for axes in figure.axes
    )
    assert magnitude["mean"] == [0, 1, 2, 3]
    assert magnitude["concept-5"] == pytest.approx([0, 2.5, 5.0, 7.5])
    assert recovery["mean"] == [30, 50, 50, 50]
    assert recovery["concept-5"][:2] == [40, 50]
    assert np.isnan(consistency["mean"][0])
    assert most_moving(content["points"]) == [7, 6, 5, 4, 3]
    assert [text.get_text() for text in figure.axes[0].texts] == ["mean", "3", "4", "5", "6", "7"]
    assert figure.axes[3].get_xlabel() == "training step"


@pytest.mark.parametrize(("consistency", "low"), [(0.9, 0.0), (-0.4, -0.4)])
def test_the_axes_show_the_whole_range_of_a_measure(consistency: float, low: float) -> None:
    content = trajectory([row(k, consistency=consistency) for k in range(2)], [5, 6])
    content["points"][1]["concepts"][0]["consistency"] = consistency
    figure = trajectory_figure(content)
    limits = [axes.get_ylim() for axes in figure.axes]
    assert limits[0][0] == 0
    assert limits[1][0] <= low
    assert low == 0 or limits[1][0] < low
    for _, high in limits[1:3]:
        assert 1 < high < 1.1
    assert limits[3][0] == pytest.approx(0, abs=5)
    assert limits[3][1] == pytest.approx(100, abs=5)


def test_names_without_a_step() -> None:
    content = trajectory([row(0), empty(1)], [1, 2])
    content["points"][0]["variant"] = "coco_colors"
    figure = trajectory_figure(content)
    figure.draw_without_rendering()
    assert figure.axes[3].get_xlabel() == "checkpoint"


def test_names_are_moved_apart_and_stay_below_the_top() -> None:
    places = spread([1.0, 1.1, 1.2, 5.0, 9.9], 1.0, 10.0)
    assert places == pytest.approx([1.0, 2.0, 3.0, 5.0, 9.9])
    assert spread([9.8, 9.9, 10.0], 1.0, 10.0) == pytest.approx([8.0, 9.0, 10.0])


# --- pictures ---------------------------------------------------------------------------------------------


def test_each_row_of_pictures_has_its_label() -> None:
    figure = picture_grid(["0: $red$ sea", "1: no sample"], [["/nowhere"] * 3, []])
    (axes,) = figure.axes
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == ["0: $red$ sea", "1: no sample"]
    assert not labels[0].get_parse_math()
    image = np.asarray(axes.images[0].get_array())
    assert image.shape == (128, 192, 3)
    for y, gray in zip(axes.get_yticks(), (True, False), strict=True):
        assert bool((image[int(y)] == 211).all()) is gray
    figure.draw_without_rendering()


# --- files ------------------------------------------------------------------------------------------------


def test_png_and_svg_are_the_same_each_time(tmp_path: Path) -> None:
    rows = [row(k) for k in range(3)]
    for name in ("first", "second"):
        found = save_figures(
            {"words": words_figure(summary(rows)), "trajectory": trajectory_figure(trajectory(rows, [5, 10]))},
            tmp_path / name,
        )
        assert found == {"words": "figures/words.png", "trajectory": "figures/trajectory.png"}
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*"))
    assert [path.name for path in files] == ["trajectory.png", "trajectory.svg", "words.png", "words.svg"]
    for path in files:
        content = (tmp_path / "first" / path).read_bytes()
        assert content == (tmp_path / "second" / path).read_bytes()
        assert content.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        assert b"dc:date" not in content


def test_a_figure_that_cannot_be_written_leaves_nothing_half(tmp_path: Path) -> None:
    (tmp_path / "figures" / "words.svg").mkdir(parents=True)
    with pytest.raises(OSError, match=r"words\.svg: cannot be written"):
        save_figures({"words": words_figure(summary([row(0)]))}, tmp_path)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["words.png", "words.svg"]
