"""Reads hidden states in a predict loop: of one model, or of an original and a destination from one load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..datamodules.sample import Batch
from .backbone import Generation, Rows, Selector, Site
from .backbone.loading import DeviceMap, Quantization
from .variants import VariantsModule


@dataclass
class Extraction:
    """What one model says of a batch, and its states.

    Attributes:
        variant: `original`, or the name of a destination.
        texts: One answer a sample.
        rows: States of each selector.
    """

    variant: str
    texts: list[str]
    rows: list[Rows]


class FeatureExtraction(VariantsModule):
    """Captures hidden states at sites and positions while the model answers.

    With a destination, every batch runs twice and gives paired states of the original and the destination; with the
    checkpoints of a series, once more for each. There is one load: adapters are switched off and on, and of whole
    models the weights that differ are exchanged (kept in main memory and copied for every batch, so that large batches
    pay).

    Args:
        model_id: Folder in the Hugging Face layout, or hub id.
        sites: Where to read: site names or wildcards; `conceptshift sites --model …` lists them.
        selectors: Which positions: `token_of_interest:dog`, `token_class:colors`, `answer`, `answer_mean`,
            `last_prompt`, `image`, `text`, `prompt`, `all`, an index, or a range.
        revision: Commit or tag on the hub.
        destination: The fine-tuned model, as an adapter or a whole model; or several; or the folder of a series of
            checkpoints, which ModelExport wrote. One is called `destination`, several by the names of their folders.
        dtype: Precision of the weights: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        attention: Attention implementation: `sdpa`, `eager` or `flash_attention_2`.
        max_new_tokens: Tokens to generate at most.
        answers: `generated`: states while the model answers; `target`: states while it reads the data's own answer.
        variants: Which models to run; by default the original and every destination.
        quantization: Store the linear layers in `4bit` (NF4) or `8bit` (LLM.int8()).
        device_map: `auto` lays the layers of the model on all GPUs of this machine, in one process.
        trust_remote_code: Run the Python that the model's repository ships, with all your rights: it can read, change
            and send whatever you can. Only for code that you have read, at the commit that `revision` names.
        allow_missing_weights: Take a model whose files lack tensors, which are random then.
    """

    def __init__(
        self,
        model_id: str,
        sites: list[str],
        selectors: list[str],
        revision: str | None = None,
        destination: str | list[str] | None = None,
        dtype: str = "auto",
        attention: str = "sdpa",
        max_new_tokens: int = 25,
        answers: Literal["generated", "target"] = "generated",
        variants: list[str] | None = None,
        quantization: Quantization | None = None,
        device_map: DeviceMap | None = None,
        trust_remote_code: bool = False,
        allow_missing_weights: bool = False,
    ) -> None:
        super().__init__(
            model_id,
            revision,
            destination,
            dtype,
            attention,
            max_new_tokens,
            variants,
            quantization,
            device_map,
            trust_remote_code,
            allow_missing_weights,
        )
        if not sites or not selectors:
            raise ValueError("--model.init_args.sites and .selectors need at least one entry each")
        self.site_patterns = sites
        self.selectors = [Selector.parse(selector) for selector in selectors]
        self.answers = answers
        self.sites: list[Site] = []

    def configure_model(self) -> None:
        """Load the model and resolve the sites."""
        super().configure_model()
        self.sites = self.backbone.sites(self.site_patterns)
        if (reason := self.backbone.structure.without_visual_tokens) and any(
            one.name == "image" for one in self.selectors
        ):
            raise ValueError(f"--model.init_args.selectors: `image` selects nothing of {self.model_id!r}: {reason}")
        odd = [site.name for site in self.sites if site.positions != "sequence"]
        if odd and any(selector.name != "image" for selector in self.selectors):
            raise ValueError(f"site {odd[0]!r} has states of visual tokens only; use it with the one selector `image`")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Extraction]:
        """Run each variant over one batch."""
        return self.in_step(batch, lambda given: [self._extract(given, variant) for variant in self.variants], [])

    def _extract(self, batch: Batch, variant: str) -> Extraction:
        with self.backbone.running_as(variant):
            generation = self._run(batch)
            rows = [generation.select(selector, self.backbone.vocabulary) for selector in self.selectors]
        for selected in rows:
            _check_finite(selected, batch, variant)
        return Extraction(variant, generation.texts, rows)

    def _run(self, batch: Batch) -> Generation:
        if self.answers == "target":
            return self.backbone.read(batch.inputs, self.sites)
        return self.backbone.generate(batch.inputs, self.max_new_tokens, self.sites)


def _check_finite(rows: Rows, batch: Batch, variant: str) -> None:
    for site, states in rows.states.items():
        bad = (~states.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"non-finite states at {site!r} ({variant}) for sample {batch.sample_ids[rows.samples[bad[0]]]!r}; run "
                "with --trainer.precision 32-true or --model.init_args.dtype float32"
            )
