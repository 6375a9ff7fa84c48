r"""V_golden, the judge of every solve: is the boxed answer the gold answer?

    "… so \boxed{\frac{2}{4}}."  --extract_answer-->  r"\frac{2}{4}"  --equivalent(·, "0.5")-->  True

`equivalent` tries, cheapest first: equal text, choice letter, word, mathematics as `s2r.grade.latex` reads it. Its time is
bounded: a text has at most MAX_CHARS characters and 8 readings. What cannot be read is wrong, never an error.

Rules where graders differ:
- A percent or degree sign is dropped or taken at its word: 10% is 10 and 0.1 (though 10 is not 0.1), 90° is 90 and π/2.
- Decimals are exact: 0.5 is 1/2, 0.33 is not 1/3. Only for a value that no decimal can write (1/3, √2, π) is a decimal
  right that has DECIMAL_DIGITS significant digits and is that value rounded to its last place: 0.333333 is 1/3.
- Units, currency and \text beside mathematics are dropped (5 cm is 5), save a.m. against p.m. An answer may omit the
  base that gold has: 204 is 204_5, but 54 is not.
- (1,2) is ordered, {1,2} is not; a bare list 1,2 equals (1,2) in that order and {1,2} in any. [0,1) is not (0,1).
- 1,000 is a thousand or a list of two, whichever fits; within brackets a comma separates, so (1,000) is a pair.
- x = 5 is 5; y = 2x is 2x - y = 0; x > 3 and x \in (3,\infty) are (3,\infty). "and", "or" and \cup make a list.
- x^2+2x+1 is (x+1)^2: the form asked for (factored, simplified) is not checked. \log is \ln. a is not A.
"""

import re
from fractions import Fraction
from functools import lru_cache
from operator import sub

from s2r.grade.latex import MP, TOLERANCE, Group, Number, Unreadable, apply, columns, is_constant, is_name, read

MAX_CHARS = 1_000  # longest gold answer of MATH: 159
DECIMAL_DIGITS = 6


def extract_answer(text: str) -> str | None:
    r"""Content of the last \boxed{…} or \fbox{…}, or the token after `\boxed `; None if absent, empty or unbalanced."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", text))
    if not boxes:
        return None
    rest = text[boxes[-1].end():]
    if rest.startswith("{"):
        end = _closing_brace(rest)
        return rest[1:end].strip() or None if end else None
    token = re.match(r"-?[\d.,]*\d|\\[A-Za-z]+(?:\{[^{}]*\})*|[A-Za-z]", rest)
    return token.group() if token else None


def equivalent(answer: str | None, gold: str) -> bool:
    """Whether a model's answer is the gold answer, by the rules above. Never raises; None and blank are never right."""
    if not answer or not gold or not answer.strip():
        return False
    if answer == gold:
        return True
    try:
        return max(len(answer), len(gold)) <= MAX_CHARS and _equivalent(answer, gold)
    except (Unreadable, RecursionError):  # the latter only if the caller is itself deep in the stack
        return False


def parsable(gold: str) -> bool:
    """Whether `gold` can be a gold answer: not blank, at most MAX_CHARS long, braces balanced."""
    if not isinstance(gold, str) or len(gold) > MAX_CHARS or _closing_brace("{" + gold + "}") != len(gold) + 1:
        return False
    return re.search(r"\w|\\[a-z{]", _normalise(gold)) is not None


def _closing_brace(text: str) -> int | None:
    r"""Index of the brace that closes the one at text[0]; \{ and \} do not count."""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0 and brace.group() == "}":
            return brace.start()
    return None


@lru_cache(maxsize=1 << 16)
def _equivalent(answer: str, gold: str) -> bool:
    picked, choice = _CHOICE.fullmatch(answer), _CHOICE.fullmatch(gold)
    if picked and choice and picked[1] == choice[1] and not choice[2]:  # (C) 12 picks C
        return True
    if len({match[1].lower() for match in map(_HALF_DAY.search, (answer, gold)) if match}) == 2:
        return False
    answer, gold = _normalise(answer), _normalise(gold)
    if not answer or not gold:
        return False
    if _SPACE.sub("", answer) == _SPACE.sub("", gold):
        return True
    if _WORDS.fullmatch(answer) and _WORDS.fullmatch(gold):  # as products of letters, east would be seat
        return re.sub(r"\W", "", answer).lower() == re.sub(r"\W", "", gold).lower()
    gold = gold if "_" in answer else re.sub(r"^(-?\d[\dA-F.]*)_\d+$", r"\1", gold)
    return any(_same(a, g) or _rounds(answer, g) or _rounds(gold, a)
               for g in _readings(gold) for a in _readings(answer))


