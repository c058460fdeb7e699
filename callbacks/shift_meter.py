"""Measures how concepts shift from the original to the destination, and how well the shift recovers its concepts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ..concepts import ConceptShift, Recovery, concept_shift, load_dictionary, pair_rows, recovery
from ..datamodules.files import write_json
from ..datamodules.stored_features import FeatureStore
from .parts.concept_states import ConceptStates
from .parts.figures import shift_figure, tensorboard
from .parts.grounding import GroundingOptions, pictures_of, words_of
from .parts.sources import readout_of, store_folder

# The authors look further for the words of shifted concepts.
_GROUNDING = GroundingOptions(candidates=200)


class ShiftMeter(Callback):
    """After `predict` with an adapter, computes concept shift vectors (Representation Shift, arXiv 2501.03012).

    Writes `shift.safetensors` and `shift.json` to `out`, and figures and scalars per concept to TensorBoard. Meant for
    dictionaries whose concepts are as long as states (KMeans, as in the paper): added to Semi-NMF's concepts, which are
    no longer than 1, a difference of states outweighs them.

    Args:
        original: Folder in which a DictionaryFitter wrote the original's dictionary.
        destination: The same for the destination's.
        out: Folder to write.
        features: Feature store with both variants; by default the one that a FeatureWriter listed before this writes,
            or the one that is replayed.
        alpha: How far the original's concepts are shifted: u + α Δ.
        grounding: What the concepts are grounded in.
    """

    def __init__(
        self,
        original: str,
        destination: str,
        out: str,
        features: str | None = None,
        alpha: float = 1.0,
        grounding: GroundingOptions = _GROUNDING,
    ) -> None:
        self.original = Path(original)
        self.destination = Path(destination)
        self.out = Path(out)
        self.features = features
        self.alpha = alpha
        self.grounding = grounding

    @property
    def state_key(self) -> str:
        """Several pairs of dictionaries may be compared in one run."""
        return f"{type(self).__name__}[{self.out}]"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be done at the end."""
        store_folder(trainer, self, self.features)
        self.grounding.check()

    @rank_zero_only
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pair the states, compute shift and recovery, and write."""
        original = load_dictionary(self.original / "dictionary.safetensors")
        destination = load_dictionary(self.destination / "dictionary.safetensors")
        site, selector = original.metadata["site"], original.metadata["selector"]
        if (destination.metadata["site"], destination.metadata["selector"]) != (site, selector):
            raise ValueError(
                f"{self.destination}: its dictionary is of {destination.metadata['site']!r} and "
                f"{destination.metadata['selector']!r}, the original's of {site!r} and {selector!r}; fit both alike"
            )
        store = FeatureStore(store_folder(trainer, self, self.features))
        a = ConceptStates.read(store, site, selector, "original")
        b = ConceptStates.read(store, site, selector, "destination")
        rows_a, rows_b = pair_rows(a.ids, b.ids)
        A, B = a.states[rows_a], b.states[rows_b]
        U_a, U_b = original.dictionary, destination.dictionary
        shift = concept_shift(A, B, original.assign(A), original.n_concepts)
        U_s = shift.shifted(U_a, self.alpha)
        readout = readout_of(pl_module, store)
        words = {
            name: words_of(readout, U, site, self.grounding)
            for name, U in (("original", U_a), ("shifted", U_s), ("destination", U_b))
        }
        found = recovery(U_a, U_s, U_b, words["original"], words["shifted"], words["destination"], shift.empty)
        images = self.grounding.images
        pictures = {
            "original": pictures_of(original.transform(a.states), a.ids, a.samples, images),
            "destination": pictures_of(destination.transform(b.states), b.ids, b.samples, images),
        }
        summary = {
            "method": type(original).__name__,
            "site": site,
            "selector": selector,
            "alpha": self.alpha,
            "pairs": len(rows_a),
            "unpaired": {"original": len(a.ids) - len(rows_a), "destination": len(b.ids) - len(rows_b)},
            "grounding": asdict(self.grounding),
            "empty_concepts": shift.empty.nonzero().flatten().tolist(),
            **found.means(),
            "matched_cosine_gain": found.matched_cosine_gain,
            "consistency": float(shift.consistency[~shift.empty].mean()),
            "magnitude": float(shift.magnitude[~shift.empty].mean()),
            "concepts": _rows(shift, found, words, pictures),
        }
        shift.save(self.out / "shift.safetensors", {"site": site, "selector": selector, "features": store.metadata})
        write_json(self.out / "shift.json", summary)
        self._show(trainer, shift, found)

    def _show(self, trainer: L.Trainer, shift: ConceptShift, found: Recovery) -> None:
        writer = tensorboard(trainer)
        if writer is None:
            return
        name = f"shift/{self.out.name}"
        gain = found.recovery_shifted - found.recovery_original
        figure = shift_figure(shift.magnitude.tolist(), shift.consistency.tolist(), gain.tolist())
        writer.add_figure(name, figure)
        per_concept: dict[str, Tensor] = {
            "magnitude": shift.magnitude,
            "consistency": shift.consistency,
            "recovery_shifted": found.recovery_shifted,
        }
        for measure, values in per_concept.items():
            for concept, value in enumerate(values.tolist()):
                writer.add_scalar(f"{name}/{measure}/concept_{concept:02d}", value, trainer.global_step)


def _rows(
    shift: ConceptShift,
    found: Recovery,
    words: dict[str, list[list[str]]],
    pictures: dict[str, list[list[dict[str, Any]]]],
) -> list[dict[str, Any]]:
    """What is reported of each concept of the original."""
    return [
        {
            "concept": k,
            "samples": int(shift.counts[k]),
            "matched": matched,
            "words_original": words["original"][k],
            "words_shifted": words["shifted"][k],
            "words_destination": words["destination"][matched],
            "recovery_original": float(found.recovery_original[k]),
            "recovery_shifted": float(found.recovery_shifted[k]),
            "cosine_original": float(found.cosine_original[k]),
            "cosine_shifted": float(found.cosine_shifted[k]),
            "consistency": float(shift.consistency[k]),
            "magnitude": float(shift.magnitude[k]),
            "mean_magnitude": float(shift.mean_magnitude[k]),
            "images_original": pictures["original"][k],
            "images_destination": pictures["destination"][matched],
        }
        for k, matched in enumerate(found.matching.tolist())
    ]
