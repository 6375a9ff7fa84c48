"""How well a model solves, verifies and corrects: the metrics of paper App. E over the responses of a test set.

    accuracy        last solve right                          responses: all
    first_accuracy  first solve right                         all
    trials          number of solves, mean                    all
    va              Parser(v) = V_golden(s)                    all verifies
    er              Parser(v) = incorrect                      verifies after a wrong solve      (error recall)
    cp              s right                                    verifies that say correct         (correct precision)
    icr, cir        last solve right, last solve wrong        first solve wrong, first solve right

so that  accuracy = first_accuracy·(1 − cir) + (1 − first_accuracy)·icr.  A share of nothing is None (null in JSON).
Beside them: `responses`, their number; `finished`, the share that stopped by itself; `tokens`, mean sampled ids a
response; `no_answer`, the share whose last solve has no \\boxed answer; `no_verdict`, the share of verifies that say
neither correct nor incorrect; `by_level`, accuracy and trials for each difficulty.

Called by sample.py and by the evaluations of train_rl.py.
"""

from collections.abc import Sequence

COLUMNS = ("accuracy", "first_accuracy", "trials", "va", "er", "cp", "icr", "cir", "finished", "tokens")


def _mean(values: list) -> float | None:
    return sum(values) / len(values) if values else None


def summarize(trajectories: Sequence) -> dict:
    """The metrics above of judged responses, each an object with `.actions`, `.finished`, `.ids`, `.problem.level`.

    A verify is held against the nearest solve before it; one before any solve has nothing to be right about and counts
    in `va` alone, as wrong. A response without a solve is wrong, first and last, with 0 trials.
    """
    first, last, trials, no_answer = [], [], [], []
    checks = []  # of each verify: the verdict that would be true, None before any solve, and the verdict given
    for trajectory in trajectories:
        solves = [action for action in trajectory.actions if action.kind == "solve"]
        assert all(solve.correct is not None for solve in solves), "judge the actions first"
        first.append(bool(solves and solves[0].correct))
        last.append(bool(solves and solves[-1].correct))
        trials.append(len(solves))
        no_answer.append(not solves or solves[-1].answer is None)
        truth = None
        for action in trajectory.actions:
            if action.kind == "solve":
                truth = "correct" if action.correct else "incorrect"
            else:
                checks.append((truth, action.verdict))

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


def table(rows: dict[str, dict]) -> str:
    """Results of `summarize` by name, a line each, shares in per cent; below, accuracy / trials by level if known."""

    def cell(metrics: dict, name: str) -> str:
        value = metrics.get(name)
        if value is None:
            return "–"
        return f"{value:.2f}" if name == "trials" else f"{value:.0f}" if name == "tokens" else f"{100 * value:.1f}"

    text = _grid([["", *COLUMNS]] + [[name, *(cell(row, column) for column in COLUMNS)] for name, row in rows.items()])
    levels = sorted({level for row in rows.values() for level in row["by_level"]}, key=int)
    if not levels:
        return text
    grid = [["accuracy / trials", *(f"level {level}" for level in levels)]]
    for name, row in rows.items():
        by_level = [row["by_level"].get(level, {}) for level in levels]
        grid.append([name, *(f"{cell(at, 'accuracy')} / {cell(at, 'trials')}" for at in by_level)])
    return text + "\n\n" + _grid(grid)


def _grid(lines: list[list[str]]) -> str:
    """Cells in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
