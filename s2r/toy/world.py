r"""The toy world: arithmetic problems, and a rule that checks answers to them.

    Eggs go in boxes of 7. Which number of eggs fills its boxes: 4315, 2886 or 3024?      a = 7, x = 3024

Exactly one of the numbers, x, is a multiple of a. *Finding* x is hard for the toy model: it answers at once, without
scratch work, and is right about half the time. *Checking* a number is easy, because long division goes digit by
digit: "3 leaves 3, 30 leaves 2, 22 leaves 1, 14 leaves 0". S²R needs this gap: check, and if it is wrong, try again.

    python -m s2r.toy.world --folder F                         writes problems: F/{train,test,longer}.jsonl
    python -m s2r.toy.world --rollouts R.jsonl --out V.jsonl   writes checks of the answers in R, for s2r.stage0.build
"""

import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from s2r.data import read_jsonl, write_jsonl
from s2r.grammar import VERDICT_SENTENCE
from s2r.run.flags import check, start
from s2r.stage0.verifications import wanted

TEMPLATES = (
    "Which number is a multiple of {a}: {xs}?",
    "Eggs go in boxes of {a}. Which number of eggs fills its boxes: {xs}?",
    "Chairs stand in rows of {a}. Which number of chairs leaves none over: {xs}?",
    "{a} children share sweets. Which number of sweets can they share evenly: {xs}?",
)
PATTERNS = [
    re.compile(re.escape(t).replace(r"\{a\}", r"(?P<a>\d+)").replace(r"\{xs\}", r"(?P<xs>\d[\d, or]*)"))
    for t in TEMPLATES
]
DIVISORS = range(2, 10)
LEVELS = {1: 2, 2: 3, 3: 4, 4: 5}  # difficulty of a problem -> how many numbers it names
DIGITS = 4  # of each number


@dataclass(frozen=True)
class Question:
    """Which of xs is a multiple of a? Exactly one of them is."""

    a: int
    xs: tuple[int, ...]
    template: int  # index of its wording

    @property
    def x(self) -> int:
        return next(x for x in self.xs if x % self.a == 0)

    @property
    def text(self) -> str:
        *first, last = map(str, self.xs)
        return TEMPLATES[self.template].format(a=self.a, xs=f"{', '.join(first)} or {last}")


def held_out(a: int, x: int) -> bool:
    """Whether questions with divisor a and answer x are test questions, in any wording; one pair in ten is."""
    return zlib.crc32(f"{a} {x}".encode()) % 10 == 0


def question(rng: random.Random, test: bool = False, level: int | None = None, digits: int = DIGITS) -> Question:
    """A random question of the training or the test set, of one level, or of any level (None)."""
    a, low = rng.choice(DIVISORS), 10 ** (digits - 1)
    count = LEVELS[level] if level else rng.choice(list(LEVELS.values()))
    xs = []
    while len(xs) < count:
        x = rng.randrange(low, 10 * low)
        new = x // low not in [y // low for y in xs]  # the first digit tells the numbers apart
        if new and (x % a if xs else x % a == 0 and held_out(a, x) == test):
            xs.append(x)
    rng.shuffle(xs)
    return Question(a, tuple(xs), rng.randrange(len(TEMPLATES)))


def write_problems(folder: str | Path, *, train: int = 4000, test: int = 1000, longer: int = 400, seed: int) -> None:
    """Problem files, all levels equally often, no question twice. `train.jsonl` is last: then all three are there.

    Numbers in `longer.jsonl` have one digit more than those of any training.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, size in (("test", test), ("longer", longer), ("train", train)):
        rng, rows = random.Random(f"{seed} {name}"), {}
        while len(rows) < size:
            i, level = len(rows), 1 + len(rows) % len(LEVELS)
            q = question(rng, name != "train", level, DIGITS + (name == "longer"))
            row = {"problem": q.text, "answer": str(q.x), "level": level, "unique_id": f"toy/{name}/{i}"}
            rows.setdefault(q.text, row)
        write_jsonl(Path(folder) / f"{name}.jsonl", rows.values())


def solve(x: int) -> str:
    """An attempt with answer x: the answer, straight away."""
    return rf"It is \boxed{{{x}}}."


def divide(a: int, x: int) -> str:
    """Long division of x by a: "Divide 483 by 7: 4 leaves 4, 48 leaves 6, 63 leaves 0. Nothing remains."."""
    steps, rest = [], 0
    for digit in str(x):
        part = 10 * rest + int(digit)
        rest = part % a
        steps.append(f"{part} leaves {rest}")
    return f"Divide {x} by {a}: {', '.join(steps)}. {'Something' if rest else 'Nothing'} remains."


def read(problem: str) -> tuple[int, list[str]]:
    """The divisor and the numbers in a problem's text. Raises ValueError for a problem of another world."""
    found = next(filter(None, (pattern.fullmatch(problem) for pattern in PATTERNS)), None)
    if found is None:
        raise ValueError(f"not a problem of the toy world, so its rule cannot check answers to it: {problem!r}")
    return int(found["a"]), re.findall(r"\d+", found["xs"])


def verify(problem: str, answer: str | None, style: str = "confirmative") -> tuple[str, str]:
    """A check of any answer by rule: its text, and its verdict, which is true.

    "confirmative" divides the answer; "solving", which the paper rejects, finds x again and compares.
    """
    a, xs = read(problem)
    if answer not in xs:
        return f"This is not one of the numbers. {VERDICT_SENTENCE['incorrect']}", "incorrect"
    verdict = "incorrect" if int(answer) % a else "correct"
    if style == "solving":
        x = next(x for x in xs if int(x) % a == 0)
        work = f"Solve it again: it is {x}, {'the same number' if x == answer else 'another number'}."
    else:
        work = divide(a, int(answer))
    return f"{work} {VERDICT_SENTENCE[verdict]}", verdict


def write_verifications(rollouts: str, out: str, style: str) -> None:
    """A check of each distinct answer in a rollout file, for the problems that were solved at least once."""
    asked = wanted(read_jsonl(rollouts))
    write_jsonl(out, (item.row(verify(item.problem, item.answer, style)[0]) for item in asked))


@dataclass(frozen=True)
class Config:
    folder: str = ""  # write the problem files there
    seed: int = 0  # of the problems
    rollouts: str = ""  # or check the answers in this rollout file
    out: str = ""  # verification file to write
    style: Literal["confirmative", "solving"] = "confirmative"  # of the checks


def main(cfg: Config) -> None:
    check(cfg)
    if bool(cfg.folder) == bool(cfg.rollouts) or bool(cfg.rollouts) != bool(cfg.out):
        raise ValueError("give --folder to write problems, or --rollouts and --out to write checks")
    if cfg.folder:
        write_problems(cfg.folder, seed=cfg.seed)
    else:
        write_verifications(cfg.rollouts, cfg.out, cfg.style)


if __name__ == "__main__":
    start(main, Config)
