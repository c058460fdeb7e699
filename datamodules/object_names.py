"""How texts name objects: the classes of a data set, their synonyms and plurals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

# COCO's classes with other ways to say them, in the singular. A word that means two classes is in neither, and none is
# here that mostly means something else.
_SYNONYMS = {
    "person": "human, man, woman, child, boy, girl, kid, baby, toddler, infant, adult, teenager, teen, youth, lady, "
    "gentleman, guy, gal, dude, someone, somebody, pedestrian, passenger, driver, rider, cyclist, bicyclist, biker, "
    "motorcyclist, skier, snowboarder, skateboarder, skater, surfer, swimmer, runner, jogger, player, athlete, batter, "
    "catcher, umpire, referee, goalie, spectator, tourist, traveler, shopper, customer, worker, farmer, fisherman, "
    "officer, policeman, policewoman, cop, soldier, sailor, fireman, firefighter, pilot, chef, waiter, waitress, "
    "bartender, vendor, student, teacher, doctor, nurse, dentist, cowboy, clown, jockey, bride, groom, businessman, "
    "businesswoman, mother, father, mom, dad, son, daughter, brother, sister, husband, wife, grandmother, grandfather",
    "bicycle": "bike, tricycle",
    "car": "automobile, sedan, suv, minivan, hatchback, taxi, cab, jeep, limousine",
    "motorcycle": "motorbike, motor bike, motor cycle, scooter, moped, dirt bike",
    "airplane": "aeroplane, air plane, plane, aircraft, jet, jetliner, airliner, biplane, passenger jet, "
    "passenger plane",
    "bus": "minibus, double decker",
    "train": "locomotive, tram, subway train, steam engine, passenger train, train car",
    "truck": "lorry, pickup, fire engine",
    "boat": "ship, sailboat, rowboat, canoe, kayak, yacht, ferry, raft, gondola, motorboat, speedboat, tugboat",
    "traffic light": "traffic signal, stoplight, stop light",
    "fire hydrant": "hydrant, fireplug, fire plug",
    "bench": "pew",
    "bird": "pigeon, seagull, gull, duck, duckling, goose, swan, parrot, parakeet, cockatoo, owl, eagle, hawk, "
    "vulture, sparrow, finch, robin, dove, crow, rooster, hen, peacock, pelican, flamingo, ostrich, heron, stork, "
    "penguin, hummingbird, woodpecker",
    "cat": "kitten, kitty, feline, tabby",
    "dog": "puppy, pup, canine, doggy, poodle, labrador, terrier, bulldog, pug, dachshund, beagle, collie, dalmatian",
    "horse": "pony, stallion, mare, foal, colt",
    "sheep": "lamb, ewe, ram",
    "cow": "cattle, bull, calf, ox, heifer, bovine",
    "bear": "grizzly, panda",
    "backpack": "back pack, rucksack, knapsack",
    "umbrella": "parasol",
    "handbag": "hand bag, purse, pocketbook",
    "tie": "necktie, neck tie, bow tie, bowtie",
    "suitcase": "suit case, briefcase, luggage",
    "frisbee": "flying disc, flying disk",
    "skis": "ski",
    "snowboard": "snow board",
    "sports ball": "ball, baseball, basketball, football, volleyball",
    "baseball bat": "bat",
    "baseball glove": "glove, mitt",
    "skateboard": "skate board, longboard",
    "surfboard": "surf board, bodyboard, body board, paddle board",
    "tennis racket": "tennis racquet, racket, racquet",
    "wine glass": "wineglass, glass of wine, goblet",
    "cup": "mug, teacup",
    "spoon": "teaspoon, tablespoon",
    "banana": "plantain",
    "sandwich": "burger, hamburger, cheeseburger",
    "orange": "tangerine, clementine",
    "hot dog": "hotdog, frankfurter, bratwurst, chili dog, corn dog",
    "donut": "doughnut",
    "cake": "cupcake, cheesecake",
    "chair": "armchair, highchair, recliner, stool",
    "couch": "sofa, loveseat, settee, futon",
    "potted plant": "plant, houseplant, house plant, pot plant",
    "bed": "mattress, crib",
    "dining table": "table, desk",
    "toilet": "urinal",
    "tv": "television, monitor, flatscreen, flat screen",
    "laptop": "macbook",
    "mouse": "computer mouse",
    "remote": "remote control, game controller",
    "cell phone": "cellphone, mobile phone, phone, telephone, smartphone, smart phone, iphone",
    "microwave": "microwave oven",
    "oven": "stove, toaster oven",
    "sink": "washbasin, wash basin",
    "refrigerator": "fridge, freezer",
    "book": "textbook, notebook, paperback",
    "clock": "clock tower",
    "scissors": "scissor, shears",
    "teddy bear": "teddy, stuffed bear, stuffed animal, toy bear",
    "hair drier": "hairdrier, hair dryer, hairdryer, blow dryer",
    "toothbrush": "tooth brush",
}

# What has the words of a class and names nothing of it.
_OTHER_THINGS = """home plate, train track, train station, bus stop, bus station, bus lane, car park, cat food,
    dog food, dog house, dog park, bird house, bird cage, bird feeder, bird bath, horse trailer, toilet paper,
    mouse pad, orange juice, apple juice, carrot cake, banana bread, cake stand, ball park, ball field, baseball field,
    baseball game, baseball cap, baseball uniform, baseball diamond, football field, football game, basketball court,
    book shelf, book case, book bag, table cloth, table top, boat house, boat dock, bike rack, bike path, bike lane,
    ski lift, ski slope, ski resort, ski lodge, ski pole, pizza box, pizza cutter, pizza pan, bottle opener, chair lift,
    cup holder, knife block, power plant, phone booth, driver side, oven mitt, at bat, baseball player, baseball team,
    baseball stadium, football player, football team, football stadium, basketball player,
    basketball team, basketball game"""

# The young and the grown of these are no persons.
_ANIMALS = frozenset("bird cat dog horse sheep cow elephant bear zebra giraffe".split())
_AGES = ("baby", "adult", "mother")

_PLURALS = {
    "person": ("people", "persons"),
    "human": ("humans",),
    "child": ("children",),
    "mouse": ("mice",),
    "goose": ("geese",),
    "ox": ("oxen",),
    "calf": ("calves",),
    "knife": ("knives",),
    "wife": ("wives",),
    "glass of wine": ("glasses of wine",),
    **dict.fromkeys(("sheep", "aircraft", "cattle", "luggage", "broccoli", "scissors", "shears", "skis"), ()),
}
_WORD = re.compile(r"[^\W_]+")
_PAIRS = frozenset({"scissors", "skis"})
_MASSES = frozenset({"broccoli"})
_AN = re.compile(r"(?!uni|use|uti|uku|eu|one\b)[aeiou]|hour", re.IGNORECASE)


class ObjectNames:
    """Finds in texts which classes of objects they name.

    A text is cut at everything but letters and digits, case does not count, and of the phrases that begin at a word the
    longest counts: a hot dog is no dog. What a word means there is not asked: an orange cat names an orange, too, as in
    the published counts of hallucinations (arXiv 1809.02156).

    Args:
        synonyms: Class → other ways to say it, in the singular. The class itself is always one.

    Raises:
        ValueError: A word is to stand for two classes, or has no letters.
    """

    def __init__(self, synonyms: Mapping[str, Iterable[str]]) -> None:
        self.categories = tuple(synonyms)
        singular: dict[str, str] = {}
        for category, others in synonyms.items():
            for phrase in map(_plain, (category, *others)):
                other = singular.setdefault(phrase, category)
                if not phrase or other != category:
                    why = f"it stands for {other!r}; leave it out of one" if phrase else "it has no letters"
                    raise ValueError(f"{phrase!r} cannot stand for {category!r}: {why}")
        forms = {phrase: (phrase, *_plurals(phrase)) for phrase in singular}
        # What is given comes before plurals: glasses may be a class beside glass.
        stands_for = {form: category for phrase, category in singular.items() for form in forms[phrase]} | singular
        words: dict[str, dict[str, None]] = {category: {} for category in synonyms}
        for phrase, category in singular.items():
            words[category] |= {form: None for form in forms[phrase] if stands_for[form] == category}
        self._words = {category: tuple(of_class) for category, of_class in words.items()}
        self._phrases: dict[tuple[str, ...], str | None] = {}
        for other in map(_plain, _OTHER_THINGS.split(",")):
            self._phrases |= {tuple(form.split()): None for form in (other, *_plurals(other))}
        for category in self.categories:
            ages = ("", *_AGES) if category in _ANIMALS else ("",)
            for form in self._words[category]:
                self._phrases |= {tuple(f"{age} {form}".split()): category for age in ages}
        self._longest = max(map(len, self._phrases))

    @classmethod
    def from_categories(cls, categories: Sequence[str], synonyms: Path | None = None) -> ObjectNames:
        """The names of a data set's classes.

        COCO's classes have synonyms built in; any other class stands for itself.

        Args:
            categories: The classes.
            synonyms: A JSON or YAML file, class → list of words, which take the place of those built in.

        Raises:
            ValueError: The file is none of that kind, names a class that is not there, or gives a word to two classes.
        """
        given = {} if synonyms is None else _read(synonyms)
        if unknown := [category for category in given if category not in categories]:
            raise ValueError(f"{synonyms}: no class {unknown[0]!r}; the data have {', '.join(categories)}")
        taken = {_plain(word) for words in (categories, *given.values()) for word in words}
        built_in = {name: [_plain(word) for word in words.split(",")] for name, words in _SYNONYMS.items()}
        try:
            return cls(
                {
                    name: given.get(name, [word for word in built_in.get(name, []) if word not in taken])
                    for name in categories
                }
            )
        except ValueError as error:
            raise ValueError(f"{synonyms or 'names of classes'}: {error}") from error

    def named(self, text: str) -> list[str]:
        """The classes that a text names, in the order of their first mention."""
        return list(dict.fromkeys(category for category, _ in self.mentions(text)))

    def mentions(self, text: str) -> Iterator[tuple[str, int]]:
        """Every mention of a class in a text, in order: the class, and the index of the mention's last character."""
        found = list(_WORD.finditer(text.lower()))
        words = [word.group() for word in found]
        at = 0
        while at < len(words):
            lengths = range(min(self._longest, len(words) - at), 0, -1)
            length = next((length for length in lengths if tuple(words[at : at + length]) in self._phrases), 0)
            category = self._phrases.get(tuple(words[at : at + length]))
            at += max(length, 1)
            if category is not None:
                yield category, found[at - 1].end() - 1

    def words(self, category: str) -> tuple[str, ...]:
        """All ways to say a class, in lower case: itself, its plural, then its synonyms, each with its plural."""
        return self._words[category]

    def strict(self, category: str) -> tuple[str, ...]:
        """The ways to say a class by its own name: itself, and its plural."""
        name = _plain(category)
        return tuple(form for form in (name, *_plurals(name)) if form in self._words[category])


