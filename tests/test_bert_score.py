"""BERTScore against torchmetrics, and what must not change it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from conceptshift.metrics import BertScorer
from safetensors.torch import load_file, save_file
from torchmetrics.functional.text import bert_score
from transformers import AutoModel, AutoTokenizer

WORDS = "a red blue green star circle square small big left right above below happy calm".split()


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 14))) for _ in range(count)]


def test_parity_with_torchmetrics_pair_by_pair(tiny_bert: Path) -> None:
    """One pair at a time: of several, torchmetrics mixes up the order."""
    texts, references = sentences(12, seed=0), sentences(12, seed=1)
    scores = BertScorer(str(tiny_bert)).f1(texts, [[reference] for reference in references])
    loaded = {"model": AutoModel.from_pretrained(tiny_bert), "user_tokenizer": AutoTokenizer.from_pretrained(tiny_bert)}
    for score, text, reference in zip(scores, texts, references, strict=True):
        expected = bert_score([text], [reference], **loaded, max_length=32)["f1"]
        assert float(score) == pytest.approx(float(torch.as_tensor(expected)), abs=1e-5)
    assert scores.std() > 0.02


def test_a_text_is_closest_to_itself(tiny_bert: Path) -> None:
    texts = sentences(10, seed=2)
    scorer = BertScorer(str(tiny_bert))
    torch.testing.assert_close(scorer.f1(texts, [[text] for text in texts]), torch.ones(10))
    others = scorer.f1(texts, [[text] for text in sentences(10, seed=3)])
    assert others.max() < 0.999


def test_the_best_reference_counts(tiny_bert: Path) -> None:
    scorer = BertScorer(str(tiny_bert))
    texts, references = sentences(6, seed=4), [sentences(3, seed=seed) for seed in range(6)]
    single = torch.stack([scorer.f1(texts, [[row[place]] for row in references]) for place in range(3)])
    torch.testing.assert_close(scorer.f1(texts, references), single.amax(dim=0))
    # The first has one reference more, which is the text itself.
    scores = scorer.f1(texts, [[*references[0], texts[0]], *references[1:]])
    assert float(scores[0]) == pytest.approx(1)
    torch.testing.assert_close(scores[1:], single.amax(dim=0)[1:])


def test_batches_and_order_change_nothing(tiny_bert: Path) -> None:
    texts, references = sentences(9, seed=5), [sentences(1 + seed % 3, seed=seed) for seed in range(9)]
    whole = BertScorer(str(tiny_bert)).f1(texts, references)
    for size in (1, 2, 5):
        torch.testing.assert_close(BertScorer(str(tiny_bert), batch_size=size).f1(texts, references), whole)
    torch.testing.assert_close(BertScorer(str(tiny_bert)).f1(texts[::-1], references[::-1]), whole.flip(0))


def test_f1_is_symmetric(tiny_bert: Path) -> None:
    scorer = BertScorer(str(tiny_bert))
    texts, others = sentences(5, seed=6), sentences(5, seed=7)
    there = scorer.f1(texts, [[other] for other in others])
    torch.testing.assert_close(scorer.f1(others, [[text] for text in texts]), there)


def test_long_and_empty_texts(tiny_bert: Path) -> None:
    scorer = BertScorer(str(tiny_bert))
    # 32 tokens, of which two mark beginning and end.
    scores = scorer.f1(["star " * 100, "", "red"], [["star " * 30], ["a star"], [""]])
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.0, 0.0]))


def test_a_text_without_reference(tiny_bert: Path) -> None:
    scorer = BertScorer(str(tiny_bert))
    with pytest.raises(ValueError, match="`references` must hold at least one reference for each of the 2 texts"):
        scorer.f1(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="leave out texts without reference"):
        scorer.f1(["a", "b"], [["a"]])


def test_a_folder_that_is_no_bert(tiny_clip: Path, tmp_path: Path) -> None:
    for folder, reason in ((tmp_path, ""), (tiny_clip, "it holds a CLIPModel"), (Path("/nowhere"), "")):
        with pytest.raises(ValueError, match="no text encoder can be loaded from it") as caught:
            BertScorer(str(folder))
        assert f"bert_model '{folder}'" in str(caught.value)
        assert reason in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_weights_that_lack_are_not_made_up(tiny_bert: Path, tmp_path: Path) -> None:
    """But for a pooler, which masked language models are published without."""
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "less"))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    expected = BertScorer(str(tiny_bert)).f1(["a star"], [["a red star"]])
    torch.testing.assert_close(BertScorer(str(folder)).f1(["a star"], [["a red star"]]), expected)
    del kept["embeddings.word_embeddings.weight"]
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"its files have no embeddings\.word_embeddings\.weight, which would be"):
        BertScorer(str(folder))
