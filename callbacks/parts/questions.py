"""Whether answers to questions can be scored, asked before any is generated."""

from __future__ import annotations

from collections.abc import Iterable

from ...datamodules.sample import Sample
from ...metrics import ANSWER_TYPES, N_ANSWERS


def check_questions(samples: Iterable[Sample]) -> None:
    """Refuse samples that VQA accuracy is not defined for.

    Raises:
        ValueError: One has not ten answers, or none of VQAv2's answer types.
    """
    for sample in samples:
        if len(sample.answers) != N_ANSWERS:
            raise ValueError(
                f"VQA accuracy needs the {N_ANSWERS} answers of every question, sample {sample.sample_id!r} has "
                f"{len(sample.answers)}; score with CaptionScorer, or leave such samples out"
            )
        if sample.answer_type not in ANSWER_TYPES:
            raise ValueError(
                f"VQA accuracy is by answer type ({', '.join(ANSWER_TYPES)}), sample {sample.sample_id!r} has "
                f"{sample.answer_type!r}; name the column that holds it, or leave such samples out"
            )
