"""Grounding of concepts in words and in samples."""

import pytest
import torch
from conceptshift.concepts import english_lexicon, english_stop_words, ground_images, ground_words

LEXICON = frozenset({"dog", "dogs", "frisbee", "grass", "cat", "the", "ox"})
STOP_WORDS = frozenset({"the"})


def test_words_come_in_the_order_of_their_logits() -> None:
    vocabulary = ["cat", " dog", "grass", "frisbee"]
    U = torch.tensor([[1.0, 3.0, 2.0, -5.0], [9.0, 0.0, 0.0, 9.5]])
    grounded = ground_words(U, torch.eye(4), vocabulary, words=3, lexicon=LEXICON, stop_words=STOP_WORDS)
    assert grounded == [["dog", "grass", "cat"], ["frisbee", "cat", "dog"]]


def test_tokens_that_are_no_words_are_left_out() -> None:
    vocabulary = [" Dog", "dog", "the", "ox", "xqzt", "gra55", "", "chien", " FRISBEE\n", "çat"]
    U = torch.arange(10.0, 0.0, -1)[None]
    lexicon = {*LEXICON, "gra55", "çat"}
    assert ground_words(U, torch.eye(10), vocabulary, lexicon=lexicon, stop_words=STOP_WORDS) == [["dog", "frisbee"]]


def test_filter_follows_the_choice_of_candidates() -> None:
    vocabulary = ["##", "$$", "dog", "cat"]
    U = torch.tensor([[4.0, 3.0, 2.0, 1.0]])

    def ground(candidates: int, words: int = 10) -> list[list[str]]:
        return ground_words(U, torch.eye(4), vocabulary, None, candidates, words, LEXICON, STOP_WORDS)

    assert ground(2) == [[]]
    assert ground(3) == [["dog"]]
    assert ground(4) == [["dog", "cat"]]
    assert ground(4, words=1) == [["dog"]]


def test_logits_are_the_product_with_the_unembedding() -> None:
    generator = torch.Generator().manual_seed(0)
    unembedding = torch.randn(4, 6, generator=generator)
    U = torch.randn(3, 6, generator=generator)
    vocabulary = ["cat", "dog", "grass", "frisbee"]
    expected = [[vocabulary[i] for i in row] for row in (U @ unembedding.T).argsort(dim=1, descending=True).tolist()]
    assert ground_words(U, unembedding, vocabulary, lexicon=LEXICON) == expected
    # The norm weighs the coordinates, so it may change the order.
    weight = torch.tensor([9.0, -3.0, 0.1, 5.0, -1.0, 2.0])
    order = ((U * weight) @ unembedding.T).argsort(dim=1, descending=True).tolist()
    normed = [[vocabulary[i] for i in row] for row in order]
    assert normed != expected
    assert ground_words(U, unembedding, vocabulary, norm=lambda states: states * weight, lexicon=LEXICON) == normed


def test_norm_runs_in_the_dtype_of_the_model_and_logits_in_float32() -> None:
    norm = torch.nn.LayerNorm(4, dtype=torch.bfloat16)
    # In bfloat16 both logits would round to 256 and tie.
    unembedding = torch.tensor([[256.0, 0, 0, 0], [256.0, 0.5, 0, 0]], dtype=torch.bfloat16)
    U = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert ground_words(U, unembedding, ["cat", "dog"], lexicon=LEXICON) == [["dog", "cat"]]
    assert ground_words(U, unembedding, ["cat", "dog"], norm=norm, lexicon=LEXICON) == [["dog", "cat"]]


def test_ties_go_to_the_smaller_token(monkeypatch: pytest.MonkeyPatch) -> None:
    # Small chunks, so that the tie runs over several of them.
    monkeypatch.setitem(ground_words.__wrapped__.__globals__, "_TOKEN_CHUNK", 2)  # type: ignore[attr-defined]
    vocabulary = ["cat", "dog", "grass", "frisbee", "dogs"]
    grounded = ground_words(torch.ones(1, 5), torch.eye(5), vocabulary, lexicon=LEXICON)
    assert grounded == [vocabulary]


# --- words of several tokens ----------------------------------------------------------------------------

PIECES = [" surf", "board", " dog", "cat", "##", " skate", "grass"]
LONG = frozenset({"surfboard", "skateboard", "surf", "board", "dog", "cat", "grass", "catboard"})
SPANS = {"surfboard": [[0, 1]], "skateboard": [[5, 1]]}


def grounded(
    *logits: float, spans: dict[str, list[list[int]]] = SPANS, candidates: int = 50, words: int = 10
) -> list[str]:
    (found,) = ground_words(
        torch.tensor([logits]), torch.eye(len(PIECES)), PIECES, None, candidates, words, LONG, frozenset(), spans
    )
    return found


def test_a_word_of_several_tokens_ranks_by_the_mean_of_their_logits() -> None:
    #          surf board dog cat  ##  skate grass
    logits = (9.0, 3.0, 7.0, 5.0, 4.0, -9.0, 0.0)
    assert grounded(*logits) == ["dog", "surfboard", "cat", "grass", "skateboard"]
    assert grounded(*logits, candidates=6) == ["dog", "surfboard", "cat", "grass"]


def test_its_sub_tokens_are_not_listed_on_their_own() -> None:
    logits = (9.0, 8.0, 7.0, 5.0, 4.0, -9.0, 0.0)
    assert grounded(*logits, candidates=5) == ["surfboard", "dog", "cat"]
    assert grounded(*logits, candidates=5, spans={}) == ["surf", "board", "dog", "cat"]


