"""Writes `ptb_hard.json`: sentences that are hard to tokenize, and what the Java tokenizer makes of each.

Run it with a `java` on the PATH: `python tests/make_ptb_hard.py`. The same seed gives the same sentences.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from conceptshift.metrics import java_tokenize

SENTENCES = 2500
OUT = Path(__file__).with_name("ptb_hard.json")

WORDS = (
    "a the man woman dogs red bus street table sitting riding is are with near two James Paris London Smith it he "
    "they cat surfboard blue T-shirt Tuesday I in on of and"
).split()
# What comes in captions, questions and the text of pictures, and has a rule of its own somewhere.
HARD = {
    "abbreviation": (
        "Mr. Mrs. Ms. Dr. Prof. St. Ave. Blvd. Rd. Jr. Sr. Inc. Ltd. Co. Corp. No. no. Fig. fig. p. pp. "
        "vs. etc. e.g. i.e. "
        "a.m. p.m. A.M. P.M. U.S. U.S.A. U.K. U.N. D.C. L.A. N.Y. Ph.D. B.A. M.D. Jan. Feb. Mar. Apr. Jun. Jul. Aug. "
        "Sept. Oct. Nov. Dec. Mon. Tues. Wed. Thurs. Fri. Sat. Sun. ft. in. oz. lb. lbs. min. max. "
        "approx. dept. est. "
        "Mt. Ft. Gen. Gov. Sen. Rep. Rev. Capt. Lt. Sgt. Calif. Mass. Penn. Tex. Va. Wash. J. J.R. J.R.R. a.k.a. "
        "P.S. R.I.P. v. vol. cm. km. mph. sq. ext. tel. Messrs. Esq. Bros. et al."
    ).split(),
    "contraction": (
        "don't can't won't isn't it's he's they're we've I'm I'd you'll let's that's who's y'all ain't shouldn't've "
        "should've would've o'clock ma'am 'em 'tis 'twas 'cause 'til 'n' rock'n'roll cannot gonna wanna gotta gimme "
        "lemme c'mon d'oh dogs' James' James's boss's kids's O'Brien D'Angelo L'Oreal DON'T IT'S Can't "
        "WON'T cant dont "
        "its' 's 're don’t it’s he’ll I’m dogs’ ’em ‘tis ’90s y’all whatcha more'n d'ye"
    ).split(),
    "quote": (
        '"STOP" \'stop\' “STOP” ‘stop’ ``stop\'\' «stop» ‹stop› "stop," "stop." \'stop.\' "stop". '
        "“stop.” \"a 'b' c\" "
        "\" ' '' `` ` “ ” ‘ ’ \"\" 5\" 6' 5'10\" 'a \"the 'the the' the\""
    ).split(),
    "number": (
        "1 12 123 1,000 10,000,000 1.5 .5 0.75 1,5 1.000,50 1/2 3/4 1 1/2 2 3/4 ½ 1½ ⅓ ¼ 1st 2nd 3rd 4th "
        "21st 1990s 1990's "
        "'90s 90s 747 A380 B-52 F-16 4x4 2x 20x30 3D 2-3 10-12 -5 +5 +1-555 #1 #12 No.1 no.5 1. 2) (3) "
        "3.14.15 1.2.3.4 "
        "555-1234 555-123-4567 (555) 1-800-FLOWERS 12345-6789 0-0 3:2 100% 50%-off 1e5 2^3 x2 ①  ² m² "
        "H2O CO2 5k 10K 1M"
    ).split(" "),
    "unit": (
        "20°C 68°F 45° 5ft 5ft. 6in 10cm 10-cm 100km/h 60mph 12oz 12oz. 2lbs 3kg 500g 1GB 5mm f/2.8 "
        "1/250 50mm 12V 60Hz "
        '10m² 5µm 3" 12"x12" 6\'2 8x10 24/7 7-inch 3-story two-story 10-year-old 30-mile 9-to-5'
    ).split(),
    "bracket": (
        "(red) [red] {red} <red> ( ) [ ] { } < > (red [red red) red] ((red)) (a.k.a. (left) (2) [1] "
        "[sic] (red). (red), "
        "(s) dog(s) f(x) :( :) :-) ;) :D :P :-P :o :/ =) <3 ^_^ -_- T_T xD (: >_< :'( ¯\\_(ツ)_/¯ "
        "<b>bold</b> <br/> <img> "
        "<!-- --> </s> <unk> &lt;b&gt;"
    ).split(),
    "hyphen": (
        "black-and-white t-shirt seven-year-old well-known x-ray e-mail co-op - -- --- – — red-blue "
        "red--blue red–blue "
        "red—blue red - blue pre-1990 non-U.S. anti- -like U.S.-based 50-50 A-B a-b-c mid-air mother-in-law self- "
        "half-eaten up-close ‐ ‑ red‐blue _ __ a_b _a_ ~ ~5 -a -A --flag o-o ----- ------"
    ).split(),
    "time": (
        "10:30 5pm 5p.m. 5 p.m. 10:30am 10:30 a.m. 12:00:00 7:45PM 24:00 9-5 9am-5pm 9:00-17:00 1:1 "
        "3.30pm noon 2014-05-06 "
        "12/25/2012 12/25 25.12.2012 6-7-08 Dec.25 May 5, Jan.1 1999-2000 '99 ’99 99' 20th-century mid-1990s"
    ).split(" "),
    "currency": (
        "$5 $5.00 $1,000 $5M $ 5 5$ US$5 A$5 C$ HK$ £3 £3.50 €4 4€ €4,50 ¥500 ₹100 50¢ ¢50 ₤5 ₽ ₩ ฿ $$ $$$ $5-$10 "
        "$.99 -$5 ($5) $5/day 99c"
    ).split(" "),
    "address": (
        "http://www.a.com https://a.org/b?c=d&e=f http://a.b/c. www.example.com www.a.co.uk example.com "
        "example.com/path "
        "a.net b.org. foo.edu x.io foo.com, me@example.com first.last@a.co.uk <me@a.com> @user @user_1 @ #tag #Tag1 "
        "#1tag ## @@ photo.jpg photo.JPG a.b.html image.png. script.py IMG_1234.jpg c:\\a.txt /usr/bin a/b/c and/or "
        "his/her w/ w/o c/o km/h b/w n/a N/A 1/2/3 // http:// ftp://a.b mailto:me@a.com Yahoo! Yahoo!'s"
    ).split(),
    "unicode": (
        "café naïve jalapeño Zürich São crème brûlée Ærø Łódź İstanbul ß ﬁsh ＡＢＣ 東京 寿司 Пушкин "
        "Ελλάδα שלום مرحبا हिन्दी ไทย 한국 "
        "😀 👍🏽 ❤️ ❤ ★ ☆ → ← ✓ ✔ ♥ ♫ ☺ • · … ‥ † ‡ § ¶ © ® ™ ° ± × ÷ ≠ ≤ ≥ ∞ √ π µ Ω ª º ¿ ¡ ¿Qué? "
        "¡Hola! ‰ № ℃ ½-mile e\u0301 a\u00adb "
        "a\u200bb a\u00a0b \u200b \ufeff \u2009 \u3000 cafe\u0301 ａ １ ， 。 、 「東京」 （東京）"
    ).split(" "),
    "end": (
        "end.The end.the end. . .. ... .... ..... . . . … ! !! !!! ? ?? ?! !? ?!? .! .? ., ,. ;. a. b. "
        'A. I. x. Z. 5. end.) end." end.\' end!" end?)'
    ).split(),
    "odd": (
        ", ; : ,, ;; :: a,b a;b a:b a, b ,a & && AT&T R&B B&W a&b A&b M&M's Q&A S&P H&M &amp; R&amp;B &quot;a&quot; "
        "&nbsp; &apos;s it&apos;s &#39; * ** *red* + ++ C++ C# F# .NET = == a=b / \\ | || a|b % ^ ~ ` ´ "
        "¨ $ # @ !a ?a a!b "
        "a?b a.b a..b a...b x,y,z [INST] <image> \u0092s \u0085 \u0096 ||| ☎ ➔ a' b'c 'a a'' s' S'"
    ).split(),
}
ENDS = [
    ".",
    ".",
    ".",
    "",
    "",
    "!",
    "?",
    "...",
    " .",
    '."',
    '".',
    ".'",
    ").",
    ",",
    ":",
    ";",
    " ...",
    "…",
    "!!",
    "?!",
    " -",
    "\n",
]


def sentence(pick: random.Random) -> str:
    """Some plain words with some hard pieces among them, now and then written together."""
    pieces = []
    for _ in range(pick.randint(2, 9)):
        pieces.append(pick.choice(WORDS) if pick.random() < 0.5 else pick.choice(HARD[pick.choice(list(HARD))]))
    text = pieces[0]
    for piece in pieces[1:]:
        text += pick.choice([" "] * 30 + ["", "  ", ", ", "-", "/"]) + piece
    text += pick.choice(ENDS)
    return pick.choice([text] * 5 + [text.upper(), text.lower(), text.capitalize()])


def sentences() -> list[str]:
    """The sentences, each once."""
    pick = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < SENTENCES:
        found[sentence(pick)] = None
    return list(found)


def java_outputs(texts: list[str]) -> list[str]:
    """What Java makes of each; the neutral text after each keeps the tokenizer from looking into the next."""
    outputs = java_tokenize([text for pair in texts for text in (pair, "and")])
    assert outputs[1::2] == ["and"] * len(texts)
    return outputs[::2]


if __name__ == "__main__":
    texts = sentences()
    pairs = sorted(zip(texts, java_outputs(texts), strict=True))
    lines = ",\n".join(json.dumps(pair) for pair in pairs)
    OUT.write_text(f"[\n{lines}\n]\n", encoding="ascii")
