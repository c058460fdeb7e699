"""What the builders of tiny models share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from conceptshift.cli.shapes_model import shapes_corpus
from conceptshift.lightning_modules.backbone.tiny import train_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

# Sizes of a Llama-like language model that is as small as attention with grouped heads can be.
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


@lru_cache(maxsize=1)
def _trained() -> str:
    tokenizer = train_tokenizer(itertools.islice(shapes_corpus(), 400), 400)
    return str(tokenizer.backend_tokenizer.to_str())


def make_tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `<s>`, `</s>`, `<pad>`, `<image>` and more special tokens.

    Args:
        special: Further special tokens.
        named: Attributes of the tokenizer that processors read, such as `image_token="<image>"`; their tokens are
            added.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=named,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *special]})
    return tokenizer


def token_ids(tokenizer: Any) -> dict[str, int]:
    """The special tokens' ids as configurations take them."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def finish(model: Any, tokenizer: Any, seed: int = 0) -> Any:
    """Give a model random weights large enough that pictures and prompts change what it says, and its end token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                # A weight of several experts has one matrix an expert.
                fan_in = parameter.shape[-1] if "experts." in name else parameter[0].numel()
                scale = 1.0 if "embed" in name else fan_in**-0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif parameter.numel() == 1 and "gate" in name:
                parameter.fill_(0.5)  # shut before training, so that pictures would not matter
    for name, value in token_ids(tokenizer).items():
        setattr(model.generation_config, name, value)
    return model.eval()


Builder = Callable[[], tuple[Any, Any]]


def seeded(builders: dict[str, Builder]) -> dict[str, Builder]:
    """Builders that make the same model whatever was drawn before."""

    def fixed(build: Builder) -> Builder:
        def made() -> tuple[Any, Any]:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return build()

        return made

    return {name: fixed(build) for name, build in builders.items()}


def chat_template(image: str, user: Sequence[str], assistant: Sequence[str], bos: str = "{{ bos_token }}") -> str:
    """A chat template in which a picture is one token.

    Args:
        image: What stands for a picture.
        user: What opens and closes a user's turn.
        assistant: What opens and closes the model's; a space at the end of the opening is left to the model to write.
        bos: What the conversation begins with.
    """
    return (
        f"{bos}{{% for message in messages %}}{{% if message['role'] == 'user' %}}{user[0]}"
        f"{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image}"
        f"{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{user[1]}"
        f"{{% else %}}{assistant[0]}{{{{ message['content'][0]['text'] }}}}{assistant[1]}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{assistant[0].rstrip(' ')}{{% endif %}}"
    )
