"""Tiny models of families whose pictures are scaled, cropped or tiled to sizes that are fixed beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from conceptshift.lightning_modules.backbone.processors import VideoOptions, pictures_only
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaProcessor,
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonProcessor,
    CLIPImageProcessorPil,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionProcessor,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2Processor,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2Processor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from .building import TEXT, chat_template, finish, make_tokenizer, seeded, token_ids
from .pictures import Cohere2VisionPictures, Llama4Pictures

_PATCH = 14
_SIZE = 56
_SQUARE = {"height": _SIZE, "width": _SIZE}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": _SIZE,
    "patch_size": _PATCH,
}
_CLIP = {**_VISION, "model_type": "clip_vision_model"}
_SIGLIP = {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
# Grids of 1 x 2, 2 x 1 and 2 x 2 tiles.
_PINPOINTS = [[_SIZE, 2 * _SIZE], [2 * _SIZE, _SIZE], [2 * _SIZE, 2 * _SIZE]]
_TURN, _TURN_END = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
_ROLES = ("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")
_IM_USER = ("<|im_start|>user\n", "<|im_end|>\n")
_IM_ASSISTANT = ("<|im_start|>assistant\n", "<|im_end|>\n")


def _text(model_type: str, tokenizer: Any, **more: Any) -> dict[str, Any]:
    """The configuration of a language model for a tokenizer."""
    return {"model_type": model_type, **TEXT, "vocab_size": len(tokenizer), **token_ids(tokenizer), **more}


def _finish(model: Any, tokenizer: Any, end_of_turn: str) -> Any:
    """Let generation stop at the end of a turn too, where that is not the tokenizer's end of sequence."""
    finish(model, tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.vocab[end_of_turn]]
    return model


def _im_tokenizer(*special: str, **named: str) -> Any:
    """A tokenizer in which turns end with `<|im_end|>`."""
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>", *special, **named)
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def _llava_processor(tokenizer: Any, user: tuple[str, str], assistant: tuple[str, str]) -> Any:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": _SIZE}, crop_size=_SQUARE),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>\n", user, assistant),
    )


def llava() -> tuple[Any, Any]:
    """LLaVA-1.5: a square crop, CLIP's last block but one without the class token, a Llama."""
    tokenizer = make_tokenizer()
    config = LlavaConfig(
        vision_config=_CLIP,
        text_config=_text("llama", tokenizer),
        image_token_index=tokenizer.vocab["<image>"],
        image_seq_length=16,
    )
    processor = _llava_processor(tokenizer, ("USER: ", " "), ("ASSISTANT: ", "{{ eos_token }}"))
    return finish(LlavaForConditionalGeneration(config), tokenizer), processor


def llava_next() -> tuple[Any, Any]:
    """LLaVA-1.6: the picture and up to 2 x 2 tiles without their padding, each row of patches ended by a newline."""
    tokenizer = make_tokenizer()
    config = LlavaNextConfig(
        vision_config=_CLIP,
        text_config=_text("mistral", tokenizer),
        image_token_index=tokenizer.vocab["<image>"],
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=16,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": _SIZE}, crop_size=_SQUARE, image_grid_pinpoints=_PINPOINTS
        ),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>\n", ("[INST] ", " [/INST]"), (" ", "{{ eos_token }}")),
    )
    return finish(LlavaNextForConditionalGeneration(config), tokenizer), processor


def llava_onevision() -> tuple[Any, Any]:
    """LLaVA-OneVision: SigLIP, tiles as in LLaVA-1.6, scaled down where they are more than one picture's worth."""
    tokenizer = _im_tokenizer("<video>")
    config = LlavaOnevisionConfig(
        vision_config=_SIGLIP,
        text_config=_text("qwen2", tokenizer),
        image_token_index=tokenizer.vocab["<image>"],
        video_token_index=tokenizer.vocab["<video>"],
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_1",
    )
    with pictures_only():
        processor = LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessorPil(size=_SQUARE, image_grid_pinpoints=_PINPOINTS),
            tokenizer=tokenizer,
            video_processor=VideoOptions(),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_1",
            chat_template=chat_template("<image>\n", ("<|im_start|>user ", "<|im_end|>"), _IM_ASSISTANT, bos=""),
        )
    return finish(LlavaOnevisionForConditionalGeneration(config), tokenizer), processor


