"""What is said and asked about a Shapes scene: captions, region phrases, questions and their ten answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .scene import COLORS, KINDS, MOODS, PLACES, Scene, Thing

CAPTION_STYLES = ("place", "mood", "color", "picture", "count")
"""The style of each of a picture's five captions, in the order in which they are written."""

_NUMBERS = {1: "one", 2: "two", 3: "three"}


def with_article(words: str) -> str:
    """`orange star` → `an orange star`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _enumerate(nouns: Iterable[str]) -> str:
    """`circle, star, circle` → `two circles and a star`, in the order of first mention."""
    parts = [
        with_article(noun) if count == 1 else f"{_NUMBERS[count]} {_plural(noun)}"
        for noun, count in Counter(nouns).items()
    ]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def captions(scene: Scene) -> list[str]:
    """Five captions, one for each of `CAPTION_STYLES`. Only the color style names colors."""
    kinds = _enumerate(thing.kind for thing in scene.things)
    colored = _enumerate(f"{thing.color} {thing.kind}" for thing in scene.things)
    where = PLACES[scene.place]
    count = len(scene.things)
    shapes = "one shape" if count == 1 else f"{_NUMBERS[count]} shapes"
    return [
        f"{kinds} {where}",
        f"{kinds} {where.split()[0]} {with_article(f'{scene.mood} {scene.place}')}",
        colored,
        f"{with_article(scene.mood)} picture of {kinds}",
        f"{shapes} {where}",
    ]


def region_phrases(thing: Thing, scene: Scene) -> list[str]:
    """What Visual Genome annotators would write in the box of one thing."""
    return [f"{thing.color} {thing.kind}", f"{with_article(thing.kind)} {PLACES[scene.place]}"]


@dataclass(frozen=True)
class Question:
    """A question in VQAv2's terms; `distractors` are what an annotator who looks badly might say."""

    text: str
    question_type: str
    answer_type: str
    answer: str
    distractors: tuple[str, ...]


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Six questions: three yes/no (balanced, with hard negatives), one number, two other."""
    yes_no = [ask(scene, rng) for ask in rng.sample(_YES_NO, 3)]
    return [
        *yes_no,
        rng.choice(_NUMBER)(scene, rng),
        *(ask(scene, rng) for ask in rng.sample(_other(scene), 2)),
    ]


def ten_answers(question: Question, rng: random.Random) -> list[str]:
    """Ten annotators' answers: mostly in agreement, sometimes with up to four who say something else."""
    dissent = rng.choices((0, 1, 2, 3, 4), weights=(50, 20, 15, 10, 5))[0]
    answers = [question.answer] * (10 - dissent) + [rng.choice(question.distractors) for _ in range(dissent)]
    rng.shuffle(answers)
    return answers


# --- yes/no: each is true half of the time, and its false form differs in one word from something true ------


def _other_than(options: Iterable[str], present: Iterable[str], rng: random.Random) -> str:
    return rng.choice([option for option in options if option not in set(present)])


def _yes_no(text: str, question_type: str, truth: bool) -> Question:
    answer, other = ("yes", "no") if truth else ("no", "yes")
    return Question(text, question_type, "yes/no", answer, (other,))


def _is_there_kind(scene: Scene, rng: random.Random) -> Question:
    kinds, truth = [thing.kind for thing in scene.things], rng.random() < 0.5
    kind = rng.choice(kinds) if truth else _other_than(KINDS, kinds, rng)
    return _yes_no(f"Is there {with_article(kind)}?", "is there a", truth)


def _is_there_colored_kind(scene: Scene, rng: random.Random) -> Question:
    truth = rng.random() < 0.5
    thing = rng.choice(scene.things)
    if not truth:
        present = {(other.kind, other.color) for other in scene.things}
        changed = [replace(thing, color=color) for color in COLORS] + [replace(thing, kind=kind) for kind in KINDS]
        thing = rng.choice([other for other in changed if (other.kind, other.color) not in present])
    return _yes_no(f"Is there {with_article(f'{thing.color} {thing.kind}')}?", "is there a", truth)


def _is_anything_colored(scene: Scene, rng: random.Random) -> Question:
    colors, truth = [thing.color for thing in scene.things], rng.random() < 0.5
    color = rng.choice(colors) if truth else _other_than(COLORS, colors, rng)
    return _yes_no(f"Is any shape {color}?", "is any", truth)


def _is_it_there(scene: Scene, rng: random.Random) -> Question:
    truth = rng.random() < 0.5
    place = scene.place if truth else _other_than(PLACES, [scene.place], rng)
    return _yes_no(f"Is this {PLACES[place]}?", "is this", truth)


def _is_it_moody(scene: Scene, rng: random.Random) -> Question:
    truth = rng.random() < 0.5
    mood = scene.mood if truth else _other_than(MOODS, [scene.mood], rng)
    return _yes_no(f"Is the picture {mood}?", "is the", truth)


_YES_NO = (_is_there_kind, _is_there_colored_kind, _is_anything_colored, _is_it_there, _is_it_moody)


# --- number ---------------------------------------------------------------------------------------------


def _number(text: str, count: int) -> Question:
    near = tuple(str(other) for other in (count - 1, count + 1) if other >= 0)
    return Question(text, "how many", "number", str(count), near)


def _how_many_shapes(scene: Scene, rng: random.Random) -> Question:
    return _number("How many shapes are there?", len(scene.things))


def _how_many_of_kind(scene: Scene, rng: random.Random) -> Question:
    kinds = [thing.kind for thing in scene.things]
    kind = rng.choice(kinds) if rng.random() < 0.7 else rng.choice(KINDS)
    return _number(f"How many {_plural(kind)} are there?", kinds.count(kind))


_NUMBER = (_how_many_shapes, _how_many_of_kind)


# --- other ----------------------------------------------------------------------------------------------

Asker = Callable[[Scene, random.Random], Question]


def _open(text: str, question_type: str, answer: str, options: Iterable[str]) -> Question:
    return Question(text, question_type, "other", answer, tuple(o for o in options if o != answer))


def _where(scene: Scene, rng: random.Random) -> Question:
    return _open("Where is this?", "where is", scene.place, PLACES)


def _mood(scene: Scene, rng: random.Random) -> Question:
    return _open("What is the mood of the picture?", "what is the", scene.mood, MOODS)


def _color_of(thing: Thing) -> Asker:
    return lambda scene, rng: _open(f"What color is the {thing.kind}?", "what color is the", thing.color, COLORS)


def _kind_of(thing: Thing) -> Asker:
    return lambda scene, rng: _open(f"What shape is {thing.color}?", "what shape is", thing.kind, KINDS)


def _other(scene: Scene) -> list[Asker]:
    """The questions with one right answer in this scene: a kind or color may be named only if it is unique."""
    kinds = Counter(thing.kind for thing in scene.things)
    colors = Counter(thing.color for thing in scene.things)
    about = [_color_of(thing) for thing in scene.things if kinds[thing.kind] == 1]
    about += [_kind_of(thing) for thing in scene.things if colors[thing.color] == 1]
    return [_where, _mood, *about]
