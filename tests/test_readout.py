"""The readout: any final norm as numbers, words of several tokens, and the same words with and without the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.callbacks.parts.grounding import GroundingOptions, words_of
from conceptshift.concepts import english_lexicon, ground_words
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.norm_form import NormForm
from conceptshift.lightning_modules.backbone.readout import Readout, word_spans
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

D = 48


# --- the final norm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "centered", "offset"),
    [
        (lambda: LlamaRMSNorm(D, eps=1e-6), False, 0),
        (lambda: GemmaRMSNorm(D, eps=1e-5), False, 1),
        (lambda: nn.RMSNorm(D, eps=1e-5), False, 0),
        (lambda: nn.LayerNorm(D), True, 0),
        (lambda: nn.LayerNorm(D, bias=False), True, 0),
        (lambda: nn.LayerNorm(D, elementwise_affine=False), True, 0),
        (lambda: CohereLayerNorm(D), True, 0),
        (lambda: NemotronLayerNorm1P(D), True, 1),
        (lambda: OlmoLayerNorm(D), True, 0),  # tells no eps
    ],
)
def test_norms_of_all_kinds_are_found(
    make: Callable[[], nn.Module], centered: bool, offset: float, dtype: torch.dtype
) -> None:
    module = make().to(dtype)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data += 0.4 * torch.randn(D, generator=generator).to(dtype)
    form = NormForm.of(module, D, dtype)
    assert form is not None
    assert (form.centered, form.offset) == (centered, offset)
    states = torch.randn(20, D, generator=generator, dtype=torch.float32).mul(5).add(2).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(form(states), module(states), rtol=tolerance, atol=tolerance)


def test_a_norm_of_no_known_form() -> None:
    class Odd(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).tanh()

    assert NormForm.of(Odd(D), D, torch.float32) is None


# --- words of several tokens ----------------------------------------------------------------------------

PIECES = ["▁", "▁surf", "surf", "board", "▁dog", "dog", "▁s", "now", "man", "▁frisbee", "f", "r", "i", "s", "b", "e"]
LEXICON = ["surfboard", "snowman", "dog", "frisbee", "zebra", "surf"]


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer that, like LLaMA's, writes blanks into its pieces and puts one before every text."""
    scores = [("<unk>", -100.0), *((piece, -1.0 / len(piece)) for piece in PIECES)]
    model = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=False))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")


