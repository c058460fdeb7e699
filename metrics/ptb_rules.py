r"""The token rules behind `ptb_tokenize`, found by feeding the Java tokenizer and watching what came out.

A rule is a body and an optional lookahead. At each place of the text the rule that reaches furthest wins,
its lookahead counted; the first wins a tie. The body alone is the token.

Legend:
    ALNUM      a letter or digit
    LETTER     a letter, combining mark or soft hyphen
    APOS       a straight or curly apostrophe; ANY_APOS adds the other single quotes
    GAP        a space that a token may contain (it comes back as a no-break space)
    ACRONYM    single letters with periods between them: u.s
"""

import re

# Python counts fractions, superscripts and circled numbers among the letters; the tokenizer does not.
NUMBER_SIGNS = r"\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u2189\u2460-\u24ff\u2776-\u2793"
# Characters beyond the basic plane (emoji, for one) are no letters to it either.
ASTRAL = r"\U00010000-\U0010ffff"
MARKS = (
    r"\u00ad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1"
    r"\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4\u06e7-\u06ed\u0730-\u074c"
    r"\u07a6-\u07b0\u0900-\u0903\u093c\u093e-\u094e\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc\u09be-\u09cd"
    r"\u0a01-\u0a03\u0a3c\u0a3e-\u0a4f\u0b82\u0bbe-\u0bcd\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc"
    r"\u0ec8-\u0ecd"
)
ALNUM = rf"[^\W_{NUMBER_SIGNS}{ASTRAL}]"
LETTER = rf"(?:[^\W\d_{NUMBER_SIGNS}{ASTRAL}]|[{MARKS}])"
LETTER_OR_DIGIT = rf"(?:{ALNUM}|[{MARKS}])"
APOS = r"(?:['\u0092\u2019]|(?i:&apos;))"
CURLY = r"[\u0092\u2019]"
ANY_APOS = r"(?:['\u0092\u2019`\u0091\u2018\u201b]|(?i:&apos;))"
GAP = r"[ \u00a0]"
SPACE = r"[ \t\n\u00a0\u2000-\u200a\u3000]"

WORD = rf"{LETTER}{LETTER_OR_DIGIT}*(?:[.!?]{LETTER}{LETTER_OR_DIGIT}*)*"
ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
# O'Brien, x-o'clock, snake_case: words joined by hyphens or underscores, with an Irish or French prefix.
JOINABLE = rf"(?:[dDoOlL]{ANY_APOS}{ALNUM})?{ALNUM}+"
THING = rf"{JOINABLE}(?:[-_\u058a\u2010\u2011]{JOINABLE})*"
# 7-year-old, 3,000-mile, U.K.-based, anti-U.S.
HYPHENATED = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{ACRONYM}\.|[A-Za-z0-9\u00ad]+))+"
SLASH_PART = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
NUMBER = r"[-+]?(?:\d*(?:[.:,\u00ad\u066b\u066c]\d+)+|\d+)"
REDUCED = rf"(?i:{APOS}(?:[msd]|re|ve|ll))"
NEGATION = rf"(?i:n{ANY_APOS}t)"
EYES, NOSE, MOUTH = r"[<>]?[:;=]", r"[-o*']?", r"[()DPdpO\\{@|\[\]]"
MARK_UP = (
    r"(?:</?[A-Za-z][\w.:-]*\s*/?>|<[!?][A-Za-z-][^>\n]*>"
    r"|<[A-Za-z][\w.:-]*(?:\s+[A-Za-z][\w.:-]*(?:\s*=\s*(?:'[^']*'|\"[^\"]*\"))?)*\s*/?>)"
)
QUOTES = r"`\u0091-\u0094\u00ab\u00bb\u2018\u2019\u201b-\u201d\u2039\u203a"
FILE_TYPES = (
    "bat bmp c cgi class cpp dll docx? exe gif gz h html? jar java jpe?g mov mp3 pdf php pl png ppt ps py sql "
    "tar txt wav x xml zip"
)
URL_END = r"[^\s\"<>|.!?(){},-]"
URL_PATH = rf"/[^\s\"<>|(){{}}]+{URL_END}"

# Abbreviations keep their period, in any case of letters: titles even before a letter ("mr.x") ...
TITLES = (
    "[a-z] adj adm adv alex assoc asst attys? ave brig capt cf cie cmdr col comdr cpl dept det drs? elec ens ft "
    "gen govs? hon insp invt jos lieut lt maj messrs mlle mme mrs? ms msgr mt natl pfc ph pres profs? pvt reps? "
    "rev sens? sfc sgt spc ste? supts? treas vs wm"
)
# ... the others not before two or more ("etc.xy"), ...
ABBREVIATIONS = (
    "al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext "
    "feb fla fri ga inc ind intl jan jr jul jun kans? ky ltd mar md mich minn mon? mont neb nev nov oct okla "
    "penn plc rd rt sept? seq sq sr sys tel tenn thu thurs tues? univ va vt wed wisc? wyo"
)
# ... these only with a capital, or not in capitals throughout, and these only before a number.
CASED_ABBREVIATIONS = (
    "A(?i:rk|z) D(?i:el) I(?i:ll) L(?i:a) M(?i:ass|iss) O(?i:re) P(?i:a) T(?i:ex) W(?i:ash) "
    "[Mm]fg [Mm]tg [Pp]pty [Pp]pte [Pp]tes? [Pp]tys?"
)
NUMBERED_ABBREVIATIONS = "art ca figs? nos? op pp prop"
# After a single letter and a period these words start a sentence, and the period is no part of the token.
SENTENCE_STARTS = (
    "a about according additionally after an as at but earlier he her here however if in it last many more "
    "now once one other our she since so some such that the their then there these they this we what when "
    r"while yet you mr\. ms\."
)
APOSTROPHE_WORDS = (
    "'em 'till? 'cause [ldj]' ol' somethin' dunkin' cap'n c'est ev'ry [eo]'er li'l nat'l ne'er nor'easter o'o s'mores"
).replace("'", APOS)
# Single characters that come back as tokens; any other that is neither letter nor digit vanishes.
SYMBOLS = (
    r"#-&*+/;-@\\^_|~\u00a1\u00a5-\u00a9\u00ac\u00ae-\u00b1\u00b4\u00b6-\u00b8\u00bf\u00d7\u00f7\u037e\u0387"
    r"\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4"
    r"\u0964\u0965\u0e3f\u0e4f\u2016\u2017\u201a\u201e\u201f-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044"
    r"\u207a-\u207e\u208a-\u208e\u20a4\u2100\u2101\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118\u211e-\u2123"
    r"\u2125\u2127\u2129\u212e\u213a\u213b\u2140-\u2144\u214a-\u214d\u214f\u2155-\u215e\u2190-\u2bff"
    r"\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
)