def idefics2() -> tuple[Any, Any]:
    """Idefics2: a whole picture in its own shape, resampled to a fixed number of latents."""
    tokenizer = make_tokenizer("<fake_token_around_image>", "<end_of_utterance>")
    config = Idefics2Config(
        vision_config={**_VISION, "image_size": 7 * _PATCH},
        text_config=_text("mistral", tokenizer),
        perceiver_config={
            "hidden_size": TEXT["hidden_size"],
            "resampler_n_latents": 6,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        image_token_id=tokenizer.vocab["<image>"],
    )
    processor = Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(
            size={"shortest_edge": 3 * _PATCH, "longest_edge": 7 * _PATCH}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=6,
        chat_template=chat_template(
            "<image>", ("User:", "<end_of_utterance>\n"), ("Assistant: ", "<end_of_utterance>\n")
        ),
    )
    return _finish(Idefics2ForConditionalGeneration(config), tokenizer, "<end_of_utterance>"), processor


def _tile_tokens() -> list[str]:
    return [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def idefics3() -> tuple[Any, Any]:
    """Idefics3: up to 2 x 2 tiles and the whole picture, pixel shuffle."""
    tokenizer = make_tokenizer("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *_tile_tokens())
    config = Idefics3Config(
        vision_config=_VISION,
        text_config=_text("llama", tokenizer),
        image_token_id=tokenizer.vocab["<image>"],
        scale_factor=2,
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * _SIZE}, max_image_size={"longest_edge": _SIZE}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=chat_template(
            "<image>", ("User:", "<end_of_utterance>\n"), ("Assistant: ", "<end_of_utterance>\n")
        ),
    )
    return _finish(Idefics3ForConditionalGeneration(config), tokenizer, "<end_of_utterance>"), processor


def smolvlm() -> tuple[Any, Any]:
    """SmolVLM: as Idefics3, with a processor that also takes videos."""
    names = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    tokenizer = make_tokenizer(
        "<|im_start|>", "<end_of_utterance>", "<global-img>", "<video>", *_tile_tokens(), **names
    )
    tokenizer.eos_token = "<end_of_utterance>"
    config = SmolVLMConfig(
        vision_config=_VISION,
        text_config=_text("llama", tokenizer),
        image_token_id=tokenizer.vocab["<image>"],
        scale_factor=2,
    )
    videos: Any = VideoOptions(num_frames=64, fps=1)
    videos.num_frames, videos.fps = 64, 1
    # The package that spells numbers out is for videos only.
    with pictures_only(), patch.object(processing_smolvlm, "num2words", str):
        processor = SmolVLMProcessor(
            image_processor=SmolVLMImageProcessorPil(
                size={"longest_edge": 2 * _SIZE}, max_image_size={"longest_edge": _SIZE}
            ),
            tokenizer=tokenizer,
            video_processor=videos,
            image_seq_len=4,
            chat_template=chat_template(
                "<image>",
                ("User:", "<end_of_utterance>\n"),
                ("Assistant: ", "<end_of_utterance>\n"),
                bos="<|im_start|>",
            ),
        )
    return finish(SmolVLMForConditionalGeneration(config), tokenizer), processor


def paligemma() -> tuple[Any, Any]:
    """PaliGemma 2: a stretched picture before the beginning of sequence, a Gemma 2 that sees all of its prompt."""
    tokenizer = make_tokenizer()
    images: Any = SiglipImageProcessorPil(size=_SQUARE)
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)
    config = PaliGemmaConfig(
        vision_config=_SIGLIP,
        text_config=_text("gemma2", tokenizer, head_dim=8, query_pre_attn_scalar=8),
        image_token_index=tokenizer.vocab["<image>"],
        vocab_size=len(tokenizer),
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
    )
    return finish(PaliGemmaForConditionalGeneration(config), tokenizer), processor


def gemma3() -> tuple[Any, Any]:
    """Gemma 3: a stretched picture pooled to fewer tokens that see each other, sliding windows."""
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = make_tokenizer("<start_of_turn>", "<end_of_turn>", **names)
    config = Gemma3Config(
        vision_config=_SIGLIP,
        text_config=_text(
            "gemma3_text",
            tokenizer,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        image_token_index=tokenizer.vocab["<image_soft_token>"],
        boi_token_index=tokenizer.vocab["<start_of_image>"],
        eoi_token_index=tokenizer.vocab["<end_of_image>"],
        mm_tokens_per_image=4,
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size=_SQUARE),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=chat_template(
            "<start_of_image>",
            ("<start_of_turn>user\n", "<end_of_turn>\n"),
            ("<start_of_turn>model\n", "<end_of_turn>\n"),
        ),
    )
    return _finish(Gemma3ForConditionalGeneration(config), tokenizer, "<end_of_turn>"), processor


def mllama() -> tuple[Any, Any]:
    """Llama 3.2 Vision: one image token, cross attention to the patches of up to four tiles."""
    tokenizer = make_tokenizer("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>")
    tokenizer.eos_token = "<|eot_id|>"
    config = MllamaConfig(
        vision_config={
            **_VISION,
            "attention_heads": 4,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 3 * _VISION["hidden_size"],
        },
        # The image token is the last one and the model cannot say it.
        text_config=_text("mllama_text_model", tokenizer, cross_attention_layers=[1], vocab_size=len(tokenizer) - 1),
        image_token_index=tokenizer.vocab["<|image|>"],
    )
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    processor = MllamaProcessor(
        image_processor=MllamaImageProcessorPil(size=_SQUARE, max_image_tiles=4),
        tokenizer=tokenizer,
        chat_template=chat_template(
            "<|image|>", (header.format("user"), "<|eot_id|>"), (header.format("assistant"), "<|eot_id|>")
        ),
    )
    return finish(MllamaForConditionalGeneration(config), tokenizer), processor


def internvl() -> tuple[Any, Any]:
    """InternVL 3: up to four tiles and the whole picture, pixel shuffle."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = _im_tokenizer(**names, video_token="<video>")
    config = InternVLConfig(
        vision_config={**_VISION, "use_mean_pooling": True},
        text_config=_text("qwen2", tokenizer),
        image_token_id=tokenizer.vocab["<IMG_CONTEXT>"],
        image_seq_length=4,
    )
    with pictures_only():
        processor = InternVLProcessor(
            image_processor=GotOcr2ImageProcessorPil(size=_SQUARE, crop_to_patches=True, max_patches=4),
            tokenizer=tokenizer,
            video_processor=VideoOptions(),
            image_seq_length=4,
            chat_template=chat_template("<IMG_CONTEXT>\n", _IM_USER, _IM_ASSISTANT, bos=""),
        )
    return finish(InternVLForConditionalGeneration(config), tokenizer), processor


def _cohere_tokenizer(*special: str, **named: str) -> Any:
    tokenizer = make_tokenizer(_TURN, _TURN_END, *_ROLES, *special, **named)
    tokenizer.eos_token = _TURN_END
    return tokenizer


def _cohere(tokenizer: Any) -> dict[str, Any]:
    """The configuration of a Cohere 2: scaled logits, sliding windows, attention and MLP side by side."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    return _text("cohere2", tokenizer, logit_scale=0.25, sliding_window=8, layer_types=types)


def _cohere_template(image: str) -> str:
    user, chatbot, start, end = _ROLES
    return chat_template(image, (f"{_TURN}{user}", _TURN_END), (f"{_TURN}{chatbot}{start}", f"{end}{_TURN_END}"))


def aya_vision() -> tuple[Any, Any]:
    """Aya Vision: numbered tiles and the whole picture, pixel shuffle, a Cohere 2."""
    pictures = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL")
    tokenizer = _cohere_tokenizer(*pictures, *(f"TILE_{index}" for index in range(1, 5)))
    config = AyaVisionConfig(
        vision_config=_SIGLIP,
        text_config=_cohere(tokenizer),
        image_token_index=tokenizer.vocab["<|IMG_PATCH|>"],
        downsample_factor=2,
    )
    processor = AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=_SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        img_size=_SIZE,
        downsample_factor=2,
        chat_template=_cohere_template("<image>"),
    )
    return finish(AyaVisionForConditionalGeneration(config), tokenizer), processor


