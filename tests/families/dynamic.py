"""Families whose number of visual tokens follows the size of the picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from conceptshift.lightning_modules.backbone.processors import VideoOptions, pictures_only

from .building import TEXT, chat_template, finish, make_tokenizer, seeded, token_ids
from .pictures import Lfm2VlPictures, Molmo2Pictures

# Configurations take dictionaries of sizes, which their type hints refuse.
hf: Any = transformers

# Sizes of a vision tower of the CLIP kind.
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# Sizes of a vision tower of the Qwen kind: a visual token is 2 × 2 patches of 8 pixels.
_QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 8,
    "spatial_merge_size": 2,
}
_QWEN_TOKENS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>")
_CHAT = (("<|im_start|>user\n", "<|im_end|>\n"), ("<|im_start|>assistant\n", "<|im_end|>\n"))
_QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def _tokenizer(*special: str, eos: str, pad: str, bos: str | None = None, **named: str) -> Any:
    """A tokenizer with the family's own names of the special tokens."""
    ends = [token for token in (bos, eos, pad) if token]
    tokenizer = make_tokenizer(*special, *ends, **named)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = bos, eos, pad
    return tokenizer


def _qwen_tokenizer() -> Any:
    return _tokenizer(
        *_QWEN_TOKENS,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {**TEXT, "vocab_size": len(tokenizer), **token_ids(tokenizer), **more}


def _rope(**more: Any) -> dict[str, Any]:
    """Rotary positions of time, row and column, for heads 8 wide."""
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1], **more}


def _qwen_processor(kind: Any, tokenizer: Any, template: str, pixels: Any = hf.Qwen2VLImageProcessorPil) -> Any:
    images = pixels(patch_size=8, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 112 * 112})
    with pictures_only():
        return kind(images, tokenizer, video_processor=VideoOptions(), chat_template=template)


def qwen2_vl() -> tuple[Any, Any]:
    """Qwen2-VL: rotary positions of time, row and column."""
    tokenizer = _qwen_tokenizer()
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 4, "patch_size": 8}
    config = hf.Qwen2VLConfig(
        text_config=_text(tokenizer, rope_parameters=_rope()), vision_config=vision, **_qwen_ids(tokenizer)
    )
    template = chat_template(_QWEN_PICTURE, *_CHAT, bos=_SYSTEM)
    processor = _qwen_processor(hf.Qwen2VLProcessor, tokenizer, template)
    return finish(hf.Qwen2VLForConditionalGeneration(config), tokenizer), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    """Qwen2.5-VL: the vision tower attends within windows of 2 × 2 visual tokens, but for its last block."""
    tokenizer = _qwen_tokenizer()
    vision = {**_QWEN_VISION, "window_size": 32, "fullatt_block_indexes": [2]}
    config = hf.Qwen2_5_VLConfig(
        text_config=_text(tokenizer, rope_parameters=_rope()), vision_config=vision, **_qwen_ids(tokenizer)
    )
    template = chat_template(_QWEN_PICTURE, *_CHAT, bos=_SYSTEM)
    processor = _qwen_processor(hf.Qwen2_5_VLProcessor, tokenizer, template)
    return finish(hf.Qwen2_5_VLForConditionalGeneration(config), tokenizer), processor


def qwen3_vl() -> tuple[Any, Any]:
    """Qwen3-VL: features of earlier vision blocks are added to the first blocks of the language model."""
    tokenizer = _qwen_tokenizer()
    vision = {**_QWEN_VISION, "num_position_embeddings": 49, "deepstack_visual_indexes": [0, 1]}
    text = _text(tokenizer, head_dim=8, rope_parameters=_rope(mrope_interleaved=True))
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids(tokenizer))
    processor = _qwen_processor(hf.Qwen3VLProcessor, tokenizer, chat_template(_QWEN_PICTURE, *_CHAT, bos=""))
    return finish(hf.Qwen3VLForConditionalGeneration(config), tokenizer), processor


