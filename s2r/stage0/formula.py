r"""Checks and solutions by rule, for problems that come with the formula of their solution (ASDiv, SVAMP, GSM8K).

A check undoes the formula, from the answer back to its first number:

    (53-2)/3=17, answer 15     Going backwards from 15: 15 × 3 = 45; 45 + 2 = 47, but the problem says 53.

Such checks exist only where the solution is known: training data, as a strong model would write it. Called by
`python -m s2r.stage0.verifications --by formula --data F.jsonl`.

    python -m s2r.stage0.formula --data asdiv.jsonl --folder F

writes F/sft.jsonl, F/rl.jsonl and F/test.jsonl: two, two and one fifth of the problems that have a formula of at most
--steps steps that can be undone, by a hash of the problem. Their solutions are "We compute 53 − 2 = 51 and 51 ÷ 3 = 17. So
the answer is \boxed{17}."
"""

import ast
import re
import zlib
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

from s2r.data import Problem, load_problems
from s2r.grade import equivalent
from s2r.grammar import VERDICT_SENTENCE, parse_verdict
from s2r.run.files import write_jsonl
from s2r.run.flags import check, start

SIGN = {ast.Add: "+", ast.Sub: "−", ast.Mult: "×", ast.Div: "÷"}
INVERSE = {"+": "−", "−": "+", "×": "÷", "÷": "×"}
OPENINGS = ("Going backwards from {}:", "Undo the steps, starting from {}:", "If the answer is {}, then")
NUMBER = r"\d{1,12}(?:\.\d{1,6})?"
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {word: i for i, word in enumerate(ONES)} | {word: 10 * i for i, word in enumerate(TENS, start=2)}
LONGEST, MOST = 100, 4  # characters of an equation; equations of a formula

Tree = tuple["Tree", str, "Tree"] | Fraction  # a number of the problem, or two trees and the sign between them


def parse(formula: str) -> Tree | None:
    """The left side of a formula like "(53-2)/3=17"; of "48/2=24; 48+24=72", the last, with 24 written out. Else None."""
    results: dict[Fraction, Tree] = {}
    tree, equations = None, formula.split(";")
    if len(equations) > MOST:
        return None
    for equation in equations:
        left, equals, right = equation.partition("=")
        if not re.fullmatch(r"[\d.+*/() -]{1,%d}" % LONGEST, left) or not re.fullmatch(r" *\d{1,12}(\.\d{1,6})? *", right):
            return None
        try:
            tree = _tree(ast.parse(left.strip(), mode="eval").body, left.strip(), results)
            found = value(tree)
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
            return None
        if found != Fraction(right.strip()):
            return None
        results[found] = tree
    return tree


def _tree(node: ast.expr, source: str, results: dict[Fraction, Tree]) -> Tree:
    if isinstance(node, ast.BinOp) and type(node.op) in SIGN:
        return _tree(node.left, source, results), SIGN[type(node.op)], _tree(node.right, source, results)
    if isinstance(node, ast.Constant):
        number = Fraction(ast.get_source_segment(source, node))
        return results.get(number, number)
    raise ValueError(f"not arithmetic: {source}")


def apply(a: Fraction, sign: str, b: Fraction) -> Fraction:
    return {"+": a + b, "−": a - b, "×": a * b}[sign] if sign != "÷" else a / b


def value(tree: Tree) -> Fraction:
    return tree if isinstance(tree, Fraction) else apply(value(tree[0]), tree[1], value(tree[2]))


def number(x: Fraction) -> str | None:
    """x as people write it, with at most four decimals; None if it has more, or is negative."""
    if x < 0 or 10_000 % x.denominator:
        return None
    return str(x) if x.denominator == 1 else f"{float(x):.4f}".rstrip("0")


def numbers(text: str) -> set[Fraction]:
    """The numbers that a problem says, in digits or in words up to ninety-nine ("two hundred" says 2)."""
    words = [word.split("-") for word in re.findall(r"[a-z]+(?:-[a-z]+)?", text.lower())]
    said = {Fraction(sum(map(WORDS.get, word))) for word in words if WORDS.keys() >= set(word)}
    return said | {Fraction(x) for x in re.findall(NUMBER, re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))}


def forwards(tree: Tree) -> list[str]:
    """The steps of a tree: ["53 − 2 = 51", "51 ÷ 3 = 17"]. Raises ValueError where a number cannot be written."""
    if isinstance(tree, Fraction):
        return []
    a, sign, b = tree
    return [*forwards(a), *forwards(b), _step(value(a), sign, value(b))]


def _step(a: Fraction, sign: str, b: Fraction) -> str:
    words = [number(x) for x in (a, b, apply(a, sign, b))]
    if None in words:
        raise ValueError(f"{a} {sign} {b} has a number that nobody writes")
    return f"{words[0]} {sign} {words[1]} = {words[2]}"


