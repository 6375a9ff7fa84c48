"""Packed batches: whole sequences end to end in one flat array, and the one place of the next-token shift.

    ids      [ p p p r r r | p p r r r r ]     p prompt, r response         (T,)
    scored   [       3 4 5       8 9 … ]       where the tokens with a loss stand in `ids`  (Q,)

A micro-batch is as many sequences as fit into a budget of tokens. The budget changes memory, never the gradient:
every loss of this code base divides by counts of the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    scored: torch.Tensor  # (Q,) int64, rising positions in `ids`, never the first of a sequence

    @property
    def targets(self) -> torch.Tensor:
        """The scored tokens, (Q,) int64."""
        return self.ids[self.scored]


def pack(
    sequences: Sequence[list[int]], scored: Sequence[list[int]], budget: int, device: str | torch.device
) -> list[Pack]:
    """Micro-batches, in order, of at most `budget` tokens each; a longer sequence gets one of its own.

    `scored[i]` lists the rising positions in `sequences[i]` that a loss is taken on; all ≥ 1.
    """
    groups, room = [], 0
    for row, ids in enumerate(sequences):
        if not groups or len(ids) > room:
            groups.append([])
            room = budget
        groups[-1].append(row)
        room -= len(ids)
    packs = []
    for rows in groups:
        ids, borders, positions = [], [0], []
        for row in rows:
            positions += [len(ids) + t for t in scored[row]]
            ids += sequences[row]
            borders.append(len(ids))
        packs.append(
            Pack(rows, *(torch.tensor(x, dtype=torch.int64, device=device) for x in (ids, borders, positions)))
        )
    return packs


def predictors(model: Transformer, batch: Pack) -> torch.Tensor:
    """The hidden states (Q, D) from which the scored tokens are predicted: those of the token before each."""
    return model(batch.ids, batch.cu_seqlens)[batch.scored - 1]


def policy_logp(model: Transformer, batch: Pack, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of the scored tokens at this temperature, and the entropy where each was drawn; (Q,) fp32 both, in nats."""
    return token_logp(predictors(model, batch), model.head_weight, batch.targets, temperature)


def sft_sequences(
    examples: Sequence[Example], tokenizer: Tokenizer, longest: int, unmasked: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each example with at most `longest`, prompt included, and the positions in it that have a loss."""
    sequences, scored = [], []
    for example in examples:
        prefix = prompt(example.problem, tokenizer)
        ids, actions = encode(example.trajectory, tokenizer)
        if len(prefix) + len(ids) <= longest:
            targets = range(len(ids)) if unmasked else sft_targets(ids, actions, tokenizer)
            sequences.append(prefix + ids)
            scored.append([len(prefix) + t for t in targets])
    return sequences, scored
