r"""Reads LaTeX as mathematics: text in, values out. No `eval`, no computer algebra, no syntax tree.

    r"\frac{2x}{4}"  --_TOKEN-->  \frac { 2 x } { 4 }  --_Parser-->  Number: x/2 at 12 fixed points x

The parser computes as it reads. A formula *is* the tuple of its values at fixed points of its variables; tuples, sets,
intervals, matrices and equations are groups of formulas. `spelling.py` prepares the text, `judge.py` compares values.

Time is bounded by construction, so it needs no timer, signal or subprocess: a token is read once, nesting stops at
MAX_DEPTH, and a value is an exact fraction of at most MAX_BITS bits or a float of 480, checked *before* a power,
factorial or binomial is computed. What exceeds a bound is Unreadable, as is every command that is not listed here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import factorial
from operator import add, mul, sub, truediv
from zlib import crc32

from mpmath import MPContext

MAX_DEPTH = 30  # nesting; about 13 Python frames each
MAX_BITS = 20_000  # of a numerator plus its denominator; of a float's exponent
POINTS = 12  # 0 to 2 are positive, for roots and logarithms; 3 to 9 have any sign; 10 and 11 lie far out on either side
TOLERANCE = 2.0**-360  # relative, of floats: leaves 120 of their 480 bits for cancellation
MP = MPContext()  # private, and its precision never changes: that makes it thread-safe
MP.prec = 480


class Unreadable(ValueError):
    """The text is not mathematics that this parser knows, is undefined, or exceeds a bound."""


@dataclass(frozen=True)
class Number:
    """A formula: its value if constant, else its values at POINTS points.

    A value is a Fraction, an mpf or an mpc, and nan where the formula is undefined or too large.
    """

    values: tuple
    name: str = ""  # of x, AB or f(x): what may stand left of "=" in an answer
    sign: str = ""  # "%" or "°" if the whole formula is a number of percent or degrees
    strict: bool = False  # has |…| or a root: where this one is real, the other formula must be too, and the reverse
    kind = "number"


@dataclass(frozen=True)
class Group:
    """kind: list, set, matrix, row, ratio; brackets, as "()", or "[~)" for an inequality; or relations, as "=" or "< <="."""

    kind: str
    items: tuple


def is_constant(value) -> bool:
    return value.kind == "number" and len(value.values) == 1


def is_name(value) -> bool:
    return bool(value.name) if value.kind == "number" else value.kind == "()" and all(map(is_name, value.items))


def variable(name: str) -> Number:
    bits = [crc32(f"{name} {k}".encode()) % 9_973 for k in range(POINTS)]
    near = [MP.mpf(b + 1 if k < 3 else b - 5_000) / 2_003 for k, b in enumerate(bits[:-2])]
    return Number((*near, 25 + MP.mpf(bits[-2]) / 203, -25 - MP.mpf(bits[-1]) / 203), name)


def columns(*numbers: Number) -> list[tuple]:
    """The values at each point; a constant is the same at all of them."""
    size = max(len(x.values) for x in numbers)
    return list(zip(*(x.values * (size // len(x.values)) for x in numbers)))


def close(x, y) -> bool:
    """Whether two values are equal: exactly if both are fractions, else up to rounding."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = map(MP.convert, (x, y))
    return bool(x == y or MP.isfinite(x) and MP.isfinite(y) and abs(x - y) <= TOLERANCE * max(abs(x), abs(y)))


def apply(function: Callable, *numbers):
    """The function at every point. A number times a matrix is a matrix; other groups have no arithmetic."""
    if function is mul and numbers[1].kind in ("matrix", "row"):
        return Group(numbers[1].kind, tuple(apply(mul, numbers[0], item) for item in numbers[1].items))
    if any(x.kind != "number" for x in numbers):
        raise Unreadable("arithmetic on a group")
    first, last = numbers[0].sign, numbers[-1].sign
    sign = {add: first if first == last else "", mul: "" if first and last else first or last,  # 10% + 20%, 2 · 10%,
            truediv: "" if last else first}.get(function, "")  # 10% / 2
    lengths = function in (truediv, abs) and all(x.name.isupper() for x in numbers)  # NO/BO and |AB| are names, too
    values = tuple(_bounded(function, *xs) for xs in columns(*numbers))
    if all(y != y for y in values):
        raise Unreadable("undefined or too large")
    return Number(values, "/".join(x.name for x in numbers) * lengths, sign, any(x.strict for x in numbers))


