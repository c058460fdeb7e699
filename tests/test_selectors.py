"""The selector language, on token maps written by hand."""

from __future__ import annotations

import pytest
import torch
from conceptshift.lightning_modules.backbone import Role, Selector, TokenMap
from conceptshift.lightning_modules.backbone.token_map import Word

P, S, V, T, A = Role.PAD, Role.SPECIAL, Role.IMAGE, Role.PROMPT, Role.ANSWER

# Two samples as generation leaves them, padded on the left; the second answer ended one token earlier.
#           0  1  2  3  4  5  6  7  8  9
ROLES = [[S, T, V, V, T, T, A, A, A, S], [P, P, S, V, V, T, A, A, S, P]]
STATES = 9  # the last column was never fed to the model
WORDS = [
    [Word("a", 0, 0), Word("dogs", 1, 2)],
    [Word("dog", 0, 1)],
]


def generated() -> TokenMap:
    roles = torch.tensor(ROLES)
    ids = torch.arange(20).reshape(2, 10)
    return TokenMap(ids, roles, torch.tensor([6, 6]), [[16, 17, 18, 19], [26, 27, 28]], WORDS)


def prompted() -> TokenMap:
    """The same before anything is generated."""
    roles = torch.tensor(ROLES)[:, :6]
    return TokenMap(torch.zeros_like(roles), roles, torch.tensor([6, 6]), [[], []], [[], []])


def read() -> TokenMap:
    """The same with given answers, padded on the right, where a template writes a line break after the end."""
    rows = [[*ROLES[0], A], [*ROLES[1][2:9], A, P, P, P]]
    roles = torch.tensor(rows)
    return TokenMap(torch.zeros_like(roles), roles, torch.tensor([6, 4]), [[16, 17, 18, 19], [26, 27, 28]], WORDS)


def columns(selector: str, token_map: TokenMap, states: int) -> list[list[int]]:
    parsed = Selector.parse(selector)
    return [parsed.columns(token_map, sample, states) for sample in range(2)]


EXPECTED: dict[str, list[list[int]]] = {
    "all": [[0, 1, 2, 3, 4, 5, 6, 7, 8], [2, 3, 4, 5, 6, 7]],
    "prompt": [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5]],
    "last_prompt": [[5], [5]],
    "image": [[2, 3], [3, 4]],
    "text": [[0, 1, 4, 5, 6, 7, 8], [2, 5, 6, 7]],
    # One state for each token of the answer, the end of sequence included.
    "answer": [[5, 6, 7, 8], [5, 6, 7]],
    "answer_mean": [[5, 6, 7], [5, 6]],
    "0": [[0], [2]],
    "4": [[4], [6]],
    "7": [[7], []],
    "-1": [[8], [7]],
    "-2": [[7], [6]],
    "-7": [[2], []],
    "2:4": [[2, 3], [4, 5]],
    "5:": [[5, 6, 7, 8], [7]],
    ":2": [[0, 1], [2, 3]],
    "-3:-1": [[6, 7], [5, 6]],
    "-2:": [[7, 8], [6, 7]],
    ":-4": [[0, 1, 2, 3, 4], [2, 3]],
    "1:-6": [[1, 2], []],
    ":": [[0, 1, 2, 3, 4, 5, 6, 7, 8], [2, 3, 4, 5, 6, 7]],
    "3:3": [[], []],
    "token_of_interest:dogs": [[7], []],
    "token_of_interest:dog": [[], [6]],
    "token_of_interest:DOG": [[], [6]],
    "token_of_interest:do": [[], []],
    "token_class:dog,dogs": [[7], [6]],
    "token_class:Dog,A": [[5], [6]],
    "token_class:colors": [[], []],
}


@pytest.mark.parametrize("selector", EXPECTED)
def test_after_generation(selector: str) -> None:
    assert columns(selector, generated(), STATES) == EXPECTED[selector]


@pytest.mark.parametrize("selector", EXPECTED)
def test_with_given_answers_the_same_states_are_selected(selector: str) -> None:
    shifted = [EXPECTED[selector][0], [column - 2 for column in EXPECTED[selector][1]]]
    assert columns(selector, read(), 11) == shifted


@pytest.mark.parametrize(
    "selector", ["all", "prompt", "last_prompt", "image", "text", "answer", "0", "2:4", "5:", ":", "7"]
)
def test_while_generating_the_same_columns_are_selected(selector: str) -> None:
    """First the whole prompt, then one column at a time. Columns after an end of sequence do not matter."""
    parsed, token_map = Selector.parse(selector), prompted()
    steps = [parsed.mask(token_map, 0, 6), *(parsed.mask(token_map, start, 1) for start in range(6, STATES))]
    mask = torch.cat(steps, dim=1)
    for sample, ended in enumerate((9, 8)):
        selected = [column for column in mask[sample].nonzero().flatten().tolist() if column < ended]
        assert selected == EXPECTED[selector][sample]


@pytest.mark.parametrize("selector", ["token_of_interest:dog", "token_class:colors", "answer_mean", "-1", ":-2"])
def test_what_depends_on_the_answer_cannot_be_applied_before(selector: str) -> None:
    parsed = Selector.parse(selector)
    assert parsed.needs_answer
    with pytest.raises(ValueError, match="depends on the answer"):
        parsed.mask(prompted(), 0, 6)


@pytest.mark.parametrize("selector", ["all", "text", "image", "0", "2:7", ":"])
def test_padding_is_never_selected(selector: str) -> None:
    mask = Selector.parse(selector).mask(generated(), 0, 10)
    assert not (mask & (torch.tensor(ROLES) == P)).any()


@pytest.mark.parametrize(
    "text",
    ["", " ", "alll", "Answer", "answer ", "token_of_interest", "token_of_interest:", "token_class:", "1.5", "1:2:3",
     "--1", "a:b", "answer_mean:dog", "image:3", "⁵"],
)  # fmt: skip
def test_what_is_no_selector(text: str) -> None:
    with pytest.raises(ValueError, match="expected one of all, prompt, last_prompt") as caught:
        Selector.parse(text)
    assert f"selector {text!r}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_word_class_is_named() -> None:
    with pytest.raises(ValueError, match="no word class 'fruits'; there are colors, places, sentiments"):
        Selector.parse("token_class:fruits")


@pytest.mark.parametrize("text", ["token_of_interest:hot dog", "token_class:hot dog,cat"])
def test_what_can_never_be_one_word_is_refused(text: str) -> None:
    """Answers are cut into words at spaces, so that it would silently match nothing."""
    with pytest.raises(ValueError, match="hot dog"):
        Selector.parse(text)


def test_an_empty_answer_has_only_its_end() -> None:
    roles = torch.tensor([[S, T, T, S]])
    token_map = TokenMap(torch.zeros_like(roles), roles, torch.tensor([3]), [[2]], [[]])
    assert Selector.parse("answer").columns(token_map, 0, 3) == [2]
    assert Selector.parse("answer_mean").columns(token_map, 0, 3) == []
    assert Selector.parse("-1").columns(token_map, 0, 3) == [2]