def _blip(tokenizer: Any, family: str, text: dict[str, Any]) -> dict[str, Any]:
    """The configuration that BLIP-2 and InstructBLIP share."""
    return {
        "vision_config": {**_VISION, "model_type": f"{family}_vision_model", "num_hidden_layers": 2},
        "qformer_config": {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "text_config": text,
        "num_query_tokens": 6,
        "image_token_index": tokenizer.vocab["<image>"],
    }


def blip2() -> tuple[Any, Any]:
    """BLIP-2: query tokens before everything else, padding included, an OPT; no chat template."""
    tokenizer = make_tokenizer()
    text = {"word_embed_proj_dim": TEXT["hidden_size"], "ffn_dim": 48}
    config = Blip2Config(**_blip(tokenizer, "blip_2", _text("opt", tokenizer, **text)), image_text_hidden_size=16)
    processor = Blip2Processor(BlipImageProcessorPil(size=_SQUARE), tokenizer, num_query_tokens=6)
    return finish(Blip2ForConditionalGeneration(config), tokenizer), processor


def instructblip() -> tuple[Any, Any]:
    """InstructBLIP: as BLIP-2, but the query tokens see the prompt, and a Llama."""
    tokenizer = make_tokenizer()
    config = InstructBlipConfig(**_blip(tokenizer, "instructblip", _text("llama", tokenizer)))
    processor = InstructBlipProcessor(
        BlipImageProcessorPil(size=_SQUARE), tokenizer, make_tokenizer(), num_query_tokens=6
    )
    return finish(InstructBlipForConditionalGeneration(config), tokenizer), processor


def got_ocr2() -> tuple[Any, Any]:
    """GOT-OCR 2: a stretched picture, a windowed SAM tower whose grid is convolved to a sixteenth."""
    tokenizer = _im_tokenizer("<img>", "</img>", "<imgpad>")
    config = GotOcr2Config(
        vision_config={
            **_VISION,
            "image_size": 64,
            "patch_size": 4,
            "num_hidden_layers": 2,
            "output_channels": 8,
            "window_size": 7,
            "global_attn_indexes": [1],
            "mlp_dim": 48,
        },
        text_config=_text("qwen2", tokenizer),
        image_token_index=tokenizer.vocab["<imgpad>"],
        image_seq_length=16,
    )
    system = "You should follow the instructions carefully and explain your answers in detail."
    processor = GotOcr2Processor(
        image_processor=GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}),
        tokenizer=tokenizer,
        chat_template=chat_template(
            "<img><imgpad></img>\n",
            ("<|im_start|>user\n", "<|im_end|>"),
            ("<|im_start|>assistant\n", "<|im_end|>"),
            bos=f"<|im_start|>system\n{system}<|im_end|>",
        ),
    )
    processor.num_image_tokens = 16
    return finish(GotOcr2ForConditionalGeneration(config), tokenizer), processor