def _any(words: str) -> str:
    """Return a group that matches any of the space-separated patterns."""
    return f"(?:{'|'.join(words.split())})"


def _rule(body: str, ahead: str = "") -> re.Pattern[str]:
    """Compile a rule: its first group is the token, what follows the group is the lookahead."""
    return re.compile(f"({body}){ahead}")


RULES = (
    # Words, and what an apostrophe cuts off or leaves on.
    _rule(WORD, REDUCED),
    _rule("[A-Za-z]*[A-MO-Za-mo-z]", NEGATION),
    _rule(WORD),
    _rule(f"[A-HJ-XZn]{ANY_APOS}{LETTER}{{2,}}"),
    _rule(f"{LETTER}+[aeiouyAEIOUY]{ANY_APOS}[aeiouA-Z]{LETTER}*"),
    _rule(REDUCED, "[^A-Za-z]"),
    _rule(REDUCED.replace("['", "[")),
    _rule(NEGATION, "[^A-Za-z]"),
    _rule(f"[yY]{APOS}", LETTER),
    _rule("'[tT]", "(?i:is|was)"),
    _rule(f"{APOS}[nN]{APOS}|{CURLY}[nN]"),
    _rule(f"{APOS}[nN]", r"[ \t\n\u00a0]"),
    _rule(f"(?i:{_any(APOSTROPHE_WORDS)}|c'mon)"),
    _rule(rf"{APOS}[2-9]0[sS]"),
    _rule(rf"{APOS}\d\d", SPACE),
    _rule(rf"(?:(?i:{_any(ABBREVIATIONS)})|{_any(CASED_ABBREVIATIONS)})\.", r"[\s\S]{2}"),
    # Chains of words, numbers and codes.
    _rule(THING),
    _rule(HYPHENATED),
    _rule(rf"{SLASH_PART}(?:/{SLASH_PART}){{1,2}}"),
    _rule(rf"(?:{WORD}|{THING}|{HYPHENATED})\.", r"[,;:\u3001]"),
    _rule(r"[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+"),
    _rule(r"(?i:c\+\+|[cf]#|pro-|anti-|s&p-500|s&ls|c\.d\.s|-[lr][rcs]b-)"),
    _rule(NUMBER),
    _rule(rf"(?:\d{{1,4}}(?:-|{GAP}))?\d{{1,4}}[/\u2044]\d{{1,4}}"),
    _rule(
        rf"(?:\(\d{{2,3}}\){GAP}?|(?:\+\+?)?(?:\d{{2,4}}(?:-|{GAP}))?\d{{2,4}}(?:-|{GAP}))"
        rf"\d{{3,4}}(?:-|{GAP})?\d{{3,5}}"
    ),
    _rule(r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}"),
    _rule(r"[A-Z]*\$"),
    _rule(r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    # Abbreviations.
    _rule(rf"{ACRONYM}\.|(?i:ed|ph)\.[dD]\."),
    _rule(rf"(?i:{_any(TITLES)})\."),
    _rule(rf"(?i:{_any(NUMBERED_ABBREVIATIONS)})\.", rf"{SPACE}?\d"),
    _rule("[A-Za-z]", rf"\.{SPACE}+(?:(?=[A-Z])(?i:{_any(SENTENCE_STARTS)}){SPACE}|{MARK_UP}{SPACE})"),
    # The web and its mark-up.
    _rule(rf"(?i:https?)://[^\s\"<>|(){{}}]+{URL_END}"),
    _rule(rf"(?i:www)\.(?:[^\s\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}(?:{URL_PATH})?"),
    _rule(rf"(?:[^\s\"`'<>|!(){{}}$,-_]+\.)+(?i:com|net|org|edu)(?:{URL_PATH})?"),
    _rule(r"<?[a-zA-Z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+>?"),
    _rule(rf"{ALNUM}+(?:\.{ALNUM}+)*\.(?i:{_any(FILE_TYPES)})", rf"(?:{SPACE}|[.?!,])"),
    _rule(r"@[A-Za-z_][A-Za-z0-9_]*"),
    _rule(rf"#{LETTER}+"),
    _rule(MARK_UP),
    _rule(r"&(?:(?i:amp|lt|gt|quot|nbsp|mdash)|#\d+);"),
    # Faces.
    _rule(EYES + NOSE + MOUTH, "[^A-Za-z0-9]"),
    _rule(r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)"),
    # Punctuation.
    _rule(r"\.{3,5}|(?:\.[ \u00a0]){2,4}\."),
    _rule(r"--+|\*+|_+|@+|#+|[?!]+|<<|>>|''|``|(?i:&apos;)|(?:\\\*){1,3}"),
    _rule(f"[{QUOTES}]{{2}}"),
    _rule(r"\S"),
)
