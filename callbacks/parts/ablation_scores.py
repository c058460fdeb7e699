"""What the answers of ablation say: shares that become wrong, beside those of random tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...datamodules.object_names import ObjectNames
from ...datamodules.sample import Sample
from ...metrics import Scored, bootstrap
from .trial_scores import Pictures, compared, mean_tokens, value, wrong
from .trials import UNALTERED, Found, Trial

NOISE = "noise"
AWAY, OTHER_AWAY, RANDOM_AWAY = "own direction", "direction of another class", "random direction"
_WORD = re.compile(r"[^\W_]+")


def control_of(name: str) -> str:
    """What the control of a set is called."""
    return f"as many random as {name}"


def summarize_ablation(found: Found, variant: str, sets: Sequence[str], names: ObjectNames) -> dict[str, Any]:
    """What one variant can no longer answer.

    Args:
        found: All trials.
        variant: Which.
        sets: Names of the sets, in the order of the rows.
        names: How texts name objects.

    Returns:
        `settings`: how many samples there are, are right, stay right with noise in place of the object (hallucinated),
        and are kept; and how many visual tokens their pictures have. `rows`: of each setting and set the share of kept
        samples that become wrong, its control, their difference, the share of all samples that were right, and how many
        of these are `without` such a set. `project_away`: the same of directions, where a control's `difference` is how
        many more the own direction makes wrong, and the shares of other objects and words that descriptions keep.
    """
    settings: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    away: list[dict[str, Any]] = []
    for setting in found.settings:
        right = found.right(variant, setting)
        unaltered, noise = (found.of(variant, name, setting) for name in (UNALTERED, NOISE))
        kept = [i for i in right if not (i in noise and noise[i].right)]
        settings[setting] = {
            "samples": len(unaltered),
            "visual_tokens": mean_tokens(unaltered, unaltered),
            "right": len(right),
            "hallucinated": len(right) - len(kept) if noise else None,
            "kept": len(kept),
        }
        if not right:
            continue
        pictures = Pictures({i: found.samples[i] for i in right})
        rows += _set_rows(found, variant, setting, sets, right, kept, pictures)
        away += _direction_rows(found, variant, setting, right, kept, pictures, names)
    return {"settings": settings, "rows": rows, "project_away": away}


def _set_rows(
    found: Found,
    variant: str,
    setting: str,
    sets: Sequence[str],
    right: Mapping[str, Trial],
    kept: Sequence[str],
    pictures: Pictures,
) -> list[dict[str, Any]]:
    trials = {name: found.of(variant, name, setting) for one in sets for name in (one, control_of(one))}
    outcomes = {name: wrong(of_set, kept) for name, of_set in trials.items()}
    of_all = {name: wrong(trials[name], right) for name in sets}
    measures = {name: pictures.share(values) for name, values in outcomes.items()}
    measures |= {f"all {name}": pictures.share(values) for name, values in of_all.items()}
    scored = bootstrap(measures)
    rows = []
    for name in sets:
        if not trials[name]:
            continue
        # Where there are fewer patches than tokens to replace, as many random ones there are not.
        control = control_of(name)
        has_control = bool(outcomes[control])
        rows.append(
            {
                "setting": setting,
                "set": name,
                "tokens": mean_tokens(trials[name], right),
                "samples": len(outcomes[name]),
                **value(scored[name], "became_wrong"),
                "control": value(scored[control], "became_wrong") if has_control else None,
                "difference": _difference(name, control, outcomes, pictures) if has_control else None,
                "all": {"samples": len(of_all[name]), **value(scored[f"all {name}"], "became_wrong")},
                "without": len(right) - len(of_all[name]),
            }
        )
    return rows


def _difference(
    name: str, control: str, outcomes: Mapping[str, Mapping[str, bool]], pictures: Pictures
) -> dict[str, Any] | None:
    """Of the samples that have both."""
    both = [
        {i: one for i, one in outcomes[key].items() if i in outcomes[other]}
        for key, other in ((name, control), (control, name))
    ]
    if not both[0]:
        return None
    ours, theirs = bootstrap({str(number): pictures.share(one) for number, one in enumerate(both)}).values()
    return compared(ours, theirs, both[0], both[1])


def _direction_rows(
    found: Found,
    variant: str,
    setting: str,
    right: Mapping[str, Trial],
    kept: Sequence[str],
    pictures: Pictures,
    names: ObjectNames,
) -> list[dict[str, Any]]:
    trials = {name: found.of(variant, name, setting) for name in (AWAY, OTHER_AWAY, RANDOM_AWAY)}
    outcomes = {name: wrong(of_direction, kept) for name, of_direction in trials.items()}
    rows = []
    for name, values in outcomes.items():
        if not values:
            continue
        measures = {"became_wrong": pictures.share(values)}
        if setting == "generative":
            stayed = {i: _stayed(found.samples[i], right[i].text, trials[name][i].text, names) for i in values}
            measures |= {
                part: pictures.quotient({i: pair[part] for i, pair in stayed.items()}) for part in ("objects", "words")
            }
        scored: dict[str, Scored] = bootstrap(measures)
        rows.append(
            {
                "setting": setting,
                "direction": name,
                "samples": len(values),
                **value(scored["became_wrong"], "became_wrong"),
                "difference": None if name == AWAY else _difference(AWAY, name, outcomes, pictures),
                **{f"{part}_kept": value(scored[part]) if part in scored else None for part in ("objects", "words")},
            }
        )
    return rows


def _stayed(sample: Sample, before: str, after: str, names: ObjectNames) -> dict[str, tuple[float, float]]:
    """How many of the other objects, and of the other words, of a description stay, and how many there were."""
    objects = set(names.named(before)) - {sample.object}
    own = {word for phrase in names.words(sample.object) for word in phrase.split()}
    words = Counter(word for word in _WORD.findall(before.lower()) if word not in own)
    left = words & Counter(_WORD.findall(after.lower()))
    return {
        "objects": (len(objects & set(names.named(after))), len(objects)),
        "words": (left.total(), words.total()),
    }
