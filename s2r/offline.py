"""Offline RL: learn from rollouts that were sampled once (paper §2.4, App. F).

    what                                                         function
    problems worth learning from: accuracy in [0.1, 0.7]         out_of_range
    trajectories left out: no alternation, too long, …           unfit
    b̂, offline: mean reward of the spans in one group            offline_baseline
    A and L are those of online RL, with π_old = the policy that sampled: (5), (6)

    group of a span             --baseline      MATH500 in the paper
    accuracy, position          position        83.4
    accuracy, reward context    context         82.4
    reward context              context-only    82.4

Accuracy is the fraction of right ones among all recorded rollouts of the span's problem. Departs from the paper, like
the release: it is exact, not binned. β has no effect offline: π_old is π_ref, so the KL term of (5) is zero. (The
release uses the KL of the current policy instead.)

Called by `train_rl.py --offline` and by `s2r/stage0/select.py`.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from s2r.grammar import Action
from s2r.hf.tokenizer import Tokenizer
from s2r.model import Transformer
from s2r.packing import pack, policy_logp
from s2r.rl import Credit, group_means, outcome_reward, reward_contexts, span_rewards
from s2r.rollouts import Trajectory, load_rollouts, sequences

ACCURACY = (0.1, 0.7)  # sampled accuracy of the problems that are kept, both ends included (paper)
MAX_ACTIONS = 20  # longest trajectory that is kept (paper)
GAP = {torch.float32: 0.01, torch.bfloat16: 0.05}  # mean |Δ log p| above which the rollouts are another model's


def sampled_accuracy(rewards: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Fraction of right rollouts of each problem, from (unique_id, R_o) of every rollout."""
    by_problem = defaultdict(list)
    for unique_id, reward in rewards:
        by_problem[unique_id].append(reward > 0)
    return {unique_id: sum(right) / len(right) for unique_id, right in by_problem.items()}


def out_of_range(accuracy: float, low: float, high: float) -> str | None:
    """Why a problem of this sampled accuracy is left out, None if it is kept.

    At the outcome level, and with b̂ by accuracy, a problem that is always solved, or never, teaches only the KL term.
    """
    return "problem too hard" if accuracy < low else "problem too easy" if accuracy > high else None


def unfit(actions: Sequence[Action]) -> str | None:
    """Why a judged trajectory is left out of offline RL, None if it is kept (App. F)."""
    if any(action.kind != ("solve", "verify")[i % 2] for i, action in enumerate(actions)):
        return "solve and verify do not alternate"
    for solve, verify, _ in zip(actions[::2], actions[1::2], actions[2::2]):  # a solve, its check, and what follows
        if solve.correct and verify.verdict == "correct":
            return "continues after a right answer was found right"
    if len(actions) > MAX_ACTIONS:
        return f"more than {MAX_ACTIONS} actions"
    return None


def recall(
    path: str | Path, tokenizer: Tokenizer, temperature: float, per_step: int
) -> tuple[list[Trajectory], list[float], Counter]:
    """The rollouts of a file that are fit to learn from, the sampled accuracy of each one's problem, and counts.

    The counts say what was kept and dropped, by reason. Accuracy is over all rollouts of a problem, also those that
    are dropped. Raises ValueError for rollouts of another temperature, and when fewer are left than one step takes.
    """
    trajectories = load_rollouts(path, tokenizer)
    if others := {t.temperature for t in trajectories} - {temperature}:
        found = f"sampled at temperature {min(others)}, --temperature is {temperature}"
        raise ValueError(f"{path}: {found}; make them the same, or no probability is right")
    accuracy = sampled_accuracy([(t.problem.unique_id, outcome_reward(t.actions)) for t in trajectories])
    reasons = [out_of_range(accuracy[t.problem.unique_id], *ACCURACY) or unfit(t.actions) for t in trajectories]
    counts = Counter({"rollouts": len(trajectories)})
    counts.update(f"dropped: {reason}" if reason else "kept" for reason in reasons)
    kept = [t for t, reason in zip(trajectories, reasons) if not reason]
    if len(kept) < per_step:
        counted = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise ValueError(
            f"{path}: {len(kept)} of {len(trajectories)} rollouts are fit to learn from ({counted}), a step takes "
            f"{per_step}; lower --problems or --rollouts, or sample more problems that the model solves sometimes"
        )
    return kept, [accuracy[t.problem.unique_id] for t in kept], counts


def offline_baseline(rewards: Sequence[Sequence[float]], accuracy: Sequence[float], by: str) -> list[list[float]]:
    """b̂ of App. F: for each span, the mean reward over the recorded set of all spans in its group.

    `rewards` holds the rewards of each trajectory's spans, `accuracy` the sampled accuracy of its problem; `by` is a
    --baseline (module docstring). Same shape as `rewards`. At the outcome level, with one span a trajectory,
    "position" and "context" both mean the accuracy alone.
    """
    groups = []
    for fraction, row in zip(accuracy, rewards):
        places = range(len(row)) if by == "position" else reward_contexts(row)
        groups.append([place if by == "context-only" else (fraction, place) for place in places])
    return group_means(rewards, groups)


def offline_credit(trajectories: Sequence, level: str, accuracy: Sequence[float], by: str) -> list[Credit]:
    """Credit within a whole recorded set; `accuracy` and `by` as `offline_baseline` takes them."""
    lengths, reward = span_rewards(trajectories, level)
    return [Credit(n, r, b) for n, r, b in zip(lengths, reward, offline_baseline(reward, accuracy, by))]


@torch.no_grad()
def check_policy(path: str | Path, trajectories: Sequence[Trajectory], model: Transformer, budget: int) -> None:
    """Raises ValueError if the recorded log-probabilities of these rollouts are not those of `model`.

    The importance ratio of (6) needs π_old to be the policy that sampled; another model with the same tokenizer would
    otherwise go unnoticed. Compares the mean |Δ log p| over all tokens with GAP.
    """
    packs = pack(*sequences(trajectories), budget, model.embed.device)
    logp = torch.cat([policy_logp(model, p, trajectories[0].temperature)[0] for p in packs]).cpu()
    gap = (logp - torch.tensor([x for t in trajectories for x in t.logp])).abs().mean().item()
    if not gap <= GAP[model.dtype]:
        raise ValueError(
            f"{path}: its log-probabilities are on average {gap:.3g} nats away from those of --model; "
            "give the model that sampled these rollouts, and its --dtype"
        )