class Slow:
    """A tokenizer without a fast one inside."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.batch_decode = tokenizer.batch_decode

    def __call__(self, texts: list[str], add_special_tokens: bool) -> Any:
        return self._tokenizer(texts, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, Slow])
def test_spans_of_sentencepiece(wrap: Callable[[Any], Any]) -> None:
    tokenizer = sentencepiece()
    vocabulary = [str(tokenizer.decode([token])) for token in range(len(tokenizer))]
    spans = word_spans(wrap(tokenizer), vocabulary, LEXICON)
    pieces = {word: [tokenizer.convert_ids_to_tokens(span) for span in ways] for word, ways in spans.items()}
    # After a space there is a blank token first, which says nothing. A word with an unknown part is no span.
    assert pieces == {"surfboard": [["▁surf", "board"]], "snowman": [["▁s", "now", "man"]]}
    assert tokenizer.tokenize(" surfboard") == ["▁", "▁surf", "board"]


def test_spans_of_a_byte_level_tokenizer(shared_backbone: VisionLanguageModel) -> None:
    """Every sequence decodes to its word, and is what the tokenizer makes of it."""
    tokenizer, vocabulary = shared_backbone.tokenizer, shared_backbone.vocabulary
    words = sorted(english_lexicon())[::97]
    spans = word_spans(tokenizer, vocabulary, words)
    assert len(spans) > 0.9 * len(words)
    for word, ways in spans.items():
        assert len(ways) <= 2
        for span in ways:
            assert len(span) > 1
            assert tokenizer.decode(span).strip() == word
            assert span in [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word, f" {word}")]
    several = [word for word in words if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) > 1]
    assert set(several) <= set(spans)


def test_spans_do_not_meddle_with_the_tokenizer(shared_backbone: VisionLanguageModel) -> None:
    tokenizer = shared_backbone.tokenizer
    plain = word_spans(tokenizer, shared_backbone.vocabulary, ["surfboards", "stars"])
    padded = tokenizer(["a", "a star and a moon"], padding=True)["input_ids"]
    assert (
        word_spans(tokenizer, shared_backbone.vocabulary, ["surfboards", "stars", "ox"])["surfboards"]
        == (plain["surfboards"])
    )
    assert tokenizer(["a", "a star and a moon"], padding=True)["input_ids"] == padded


# --- stored and live ------------------------------------------------------------------------------------


def concepts(model: VisionLanguageModel) -> Tensor:
    weight = model.unembed.weight
    assert isinstance(weight, Tensor)
    return torch.randn(12, weight.shape[1], generator=torch.Generator().manual_seed(0)) * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("site", ["lm.block.1", "lm.norm"])
def test_stored_and_live_words_are_the_same(tiny: Path, tmp_path: Path, dtype: str, site: str) -> None:
    model = VisionLanguageModel.load(str(tiny), dtype=dtype)
    live = Readout.from_model(model)
    live.save(tmp_path)
    stored = Readout.load(tmp_path)
    assert stored.unembedding.dtype == live.unembedding.dtype == getattr(torch, dtype)
    assert torch.equal(stored.unembedding, live.unembedding)
    assert (stored.vocabulary, stored.spans) == (live.vocabulary, live.spans)
    assert stored.weights_hash == model.weights_hash()
    U, options = concepts(model), GroundingOptions(candidates=40)
    words = words_of(stored, U, site, options)
    assert words == words_of(live, U, site, options)
    assert len({tuple(row) for row in words}) > 6
    # The model's own norm says the same where nothing is rounded.
    norm = None if site == "lm.norm" else model.final_norm
    if dtype == "float32":
        with torch.inference_mode():
            assert words == ground_words(
                U, live.unembedding, model.vocabulary, norm=norm, candidates=40, spans=live.spans
            )


def test_the_final_norm_can_be_asked_for(shared_backbone: VisionLanguageModel) -> None:
    readout = Readout.from_model(shared_backbone)
    assert readout.norm is not None
    U = concepts(shared_backbone)
    # A norm weighs the coordinates; that of a new model does not, so this one is made to.
    weighed = Readout(
        readout.unembedding, readout.vocabulary, readout.spans, lambda x: x * torch.linspace(-3, 3, 64), "hash"
    )
    plain, normed = (words_of(weighed, U, "lm.norm", GroundingOptions(norm=norm)) for norm in (False, True))
    assert plain == words_of(weighed, U, "lm.norm", GroundingOptions())
    assert plain != normed
    assert normed == words_of(weighed, U, "lm.block.0", GroundingOptions())
    assert plain == words_of(weighed, U, "lm.block.0", GroundingOptions(norm=False))


def test_a_norm_that_cannot_be_stored(shared_backbone: VisionLanguageModel, tmp_path: Path) -> None:
    readout = Readout.from_model(shared_backbone)
    odd = Readout(readout.unembedding, readout.vocabulary, readout.spans, torch.tanh, readout.weights_hash)
    odd.save(tmp_path)
    stored = Readout.load(tmp_path)
    U = concepts(shared_backbone)
    assert words_of(stored, U, "lm.norm", GroundingOptions()) == words_of(readout, U, "lm.norm", GroundingOptions())
    with pytest.raises(ValueError, match=r"words of 'lm\.block\.1', a site before the final norm, need the model"):
        words_of(stored, U, "lm.block.1", GroundingOptions())


def test_states_of_another_width_have_no_words(shared_backbone: VisionLanguageModel) -> None:
    readout = Readout.from_model(shared_backbone)
    assert words_of(readout, torch.ones(2, 7), "vision.block.0", GroundingOptions()) == [[], []]


@pytest.mark.parametrize("name", ["readout.safetensors", "vocabulary.parquet", "spans.parquet"])
def test_a_damaged_readout(shared_backbone: VisionLanguageModel, tmp_path: Path, name: str) -> None:
    Readout.from_model(shared_backbone).save(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=name):
        Readout.load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=name):
        Readout.load(tmp_path)


# --- options --------------------------------------------------------------------------------------------


def test_lists_of_words(shared_backbone: VisionLanguageModel, tmp_path: Path) -> None:
    readout = Readout.from_model(shared_backbone)
    U = concepts(shared_backbone)
    (tmp_path / "words.txt").write_text("Circle\n\n  star \nmoon\n")
    (tmp_path / "stop.txt").write_text("moon\n")
    lexicon, stop_words = str(tmp_path / "words.txt"), str(tmp_path / "stop.txt")
    options = GroundingOptions(candidates=400, lexicon=lexicon, stop_words=stop_words)
    for words in words_of(readout, U, "lm.norm", options):
        assert set(words) == {"circle", "star"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"words": 0}, r"grounding\.words must be at least 1, got 0"),
        ({"candidates": -3}, r"grounding\.candidates must be at least 1"),
        ({"images": 0}, r"grounding\.images must be at least 1"),
        ({"lexicon": "/no/where.txt"}, r"grounding\.lexicon /no/where\.txt: cannot be read"),
        ({"stop_words": "empty.txt"}, r"grounding\.stop_words empty\.txt: has no word"),
    ],
)
def test_bad_options(option: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match=message):
        GroundingOptions(**option).check()
