r"""V_golden, the judge of every solve: is the boxed answer the gold answer?

    "… so \boxed{\frac{2}{4}}."  --extract_answer-->  r"\frac{2}{4}"  --equivalent(·, "0.5")-->  True

`equivalent` tries, cheapest first: equal text, Python literal (where gold is one), choice letter, word, time of day,
mathematics as `latex.py` reads it. Its time is bounded: a text has at most MAX_CHARS characters and four readings. What
cannot be read is wrong, never an error.

An answer has one meaning. Where it is ambiguous, gold decides; the answer never decides how gold is read. Where graders
differ:
- 10% is 0.1 for a gold in (0, 1], else 10; 90° is 90 for a rational gold, else π/2; and 0.1 and 10 are a gold of 10%.
- Decimals are exact: 0.5 is 1/2, 0.33 is not 1/3. A value that no decimal can write (1/3, √2, π) equals a decimal
  of DECIMAL_DIGITS significant digits or more if that is the value, rounded to its last place: 0.333333 is 1/3.
- Words after a number are dropped (5 cm is 5), save those of _DECIDING; a letter is a variable: 3s is not 3.
- An answer may omit the base that gold has: 204 is 204_5, but 54 is not. 9:24 is a time if gold is one, else a ratio.
- (C) 12 is C, and also 12. If another capital letter follows, it is neither.
- (1,2) is ordered, {1,2} is not; a bare list 1,2 equals (1,2) in that order and {1,2} in any. [0,1) is not (0,1).
- 1,000 is a thousand, or what gold's comma means; with a space, 1, 000 is a list.
- x = 5 and f(2) = 5 are 5; y = 2x is 2x - y = 0; x = 1, y = 2 is (1,2); x > 3 and x \in (3,\infty) are (3,\infty).
- a = b = c ≈ d is c: the last exact member counts. x^2+2x+1 is (x+1)^2, \log is \ln, a is not A.

Answer and gold may change places, but for percent and degree signs, bases, thousands, choices and Python literals.
"""

import ast
import re
from fractions import Fraction
from functools import lru_cache
from itertools import starmap
from operator import sub

from s2r.grade.latex import MP, Group, Number, Unreadable, apply, close, columns, is_constant, is_name, read
from s2r.grade.spelling import spell

MAX_CHARS = 1_000  # longest gold answer of MATH: 159
DECIMAL_DIGITS = 6


