"""The Python tokenizer against the Java one: stored outputs, and live where there is a `java`."""

import json
import random
import shutil
from pathlib import Path

import pytest
from conceptshift.metrics import caption_scores, java_tokenize, ptb_tokenize

# Captions of ours and what CoreNLP 3.4.1 made of them through pycocoevalcap 1.2's PTBTokenizer, each followed
# by the caption "and", because the tokenizer looks into the next one.
JAVA_OUTPUTS = [
    ("A man riding a wave on top of a surfboard.", "a man riding a wave on top of a surfboard"),
    ("Two dogs don't want to share the frisbee!", "two dogs do n't want to share the frisbee"),
    ("it's a cat that can't find its owner's keys", "it 's a cat that ca n't find its owner 's keys"),
    ("You cannot park here; they're gonna tow it.", "you can not park here they 're gon na tow it"),
    ("The boys' bikes and James's helmet", "the boys bikes and james 's helmet"),
    ("He should've, could've and wouldn't've.", "he should 've could 've and would n't 've"),
    ("'Tis the season, y'all", "'t is the season y' all"),
    ("’Twas don’t it’s O’Brien’s ma’am", "twas do n't it 's o’brien 's ma’am"),
    ("A black-and-white, seven-year-old t-shirt", "a black-and-white seven-year-old t-shirt"),
    ("3-story 1950's bus from the '50s", "3-story 1950 's bus from the '50s"),
    ("Mr. and Mrs. Smith on 5th Ave.", "mr. and mrs. smith on 5th ave."),
    (
        "At 5 a.m. the U.S. flag is raised. At 6 p.m. it is lowered.",
        "at 5 a.m. the u.s. flag is raised at 6 p.m. it is lowered",
    ),
    ("Apples, pears, etc. on a plate", "apples pears etc. on a plate"),
    ("No. 5 bus stops at St. John's, no.", "no. 5 bus stops at st. john 's no"),
    ("Dr. J. R. Smith vs. Prof. X.", "dr. j. r. smith vs. prof. x."),
    ("Washington D.C. on Dec. 25", "washington d.c. on dec. 25"),
    ("This is plan b. The other is plan c.", "this is plan b the other is plan c."),
    ("a dog., a cat.; the end..", "a dog. a cat. the end"),
    ("1,000 people, 3.5 miles, 10:30 and -5 degrees", "1,000 people 3.5 miles 10:30 and -5 degrees"),
    ("1/2 of a pizza, 3 1/2 cups, ½ and 2⅓", "1/2 of a pizza 3\xa01/2 cups 1/2 and 2 1/3"),
    ("$5.00 or £3 or €4 or 50¢ for 20%", "$ 5.00 or # 3 or $ 4 or 50 cents for 20 %"),
    ("AT&T and R&B and black & white, salt&pepper", "at&t and r&b and black & white salt & pepper"),
    ("either/or, km/h, 24/7, 12/25/2012", "either/or km/h 24/7 12/25/2012"),
    ("\"Hello,\" he said. 'Hi,' she said.", "hello he said hi she said"),
    ("“curly” ‘quotes’ «and» ``latex''", "curly quotes and latex"),
    ("em—dash en–dash two--dash one - dash", "em dash en dash two dash one dash"),
    ("well... what…is . . . this?!", "well what is this ?!"),
    ("WOW!! Really?? No!", "wow !! really ?? no"),
    ("(round) [square] {curly} <angle>", "-lrb- round -rrb- -lsb- square -rsb- -lcb- curly -rcb- <angle>"),
    (":) and :-( and ;) but not :/", ":-rrb- and :--lrb- and ;-rrb- but not /"),
    ("http://www.example.com/a.html and foo.com.", "http://www.example.com/a.html and foo.com"),
    ("me@example.org #sunset @someone", "me@example.org #sunset @someone"),
    ("café, naïve, jalapeño, Zürich", "café naïve jalapeño zürich"),
    ("東京 Пушкин", "東京 пушкин"),
    ("a 👍🏽 and a ❤️ and a ★", "a and a ❤ and a ★"),
    ("20°C ± 1 × 2", "20 ° c ± 1 × 2"),
    ('5\'10" tall and 6" wide', "5 10 tall and 6 wide"),
    ("rock'n'roll, rock 'n' roll, o'clock, c'mon, ma'am", "rock 'n' roll rock 'n' roll o'clock c'mon ma'am"),
    ("IMG_123 photo.jpg 7.jpg c++", "img_123 photo.jpg 7.jpg c++"),
    ("a,b a;b a:b a.b a!b", "a b a b a b a.b a!b"),
    ("call 555-1234 or (555) 123-4567", "call 555-1234 or -lrb-555-rrb-\xa0123-4567"),
    ("  extra   spaces\tand tabs  ", "extra spaces and tabs"),
    ("two\nlines", "two lines"),
    ("…", ""),
    ("", ""),
    ("x", "x"),
    ("ALL CAPS CAN'T STOP MR. T.", "all caps ca n't stop mr. t."),
    ("colour grey theatre favourite", "colour grey theatre favourite"),
    ("gimme lemme wanna gotta Gonna", "gim me lem me wan na got ta gon na"),
    ("</s> <unk> <image> [INST]", "</s> <unk> <image> -lsb- inst -rsb-"),
    ("the dog's's", "the dog 's 's"),
    ("a_b _a_ *bold* ~x~ a^b a|b a\\b", "a_b _ a _ * bold * ~ x ~ a ^ b a | b a \\ b"),
    ("&amp; &lt;b&gt; R&amp;B", "& < b > r&b"),
    ("x\u200bzero\xadwidth", "x zerowidth"),
]

