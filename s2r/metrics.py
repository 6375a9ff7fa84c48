"""How well a model solves, verifies and corrects: the metrics of paper App. E over a set of responses.

An example of four responses, one letter per action: + is a right solve, - a wrong one; c is a verify that
says "correct", i one that says "incorrect". A verify is true if its verdict fits the last solve before it.

    response   first solve   last solve   solves   true verifies
    + c        right         right        1        1 of 1
    - i + c    wrong         right        2        2 of 2
    - c        wrong         wrong        1        0 of 1
    + i - c    right         wrong        2        0 of 2

    metric           definition                                                        in the example
    accuracy         fraction of responses whose last solve is right                        2/4
    first_accuracy   fraction of responses whose first solve is right                       2/4
    trials           solves per response, mean                                              6/4
    va               verification accuracy (VA): fraction of verifies that are true         3/6
    er               error recall (ER): the same, verifies of wrong solves only             1/3
    va_right         the same, verifies of right solves only                                2/3
    cp               correct precision (CP): the same, verifies that say "correct" only     2/4
    icr              incorrect to correct (ICR): fraction of wrong first solves corrected   1/2
    cir              correct to incorrect (CIR): fraction of right first solves lost        1/2
    say_correct      fraction of "correct" among the readable verdicts                      4/6

so that  accuracy = first_accuracy·(1 − cir) + (1 − first_accuracy)·icr.  A fraction whose denominator is 0 is None.

`summarize` computes these and: `responses`, their number; `finished`, the fraction that ended in a stop token;
`tokens`, sampled per response; `no_answer`, the fraction whose last solve has no \\boxed answer; `no_verdict`, the
fraction of verifies without a readable verdict; `repeats`, of all solves after the first the fraction whose answer the
response already gave; `by_level`, accuracy and trials per difficulty; `va_by_trial`, `va` of all first
verifies, of all second ones, and so on. `at_k` computes the `standard_error` of accuracy over problems; `right`, how many
of the n responses to each problem are right, for n = 1 as a string of "1" and "0"; for n > 1 and k = 1, 2, 4, … and n,
`pass_at_k` (is one of k responses right? estimated from all n, arXiv 2107.03374) and `maj_at_k` (is the most frequent
answer of the first k right?).
"""

from collections.abc import Sequence
from itertools import zip_longest
from math import comb
from statistics import stdev

from s2r.grade import equivalent


def _mean(values: list) -> float | None:
    return sum(values) / len(values) if values else None


def _true(verifies: list) -> float | None:
    """Fraction of verifies whose verdict is true."""
    return _mean([verify.right for verify in verifies])


def summarize(trajectories: Sequence) -> dict:
    """The metrics above of judged responses: objects with `.actions`, `.finished`, `.ids`, `.problem.level`.

    A verify before any solve counts only in `va`, `va_by_trial`, `say_correct` and `no_verdict`. A response
    without a solve is wrong, first and last, with 0 trials.
    """
    solves = [[action for action in t.actions if action.kind == "solve"] for t in trajectories]
    verifies = [[action for action in t.actions if action.kind == "verify"] for t in trajectories]
    assert all(solve.correct is not None for row in solves for solve in row), "judge the actions first"
    first = [bool(row and row[0].correct) for row in solves]
    last = [bool(row and row[-1].correct) for row in solves]
    trials = [len(row) for row in solves]
    by_level = {}
    for level in sorted({t.problem.level for t in trajectories} - {None}):
        at = [i for i, t in enumerate(trajectories) if t.problem.level == level]
        right, tried = _mean([last[i] for i in at]), _mean([trials[i] for i in at])
        by_level[str(level)] = {"accuracy": right, "trials": tried, "responses": len(at)}
    every = [verify for row in verifies for verify in row]
    answers = [[solve.answer for solve in row] for row in solves]
    by_trial = enumerate(zip_longest(*verifies), start=1)  # (1, all first verifies), (2, all second ones), …
    return {
        "accuracy": _mean(last),
        "first_accuracy": _mean(first),
        "trials": _mean(trials),
        "va": _true(every),
        "er": _true([verify for verify in every if verify.truth == "incorrect"]),
        "va_right": _true([verify for verify in every if verify.truth == "correct"]),
        "va_by_trial": {str(number): _true(list(filter(None, column))) for number, column in by_trial},
        "cp": _true([verify for verify in every if verify.verdict == "correct" and verify.truth]),
        "icr": _mean([end for start, end in zip(first, last) if not start]),
        "cir": _mean([not end for start, end in zip(first, last) if start]),
        "say_correct": _mean([verify.verdict == "correct" for verify in every if verify.verdict]),
        "by_level": by_level,
        "finished": _mean([t.finished for t in trajectories]),
        "tokens": _mean([len(t.ids) for t in trajectories]),
        "no_answer": _mean([not row or row[-1].answer is None for row in solves]),
        "no_verdict": _mean([verify.verdict is None for verify in every]),
        "repeats": _mean([bool(row[i]) and row[i] in row[:i] for row in answers for i in range(1, len(row))]),
        "responses": len(trajectories),
    }


