"""What the modules that run a vision-language model share."""

from __future__ import annotations

from functools import cached_property

import lightning as L

from .backbone import PromptEncoder, VisionLanguageModel
from .backbone.readout import Readout


class BackboneModule(L.LightningModule):
    """Loads the model once it is needed and gives the data module its encoder.

    Args:
        model_id: Folder in the Hugging Face layout, or hub id.
        revision: Commit or tag on the hub.
        adapter: PEFT adapter to attach: the destination of a pair original → destination.
        dtype: Precision of the weights: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        attention: Attention implementation: `sdpa`, `eager` or `flash_attention_2`.
        max_new_tokens: Tokens to generate at most.
    """

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        adapter: str | None = None,
        dtype: str = "auto",
        attention: str = "sdpa",
        max_new_tokens: int = 25,
    ) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise ValueError(f"--model.init_args.max_new_tokens must be at least 1, got {max_new_tokens}")
        self.model_id = model_id
        self.revision = revision
        self.adapter = adapter
        self.dtype_name = dtype
        self.attention = attention
        self.max_new_tokens = max_new_tokens
        self._backbone: VisionLanguageModel | None = None

    @property
    def backbone(self) -> VisionLanguageModel:
        """The model, from `configure_model` on."""
        if self._backbone is None:
            raise RuntimeError("the model is loaded by the Trainer; run the module through one")
        return self._backbone

    @property
    def encode(self) -> PromptEncoder:
        """Encodes batches for this model."""
        return self.backbone.encode

    @cached_property
    def readout(self) -> Readout:
        """How the model's states become words."""
        return Readout.from_model(self.backbone)

    def configure_model(self) -> None:
        """Load the model, on every process, once."""
        if self._backbone is None:
            self._backbone = self.load()

    def load(self) -> VisionLanguageModel:
        """Load the model as the arguments say."""
        return VisionLanguageModel.load(
            self.model_id,
            revision=self.revision,
            adapter=self.adapter,
            dtype=self.dtype_name,
            attention=self.attention,
        )