def _bounded(function: Callable, *xs):
    """function(*xs), exact where all are fractions; nan if that is undefined or too large."""
    if not all(isinstance(x, Fraction) for x in xs):
        xs = [MP.convert(x) for x in xs]
    try:
        y = function(*xs)
        if not isinstance(y, Fraction):
            if function in _CANCELLING and abs(y) <= TOLERANCE * max(map(abs, xs)):
                y = MP.zero  # it cancels, and only a rounding error is left, as in sin π
            if abs(y.imag) <= abs(y.real) * TOLERANCE:
                y = y.real
        return y if _bits(y) <= MAX_BITS else MP.nan
    except (ValueError, ArithmeticError):
        return MP.nan


def _bits(x) -> int:
    """Of a fraction, or of the exponent of a float; 0 and infinity have none."""
    if isinstance(x, Fraction):
        return x.numerator.bit_length() + x.denominator.bit_length() - 1
    return 1 + abs(MP.mag(x)) if x and MP.isfinite(x) else 0


def _power(x, y):
    if abs(y) * _bits(x) > MAX_BITS:
        raise OverflowError
    if isinstance(y, Fraction):
        if y.denominator == 1 and isinstance(x, Fraction):
            return x ** int(y)
        if y.denominator % 2 and y.denominator > 1 and not x.imag and x < 0:  # the real root, not the principal one
            return _power(-x, y) * (-1) ** y.numerator
    return MP.power(*map(MP.convert, (x, y)))


def _factorial(x):
    if abs(x) > MAX_BITS // 10 or isinstance(x, Fraction) and not x == int(x) >= 0:
        raise OverflowError
    return Fraction(factorial(int(x))) if isinstance(x, Fraction) else MP.gamma(x + 1)


FUNCTIONS = {"sin": MP.sin, "cos": MP.cos, "tan": MP.tan, "csc": MP.csc, "sec": MP.sec, "cot": MP.cot, "arcsin": MP.asin,
             "arccos": MP.acos, "arctan": MP.atan, "sinh": MP.sinh, "cosh": MP.cosh, "tanh": MP.tanh, "exp": MP.exp,
             "ln": MP.ln, "log": MP.ln, "lg": MP.log10}
_CANCELLING = {add, sub, *FUNCTIONS.values()} - {MP.exp}  # e^-100 is tiny, and no rounding error
_POSTFIX = {"!": _factorial, "%": lambda x: x / 100, "°": lambda x: x * MP.pi / 180}
_BINARY = {r"\frac": truediv, r"\binom": lambda n, k: _factorial(n) / _factorial(k) / _factorial(n - k)}
_CONSTANTS = {r"\pi": Number((+MP.pi,)), r"\infty": Number((MP.inf,)), r"\emptyset": Group("set", ()),
              "e": Number((+MP.e,), "e"), "i": Number((MP.j,), "i")}
_GREEK = ("alpha|beta|gamma|delta|epsilon|varepsilon|eta|theta|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi|omega|"
          "Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega|ell")
_WORD = re.compile(rf"(?<![\\A-Za-z\"])({'|'.join(FUNCTIONS)}|sqrt|pi|infty)(?![A-Za-z])")  # without its backslash
_TOKEN = re.compile(r'"[^"]*"|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4}(?![A-Za-z\d.]))?|\\[A-Za-z]+|\\.|\*\*|[<>!]=|\S',
                    re.ASCII)
_ALIASES = dict(pair.split() for pair in r"""** ^, \cdot *, \times *, \div /, \lt <, \gt >, \le <=, \leq <=,
    \leqslant <=, \ge >=, \geq >=, \geqslant >=, \ne !=, \neq !=, \lbrace \{, \rbrace \}, \lbrack [,
    \rbrack ], \langle (, \rangle ), \varnothing \emptyset, \sim \approx, \simeq \approx""".split(","))
