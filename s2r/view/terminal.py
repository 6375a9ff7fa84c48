"""A trajectory for the terminal: what the model wrote, what was read from it, and its rewards.

    ── problem sum/34: 3+4?
    ── solve: answer 8, reward -1
    \\boxed{8}
    ── verify: verdict incorrect, reward +1
    Wait, let me recheck my solution. 3+4=7. Therefore, the answer is incorrect.
    …
    ── stopped by itself; gold answer 7, outcome reward +1
"""

from s2r import rl
from s2r.rollouts import Trajectory


def show(trajectory: Trajectory) -> str:
    """The text above, for one judged trajectory. A problem without a gold answer has no rewards to show."""
    gold, rewards = trajectory.problem.answer, rl.process_rewards(trajectory.actions, trajectory.finished)
    lines = [f"── problem {trajectory.problem.unique_id}: {trajectory.problem.problem}"]
    for action, reward in zip(trajectory.actions, rewards):
        read = f"answer {action.answer}" if action.kind == "solve" else f"verdict {action.verdict}"
        lines += [f"── {action.kind}: {read}" + (f", reward {reward:+.0f}" if gold else ""), action.text.strip()]
    end = "── stopped by itself" if trajectory.finished else "── cut off by the length limit"
    outcome = f"outcome reward {rl.outcome_reward(trajectory.actions):+.0f}"
    lines.append(end + (f"; gold answer {gold}, {outcome}" if gold else ""))
    return "\n".join(lines)
