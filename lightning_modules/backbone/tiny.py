"""Writes a small untrained LLaVA in the usual Hugging Face layout: the start of shapes-llava, and of tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

_BOS, _EOS, _PAD, _IMAGE = "<s>", "</s>", "<pad>", "<image>"

# The layout of LLaVA-1.5: `USER: <image>\n… ASSISTANT: …</s>`.
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% else %} ASSISTANT: "
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def write_tiny_llava(
    out: Path,
    corpus: Iterable[str],
    *,
    vocabulary: int = 640,
    image_size: int = 64,
    patch_size: int = 8,
    vision_width: int = 128,
    vision_layers: int = 4,
    text_width: int = 160,
    text_layers: int = 6,
) -> Path:
    """Write config, untrained weights, tokenizer and processor.

    Args:
        out: Folder to write.
        corpus: Texts that the byte-level BPE tokenizer is trained on.
        vocabulary: Tokens at most, special ones included; at least 260 (all bytes and the special tokens).
        image_size: Width and height in pixels that pictures are brought to.
        patch_size: Width and height of a patch; the grid has (image_size / patch_size)² visual tokens.
        vision_width: Hidden size of the CLIP vision tower, a multiple of 32.
        vision_layers: Blocks of the vision tower.
        text_width: Hidden size of the Llama, a multiple of 32.
        text_layers: Blocks of the Llama.

    Returns:
        `out`.
    """
    tokenizer = train_tokenizer(corpus, vocabulary)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the vision tower's class token, dropped again by "default"
        chat_template=_CHAT_TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_width,
            intermediate_size=3 * vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_width // 32,
            image_size=image_size,
            patch_size=patch_size,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=text_width,
            intermediate_size=3 * text_width,
            num_hidden_layers=text_layers,
            num_attention_heads=text_width // 32,
            num_key_value_heads=text_width // 32,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.vocab[_IMAGE],
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def train_tokenizer(corpus: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens `<pad>`, `<s>`, `</s>` and `<image>`.

    Args:
        corpus: Texts that it is trained on.
        vocabulary: Tokens at most, special ones included; at least 260.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_PAD, _BOS, _EOS, _IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=_BOS, eos_token=_EOS, pad_token=_PAD, additional_special_tokens=[_IMAGE]
    )
