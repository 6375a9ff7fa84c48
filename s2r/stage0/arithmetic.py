"""Calculations to practise, for a model that reads a problem better than it computes.

    python -m s2r.stage0.arithmetic --out arithmetic.jsonl
    python train_sft.py --model BASE --data arithmetic.jsonl --kl 0 --epochs 1 --out runs/practised

SmolLM2-135M-Instruct gets 2 to 5 % of 60 differences of numbers up to 99 right. A check by `s2r/stage0/formula.py` is
made of such calculations. If they are wrong, its verdict says little.
"""

import random
from dataclasses import dataclass

from s2r.run.files import check_output, write_jsonl
from s2r.run.flags import check, start

CALCULATIONS = 10  # in one row


@dataclass(frozen=True)
class Config:
    out: str  # problem file to write, with solutions
    rows: int = 1500  # rows of ten calculations each
    seed: int = 0  # of the random numbers


def draw(rng: random.Random) -> tuple[str, int]:
    """A calculation like "81 − 28" and its result, a whole number above zero. Most of the numbers are below 100."""
    sign = rng.choice("+−−×÷")
    a, b = (rng.randrange(1, 10 ** rng.choice((1, 2, 2, 2, 3))) for _ in "ab")
    if sign in "×÷":
        a, b = a % 100 + 1, b % 12 + 1
    whole = a + b if sign in "+−" else a * b
    return (f"{a} {sign} {b}", whole) if sign in "+×" else (f"{whole} {sign} {b}", a)


def main(cfg: Config) -> None:
    check(cfg, "rows")
    check_output(cfg.out)
    rng, rows = random.Random(cfg.seed), []
    for i in range(cfg.rows):
        drawn = [draw(rng) for _ in range(CALCULATIONS)]
        rows.append({
            "unique_id": f"arithmetic/{i}",
            "problem": f"Compute {', '.join(question for question, _ in drawn)}.",
            "answer": str(drawn[-1][1]),
            "solution": f"We compute {', '.join(f'{question} = {result}' for question, result in drawn)}.",
        })  # fmt: skip
    write_jsonl(cfg.out, rows)


if __name__ == "__main__":
    start(main, Config)
