"""Checks whether the concepts of a dictionary cause the words that they are grounded in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ..concepts import ConceptDictionary, load_dictionary
from ..concepts.causal import own_directions, random_directions
from ..datamodules.stored_features import FeatureStore
from ..lightning_modules import BackboneModule
from ..lightning_modules.backbone import Selector
from ..records.files import write_json
from ..records.paths import user_path
from ..records.provenance import KEY
from .parts.causal_report import FEWEST_RANDOM, causal_figure, causal_report
from .parts.causal_trials import Case, removal_trials
from .parts.concept_states import ConceptStates
from .parts.figures import tensorboard
from .parts.numbers import log_numbers
from .parts.processes import refuse_pieces
from .parts.run_description import provenance_of
from .parts.sources import dictionary_place, read_concepts, readout_of, same_destination, store_folder
from .parts.word_probability import WordProbability


class CausalChecker(Callback):
    """After a dictionary was fitted, removes each concept from its own samples and measures what its words lose.

    The model reads prompt and recorded answer again. At the dictionary's site the direction d of the concept is removed
    from the very states that were assigned to it, f ← f − (f·d) d, and what this takes from the log-probability that
    the next token is one of the concept's words is its fall: before − after, in nats, averaged over its samples. The
    same is done with random directions as the states vary, for p = (1 + #{random ≥ fall}) / (1 + `random`), and with
    the other concepts of the dictionary, whose falls tell whether any concept would do. What the directions are, and
    why, says `concepts.causal`; which tokens a word has, `WordProbability`. The token of interest, where there is one,
    is left out of the words: all states predict it, whatever their concept.

    At `lm.norm` words are where the direction points, so a fall says little more than that its samples have the
    concept; at an earlier site, the model could have done without it.

    Writes `causal.json` beside the dictionary: each concept, the mean fall with its bootstrap interval over concepts,
    and how many concepts are significant at a false discovery rate of 5 % (Benjamini and Hochberg). Figure and scalars
    go to TensorBoard.

    Args:
        dictionary: Folder in which a DictionaryFitter, listed before this, writes a dictionary or once wrote it.
        features: The feature store; by default the one that a FeatureWriter listed before this writes.
        samples: Samples per concept: the strongest of those assigned to it.
        random: Random directions per concept. No p-value is below 1 / (1 + `random`); to be significant as the only one
            of K concepts, one must have 0.05 / K.
        batch_size: Samples at a time.
        seed: Seed of the random directions.
    """

    def __init__(
        self,
        dictionary: str,
        features: str | None = None,
        samples: int = 16,
        random: int = 99,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("samples", samples, 1),
            ("random", random, FEWEST_RANDOM),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"CausalChecker.{name} must be at least {least}, got {value}")
        self.dictionary = dictionary
        self.out = user_path(dictionary)
        self.features = features
        self.samples = samples
        self.random = random
        self.batch_size = batch_size
        self.seed = seed

    @property
    def state_key(self) -> str:
        """Several dictionaries may be checked in one run."""
        return f"{type(self).__name__}[{self.dictionary}]"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be done at the end."""
        if not isinstance(pl_module, BackboneModule):
            raise TypeError(
                f"CausalChecker runs the model, and {type(pl_module).__name__} has none; use --model FeatureExtraction"
            )
        refuse_pieces(trainer, "CausalChecker")
        store_folder(trainer, self, self.features)
        self.out = dictionary_place(trainer, self, self.dictionary)

    @rank_zero_only
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove, measure, and write."""
        assert isinstance(pl_module, BackboneModule)
        backbone = pl_module.backbone
        fitted = load_dictionary(self.out / "dictionary.safetensors")
        site, selector, variant = (fitted.metadata[name] for name in ("site", "selector", "variant"))
        words = read_words(self.out / "concepts.json", selector, fitted)
        store = FeatureStore(store_folder(trainer, self, self.features))
        readout = readout_of(pl_module, store)
        if not same_destination(store, backbone, variant):
            raise ValueError(
                f"{self.out}: its states are of another {variant!r} "
                f"({store.metadata.get('checkpoint_hashes', {}).get(variant)}) than --model.init_args.destination has "
                f"({backbone.destination_hash(variant)}); give the one that it was extracted with"
            )
        states = ConceptStates.read(store, site, selector, variant)
        own = own_directions(fitted.dictionary, states.states)
        cases, left_out = choose_cases(fitted, states, words, own, self.samples)
        with (
            backbone.running_as(variant),
            trainer.precision_plugin.predict_step_context(),
        ):
            trials = removal_trials(
                backbone,
                states,
                site,
                Selector.parse(selector),
                cases,
                self._directions(own, states.states),
                WordProbability(words, readout),
                batch_size=self.batch_size,
                title=None if trainer.progress_bar_callback is None else f"{self.out}: causal check",
            )
        share = ((fitted.dictionary * own).sum(dim=1) / fitted.dictionary.norm(dim=1)).square()
        report = causal_report(cases, trials, words, share.tolist(), self.random)
        lost = {case.concept for case in cases} - {row["concept"] for row in report["concepts"]}
        left_out += [{"concept": k, "reason": "no state was read again as it is stored"} for k in lost]
        summary = {
            "method": type(fitted).__name__,
            "k": fitted.n_concepts,
            "site": site,
            "selector": selector,
            "variant": variant,
            "samples": self.samples,
            "random": self.random,
            "seed": self.seed,
            "dictionary_hash": fitted.content_hash,
            KEY: provenance_of(store.metadata, seed=self.seed),
            **report,
            "left_out": sorted(left_out, key=lambda row: row["concept"]),
        }
        write_json(self.out / "causal.json", summary)
        self._show(trainer, summary)

    def _directions(self, own: Tensor, Z: Tensor) -> Tensor:
        """For each concept its own direction, random ones, and those of other concepts [K, 1 + random + others, D]."""
        generator = torch.Generator().manual_seed(self.seed)
        known = [k for k, direction in enumerate(own) if direction.any()]
        rows = []
        for k, direction in enumerate(own):
            # As many for each; those without a direction are not asked for.
            others = own[[other for other in known if other != k][: min(len(known) - 1, self.random)]]
            rows.append(torch.cat([direction[None], random_directions(Z, self.random, generator), others]))
        return torch.stack(rows)

    def _show(self, trainer: L.Trainer, summary: dict[str, Any]) -> None:
        if not summary["concepts"]:
            return
        name = f"causal/{self.out.name}"
        numbers = {f"{name}/{measure}": summary[measure] for measure in ("mean_fall", "significant")}
        numbers |= {f"{name}/fall/concept_{row['concept']:02d}": row["fall"] for row in summary["concepts"]}
        log_numbers(trainer, numbers)
        if (writer := tensorboard(trainer)) is not None:
            writer.add_figure(name, causal_figure(summary["concepts"]))


def read_words(path: Path, selector: str, dictionary: ConceptDictionary) -> list[list[str]]:
    """Words of each concept of a dictionary, without the token of interest."""
    words = read_concepts(path, dictionary)["words"]
    of_interest = Selector.parse(selector).words if selector.startswith("token_of_interest:") else ()
    return [[word for word in named if word not in of_interest] for named in words]


def choose_cases(
    fitted: ConceptDictionary, states: ConceptStates, words: Sequence[Sequence[str]], own: Tensor, samples: int
) -> tuple[list[Case], list[dict[str, Any]]]:
    """The strongest states of each concept, one a sample, and the concepts that cannot be tried, with the reason.

    Of a signed concept only states on its positive side count: its words are not those of the other.
    """
    V, assigned = fitted.transform(states.states), fitted.assign(states.states)
    seen: Counter[str] = Counter()
    nth = []
    for sample_id in states.ids:
        nth.append(seen[sample_id])
        seen[sample_id] += 1
    cases: list[Case] = []
    left_out: list[dict[str, Any]] = []
    for k, named in enumerate(words):
        mine = ((assigned == k) & (V[:, k] > 0)).nonzero().flatten()
        strongest: dict[str, int] = {}
        for row in mine[V[mine, k].argsort(descending=True, stable=True)].tolist():
            strongest.setdefault(states.ids[row], row)
        if not strongest or not named or not own[k].any():
            reason = "no sample" if not strongest else "no word" if not named else "no direction of its own"
            left_out.append({"concept": k, "reason": reason})
            continue
        cases += [Case(k, row, nth[row]) for row in list(strongest.values())[:samples]]
    return cases, left_out