_END = "\n"  # what the text is enclosed in
_CLOSING = {_END: [_END], "{": ["}"], "(": [")", "]"], "[": [")", "]"], r"\{": [r"\}"], r"\lvert": [r"\rvert"],
            r"\matrix": [r"\endmatrix"]}
_GROUPS = [  # kind and separators, loosest first
    ("matrix", [r"\newrow"]), ("row", ["&"]), ("list", [",", ";", r"\or"]), ("list", [r"\and"]),
    ("relation", ["=", "<", ">", "<=", ">=", "!=", r"\in", r"\approx"]), ("set", [r"\cup"]), ("ratio", [":"])]
_ATOM = re.compile(r"\.?[0-9]|[A-Za-zΑ-ω]|\\?\{|[(\[]|"
                   rf"\\(?:frac|binom|sqrt|lvert|matrix|pi|infty|emptyset|{'|'.join(FUNCTIONS)}|{_GREEK})$")


def read(text: str) -> Number | Group:
    """The value of a text that `spelling.spell` has prepared. Raises Unreadable."""
    return _Parser(text).enclosed(_END)


class _Parser:
    """One method per level of precedence, loosest first: group (all of _GROUPS), sum, product, power, atom."""

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
        start, items, signs = self.position, [self.group(level + 1)], []
        while sign := self.skip(*separators):
            signs.append(sign)
            items.append(self.group(level + 1))
        if not signs:
            return items[0]
        if kind == "ratio" and len(items) == 2:
            return apply(truediv, *items)
        if kind == "relation":
            return _relate(items, signs)
        if signs[0] == r"\and" and not {"<", ">", "<=", ">="}.isdisjoint(self.tokens[start : self.position]):
            raise Unreadable("several inequalities at once")
        return _listed(items) if kind == "list" else Group(kind, tuple(items))

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
            elif self.peek()[0] == '"':  # a unit or a remark
                self.position += 1
                if value.kind == "number" and not is_constant(value):
                    raise Unreadable("a word after a variable, as in x is odd")
            elif _ATOM.match(self.peek()):
                value = self.juxtaposed(value)
            else:
                return value

    def juxtaposed(self, value):
        """The product of a value and the factor that follows it without a sign; or a name of several letters."""
        before, bracketed = self.tokens[self.position - 1], self.peek() == "("
        if before[0] == '"' or value.kind == "number" and value.sign:
            raise Unreadable("a factor after a sign or a word")
        if before[-1] == "." or re.match(r"\.?\d", self.peek()) and before[-1].isalnum():
            raise Unreadable("two numbers, or x2, side by side")
        start, factor = self.position, self.power()
        text = "".join(self.tokens[start : self.position])
        if factor.kind not in ("number", "matrix", "row") and bracketed and is_name(value):
            return variable(value.name + text)  # f(x,y), P(X=3)
        product = apply(mul, value, factor)
        named = is_name(value) and (is_name(factor) or bracketed and is_constant(factor))  # AB, f(x) or f(2)
        return replace(product, name=value.name + text) if named else product

    def power(self):
        value = self.atom()
        while mark := self.skip("^", *_POSTFIX):
            value = apply(_power, value, self.signed(self.power)) if mark == "^" else apply(_POSTFIX[mark], value)
            value = replace(value, sign=mark) if mark in "%°" else value
        return value

    def atom(self):
        token = self.peek()
        if token[0] != '"' and not _ATOM.match(token):
            raise Unreadable(f"expected a number, a symbol or an opening bracket, found {token!r}")
        self.position += 1
        if token in _CLOSING:
            return self.enclosed(token)
        if token in _BINARY:
            return apply(_BINARY[token], self.signed(self.atom), self.signed(self.atom))
        if token == r"\sqrt":
            index = self.enclosed("[") if self.skip("[") else None
            value = apply(lambda x, n: _power(x, 1 / n), self.signed(self.atom), index or Number((Fraction(2),)))
            return replace(value, strict=not (index or is_constant(value)))
        if token[1:] in FUNCTIONS:
            return self.function(token[1:])
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        start = self.position - 1
        if self.skip("_"):  # x_1, or 12_5: numbers in different bases differ, so their text names them well enough
            self.signed(self.atom)
        elif token[-1].isdecimal() or token[-1] == ".":
            return Number((Fraction(token),))
        if self.peek() == "(" and (token in "fg" or token in "hpquFGHP" and self.tokens[self.position + 2 :][:1] == [")"]):
            self.signed(self.atom)  # f(…) is a function; so is h(x), but h(a+b) is a product
        text = "".join(self.tokens[start : self.position]).replace("{", "").replace("}", "")
        return variable(text.lower() if token[0] == '"' else text)

    def enclosed(self, opening: str):
        """What stands between the bracket just read and the one that closes it."""
        value, closing = self.group(), self.skip(*_CLOSING[opening])
        if not closing or opening + closing in ("(]", "[)") and value.kind != "list":
            raise Unreadable(f"{opening!r} is closed by {self.peek()!r}, or an interval with one end")
        if opening == r"\lvert":
            return replace(apply(abs, value), strict=not is_constant(value))
        if value.kind == "list" and opening not in ("{", _END):
            return Group("set" if opening == r"\{" else opening + closing, value.items)
        return value

    def function(self, name: str):
        base = self.signed(self.atom) if self.skip("_") else None
        exponent = self.signed(self.atom) if self.skip("^") else None
        bracketed = self.peek() in ("(", "{")
        argument = self.signed(self.atom if bracketed else self.power)
        while not bracketed and _ATOM.match(self.peek()) and self.peek()[1:] not in FUNCTIONS:  # sin 2x cos y
            argument = self.juxtaposed(argument)
        value = apply(FUNCTIONS[name], argument)
        value = apply(truediv, value, apply(MP.ln, base)) if base else value
        return apply(_power, value, exponent) if exponent else value