def janus() -> tuple[Any, Any]:
    """Janus: the picture padded to a square; the tower that pictures are generated with is there too."""
    names = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = make_tokenizer(**names)
    config = JanusConfig(
        vision_config={**_VISION, "num_image_tokens": 16, "projection_dim": 32, "mlp_ratio": 1.5},
        text_config=_text("llama", tokenizer),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        image_token_id=tokenizer.vocab["<image_placeholder>"],
    )
    processor = JanusProcessor(
        image_processor=JanusImageProcessorPil(size=_SQUARE),
        tokenizer=tokenizer,
        chat_template=chat_template(
            "<image_placeholder>\n", ("<|User|>: ", "\n\n"), ("<|Assistant|>: ", "{{ eos_token }}")
        ),
        num_image_tokens=16,
    )
    return finish(JanusForConditionalGeneration(config), tokenizer), processor


def deepseek_vl() -> tuple[Any, Any]:
    """DeepSeek-VL: the picture padded to a square, SigLIP, a Llama."""
    tokenizer = make_tokenizer(image_token="<image_placeholder>")
    config = DeepseekVLConfig(
        vision_config=_SIGLIP,
        text_config=_text("llama", tokenizer),
        image_token_id=tokenizer.vocab["<image_placeholder>"],
    )
    processor = DeepseekVLProcessor(
        image_processor=DeepseekVLImageProcessorPil(size=_SQUARE),
        tokenizer=tokenizer,
        chat_template=chat_template("<image_placeholder>", ("User: ", "\n\n"), ("Assistant: ", "{{ eos_token }}")),
        num_image_tokens=16,
    )
    return finish(DeepseekVLForConditionalGeneration(config), tokenizer), processor


