"""What is wrong with a check of the toy world, for `s2r/stage0/audit.py`.

    python -m s2r.toy.audit ROLLOUTS.jsonl …

It has to add up the numbers of the puzzle with the signs of the answer just given, every sum and the comparison with the
target have to be true, and the verdict has to follow. A check in other words is not sound either.
"""

import re

from s2r.grammar import parse_verdict
from s2r.run.flags import start
from s2r.stage0.audit import Config, audit
from s2r.toy.world import PROBLEM, SIGNS, compare, verify

STEP = re.compile(r"(\d+) (plus|minus) (\d+) is (\d+)")


def fault(problem: str, answer: str | None, check: str) -> str:
    """The first fault of a check of this answer to this problem; "" if it is sound."""
    if check in (verify(problem, answer, style)[0] for style in ("confirmative", "solving")):
        return ""
    found = PROBLEM.fullmatch(problem)
    xs, target = list(map(int, found[1].split(" _ "))), int(found[2])
    steps = [(int(a), sign, int(x), int(b)) for a, sign, x, b in STEP.findall(check)]
    if [sign for _, sign, _, _ in steps] != (answer or "").split():
        return "other signs than the answer's"
    if not steps or [steps[0][0], *(x for _, _, x, _ in steps)] != xs or any(
        a[3] != b[0] for a, b in zip(steps, steps[1:])
    ):
        return "other numbers than the puzzle's"
    if any(a + SIGNS[sign] * x != b for a, sign, x, b in steps):
        return "a wrong sum"
    if compare(steps[-1][3], target) not in check:
        return "a wrong comparison"
    verdict = "correct" if steps[-1][3] == target else "incorrect"
    return "other words" if parse_verdict(check) == verdict else "a verdict that does not follow"


if __name__ == "__main__":
    start(lambda cfg: audit(cfg.rollouts, fault), Config)