def _listed(items: list) -> Group:
    """A list, as x_1 = 1, x_2 = 2 is; x = 1, y = 2 is the pair (1, 2), ordered by name."""
    names = [item.items[0].name for item in items if item.kind == "=" and item.items[0].kind == "number"]
    if all(names) and len(set(names)) == len(items):
        kind = "list" if len({name.partition("_")[0] for name in names}) == 1 else "()"
        return Group(kind, tuple(item.items[1] for _, item in sorted(zip(names, items), key=lambda pair: pair[0])))
    return Group("list", tuple(y for x in items for y in (x.items if x.kind == "list" else [x])))


def _relate(items: list, signs: list[str]):
    """x > 3 as the interval, x in S as S; a = b = c ≈ d as a = c, or as c if all are numbers."""
    if signs == [r"\in"] and is_name(items[0]):
        return items[1]
    if set(signs) <= {"=", r"\approx"}:
        exact = items[: 1 + [*signs, r"\approx"].index(r"\approx")]
        if len(exact) == 1 and is_name(exact[0]) and not is_constant(exact[0]):  # x ≈ 8.24
            exact = items
        if not is_name(exact[0]) and is_name(exact[-1]) and not is_constant(exact[-1]):  # 2 = x
            exact = exact[::-1]
        return exact[-1] if len(exact) == 1 or all(map(is_constant, exact)) else Group("=", (exact[0], exact[-1]))
    if all(map(is_constant, items)):
        raise Unreadable("a relation of numbers is no answer")
    if set(signs) <= {">", ">="}:
        items, signs = items[::-1], [sign.replace(">", "<") for sign in reversed(signs)]
    kind, (first, last) = " ".join(signs), (is_name(x) and not is_constant(x) for x in (items[0], items[-1]))
    ends = [Number((-MP.inf,))] * first + items + [Number((MP.inf,))] * last
    signs = ["<"] * first + signs + ["<"] * last
    if set(signs) <= {"<", "<="} and list(map(is_constant, ends)) == [True, False, True] and is_name(ends[1]):
        return Group("(["[signs[0] == "<="] + "~" + ")]"[signs[1] == "<="], (ends[0], ends[2]))
    return Group(kind, tuple(items))
