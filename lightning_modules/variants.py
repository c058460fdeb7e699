"""What the modules share that run an original and its destinations from one load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .backbone import VisionLanguageModel
from .backbone.destinations import ORIGINAL, check_checkpoint, is_adapter, name_destinations
from .backbone.loading import DeviceMap, Quantization
from .base import BackboneModule


class VariantsModule(BackboneModule):
    """Base of the modules that run variants of one model: the original, and its destinations.

    Args:
        model_id: Folder in the Hugging Face layout, or hub id.
        revision: Commit or tag on the hub.
        destination: The fine-tuned model, as an adapter or a whole model; or several; or the folder of a series of
            checkpoints, which ModelExport wrote. One is called `destination`, several by the names of their folders.
        dtype: Precision of the weights.
        attention: Attention implementation.
        max_new_tokens: Tokens to generate at most.
        variants: Which models to run; by default all.
        quantization: Store the linear layers in `4bit` or `8bit`.
        device_map: `auto` lays the layers on all GPUs.
        trust_remote_code: Run the Python that the model's repository ships.
        allow_missing_weights: Take a model whose files lack tensors.
        more_variants: Names of what else the module can run.

    Raises:
        ValueError: A destination cannot be loaded into the model, or a variant is unknown.
    """

    def __init__(
        self,
        model_id: str,
        revision: str | None,
        destination: str | list[str] | None,
        dtype: str,
        attention: str,
        max_new_tokens: int,
        variants: list[str] | None,
        quantization: Quantization | None,
        device_map: DeviceMap | None,
        trust_remote_code: bool,
        allow_missing_weights: bool,
        more_variants: Sequence[str] = (),
    ) -> None:
        super().__init__(
            model_id,
            revision,
            None,
            dtype,
            attention,
            max_new_tokens,
            quantization,
            device_map,
            trust_remote_code,
            allow_missing_weights,
        )
        self.destinations = {} if destination is None else name_destinations(destination)
        for path in self.destinations.values():
            check_checkpoint(path)
            if quantization is not None and not is_adapter(path) and Path(path).is_dir():
                raise ValueError(
                    f"--model.init_args.destination {path!r} is a whole model, of which no weights can be put into one "
                    "that --model.init_args.quantization packs; leave that out, or give an adapter"
                )
        known = [ORIGINAL, *self.destinations, *more_variants]
        self.variants = variants or known
        for variant in self.variants:
            if variant not in known:
                raise ValueError(
                    f"--model.init_args.variants: no {variant!r}; there are {', '.join(known)}, and "
                    "--model.init_args.destination names more"
                )

    def describe(self) -> dict[str, Any]:
        """What its states and answers depend on, as far as it is known; destinations by their content."""
        described = super().describe()
        # There are `checkpoints` in their place.
        del described["adapter"], described["adapter_hash"]
        hashes = {name: self._hash_of(path, name) for name, path in self.destinations.items()}
        return {**described, "checkpoints": dict(self.destinations), "checkpoint_hashes": hashes}

    def on_predict_start(self) -> None:
        """Check the destinations before any data is run, too: each may have an unembedding of its own."""
        super().on_predict_start()
        for variant in self.variants:
            if variant in self.destinations:
                with self.backbone.running_as(variant):
                    self.backbone.self_check()

    def load(self) -> VisionLanguageModel:
        """Load the original, and the destinations beside it."""
        backbone = super().load()
        for name, path in self.destinations.items():
            backbone.add_destination(path, name)
        return backbone
