"""How well a model solves, verifies and corrects: the metrics of paper App. E over the responses of a test set.

    accuracy        last solve right                          responses: all
    first_accuracy  first solve right                         all
    trials          number of solves, mean                    all
    va              Parser(v) = V_golden(s)                    all verifies
    er              Parser(v) = incorrect                      verifies after a wrong solve      (error recall)
    va_right        Parser(v) = correct                        verifies after a right solve      (`er` for right solves)
    cp              s right                                    verifies that say correct         (correct precision)
    icr, cir        last solve right, last solve wrong        first solve wrong, first solve right

so that  accuracy = first_accuracy·(1 − cir) + (1 − first_accuracy)·icr.  A share of nothing is None (null in JSON).
Beside them: `responses`, their number; `finished`, the share that stopped by itself; `tokens`, mean sampled ids a
response; `no_answer`, the share whose last solve has no \\boxed answer; `no_verdict`, the share of verifies that say
neither correct nor incorrect; `by_level`, accuracy and trials for each difficulty; `va_by_trial`, `va` of the first
verify of each response, of the second, and so on. `at_k` adds the `standard_error` of accuracy over problems and, with
n > 1 responses a problem, for k = 1, 2, 4, … and n:

    pass_at_k   at least one of k responses right         estimated from all n (arXiv 2107.03374)
    maj_at_k    the most frequent answer of the first k   answers are one when `equivalent`; a tie goes to the earlier

    python -m s2r.metrics R1.json R2.json …               the table of several reports that sample.py wrote

Called by sample.py, by train_rl.py in every step, and by the toy world.
"""

import json
import sys
from collections.abc import Sequence
from math import comb
from pathlib import Path
from statistics import stdev

from s2r.grade import equivalent

COLUMNS = ("accuracy", "first_accuracy", "trials", "va", "va_right", "er", "cp", "icr", "cir", "finished", "tokens")


def _mean(values: list) -> float | None:
    return sum(values) / len(values) if values else None


def summarize(trajectories: Sequence) -> dict:
    """The metrics above of judged responses, each an object with `.actions`, `.finished`, `.ids`, `.problem.level`.

    A verify is held against the nearest solve before it; one before any solve has nothing to be right about and counts
    in `va`, `va_by_trial` and `no_verdict` alone, as wrong. A response without a solve is wrong, first and last, with 0
    trials.
    """
    first, last, trials, no_answer = [], [], [], []
    checks = []  # of each verify: the verdict that would be true, None before any solve, and the verdict given
    by_trial = {}  # number of the verify in its response -> whether it says what is true
    for trajectory in trajectories:
        solves = [action for action in trajectory.actions if action.kind == "solve"]
        assert all(solve.correct is not None for solve in solves), "judge the actions first"
        first.append(bool(solves and solves[0].correct))
        last.append(bool(solves and solves[-1].correct))
        trials.append(len(solves))
        no_answer.append(not solves or solves[-1].answer is None)
        verifies = [(a.truth, a.verdict) for a in trajectory.actions if a.kind == "verify"]
        checks += verifies
        for trial, (truth, verdict) in enumerate(verifies, start=1):
            by_trial.setdefault(str(trial), []).append(truth is not None and verdict == truth)

    levels = [trajectory.problem.level for trajectory in trajectories]
    by_level = {}
    for level in sorted(set(levels) - {None}):
        rows = [i for i, other in enumerate(levels) if other == level]
        by_level[str(level)] = {
            "accuracy": _mean([last[i] for i in rows]),
            "trials": _mean([trials[i] for i in rows]),
            "responses": len(rows),
        }
    return {
        "accuracy": _mean(last),
        "first_accuracy": _mean(first),
        "trials": _mean(trials),
        "va": _mean([truth is not None and verdict == truth for truth, verdict in checks]),
        "er": _mean([verdict == "incorrect" for truth, verdict in checks if truth == "incorrect"]),
        "va_right": _mean([verdict == "correct" for truth, verdict in checks if truth == "correct"]),
        "va_by_trial": {trial: _mean(true) for trial, true in by_trial.items()},
        "cp": _mean([truth == "correct" for truth, verdict in checks if verdict == "correct" and truth]),
        "icr": _mean([end for start, end in zip(first, last) if not start]),
        "cir": _mean([not end for start, end in zip(first, last) if start]),
        "by_level": by_level,
        "finished": _mean([trajectory.finished for trajectory in trajectories]),
        "tokens": _mean([len(trajectory.ids) for trajectory in trajectories]),
        "no_answer": _mean(no_answer),
        "no_verdict": _mean([verdict is None for _, verdict in checks]),
        "responses": len(trajectories),
    }


