"""Packed batches: whole sequences end to end in one flat array, and the one place of the next-token shift.

    ids      [ p p p r r r | p p r r r r ]     p prompt, r response         (T,)
    scored   [       3 4 5       8 9 … ]       where the tokens with a loss stand in `ids`  (Q,)
    before   [       2 3 4       7 8 … ]       the token before each, which predicts it     (Q,)

Rollouts of one problem that lie next to each other share one copy of its prompt. With four rollouts, and a prompt as long as
a response, that is 5/8 of the tokens. The first token of each response is predicted from the last p:

    ids      [ p p p | r r | r r r ]           three sequences: the prompt, and two that continue it
    prefix       0      0      0               sequence → the one that it continues, or itself   (S,)
    before   [         2 3   2 5 6 ]

A micro-batch is as many sequences as fit into a budget of tokens. The budget changes memory, never the gradient:
every loss of this code base divides by counts of the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from kernels.logprob import token_logp
from s2r.data import Example
from s2r.grammar import encode, prompt, sft_targets
from s2r.hf.tokenizer import Tokenizer
from s2r.model import Transformer


@dataclass(frozen=True)
class Pack:
    """One micro-batch on the device: S sequences, T tokens, Q of them scored."""

    rows: list[int]  # which sequences of the batch these are
    ids: torch.Tensor  # (T,) int64
    cu_seqlens: torch.Tensor  # (S+1,) int64
    scored: torch.Tensor  # (Q,) int64, rising positions in `ids`
    before: torch.Tensor  # (Q,) int64, position of the token before each of them in its sequence
    prefix: torch.Tensor | None = None  # (S,) int64, see `kernels.attention.attention`; a shared prompt is one of the S

    @property
    def targets(self) -> torch.Tensor:
        """The scored tokens, (Q,) int64."""
        return self.ids[self.scored]


def pack(
    sequences: Sequence[list[int]], scored: Sequence[list[int]], budget: int, device: str | torch.device,
    prompts: Sequence[int] | None = None,
) -> list[Pack]:  # fmt: skip
    """Micro-batches, in order, of at most `budget` tokens each; a longer sequence gets one of its own.

    `scored[i]` lists the rising positions in `sequences[i]` that a loss is taken on; all ≥ 1. `prompts[i]` is the length
    of its prompt: neighbours with equal prompts share one copy, and only tokens after it may be scored.
    """
    shared = [ids[:n] for ids, n in zip(sequences, prompts or [0] * len(sequences))]
    groups, room = [], 0
    for row, ids in enumerate(sequences):
        cost = len(ids)
        if groups and shared[row] == shared[row - 1]:
            cost -= len(shared[row])
        if not groups or cost > room:
            groups.append([])
            cost, room = len(ids), budget
        groups[-1].append(row)
        room -= cost
    return [_lay_out(rows, sequences, scored, shared, device) for rows in groups]


def _lay_out(rows: list[int], sequences, scored, shared: list[list[int]], device: str | torch.device) -> Pack:
    """The sequences of these rows as one micro-batch; a prompt that only one of them has stays a part of it."""
    ids, borders, prefix, positions, before = [], [0], [], [], []
    for common, members in groupby(rows, key=shared.__getitem__):
        members = list(members)
        n = len(common) if len(members) > 1 else 0  # tokens of the prompt's one copy; 0: there is none
        root, prompt_at = len(prefix), range(len(ids), len(ids) + n)
        if n:
            ids += common
            borders.append(len(ids))
            prefix.append(root)
        for row in members:
            at = [*prompt_at, *range(len(ids), len(ids) + len(sequences[row]) - n)]  # where each of its tokens stands
            positions += [at[t] for t in scored[row]]
            before += [at[t - 1] for t in scored[row]]
            ids += sequences[row][n:]
            borders.append(len(ids))
            prefix.append(root if n else len(prefix))
    sharing = prefix != list(range(len(prefix)))
    tensors = (ids, borders, positions, before, *([prefix] if sharing else []))
    return Pack(rows, *(torch.tensor(x, dtype=torch.int64, device=device) for x in tensors))


def predictors(model: Transformer, batch: Pack) -> torch.Tensor:
    """The hidden states (Q, D) from which the scored tokens are predicted: those of the token before each."""
    return model(batch.ids, batch.cu_seqlens, batch.prefix)[batch.before]


def policy_logp(model: Transformer, batch: Pack, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of the scored tokens at this temperature, and the entropy where each was drawn; (Q,) fp32 both, in nats."""
    return token_logp(predictors(model, batch), model.head_weight, batch.targets, temperature)


def sft_sequences(
    examples: Sequence[Example], tokenizer: Tokenizer, longest: int, unmasked: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each example with at most `longest`, prompt included, and the positions in it that have a loss."""
    sequences, scored = [], []
    for example in examples:
        prompt_ids = prompt(example.problem, tokenizer)
        ids, actions = encode(example.trajectory, tokenizer)
        if len(prompt_ids) + len(ids) <= longest:
            targets = range(len(ids)) if unmasked else sft_targets(ids, actions, tokenizer)
            sequences.append(prompt_ids + ids)
            scored.append([len(prompt_ids) + t for t in targets])
    return sequences, scored
