"""Reads hidden states in a predict loop: of one model, or of an original and a destination from one load."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from ..datamodules.sample import Batch
from .backbone import Generation, Rows, Selector, Site
from .base import BackboneModule

Variant = Literal["original", "destination"]


@dataclass
class Extraction:
    """What one model says of a batch, and its states.

    Attributes:
        variant: `original` (adapter off) or `destination` (adapter on).
        texts: One answer a sample.
        rows: States of each selector.
    """

    variant: Variant
    texts: list[str]
    rows: list[Rows]


class FeatureExtraction(BackboneModule):
    """Captures hidden states at sites and positions while the model answers.

    With an adapter, every batch runs twice, adapter off and on, and gives paired states of the original and the
    destination.

    Args:
        model_id: Folder in the Hugging Face layout, or hub id.
        sites: Where to read: site names or wildcards; `conceptshift sites --model …` lists them.
        selectors: Which positions: `token_of_interest:dog`, `token_class:colors`, `answer`, `answer_mean`,
            `last_prompt`, `image`, `text`, `prompt`, `all`, an index, or a range.
        revision: Commit or tag on the hub.
        adapter: PEFT adapter: the destination.
        dtype: Precision of the weights: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        attention: Attention implementation: `sdpa`, `eager` or `flash_attention_2`.
        max_new_tokens: Tokens to generate at most.
        answers: `generated`: states while the model answers; `target`: states while it reads the data's own answer.
        variants: Which models to run; by default both where there is an adapter, else the original.
    """

    def __init__(
        self,
        model_id: str,
        sites: list[str],
        selectors: list[str],
        revision: str | None = None,
        adapter: str | None = None,
        dtype: str = "auto",
        attention: str = "sdpa",
        max_new_tokens: int = 25,
        answers: Literal["generated", "target"] = "generated",
        variants: list[Variant] | None = None,
    ) -> None:
        super().__init__(model_id, revision, adapter, dtype, attention, max_new_tokens)
        if not sites or not selectors:
            raise ValueError("--model.init_args.sites and .selectors need at least one entry each")
        self.site_patterns = sites
        self.selectors = [Selector.parse(selector) for selector in selectors]
        self.answers = answers
        self.variants: list[Variant] = variants or (["original", "destination"] if adapter else ["original"])
        if "destination" in self.variants and adapter is None:
            raise ValueError("--model.init_args.variants: a destination needs --model.init_args.adapter")
        self.sites: list[Site] = []

    def configure_model(self) -> None:
        """Load the model and resolve the sites."""
        super().configure_model()
        self.sites = self.backbone.sites(self.site_patterns)
        odd = [site.name for site in self.sites if site.positions != "sequence"]
        if odd and any(selector.name != "image" for selector in self.selectors):
            raise ValueError(f"site {odd[0]!r} has states of visual tokens only; use it with the one selector `image`")

    def on_predict_start(self) -> None:
        """Check the model before any data is run."""
        self.backbone.self_check()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Extraction]:
        """Run each variant over one batch."""
        if not batch.samples:
            return []
        return [self._extract(batch, variant) for variant in self.variants]

    def _extract(self, batch: Batch, variant: Variant) -> Extraction:
        with self.backbone.adapter_disabled() if variant == "original" else nullcontext():
            generation = self._run(batch)
        rows = [generation.select(selector, self.backbone.vocabulary) for selector in self.selectors]
        for selected in rows:
            _check_finite(selected, batch, variant)
        return Extraction(variant, generation.texts, rows)

    def _run(self, batch: Batch) -> Generation:
        if self.answers == "target":
            return self.backbone.read(batch.inputs, self.sites)
        return self.backbone.generate(batch.inputs, self.max_new_tokens, self.sites)


def _check_finite(rows: Rows, batch: Batch, variant: Variant) -> None:
    for site, states in rows.states.items():
        bad = (~states.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"non-finite states at {site!r} ({variant}) for sample {batch.sample_ids[rows.samples[bad[0]]]!r}; run "
                "with --trainer.precision 32-true or --model.init_args.dtype float32"
            )