def with_article(name: str) -> str:
    """`apple` → `an apple`, `scissors` → `a pair of scissors`."""
    if name in _MASSES:
        return name
    if name in _PAIRS:
        return f"a pair of {name}"
    return f"{'an' if _AN.match(name) else 'a'} {name}"


def _plain(phrase: str) -> str:
    """In lower case, with single spaces between the words."""
    return " ".join(_WORD.findall(phrase.lower()))


def _plurals(phrase: str) -> tuple[str, ...]:
    if phrase in _PLURALS:
        return _PLURALS[phrase]
    *before, last = phrase.split() or [""]
    if before:
        return tuple(" ".join([*before, plural]) for plural in _plurals(last))
    if last.endswith("man"):
        return (f"{last[:-2]}en",)
    if re.search(r"[^aeiou]y$", last):
        return (f"{last[:-1]}ies",)
    return (f"{last}es" if re.search(r"(s|x|z|ch|sh)$", last) else f"{last}s",)


def _read(path: Path) -> dict[str, list[str]]:
    """Class → words, from a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror}); is --data.init_args.synonyms right?") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: neither JSON nor YAML; is --data.init_args.synonyms right?") from error
    lists = isinstance(content, dict) and all(
        isinstance(words, list) and all(isinstance(word, str) for word in words) for words in content.values()
    )
    if not lists:
        raise ValueError(f'{path}: expected lists of words by class, as in {{"person": ["man", "woman"]}}')
    return {str(category): words for category, words in content.items()}