def test_a_sub_token_that_is_missing_makes_no_word() -> None:
    """The first sub-token alone is what public code takes for the word."""
    logits = (9.0, -8.0, 7.0, 5.0, 4.0, -9.0, 0.0)
    assert grounded(*logits, candidates=4) == ["surf", "dog", "cat"]


def test_a_word_that_is_not_listed_consumes_nothing() -> None:
    """Neither one of too small a logit nor one that is no admissible word."""
    logits = (9.0, 2.0, 7.0, 6.0, 4.0, -9.0, 0.0)
    assert grounded(*logits, candidates=5, words=3) == ["surf", "dog", "cat"]
    assert grounded(*logits, candidates=5, spans={"surfer": [[0, 1]]}) == ["surf", "dog", "cat", "board"]


def test_the_same_sub_token_may_serve_two_words() -> None:
    assert grounded(9.0, 8.0, 0.0, 0.0, 0.0, 7.0, 0.0, candidates=3) == ["surfboard", "skateboard"]


def test_of_several_ways_to_write_a_word_the_best_counts() -> None:
    logits = (1.0, 8.0, 4.0, 9.0, 0.0, 0.0, 0.0)
    assert grounded(*logits, spans={"surfboard": [[0, 1], [3, 1]]}, candidates=4) == ["surfboard", "dog", "surf"]
    # A word that is listed already takes no part of other words.
    assert grounded(*logits, spans={"cat": [[2, 1]]}, candidates=4) == ["cat", "board", "dog", "surf"]


def test_repeated_sub_tokens_count_as_often_as_they_occur() -> None:
    logits = (6.0, 0.0, 4.1, 3.9, 0.0, 0.0, 0.0)
    assert grounded(*logits, spans={"catboard": [[0, 0, 1]]}, candidates=5)[:2] == ["dog", "catboard"]


def test_installed_lexicon_knows_words_of_pictures() -> None:
    lexicon = english_lexicon()
    assert {"dog", "giraffes", "surfboard", "frisbee", "red", "kitchen"} <= lexicon
    assert not {"xqzt", "ness5", "an", "ity"} & lexicon
    assert all(len(word) >= 3 and word.isascii() and word.isalpha() and word == word.lower() for word in lexicon)
    assert english_lexicon() is lexicon
    assert {"the", "with", "and"} <= english_stop_words()


def test_defaults_use_the_installed_lists() -> None:
    vocabulary = ["the", " Kitchen", "xqzt", "red"]
    assert ground_words(torch.ones(1, 4), torch.eye(4), vocabulary) == [["kitchen", "red"]]


def test_bad_word_grounding() -> None:
    U, W, vocabulary = torch.ones(2, 3), torch.ones(4, 3), ["cat", "dog", "ox", "grass"]
    with pytest.raises(ValueError, match=r"`U` and `unembedding` must have the same width, got 2 and 3"):
        ground_words(U[:, :2], W, vocabulary)
    with pytest.raises(ValueError, match=r"each of the 4 rows of `unembedding`, got 3"):
        ground_words(U, W, vocabulary[:3])
    with pytest.raises(ValueError, match=r"`U` must be finite"):
        ground_words(U * float("nan"), W, vocabulary)
    with pytest.raises(ValueError, match=r"`norm\(U\)` must be finite"):
        ground_words(U, W, vocabulary, norm=lambda states: states / 0)
    with pytest.raises(ValueError, match=r"`candidates` must be at least 1"):
        ground_words(U, W, vocabulary, candidates=0)
    with pytest.raises(ValueError, match=r"`words` must be at least 1"):
        ground_words(U, W, vocabulary, words=0)
    with pytest.raises(ValueError, match=r"`vocabulary` .* is empty"):
        ground_words(U, W, [])
    with pytest.raises(ValueError, match=r"`lexicon` must have .* none of its 0 entries"):
        ground_words(U, W, vocabulary, lexicon=[])
    with pytest.raises(ValueError, match=r"`lexicon` must have .* none of its 2 entries"):
        ground_words(U, W, vocabulary, lexicon=["the", "ox"])
    for span in ([4, 0], [-1, 0], []):
        with pytest.raises(ValueError, match=r"`spans` must name tokens below 4, got .* for 'dogs'"):
            ground_words(U, W, vocabulary, lexicon=LEXICON, spans={"dogs": [span]})


def test_images_of_a_concept_are_the_strongest_rows() -> None:
    V = torch.tensor([[0.1, 0.0], [-0.9, 2.0], [0.5, 2.0], [0.5, -3.0]])
    assert ground_images(V, images=3).tolist() == [[1, 2, 3], [3, 1, 2]]


def test_ties_between_many_images_go_to_the_smaller_row() -> None:
    V = torch.zeros(5000, 2)
    V[4000, 1] = 1.0
    assert ground_images(V).tolist() == [[0, 1, 2, 3, 4], [4000, 0, 1, 2, 3]]


def test_bad_image_grounding() -> None:
    with pytest.raises(ValueError, match=r"at most the number of samples, 4, got 5"):
        ground_images(torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"`images` must be at least 1"):
        ground_images(torch.ones(4, 2), images=0)
    with pytest.raises(ValueError, match=r"`V` must be finite"):
        ground_images(torch.full((6, 2), torch.inf))