def qwen3_5() -> tuple[Any, Any]:
    """Qwen3.5: two of three blocks have linear attention and a short convolution."""
    tokenizer = _qwen_tokenizer()
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    text = _text(
        tokenizer,
        **linear,
        linear_num_value_heads=4,
        head_dim=32,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        rope_parameters=_rope(mrope_interleaved=True, partial_rotary_factor=0.25),
    )
    vision = {**_QWEN_VISION, "num_position_embeddings": 49}
    config = hf.Qwen3_5Config(text_config=text, vision_config=vision, **_qwen_ids(tokenizer))
    answer = ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>\n")
    processor = _qwen_processor(hf.Qwen3VLProcessor, tokenizer, chat_template(_QWEN_PICTURE, _CHAT[0], answer, bos=""))
    return finish(hf.Qwen3_5ForConditionalGeneration(config), tokenizer), processor


def _pixtral_vision() -> Any:
    return hf.PixtralVisionConfig(**_TOWER, image_size=112, patch_size=8)


def mistral3() -> tuple[Any, Any]:
    """Mistral Small 3.1: each row of visual tokens ends in `[IMG_BREAK]`, the last in `[IMG_END]`."""
    special = ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = _tokenizer(*special, bos="<s>", eos="</s>", pad="<pad>")
    text = hf.MistralConfig(**_text(tokenizer, head_dim=8, sliding_window=None))
    config = hf.Mistral3Config(
        text_config=text,
        vision_config=_pixtral_vision(),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    with pictures_only():
        # Imported here, where its module need not find torchvision.
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor

        processor = PixtralProcessor(
            hf.PixtralImageProcessorPil(size={"longest_edge": 112}, patch_size=8),
            tokenizer,
            patch_size=8,
            spatial_merge_size=2,
            chat_template=chat_template("[IMG]", ("[INST]", "[/INST]"), ("", "</s>")),
        )
    return finish(hf.Mistral3ForConditionalGeneration(config), tokenizer), processor


_GLM_PICTURE = "<|begin_of_image|><|image|><|end_of_image|>"


def _glm_tokenizer() -> Any:
    special = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|begin_of_image|>", "<|end_of_image|>")
    videos = ("<|begin_of_video|>", "<|end_of_video|>")
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    return _tokenizer(*special, *videos, eos="<|endoftext|>", pad="<|endoftext|>", **named)


def _glm_ids(tokenizer: Any) -> dict[str, int]:
    names = {"image_token_id": "<|image|>", "video_token_id": "<|video|>"}
    for kind in ("image", "video"):
        names |= {f"{kind}_start_token_id": f"<|begin_of_{kind}|>", f"{kind}_end_token_id": f"<|end_of_{kind}|>"}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _glm(
    config: Any, model: Any, processor: Any, pixels: Any, answer: str = "<|assistant|>\n", **more: Any
) -> tuple[Any, Any]:
    """A GLM-V: norms before and after each part of a block; half of each head is rotated."""
    tokenizer = _glm_tokenizer()
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    text = _text(tokenizer, **heads, rope_parameters=_rope(partial_rotary_factor=0.5), **more)
    vision = {**_QWEN_VISION, "image_size": 56}
    template = chat_template(_GLM_PICTURE, ("<|user|>\n", ""), (answer, ""), bos="[gMASK]<sop>")
    tiny = model(config(text_config=text, vision_config=vision, **_glm_ids(tokenizer)))
    return finish(tiny, tokenizer), _qwen_processor(processor, tokenizer, template, pixels)


def glm4v() -> tuple[Any, Any]:
    """GLM-4.1V; no token closes the model's turn."""
    return _glm(hf.Glm4vConfig, hf.Glm4vForConditionalGeneration, hf.Glm4vProcessor, hf.Glm4vImageProcessorPil)


def glm4v_moe() -> tuple[Any, Any]:
    """GLM-4.5V: experts in all but the first block, one of them for all tokens."""
    return _glm(
        hf.Glm4vMoeConfig,
        hf.Glm4vMoeForConditionalGeneration,
        hf.Glm4vProcessor,
        hf.Glm4vImageProcessorPil,
        answer="<|assistant|>\n<think></think>\n",
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )


def glm46v() -> tuple[Any, Any]:
    """GLM-4.6V."""
    return _glm(hf.Glm46VConfig, hf.Glm46VForConditionalGeneration, hf.Glm46VProcessor, hf.Glm46VImageProcessorPil)


def glm_ocr() -> tuple[Any, Any]:
    """GLM-OCR: norms of queries and keys in the vision tower."""
    return _glm(hf.GlmOcrConfig, hf.GlmOcrForConditionalGeneration, hf.Glm46VProcessor, hf.Glm46VImageProcessorPil)


def qwen3_vl_moe() -> tuple[Any, Any]:
    """Qwen3-VL with experts."""
    tokenizer = _qwen_tokenizer()
    vision = {**_QWEN_VISION, "num_position_embeddings": 49, "deepstack_visual_indexes": [0, 1]}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    text = _text(tokenizer, **experts, head_dim=8, rope_parameters=_rope(mrope_interleaved=True))
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_qwen_ids(tokenizer))
    processor = _qwen_processor(hf.Qwen3VLProcessor, tokenizer, chat_template(_QWEN_PICTURE, *_CHAT, bos=""))
    return finish(hf.Qwen3VLMoeForConditionalGeneration(config), tokenizer), processor