# ---- text ------------------------------------------------------------------------------------------------------------

_CHOICE = re.compile(r"\s*(?:\\[a-z]+\s*\{)?\s*\(?([A-Z])(?:[.:)]?\s*\}?|[.:)]\s*\}?(\s.*))\s*", re.DOTALL)
_HALF_DAY = re.compile(r"([ap])\.?\s?m\b", re.IGNORECASE)
_WORDS = re.compile(r"(?=(?:[^A-Za-z]*[A-Za-z]){3})[A-Za-z][A-Za-z\s.'-]*")
_SPACE = re.compile(r"\s+(?!\d)|(?<!\d)\s+")  # all but that between digits
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_TEXT = re.compile(r"\\(?:text[a-z]*|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}(?:\s*\^\s*\{?\d\}?)?")
_UNITS = re.compile(r"(?:(?<=[\d})%°])|(?<=\\pi))"  # at the end, behind a number:
                    r"(?:\s*(?:[cmk]m|[mk]g|gm|ml|lb|oz|ft|in|mi|sq|[ap]\.?m)(?![a-z])[\sa-z/.-]*|"  # 5cm, 5 sq. feet
                    r"\s+[a-z]{3,}[\sa-z/.-]*|"  # 5 dollars per day
                    r"\s\s+[msghL])"  # 5\,m
                    r"(?:\s*\^\s*\{?[23]\}?)?\W*$", re.IGNORECASE)
_UPPER_SIGNS, _LOWER_SIGNS = str.maketrans("±∓", "+-"), str.maketrans("±∓", "-+")
_SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": "<=", "≥": ">=",
    "≠": "!=", "∪": r"\cup ", "∈": r"\in ", "√": r"\sqrt ", "²": "^2", "³": "^3", "º": "°", "∅": r"\emptyset ",
    "，": ",", "（": "(", "）": ")", "£": " ", "€": " ", "¥": " ", "~": "  "})
_REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"\\\\", r"\\newrow "),
    (r"\\left\s*\|", r"\\lvert "), (r"\\right\s*\|", r"\\rvert "),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])\.?|\\[()]|\\\[|\\\]|\\?\$", " "),
    (r"(?<=\d)\s*(?:\{,\}|,\s*\\!|\\[,;: ])\s*(?=\d{3}(?!\d))", ""),  # thousands: 1{,}000  1,\!000  1\,000
    (r"\\!", ""),
    (r"\\[,;:> ]|\\q?quad(?![A-Za-z])|\\phantom\s*\{[^{}]*\}", "  "),
    (r"\\[dtc](frac|binom)", r"\\\1"),
    (r"\\pm(?![A-Za-z])", "±"), (r"\\mp(?![A-Za-z])", "∓"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degrees?(?![A-Za-z])", "°"),
    (r"\\%|(?<=\d)\s*(?:percent\b|\\text\s*\{\s*percent\s*\})", "%"),
    (r"\\(?:text|mbox|mathrm)\s*\{[\s,]*(?:and|or)\s*\}|\b(?:and|or)\b", " , "), (r",(?:\s*,)+", ","),
    (r"\\(?:mathbf|boldsymbol|mathrm|mathit)\s*\{([A-Za-z])\}|\\text\s*\{(\w+)\}(?=_)", r"\1\2"),
    (r"\\(?:overline|overrightarrow|vec|hat|bar|mathbf|boldsymbol)(?![A-Za-z])", " "),
    (r"\\mathbb\s*\{?R\}?", r"(-\\infty,\\infty)"),
    (r"\\begin\s*\{(?:[pbB]|small)?matrix\}|\\begin\s*\{array\}\s*\{[lcr|]*\}", r"\\matrix "),
    (r"(?:\\newrow\s*)?\\end\s*\{(?:[pbB]|small)?(?:matrix|array)\}", r"\\endmatrix "),
    (r"(?<![\w./^}])(\d+)\s*\\frac\s*(\d|\{\d+\})\s*(\d|\{\d+\})", r"(\1+\\frac\2\3)"),  # 1\frac45
    (r"(?<![\d./^_])(\d+)\s+(\d+/\d+)", r"(\1+\2)"),  # 1 4/5
    (r"\\(frac|binom)\s*(\d)", r"\\\1{\2}"),  # \frac12
    (r"_\s*\{(\d+)\}", r"_\1"),
    (r"(\\(?:sin|cos|tan))\s*\^\s*\{\s*-1\s*\}", lambda match: r"\arc" + match[1][1:]),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"\\\{\s*[A-Za-z](?:\s*\\in[^|:]*)?\s*(?:\\mid|\\vert|[|:])", r"\\{"),  # {x | x > 3} is x > 3
    (r"\|([^|]*)\|", r"\\lvert \1\\rvert "),
]]