def at_k(trajectories: Sequence) -> dict:
    """`standard_error`, `pass_at_k` and `maj_at_k` of judged responses, several a problem, all problems alike."""
    by_problem: dict[str, list] = {}
    for trajectory in trajectories:
        by_problem.setdefault(trajectory.problem.unique_id, []).append(trajectory)
    last = [[_last_solve(t) for t in sorted(group, key=lambda t: t.sample)] for group in by_problem.values()]
    right = [[bool(solve and solve.correct) for solve in solves] for solves in last]  # (problems, n)
    shares = [sum(row) / len(row) for row in right]
    error = stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else None
    n = min(map(len, right))
    if n == 1:
        return {"standard_error": error}
    ks = sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
    misses = {k: [comb(len(row) - sum(row), k) / comb(len(row), k) for row in right] for k in ks}
    return {
        "standard_error": error,
        "pass_at_k": {str(k): 1 - _mean(misses[k]) for k in ks},
        "maj_at_k": {str(k): _mean([bool((s := majority(row[:k])) and s.correct) for row in last]) for k in ks},
    }


def _last_solve(trajectory):
    """The last solve of a trajectory, None without one."""
    return next((action for action in reversed(trajectory.actions) if action.kind == "solve"), None)


def majority(solves: Sequence):
    """The first solve with the most frequent answer, None when no solve has an answer."""
    groups: list[list] = []
    for solve in solves:
        if solve is None or solve.answer is None:
            continue
        group = next((g for g in groups if equivalent(solve.answer, g[0].answer)), None)
        if group is None:
            groups.append([solve])
        else:
            group.append(solve)
    return max(groups, key=len)[0] if groups else None


def table(rows: dict[str, dict]) -> str:
    """Results of `summarize` by name, a line each, shares in per cent; below, by level and by k, what is known of it.

    `standard_error`, where `at_k` has put it, stands behind the accuracy.
    """

    def cell(metrics: dict, name: str) -> str:
        value = metrics.get(name)
        if value is None:
            return "–"
        if name == "accuracy" and metrics.get("standard_error") is not None:
            return f"{100 * value:.1f} ±{100 * metrics['standard_error']:.1f}"
        return f"{value:.2f}" if name == "trials" else f"{value:.0f}" if name == "tokens" else f"{100 * value:.1f}"

    text = _grid([["", *COLUMNS]] + [[name, *(cell(row, column) for column in COLUMNS)] for name, row in rows.items()])
    tables = [text]
    levels = sorted({level for row in rows.values() for level in row["by_level"]}, key=int)
    if levels:
        grid = [["accuracy / trials", *(f"level {level}" for level in levels)]]
        for name, row in rows.items():
            by_level = [row["by_level"].get(level, {}) for level in levels]
            grid.append([name, *(f"{cell(at, 'accuracy')} / {cell(at, 'trials')}" for at in by_level)])
        tables.append(_grid(grid))
    ks = sorted({k for row in rows.values() for k in row.get("pass_at_k", {})}, key=int)
    if ks:
        grid = [["pass / maj", *(f"@{k}" for k in ks)]]
        for name, row in rows.items():
            passed, agreed = row.get("pass_at_k", {}), row.get("maj_at_k", {})
            grid.append([name, *(f"{cell(passed, k)} / {cell(agreed, k)}" for k in ks)])
        tables.append(_grid(grid))
    return "\n\n".join(tables)


def _grid(lines: list[list[str]]) -> str:
    """Cells in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def main(paths: list[str]) -> None:
    reports = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such report; sample.py --report writes one")
        report = json.loads(Path(path).read_text())
        if not isinstance(report, dict) or "by_level" not in report:
            raise ValueError(f"{path}: not a report; give a file that sample.py --report wrote")
        reports[path.removesuffix(".json")] = report
    print(table(reports))


if __name__ == "__main__":
    from s2r import runtime  # which imports this module

    runtime.command(lambda: main(sys.argv[1:]))
