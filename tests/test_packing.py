"""Packing: every sequence once, within the budget; the one next-token shift; the tokens that SFT teaches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2r.model import Transformer
from s2r.data import Example
from s2r.grammar import encode, prompt, sft_targets
from s2r.hf.tokenizer import Tokenizer
from s2r.packing import pack, policy_logp, predictors, sft_sequences
from tiny_model import steps, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


def test_pack_hand_table():
    """The picture of the module docstring: prompts of 3 and 2 tokens, responses of 3 and 4."""
    (batch,) = pack([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]], [[3, 4, 5], [2, 3, 4, 5]], 100, "cpu")
    assert batch.rows == [0, 1]
    assert batch.ids.tolist() == list(range(1, 13))
    assert batch.cu_seqlens.tolist() == [0, 6, 12]
    assert batch.scored.tolist() == [3, 4, 5, 8, 9, 10, 11]
    assert batch.before.tolist() == [2, 3, 4, 7, 8, 9, 10]
    assert batch.targets.tolist() == [4, 5, 6, 9, 10, 11, 12]
    assert {x.dtype for x in (batch.ids, batch.cu_seqlens, batch.scored, batch.before)} == {torch.int64}
    assert batch.prefix is None


def test_pack_shared_prompt_hand_table():
    """p p p r r | r r r, and after it a sequence whose prompt nobody shares."""
    (batch,) = pack([[1, 2, 3, 4, 5], [1, 2, 3, 6, 7, 8], [1, 9]], [[3, 4], [3, 5], [1]], 100, "cpu", [3, 3, 1])
    assert batch.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 1, 9]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8, 10]
    assert batch.prefix.tolist() == [0, 0, 0, 3]
    assert batch.scored.tolist() == [3, 4, 5, 7, 9]
    assert batch.before.tolist() == [2, 3, 2, 6, 8]
    assert batch.rows == [0, 1, 2] and batch.targets.tolist() == [4, 5, 6, 8, 9]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=8),
       st.integers(1, 40))  # fmt: skip
def test_pack_runs_a_prompt_once_per_micro_batch(groups, budget):
    """Each problem with a prompt, some rollouts and their lengths: every sequence is its prefix and itself, in order."""
    sequences, prompts = [], []
    for number, (prompt_length, rollouts, length) in enumerate(groups):
        for m in range(rollouts):
            sequences.append([number * 100 + t for t in range(prompt_length)] + [1000 * m + t for t in range(length)])
            prompts.append(prompt_length)
    scored = [list(range(n, len(ids))) for ids, n in zip(sequences, prompts)]
    packs = pack(sequences, scored, budget, "cpu", prompts)
    assert [row for p in packs for row in p.rows] == list(range(len(sequences)))
    for p in packs:
        assert len(p.ids) <= budget or len(p.rows) == 1
        segments = [p.ids[a:b].tolist() for a, b in zip(p.cu_seqlens, p.cu_seqlens[1:])]
        prefix = range(len(segments)) if p.prefix is None else p.prefix.tolist()
        continued = {root for s, root in enumerate(prefix) if root != s}
        whole = [(segments[root] if root != s else []) + segments[s] for s, root in enumerate(prefix) if s not in continued]
        assert whole == [sequences[row] for row in p.rows]
        together = [sequences[row][: prompts[row]] for row in p.rows]
        assert len(continued) == sum(a == b and (i == 0 or a != together[i - 1])
                                     for i, (a, b) in enumerate(zip(together, together[1:])))  # fmt: skip
        assert p.targets.tolist() == [sequences[row][t] for row in p.rows for t in scored[row]]
        assert p.ids[p.before].tolist() == [sequences[row][t - 1] for row in p.rows for t in scored[row]]


def test_pack_oversize_sequence_stands_alone():
    assert [p.rows for p in pack([[0] * n for n in (3, 3, 9, 3, 5)], [[]] * 5, 8, "cpu")] == [[0, 1], [2], [3, 4]]
    assert [p.rows for p in pack([[0] * n for n in (9, 9)], [[]] * 2, 8, "cpu")] == [[0], [1]]
    assert [p.rows for p in pack([[0] * 4] * 4, [[]] * 4, 8, "cpu")] == [[0, 1], [2, 3]]  # to the last token
    assert pack([], [], 8, "cpu") == []


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 30), st.randoms(use_true_random=False))
def test_pack_holds_every_sequence_once_in_order_and_keeps_the_budget(lengths, budget, rng):
    sequences = [[100 * row + t for t in range(n)] for row, n in enumerate(lengths)]
    scored = [[t for t in range(1, n) if rng.random() < 0.5] for n in lengths]
    packs = pack(sequences, scored, budget, "cpu")
    assert [row for p in packs for row in p.rows] == list(range(len(lengths)))
    for i, p in enumerate(packs):
        assert len(p.ids) <= budget or len(p.rows) == 1
        assert i + 1 == len(packs) or len(p.ids) + lengths[packs[i + 1].rows[0]] > budget  # the next did not fit
        borders = p.cu_seqlens.tolist()
        assert [p.ids[a:b].tolist() for a, b in zip(borders, borders[1:])] == [sequences[row] for row in p.rows]
        assert p.targets.tolist() == [sequences[row][t] for row in p.rows for t in scored[row]]


def test_predictors_are_the_hidden_states_of_the_token_before(folder):
    model = Transformer.from_pretrained(folder)
    (batch,) = pack([[5, 6, 7, 8], [9, 10, 11]], [[1, 3], [2]], 100, "cpu")
    with torch.no_grad():
        hidden = model(batch.ids, batch.cu_seqlens)
        torch.testing.assert_close(predictors(model, batch), hidden[[0, 2, 5]])


def test_policy_logp_matches_log_softmax_sequence_by_sequence(folder):
    """Oracle: each sequence by itself, whole logits in float64, log p[t] of ids[t] from the logits at t − 1."""
    model = Transformer.from_pretrained(folder)
    sequences, scored = [[5, 6, 7, 8], [9, 10, 11], [12, 13]], [[1, 3], [2], [1]]
    (batch,) = pack(sequences, scored, 100, "cpu")
    with torch.no_grad():
        logp, entropy = policy_logp(model, batch, 0.7)
        expected, spread = [], []
        for ids, positions in zip(sequences, scored):
            z = model.logits(model(torch.tensor(ids), torch.tensor([0, len(ids)]))).double() / 0.7
            for t in positions:
                p = torch.log_softmax(z[t - 1], dim=0)
                expected.append(p[ids[t]])
                spread.append(-(p.exp() * p).sum())
    torch.testing.assert_close(logp.double(), torch.stack(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), torch.stack(spread), rtol=0, atol=1e-5)


def test_shared_prompts_change_neither_logp_nor_gradient(folder):
    """Against every sequence with a prompt of its own; in one micro-batch, and in several that cut a group in two."""
    model, generator = Transformer.from_pretrained(folder), torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(5, 40, (n,), generator=generator).tolist()  # noqa: E731
    groups = [[p + draw(n) for n in (7, 1, 12, 5)] for p in (draw(9), draw(1), draw(14))]
    sequences, prompts = [ids for group in groups for ids in group], [9] * 4 + [1] * 4 + [14] * 4
    scored = [list(range(n, len(ids))) for ids, n in zip(sequences, prompts)]
    weight = torch.randn(sum(map(len, scored)), generator=generator) / sum(map(len, scored))  # a mean, as in a loss

    def gradients(budget, prompts):
        logp = torch.cat([policy_logp(model, p, 0.7)[0] for p in pack(sequences, scored, budget, "cpu", prompts)])
        return logp.detach(), *torch.autograd.grad((logp * weight).sum(), list(model.parameters()))

    alone = gradients(10**6, None)
    for budget in (10**6, 60, 25):
        for found, wanted in zip(gradients(budget, prompts), alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_pack_counts_a_shared_prompt_once():
    """Four responses of 2 tokens to a prompt of 10 are 18 tokens."""
    args = [[*range(10), 50 + i, 60 + i] for i in range(4)], [[10, 11]] * 4
    assert [p.rows for p in pack(*args, 18, "cpu", [10] * 4)] == [[0, 1, 2, 3]]
    assert [p.rows for p in pack(*args, 17, "cpu", [10] * 4)] == [[0, 1, 2], [3]]


def test_sft_sequences_are_prompt_and_response_with_the_targets_behind_the_prompt(tokenizer):
    examples = [Example("3+4?", steps(3, 4, wrong)) for wrong in range(3)]
    prefix, encoded = prompt("3+4?", tokenizer), [encode(example.trajectory, tokenizer) for example in examples]
    sequences, scored = sft_sequences(examples, tokenizer, 10**6, unmasked=False)
    for (ids, actions), sequence, positions in zip(encoded, sequences, scored, strict=True):
        assert sequence == prefix + ids
        assert positions == [len(prefix) + t for t in sft_targets(ids, actions, tokenizer)]
    _, everything = sft_sequences(examples, tokenizer, 10**6, unmasked=True)
    assert everything == [list(range(len(prefix), len(sequence))) for sequence in sequences]
    shorter, _ = sft_sequences(examples, tokenizer, len(sequences[1]), unmasked=False)
    assert shorter == sequences[:2]  # as long as is allowed, and no longer
