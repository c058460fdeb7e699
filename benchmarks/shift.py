"""How long the significance of concept shifts takes, as a ratio against the plain loops over draws and concepts.

    python benchmarks/shift.py --json shift.json                                      # some minutes on two cores
    python benchmarks/shift.py --rows 500 --width 512 --averages mean median --draws 100  # smaller, and medians

Ours is `concept_shift` and `shift_significance`: four permutation tests and eight intervals for each concept. The loops
do the same in NumPy, one draw and one concept at a time, vectorised over its samples. They run for as many draws as
`--loop-draws` says, from the same random numbers; their time is scaled to all draws, and their p-values and intervals
are compared with ours of so many draws.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import scipy
import torch
from conceptshift.concepts import Average, ShiftSignificance, concept_shift, shift_significance
from conceptshift.concepts.causal import random_directions
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

_Array = NDArray[np.float32]
AVERAGES: dict[str, Callable[[_Array], _Array]] = {
    "mean": lambda rows: rows.mean(axis=0),
    "median": lambda rows: np.median(rows, axis=0),
    "trimmed_mean": lambda rows: stats.trim_mean(rows, 0.1, axis=0),
}
LEVEL = 0.95


class States:
    """Paired states that look like hidden ones: a large common mean, clusters, and a shift of each with much noise."""

    def __init__(self, rows: int, width: int, n_concepts: int) -> None:
        generator = torch.Generator().manual_seed(0)
        mean = torch.randn(width, generator=generator)
        mean[:4] *= 30
        centres = mean + torch.randn(n_concepts, width, generator=generator)
        moves = 0.1 * torch.randn(n_concepts, width, generator=generator)
        self.assignment = torch.randint(n_concepts, (rows,), generator=generator)
        self.original = centres[self.assignment] + torch.randn(rows, width, generator=generator)
        self.destination = self.original + moves[self.assignment]
        self.destination += 0.5 * torch.randn(rows, width, generator=generator)
        self.U, self.targets = centres, centres + moves

    def ours(self, average: Average, draws: int) -> ShiftSignificance:
        """Everything that is reported of a shift."""
        concept_shift(self.original, self.destination, self.assignment, len(self.U), average)
        return shift_significance(
            self.original, self.destination, self.assignment, self.U, self.targets,
            average=average, permutations=draws, resamples=draws, level=LEVEL,
        )  # fmt: skip


def cosine(x: _Array, y: _Array) -> Any:
    """Of the rows of x with y."""
    return x @ y / np.linalg.norm(x, axis=-1) / np.linalg.norm(y)


class Loops:
    """The same, one draw and one concept at a time."""

    def __init__(self, states: States, average: str, draws: int) -> None:
        self.a, self.b = states.original.numpy(), states.destination.numpy()
        self.U, self.T = states.U.numpy(), states.targets.numpy()
        self.states, self.average, self.draws = states, AVERAGES[average], draws
        self.concepts = range(len(self.U))
        self.rows = [np.flatnonzero(states.assignment.numpy() == k) for k in self.concepts]
        self.delta = [self.b[own] - self.a[own] for own in self.rows]
        self.observed = [self.measures(k, np.arange(len(self.rows[k]))) for k in self.concepts]

    def p(self) -> dict[str, _Array]:
        """p-values of each concept."""
        chance: dict[str, list[list[Any]]] = {}
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.draws):
            signs = 2 * torch.randint(2, (len(self.a),), generator=generator).numpy()[:, None] - 1
            flipped = [self.average(signs[self.rows[k]] * self.delta[k]) for k in self.concepts]
            chance.setdefault("magnitude", []).append([np.linalg.norm(shift) for shift in flipped])
        generator = torch.Generator().manual_seed(0)
        for k in self.concepts:
            mean = self.delta[k].mean(axis=0)
            for draw in range(self.draws):
                order = self.rows[k][torch.randperm(len(self.rows[k]), generator=generator).numpy()]
                value = cosine(self.b[order] - self.a[self.rows[k]], mean).mean()
                if k == 0:
                    chance.setdefault("consistency", []).append([])
                chance["consistency"][draw].append(value)
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.draws):
            order = torch.randperm(len(self.a), generator=generator).numpy()
            moved = [self.average(self.b[order[own]] - self.a[own]) for own in self.rows]
            chance.setdefault("recovery_pairing", []).append(self._reached(moved))
        shift = [self.average(delta) for delta in self.delta]
        directions = random_directions(self.states.destination, self.draws, torch.Generator().manual_seed(0))
        for direction in directions.numpy():
            moved = [np.linalg.norm(shift[k]) * direction for k in self.concepts]
            chance.setdefault("recovery_direction", []).append(self._reached(moved))
        found = {test: self._p(test, np.array(values)) for test, values in chance.items()}
        return {test: np.maximum(p, found["magnitude"]) for test, p in found.items()}

    def _reached(self, shifts: list[Any]) -> list[Any]:
        return [cosine(self.U[k] + shifts[k], self.T[k]) for k in self.concepts]

    def _p(self, test: str, chance: _Array) -> _Array:
        observed = np.array([found.get(test, found["cosine_shifted"]) for found in self.observed])
        if test == "consistency":
            observed = np.array([cosine(delta, delta.mean(axis=0)).mean() for delta in self.delta])
        p: _Array = (1 + (chance >= observed - 1e-6).sum(axis=0)) / (1 + self.draws)
        if test.startswith("recovery"):
            p[observed <= [cosine(self.U[k], self.T[k]) for k in self.concepts]] = 1
        return p

    def intervals(self) -> dict[str, _Array]:
        """Intervals of each concept."""
        drawn: list[list[dict[str, float]]] = []
        generator, M = torch.Generator().manual_seed(0), len(self.a)
        for _ in range(self.draws):
            counts = torch.randint(M, (M,), generator=generator).bincount(minlength=M).numpy()
            taken = [np.repeat(np.arange(len(own)), counts[own]) for own in self.rows]
            drawn.append([self.measures(k, taken[k]) for k in self.concepts])
        found = {}
        for measure in self.observed[0]:
            values = np.array([[concept[measure] for concept in concepts] for concepts in drawn])
            bias = values.mean(axis=0) - [concept[measure] for concept in self.observed]
            found[measure] = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T - bias[:, None]
        return found

    def measures(self, k: int, taken: NDArray[np.int64]) -> dict[str, float]:
        """What is reported of a concept, of some of its samples, of which some may come several times."""
        rows = self.delta[k][taken]
        shift = self.average(rows)
        norms = np.linalg.norm(rows, axis=1)
        directions = rows / norms[:, None]
        different = taken[:, None] != taken
        return {
            "magnitude": float(np.linalg.norm(shift)),
            "mean_magnitude": float(norms.mean()),
            "consistency": float(cosine(rows, shift).mean()),
            "pairwise_cosine": float((directions @ directions.T)[different].mean()),
            "cosine_shifted": float(cosine(self.U[k] + shift, self.T[k])),
            "l2_shifted": float(np.linalg.norm(self.U[k] + shift - self.T[k])),
        }


def compare(states: States, average: Average, draws: int, loop_draws: int, repeats: int) -> dict[str, Any]:
    """Ours against the loops."""
    states.ours(average, 10)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        states.ours(average, draws)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    loops = Loops(states, average, loop_draws)
    p, intervals = loops.p(), loops.intervals()
    theirs = (time.perf_counter() - start) * draws / loop_draws
    found = states.ours(average, loop_draws)
    return {
        "what": f"{average}, M={len(states.original)}, D={states.original.shape[1]}, K={len(states.U)}, {draws} draws",
        "seconds": statistics.median(times), "against": f"loops, {loop_draws} draws scaled", "its seconds": theirs,
        "ratio": theirs / statistics.median(times), "peak GiB": peak,
        "p apart": max(float(np.abs(found.p[test].numpy() - p[test]).max()) for test in p),
        "intervals apart": max(_apart(found.intervals[measure], ends) for measure, ends in intervals.items()),
    }  # fmt: skip


def _apart(ours: Tensor, theirs: _Array) -> float:
    return float((np.abs(ours.numpy() - theirs) / np.abs(theirs).max()).max())


def main() -> None:
    """Run the averages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--averages", nargs="+", default=["mean"], choices=get_args(Average))
    parser.add_argument("--rows", type=int, default=2614, help="pairs of states M")
    parser.add_argument("--width", type=int, default=4096, help="hidden size D")
    parser.add_argument("--concepts", type=int, default=20, help="K")
    parser.add_argument("--draws", type=int, default=1000, help="permutations of each test, and resamples")
    parser.add_argument("--loop-draws", type=int, default=250, help="draws that the loops make")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours of which the median is taken")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    machine = {
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.processor(),
        "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__,
    }  # fmt: skip
    print(machine)
    states = States(options.rows, options.width, options.concepts)
    table = []
    for average in options.averages:
        repeats = options.repeats if average == "mean" else 1
        row = compare(states, average, options.draws, options.loop_draws, repeats)
        table.append(row)
        print(
            f"{row['what']:<52} {row['seconds']:9.3f} s   {row['against']}: {row['its seconds']:9.3f}   "
            f"ratio {row['ratio']:6.2f}   at most "
            f"{row['peak GiB']:.2f} GiB; p apart by {row['p apart']:.2g}, intervals by {row['intervals apart']:.2g}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "figures": table}, indent=1))


if __name__ == "__main__":
    main()
