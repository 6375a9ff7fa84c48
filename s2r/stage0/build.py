"""Stage 0: from the base model's samples to trajectories that check and correct themselves (paper §2.2, App. C.1).

    K samples of a problem ─ grade ─▶ wrong share ─▶ number of trials k
            │                                               │
            └─ distinct answers ─ verify ─ drop if untrue ──┴─▶ s1 ✗ v1 "incorrect" … sk ✓ vk "correct"

    python -m s2r.behavior --rollouts ROLLOUTS.jsonl --verifications V.jsonl --out TRAJECTORIES.jsonl --seed 0

Every attempt is the model's own; only the verifications come from elsewhere: a verification file, of
`s2r.verifications` or your own, or in the toy world a rule. Reads what `sample.py --n 5 --temperature 0.7 --out`
writes, writes what `train_sft.py` reads, and prints what became of every sample.
"""

import argparse
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from s2r import runtime, toy
from s2r.data import read_jsonl, write_jsonl
from s2r.grade import equivalent, extract_answer
from s2r.grammar import cut, parse_verdict
from s2r.stage0.verifications import STYLES, load_verifications

Verify = Callable[[str, str], Sequence[str]]
"""(problem, answer) -> the checks there are of it, each a text that should end in a verdict sentence."""

KEEP = (0.24, 1.0, 1.0, 1.0)
"""Share of the trajectories with 1, 2, 3, 4 trials that is kept, so that easy problems do not dominate.

The release keeps about 0.24 of those with one and 0.5 to 1 of the others.
"""


def by_rule(problem: str, answer: str, style: str = "confirmative") -> list[str]:
    """The toy world's one check in this style; a confirmative one may be made in haste (`toy.hasty`)."""
    if style == "confirmative" and toy.hasty(problem, answer):
        style = "claim"
    return [toy.verify(problem, answer, style)[0]]


def from_file(path: str | Path) -> Verify:
    """The checks of a verification file. Raises ValueError naming file and row."""
    found = load_verifications(path)

    def verify(problem: str, answer: str) -> list[str]:
        return [text for other, text in found.get(problem, ()) if equivalent(other, answer)]

    return verify


def fault(check: str, truth: str, solution: str | None) -> str | None:
    """Why a verification is dropped, None if it is kept: `truth` is the verdict that would be true.

    With the `solution` it speaks of, it may not be longer than that: a check is to be easier than a solution. Departs
    from the paper, which drops for the verdict alone; the release has a filter by length that nothing calls.
    """
    if parse_verdict(check) != truth:
        return "its verdict does not match the truth, or there is none"
    if extract_answer(check) is not None:
        return "solves the problem again (it boxes an answer)"
    if solution is not None and len(check) > len(solution):
        return "longer than the solution"
    return None


def trials(wrong: int, samples: int) -> int:
    """Number of trials k that a problem asks for, by how many of its samples are wrong.

    The release counts 0, 1, 2–3, 4–5 wrong of 5; other numbers of samples are scaled to 5.
    """
    return (1, 2, 3, 3, 4, 4)[round(5 * wrong / samples)]


def distinct(answers: Sequence[str]) -> list[int]:
    """Indices of the first of each class of equivalent answers, in order."""
    chosen = []
    for i, answer in enumerate(answers):
        if not any(equivalent(answer, answers[j]) for j in chosen):
            chosen.append(i)
    return chosen


def usable(row: dict) -> str | None:
    """The answer of a sample that can stand as a solve, None for one that cannot.

    It has to be finished, hold a \\boxed answer, and be one attempt: no line of it opens an action of its own.
    """
    one_attempt = cut(row["text"].encode()) == [(0, "solve")]
    return extract_answer(row["text"]) if row["finished"] and one_attempt else None


