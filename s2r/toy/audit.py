"""The reason audit: are checks that give a true verdict right for the right reason?

    python -m s2r.toy.audit ROLLOUTS.jsonl …

A verify is rewarded for its verdict, so it can be right by luck. In this world a check can be read: it has to add up the
numbers of the puzzle with the signs of the answer just given, every sum and the comparison with the target have to be
true, and the verdict has to follow. The command adds `"sound": bool` to every verify action of the files, and prints the
fraction of true verdicts that are sound, for first checks, second ones, and so on, and the first fault of the others.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from s2r.data import write_jsonl
from s2r.grammar import VERIFY_OPENING, cut, parse_verdict
from s2r.run.flags import start
from s2r.stage0.build import read_rollouts
from s2r.toy.world import PROBLEM, SIGNS, compare, verify

STEP = re.compile(r"(\d+) (plus|minus) (\d+) is (\d+)")


def fault(problem: str, answer: str | None, check: str) -> str:
    """The first fault of a check of this answer to this problem; "" if it is sound."""
    body = check.strip().removeprefix(VERIFY_OPENING).strip()
    if body in (verify(problem, answer, style)[0] for style in ("confirmative", "solving")):
        return ""
    found = PROBLEM.fullmatch(problem)
    xs, target = list(map(int, found[1].split(" _ "))), int(found[2])
    steps = [(int(a), sign, int(x), int(b)) for a, sign, x, b in STEP.findall(body)]
    if [sign for _, sign, _, _ in steps] != (answer or "").split():
        return "other signs than the answer's"
    if not steps or [steps[0][0], *(x for _, _, x, _ in steps)] != xs or any(
        a[3] != b[0] for a, b in zip(steps, steps[1:])
    ):
        return "other numbers than the puzzle's"
    if any(a + SIGNS[sign] * x != b for a, sign, x, b in steps):
        return "a wrong sum"
    if compare(steps[-1][3], target) not in body:
        return "a wrong comparison"
    return "a verdict that does not follow"


def mark(rows: list[dict]) -> dict[int, Counter]:
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
            found = fault(row["problem"], answer, check)
            action["sound"] = not found and action["verdict"] == parse_verdict(check)
            if action["reward"] > 0:
                faults[number][found] += 1
    return dict(faults)


@dataclass(frozen=True)
class Config:
    rollouts: list[str]  # files that sample.py --out wrote


def main(cfg: Config) -> None:
    for path in cfg.rollouts:
        rows = read_rollouts(path)
        faults = mark(rows)
        write_jsonl(path, rows)
        total = sum(faults.values(), Counter())
        if not total:
            raise ValueError(f"{path}: no check with a true verdict; give rollouts of a model that checks itself")
        print(f"{path}: {total.total()} checks with a true verdict, sound: {100 * total[''] / total.total():.1f} %")
        for number, count in sorted(faults.items()):
            others = ", ".join(f"{n} {what}" for what, n in count.most_common() if what)
            print(f"  check {number}: {100 * count[''] / count.total():.1f} % of {count.total()}  {others}")


if __name__ == "__main__":
    start(main, Config)
