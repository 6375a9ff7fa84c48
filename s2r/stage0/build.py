"""Stage 0: from samples of the base model to trajectories that check and correct themselves (§2.2, App. C.1).

    K samples of a problem ─ grade ─▶ how many are wrong? ─▶ k trials
            │                                                  │
            └─ distinct answers ─ verify ─ drop untrue checks ─┴─▶ s1 ✗ v1 "incorrect" … sk ✓ vk "correct"

    python -m s2r.stage0.build --rollouts ROLLOUTS.jsonl --verifications V.jsonl --out TRAJECTORIES.jsonl

K is the number of samples per problem (paper: 5), k the number of trials (solves) in its trajectory, 1 to 4. Every
solve is a sample of the base model. The checks come from `s2r.stage0.verifications`, or are your own.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from s2r.data import read_jsonl
from s2r.grade import equivalent, extract_answer
from s2r.grammar import cut, parse_verdict
from s2r.run.files import check_output, write_jsonl
from s2r.run.flags import check, start


@dataclass(frozen=True)
class Config:
    rollouts: str  # rollout file of the base model (sample.py --n 5 --temperature 0.7 --out)
    verifications: str  # verification file (python -m s2r.stage0.verifications)
    out: str  # trajectory file to write
    # So that easy problems do not dominate. The release keeps about 0.24 at k = 1 and 0.5 to 1 at the others.
    keep: tuple[float, float, float, float] = (0.24, 1.0, 1.0, 1.0)  # fraction to keep at 1, 2, 3, 4 trials
    seed: int = 0  # of the choice among samples and of the fraction to keep


def read_rollouts(path: str) -> list[dict]:
    """Rows of a rollout file. Raises FileNotFoundError, and ValueError naming file and row."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if missing := {"unique_id", "problem", "answer", "finished", "text"} - set(row):
            what = f"not a rollout, it has no {min(missing)!r}; give a file that sample.py --out wrote"
            raise ValueError(f"{path}: row {number}: {what}")
    return rows


def load_verifications(path: str) -> dict[str, list[tuple[str, str]]]:
    """Problem -> (answer, verification) of each of its rows. Raises ValueError naming file and row."""
    found = defaultdict(list)
    for number, row in enumerate(read_jsonl(path), start=1):
        texts = [row.get(name) for name in ("problem", "answer", "verification")]
        if not all(isinstance(text, str) for text in texts):
            what = f'"problem", "answer" and "verification" have to be strings, keys are {", ".join(row) or "none"}'
            raise ValueError(f"{path}: row {number}: {what}")
        problem, answer, verification = texts
        found[problem].append((answer, verification))
    return dict(found)


