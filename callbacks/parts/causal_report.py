"""What is reported and shown of a causal check."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.stats import false_discovery_control

from ...concepts.causal import empirical_p
from ...metrics import bootstrap_interval
from .causal_trials import Case, Trials

# False discovery rate.
_LEVEL = 0.05

FEWEST_RANDOM = 19
"""With fewer random directions no p-value can be as small as the false discovery rate."""


def causal_report(
    cases: list[Case], trials: Trials, words: Sequence[Sequence[str]], own_share: Sequence[float], random: int
) -> dict[str, Any]:
    """Falls of the concepts that were tried, their significance, and their mean, which without a concept is nothing.

    Args:
        cases: What was tried.
        trials: What came of it: first each concept's own direction, then random ones, then other concepts'.
        words: Words of each concept.
        own_share: Share of each concept's squared length in its own direction.
        random: How many directions are random.
    """
    concept_of = torch.tensor([case.concept for case in cases], dtype=torch.long)
    rows: list[dict[str, Any]] = []
    for k in sorted(set(concept_of[trials.same].tolist())):
        mine = (concept_of == k) & trials.same
        fall, *rest = trials.falls[mine].mean(dim=0).tolist()
        null, others = rest[:random], rest[random:]
        rows.append(
            {
                "concept": k,
                "words": list(words[k]),
                "samples": int(mine.sum()),
                "own_share": own_share[k],
                "log_probability": float(trials.before[mine].mean()),
                "fall": fall,
                "random_mean": mean(null),
                "random_std": stdev(null),
                "others_mean": mean(others) if others else None,
                "p": empirical_p(fall, null),
            }
        )
    adjusted = false_discovery_control([row["p"] for row in rows]).tolist() if rows else []
    for row, p in zip(rows, adjusted, strict=True):
        row.update(p_adjusted=p, significant=p <= _LEVEL)
    falls = [row["fall"] for row in rows]
    return {
        "cases": len(cases),
        "not_read_again": int((~trials.same).sum()),
        "tried": len(rows),
        "significant": sum(row["significant"] for row in rows),
        "mean_fall": mean(falls) if rows else None,
        "mean_fall_interval": list(bootstrap_interval(falls)) if rows else None,
        "mean_random_fall": mean(row["random_mean"] for row in rows) if rows else None,
        "concepts": rows,
    }


def causal_figure(concepts: Sequence[dict[str, Any]]) -> Figure:
    """Bars of the fall of each concept, before the range of the random directions' falls.

    Args:
        concepts: What `causal.json` has of each.
    """
    figure = Figure(figsize=(2 + 0.5 * len(concepts), 3.6), layout="constrained")
    axis = figure.subplots()
    axis.use_sticky_edges = False
    places = range(len(concepts))
    axis.bar(
        places,
        [4 * row["random_std"] for row in concepts],
        bottom=[row["random_mean"] - 2 * row["random_std"] for row in concepts],
        width=0.9,
        color="#d9d9d9",
        label="random directions, mean ± 2 standard deviations",
    )
    colors = ["#3b6ea8" if row["significant"] else "#a9c0d8" for row in concepts]
    axis.bar(places, [row["fall"] for row in concepts], width=0.5, color=colors, label="concept (dark: significant)")
    axis.set_xticks(places, [f"{row['concept']}: {row['words'][0]}" for row in concepts], rotation=60, ha="right")
    axis.tick_params(labelsize=8)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set_ylabel("fall of log-probability (nats)", fontsize=8)
    axis.legend(fontsize=7)
    return figure
