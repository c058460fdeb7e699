"""What a dictionary was learned from, as its metadata tell, and the same model loaded again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..concepts import ConceptDictionary
from ..lightning_modules import VisionLanguageModel
from ..lightning_modules.backbone.destinations import ORIGINAL


@dataclass(frozen=True)
class DictionarySource:
    """Where the states of a dictionary come from.

    Attributes:
        path: The dictionary's file, for messages.
        site: Site of the states.
        selector: Selector of the states.
        variant: `original`, or the name of a destination.
        features: Metadata of the feature store.
    """

    path: Path
    site: str
    selector: str
    variant: str
    features: dict[str, Any]

    @classmethod
    def of(cls, dictionary: ConceptDictionary, path: Path) -> DictionarySource:
        """Read a dictionary's metadata.

        Raises:
            ValueError: They do not say which states the dictionary is of.
        """
        try:
            return cls(path, **{key: dictionary.metadata[key] for key in ("site", "selector", "variant", "features")})
        except KeyError as error:
            raise ValueError(
                f"{path}: its metadata lack {error}, so that the same states cannot be read of another picture; give a "
                "dictionary that DictionaryFitter wrote"
            ) from error

    @property
    def max_new_tokens(self) -> int:
        """Length of the answers that the states were read in, at most."""
        return int(self.features.get("max_new_tokens", 25))

    def prompt(self, given: str | None) -> str:
        """The whole prompt.

        Args:
            given: Replaces what every picture was asked; the question where each was asked another one.

        Raises:
            ValueError: Nothing is given, and there is no prompt for all pictures.
        """
        data = self.features.get("data", {})
        recorded: str | None = data.get("prompt")
        if data.get("class") == "VQADataModule":
            # Here the recorded prompt is what follows each question.
            recorded, given = None, given and given + (recorded or "")
        prompt = given or recorded
        if prompt is None:
            raise ValueError(f"{self.path}: its pictures had a question each; ask about this one with --prompt")
        return prompt

    def load_model(self, model: str | None, revision: str | None, destination: str | None) -> VisionLanguageModel:
        """Load the model that the dictionary was learned from; run it with `running_as(variant)`.

        Args:
            model: Where the recorded original is now, if it has moved.
            revision: The same for its revision.
            destination: The same for the destination, of a dictionary of one.

        Raises:
            ValueError: The metadata name none, it cannot be loaded, or it is another one.
        """
        if self.variant == ORIGINAL and destination is not None:
            raise ValueError(f"{self.path}: a dictionary of the original; leave --destination out")
        if model is None:
            revision = revision or self.features.get("revision")
        model = model or self._recorded(self.features, "model_id", "--model")
        dtype = self.features.get("dtype", "auto")
        quantization = self.features.get("quantization")
        backbone = VisionLanguageModel.load(model, revision=revision, dtype=dtype, quantization=quantization)
        if self.variant != ORIGINAL:
            checkpoints = self.features.get("checkpoints", {})
            destination = destination or self._recorded(checkpoints, self.variant, "--destination")
            backbone.add_destination(destination, self.variant)
        # Lightning's true half precision converts the weights.
        converted = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(str(self.features.get("precision")))
        if converted is not None:
            backbone.to(converted)
        self._check(self.features.get("weights_hash"), backbone.weights_hash(), model, "--model")
        if destination is not None:
            hashes = self.features.get("checkpoint_hashes", {})
            found = backbone.destination_hash(self.variant)
            self._check(hashes.get(self.variant), found, destination, "--destination")
        return backbone

    def _recorded(self, metadata: dict[str, Any], key: str, flag: str) -> str:
        value: str | None = metadata.get(key)
        if value is None:
            raise ValueError(f"{self.path}: its metadata lack {key!r}; give it with {flag}")
        return value

    def _check(self, recorded: str | None, found: str | None, where: str, flag: str) -> None:
        if recorded not in (None, found):
            raise ValueError(
                f"{self.path}: learned from other weights ({recorded}) than those in {where!r} ({found}); give the "
                f"folder of the right ones with {flag}"
            )