def by_problem(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """unique_id -> the rows of that problem, in order."""
    problems = defaultdict(list)
    for row in rows:
        problems[row["unique_id"]].append(row)
    return dict(problems)


def distinct(answers: Sequence[str]) -> list[int]:
    """Indices of the answers that are not equivalent to an earlier one."""
    return [i for i, answer in enumerate(answers) if not any(equivalent(answer, x) for x in answers[:i])]


def usable_answer(row: dict) -> str | None:
    r"""The answer of a sample that can serve as a solve, None if it cannot.

    A solve is finished, has a \boxed answer, and is a single attempt: no line of it opens another action.
    """
    one_attempt = cut(row["text"].encode()) == [(0, "solve")]
    return extract_answer(row["text"]) if row["finished"] and one_attempt else None


def trials_wanted(wrong: int, samples: int) -> int:
    """Number of trials k for a problem with this many wrong samples; it is 1 only if none is wrong.

    The release has k = 1, 2, 3, 4 for 0, 1, 2–3, 4–5 wrong of K = 5. For another K the number of wrong samples
    is scaled to 5 and rounded up.
    """
    return (1, 2, 3, 3, 4, 4)[math.ceil(5 * wrong / samples)]


def build(
    samples: Sequence[dict], checks: Sequence[tuple[str, str]], rng: random.Random, counts: Counter
) -> list[dict] | None:
    """The trajectory of one problem as the steps of a trajectory file, None if there is none.

    `samples` are the problem's rows of the rollout file, `checks` its (answer, verification) pairs. Checks are filtered
    by their verdict alone. `counts` gets what was dropped, by reason.
    """
    gold = samples[0]["answer"]
    usable = [(row["text"], answer) for row in samples if (answer := usable_answer(row)) is not None]
    right = [(text, answer) for text, answer in usable if equivalent(answer, gold)]
    wrong = [attempt for attempt in usable if attempt not in right]
    counts["sample: unfinished, no answer, or more than one attempt"] += len(samples) - len(usable)
    if not right:
        counts["problem: no right sample"] += 1
        return None

    k = trials_wanted(len(samples) - len(right), len(samples))
    rng.shuffle(wrong)
    wrong = [wrong[i] for i in distinct([answer for _, answer in wrong])]

    def trial(text: str, answer: str, truth: str) -> list[dict] | None:
        """The solve and the first true verification of its answer, as steps; None if there is none."""
        # `equivalent` is not transitive: 2,1 is 1,2, which is (1,2), which 2,1 is not.
        same_side = [check for check in checks if equivalent(check[0], gold) == (truth == "correct")]
        found = [verification for other, verification in same_side if equivalent(other, answer)]
        true = [verification for verification in found if parse_verdict(verification) == truth]
        counts["verification: none of this answer"] += not found
        counts["verification: its verdict does not match the truth, or there is none"] += len(found) - len(true)
        if not true:
            return None
        return [
            {"kind": "solve", "text": text.strip(), "correct": truth == "correct"},
            {"kind": "verify", "text": true[0], "verdict": truth},
        ]

    final = trial(*rng.choice(right), "correct")
    failed = [steps for attempt in wrong if (steps := trial(*attempt, "incorrect"))]
    if final is None:
        counts["problem: no true verification of the right answer"] += 1
        return None
    if k > 1 and not failed:
        counts["problem: has wrong samples, none with an answer and a true check"] += 1
        return None
    if len(failed) + 1 < k:
        counts["problem: fewer distinct wrong answers than its difficulty asks for"] += 1
    return sum(failed[: k - 1], []) + final


def trajectories(rows: Sequence[dict], verifications: dict[str, list], cfg: Config) -> tuple[list[dict], Counter]:
    """Rows of a trajectory file, at most one per problem, and what was read, dropped and kept, by reason.

    `rows` are those of a rollout file, `verifications` what `load_verifications` returns.
    """
    problems, examples = by_problem(rows), []
    counts = Counter({"problems": len(problems), "samples": len(rows)})
    for unique_id, samples in problems.items():
        rng = random.Random(f"{cfg.seed} {unique_id}")  # a stream per problem: dropping one changes no other
        problem = {key: samples[0][key] for key in ("unique_id", "problem", "answer")}
        steps = build(samples, verifications.get(problem["problem"], []), rng, counts)
        if steps is None:
            continue
        k = len(steps) // 2
        if rng.random() < cfg.keep[k - 1]:
            counts.update(["kept", f"kept, k = {k}"])
            examples.append(problem | {"trajectory": steps})
        else:
            counts[f"problem: dropped to balance the classes, k = {k}"] += 1
    return examples, +counts  # without zeros


def main(cfg: Config) -> None:
    check(cfg)
    if max(cfg.keep) > 1:
        raise ValueError(f"--keep {max(cfg.keep)}: give fractions between 0 and 1")
    check_output(cfg.out)
    examples, counts = trajectories(read_rollouts(cfg.rollouts), load_verifications(cfg.verifications), cfg)
    for name in sorted(counts, key=lambda name: (name.startswith("kept"), ":" in name, name)):
        print(f"{counts[name]:7,}  {name}")
    if not examples:
        untrue = counts["problem: no true verification of the right answer"]
        advice = "verify with a stronger model, into a new file" if untrue else "sample more, or easier, problems"
        raise ValueError(f"{cfg.rollouts}: no problem gives a trajectory (reasons above); {advice}")
    write_jsonl(cfg.out, examples)


if __name__ == "__main__":
    start(main, Config)