def at_k(trajectories: Sequence) -> dict:
    """`standard_error`, `right`, `pass_at_k` and `maj_at_k` of judged responses, the same number n for every problem."""
    by_problem: dict[str, list] = {}
    for t in sorted(trajectories, key=lambda t: t.sample):
        solves = [action for action in t.actions if action.kind == "solve"]
        by_problem.setdefault(t.problem.unique_id, []).append(solves[-1] if solves else None)
    last = list(by_problem.values())  # (problems, n) last solves
    right = [sum(bool(solve and solve.correct) for solve in row) for row in last]  # (problems,)
    n = len(last[0])
    assert all(len(row) == n for row in last), "each problem needs n responses"
    accuracy = [count / n for count in right]
    found = {"standard_error": stdev(accuracy) / len(accuracy) ** 0.5 if len(accuracy) > 1 else None}
    found["right"] = "".join(map(str, right)) if n == 1 else right
    if n > 1:
        ks = sorted({2**i for i in range(n.bit_length())} | {n})
        found["pass_at_k"] = {str(k): _mean([1 - comb(n - count, k) / comb(n, k) for count in right]) for k in ks}
        votes = {k: [majority(row[:k]) for row in last] for k in ks}
        found["maj_at_k"] = {str(k): _mean([bool(vote and vote.correct) for vote in votes[k]]) for k in ks}
    return found


def majority(solves: Sequence):
    """The first solve with the most frequent answer, by `equivalent`; a tie goes to the earlier answer.

    An entry may be None, for a response without a solve. None comes back if no solve has an answer.
    """
    groups: dict[str, list] = {}  # answer -> the solves that give it
    for solve in solves:
        if solve is not None and solve.answer is not None:
            same = (answer for answer in groups if equivalent(solve.answer, answer))
            groups.setdefault(next(same, solve.answer), []).append(solve)
    return max(groups.values(), key=len)[0] if groups else None


def warnings(metrics: dict, rewards: Sequence[float]) -> list[str]:
    """Warning signs, a sentence each, in the `metrics` of a training step (of `summarize`) and its trajectories' rewards."""
    said = 0.5 if metrics["say_correct"] is None else metrics["say_correct"]  # no verdicts, no warning
    repeats = metrics["repeats"] or 0
    reasons = {
        "all rewards are equal: no response is better than another": len(set(rewards)) == 1,
        "no response ends in a boxed answer, so none can be right": metrics["no_answer"] == 1,
        "no response finished: a higher --max-new-tokens may help": metrics["finished"] == 0,
        'more than 95 % of the verdicts say "correct": the model may no longer verify': said > 0.95,
        'more than 95 % of the verdicts say "incorrect": the model may no longer verify': said < 0.05,
        "more than 80 % of the retries give an answer that was given before": repeats > 0.8,
    }
    return [reason for reason, holds in reasons.items() if holds]
