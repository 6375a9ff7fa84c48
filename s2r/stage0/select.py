"""What is worth learning from: problems neither too easy nor too hard, and recorded rollouts fit for offline RL.

    python -m s2r.selection --rollouts ROLLOUTS.jsonl --out PROBLEMS.jsonl      problems for RL, by sampled accuracy

A problem that is always solved, or never, teaches nothing: at the outcome level all its rollouts have the
reward of their baseline (paper §2.4, App. F). Reads what `sample.py --n 8 --temperature 0.7 --out` writes. Called by
`train_rl.py --offline`, which trains on the recorded rollouts themselves and is choosier (`fault`).
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from s2r import runtime
from s2r.data import read_jsonl, write_jsonl
from s2r.rl import outcome_reward
from s2r.rollouts import Trajectory
from s2r.grammar import Action

ACCURACY = (0.1, 0.7)  # sampled accuracy of the problems that are kept, both ends included (paper)
MAX_ACTIONS = 20  # longest trajectory that is kept (paper)


def sampled_accuracy(rewards: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Share of right rollouts of each problem, from (unique_id, R_o) of every rollout."""
    by_problem = defaultdict(list)
    for unique_id, reward in rewards:
        by_problem[unique_id].append(reward > 0)
    return {unique_id: sum(right) / len(right) for unique_id, right in by_problem.items()}


def fault(actions: Sequence[Action]) -> str | None:
    """Why a judged trajectory is left out of offline RL, None if it is kept (paper, App. F)."""
    if any(action.kind != ("solve", "verify")[i % 2] for i, action in enumerate(actions)):
        return "solve and verify do not alternate"
    for solve, verify in zip(actions[::2], actions[1:-1:2]):  # verifies with something after them
        if solve.correct and verify.verdict == "correct":
            return "goes on after a right answer was found right"
    if len(actions) > MAX_ACTIONS:
        return f"more than {MAX_ACTIONS} actions"
    return None


def select(trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], list[float], Counter]:
    """The trajectories fit for offline RL, the sampled accuracy of the problem of each, and what was dropped, by reason.

    The accuracy counts all rollouts of a problem, also those that are dropped.
    """
    accuracy = sampled_accuracy([(t.problem.unique_id, outcome_reward(t.actions)) for t in trajectories])
    kept, counts = [], Counter({"rollouts": len(trajectories)})
    for t in trajectories:
        reason = side(accuracy[t.problem.unique_id], *ACCURACY) or fault(t.actions)
        counts[f"dropped: {reason}" if reason else "kept"] += 1
        if not reason:
            kept.append(t)
    return kept, [accuracy[t.problem.unique_id] for t in kept], counts


def side(accuracy: float, low: float, high: float) -> str | None:
    """Why a problem of this sampled accuracy is left out, None if it is kept."""
    return "problem too hard" if accuracy < low else "problem too easy" if accuracy > high else None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", required=True, help="rollout file, several samples a problem")
    parser.add_argument("--out", required=True, help="problem file to write")
    parser.add_argument(
        "--accuracy",
        nargs=2,
        type=float,
        default=ACCURACY,
        metavar=("LOW", "HIGH"),
        help="sampled accuracy of the problems to keep %(default)s",
    )
    flags = parser.parse_args(argv)
    rows = read_jsonl(flags.rollouts)
    try:
        accuracy = sampled_accuracy([(row["unique_id"], row["reward"]) for row in rows])
        problems = {row["unique_id"]: {key: row[key] for key in ("unique_id", "problem", "answer")} for row in rows}
        levels = {row["unique_id"]: row["level"] for row in rows if row.get("level") is not None}
    except KeyError as error:
        raise ValueError(f"{flags.rollouts}: a row has no {error}; give a file that sample.py --out wrote") from None
    reasons = {unique_id: side(share, *flags.accuracy) for unique_id, share in accuracy.items()}
    for reason, count in Counter(reason or "kept" for reason in reasons.values()).items():
        print(f"{count:7,}  {reason}")
    kept = [unique_id for unique_id, reason in reasons.items() if reason is None]
    if not kept:
        raise ValueError(f"{flags.rollouts}: no problem has a sampled accuracy in {flags.accuracy}; widen --accuracy")
    Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(
        flags.out,
        (
            problems[unique_id] | ({"level": levels[unique_id]} if unique_id in levels else {})
            for unique_id in kept
        ),
    )


if __name__ == "__main__":
    runtime.command(main)
