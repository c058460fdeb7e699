"""How long dictionaries take, as ratios against scikit-learn and against the bare matrix products, in one run.

    python benchmarks/dictionaries.py --json dictionaries.json            # all; a quarter of an hour on two cores
    python benchmarks/dictionaries.py --parts kmeans --rows 500 --width 512  # one part, smaller

Features are generated: a large shared mean with a few huge coordinates, clusters, and a spectrum that falls as a power
law, which is what hidden states of one word look like.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sklearn
import torch
from conceptshift.concepts import PCA, KMeans, SemiNMF
from conceptshift.concepts.rows import Rows
from conceptshift.concepts.semi_nmf import _Descent
from safetensors.torch import load_file, save_file
from sklearn import cluster, decomposition
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

Row = dict[str, Any]
SHARD_ROWS = 50_000
PARTS = ("semi-nmf", "semi-nmf-planted", "kmeans", "pca", "optima", "products", "shards")


def features(rows: int, width: int, seed: int) -> Tensor:
    """Rows [rows, width] that look like hidden states; the same seed gives the same clusters for any number of rows."""
    shared = torch.Generator().manual_seed(0)
    rank = min(200, width)
    mean = torch.randn(width, generator=shared)
    mean[:4] *= 30
    centres = torch.randn(12, width, generator=shared)
    axes = torch.randn(rank, width, generator=shared) / torch.arange(1, rank + 1)[:, None] ** 0.7
    own = torch.Generator().manual_seed(1 + seed)
    labels = torch.randint(12, (rows,), generator=own)
    spread = torch.randn(rows, rank, generator=own) @ axes
    return mean + centres[labels] + spread + 0.3 * torch.randn(rows, width, generator=own)


def planted(rows: int, width: int, seed: int) -> Tensor:
    """Rows [rows, width] that are sparse sums of 25 directions and little noise: easy to decompose."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.nn.functional.normalize(torch.randn(25, width, generator=generator))
    V = torch.randn(rows, 25, generator=generator).relu() * 5 * (torch.rand(rows, 25, generator=generator) < 0.3)
    return V @ U + 0.02 * torch.randn(rows, width, generator=generator)


class Shards:
    """Safetensors files of rows, read anew on each pass, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.safetensors"))

    def __iter__(self) -> Iterator[Tensor]:
        for path in self.paths:
            yield load_file(path)["rows"]


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of several runs after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def seconds(work: Callable[[], object]) -> float:
    """One run: for what takes minutes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fit(name: str, rows: int, width: int, k: int, repeats: int, easy: bool = False) -> list[Row]:
    """Semi-NMF, KMeans or PCA against scikit-learn, with the value that each minimises."""
    Z = (planted if easy else features)(rows, width, 0)
    pairs: dict[str, tuple[SemiNMF | KMeans | PCA, Any]] = {
        "semi-nmf": (
            SemiNMF(n_concepts=k),
            decomposition.DictionaryLearning(
                k, positive_code=True, alpha=1, fit_algorithm="cd", transform_algorithm="lasso_cd", random_state=0
            ),
        ),
        "kmeans": (KMeans(n_concepts=k), cluster.KMeans(k, random_state=0, n_init=10)),
        "pca": (PCA(n_concepts=k), decomposition.PCA(k, svd_solver="full")),
    }
    model, reference = pairs[name]
    mine = median_seconds(lambda: model.fit(Z), repeats)
    # Its Semi-NMF takes minutes, so that a warm-up changes nothing.
    once = name == "semi-nmf"
    other = (
        seconds(lambda: reference.fit(Z.numpy())) if once else median_seconds(lambda: reference.fit(Z.numpy()), repeats)
    )
    return [
        {
            "part": name, "what": f"{type(model).__name__}{', planted' * easy}, N={rows}, D={width}, K={k}",
            "seconds": mine, "against": "scikit-learn", "its seconds": other, "ratio": other / mine,
            "objective": model.report.objective, "its objective": _objective(name, reference, Z),
            "iterations": model.report.iterations, "its iterations": getattr(reference, "n_iter_", None),
        }
    ]  # fmt: skip


def _objective(name: str, model: Any, Z: Tensor) -> float:
    """What the method minimises, of scikit-learn's result, in float64."""
    if name == "kmeans":
        return float(model.inertia_)
    V = torch.from_numpy(model.transform(Z.numpy())).double()
    U = torch.from_numpy(model.components_).double()
    mean = torch.from_numpy(model.mean_).double() if name == "pca" else 0
    error = (Z.double() - mean - V @ U).square().sum()
    return float(error) if name == "pca" else float(0.5 * error + V.sum())


