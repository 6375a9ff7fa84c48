r"""The toy world: find the signs, and a rule that checks an answer by adding up.

    Put plus or minus in the gaps: 62 _ 7 _ 11 _ 5 = 53.        62 plus 7 minus 11 minus 5 is 53

Exactly one row of signs is right. *Finding* it is a search: with g gaps there are 2^g rows. *Checking* a row is adding
up from left to right: "62 plus 7 is 69, 69 minus 11 is 58, 58 minus 5 is 53". S²R needs this gap: check, and if the row
is wrong, try another. The answer is the row in words, `\boxed{plus minus minus}`.

    python -m s2r.toy.world --folder F                         writes problems: F/train.jsonl and F/test.jsonl
    python -m s2r.toy.world --rollouts R.jsonl --out V.jsonl   writes checks of the answers in R, for s2r.stage0.build
"""

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from s2r.grammar import VERDICT_SENTENCE
from s2r.run.files import write_jsonl
from s2r.run.flags import check, start
from s2r.stage0.build import read_rollouts
from s2r.stage0.verifications import wanted

PROBLEM = re.compile(r"Put plus or minus in the gaps: (\d+(?: _ \d+)+) = (\d+)\.")
FIRST, OTHERS = range(60, 90), range(1, 13)  # so that no total is below 0
GAPS = range(2, 6)  # of a puzzle; its difficulty is their number less 1
SIGNS = {"plus": 1, "minus": -1}


@dataclass(frozen=True)
class Puzzle:
    """Which signs between the numbers xs give the target? Exactly one row does."""

    xs: tuple[int, ...]
    row: tuple[str, ...]  # the right signs, one fewer than numbers

    @property
    def target(self) -> int:
        return total(self.xs, self.row)

    @property
    def text(self) -> str:
        return f"Put plus or minus in the gaps: {' _ '.join(map(str, self.xs))} = {self.target}."


def total(xs: tuple[int, ...], row: tuple[str, ...]) -> int:
    return xs[0] + sum(SIGNS[sign] * x for sign, x in zip(row, xs[1:], strict=True))


def rows(gaps: int) -> list[tuple[str, ...]]:
    """All rows of signs for so many gaps."""
    return list(product(SIGNS, repeat=gaps))


def held_out(xs: tuple[int, ...]) -> bool:
    """Whether puzzles with these numbers, in any order, are test puzzles; one in ten is."""
    return zlib.crc32(" ".join(map(str, sorted(xs))).encode()) % 10 == 0


def puzzle(rng: random.Random, test: bool = False, gaps: int | None = None) -> Puzzle:
    """A random puzzle of the training or the test set, with so many gaps, or any of GAPS (None)."""
    gaps = gaps or rng.choice(GAPS)
    while True:
        xs = (rng.choice(FIRST), *rng.sample(OTHERS, gaps))
        row = rng.choice(rows(gaps))
        if held_out(xs) == test and [total(xs, other) for other in rows(gaps)].count(total(xs, row)) == 1:
            return Puzzle(xs, row)


def problems(name: str, size: int, seed: int, gaps: Sequence[int] = GAPS) -> list[dict]:
    """Rows of a problem file, all numbers of gaps equally often, no puzzle twice; test puzzles unless its name is "train"."""
    rng, found = random.Random(f"{seed} {name}"), {}
    while len(found) < size:
        i = len(found)
        p = puzzle(rng, name != "train", gaps[i % len(gaps)])
        row = {"problem": p.text, "answer": " ".join(p.row), "level": len(p.row) - 1, "unique_id": f"toy/{name}/{i}"}
        found.setdefault(p.text, row)
    return list(found.values())


def write_problems(folder: str | Path, *, train: int = 4000, test: int = 1000, seed: int) -> None:
    """Problem files. `train.jsonl` is last: then both are there."""
    for name, size in (("test", test), ("train", train)):
        write_jsonl(Path(folder) / f"{name}.jsonl", problems(name, size, seed))


def solve(row: tuple[str, ...]) -> str:
    """An attempt: the row of signs, straight away."""
    return rf"The signs are \boxed{{{' '.join(row)}}}."


def add_up(xs: tuple[int, ...], row: tuple[str, ...]) -> str:
    """Adding up from left to right: "62 plus 7 is 69, 69 minus 11 is 58."."""
    totals = [total(xs[: i + 1], row[:i]) for i in range(len(xs))]
    steps = [f"{a} {sign} {x} is {b}" for a, sign, x, b in zip(totals, row, xs[1:], totals[1:])]
    return ", ".join(steps) + "."


def name(target: int) -> str:
    return f"The target is {target}."


def compare(a: int, b: int) -> str:
    return f"{a} and {b} are {'the same' if a == b else 'different'}."


def verify(problem: str, answer: str | None, style: str = "confirmative") -> tuple[str, str]:
    """A check of any answer by rule: its text, and its verdict, which is true.

    "confirmative" adds up; "solving", which the paper rejects, finds the signs again and compares. Raises ValueError
    for a problem of another world.
    """
    found = PROBLEM.fullmatch(problem)
    if found is None:
        raise ValueError(f"not a problem of the toy world, so its rule cannot check answers to it: {problem!r}")
    xs, target = tuple(map(int, found[1].split(" _ "))), int(found[2])
    row = tuple((answer or "").split(" "))
    if row not in rows(len(xs) - 1):
        return f"This is not one sign for each gap. {VERDICT_SENTENCE['incorrect']}", "incorrect"
    verdict = "correct" if total(xs, row) == target else "incorrect"
    if style == "solving":
        right = next(r for r in rows(len(row)) if total(xs, r) == target)
        work = f"Solve it again: the signs are {' '.join(right)}, {'the same' if right == row else 'different'}."
    else:
        work = f"Add up: {add_up(xs, row)} {name(target)} {compare(total(xs, row), target)}"
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
