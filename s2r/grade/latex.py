r"""Reads LaTeX as mathematics: text in, values out. No `eval`, no computer algebra, no syntax tree.

    r"\frac{2x}{4}"  --_TOKEN-->  \frac { 2 x } { 4 }  --_Parser-->  Number: x/2 at 8 fixed points x

The parser computes as it reads. A formula *is* the tuple of its values at fixed points of its variables, and formulas
are equal when those values are; tuples, sets, intervals, matrices and equations are groups of formulas. `s2r.grade`
normalises the text for `read`, bounds its length, and decides which groups are equal.

Time is bounded by construction, so it needs no timer, signal or subprocess: a token is read once, nesting stops at
MAX_DEPTH, and a value is an exact fraction of at most MAX_BITS bits or a float of 200, checked *before* a power,
factorial or binomial is computed. What exceeds a bound is Unreadable.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import comb, factorial
from operator import add, mul, truediv
from zlib import crc32

from mpmath import MPContext

MAX_DEPTH = 30  # nesting; about 13 Python frames each
MAX_BITS = 20_000  # of a numerator plus its denominator; of a float's exponent
POINTS = 8  # the first 3 are positive, for roots and logarithms
TOLERANCE = 2.0**-140  # of floats: leaves 60 of their 200 bits for cancellation
MP = MPContext()  # private, and its precision never changes: that makes it thread-safe
MP.prec = 200


class Unreadable(ValueError):
    """The text is not mathematics that this parser knows, is undefined, or exceeds a bound."""


@dataclass(frozen=True)
class Number:
    """A formula: its value if constant, else its values at POINTS points; each is a Fraction, an mpf or an mpc."""

    values: tuple
    named: bool = False  # x, AB or f(x): what may stand left of "=" in an answer
    kind = "number"


@dataclass(frozen=True)
class Group:
    """kind: list, set, matrix, row, ratio; or the brackets, as "()" or "[)"; or the relations, as "=" or "< <="."""

    kind: str
    items: tuple


def is_constant(value) -> bool:
    return value.kind == "number" and len(value.values) == 1


def is_name(value) -> bool:
    return value.named if value.kind == "number" else value.kind == "()" and all(map(is_name, value.items))


def variable(name: str) -> Number:
    bits = [crc32(f"{name} {k}".encode()) % 9_973 for k in range(POINTS)]
    return Number(tuple(MP.mpf(b + 1 if k < 3 else b - 5_000) / 2_003 for k, b in enumerate(bits)), named=True)


def columns(*numbers: Number) -> list[tuple]:
    """The values at each point; a constant is the same at all of them."""
    size = max(len(x.values) for x in numbers)
    return list(zip(*(x.values * (size // len(x.values)) for x in numbers)))


def apply(function: Callable, *numbers):
    """The function at every point. A number times a matrix is a matrix; other groups have no arithmetic."""
    if function is mul and numbers[1].kind in ("matrix", "row"):
        return Group(numbers[1].kind, tuple(apply(mul, numbers[0], item) for item in numbers[1].items))
    if any(x.kind != "number" for x in numbers):
        raise Unreadable("arithmetic on a group")
    return Number(tuple(_bounded(function, *xs) for xs in columns(*numbers)))


def _bounded(function: Callable, *xs):
    """function(*xs), exact where all are fractions. Raises Unreadable if that is undefined or too large."""
    if not all(isinstance(x, Fraction) for x in xs):
        xs = map(MP.convert, xs)
    try:
        y = function(*xs)
        if not isinstance(y, Fraction) and abs(y.imag) <= abs(y.real) * TOLERANCE:
            y = y.real  # rounding had left a trace of an imaginary part
        if y != y or _bits(y) > MAX_BITS:
            raise OverflowError
        return y
    except (ValueError, ArithmeticError) as error:
        raise Unreadable("undefined or too large") from error


def _bits(x) -> int:
    """Of a fraction, or of the exponent of a float; 0 and infinity have none."""
    if isinstance(x, Fraction):
        return x.numerator.bit_length() + x.denominator.bit_length() - 1
    return 1 + abs(MP.mag(x)) if x and MP.isfinite(x) else 0


def _power(x, y):
    if abs(y) * _bits(x) > MAX_BITS:
        raise OverflowError
    if isinstance(x, Fraction) and isinstance(y, Fraction) and y.denominator == 1:
        return x ** int(y)
    return MP.power(*map(MP.convert, (x, y)))


def _root(x, n):
    if isinstance(n, Fraction) and n % 2 == 1 and not x.imag and x < 0:
        return -_power(-x, 1 / n)  # the real root, not the principal one
    return _power(x, 1 / n)


def _count(x) -> int:
    if isinstance(x, Fraction) and x.denominator == 1 and 0 <= x <= MAX_BITS // 10:
        return int(x)
    raise OverflowError


_FUNCTIONS = {"sin": MP.sin, "cos": MP.cos, "tan": MP.tan, "arcsin": MP.asin, "arccos": MP.acos, "arctan": MP.atan,
              "csc": lambda x: 1 / MP.sin(x), "sec": lambda x: 1 / MP.cos(x), "cot": lambda x: 1 / MP.tan(x),
              "exp": MP.exp, "ln": MP.ln, "log": MP.ln, "lg": lambda x: MP.ln(x) / MP.ln(10)}
_POSTFIX = {"!": lambda x: Fraction(factorial(_count(x))), "%": lambda x: x / 100, "°": lambda x: x * MP.pi / 180}
_BINARY = {r"\frac": truediv, r"\binom": lambda n, k: Fraction(comb(_count(n), _count(k)))}
_CONSTANTS = {r"\pi": Number((+MP.pi,)), r"\infty": Number((MP.inf,)), r"\emptyset": Group("set", ()),
              "e": Number((+MP.e,), named=True), "i": Number((MP.j,), named=True)}

_WORD = re.compile(rf"(?<![\\A-Za-z])({'|'.join(_FUNCTIONS)}|sqrt|pi|infty)(?![A-Za-z])")  # without its backslash
_TOKEN = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4}(?![A-Za-z\d.]))?|\\[A-Za-z]+|\\.|\*\*|[<>!]=|\S", re.ASCII)
_ALIASES = dict(pair.split() for pair in r"""** ^, \cdot *, \times *, \div /, \lt <, \gt >, \le <=, \leq <=,
    \leqslant <=, \ge >=, \geq >=, \geqslant >=, \ne !=, \neq !=, \approx =, \lbrace \{, \rbrace \}, \lbrack [,
    \rbrack ], \langle (, \rangle ), \varnothing \emptyset""".split(","))
_END = "\n"  # what the text is enclosed in
_CLOSING = {_END: [_END], "{": ["}"], "(": [")", "]"], "[": [")", "]"], r"\{": [r"\}"], r"\lvert": [r"\rvert"],
            r"\matrix": [r"\endmatrix"]}
_GROUPS = [("matrix", [r"\newrow"]), ("row", ["&"]), ("list", [",", ";"]),  # kind and separators, loosest first
           ("relation", ["=", "<", ">", "<=", ">=", "!=", r"\in"]), ("set", [r"\cup"]), ("ratio", [":"])]
_ATOM = re.compile(r"(?!\\(?:newrow|endmatrix|rvert|mid|in|cup|cap|begin|end)$)(?:\.?[0-9]|\\?[A-Za-zΑ-ω]|\\?\{|[(\[])")


def read(text: str) -> Number | Group:
    """The value of a text that `s2r.grade` has normalised. Raises Unreadable."""
    return _Parser(text).enclosed(_END)


class _Parser:
    """One method per level of precedence, loosest first: group (itself six levels), sum, product, power, atom."""

    def __init__(self, text: str):
        tokens = _TOKEN.findall(_WORD.sub(r"\\\1", text))
        self.tokens = [*(_ALIASES.get(token, token) for token in tokens), _END]
        self.position = 0
        self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.position]

    def skip(self, *tokens: str) -> str:
        """Takes the next token if it is one of these."""
        token = self.peek()
        self.position += token in tokens
        return token if token in tokens else ""

    def group(self, level: int = 0):
        if level == len(_GROUPS):
            return self.sum()
        kind, separators = _GROUPS[level]
        items, signs = [self.group(level + 1)], []
        while sign := self.skip(*separators):
            signs.append(sign)
            items.append(self.group(level + 1))
        if not signs:
            return items[0]
        if kind == "ratio" and len(items) == 2 and items[1] != Number((Fraction(0),)):  # 5:00 is a time of day
            return apply(truediv, *items)
        return _relate(items, signs) if kind == "relation" else Group(kind, tuple(items))

    def sum(self):
        value = self.signed(self.product)
        while self.peek() in ("+", "-"):
            value = apply(add, value, self.signed(self.product))
        return value

    def signed(self, read_item: Callable):
        """Every nesting passes here, so here its depth is bounded."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        negative = False
        while sign := self.skip("+", "-"):
            negative ^= sign == "-"
        value = read_item()
        self.depth -= 1
        return apply(mul, Number((Fraction(-1),)), value) if negative else value

    def product(self):
        value = self.power()
        while True:
            if self.skip("*"):
                value = apply(mul, value, self.signed(self.power))
            elif self.skip("/"):
                value = apply(truediv, value, self.signed(self.power))
            elif _ATOM.match(self.peek()):
                if self.peek()[0].isdecimal() and self.tokens[self.position - 1][-1].isalnum():
                    raise Unreadable("two numbers, or x2, side by side")
                bracketed, factor = self.peek() == "(", self.power()
                named = is_name(value) and (is_name(factor) or bracketed and is_constant(factor))  # AB, f(x) or f(2)
                value = apply(mul, value, factor)
                value = replace(value, named=True) if named else value
            else:
                return value

    def power(self):
        value = self.atom()
        while mark := self.skip("^", *_POSTFIX):
            value = apply(_power, value, self.signed(self.power)) if mark == "^" else apply(_POSTFIX[mark], value)
        return value

    def atom(self):
        start, token = self.position, self.peek()
        if not _ATOM.match(token):
            raise Unreadable(f"expected a number, a symbol or an opening bracket, found {token!r}")
        self.position += 1
        if token in _CLOSING:
            return self.enclosed(token)
        if token in _BINARY:
            return apply(_BINARY[token], self.signed(self.atom), self.signed(self.atom))
        if token == r"\sqrt":
            index = self.enclosed("[") if self.skip("[") else Number((Fraction(2),))
            return apply(_root, self.signed(self.atom), index)
        if token[1:] in _FUNCTIONS:
            return self.function(token[1:])
        if self.skip("_"):  # x_1, or 12_5: numbers in different bases differ, so their text names them well enough
            self.signed(self.atom)
            return variable("".join(self.tokens[start:self.position]))
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        return variable(token) if token[-1].isalpha() else Number((Fraction(token),))

    def enclosed(self, opening: str):
        """What stands between the bracket just read and the one that closes it."""
        value, closing = self.group(), self.skip(*_CLOSING[opening])
        if not closing or opening + closing in ("(]", "[)") and value.kind != "list":
            raise Unreadable(f"{opening!r} is closed by {self.peek()!r}, or an interval with one end")
        if opening == r"\lvert":
            return apply(abs, value)
        if value.kind == "list" and opening not in ("{", _END):
            return Group("set" if opening == r"\{" else opening + closing, value.items)
        return value

    def function(self, name: str):
        base = self.signed(self.atom) if self.skip("_") else None
        exponent = self.signed(self.atom) if self.skip("^") else None
        bracketed = self.peek() in ("(", "{")
        argument = self.signed(self.atom if bracketed else self.power)
        while not bracketed and _ATOM.match(self.peek()) and self.peek()[1:] not in _FUNCTIONS:  # sin 2x cos y
            argument = apply(mul, argument, self.power())
        value = apply(_FUNCTIONS[name], argument)
        value = apply(truediv, value, apply(MP.ln, base)) if base else value
        return apply(_power, value, exponent) if exponent else value


def _relate(items: list, signs: list[str]):
    """x > 3 as the interval, a = b = c as a = c, and x in S as S."""
    if signs == [r"\in"] and is_name(items[0]):
        return items[1]
    if set(signs) == {"="}:
        return Group("=", (items[0], items[-1]))
    if set(signs) <= {">", ">="}:
        items, signs = items[::-1], [sign.replace(">", "<") for sign in reversed(signs)]
    kind, (first, last) = " ".join(signs), (is_name(x) and not is_constant(x) for x in (items[0], items[-1]))
    ends = [Number((-MP.inf,))] * first + items + [Number((MP.inf,))] * last
    signs = ["<"] * first + signs + ["<"] * last
    if set(signs) <= {"<", "<="} and list(map(is_constant, ends)) == [True, False, True] and is_name(ends[1]):
        return Group("(["[signs[0] == "<="] + ")]"[signs[1] == "<="], (ends[0], ends[2]))
    return Group(kind, tuple(items))