def verify(problem: Problem, answer: str) -> str | None:
    """A check of this answer, with its verdict; None where the rule has none.

    That is: no formula, one that does not give the gold answer, an answer that is not a number of 0 to 4 decimals, or such
    a number on the way.
    """
    tree = parse(problem.formula or "")
    said = re.fullmatch(r"\$?(\d{1,12}|\d{1,3}(?:,\d{3}){1,3})(\.\d{1,4})?", answer.strip(), re.ASCII)
    if tree is None or isinstance(tree, Fraction) or not said:
        return None
    start, right, steps, end = Fraction(said[1].replace(",", "") + (said[2] or "")), value(tree), [], ""
    x = start
    if not equivalent(number(right) or "", problem.answer):
        return None
    try:
        while not isinstance(tree, Fraction) and not end:
            tree, sign, other = tree
            by = value(other)
            steps += forwards(other)
            if number(by) is None:
                return None
            if sign == "×" and number(x / by) is None:  # 14 ÷ 3 has no end, 1 ÷ 32 five decimals
                end = f"{number(x)} ÷ {number(by)} does not come out even, so it cannot be"
            elif sign == "+" and x < by:
                end = f"{number(x)} is less than {number(by)}, so it cannot be"
            else:
                steps.append(_step(x, INVERSE[sign], by))
                x = apply(x, INVERSE[sign], by)
    except (ValueError, ZeroDivisionError):
        return None
    if not end:
        says = "the problem says" if tree in numbers(problem.problem) else "it should be"
        steps[-1] += f", {'and' if x == tree else 'but'} {says} {number(tree)}"
    verdict = "correct" if not end and x == tree else "incorrect"
    if (verdict == "correct") != (start == right):
        return None
    opening = OPENINGS[zlib.crc32(f"{problem.problem} {answer}".encode()) % len(OPENINGS)].format(number(start))
    return f"{opening} {'; '.join([*steps, *[end] * bool(end)])}. {VERDICT_SENTENCE[verdict]}"


def fault(problem: str, answer: str | None, check: str) -> str:
    """The first fault of a check like those of `verify`; "" if it is sound.

    The formula is not known here. So "it should be 53" is taken on trust, and a check that undoes other steps than the
    formula's is sound as well: in one that accepts this is unlikely, in one that rejects it is not.
    """
    said = re.search(NUMBER, check)
    if not said or answer is None or not equivalent(said[0], answer):
        return "not about the answer"
    derived = {Fraction(said[0])}  # the answer, and what was computed from it
    known, result, impossible = numbers(problem) | derived, None, False
    steps = re.findall(rf"({NUMBER}) ([+−×÷]) ({NUMBER})(?: = ({NUMBER})| does not come out even)", check)
    if check.count("=") != sum(bool(step[3]) for step in steps):
        return "an unreadable calculation"
    for a, sign, b, c in steps:
        a, b = Fraction(a), Fraction(b)
        if not {a, b} <= known:
            return "a number that the problem does not say"
        result = None if sign == "÷" and not b else apply(a, sign, b)
        impossible = impossible or not c
        if result is None or (result != Fraction(c) if c else sign != "÷" or number(result) is not None):
            return "a wrong calculation"
        known.add(result)
        if {a, b} & derived:
            derived.add(result)
    if less := re.search(rf"({NUMBER}) is less than ({NUMBER})", check):
        result, b = map(Fraction, less.groups())
        if not {result, b} <= known or result >= b:
            return "a wrong comparison"
    impossible = impossible or bool(less)
    told = re.search(rf"the problem says ({NUMBER})", check)
    if told and Fraction(told[1]) not in numbers(problem):
        return "a number that the problem does not say"
    told = told or re.search(rf"it should be ({NUMBER})", check)
    if result is None or result not in derived or not (impossible or told):
        return "nothing that follows from the answer is compared"
    verdict = "incorrect" if impossible or result != Fraction(told[1]) else "correct"
    return "" if parse_verdict(check) == verdict else "a verdict that does not follow"


def solution(problem: Problem) -> str | None:
    """The solution by the formula; None without one, or where it does not give the gold answer."""
    tree = parse(problem.formula or "")
    if tree is None or isinstance(tree, Fraction) or not equivalent(number(value(tree)) or "", problem.answer):
        return None
    try:
        return rf"We compute {' and '.join(forwards(tree))}. So the answer is \boxed{{{number(value(tree))}}}."
    except ValueError:
        return None


@dataclass(frozen=True)
class Config:
    data: str  # problem file with formulas: ASDiv, SVAMP or GSM8K as published
    folder: str  # where sft.jsonl, rl.jsonl and test.jsonl go
    steps: int = 2  # of a formula, at most


def main(cfg: Config) -> None:
    check(cfg, "steps")
    problems, parts = load_problems(cfg.data), {"sft": [], "rl": [], "test": []}
    for problem in problems:
        text = solution(problem)
        if text and len(forwards(parse(problem.formula))) <= cfg.steps and verify(problem, problem.answer):
            part = ("sft", "sft", "rl", "rl", "test")[zlib.crc32(problem.problem.encode()) % 5]
            parts[part].append(asdict(replace(problem, solution=text)))
    print(f"{len(problems):7,}  problems, {sum(map(len, parts.values())):,} with a formula that can be undone")
    if not all(parts.values()):
        raise ValueError(f"{cfg.data}: a part would be empty; give more problems with formulas, or a higher --steps")
    for name, rows in parts.items():
        write_jsonl(Path(cfg.folder) / f"{name}.jsonl", rows)
        print(f"{len(rows):7,}  {name}")


if __name__ == "__main__":
    start(main, Config)
