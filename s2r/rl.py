"""Every equation of S²R's online reinforcement learning (Ma et al. 2025, arXiv 2502.12853, §2.3).

A trajectory y is a sequence of |y|_a actions, alternately solve and verify. One loss function serves both levels.
A *span* is the piece of y that has one reward, one advantage and one ratio. The levels differ in what a span is:

    level     span         reward           baseline                        loss
    outcome   trajectory   R_o(x, y)        leave-one-out over M rollouts   (2), (3)
    process   action       R_a(a_t)         mean over the reward context    (4), (5), (6)

    what                                    equation    function
    R_o                                     §2.3.1      outcome_reward
    R_a                                     §2.3.2      process_rewards
    R(a_t), the reward context              §2.3.2      reward_contexts
    b̂, leave-one-out                        (2)         leave_one_out
    b̂, by reward context                    (4)         context_baseline
    A = R − b̂ − β·log(π_old / π_ref)        (2), (5)    advantages
    r = (π_θ / π_old)^(1/tokens)            departs     policy_loss
    L = −E[min(r·A, clip(r, 1±ε)·A)]        (3), (6)    policy_loss, with the weights 1/B, 1/(B·|y|_a) of spans

Rewards are ±1 and come from rules alone. The baselines of offline RL are in `s2r/offline.py`. A micro-batch has J spans and
Q response tokens. `span` (Q,) gives the span of each token, so a sum over the tokens of each span is one `index_add`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2r.grammar import Action


def outcome_reward(actions: Sequence[Action]) -> float:
    """R_o: +1 if the last solve of a judged trajectory is right, else −1; no solve at all is −1."""
    solves = [action for action in actions if action.kind == "solve"]
    return 1.0 if solves and solves[-1].correct else -1.0


def process_rewards(actions: Sequence[Action], finished: bool) -> list[float]:
    """R_a of each action of a judged trajectory: +1 for a right solve and for a verify with a true verdict, else −1.

    A verify checks the last solve before it. An unreadable verdict, or a verify without a solve before it, earns −1.
    Departs from the paper, like the release: the action that the length limit cut off (`finished` False) earns −1.
    """
    rewards = [1.0 if action.right else -1.0 for action in actions]
    if rewards and not finished:
        rewards[-1] = -1.0
    return rewards


def reward_contexts(rewards: Sequence[float]) -> list[tuple[float, ...]]:
    """R(a_t) = (R_a(a_1), …, R_a(a_{t−1})): for each action, the rewards of the actions before it."""
    return [tuple(rewards[:t]) for t in range(len(rewards))]


def leave_one_out(rewards: Tensor) -> Tensor:
    """b̂ of (2): for each of the M rollouts of a problem, the mean reward of the other M − 1. (N, M) → (N, M).

    Raises ValueError for M = 1, where no other rollout is left.
    """
    M = rewards.shape[1]
    if M < 2:
        raise ValueError("a leave-one-out baseline needs --rollouts 2 or more")
    return (rewards.sum(dim=1, keepdim=True) - rewards) / (M - 1)


def context_baseline(rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    """b̂ of (4): for each action, the mean R_a of all actions of the batch, of any problem, with its reward context.

    The batch is all rollouts of one RL step. `rewards` holds R_a of each trajectory's actions; same shape out.
    """
    return group_means(rewards, [reward_contexts(row) for row in rewards])


def group_means(rewards: Sequence[Sequence[float]], groups: Sequence[Sequence]) -> list[list[float]]:
    """For each reward the mean of all the rewards in its group; `rewards`, `groups` and the result have one shape."""
    members = defaultdict(list)
    for row, keys in zip(rewards, groups):
        for reward, key in zip(row, keys):
            members[key].append(reward)
    mean = {key: sum(group) / len(group) for key, group in members.items()}
    return [[mean[key] for key in keys] for keys in groups]


@dataclass(frozen=True)
class Credit:
    """What one trajectory is given credit for: its spans in order, each with length in tokens, reward and baseline."""

    tokens: list[int]
    reward: list[float]
    baseline: list[float]


def span_rewards(trajectories: Sequence, level: str) -> tuple[list[list[int]], list[list[float]]]:
    """Lengths in tokens and rewards of the spans of a `Trajectory` (s2r/rollouts.py): itself, or its actions."""
    if level == "outcome":
        return [[len(t.ids)] for t in trajectories], [[outcome_reward(t.actions)] for t in trajectories]
    lengths = [[action.end - action.start for action in t.actions] for t in trajectories]
    return lengths, [process_rewards(t.actions, t.finished) for t in trajectories]


def online_credit(trajectories: Sequence, level: str, rollouts: int) -> list[Credit]:
    """Credit of all rollouts of one RL step, in the order of the problems, `rollouts` of each."""
    lengths, reward = span_rewards(trajectories, level)
    if level == "outcome":
        baseline = leave_one_out(torch.tensor(reward).view(-1, rollouts)).view(-1, 1).tolist()
    else:
        baseline = context_baseline(reward)
    return [Credit(n, r, b) for n, r, b in zip(lengths, reward, baseline)]


def spans(credits: Sequence[Credit], B: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A micro-batch of credits as tensors: span (Q,) int64, reward (J,), baseline (J,), weight (J,).

    B is the number of trajectories in the whole update. The weights stand for the expectation in (3) and (6): 1/B for a
    trajectory, 1/(B·|y|_a) for an action. They sum to 1 over an update, however it is split into micro-batches.
    """
    tokens = torch.tensor([n for credit in credits for n in credit.tokens], dtype=torch.int64, device=device)
    span = torch.arange(len(tokens), device=device).repeat_interleave(tokens)
    reward = torch.tensor([r for credit in credits for r in credit.reward], device=device)
    baseline = torch.tensor([b for credit in credits for b in credit.baseline], device=device)
    weight = [1 / (B * len(credit.reward)) for credit in credits for _ in credit.reward]
    return span, reward, baseline, torch.tensor(weight, device=device)


def span_sum(x: Tensor, span: Tensor, J: int) -> Tensor:
    """Sum of x (Q,) over the tokens of each span, (J,) in fp32; `span` (Q,) int64 holds each token's span number."""
    return torch.zeros(J, device=x.device).index_add(0, span, x.float())


def advantages(
    reward: Tensor, baseline: Tensor, logp_old: Tensor, logp_ref: Tensor, span: Tensor, *, beta: float
) -> Tensor:
    """A of (2) and (5), (J,): reward − baseline − β·log(π_old/π_ref), the log-ratio summed over the span's tokens.

    reward and baseline (J,); logp_old, logp_ref and span (Q,).
    """
    return reward - baseline - beta * span_sum(logp_old - logp_ref, span, len(reward))


def policy_loss(
    logp: Tensor, logp_old: Tensor, span: Tensor, advantage: Tensor, weight: Tensor, *, epsilon: float
) -> tuple[Tensor, Tensor]:
    """L of (3) and (6), −Σ weight · min(r·A, clip(r, 1−ε, 1+ε)·A), and which spans' r leave the clip range, (J,) bool.

    logp (Q,) carries the gradient; logp_old and span (Q,) do not. advantage and weight (J,); `weight` is that of
    `spans`, so the loss of an update is the sum of the losses of its micro-batches.
    """
    tokens = span_sum(torch.ones_like(logp), span, len(advantage))
    # Departs from the paper, like the release: the mean, not the sum, of the token log-ratios, a length-normalised
    # ratio as in GSPO (arXiv 2507.18071). The product over a long span would leave the clip range at once.
    ratio = (span_sum(logp - logp_old, span, len(advantage)) / tokens).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    return -(weight * gain).sum(), ratio != clipped