def lighton_ocr() -> tuple[Any, Any]:
    """LightOnOCR: the vision tower of Pixtral and Qwen3, without tokens at the ends of rows."""
    named = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    tokenizer = _tokenizer(*_QWEN_TOKENS, eos="<|im_end|>", pad="<|endoftext|>", **named)
    config = hf.LightOnOcrConfig(
        text_config=hf.Qwen3Config(**_text(tokenizer, head_dim=8)),
        vision_config=_pixtral_vision(),
        image_token_id=tokenizer.image_token_id,
    )
    processor = hf.LightOnOcrProcessor(
        hf.PixtralImageProcessorPil(size={"longest_edge": 112}, patch_size=16),
        tokenizer,
        patch_size=8,
        chat_template=chat_template("<|image_pad|>", *_CHAT, bos="<|im_start|>system<|im_end|>\n"),
    )
    return finish(hf.LightOnOcrForConditionalGeneration(config), tokenizer), processor


def _ernie_tokenizer() -> Any:
    named = {"image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|VIDEO_PLACEHOLDER|>"}
    for kind in ("image", "video"):
        named |= {f"{kind}_start_token": f"<|{kind.upper()}_START|>", f"{kind}_end_token": f"<|{kind.upper()}_END|>"}
    special = ("<|begin_of_sentence|>", "<|end_of_sentence|>")
    return _tokenizer(*special, bos="<s>", eos="</s>", pad="<pad>", **named)


_ERNIE_PICTURE = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"


def ernie4_5_vl_moe() -> tuple[Any, Any]:
    """ERNIE 4.5 VL: pictures and texts have experts of their own; rotary positions of row, column and time."""
    tokenizer = _ernie_tokenizer()
    experts = {"moe_intermediate_size": [24, 16], "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    text = _text(tokenizer, **experts, rope_parameters=_rope(mrope_section=[1, 1, 2]))
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8}
    names = [f"{kind}{part}_token_id" for kind in ("image", "video") for part in ("", "_start", "_end")]
    ids = {name: getattr(tokenizer, name) for name in names}
    config = hf.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, **ids)
    processor = _qwen_processor(
        hf.Ernie4_5_VLMoeProcessor,
        tokenizer,
        chat_template(
            f"Picture 1:{_ERNIE_PICTURE}",
            ("User: ", "{{ '\\n' }}"),
            ("Assistant: ", "<|end_of_sentence|>"),
            bos="<|begin_of_sentence|>",
        ),
        hf.Ernie4_5_VLMoeImageProcessorPil,
    )
    return finish(hf.Ernie4_5_VLMoeForConditionalGeneration(config), tokenizer), processor


