"""Answers prompts with an original, its destinations and a steered original, while callbacks look inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..datamodules.sample import Batch
from .backbone import Steering, VisionLanguageModel
from .backbone.destinations import ORIGINAL
from .backbone.loading import DeviceMap, Quantization
from .backbone.logit_lens import LensQuery, LensReading
from .steering import SteeringStep
from .variants import VariantsModule

STEERED = "steered"


@dataclass
class Answers:
    """What one model says of a batch.

    Attributes:
        variant: `original`, `steered`, or the name of a destination.
        texts: One answer a sample.
        lens: What its layers decode, where a callback has asked for it.
    """

    variant: str
    texts: list[str]
    lens: LensReading | None = None


class Inspection(VariantsModule):
    """Answers prompts, so that callbacks can look into the model: logit lens, ablation of visual tokens, knockout.

    Every batch is decoded and encoded once, and runs once as each variant.

    Args:
        model_id: Folder in the Hugging Face layout, or hub id.
        revision: Commit or tag on the hub.
        destination: The fine-tuned model, as an adapter or a whole model; or several; or the folder of a series of
            checkpoints. One is called `destination`, several by the names of their folders.
        steering: Steers the original; it is then there once more, as `steered`.
        dtype: Precision of the weights: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        attention: Attention implementation: `sdpa`, `eager` or `flash_attention_2`.
        max_new_tokens: Tokens to generate at most.
        variants: Which models to run; by default the original, every destination, and `steered` where there is
            steering.
        quantization: Store the linear layers in `4bit` (NF4) or `8bit` (LLM.int8()).
        device_map: `auto` lays the layers of the model on all GPUs of this machine, in one process.
        trust_remote_code: Run the Python that the model's repository ships, with all your rights: it can read, change
            and send whatever you can. Only for code that you have read, at the commit that `revision` names.
        allow_missing_weights: Take a model whose files lack tensors, which are random then.

    Raises:
        ValueError: A destination cannot be loaded into the model, or is called as the steered original is; or a variant
            is unknown.
    """

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        destination: str | list[str] | None = None,
        steering: list[SteeringStep] | None = None,
        dtype: str = "auto",
        attention: str = "sdpa",
        max_new_tokens: int = 25,
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
            more_variants=[STEERED] if steering else [],
        )
        if steering and STEERED in self.destinations:
            raise ValueError(
                f"--model.init_args.destination: {self.destinations[STEERED]!r} would be called {STEERED!r}, as the "
                "steered original is; rename its folder"
            )
        self.steering = steering or []
        self._loaded: list[Steering] = []
        self._lens: LensQuery | None = None

    @property
    def lens(self) -> LensQuery | None:
        """What to decode in every pass; a callback sets it before the first batch, for this run.

        Raises:
            ValueError: Another callback has set it to something else.
        """
        return self._lens

    @lens.setter
    def lens(self, query: LensQuery) -> None:
        if self._lens not in (None, query):
            raise ValueError(
                "two of --trainer.callbacks want the logit lens, each of other tokens or layers; run them one after "
                "the other"
            )
        self._lens = query

    def setup(self, stage: str) -> None:
        """Read the steering vectors, so that what is wrong with them is told before a model is loaded."""
        self._loaded = [step.load() for step in self.steering]

    def on_predict_end(self) -> None:
        """Forget what was to be decoded."""
        self._lens = None

    @property
    def steerings(self) -> list[Steering]:
        """What steers the `steered` variant, in order, from `setup` on."""
        return self._loaded

    @contextmanager
    def running_as(self, variant: str) -> Iterator[VisionLanguageModel]:
        """The model as one of the variants, within the context.

        Args:
            variant: `original`, `steered`, or the name of a destination.
        """
        steerings = self._loaded if variant == STEERED else []
        with (
            self.backbone.running_as(ORIGINAL if variant == STEERED else variant),
            self.backbone.intervene(*steerings),
        ):
            yield self.backbone

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Answers]:
        """Answer one batch as each variant."""
        return self.in_step(batch, lambda given: [self._answer(given, variant) for variant in self.variants], [])

    def _answer(self, batch: Batch, variant: str) -> Answers:
        with self.running_as(variant) as backbone:
            generation = backbone.generate(batch.inputs, self.max_new_tokens, lens=self.lens)
        return Answers(variant, generation.texts, generation.lens)
