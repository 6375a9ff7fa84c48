"""Attention of one new token per row over its slot of the key-value cache. Called by `s2r/model.py`.

The softmax is the online one of `kernels/attention.py`. There is no backward pass, so nothing is saved. The time is that
of reading the cache: the H/G query heads that share a key head are the rows of one tile, so that each key is read once
for all of them. Where rows are too few to fill the chip, each row's cache is cut into parts. Part n gives its own output
o_n and l_n = log Σ_j e^(s_j) over its keys, and the parts are merged as

    o = Σ_n w_n·o_n / Σ_n w_n      w_n = e^(l_n − max l)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from kernels import jit, tl, triton
from kernels.attention import _attend


def decode_attention_torch(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """`decode_attention` in PyTorch: the H/G query heads that share a key head stand as that head's "query length"."""
    S, H, E = q.shape
    G = k_cache.shape[2]
    longest = int(lengths.max())
    k, v = (x[:, :longest].transpose(1, 2) for x in (k_cache, v_cache))  # (S, G, longest, E), views
    filled = None
    if S > 1:
        filled = (torch.arange(longest, device=q.device) < lengths[:, None])[:, None, None]  # (S, 1, 1, longest)
    out = F.scaled_dot_product_attention(q.view(S, G, H // G, E), k, v, attn_mask=filled)  # (S, G, H/G, E)
    return out.reshape(S, H, E)


@jit
def _decode_kernel(
    q, k, v, out, partial, lse, lengths, scale,
    stride_ks, stride_kc, stride_kg, stride_vs, stride_vc, stride_vg,
    H: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (g, s, n) owns part n of the cache of row s, and the query heads that share key head g.

    With one part it writes their rows of out (S, H, E). With more it writes what those keys alone would give: partial
    (S, H, SPLITS, E) and lse (S, H, SPLITS) to base 2, both fp32; lse is −inf where a short row leaves a part empty.
    """
    g, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)  # read here, on the device: a CUDA graph may replay with other lengths
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_K) * BLOCK_K  # keys of one part
    low = split * part
    high = tl.minimum(low + part, length)
    scale_2 = scale * 1.4426950408889634  # times log2(e)
    heads, columns = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_E)  # a dot wants 16 rows or more: some stay unused
    kept = (heads < GROUP)[:, None] & (columns < E)[None, :]
    row_head = row * H + g * GROUP + heads  # (BLOCK_H,)
    q_tile = tl.load(q + row_head[:, None] * E + columns[None, :], mask=kept, other=0.0)  # (BLOCK_H, BLOCK_E)
    k += row * stride_ks + g * stride_kg
    v += row * stride_vs + g * stride_vg
    acc = tl.zeros((BLOCK_H, BLOCK_E), tl.float32)
    m = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc, m, total = _attend(  # a new token sees all keys
        acc, m, total, q_tile, k, v, stride_kc, stride_vc, low, high, tl.full((BLOCK_H,), high - 1, tl.int32), columns,
        scale_2, E, BLOCK_K, True,
    )  # fmt: skip
    if SPLITS == 1:
        at = out + row_head[:, None] * E + columns[None, :]
        tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=kept)
    else:
        used = tl.where(total > 0, total, 1.0)  # an empty part: no 0/0, and lse = −inf + log2(1)
        at = row_head * SPLITS + split
        tl.store(partial + at[:, None] * E + columns[None, :], acc / used[:, None], mask=kept)
        tl.store(lse + at, m + tl.log2(used), mask=heads < GROUP)


@jit
def _merge_kernel(out, partial, lse, E: tl.constexpr, SPLITS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Program n owns one query head of one row: its out (E,) from partial (SPLITS, E), weighed by softmax of lse."""
    n = tl.program_id(0).to(tl.int64)
    splits, columns = tl.arange(0, SPLITS), tl.arange(0, BLOCK_E)
    weight = tl.load(lse + n * SPLITS + splits)  # (SPLITS,); the first part of a row is never empty
    weight = tl.exp2(weight - tl.max(weight, 0))
    at = partial + (n * SPLITS + splits)[:, None] * E + columns[None, :]  # (SPLITS, BLOCK_E)
    mixed = tl.sum(tl.load(at, mask=(columns < E)[None, :], other=0.0) * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + n * E + columns, mixed.to(out.dtype.element_ty), mask=columns < E)


def _tiles(BLOCK_E: int, itemsize: int) -> dict[str, int]:
    """Tile, warps and stages of `_decode_kernel`, which waits for memory: up to 64 KB of keys and values in flight."""
    return {"BLOCK_K": min(64, 2**14 // (BLOCK_E * itemsize)), "num_warps": 4, "num_stages": 3}


def decode_attention_triton(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, splits: int
) -> torch.Tensor:
    """`decode_attention` by the kernels above, each row's cache in `splits` (a power of two) parts of like length."""
    (S, H, E), G = q.shape, k_cache.shape[2]
    assert k_cache.stride(3) == v_cache.stride(3) == 1
    q = q.contiguous()
    BLOCK_E, BLOCK_H = max(16, triton.next_power_of_2(E)), max(16, triton.next_power_of_2(H // G))
    out = torch.empty_like(q)
    partial, lse = out, out  # never touched by a single part
    if splits > 1:
        partial, lse = (q.new_empty(S, H, splits, *width, dtype=torch.float32) for width in ((E,), ()))
    with torch.cuda.device_of(q):
        _decode_kernel[G, S, splits](
            q, k_cache, v_cache, out, partial, lse, lengths, 1 / math.sqrt(E), *k_cache.stride()[:3],
            *v_cache.stride()[:3], H=H, GROUP=H // G, E=E, SPLITS=splits, BLOCK_E=BLOCK_E, BLOCK_H=BLOCK_H,
            **_tiles(BLOCK_E, q.itemsize),
        )  # fmt: skip
        if splits > 1:
            _merge_kernel[S * H,](out, partial, lse, E=E, SPLITS=splits, BLOCK_E=BLOCK_E, num_warps=8 if splits > 16 else 2)
    return out


def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Attention of one new token per row over that row's cache, its own key and value included.

    q (S, H, E); k_cache and v_cache (S, C, G, E), of which row s holds `lengths[s]` tokens; lengths (S,) integer, ≥ 1.
    Returns (S, H, E).
    """
    if not q.is_cuda or triton is None:
        return decode_attention_torch(q, k_cache, v_cache, lengths)
    # Rows × key heads programs; when they are fewer than two per processor, cut each row's cache into parts.
    S, C, G, _ = k_cache.shape
    programs = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count
    splits = min(triton.cdiv(programs, S * G), triton.cdiv(C, 256), 128)
    return decode_attention_triton(q, k_cache, v_cache, lengths, triton.next_power_of_2(splits))