def _normalise(text: str) -> str:
    """One spelling for what LaTeX spells in many ways; currency, units and spacing commands dropped."""
    text = text.translate(_SYMBOLS)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    bare = _TEXT.sub("  ", text)  # text beside mathematics is a unit or a remark; text alone is the answer
    text = bare if re.search(r"[A-Za-z\d]", bare) else re.sub(r"\b(?:and|or)\b", ",", _TEXT.sub(r" \1 ", text))
    text = re.sub(r"^\s*(?:=|\\approx)|[\s.,;:]+$", "", text)
    return _UNITS.sub("", text).strip()


@lru_cache(maxsize=1 << 14)
def _readings(text: str) -> tuple[Number | Group, ...]:
    """What a normalised text can mean; nothing if it is unreadable."""
    texts = [text]
    if _THOUSANDS.search(text) and not re.search(r"[(\[]|\\\{", text):
        number = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
        texts = [number] if re.search(r",0\d", text) else [number, text]
    if re.search(r"[%°]", text) and not re.search(r"\\?(?:sin|cos|tan|csc|sec|cot)(?![a-z])", text):
        texts += [re.sub("[%°]", "", reading) for reading in texts]
    readings = []
    for reading in texts:
        try:
            value = read(reading.translate(_UPPER_SIGNS))
            if re.search("[±∓]", text):
                upper, lower = (x.items if x.kind in ("list", "set") else (x,)
                                for x in (value, read(reading.translate(_LOWER_SIGNS))))
                value = Group("list", upper + tuple(x for x in lower if x not in upper))
            readings.append(value)
        except Unreadable:
            continue
    return tuple(readings)


# ---- comparison ------------------------------------------------------------------------------------------------------


def _same(a: Number | Group, b: Number | Group) -> bool:
    """Whether values a and b are equal."""
    kinds = {a.kind, b.kind}
    if "=" in kinds and len(kinds) == 2:  # x = 5 is 5
        a, b = (x.items[1] if x.kind == "=" and is_name(x.items[0]) else x for x in (a, b))
        kinds = {a.kind, b.kind}
    if kinds == {"number"}:
        return all(_close(x, y) for x, y in _points(a, b))
    if "number" in kinds or len(a.items) != len(b.items):
        return False
    if kinds <= {"list", "set"}:
        rest = list(b.items)
        for x in a.items:
            match = next((k for k, y in enumerate(rest) if _same(x, y)), None)
            if match is None:
                return False
            del rest[match]
        return True
    return (len(kinds) == 1 or kinds == {"list", "()"}) and (all(map(_same, a.items, b.items)) or _proportional(a, b))


def _close(x, y) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = map(MP.convert, (x, y))
    return x == y or MP.isfinite(x) and MP.isfinite(y) and bool(abs(x - y) <= TOLERANCE * max(1, abs(x), abs(y)))


def _points(a: Number, b: Number) -> list[tuple]:
    """Pairs of values: where both are real, if that is at enough points, as variables mostly mean real numbers."""
    pairs = columns(a, b)
    real = [pair for pair in pairs if not any(x.imag for x in pair)]
    return real if len(real) >= 3 else pairs


def _proportional(a: Group, b: Group) -> bool:
    """Whether left - right of the one is a constant times that of the other: y = 2x is 2x - y = 0."""
    if a.kind not in ("=", "!=", "<", "<=") or {x.kind for x in (*a.items, *b.items)} != {"number"}:
        return False
    pairs = _points(apply(sub, *a.items), apply(sub, *b.items))
    if len(pairs) == 1 or not all(x and y for x, y in pairs):
        return False
    ratios = [x / y for x, y in pairs]
    positive = not ratios[0].imag and ratios[0] > 0
    return (positive or "<" not in a.kind) and all(_close(ratio, ratios[0]) for ratio in ratios)


def _rounds(text: str, value: Number | Group) -> bool:
    """Whether the text is a long enough decimal, and the value, which no decimal can write, rounds to it."""
    decimal = re.fullmatch(r"-?\d*\.(\d+)", text, re.ASCII)
    if not decimal or len(text.lstrip("-0.").replace(".", "")) < DECIMAL_DIGITS or not is_constant(value):
        return False
    x = value.values[0]
    if x.imag or isinstance(x, Fraction) and pow(10, 1_000, x.denominator) == 0:  # a text has fewer decimals
        return False
    return abs(MP.convert(x) - MP.mpf(text)) <= MP.mpf(10) ** -len(decimal[1]) / 2
