"""pycocoevalcap's scorers: the score of a set, and what it is made of sample by sample."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from .bootstrap import Array, Measure, mean_measure, ratio

ScoreName = Literal["CIDEr", "BLEU", "ROUGE-L", "METEOR", "SPICE"]
Tokenized = dict[str, list[str]]
"""id → captions as strings of tokens, in the order of the ids; the scorers want a list of one for the prediction."""

_BLEU_ORDER = 4
# What the library adds to matches and guesses, so that nothing is divided by 0.
_TINY, _SMALL = 1e-15, 1e-9
_CORENLP = "stanford-corenlp-full-2015-12-09"
_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class CaptionScore(NamedTuple):
    """A score of a set as the library gives it, and the measure it is."""

    value: float
    measure: Measure


def check_scores(scores: Iterable[str]) -> None:
    """Make sure that the scores exist and that what they need is there; nothing is ever downloaded.

    Raises:
        ValueError: There is no score, one is unknown, or Java or the files of SPICE are missing.
    """
    wanted = list(scores)
    unknown = [name for name in wanted if name not in SCORERS]
    if not wanted or unknown:
        raise ValueError(
            f"caption scores must be some of {', '.join(SCORERS)}, got {unknown or wanted}: name at least one"
        )
    for name in ("METEOR", "SPICE"):
        if name in wanted and shutil.which("java") is None:
            raise ValueError(
                f"{name} needs `java` on the PATH and found none: install it (Debian: default-jre-headless) or leave "
                f"{name} out"
            )
    missing = [jar for jar in _SPICE_JARS if not (_spice_folder() / jar).is_file()]
    if "SPICE" in wanted and missing:
        raise ValueError(
            f"SPICE needs {' and '.join(missing)} in {_spice_folder()}: unpack them there from "
            f"http://nlp.stanford.edu/software/{_CORENLP}.zip or leave SPICE out"
        )


def _cider(targets: Tokenized, hypotheses: Tokenized) -> dict[str, CaptionScore]:
    value, samples = Cider().compute_score(targets, hypotheses)
    return {"CIDEr": CaptionScore(float(value), mean_measure(samples))}


def _rouge(targets: Tokenized, hypotheses: Tokenized) -> dict[str, CaptionScore]:
    value, samples = Rouge().compute_score(targets, hypotheses)
    return {"ROUGE-L": CaptionScore(float(value), mean_measure(samples))}


def _bleu(targets: Tokenized, hypotheses: Tokenized) -> dict[str, CaptionScore]:
    scorer = BleuScorer(n=_BLEU_ORDER)
    for i, texts in targets.items():
        scorer += (hypotheses[i][0], texts)
    values, _ = scorer.compute_score(option="closest")
    statistics = np.array([_bleu_statistics(sample) for sample in scorer.ctest], dtype=np.float64)
    return {
        f"BLEU-{n}": CaptionScore(float(value), Measure(statistics, partial(_bleu_score, n)))
        for n, value in enumerate(values, start=1)
    }


def _bleu_statistics(sample: dict[str, Any]) -> list[float]:
    """Length, length of the closest reference (the shorter of two), guesses and matches of 1..4-grams: [10]."""
    length = sample["testlen"]
    closest = min(sample["reflen"], key=lambda other: (abs(other - length), other))
    return [length, closest, *sample["guess"], *sample["correct"]]


def _bleu_score(n: int, sums: Array) -> Array:
    """BLEU-n [...] of summed statistics [..., 10]: brevity penalty times the geometric mean of n precisions."""
    length, reference = sums[..., 0] + _TINY, sums[..., 1] + _SMALL
    guesses, matches = sums[..., 2 : 2 + n] + _SMALL, sums[..., 2 + _BLEU_ORDER : 2 + _BLEU_ORDER + n] + _TINY
    score: Array = (matches / guesses).prod(axis=-1) ** (1 / n) * np.exp(np.minimum(0.0, 1 - reference / length))
    return score


def _meteor(targets: Tokenized, hypotheses: Tokenized) -> dict[str, CaptionScore]:
    # Bars separate the captions of a line that the library writes to Java.
    clean = [
        {i: [text.replace("|||", " ") for text in texts] for i, texts in side.items()} for side in (targets, hypotheses)
    ]
    with _meteor_process() as scorer:
        value, samples = scorer.compute_score(*clean)
    mean = mean_measure(samples)
    shift = value - mean.value
    return {"METEOR": CaptionScore(value, Measure(mean.statistics, lambda sums: ratio(sums) + shift))}


@contextmanager
def _meteor_process() -> Iterator[Any]:
    """The library's scorer, whose Java process ends here, whatever happens."""
    scorer = Meteor()
    try:
        yield scorer
    except (OSError, ValueError) as error:
        # Where Java has stopped, a pipe is broken or a number is missing.
        scorer.meteor_p.kill()
        lines = scorer.meteor_p.stderr.read().decode(errors="replace").strip().splitlines()
        raise ValueError(
            f"METEOR: java gave no score ({lines[0] if lines else error}); run `java -version` to see whether the JRE "
            "works, or leave METEOR out"
        ) from error
    finally:
        # The library keeps its lock when it fails, and would wait for it for ever when it is collected.
        if scorer.lock.locked():
            scorer.lock.release()
        process: subprocess.Popen[bytes] = scorer.meteor_p
        process.kill()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        process.wait()


def _spice(targets: Tokenized, hypotheses: Tokenized) -> dict[str, CaptionScore]:
    from pycocoevalcap.spice.spice import Spice

    try:
        _, samples = Spice().compute_score(targets, hypotheses)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"SPICE: java failed ({error}); it was written for Java 8, try that or leave SPICE out"
        ) from error
    measure = mean_measure([sample["All"]["f"] for sample in samples])
    return {"SPICE": CaptionScore(measure.value, measure)}


def _spice_folder() -> Path:
    found = importlib.util.find_spec("pycocoevalcap.spice")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "lib"


SCORERS: dict[str, Callable[[Tokenized, Tokenized], dict[str, CaptionScore]]] = {
    "CIDEr": _cider,
    "BLEU": _bleu,
    "ROUGE-L": _rouge,
    "METEOR": _meteor,
    "SPICE": _spice,
}