def paddleocr_vl() -> tuple[Any, Any]:
    """PaddleOCR-VL: a tower of the SigLIP kind and ERNIE 4.5."""
    tokenizer = _ernie_tokenizer()
    config = hf.PaddleOCRVLConfig(
        text_config=_text(tokenizer, head_dim=8, rope_parameters=_rope()),
        vision_config={**_TOWER, "image_size": 56, "patch_size": 8},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.image_start_token_id,
        vision_end_token_id=tokenizer.image_end_token_id,
    )
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 112 * 112}
    processor = hf.PaddleOCRVLProcessor(
        hf.PaddleOCRVLImageProcessorPil(patch_size=8, merge_size=2, size=pixels),
        tokenizer,
        chat_template=chat_template(
            _ERNIE_PICTURE, ("User: ", "{{ '\\n' }}"), ("Assistant:\n", "</s>"), bos="<|begin_of_sentence|>"
        ),
    )
    return finish(hf.PaddleOCRVLForConditionalGeneration(config), tokenizer), processor


def video_llama_3() -> tuple[Any, Any]:
    """VideoLLaMA 3: each patch of a picture is a visual token."""
    tokenizer = _tokenizer(
        *_QWEN_TOKENS, eos="<|im_end|>", pad="<|endoftext|>", image_token="<image>", video_token="<video>"
    )
    config = hf.VideoLlama3Config(
        text_config=hf.Qwen2Config(**_text(tokenizer)),
        vision_config={**_TOWER, "patch_size": 16},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    images = hf.VideoLlama3ImageProcessorPil(patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 112 * 112})
    template = chat_template("<image>\n", *_CHAT, bos="")
    with pictures_only():
        processor = hf.VideoLlama3Processor(images, tokenizer, VideoOptions(), chat_template=template)
    return finish(hf.VideoLlama3ForConditionalGeneration(config), tokenizer), processor


def exaone4_5() -> tuple[Any, Any]:
    """EXAONE 4.5: norms after the parts of a block, sliding windows, windows in the vision tower."""
    special = ("[|user|]", "[|assistant|]", "<vision>", "</vision>")
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = _tokenizer(*special, bos="[BOS]", eos="[|endofturn|]", pad="[PAD]", **named)
    config = hf.Exaone4_5_Config(
        text_config=hf.Exaone4Config(**_text(tokenizer, sliding_window=16, sliding_window_pattern=3)),
        vision_config={**_QWEN_VISION, "window_size": 32, "fullatt_block_indexes": [2], "num_key_value_heads": 2},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    template = chat_template(
        "<vision><|image_pad|></vision>",
        ("[|user|]\n", "[|endofturn|]\n"),
        ("[|assistant|]\n", "[|endofturn|]\n"),
        bos="",
    )
    processor = _qwen_processor(hf.Exaone4_5_Processor, tokenizer, template)
    return finish(hf.Exaone4_5_ForConditionalGeneration(config), tokenizer), processor


_MOLMO2_TOKENS = {
    "image_start_token_id": "<im_start>",
    "low_res_image_start_token_id": "<low_res_im_start>",
    "image_end_token_id": "<im_end>",
    "image_patch_id": "<im_patch>",
    "frame_start_token_id": "<frame_start>",
    "frame_end_token_id": "<frame_end>",
}


def molmo2() -> tuple[Any, Any]:
    """Molmo 2: features are added to the tokens' embeddings, and picture tokens attend to one another both ways."""
    pictures = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>", "<im_low>")
    others = ("<|video|>", "<frame_start>", "<frame_end>")
    tokenizer = _tokenizer("<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>")
    outputs = len(tokenizer)
    # As in the released models, what stands for pictures can be read but not written.
    tokenizer.add_special_tokens({"extra_special_tokens": [*pictures, *others]}, replace_extra_special_tokens=False)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _MOLMO2_TOKENS.items()}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "hidden_size": 32}
    config = hf.Molmo2Config(
        text_config=_text(tokenizer, head_dim=8, vocab_size=outputs, additional_vocab_size=len(tokenizer) - outputs),
        vision_config={
            **heads,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "image_size": [56, 56],
            "patch_size": 8,
        },
        adapter_config={**heads, "intermediate_size": 48, "text_hidden_size": 32, "vision_feature_layer": [-1, -3]},
        **ids,
    )
    template = chat_template("<|image|><|im_start|>user\n", ("", "<|im_end|>\n"), _CHAT[1], bos="<|im_end|>")
    with pictures_only():
        processor = hf.Molmo2Processor(Molmo2Pictures(), VideoOptions(), tokenizer, chat_template=template)
    return finish(hf.Molmo2ForConditionalGeneration(config), tokenizer), processor


