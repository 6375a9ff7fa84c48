r"""The toy world: arithmetic problems, and a rule that checks answers to them.

    Eggs go in boxes of 7. Which number of eggs fills its boxes: 4315, 2886 or 3024?      a = 7, x = 3024

Exactly one of the numbers, x, is a multiple of a. *Finding* x is hard for the toy model: it answers at once, without
scratch work, and is right about half the time. *Checking* a number is easy, because long division goes digit by
digit: "3 leaves 3, 30 leaves 2, 22 leaves 1, 14 leaves 0". S²R needs this gap: check, and if it is wrong, try again.

    python -m s2r.toy.world --folder F                         writes problems: F/train.jsonl and F/test.jsonl
    python -m s2r.toy.world --rollouts R.jsonl --out V.jsonl   writes checks of the answers in R, for s2r.stage0.build
"""

import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from s2r.data import write_jsonl
from s2r.grammar import VERDICT_SENTENCE
from s2r.run.flags import check, start
from s2r.stage0.build import read_rollouts
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
NUMBERS = range(1000, 10_000)  # that a problem can name


@dataclass(frozen=True)
class Question:
    """Which of xs is a multiple of a? Exactly one of them is."""

    a: int
    xs: tuple[int, ...]
    template: str  # its wording

    @property
    def x(self) -> int:
        return next(x for x in self.xs if x % self.a == 0)

    @property
    def text(self) -> str:
        *first, last = map(str, self.xs)
        return self.template.format(a=self.a, xs=f"{', '.join(first)} or {last}")


def held_out(a: int, x: int) -> bool:
    """Whether questions with divisor a and answer x are test questions, in any wording; one pair in ten is."""
    return zlib.crc32(f"{a} {x}".encode()) % 10 == 0


def question(rng: random.Random, test: bool = False, level: int | None = None) -> Question:
    """A random question of the training or the test set, of one level, or of any level (None)."""
    a, xs = rng.choice(DIVISORS), []
    count = LEVELS[level] if level else rng.choice(list(LEVELS.values()))
    while len(xs) < count:
        x = rng.choice(NUMBERS)
        new = x // 1000 not in [y // 1000 for y in xs]  # the first digit tells the numbers apart
        if new and (x % a if xs else x % a == 0 and held_out(a, x) == test):
            xs.append(x)
    rng.shuffle(xs)
    return Question(a, tuple(xs), rng.choice(TEMPLATES))


def write_problems(folder: str | Path, *, train: int = 4000, test: int = 1000, seed: int) -> None:
    """Problem files, all levels equally often, no question twice. `train.jsonl` is last: then both are there."""
    for name, size in (("test", test), ("train", train)):
        rng, rows = random.Random(f"{seed} {name}"), {}
        while len(rows) < size:
            i, level = len(rows), 1 + len(rows) % len(LEVELS)
            q = question(rng, name == "test", level)
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


def verify(problem: str, answer: str | None, style: str = "confirmative") -> tuple[str, str]:
    """A check of any answer by rule: its text, and its verdict, which is true.

    "confirmative" divides the answer; "solving", which the paper rejects, finds x again and compares. Raises
    ValueError for a problem of another world.
    """
    found = next(filter(None, (pattern.fullmatch(problem) for pattern in PATTERNS)), None)
    if found is None:
        raise ValueError(f"not a problem of the toy world, so its rule cannot check answers to it: {problem!r}")
    a, xs = int(found["a"]), re.findall(r"\d+", found["xs"])
    if answer not in xs:
        return f"This is not one of the numbers. {VERDICT_SENTENCE['incorrect']}", "incorrect"
    verdict = "incorrect" if int(answer) % a else "correct"
    if style == "solving":
        x = next(x for x in xs if int(x) % a == 0)
        work = f"Solve it again: it is {x}, {'the same number' if x == answer else 'another number'}."
    else:
        work = divide(a, int(answer))
    return f"{work} {VERDICT_SENTENCE[verdict]}", verdict


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
        asked = wanted(read_rollouts(cfg.rollouts))
        checks = (row | {"verification": verify(row["problem"], row["answer"], cfg.style)[0]} for row in asked)
        write_jsonl(cfg.out, checks)


if __name__ == "__main__":
    start(main, Config)
