"""The reason audit: are checks that give a true verdict right for the right reason?

    python -m s2r.stage0.audit ROLLOUTS.jsonl …            checks like those of `--by formula`
    python -m s2r.toy.audit ROLLOUTS.jsonl …               checks of the toy world

A verify is rewarded for its verdict, so it can be right by luck. Checks that follow a rule can be read: every calculation
in them has to be true, what is compared has to follow from the answer just given, and the verdict has to follow. The
commands add `"sound": bool` to every verify action of the files, and print the fraction of true verdicts that are sound: in
all, by verdict, and for first checks, second ones, and so on, with the first fault of the others.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from s2r.grammar import VERIFY_OPENING, cut, parse_verdict
from s2r.run.files import write_jsonl
from s2r.run.flags import start
from s2r.stage0 import formula
from s2r.stage0.build import read_rollouts

Fault = Callable[[str, str | None, str], str]
"""(problem, answer, check without its opening) -> the first fault of the check; "" if it is sound."""


def mark(rows: list[dict], fault: Fault) -> dict[int, Counter]:
    """Add `"sound"` to every verify action of these rows of a rollout file; what is wrong with those with a true verdict.

    Number of the check in its response -> fault -> how many; the fault of a sound check is "".
    """
    faults = defaultdict(Counter)
    for row in rows:
        text, answer, number = row["text"].encode(), None, 0
        starts = [*cut(text), (len(text), "")]
        for action, (begin, _), (end, _) in zip(row["actions"], starts, starts[1:]):
            if action["kind"] == "solve":
                answer = action["answer"]
                continue
            check, number = text[begin:end].decode(errors="replace"), number + 1
            found = fault(row["problem"], answer, check.strip().removeprefix(VERIFY_OPENING).strip())
            action["sound"] = not found and action["verdict"] == parse_verdict(check)
            if action["reward"] > 0:
                faults[number][found] += 1
    return dict(faults)


def audit(rollouts: Sequence[str], fault: Fault) -> None:
    """Mark these rollout files and print what was found."""
    for path in rollouts:
        rows = read_rollouts(path)
        faults = mark(rows, fault)
        write_jsonl(path, rows)
        true = [action for row in rows for action in row["actions"] if action["kind"] == "verify" and action["reward"] > 0]
        print(f"{path}: checks with a true verdict that are sound: {_fraction(a['sound'] for a in true)}")
        for verdict in ("correct", "incorrect"):
            print(f'  "{verdict}": {_fraction(a["sound"] for a in true if a["verdict"] == verdict)}')
        for number, count in sorted(faults.items()):
            others = ", ".join(f"{n} {what}" for what, n in count.most_common() if what)
            print(f"  check {number}: {_fraction(not what for what in count.elements())}  {others}")


def _fraction(values: Iterable[bool]) -> str:
    """ "50.0 % of 2", or "none" if there is no value."""
    values = list(values)
    return f"{100 * sum(values) / len(values):.1f} % of {len(values)}" if values else "none"


@dataclass(frozen=True)
class Config:
    rollouts: list[str]  # files that sample.py --out wrote


if __name__ == "__main__":
    start(lambda cfg: audit(cfg.rollouts, formula.fault), Config)