def optima(problems: int) -> list[Row]:
    """Objectives of Semi-NMF against scikit-learn's, on small problems of three kinds; time is that of all of them."""
    draw = random.Random(0)
    ratios, mine, other = [], 0.0, 0.0
    for seed in range(problems):
        rows, width, k = draw.randrange(60, 400), draw.choice([8, 16, 32, 64]), draw.choice([3, 5, 8, 12])
        normal = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
        Z = (normal, planted(rows, width, seed), features(rows, width, seed))[seed % 3]
        model = SemiNMF(n_concepts=k)
        reference = decomposition.DictionaryLearning(
            k, positive_code=True, alpha=1, fit_algorithm="cd", transform_algorithm="lasso_cd",
            transform_max_iter=5000, random_state=0,
        )  # fmt: skip
        mine += seconds(functools.partial(model.fit, Z))
        other += seconds(functools.partial(reference.fit, Z.double().numpy()))
        ratios.append(model.report.objective / _objective("semi-nmf", reference, Z.double()))
    above = sum(ratio > 1.0001 for ratio in ratios)
    what = f"Semi-NMF, {problems} small problems, {above} above by 0.01 %, at most by {100 * (max(ratios) - 1):.3f} %"
    return [
        {"part": "optima", "what": what, "seconds": mine, "against": "scikit-learn", "its seconds": other,
         "ratio": other / mine, "above": above, "ratios": ratios}
    ]  # fmt: skip


def products(rows: int, width: int, k: int, repeats: int) -> list[Row]:
    """Iterations of Semi-NMF against the two products with the features that each cannot do without."""
    Z = features(rows, width, 0)
    iterations = 30
    descent = _Descent(Rows(Z), torch.nn.functional.normalize(Z[:k])[None], 1.0)
    U, Vt = torch.nn.functional.normalize(Z[:k]), torch.rand(k, rows)

    def bare() -> None:
        for _ in range(iterations):
            _ = U @ Z.T
            _ = Vt @ Z

    def whole() -> None:
        for _ in range(iterations):
            descent._alternate()

    with torch.no_grad():
        mine, other = median_seconds(whole, repeats), median_seconds(bare, repeats)
    what = f"{iterations} iterations of Semi-NMF, N={rows}, D={width}, K={k}"
    return [
        {"part": "products", "what": what, "seconds": mine, "against": "their two products, bare",
         "its seconds": other, "ratio": other / mine}
    ]  # fmt: skip


def shards(rows: int, width: int, k: int) -> list[Row]:
    """Semi-NMF from shards on disk: time of a row and iteration, and peak memory, for a quarter of the rows and all."""
    table: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (rows // 4, rows):
            for number in range(len(list(Path(folder).iterdir())), count // SHARD_ROWS):
                part = features(SHARD_ROWS, width, number)
                save_file({"rows": part.bfloat16()}, f"{folder}/{number:06d}.safetensors")
            # Its own process, so that the peak is that of the fit.
            command = [sys.executable, __file__, "--fit-shards", folder, "--concepts", str(k)]
            done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            cost = done["seconds"] / (done["iterations"] * count) * 1e9
            what = f"Semi-NMF from shards, N={count}, D={width}, K={k}"
            before = table[0]["its seconds"] if table else cost
            table.append(
                {"part": "shards", "what": what, **done, "against": "ns per row and iteration of N/4",
                 "its seconds": cost, "ratio": before / cost}
            )  # fmt: skip
    return table


def fit_shards(folder: Path, k: int) -> None:
    """Fit in this process, and print what it cost."""
    model = SemiNMF(n_concepts=k, max_iterations=20, tolerance=0)
    start = time.perf_counter()
    model.fit(Shards(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    done = {"seconds": time.perf_counter() - start, "iterations": model.report.iterations, "peak GiB": peak}
    print(json.dumps(done))


def show(table: list[Row]) -> None:
    """Print the rows, aligned."""
    for row in table:
        extra = {key: row[key] for key in ("objective", "its objective", "iterations", "its iterations", "peak GiB")
                 if row.get(key) is not None}  # fmt: skip
        tail = ", ".join(f"{key} {value:.6g}" for key, value in extra.items())
        print(
            f"{row['what']:<52} {row['seconds']:9.3f} s   {row['against']}: {row['its seconds']:9.3f}   "
            f"ratio {row['ratio']:6.2f}   {tail}",
            flush=True,
        )


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="which (default: all)")
    parser.add_argument("--rows", type=int, default=2614, help="N of all parts but shards")
    parser.add_argument("--width", type=int, default=4096, help="D of all parts but shards")
    parser.add_argument("--concepts", type=int, default=20, help="K")
    parser.add_argument("--shard-rows", type=int, default=1_000_000, help="N of the last row of shards; D is 1024")
    parser.add_argument("--problems", type=int, default=36, help="small problems of optima")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median is taken")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--fit-shards", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fit_shards:
        fit_shards(options.fit_shards, options.concepts)
        return
    sizes = (options.rows, options.width, options.concepts)
    work: dict[str, Callable[[], list[Row]]] = {
        **{name: functools.partial(fit, name, *sizes, options.repeats) for name in ("semi-nmf", "kmeans", "pca")},
        "semi-nmf-planted": functools.partial(fit, "semi-nmf", *sizes, options.repeats, easy=True),
        "optima": lambda: optima(options.problems),
        "products": lambda: products(*sizes, options.repeats),
        "shards": lambda: shards(options.shard_rows, 1024, options.concepts),
    }
    machine = {
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.processor(),
        "torch": torch.__version__, "scikit-learn": sklearn.__version__,
    }  # fmt: skip
    print(machine)
    # scikit-learn warns of every row that its inner solver leaves unfinished: thousands.
    warnings.simplefilter("ignore", ConvergenceWarning)
    table = []
    for part in options.parts:
        rows = work[part]()
        show(rows)
        table += rows
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "figures": table}, indent=1))


if __name__ == "__main__":
    main()
