r"""Causal attention over packed sequences (training, prefill). `decode.py` has the attention of decoding.

A packed batch lays S sequences end to end, T tokens in all; `cu_seqlens` holds the S + 1 borders:

    tokens       a a a a b b c c c
    cu_seqlens   0       4   6     9

No token sees another sequence: nothing is padded, no mask is stored. A sequence may continue another one, its
prefix, and sees its tokens as well: the M responses to a problem need the keys of its prompt only once.

    tokens       p p p a a b b b       prompt p, responses a and b
    cu_seqlens   0     3   5     8
    prefix       0     0   0           sequences 1 and 2 continue sequence 0, which continues none

On a GPU the Triton kernels below run, elsewhere their PyTorch twins. Called by `s2r/model.py`.

Maths, for one head, σ = 1/√E, causal inside each sequence:

    forward    s_ij = σ·q_i·k_j      l_i = log Σ_j e^(s_ij)      p_ij = e^(s_ij − l_i)      o_i = Σ_j p_ij·v_j
    backward   δ_i = o_i·do_i        dp_ij = do_i·v_j            ds_ij = p_ij·(dp_ij − δ_i)
               dq_i = σ·Σ_j ds_ij·k_j      dk_j = σ·Σ_i ds_ij·q_i      dv_j = Σ_i p_ij·do_i

The (T, T) scores never leave the chip. The forward pass walks over blocks of keys. Per query it keeps the
largest score so far m, the sum of e^(s − m), and the output so far. When a later block raises m, the last
two are scaled down (online softmax, arXiv 1805.02867). It saves one number per query and head, l. The
backward pass computes s again from q and k and gets p from l, so it needs no (T, T) array either
(FlashAttention, arXiv 2205.14135). A stored p would be 8 GB for 32 heads and 8,192 tokens in fp32.

Grid: one program per head and block of queries (forward, dq) or of keys (dk, dv). Blocks beyond the
diagonal are never loaded, and only those on it are masked. Exponents, and the saved l, are to base 2, with
log2(e) folded into the scale: the chip computes 2^x, and would have to multiply for e^x.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from kernels import jit, tl, triton


def attention_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, prefix: torch.Tensor | None = None
) -> torch.Tensor:
    """`attention` in PyTorch. A fused call per sequence: on a CPU faster than one under a (T, T) mask."""
    group = q.shape[1] // k.shape[1]
    # (H, T, E). One copy of k and v per query head: SDPA on the CPU is slower when it copies them itself.
    q, k, v = q.transpose(0, 1), *(x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    lengths = cu_seqlens.diff().tolist()
    # split, not slices: its backward is one concatenation, that of each slice a whole (H, T, E) of zeros.
    q, k, v = (x.split(lengths, dim=1) for x in (q, k, v))
    out = []
    for s, p in enumerate(range(len(lengths)) if prefix is None else prefix.tolist()):
        if p == s:
            out.append(F.scaled_dot_product_attention(q[s][None], k[s][None], v[s][None], is_causal=True)[0])
        else:
            keys, values = (torch.cat((x[p], x[s]), dim=1)[None] for x in (k, v))
            seen = keys.new_ones(lengths[s], lengths[p] + lengths[s], dtype=torch.bool).tril(lengths[p])
            out.append(F.scaled_dot_product_attention(q[s][None], keys, values, attn_mask=seen)[0])
    return torch.cat(out, dim=1).transpose(0, 1)  # (T, H, E)


@jit
def _find_block(cu_seqlens, sequences, number, BLOCK: tl.constexpr):
    """The block of this number: (its sequence, that one's first token and length, the block's place in it).

    Sequence s owns the numbers from cu_seqlens[s] // BLOCK + s on: room enough for its blocks, and the host
    need not count them. With BLOCK = 4:

        cu_seqlens      0   4   6   9       sequences of 4, 2 and 3 tokens, one block each
        first number    0   2   3           9 // 4 + 3 = 5 programs

    Numbers 1 and 4 have no block: their place is not below their sequence's length, and the program ends.
    """
    low, high = 0, sequences
    while high - low > 1:  # the last sequence that starts at or before `number`
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // BLOCK + middle <= number:
            low = middle
        else:
            high = middle
    start = tl.load(cu_seqlens + low).to(tl.int64)  # 64 bits: start times stride passes 2^31 in a long pack
    length = (tl.load(cu_seqlens + low + 1) - start).to(tl.int32)
    return low, start, length, ((number - start // BLOCK - low) * BLOCK).to(tl.int32)


@jit
def _find_prefix(prefix, cu_seqlens, sequence, start):
    """Distance from the start of a sequence's prefix to `start`; index of the prefix's last token (none: −1)."""
    p = tl.load(prefix + sequence)
    low, high = tl.load(cu_seqlens + p).to(tl.int64), tl.load(cu_seqlens + p + 1)
    return start - low, tl.where(p == sequence, -1, (high - low).to(tl.int32) - 1)


@jit
def _load_tile(base, stride, rows, end, columns, E: tl.constexpr, PARTIAL: tl.constexpr):
    """A (rows, columns) tile, zero from column E on (it may be no power of two) and, if PARTIAL, from row `end` on."""
    at = base + rows[:, None] * stride + columns[None, :]
    if PARTIAL:
        return tl.load(at, mask=(rows < end)[:, None] & (columns < E)[None, :], other=0.0)
    elif E < columns.shape[0]:
        return tl.load(at, mask=(columns < E)[None, :], other=0.0)
    else:
        return tl.load(at)


@jit
def _attend(
    acc, m, total, q, k, v, stride_k, stride_v, low, high, seen, columns, scale,
    E: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys low … high. If MASKED, query i sees them up to seen[i].

    If not, it sees all of them, and their number is a multiple of BLOCK_K.
    acc (BLOCK_Q, BLOCK_E), m and total (BLOCK_Q,) are fp32.
    """
    for first in range(low, high, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        k_tile = _load_tile(k, stride_k, keys, high, columns, E, MASKED)  # (BLOCK_K, BLOCK_E)
        s = tl.dot(q, tl.trans(k_tile), input_precision="tf32x3") * scale  # (BLOCK_Q, BLOCK_K), to base 2
        if MASKED:  # also drops the zeros past the end: a query that is stored sees none of them
            s = tl.where(seen[:, None] >= keys[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))  # finite: a query sees a key of its first block, and m never falls
        p = tl.exp2(s - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        total = total * shrink + tl.sum(p, 1)
        v_tile = _load_tile(v, stride_v, keys, high, columns, E, MASKED)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="tf32x3")
        m = m_new
    return acc, m, total


@jit
def _forward_kernel(
    q, k, v, out, lse, cu_seqlens, prefix, sequences, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg,
    H: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (h, n) owns the BLOCK_Q queries of block n in head h: writes their rows of out (T, H, E), lse (H, T)."""
    head = tl.program_id(0)
    # Backwards: the last blocks of a sequence see the most keys, and the longest work should start first.
    number = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence, start, length, first = _find_block(cu_seqlens, sequences, number, BLOCK_Q)
    if first < length:
        rows, columns = first + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_E)
        k += start * stride_kt + (head // GROUP) * stride_kg
        v += start * stride_vt + (head // GROUP) * stride_vg
        q_head = q + start * stride_qt + head * stride_qh
        q_tile = _load_tile(q_head, stride_qt, rows, length, columns, E, True)
        scale_2 = scale * 1.4426950408889634  # times log2(e)
        acc = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
        m = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        acc, m, total = _attend(  # keys that all of these queries see
            acc, m, total, q_tile, k, v, stride_kt, stride_vt, 0, first, rows, columns, scale_2, E, BLOCK_K, False
        )
        acc, m, total = _attend(  # the diagonal
            acc, m, total, q_tile, k, v, stride_kt, stride_vt, first, tl.minimum(first + BLOCK_Q, length), rows, columns,
            scale_2, E, BLOCK_K, True,
        )  # fmt: skip
        if SHARED:  # the keys of the prefix, which all of these queries see
            back, last = _find_prefix(prefix, cu_seqlens, sequence, start)
            acc, m, total = _attend(
                acc, m, total, q_tile, k - back * stride_kt, v - back * stride_vt, stride_kt, stride_vt, 0, last + 1,
                tl.full((BLOCK_Q,), last, tl.int32), columns, scale_2, E, BLOCK_K, True,
            )  # fmt: skip
        at = out + ((start + rows) * H + head)[:, None] * E + columns[None, :]
        kept = (rows < length)[:, None] & (columns < E)[None, :]
        tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=kept)
        tl.store(lse + head * T + start + rows, m + tl.log2(total), mask=rows < length)


@jit
def _grad_q(
    dq, q, do, lse_row, delta, k, v, stride_k, stride_v, low, high, seen, columns, scale,
    E: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Σ_j ds_ij·k_j over keys low … high, masked as in `_attend`, added to dq (BLOCK_Q, BLOCK_E) fp32."""
    for first in range(low, high, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        k_tile = _load_tile(k, stride_k, keys, high, columns, E, MASKED)  # (BLOCK_K, BLOCK_E)
        v_tile = _load_tile(v, stride_v, keys, high, columns, E, MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(k_tile), input_precision="tf32x3") * scale - lse_row[:, None])
        if MASKED:
            p = tl.where(seen[:, None] >= keys[None, :], p, 0.0)
        dp = tl.dot(do, tl.trans(v_tile), input_precision="tf32x3")  # (BLOCK_Q, BLOCK_K)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="tf32x3")
    return dq


@jit
def _backward_q_kernel(
    q, k, v, out, grad_out, lse, delta, grad_q, cu_seqlens, prefix, sequences, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg,
    H: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (h, n) owns the BLOCK_Q queries of block n in head h: writes grad_q (T, H, E) and delta (H, T) there."""
    head = tl.program_id(0)
    number = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence, start, length, first = _find_block(cu_seqlens, sequences, number, BLOCK_Q)
    if first < length:
        rows, columns = first + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_E)
        k += start * stride_kt + (head // GROUP) * stride_kg
        v += start * stride_vt + (head // GROUP) * stride_vg
        q_head = q + start * stride_qt + head * stride_qh
        q_tile = _load_tile(q_head, stride_qt, rows, length, columns, E, True)
        here = (start * H + head) * E  # out, grad_out and grad_q are contiguous
        o_tile = _load_tile(out + here, H * E, rows, length, columns, E, True)
        do_tile = _load_tile(grad_out + here, H * E, rows, length, columns, E, True)
        row = head * T + start + rows
        delta_row = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)  # (BLOCK_Q,)
        tl.store(delta + row, delta_row, mask=rows < length)  # for the kernel of dk and dv
        lse_row = tl.load(lse + row, mask=rows < length, other=0.0)  # (BLOCK_Q,)
        scale_2 = scale * 1.4426950408889634  # times log2(e)
        dq = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
        dq = _grad_q(
            dq, q_tile, do_tile, lse_row, delta_row, k, v, stride_kt, stride_vt, 0, first, rows, columns,
            scale_2, E, BLOCK_K, False,
        )  # fmt: skip
        dq = _grad_q(
            dq, q_tile, do_tile, lse_row, delta_row, k, v, stride_kt, stride_vt, first,
            tl.minimum(first + BLOCK_Q, length), rows, columns, scale_2, E, BLOCK_K, True,
        )  # fmt: skip
        if SHARED:
            back, last = _find_prefix(prefix, cu_seqlens, sequence, start)
            dq = _grad_q(
                dq, q_tile, do_tile, lse_row, delta_row, k - back * stride_kt, v - back * stride_vt, stride_kt, stride_vt,
                0, last + 1, tl.full((BLOCK_Q,), last, tl.int32), columns, scale_2, E, BLOCK_K, True,
            )  # fmt: skip
        at = grad_q + here + rows[:, None] * (H * E) + columns[None, :]
        kept = (rows < length)[:, None] & (columns < E)[None, :]
        tl.store(at, (dq * scale).to(grad_q.dtype.element_ty), mask=kept)


@jit
def _grad_kv(
    dk, dv, k, v, q, do, lse, delta, stride_q, stride_do, low, high, keys, columns, scale,
    E: tl.constexpr, BLOCK_Q: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Σ_i ds_ij·q_i and Σ_i p_ij·do_i over queries low … high, added to dk, dv (BLOCK_K, BLOCK_E) fp32.

    If MASKED, query i sees the keys up to i, else all. Queries past the end are read as zeros: p·do = 0 and ds·q = 0.
    """
    for first in range(low, high, BLOCK_Q):
        rows = first + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
        q_tile = _load_tile(q, stride_q, rows, high, columns, E, True)  # (BLOCK_Q, BLOCK_E)
        do_tile = _load_tile(do, stride_do, rows, high, columns, E, True)
        lse_row = tl.load(lse + rows, mask=rows < high, other=0.0)
        delta_row = tl.load(delta + rows, mask=rows < high, other=0.0)
        # p and ds are computed transposed, (BLOCK_K, BLOCK_Q): the dots below take them on the left like this.
        p = tl.exp2(tl.dot(k, tl.trans(q_tile), input_precision="tf32x3") * scale - lse_row[None, :])
        if MASKED:
            p = tl.where(rows[None, :] >= keys[:, None], p, 0.0)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="tf32x3")
        dp = tl.dot(v, tl.trans(do_tile), input_precision="tf32x3")
        ds = p * (dp - delta_row[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="tf32x3")
    return dk, dv


@jit
def _backward_kv_kernel(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, cu_seqlens, reach, sequences, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg,
    H: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (g, n) owns the BLOCK_K keys of block n in key head g: writes their rows of grad_k, grad_v (T, G, E).

    It goes through all the query heads that share the key head, so the sum over them needs no second pass. The queries
    that see a sequence's keys end at reach (S,): its own end, or that of the last sequence that continues it.
    """
    g = tl.program_id(0)
    # Forwards: the first blocks of a sequence are seen by the most queries.
    sequence, start, length, first = _find_block(cu_seqlens, sequences, tl.program_id(1), BLOCK_K)
    if first < length:
        keys, columns = first + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_E)
        k_tile = _load_tile(k + start * stride_kt + g * stride_kg, stride_kt, keys, length, columns, E, True)
        v_tile = _load_tile(v + start * stride_vt + g * stride_vg, stride_vt, keys, length, columns, E, True)
        scale_2 = scale * 1.4426950408889634  # times log2(e)
        dk = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
        dv = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
        below = tl.minimum(first + BLOCK_K, length)  # from here on every query sees all of these keys
        end = (tl.load(reach + sequence) - start).to(tl.int32) if SHARED else length
        for head in range(g * GROUP, (g + 1) * GROUP):
            q_head = q + start * stride_qt + head * stride_qh
            do_head = grad_out + (start * H + head) * E
            row = head * T + start
            dk, dv = _grad_kv(
                dk, dv, k_tile, v_tile, q_head, do_head, lse + row, delta + row, stride_qt, H * E,
                first, below, keys, columns, scale_2, E, BLOCK_Q, True,
            )  # fmt: skip
            dk, dv = _grad_kv(
                dk, dv, k_tile, v_tile, q_head, do_head, lse + row, delta + row, stride_qt, H * E,
                below, end, keys, columns, scale_2, E, BLOCK_Q, False,
            )  # fmt: skip
        at = ((start + keys) * (H // GROUP) + g)[:, None] * E + columns[None, :]
        kept = (keys < length)[:, None] & (columns < E)[None, :]
        tl.store(grad_k + at, (dk * scale).to(grad_k.dtype.element_ty), mask=kept)
        tl.store(grad_v + at, dv.to(grad_v.dtype.element_ty), mask=kept)


def _tiles(E: int, dtype: torch.dtype) -> tuple[int, dict[str, tuple[int, int, int, int]]]:
    """BLOCK_E, and per kernel its (BLOCK_Q, BLOCK_K, num_warps, num_stages), for head width E.

    The tile that stays (of queries; in `dk, dv` of keys) is as large as its fp32 accumulators in registers allow: so what
    streams by is read fewer times. It has to be a multiple of the other, so that the diagonal starts at the border of a
    block. Those for E = 64 and 128 in 16 bits were chosen by measurement on an H200 (docs/gpu.md).
    """
    BLOCK_E = max(16, triton.next_power_of_2(E))
    if dtype == torch.float32:  # a dot is three TF32 dots here, and twice the bytes: for tests and debugging
        side = 32 if BLOCK_E <= 128 else 16
        return BLOCK_E, dict.fromkeys(("forward", "dq", "dk, dv"), (side, side, 8, 1))
    if BLOCK_E <= 64:
        return BLOCK_E, {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 2), "dk, dv": (64, 64, 4, 2)}
    if BLOCK_E == 128:
        return BLOCK_E, {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 2), "dk, dv": (32, 64, 4, 2)}
    return BLOCK_E, {"forward": (64, 64, 8, 2), "dq": (64, 32, 8, 2), "dk, dv": (32, 32, 8, 2)}


def _launch(kernel, name: str, q, k, v, others: tuple[torch.Tensor, ...], cu_seqlens, shared) -> None:
    """Run one of the three kernels, with `others` between v and cu_seqlens, on every block of every head.

    `shared` (S,) is `prefix`, or for dk and dv `reach`; None: no sequence continues another.
    """
    (T, H, E), G, S = q.shape, k.shape[1], len(cu_seqlens) - 1
    BLOCK_E, tiles = _tiles(E, q.dtype)
    BLOCK_Q, BLOCK_K, warps, stages = tiles[name]
    heads, block = (G, BLOCK_K) if name == "dk, dv" else (H, BLOCK_Q)  # of the tile that stays
    with torch.cuda.device_of(q):
        kernel[heads, T // block + S](  # as many numbers as `_find_block` gives out
            q, k, v, *others, cu_seqlens, cu_seqlens if shared is None else shared, S, T, 1 / math.sqrt(E),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], H=H, GROUP=H // G, E=E, SHARED=shared is not None,
            BLOCK_E=BLOCK_E, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, num_warps=warps, num_stages=stages,
        )  # fmt: skip


class _Attention(torch.autograd.Function):
    """Forward and backward of `attention` by the kernels above."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, prefix):
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        T, H, _ = q.shape
        out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(H, T, dtype=torch.float32)
        _launch(_forward_kernel, "forward", q, k, v, (out, lse), cu_seqlens, prefix)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, prefix)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse, cu_seqlens, prefix = ctx.saved_tensors
        grad_out, delta = grad_out.contiguous(), torch.empty_like(lse)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        _launch(_backward_q_kernel, "dq", q, k, v, (out, grad_out, lse, delta, dq), cu_seqlens, prefix)
        ends = cu_seqlens[1:]
        reach = None if prefix is None else ends.scatter_reduce(0, prefix, ends, "amax")  # (S,)
        _launch(_backward_kv_kernel, "dk, dv", q, k, v, (grad_out, lse, delta, dk, dv), cu_seqlens, reach)
        return dq, dk, dv, None, None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, prefix: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal softmax(q·kᵀ/√E)·v inside each sequence of a pack; query head h reads key/value head h // (H/G).

    q (T, H, E), k and v (T, G, E), one floating dtype; cu_seqlens (S+1,) integer, first 0, last T. Returns (T, H, E).
    prefix (S,) int64: for each sequence the one that it continues, or itself. One that is continued has at least one
    token, continues none itself, and is followed at once by those that continue it.
    """
    attend = _Attention.apply if q.is_cuda and triton is not None else attention_torch
    return attend(q, k, v, cu_seqlens, prefix)