def vipllava() -> tuple[Any, Any]:
    """ViP-LLaVA: as LLaVA-1.5, from several blocks of the vision tower at once."""
    tokenizer = make_tokenizer()
    config = VipLlavaConfig(
        vision_config=_CLIP,
        text_config=_text("llama", tokenizer),
        image_token_index=tokenizer.vocab["<image>"],
        vision_feature_layer=[-2, -3, 1],
        image_seq_length=16,
    )
    processor = _llava_processor(tokenizer, ("###Human: ", ""), ("###Assistant: ", "{{ eos_token }}"))
    return finish(VipLlavaForConditionalGeneration(config), tokenizer), processor


def cohere2_vision() -> tuple[Any, Any]:
    """Command A Vision: tiles with a line break each, pixel shuffle, a Cohere 2; the image processor is a stand-in."""
    tokenizer = _cohere_tokenizer(
        boi_token="<|START_OF_IMG|>",
        eoi_token="<|END_OF_IMG|>",
        image_token="<|IMG_PATCH|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )
    config = Cohere2VisionConfig(
        vision_config=_SIGLIP,
        text_config=_cohere(tokenizer),
        image_token_id=tokenizer.vocab["<|IMG_PATCH|>"],
        alignment_intermediate_size=64,
    )
    processor = Cohere2VisionProcessor(
        image_processor=Cohere2VisionPictures(size=_SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer=tokenizer,
        chat_template=_cohere_template("<|IMG_PATCH|>"),
    )
    return finish(Cohere2VisionForConditionalGeneration(config), tokenizer), processor


def llama4() -> tuple[Any, Any]:
    """Llama 4: tiles with separators, pixel shuffle, chunked attention, experts; the image processor is a stand-in."""
    pictures = ("<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>")
    tokenizer = make_tokenizer("<|header_start|>", "<|header_end|>", "<|eot|>", "<|image|>", *pictures)
    tokenizer.eos_token = "<|eot|>"
    config = Llama4Config(
        vision_config={
            **_VISION,
            "num_hidden_layers": 2,
            "intermediate_size": 4 * 32,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        text_config=_text(
            "llama4_text",
            tokenizer,
            intermediate_size_mlp=48,
            head_dim=8,
            num_local_experts=2,
            interleave_moe_layer_step=2,
            no_rope_layers=[1, 1, 0],
            attention_chunk_size=16,
        ),
        boi_token_index=tokenizer.vocab["<|image_start|>"],
        eoi_token_index=tokenizer.vocab["<|image_end|>"],
        image_token_index=tokenizer.vocab["<|patch|>"],
    )
    header = "<|header_start|>{}<|header_end|>\n\n"
    processor = Llama4Processor(
        image_processor=Llama4Pictures(size=_SQUARE, max_patches=4, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        chat_template=chat_template(
            "<|image|>", (header.format("user"), "<|eot|>"), (header.format("assistant"), "<|eot|>")
        ),
    )
    return finish(Llama4ForConditionalGeneration(config), tokenizer), processor


def ovis2() -> tuple[Any, Any]:
    """Ovis 2: tiles in a marked grid, each visual token a mixture of visual words."""
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = _im_tokenizer("<IMG_ATOM>", *marks)
    config = Ovis2Config(
        vision_config={**_VISION, "num_hidden_layers": 2, "vocab_size": 64, "hidden_stride": 2},
        text_config=_text("qwen2", tokenizer),
        image_token_id=tokenizer.vocab["<IMG_ATOM>"],
        visual_indicator_token_ids=[tokenizer.vocab[mark] for mark in marks],
        vocab_size=len(tokenizer),
        hidden_size=TEXT["hidden_size"],
    )
    processor = Ovis2Processor(
        image_processor=Ovis2ImageProcessorPil(size=_SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer=tokenizer,
        chat_template=chat_template("<image>\n", _IM_USER, _IM_ASSISTANT, bos=""),
        image_seq_length=4,
    )
    return finish(Ovis2ForConditionalGeneration(config), tokenizer), processor


def aria() -> tuple[Any, Any]:
    """Aria: a whole picture, padded, pooled by queries, a language model of shared and routed experts."""
    tokenizer = _im_tokenizer("<fim_prefix>", "<fim_suffix>", image_token="<|img|>")
    config = AriaConfig(
        # The processor knows no smaller pictures.
        vision_config={
            "model_type": "idefics3_vision",
            **_VISION,
            "hidden_size": 16,
            "image_size": 980,
            "patch_size": 70,
        },
        text_config=_text("aria_text", tokenizer, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        projector_patch_to_query_dict={14 * 14: 8},
        image_token_index=tokenizer.vocab["<|img|>"],
    )
    processor = AriaProcessor(
        image_processor=AriaImageProcessorPil(),
        tokenizer=tokenizer,
        chat_template=chat_template("<fim_prefix><|img|><fim_suffix>", _IM_USER, _IM_ASSISTANT, bos=""),
        size_conversion={980: 8},
    )
    return finish(AriaForConditionalGeneration(config), tokenizer), processor


def chameleon() -> tuple[Any, Any]:
    """Chameleon: a picture as words of the vocabulary, which the model cannot say; no chat template."""
    # Letters stand for the digits of a code.
    codes = [f"IMGIMG{chr(65 + code // 10)}{chr(65 + code % 10)}Z" for code in range(16)]
    tokenizer = make_tokenizer("<racm3:break>", "<eoss>", "<reserved08706>", *codes)
    tokenizer.sep_token = "<reserved08706>"
    config = ChameleonConfig(
        **_text("chameleon", tokenizer),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 32,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map=tokenizer.get_vocab(),
    )
    processor = ChameleonProcessor(
        image_processor=ChameleonImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        image_seq_length=16,
    )
    return finish(ChameleonForConditionalGeneration(config), tokenizer), processor


CROPS: dict[str, Callable[[], tuple[Any, Any]]] = seeded(
    {
        "llava": llava,
        "llava_next": llava_next,
        "llava_onevision": llava_onevision,
        "idefics2": idefics2,
        "idefics3": idefics3,
        "smolvlm": smolvlm,
        "paligemma": paligemma,
        "gemma3": gemma3,
        "mllama": mllama,
        "internvl": internvl,
        "aya_vision": aya_vision,
        "blip-2": blip2,
        "instructblip": instructblip,
        "got_ocr2": got_ocr2,
        "janus": janus,
        "deepseek_vl": deepseek_vl,
        "vipllava": vipllava,
        "cohere2_vision": cohere2_vision,
        "llama4": llama4,
        "ovis2": ovis2,
        "aria": aria,
        "chameleon": chameleon,
    }
)
