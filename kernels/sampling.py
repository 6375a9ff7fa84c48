"""One token per row from softmax(logits / temperature), with its log-probability, by inverting the cumulative sum.

    masses e^(z−m)    0.2   1.0   0.1   0.7        sum 2.0
    cumulative        0.2   1.2   1.3   2.0        u = 0.62 of 2.0 is 1.24: the third token

In PyTorch this takes seven passes over the (S, V) logits. The Triton kernels take one pass. The first cuts each row into
chunks and keeps, per chunk, the maximum and the sum of e^(z−maximum). The second finds the chunk in which u falls from
these few numbers, and reads only that chunk again. Called by `s2r/generate.py`.
"""

from __future__ import annotations

import torch

from kernels import jit, tl, triton

CHUNK = 4096  # logits of one program


def sample_torch(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample` in PyTorch."""
    z = logits.float()  # (S, V)
    z = (z - z.amax(dim=1, keepdim=True)).div_(temperature or 1.0)
    mass = z.exp().cumsum_(dim=1)
    total = mass[:, -1:]
    if temperature == 0:
        token = z.argmax(dim=1, keepdim=True)
    else:
        token = torch.searchsorted(mass, uniform * total, right=True).clamp_(max=z.shape[1] - 1)
    return token[:, 0], (z.gather(1, token) - total.log())[:, 0]


@jit
def _chunk_kernel(logits, stride, largest, mass, V, chunks, scale, CHUNK: tl.constexpr):
    """Program (s, c) reads chunk c of row s: writes its maximum m and Σ e^((z−m)/τ) to largest, mass (S, chunks)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    z = tl.load(logits + row * stride + v, mask=v < V, other=-float("inf")).to(tl.float32)  # (CHUNK,)
    m = tl.maximum(tl.max(z, 0), -1e30)  # finite, so that a chunk of −∞ has mass 0 and not NaN
    tl.store(largest + row * chunks + chunk, m)
    tl.store(mass + row * chunks + chunk, tl.sum(tl.exp2((z - m) * scale), 0))


@jit
def _choose_kernel(
    logits, stride, largest, mass, uniform, token, logp, V, chunks, scale,
    GREEDY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program s chooses the token of row s. `scale` is log2(e)/τ, so exponents are to base 2."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    m = tl.load(largest + row * chunks + c, mask=c < chunks, other=-float("inf"))  # (BLOCK,)
    top = tl.max(m, 0)
    inside = tl.load(mass + row * chunks + c, mask=c < chunks, other=0.0) * tl.exp2((m - top) * scale)
    total = tl.sum(inside, 0)
    wanted = tl.load(uniform + row) * total
    before = tl.cumsum(inside, 0) - inside  # the mass in front of each chunk
    if GREEDY:
        chunk = tl.min(tl.where(m == top, c, BLOCK), 0)
    else:
        chunk = tl.max(tl.where((before <= wanted) & (inside > 0), c, 0), 0)
    rest = wanted - tl.sum(tl.where(c == chunk, before, 0.0), 0)  # how far into the chunk
    v = tl.arange(0, CHUNK)
    z = tl.load(logits + row * stride + chunk * CHUNK + v, mask=chunk * CHUNK + v < V, other=-float("inf"))
    z = z.to(tl.float32) - top  # (CHUNK,)
    e = tl.exp2(z * scale)
    if GREEDY:
        place = tl.min(tl.where(z == 0, v, CHUNK), 0)
    else:  # the first with any mass whose cumulative mass is above; if rounding leaves none, the last with any mass
        above = tl.min(tl.where((tl.cumsum(e, 0) > rest) & (e > 0), v, CHUNK), 0)
        place = tl.minimum(above, tl.max(tl.where(e > 0, v, 0), 0))
    place = tl.minimum(place, V - 1 - chunk * CHUNK)  # NaN logits find no place: still a token of the vocabulary
    chosen = tl.sum(tl.where(v == place, z, 0.0), 0)
    tl.store(token + row, (chunk * CHUNK + place).to(tl.int64))
    tl.store(logp + row, (chosen * scale - tl.log2(total)) * 0.6931471805599453)  # times ln 2


def sample_triton(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample` by the kernels above."""
    S, V = logits.shape
    assert logits.stride(1) == 1
    chunks = triton.cdiv(V, CHUNK)
    largest, mass = logits.new_empty(2, S, chunks, dtype=torch.float32)
    token, logp = logits.new_empty(S, dtype=torch.int64), logits.new_empty(S, dtype=torch.float32)
    scale = 1.4426950408889634 / (temperature or 1.0)  # log2(e)/τ
    with torch.cuda.device_of(logits):
        _chunk_kernel[S, chunks](logits, logits.stride(0), largest, mass, V, chunks, scale, CHUNK=CHUNK, num_warps=8)
        _choose_kernel[S,](
            logits, logits.stride(0), largest, mass, uniform.contiguous(), token, logp, V, chunks, scale,
            GREEDY=temperature == 0, CHUNK=CHUNK, BLOCK=triton.next_power_of_2(chunks), num_warps=8,
        )  # fmt: skip
    return token, logp


def sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row from softmax(logits / temperature); temperature 0: the argmax.

    logits (S, V) of any floating dtype; uniform (S, 1) fp32 in [0, 1). Returns token (S,) int64 and its log-probability
    (S,) fp32, in nats, at that temperature (at 1 for the argmax).
    """
    on_triton = logits.is_cuda and triton is not None
    return (sample_triton if on_triton else sample_torch)(logits, uniform, temperature)
