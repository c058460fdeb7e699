"""How probable a model finds the words of concepts at the next position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...lightning_modules.backbone.readout import Readout


class WordProbability:
    """Log-probability that the next token is one of a concept's words.

    A word counts with every token that writes it alone (" star", "Star"). One that always takes several tokens counts
    with all of these, because a state may predict any of them.

    Args:
        words: Words of each of K concepts; some may have none, and are not to be asked for.
        readout: The model's vocabulary.

    Raises:
        ValueError: A word cannot be written with the model's tokens.
    """

    def __init__(self, words: Sequence[Sequence[str]], readout: Readout) -> None:
        alone: dict[str, list[int]] = {}
        for token, text in enumerate(readout.vocabulary):
            alone.setdefault(text.strip().lower(), []).append(token)
        self._members = torch.zeros(len(words), len(readout.vocabulary), dtype=torch.bool)
        for concept, named in enumerate(words):
            for word in named:
                tokens = alone.get(word) or [token for way in readout.spans.get(word, []) for token in way]
                if not tokens:
                    raise ValueError(f"the model has no token for {word!r}; ground the concepts with this model")
                self._members[concept, tokens] = True

    def __call__(self, logits: Tensor, concepts: Tensor) -> Tensor:
        """Log of the summed probability [N], float64 on the CPU, in nats.

        Args:
            logits: Logits of all tokens [N, T].
            concepts: Whose words to take in each row [N].
        """
        logits = logits.float()
        # A destination may have more tokens than the original, whose words these are.
        members = nn.functional.pad(self._members, (0, logits.shape[-1] - self._members.shape[1]))
        members = members[concepts.cpu()].to(logits.device)
        of_words = logits.masked_fill(~members, -torch.inf).logsumexp(dim=-1)
        return (of_words - logits.logsumexp(dim=-1)).cpu().double()
