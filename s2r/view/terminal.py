"""A trajectory for the terminal: what the model wrote, what was read from it, and its rewards.

    ── problem sum/34: 3+4?
    ── solve: answer 8, reward -1
    \\boxed{8}
    ── verify: verdict incorrect, reward +1
    Wait, let me recheck my solution. 3+4=7. Therefore, the answer is incorrect.
    …
    ── stopped by itself; gold answer 7, outcome reward +1

Called by `sample.py` and, now and then, by `train_rl.py`.
"""

from s2r import rl
from s2r.rollouts import Trajectory

COLOURS = {"solve": 34, "verify": 33, "good": 32, "bad": 31}  # ANSI: blue, yellow, green, red


def show(trajectory: Trajectory, colour: bool = False) -> str:
    """The text above, for one judged trajectory. `colour` adds the terminal's colour codes.

    A problem without a gold answer has no rewards to show.
    """

    def paint(text: str, name: str) -> str:
        return f"\033[{COLOURS[name]}m{text}\033[0m" if colour else text

    def rewarded(what: str, reward: float) -> str:
        return paint(f"{what} {reward:+.0f}", "good" if reward > 0 else "bad")

    gold = trajectory.problem.answer
    lines = [f"── problem {trajectory.problem.unique_id}: {trajectory.problem.problem}"]
    for action, reward in zip(trajectory.actions, rl.process_rewards(trajectory.actions, trajectory.finished)):
        read = f"answer {action.answer}" if action.kind == "solve" else f"verdict {action.verdict}"
        head = paint(f"── {action.kind}: {read}", action.kind)
        lines += [head + (f", {rewarded('reward', reward)}" if gold else ""), action.text.strip()]
    end = "── stopped by itself" if trajectory.finished else "── cut off by the length limit"
    outcome = rewarded("outcome reward", rl.outcome_reward(trajectory.actions))
    lines.append(end + (f"; gold answer {gold}, {outcome}" if gold else ""))
    return "\n".join(lines)
