"""The sizes of a Molmo, read from the published configuration or from one that transformers 5 wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import CLIPVisionConfig, PreTrainedConfig, Qwen2Config

# What the published file says of the blocks and what Molmo-7B-D has there; other Molmos have other blocks.
_BLOCKS = {
    "attention_layer_norm": False,
    "clip_qkv": None,
    "layer_norm_type": "rms",
    "norm_after": False,
    "qkv_bias": True,
    "weight_tying": False,
}

# What the language model's configuration calls as the published file does, with the sizes of Molmo-7B-D.
_SIZES = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "use_cache": True,
}

# `<|endoftext|>`; the published files name it in the tokenizer only.
_END_OF_TEXT = 151643

# CLIP ViT-L/14 at 336 pixels with a block less. The published file does not say so: it is fixed in its code.
_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


class MolmoConfig(PreTrainedConfig):
    """Configuration of a Molmo.

    Args:
        text_config: Language model. Without it the keys of the published `config.json` are expected among the rest,
            the defaults being Molmo-7B-D.
        vision_config: Vision tower; that of Molmo-7B-D by default.
        additional_vocab_size: Rows of the input embedding beyond those of the unembedding: the tokens that lay out a
            picture, which can be read and not written.
        image_token_id: Id of `<im_patch>`; by default the third of those rows.
        vision_feature_layers: Blocks of the vision tower whose outputs are joined, in this order; negative ones count
            from the end.
        **kwargs: What every configuration has, and the published keys.

    Raises:
        ValueError: It is a Molmo with other blocks than Molmo-7B-D.
    """

    model_type = "molmo"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "text_config": Qwen2Config,
        "vision_config": CLIPVisionConfig,
    }

    def __init__(
        self,
        text_config: Qwen2Config | dict[str, Any] | None = None,
        vision_config: CLIPVisionConfig | dict[str, Any] | None = None,
        additional_vocab_size: int = 128,
        image_token_id: int | None = None,
        vision_feature_layers: Sequence[int] = (-2, -9),
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = _read_published(kwargs)
        self.text_config = Qwen2Config(**text_config) if isinstance(text_config, dict) else text_config
        if not isinstance(vision_config, CLIPVisionConfig):
            vision_config = CLIPVisionConfig(**(vision_config or _VISION))
        self.vision_config = vision_config
        self.additional_vocab_size = additional_vocab_size
        self.image_token_id = self.text_config.vocab_size + 2 if image_token_id is None else image_token_id
        self.vision_feature_layers = list(vision_feature_layers)
        # Names the code that is not run, which a model saved here does not have beside it.
        kwargs.pop("auto_map", None)
        # The unembedding has fewer rows than the input embedding.
        super().__init__(**{**kwargs, "tie_word_embeddings": False})


def _read_published(keys: dict[str, Any]) -> dict[str, Any]:
    """Take the language model's keys out of the published configuration, under the names that Qwen2 has for them."""
    text = {name: keys.pop(name, default) for name, default in _SIZES.items()}
    for name, ours in {**_BLOCKS, "embedding_size": text["vocab_size"]}.items():
        if (theirs := keys.pop(name, ours)) != ours:
            raise ValueError(
                f"config.json: {name} is {theirs!r}; of the Molmo models only those built as Molmo-7B-D are known, "
                f"which has {ours!r}"
            )
    ends = {f"{role}_token_id": keys.pop(f"{role}_token_id", _END_OF_TEXT) for role in ("bos", "eos", "pad")}
    return {
        **text,
        **ends,
        # The published number counts gate and up projection, which are one matrix there.
        "intermediate_size": keys.pop("intermediate_size", 37888) // 2,
        "rms_norm_eps": keys.pop("layer_norm_eps", 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": keys.pop("rope_theta", 1e6)},
        "tie_word_embeddings": False,
    }