def lfm2_vl() -> tuple[Any, Any]:
    """LFM2-VL: two of three blocks are short convolutions."""
    tiles = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 7) for column in range(1, 7)]
    marks = ("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "<|im_start|>")
    tokenizer = _tokenizer(*tiles, *marks, bos="<|startoftext|>", eos="<|im_end|>", pad="<|pad|>")
    text = _text(tokenizer, layer_types=["conv", "full_attention", "conv"], block_multiple_of=16)
    config = hf.Lfm2VlConfig(
        text_config=hf.Lfm2Config(**text),
        vision_config=hf.Siglip2VisionConfig(**_TOWER, patch_size=8, num_patches=16),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=48,
    )
    processor = hf.Lfm2VlProcessor(Lfm2VlPictures(), tokenizer, chat_template=chat_template("<image>", *_CHAT))
    return finish(hf.Lfm2VlForConditionalGeneration(config), tokenizer), processor


def kosmos2() -> tuple[Any, Any]:
    """Kosmos-2: 64 latent queries; their ids follow the unknown token's, and a mask says where they are."""
    latents = [f"<latent_{index}>" for index in range(64)]
    tokenizer = _tokenizer("<unk>", *latents, bos="<s>", eos="</s>", pad="<pad>")
    tokenizer.unk_token = "<unk>"
    # Its processor pads on the side of the tokenizer, whatever it is asked for.
    tokenizer.padding_side = "left"
    images = hf.CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False)
    processor = hf.Kosmos2Processor(images, tokenizer, 4)
    sizes = {"embed_dim": 32, "layers": 3, "ffn_dim": 48, "attention_heads": 4, "max_position_embeddings": 512}
    config = hf.Kosmos2Config(
        text_config={**sizes, **token_ids(tokenizer), "vocab_size": len(tokenizer)},
        vision_config={**_TOWER, "image_size": 48, "patch_size": 16},
    )
    return finish(hf.Kosmos2ForConditionalGeneration(config), tokenizer), processor


def git() -> tuple[Any, Any]:
    """GIT: the picture's states stand before the text without tokens of their own; no chat template."""
    tokenizer = _tokenizer(bos="<s>", eos="</s>", pad="<pad>")
    vision = {**_TOWER, "image_size": 48, "patch_size": 16}
    config = hf.GitConfig(
        **{**_TOWER, "num_hidden_layers": 3}, vision_config=vision, vocab_size=len(tokenizer), **token_ids(tokenizer)
    )
    images = hf.CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False)
    return finish(hf.GitForCausalLM(config), tokenizer), hf.GitProcessor(images, tokenizer)


def blip() -> tuple[Any, Any]:
    """BLIP: the text attends across to the picture, which has no tokens; no chat template."""
    tokenizer = _tokenizer(bos="<s>", eos="</s>", pad="<pad>")
    ids = {**token_ids(tokenizer), "sep_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    config = hf.BlipConfig(
        text_config={**_TOWER, **ids, "num_hidden_layers": 3, "encoder_hidden_size": 32, "projection_dim": 32},
        vision_config={**_TOWER, "projection_dim": 32, "image_size": 48, "patch_size": 16},
    )
    images = hf.BlipImageProcessorPil(size={"height": 48, "width": 48})
    return finish(hf.BlipForConditionalGeneration(config), tokenizer), hf.BlipProcessor(images, tokenizer)