def extract_answer(text: str) -> str | None:
    r"""Content of the last \boxed{…} or \fbox{…}, or the token after `\boxed `; None if absent, empty or unbalanced."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", text))
    if not boxes:
        return None
    rest, depth = text[boxes[-1].end():], 0
    if rest.startswith("{"):
        for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} do not count
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                return rest[1 : brace.start()].strip() or None
        return None
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
    """Whether `gold` can be a gold answer: something readable, at most MAX_CHARS long, braces balanced."""
    if not isinstance(gold, str) or len(gold) > MAX_CHARS or extract_answer(rf"\boxed{{{gold}}}") != gold.strip():
        return False
    return re.search(r"\w|\\[a-z{]", spell(gold)) is not None or _CODE.search(gold) is not None


_CHOICE = re.compile(  # (C), with or without the option's text, in which every capital letter begins a word
    r"\s*(?:\\[a-z]+\s*\{)?(?:(?:[Oo]ption|[Cc]hoice)\s+)?(?:\\[a-z]+\s*\{)?\s*\(?([A-Z])(?:[.:)]{0,2}\s*\}?|"
    r"[.:)]{1,2}\s*\}?((?:\\?\s|~|\\[,;:]|\\q?quad\b)(?:(?![A-Z](?![a-z])).)*))\s*",
    re.DOTALL)
_CODE = re.compile(
    r"""(?:^|[\[({,:]\s*)(['"]).*\1|^\s*\{[^{}]+:.*\}\s*$|^\s*[\[({][\s,\[\](){}]*$|^\s*\[[^\[\],;]*\]\s*$""", re.DOTALL)
_DECIDING = re.compile(  # words that answer and gold must share
    r"\b((?i:at\s+(?:least|most)|(?:more|less|fewer|greater|smaller|larger)\s+than|or\s+(?:more|less|fewer|greater)|not|"
    r"none|never|minus|negative|squared|cubed|factorial|hal(?:f|ves)|tenths|below|odd|even|(?:north|south)(?:east|west)?|east|west)|"
    r"[Nn]o)\b")
_OPPOSED = re.compile(r"\b(left|right|above|below|increase|decrease|profit|loss|prime|composite|maximum|minimum|from now|ago)\b")
_SIGNS = str.maketrans("±∓", "+-"), str.maketrans("±∓", "-+")
_SPACE = re.compile(r"\s(?![\d.,])|(?<![\d.,])\s")  # all but that within numbers and lists of numbers
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_TIME = re.compile(r'(\d{1,2}):([0-5]\d)(?::([0-5]\d))?(?:\s*"([ap])m")?|(\d{1,2})\s*"([ap])m"')
_WORDS = re.compile(  # x-y is none
    r"(?=(?:[^A-Za-z]*[A-Za-z]){3})[A-Za-z](?:[A-Za-z\s.']|(?<=[A-Za-z]{3})-(?=[A-Za-z]{3}))*")


@lru_cache(maxsize=1 << 16)
def _equivalent(answer: str, gold: str) -> bool:
    if _CODE.search(gold):  # strings, dicts, empty brackets and lists of one element, of Python
        return _literal(answer) == _literal(gold)
    picked, choice = _CHOICE.fullmatch(answer), _CHOICE.fullmatch(gold)
    if picked and choice and picked[1] == choice[1] and not choice[2]:
        return True
    answer = spell(picked[2] if picked and picked[2] else answer)
    gold = spell(choice[2] if choice and choice[2] else gold)
    if not answer or not gold:
        return False
    a, g = (_SPACE.sub("", " ".join(re.sub('^"([^"]*)"$', r"\1", text).split())) for text in (answer, gold))
    if a == g:
        return True
    said, wanted = ([word.lower() for word in _DECIDING.findall(text)] for text in (answer, gold))
    side, other = ([word.lower() for word in _OPPOSED.findall(text)] for text in (answer, gold))
    if said != wanted or side and other and side != other:
        return False
    if _WORDS.fullmatch(a) and _WORDS.fullmatch(g):  # as products of letters, abc would be bca
        return re.sub(r"[^\w-]", "", a).lower() == re.sub(r"[^\w-]", "", g).lower()
    times = _TIME.fullmatch(answer), _TIME.fullmatch(gold)
    if all(times):
        same = {(int(t[1] or t[5]), int(t[2] or 0), int(t[3] or 0)) for t in times}
        return len(same) == 1 and len({t[4] or t[6] for t in times} - {None}) < 2
    if times[1] and re.search(':0|:.*"', gold):
        return False
    gold = gold if "_" in answer else re.sub(r"^(-?\d[\dA-F.]*)_\{?\d+\}?$", r"\1", gold)
    return any(_same(a, g) or _rounds(answer, g) or _rounds(gold, a)
               for g in _readings(gold, True) for a in _readings(answer, False))


def _literal(text: str):
    """The value of a Python literal, nothing of it executed; another text without the spaces that do not count."""
    text = re.sub(r"\\([{}_])", r"\1", re.sub(r"^\s*\\text[a-z]*\{(.*)\}\s*$", r"\1", text, flags=re.DOTALL)).strip()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return re.sub(r"\s*([,:\[\](){}])\s*", r"\1", text.replace('"', "'"))


@lru_cache(maxsize=1 << 14)
def _readings(text: str, gold: bool) -> tuple[Number | Group, ...]:
    """What a spelled text can mean, an answer one thing only; nothing if it is unreadable."""
    texts = [text]
    if _THOUSANDS.search(text) and not re.search(r"[(\[]|\\\{", text):
        number = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
        texts = [number, text] if gold and not re.search(r",0\d", text) else [number]
    readings = []
    for reading in texts:
        try:
            if "±" not in reading and "∓" not in reading:
                readings.append(read(reading))
            elif not re.search("±[^,]*±", reading):  # do the signs of ±1±2 belong together? each reader has an answer
                upper, lower = (read(reading.translate(table)) for table in _SIGNS)
                upper, lower = (x.items if x.kind in ("list", "set") else (x,) for x in (upper, lower))
                readings.append(Group("list", upper + tuple(x for x in lower if x not in upper)))
        except Unreadable:
            # What stands right of "=" is enough, as in gcd(12,18) = 6.
            if last := re.fullmatch(r"(?!.*(?:\\ne|!))[^,;<>]*=([^=]*)", reading):
                readings += _readings(last[1], gold)
    return tuple(readings)


def _same(a: Number | Group, g: Number | Group) -> bool:
    """Whether an answer's value is gold's."""
    if (a.kind == "=") != (g.kind == "="):  # x = 5 is 5
        a, g = (x.items[1] if x.kind == "=" and is_name(x.items[0]) else x for x in (a, g))
        return "=" not in (a.kind, g.kind) and _same(a, g)
    kinds = {a.kind, g.kind}
    if "list" not in kinds:  # 0 < x < 1 is (0,1), but the list 0, 1 is not
        kinds = {kind.replace("~", "") for kind in kinds}
    if kinds == {"number"}:
        return any(all(close(x, y) for x, y in pairs) and pairs for pairs in starmap(_points, _as_gold_has_it(a, g)))
    if "number" in kinds or len(a.items) != len(g.items):
        return False
    if kinds <= {"list", "set"}:
        rest = list(g.items)
        for x in a.items:
            if (found := next((y for y in rest if _same(x, y)), None)) is None:
                return False
            rest.remove(found)
        return True
    if kinds == {"="} and all(is_name(x.items[0]) and x.items[0].kind == "number" for x in (a, g)):
        if any(x.items[0].name.endswith(")") for x in (a, g)):  # f(x) = 2x is y = 2x
            return _same(a.items[1], g.items[1])
    return (len(kinds) == 1 or kinds == {"list", "()"}) and (all(map(_same, a.items, g.items)) or _proportional(a, g))


def _as_gold_has_it(a: Number, g: Number) -> list[tuple[Number, Number]]:
    """The pairs to compare when one of two numbers has a percent or degree sign and the other has not."""
    if bool(a.sign) == bool(g.sign):
        return [(a, g)]
    drop = {"%": lambda x: x * 100, "°": lambda x: x * 180 / MP.pi}[a.sign or g.sign]
    if g.sign:
        return [(a, g), (a, apply(drop, g))]
    x = g.values[0]
    kept = is_constant(g) and (0 < abs(x) <= 1 if a.sign == "%" else not isinstance(x, Fraction))
    return [(a if kept else apply(drop, a), g)]


def _points(a: Number, b: Number) -> list[tuple]:
    """Pairs of values: where both are real, if that is at enough points, as variables mostly mean real numbers.

    Empty if two formulas have fewer than 3 points at which both are defined.
    """
    every = columns(a, b)
    pairs = [pair for pair in every if all(x == x for x in pair)]
    if len(pairs) < min(3, len(every)):
        return []
    real = [pair for pair in pairs if not any(x.imag for x in pair)]
    if len(real) < 3 or (a.strict or b.strict) and any(bool(x.imag) != bool(y.imag) for x, y in pairs):
        return pairs
    return real


def _proportional(a: Group, b: Group) -> bool:
    """Whether left - right of the one is a constant times that of the other: y = 2x is 2x - y = 0."""
    if a.kind not in ("=", "!=", "<", "<=") or {x.kind for x in (*a.items, *b.items)} != {"number"}:
        return False
    differences = [apply(sub, *x.items) for x in (a, b)]
    if any(all(close(x, difference.values[0]) for x in difference.values) for difference in differences):
        return False  # 3 = 4 and x = x hold nowhere or everywhere
    pairs = [tuple(map(MP.convert, pair)) for pair in _points(*differences)]
    if not pairs or not all(x and y for x, y in pairs):
        return False
    ratios = [x / y for x, y in pairs]
    positive = not ratios[0].imag and ratios[0].real > 0
    return (positive or "<" not in a.kind) and all(close(ratio, ratios[0]) for ratio in ratios)


def _rounds(text: str, value: Number | Group) -> bool:
    """Whether the text is a long enough decimal, and the value, which no decimal can write, rounds to it."""
    decimal = re.fullmatch(r"(-?\d*\.(\d+))(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?(-?\d{1,3})\}?)?", text, re.ASCII)
    digits = len(decimal[1].lstrip("-0.").replace(".", "")) if decimal else 0
    if digits < DECIMAL_DIGITS or not is_constant(value):
        return False
    x = value.values[0]
    if x.imag or isinstance(x, Fraction) and pow(10, 1_000, x.denominator) == 0:  # a text has fewer decimals
        return False
    scale = MP.mpf(10) ** int(decimal[3] or 0)
    units = abs(MP.convert(x) / scale - MP.mpf(decimal[1])) * 10 ** len(decimal[2])  # of the last place
    return units <= (0.5 if digits < 15 else 1)  # the shortest text of a float may be one off
