"""Attention over packs and over the cache against a masked softmax written out in float64."""

import math

import pytest
import torch

from kernels.attention import attention
from kernels.decode import decode_attention

GROUPS = [(2, 2), (4, 2), (3, 1), (14, 2)]  # (H, G): H/G = 1, 2, 3, 7
E = 16
# fp32: sums of ≤ 129 products; bf16: 8 bits of mantissa, and the softmax weights are rounded to them too.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """softmax(q·kᵀ/√E)·v of q (T, H, E) over k, v (C, G, E), scores (T, C) set to −∞ where `hidden`."""
    group = q.shape[1] // k.shape[1]
    heads = []
    for h in range(q.shape[1]):
        score = (q[:, h] @ k[:, h // group].T / math.sqrt(q.shape[2])).masked_fill(hidden, -torch.inf)
        heads.append(score.softmax(-1) @ v[:, h // group])
    return torch.stack(heads, dim=1)


def naive_packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], prefix: list[int] | None = None
) -> torch.Tensor:
    """One (T, T) mask over the whole pack: same sequence or that sequence's prefix, and not later."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    continued = sequence if prefix is None else torch.tensor(prefix)[sequence]
    later = torch.ones(len(sequence), len(sequence), dtype=torch.bool).triu(1)
    return naive(q, k, v, later | (sequence[:, None] != sequence) & (continued[:, None] != sequence))


# Lengths and prefixes: two groups side by side; one that stands alone between groups; a continuation without a token.
SHARED = [([5, 3, 4, 6, 1, 1], [0, 0, 0, 3, 3, 3]), ([33, 70, 16, 9, 40, 0, 129], [0, 0, 0, 3, 4, 4, 4])]


def pack(lengths: list[int], H: int, G: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + H)
    qkv = [torch.randn(sum(lengths), n, E, generator=generator).to(dtype) for n in (H, G, G)]
    return qkv, torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("H, G", GROUPS)
@pytest.mark.parametrize("lengths", [[1], [129], [1, 17, 64, 129], [17, 0, 1, 0, 0, 5]], ids=str)
def test_attention_equals_masked_softmax(lengths, H, G, dtype):
    qkv, cu_seqlens = pack(lengths, H, G, dtype)
    exact = naive_packed(*(x.double() for x in qkv), lengths)
    out = attention(*qkv, cu_seqlens)
    assert out.shape == exact.shape and out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("H, G", GROUPS)
@pytest.mark.parametrize("lengths", [[1, 17, 64], [9, 0, 33]], ids=str)
def test_attention_gradients_equal_masked_softmax(lengths, H, G):
    qkv, cu_seqlens = pack(lengths, H, G, torch.float32)
    upstream = torch.randn(sum(lengths), H, E, generator=torch.Generator().manual_seed(1))
    exact = [x.double().requires_grad_() for x in qkv]
    wanted = torch.autograd.grad(naive_packed(*exact, lengths), exact, upstream.double())
    ours = [x.requires_grad_() for x in qkv]
    for found, expected in zip(torch.autograd.grad(attention(*ours, cu_seqlens), ours, upstream), wanted):
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("H, G", GROUPS)
@pytest.mark.parametrize("lengths, prefix", SHARED, ids=str)
def test_attention_with_shared_prefixes_equals_masked_softmax(lengths, prefix, H, G, dtype):
    qkv, cu_seqlens = pack(lengths, H, G, dtype)
    upstream = torch.randn(sum(lengths), H, E, generator=torch.Generator().manual_seed(1))
    exact = [x.double().requires_grad_() for x in qkv]
    wanted = naive_packed(*exact, lengths, prefix)
    ours = [x.requires_grad_() for x in qkv]
    out = attention(*ours, cu_seqlens, torch.tensor(prefix))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, atol=TOLERANCE[dtype], rtol=0)
    if dtype == torch.float32:
        gradients = torch.autograd.grad(out, ours, upstream)
        for found, expected in zip(gradients, torch.autograd.grad(wanted, exact, upstream.double())):
            torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_attention_sees_neither_neighbours_nor_the_future():
    (q, k, v), cu_seqlens = pack([5, 7], 4, 2, torch.float32)
    before = attention(q, k, v, cu_seqlens)
    for x in (q, k, v):
        x[3:5] += 1e3  # the end of the first sequence
    after = attention(q, k, v, cu_seqlens)
    kept = [0, 1, 2, *range(5, 12)]
    assert torch.equal(before[kept], after[kept]) and not torch.equal(before, after)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("H, G", GROUPS)
@pytest.mark.parametrize("lengths", [[1], [33], [1, 7, 33, 40], [48, 1], [5] * 9], ids=str)
def test_decode_attention_equals_masked_softmax(lengths, H, G, dtype):
    """Rows of different lengths in a cache of 48 tokens that holds garbage after each row's own."""
    generator = torch.Generator().manual_seed(H)
    S, C = len(lengths), 48
    q = torch.randn(S, H, E, generator=generator).to(dtype)
    k, v = (torch.randn(S, C, G, E, generator=generator).to(dtype) for _ in range(2))
    exact = []
    for s, n in enumerate(lengths):
        exact.append(naive(q[s, None].double(), k[s, :n].double(), v[s, :n].double(), torch.zeros(1, n).bool()))
        k[s, n:], v[s, n:] = 1e3, -1e3
    out = decode_attention(q, k, v, torch.tensor(lengths))
    assert out.shape == (S, H, E) and out.dtype == dtype
    torch.testing.assert_close(out.double(), torch.cat(exact), atol=TOLERANCE[dtype], rtol=0)


def test_decode_attention_is_the_last_token_of_attention():
    lengths = [3, 17, 1, 12]
    (q, k, v), cu_seqlens = pack(lengths, 6, 2, torch.float32)
    caches = torch.zeros(2, len(lengths), max(lengths), 2, E)
    for s, (a, b) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        caches[:, s, : b - a] = torch.stack((k[a:b], v[a:b]))
    last = cu_seqlens[1:] - 1
    out = decode_attention(q[last], *caches, torch.tensor(lengths))
    torch.testing.assert_close(out, attention(q, k, v, cu_seqlens)[last], atol=1e-5, rtol=0)