_BART = {"layers": 3, "attention_heads": 4, "ffn_dim": 48}


def florence2() -> tuple[Any, Any]:
    """Florence-2: BART reads picture and prompt; the processor writes the picture's tokens; no chat template."""
    tokenizer = _tokenizer(bos="<s>", eos="</s>", pad="<pad>", image_token="<image>")
    ids = {**token_ids(tokenizer), "vocab_size": len(tokenizer), "decoder_start_token_id": tokenizer.eos_token_id}
    sides = ("encoder", "decoder")
    bart = {f"{side}_{name}": value for side in sides for name, value in _BART.items()}
    config = hf.Florence2Config(
        text_config=hf.BartConfig(**ids, **bart, d_model=32, max_position_embeddings=512),
        vision_config={
            "depths": [1, 1, 1, 1],
            "embed_dim": [8, 16, 32, 32],
            "num_heads": [1, 2, 4, 4],
            "num_groups": [1, 2, 4, 4],
            "window_size": 4,
            "projection_dim": 32,
        },
        image_token_id=tokenizer.image_token_id,
    )
    images = hf.CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5  # 2 × 2 places after strides of 32 pixels, and their mean
    model = finish(hf.Florence2ForConditionalGeneration(config), tokenizer)
    model.generation_config.decoder_start_token_id = tokenizer.eos_token_id
    return model, hf.Florence2Processor(images, tokenizer)


def t5gemma2() -> tuple[Any, Any]:
    """T5Gemma 2: an encoder as Gemma 3, a decoder whose attention reads its own and the encoder's states at once."""
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _tokenizer(bos="<bos>", eos="<eos>", pad="<pad>", **named)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = _text(tokenizer, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=kinds)
    encoder = {
        "text_config": text,
        "vision_config": {**_TOWER, "image_size": 48, "patch_size": 12, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "boi_token_index": tokenizer.boi_token_id,
        "eoi_token_index": tokenizer.eoi_token_id,
        "image_token_index": tokenizer.image_token_id,
    }
    config = hf.T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=tokenizer.image_token_id)
    images = hf.Gemma3ImageProcessorPil(size={"height": 48, "width": 48})
    processor = hf.Gemma3Processor(
        images, tokenizer, image_seq_length=4, chat_template=chat_template("<start_of_image>", ("", ""), ("", "<eos>"))
    )
    model = finish(hf.T5Gemma2ForConditionalGeneration(config), tokenizer)
    model.generation_config.decoder_start_token_id = tokenizer.bos_token_id
    return model, processor


DYNAMIC: dict[str, Callable[[], tuple[Any, Any]]] = seeded(
    {
        "qwen2_vl": qwen2_vl,
        "qwen2_5_vl": qwen2_5_vl,
        "qwen3_vl": qwen3_vl,
        "qwen3_5": qwen3_5,
        "mistral3": mistral3,
        "glm4v": glm4v,
        "molmo2": molmo2,
        "lfm2_vl": lfm2_vl,
        "lighton_ocr": lighton_ocr,
        "ernie4_5_vl_moe": ernie4_5_vl_moe,
        "paddleocr_vl": paddleocr_vl,
        "video_llama_3": video_llama_3,
        "exaone4_5": exaone4_5,
        "qwen3_vl_moe": qwen3_vl_moe,
        "glm46v": glm46v,
        "glm4v_moe": glm4v_moe,
        "glm_ocr": glm_ocr,
    }
)
"""Builders of a tiny random model and its processor, by `model_type`."""

ODD: dict[str, Callable[[], tuple[Any, Any]]] = seeded(
    {
        "kosmos-2": kosmos2,
        "git": git,
        "blip": blip,
        "florence2": florence2,
        "t5gemma2": t5gemma2,
    }
)
"""Builders of models that are no decoder which reads its picture as tokens of the prompt."""