def build(
    samples: Sequence[dict], verify: Verify, rng: random.Random, counts: Counter, short: bool
) -> list[dict] | None:
    """The trajectory of one problem, as the steps of a trajectory file; None when it gives none.

    `samples` are its rows of the rollout file; `short` drops checks longer than what they check. Adds to `counts` what
    was dropped, by reason.
    """
    problem, gold = samples[0]["problem"], samples[0]["answer"]
    graded = [(row, usable(row)) for row in samples]
    right = [(row["text"], answer) for row, answer in graded if equivalent(answer, gold)]
    wrong = [(row["text"], answer) for row, answer in graded if answer is not None and not equivalent(answer, gold)]
    counts["sample: unfinished, no answer, or more than one attempt"] += len(samples) - len(right) - len(wrong)
    if not right:
        counts["problem: no right sample"] += 1
        return None

    k = trials(len(samples) - len(right), len(samples))
    rng.shuffle(wrong)
    wrong = [wrong[i] for i in distinct([answer for _, answer in wrong])]
    right.insert(0, right.pop(rng.randrange(len(right))))  # the others only if there is no true check of this one

    def attempt(text: str, answer: str, truth: str) -> tuple[str, str, str] | None:
        """A solve with a verification that is true; None if there is none."""
        checks = verify(problem, answer)
        faults = [fault(check, truth, text if short else None) for check in checks]
        counts.update(f"verification: {reason}" for reason in faults if reason)
        if not checks:
            counts["verification: none of this answer"] += 1
        return (text, checks[faults.index(None)], truth) if None in faults else None

    failed = [found for x in wrong if (found := attempt(*x, "incorrect"))]
    final = next((found for x in right if (found := attempt(*x, "correct"))), None)
    if final is None:
        counts["problem: no true verification of the right answer"] += 1
        return None
    if len(failed) + 1 < k:
        counts["problem: fewer distinct wrong answers than its difficulty asks for"] += 1

    steps = []
    for text, check, truth in [*failed[: k - 1], final]:
        steps.append({"kind": "solve", "text": text.strip(), "correct": truth == "correct"})
        steps.append({"kind": "verify", "text": check, "verdict": truth})
    return steps


def trajectories(
    rows: Iterable[dict], verify: Verify, seed: int, keep: Sequence[float] = KEEP, short: bool = False
) -> tuple[list[dict], Counter]:
    """Rows of a trajectory file from rows of a rollout file, at most one per problem, and the counts for `table`.

    `keep[k - 1]` is the share that is kept of the trajectories with k trials; `short` as `build` takes it.
    """
    problems: dict[str, list[dict]] = {}
    for row in rows:
        problems.setdefault(row["unique_id"], []).append(row)
    counts = Counter({"problems": len(problems), "samples": sum(map(len, problems.values()))})
    examples = []
    for unique_id, samples in problems.items():
        rng = random.Random(f"{seed} {unique_id}")  # its own stream: dropping a problem changes no other
        steps = build(samples, verify, rng, counts, short)
        if steps is None:
            continue
        k = len(steps) // 2
        if rng.random() >= keep[k - 1]:
            counts[f"problem: left out to balance the classes, k = {k}"] += 1
            continue
        counts[f"kept, k = {k}"] += 1
        counts["kept"] += 1
        examples.append(
            {
                "unique_id": unique_id,
                "problem": samples[0]["problem"],
                "answer": samples[0]["answer"],
                "trajectory": steps,
            }
        )
    return examples, counts


def table(counts: Counter) -> str:
    """What was read, dropped and kept, a line each; `counts` as `trajectories` returns them."""
    dropped = sorted(name for name in counts if name.startswith(("sample:", "problem:", "verification:")))
    names = ["problems", "samples", *dropped, *sorted(name for name in counts if name.startswith("kept"))]
    return "\n".join(f"{counts[name]:7,}  {name}" for name in names)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", default=toy.ROLLOUTS, help="rollout file of the base model [%(default)s]")
    parser.add_argument("--out", default=toy.TRAJECTORIES, help="trajectory file to write [%(default)s]")
    parser.add_argument("--verifications", help="verification file [the toy world's rule]")
    parser.add_argument("--style", default="confirmative", choices=STYLES, help="of the rule's checks [%(default)s]")
    parser.add_argument(
        "--keep",
        default=KEEP,
        type=float,
        nargs=len(KEEP),
        metavar="SHARE",
        help="share kept of the trajectories with 1, 2, 3, 4 trials [%(default)s]",
    )
    parser.add_argument("--seed", default=0, type=int, help="of the choice among samples [%(default)s]")
    flags = parser.parse_args(argv)
    verify = from_file(flags.verifications) if flags.verifications else partial(by_rule, style=flags.style)
    rows = read_jsonl(flags.rollouts)
    try:
        examples, counts = trajectories(rows, verify, flags.seed, flags.keep, short=bool(flags.verifications))
    except KeyError as error:
        raise ValueError(f"{flags.rollouts}: a row has no {error}; give a file that sample.py --out wrote") from None
    print(table(counts))
    if not examples:
        raise ValueError(
            f"{flags.rollouts}: no problem gives a trajectory (reasons above); sample more, or easier, problems"
        )
    Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(flags.out, examples)


if __name__ == "__main__":
    runtime.command(main)
