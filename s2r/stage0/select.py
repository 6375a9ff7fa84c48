"""Problems worth learning from: those that a model solves sometimes (paper §2.4, App. F).

    python -m s2r.stage0.select --rollouts ROLLOUTS.jsonl --out PROBLEMS.jsonl

Reads what `sample.py --n 8 --temperature 0.7 --out` writes. Keeps the problems whose sampled accuracy is in a range.
At the outcome level, a problem whose rollouts all have one reward teaches nothing but the KL term.
"""

from collections import Counter
from dataclasses import dataclass

from s2r.data import read_jsonl
from s2r.offline import ACCURACY, out_of_range, sampled_accuracy
from s2r.run.files import write_jsonl
from s2r.run.flags import check, start


@dataclass(frozen=True)
class Config:
    rollouts: str  # rollout file, several samples a problem
    out: str  # problem file to write
    accuracy: tuple[float, float] = ACCURACY  # lowest and highest sampled accuracy of the problems to keep


def main(cfg: Config) -> None:
    check(cfg)
    rows, keys = read_jsonl(cfg.rollouts), ("unique_id", "problem", "answer")
    try:
        accuracy = sampled_accuracy([(row["unique_id"], row["reward"]) for row in rows])
        problems = {row["unique_id"]: {key: row[key] for key in keys} | {"level": row.get("level")} for row in rows}
    except KeyError as error:
        raise ValueError(f"{cfg.rollouts}: a row has no {error}; give a file that sample.py --out wrote") from None
    reasons = {unique_id: out_of_range(fraction, *cfg.accuracy) for unique_id, fraction in accuracy.items()}
    for reason, count in Counter(reason or "kept" for reason in reasons.values()).items():
        print(f"{count:7,}  {reason}")
    kept = [problems[unique_id] for unique_id, reason in reasons.items() if reason is None]
    if not kept:
        raise ValueError(f"{cfg.rollouts}: no problem has a sampled accuracy in {cfg.accuracy}; widen --accuracy")
    write_jsonl(cfg.out, kept)


if __name__ == "__main__":
    start(main, Config)