# Sentences made of hard pieces, with Java's output: `make_ptb_hard.py` writes them.
HARD: dict[str, str] = dict(json.loads(Path(__file__).with_name("ptb_hard.json").read_text()))


@pytest.mark.parametrize(("caption", "expected"), JAVA_OUTPUTS)
def test_equals_stored_java_output(caption: str, expected: str) -> None:
    assert ptb_tokenize([caption]) == [expected]


def test_equals_stored_java_output_of_hard_sentences() -> None:
    wrong = {text: (ours, HARD[text]) for text, ours in zip(HARD, ptb_tokenize(list(HARD)), strict=True)}
    wrong = {text: pair for text, pair in wrong.items() if pair[0] != pair[1]}
    assert len(HARD) == 2500
    assert len(wrong) <= 0.001 * len(HARD), list(wrong.items())[:5]


def test_cider_of_hard_sentences_is_that_of_java(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list(HARD)
    predictions = {str(i): text for i, text in enumerate(texts)}
    references = {str(i): [text, texts[i - 1]] for i, text in enumerate(texts)}
    ours = caption_scores(predictions, references, scores=["CIDEr"])["CIDEr"]
    stored = {"java": lambda captions: [HARD[caption] for caption in captions]}
    monkeypatch.setattr("conceptshift.metrics.caption._TOKENIZERS", stored)
    theirs = caption_scores(predictions, references, "java", scores=["CIDEr"])["CIDEr"]
    assert 1 < theirs < 10
    assert abs(ours - theirs) < 1e-3


@pytest.mark.skipif(shutil.which("java") is None, reason="the comparison runs the Java tokenizer")
def test_stored_output_of_hard_sentences_is_what_java_says() -> None:
    chosen = list(HARD)[::5]
    assert _java_alone(chosen) == [HARD[text] for text in chosen]


def _java_alone(captions: list[str]) -> list[str]:
    """The tokenizer looks into the next caption: a neutral one between any two makes them independent."""
    java = java_tokenize([text for caption in captions for text in (caption, "and")])
    assert java[1::2] == ["and"] * len(captions)
    return java[::2]


def test_caption_is_tokenized_on_its_own() -> None:
    captions = [caption for caption, _ in JAVA_OUTPUTS]
    together = ptb_tokenize(captions)
    assert together == [ptb_tokenize([caption])[0] for caption in captions]
    assert ptb_tokenize(captions[::-1]) == together[::-1]
    assert ptb_tokenize([]) == []


def test_degenerate_captions_end() -> None:
    # A model that repeats itself must not hang the validation: each of these took under 0.1 s.
    for unit in ("a", "a-", "a.", "1,", "1 ", "<a ", "((", ". ", "a/", "a@"):
        ptb_tokenize([unit * (4000 // len(unit))])


def test_missing_java_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="needs `java` on the PATH"):
        java_tokenize(["a dog"])


@pytest.mark.skipif(shutil.which("java") is None, reason="the comparison runs the Java tokenizer")
def test_rare_line_breaks_and_empty_captions_shift_nothing() -> None:
    captions = ["a\rb", "", "c\u2028d", "e\x0bf\x0cg", "h\r\ni", "", "…"]
    expected = ["a b", "", "c d", "e f g", "h i", "", ""]
    assert ptb_tokenize(captions) == expected
    assert java_tokenize(captions) == expected


NOUNS = "man dogs bus James cat's train U.S. Horse children sheep café Mr. Smith surfboard T-shirt St. John".split()
ODDITIES = (
    "don't can't it's they're I'm boys' y'all 'em 'tis gonna cannot o'clock rock'n'roll we'd've ma'am don’t it’s "
    "a.m. p.m. U.K. etc. vs. Ave. ave. No. Dec. Ph.D. Jr. D.C. ft. oz. e.g. AT&T R&B B&W h&m "
    "1,000 3.5 1/2 10:30 5pm 50% $5 $4.99 #7 1st 90's '90s 1960s 747 20x30 7-year-old +1 -5 2-3 (5) 5'10\" 6\" "
    "\"red\" 'red' “red” ‘red’ (red) [red] {red} *red* _red_ <red> and/or he/she/it black-and-white "
    "well, then; so: yes. no! what? oh... ah… wow!! eh?! a-- -- - – — & + / ~ "
    "naïve 東京 😀 ❤️ ★ → ½ 20°C £3 €5 http://www.a.com www.b.org me@c.com @you #tag photo.jpg end.The"
).split()


@pytest.mark.skipif(shutil.which("java") is None, reason="the comparison runs the Java tokenizer")
def test_equals_java_on_generated_captions() -> None:
    pick = random.Random(0)
    captions = []
    for _ in range(3000):
        words = [pick.choice(NOUNS if pick.random() < 0.6 else ODDITIES) for _ in range(pick.randint(1, 12))]
        caption = " ".join(words) + pick.choice([".", ".", "", "!", "?", "...", " .", ".'", '."', ",", "\n"])
        captions.append(pick.choice([caption, caption, caption.title(), caption.upper(), caption.lower()]))
    wrong = [
        (caption, ours, theirs)
        for caption, ours, theirs in zip(captions, ptb_tokenize(captions), _java_alone(captions), strict=True)
        if ours != theirs
    ]
    assert not wrong, wrong[:5]
