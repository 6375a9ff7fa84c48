"""log p of given tokens, their entropy, and the KL to a second model, without ever holding the (T, V) logits.

With z = h·Wᵀ/τ the logits of one token, target y and p = softmax(z):

    forward    logp = z_y − log Σ e^z      entropy = log Σ e^z − Σ p·z      kl = Σ p·(log p − log p_ref)
    backward   dz = g_logp·(onehot(y) − p) + g_kl·p·(log p − log p_ref − kl)      dh = dz·W/τ      dW = dzᵀ·h/τ

Neither direction saves the logits; the backward computes them again. At T = 8,192 and V = 151,936 they would take
5 GB in fp32, with their gradient 10 GB. Two implementations, one maths:

PyTorch (`_TorchHead`, the CPU) goes forward by chunks of tokens and back by slabs of the vocabulary, one chunk or slab
of logits alive.

Triton (`_TritonHead`, CUDA) walks over tiles of BLOCK_T tokens × BLOCK_V vocabulary entries that never leave the
registers. The vocabulary is cut into a few splits, and a program of the forward kernel owns one cell of

                 split 0      split 1      split 2            the tiles of its cell one after the other, keeping per
    tokens 0     program 0    program 2    program 4          token the maximum m of z so far and Σ e^(z−m),
    tokens 1     program 1    program 3    program 5          Σ (z−m)·e^(z−m); a larger m rescales the sums

after which a few torch operations on (splits, T) merge the cells: 2 MB at the sizes above. The backward goes through
slabs of the vocabulary, all tokens × some entries. Its kernel writes one slab of dz, a program a tile, and two plain
matmuls, which run at the speed of the chip, make of it those rows of dW, each written once, and a part of dh, summed
in fp32. Beyond dh and dW it holds one slab and one (T, D) in fp32: 250 MB at the sizes above and D = 3,584. There are
no atomics, so two runs agree bit for bit.

Called by `s2r/packing.py` (policy and reference of an RL step), `train_sft.py` and the toy's pretraining.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from kernels import jit, tl, triton

CHUNK_ELEMENTS = 2**22  # logits of one chunk or slab, 16 MB in fp32; two or three such buffers are alive at a time
SLAB_BYTES = 2**27  # of dz, 128 MB: 8,192 tokens × 8,192 entries in bf16
GROUP = 16  # token blocks that share their reads of weight; see _owner
LOG2E = 1.4426950408889634  # e^x = 2^(x·LOG2E), and 2^x is one instruction


class _TorchHead(torch.autograd.Function):
    """The maths of the module docstring in PyTorch: forward by chunks of tokens, back by slabs of the vocabulary."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, hidden_ref, weight_ref):
        T, V = hidden.shape[0], weight.shape[0]
        logp, entropy, kl, m, log_s, m_ref, log_s_ref = (hidden.new_zeros(T, dtype=torch.float32) for _ in range(7))
        for chunk in _slices(T, CHUNK_ELEMENTS // V):
            log_p, m[chunk], log_s[chunk] = _log_softmax(hidden[chunk], weight, temperature)  # (t, V)
            logp[chunk] = log_p.gather(1, targets[chunk, None])[:, 0]
            p = log_p.exp()
            entropy[chunk] = -torch.linalg.vecdot(p, log_p)
            if hidden_ref is not None:
                log_p_ref, m_ref[chunk], log_s_ref[chunk] = _log_softmax(hidden_ref[chunk], weight_ref, temperature)
                kl[chunk] = torch.linalg.vecdot(p, log_p.sub_(log_p_ref)).clamp_(min=0)  # as in Triton: rounding
        ctx.save_for_backward(hidden, weight, targets, hidden_ref, weight_ref, kl, m, log_s, m_ref, log_s_ref)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, _, grad_kl):
        hidden, weight, targets, hidden_ref, weight_ref, kl, m, log_s, m_ref, log_s_ref = ctx.saved_tensors
        T, V = hidden.shape[0], weight.shape[0]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # None: a frozen head
        rows = torch.arange(T, device=hidden.device)
        for slab in _slices(V, max(CHUNK_ELEMENTS // max(T, 1), 128)):
            z = _z(hidden, weight[slab], ctx.temperature)  # (T, entries of this slab)
            log_p = z.sub_(m[:, None]).sub_(log_s[:, None])
            if hidden_ref is None:
                grad_z = log_p.exp_().mul_(-grad_logp[:, None])
            else:
                z_ref = _z(hidden_ref, weight_ref[slab], ctx.temperature)
                log_p_ref = z_ref.sub_(m_ref[:, None]).sub_(log_s_ref[:, None])
                p = log_p.exp()
                grad_z = log_p.sub_(log_p_ref).sub_(kl[:, None]).mul_(grad_kl[:, None]).sub_(grad_logp[:, None]).mul_(p)
            hit = (targets >= slab.start) & (targets < slab.stop)  # (T,)
            grad_z[rows[hit], targets[hit] - slab.start] += grad_logp[hit]
            grad_z = grad_z.div_(ctx.temperature).to(hidden.dtype)
            if grad_weight is not None:
                torch.mm(grad_z.T, hidden, out=grad_weight[slab])  # all tokens at once: rounded once
            if hidden.dtype == torch.float32:
                grad_hidden.addmm_(grad_z, weight[slab])
            else:
                grad_hidden += grad_z @ weight[slab]
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def _z(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """hidden·weightᵀ / temperature in fp32."""
    return (hidden @ weight.T).float().div_(temperature)


def _log_softmax(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
    """Log-probabilities (t, V) in fp32 of hidden states (t, D), with what they are made of.

    That is the maximum m of the logits z, and log s = log Σ e^(z−m), each (t,).
    """
    z = _z(hidden, weight, temperature)
    m = z.amax(dim=1)
    log_s = z.sub_(m[:, None]).exp().sum(dim=1).log()
    return z.sub_(log_s[:, None]), m, log_s


def _slices(size: int, step: int) -> list[slice]:
    """Slices of `step` elements, at least one, and a shorter last one, that cover range(size)."""
    step = max(step, 1)
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


@jit
def _owner(blocks, columns, GROUP: tl.constexpr):
    """Which (token block, column of work) this program owns, out of blocks × columns.

    Programs start in the order of their numbers, one per processor of the chip. The numbers run over GROUP token
    blocks, then over the columns, then over the next GROUP: so those alive together share their rows of hidden and of
    weight and find them in the L2 cache. All the token blocks at once would not fit: hidden has 59 MB at T = 8,192,
    D = 3,584.
    """
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(blocks - first, GROUP)  # the last group may be lower
    within = program % (GROUP * columns)
    return first + within % height, within // height


@jit
def _logits(hidden, hidden_stride, weight, weight_stride, t, v, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The products hidden[t]·weight[v]ᵀ of one tile, (BLOCK_T, BLOCK_V) fp32, BLOCK_D columns at a time."""
    d = tl.arange(0, BLOCK_D)
    h = hidden + t.to(tl.int64)[:, None] * hidden_stride + d[None, :]  # (BLOCK_T, BLOCK_D) addresses
    w = weight + v.to(tl.int64)[None, :] * weight_stride + d[:, None]  # (BLOCK_D, BLOCK_V); V·D may pass 2³¹
    z = tl.zeros((t.shape[0], v.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:  # known at compile time: no mask where none is needed
            h_tile, w_tile = tl.load(h), tl.load(w)
        else:
            inside = d < D - start  # (BLOCK_D,); zeros past the end of the rows add nothing to the product
            h_tile = tl.load(h, mask=inside[None, :], other=0.0)  # (BLOCK_T, BLOCK_D)
            w_tile = tl.load(w, mask=inside[:, None], other=0.0)  # (BLOCK_D, BLOCK_V)
        z = tl.dot(h_tile, w_tile, z, input_precision="ieee")  # fp32 inputs stay fp32: TF32 has 10 bits
        h += BLOCK_D
        w += BLOCK_D
    return z


@jit
def _forward_kernel(
    hidden, hidden_stride, weight, weight_stride, targets,
    hidden_ref, hidden_ref_stride, weight_ref, weight_ref_stride,
    target_logit, partial,
    T, V, splits, tiles, scale,  # scale: log2(e)/τ
    D: tl.constexpr, D_REF: tl.constexpr, WITH_KL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Owns BLOCK_T tokens and `tiles` tiles of the vocabulary; one pass over them with running max and sums.

    Writes target_logit (T,) where the target is in its tiles, and its rows of partial (splits, 3 or 6, T).
    """
    LOWEST = -1e30  # "no logit": like −inf, except that LOWEST − LOWEST and 0·LOWEST are 0 and not NaN
    block, split = _owner(tl.cdiv(T, BLOCK_T), splits, GROUP)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)  # (BLOCK_T,) the rows this program owns
    row = tl.minimum(t, T - 1)  # past the end: the last row again, read but never written
    target = tl.load(targets + row)  # (BLOCK_T,) int64
    first = split * tiles * BLOCK_V
    last = tl.minimum(first + tiles * BLOCK_V, V)

    m = tl.full((BLOCK_T,), LOWEST, tl.float32)  # running maximum of the logits z
    s = tl.zeros((BLOCK_T,), tl.float32)  # Σ e with e = exp((z − m)/τ)
    u = tl.zeros((BLOCK_T,), tl.float32)  # Σ e·(z − m)
    z_target = tl.zeros((BLOCK_T,), tl.float32)
    m_ref = tl.full((BLOCK_T,), LOWEST, tl.float32)
    s_ref = tl.zeros((BLOCK_T,), tl.float32)
    cross = tl.zeros((BLOCK_T,), tl.float32)  # Σ e·((z − m) − (z_ref − m_ref))
    for start in range(first, last, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
        entry = tl.minimum(v, V - 1)  # past the end: the last entry again, and its logit is taken away below
        z = _logits(hidden, hidden_stride, weight, weight_stride, row, entry, D, BLOCK_D)
        z = tl.where(v[None, :] < V, z, LOWEST)  # (BLOCK_T, BLOCK_V)
        z_target += tl.sum(tl.where(v[None, :] == target[:, None], z, 0.0), 1)
        m_new = tl.maximum(m, tl.max(z, 1))
        step = m - m_new  # ≤ 0: every z − m of the tiles before moves by it
        keep = tl.exp2(step * scale)
        x = z - m_new[:, None]  # subtracted before it is scaled: exact where it matters, never above 0
        if WITH_KL:
            z_ref = _logits(hidden_ref, hidden_ref_stride, weight_ref, weight_ref_stride, row, entry, D_REF, BLOCK_D)
            z_ref = tl.where(v[None, :] < V, z_ref, LOWEST)
            m_ref_new = tl.maximum(m_ref, tl.max(z_ref, 1))
            step_ref = m_ref - m_ref_new
            x_ref = z_ref - m_ref_new[:, None]
            s_ref = tl.exp2(step_ref * scale) * s_ref + tl.sum(tl.exp2(x_ref * scale), 1)
            e = tl.exp2(x * scale)  # not before the product above: there x alone then has to stay in registers
            cross = keep * (cross + (step - step_ref) * s) + tl.sum(e * (x - x_ref), 1)
            m_ref = m_ref_new
        else:
            e = tl.exp2(x * scale)
        u = keep * (u + step * s) + tl.sum(e * x, 1)
        s = keep * s + tl.sum(e, 1)
        m = m_new

    mine = t < T
    tl.store(target_logit + t, z_target, mask=mine & (target >= first) & (target < last))
    out = partial + split * (6 if WITH_KL else 3) * T + t  # (BLOCK_T,) addresses
    tl.store(out, m, mask=mine)
    tl.store(out + T, s, mask=mine)
    tl.store(out + 2 * T, u, mask=mine)
    if WITH_KL:
        tl.store(out + 3 * T, m_ref, mask=mine)
        tl.store(out + 4 * T, s_ref, mask=mine)
        tl.store(out + 5 * T, cross, mask=mine)


@jit
def _slab_kernel(
    hidden, hidden_stride, weight, weight_stride, targets,
    hidden_ref, hidden_ref_stride, weight_ref, weight_ref_stride,
    stats, upstream, grad_z, grad_z_stride, first,
    T, V, width, inverse_temperature,
    D: tl.constexpr, D_REF: tl.constexpr, WITH_KL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Owns one tile, BLOCK_T tokens × BLOCK_V entries, of grad_z (T, width): the entries from `first` on."""
    block, column = _owner(tl.cdiv(T, BLOCK_T), tl.cdiv(width, BLOCK_V), GROUP)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)  # (BLOCK_T,) the rows this program owns
    c = column * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,) the columns this program owns
    row, entry = tl.minimum(t, T - 1), tl.minimum(first + c, V - 1)
    z = _logits(hidden, hidden_stride, weight, weight_stride, row, entry, D, BLOCK_D)
    target = tl.load(targets + row)  # (BLOCK_T,) int64; the other loads: (BLOCK_T,) fp32
    g_logp = tl.load(upstream + row)
    m = tl.load(stats + row)  # maximum of z
    log_s = tl.load(stats + T + row)  # log Σ exp((z − m)/τ)
    log_p = (z - m[:, None]) * inverse_temperature - log_s[:, None]  # (BLOCK_T, BLOCK_V)
    g = -g_logp[:, None]
    if WITH_KL:
        z_ref = _logits(hidden_ref, hidden_ref_stride, weight_ref, weight_ref_stride, row, entry, D_REF, BLOCK_D)
        g_kl = tl.load(upstream + T + row)
        m_ref = tl.load(stats + 2 * T + row)
        log_s_ref = tl.load(stats + 3 * T + row)
        kl = tl.load(stats + 4 * T + row)
        log_p_ref = (z_ref - m_ref[:, None]) * inverse_temperature - log_s_ref[:, None]
        g += g_kl[:, None] * (log_p - log_p_ref - kl[:, None])
    hit = (first + c)[None, :] == target[:, None]
    dz = tl.exp(log_p) * g + tl.where(hit, g_logp[:, None], 0.0)
    out = grad_z + t.to(tl.int64)[:, None] * grad_z_stride + c[None, :]  # (BLOCK_T, BLOCK_V) addresses
    tl.store(out, dz.to(grad_z.dtype.element_ty), mask=(t < T)[:, None] & (c < width)[None, :])


def _tiles(itemsize: int, with_kl: bool, capability: int) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages for elements of so many bytes on a chip of this major compute capability.

    The largest tiles whose forward keeps everything in registers: 128 × 256 fp32 take 128 of the 255 that each of 256
    threads has, and the KL holds two tiles. A large tile loads less per product: 128 × 256 moves 48 KB from L2 for
    4.2 MFLOP. docs/gpu.md has what was measured.
    """
    if itemsize > 2:  # fp32 to its last bit is not for tensor cores: smaller tiles feed the plain ones
        return {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2}
    # 9 and 10, Hopper's and Blackwell's datacentre chips, multiply out of shared memory and have 144 KB of it to spare.
    entries = (256 if capability in (9, 10) else 128) // (2 if with_kl else 1)
    return {"BLOCK_T": 128, "BLOCK_V": entries, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}


def _splits(blocks: int, tiles: int, processors: int) -> int:
    """Into how many parts the forward cuts the vocabulary, so that the last program ends soonest."""
    most = min(tiles, max(16, processors // max(blocks, 1)))
    # Rounds of programs × tiles in each; among equals the most splits.
    return min(range(1, most + 1), key=lambda n: (triton.cdiv(blocks * n, processors) * triton.cdiv(tiles, n), -n))


def _arguments(hidden, weight, targets, hidden_ref, weight_ref) -> tuple[list, dict[str, int]]:
    """What both kernels get first, and their compile-time constants; without a reference its places are never read."""
    a, b = (hidden, weight) if hidden_ref is None else (hidden_ref, weight_ref)
    inputs = [hidden, hidden.stride(0), weight, weight.stride(0), targets, a, a.stride(0), b, b.stride(0)]
    with_kl, itemsize = hidden_ref is not None, max(hidden.itemsize, a.itemsize)
    capability = torch.cuda.get_device_capability(hidden.device)[0] if hidden.is_cuda else 9
    constants = {"D": hidden.shape[1], "D_REF": a.shape[1], "WITH_KL": with_kl, "GROUP": GROUP}
    return inputs, constants | _tiles(itemsize, with_kl, capability)


def _merge(partial: torch.Tensor, temperature: float) -> list[torch.Tensor]:
    """The sums over the whole vocabulary from those of its splits, partial (splits, 3 or 6, T).

    They add up as in the kernel. Returns m, log s, entropy, and with a reference m_ref, log s_ref, KL, each (T,).
    """
    m_split, s_split, u_split, *ref = partial.unbind(1)  # each (splits, T)
    m = m_split.amax(0)
    step = m_split - m  # ≤ 0, and 0 for the split with the maximum, so that s ≥ 1
    keep = torch.exp(step / temperature)
    s = (keep * s_split).sum(0)
    u = (keep * (u_split + step * s_split)).sum(0)
    log_s = s.log()
    merged = [m, log_s, (log_s - u / s / temperature).clamp_(min=0)]
    if ref:
        m_ref_split, s_ref_split, cross_split = ref
        m_ref = m_ref_split.amax(0)
        step_ref = m_ref_split - m_ref
        log_s_ref = (torch.exp(step_ref / temperature) * s_ref_split).sum(0).log()
        cross = (keep * (cross_split + (step - step_ref) * s_split)).sum(0)
        merged += [m_ref, log_s_ref, (cross / s / temperature - log_s + log_s_ref).clamp_(min=0)]
    return merged


class _TritonHead(torch.autograd.Function):
    """The maths of the module docstring in Triton: forward tile by tile, backward slab by slab of the vocabulary."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, hidden_ref, weight_ref):
        # The kernels want rows whose elements are neighbours; how far apart the rows are does not matter.
        saved = [hidden, weight, targets, hidden_ref, weight_ref]
        saved = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in saved]
        inputs, constants = _arguments(*saved)
        T, V, device = hidden.shape[0], weight.shape[0], hidden.device
        blocks, all_tiles = triton.cdiv(T, constants["BLOCK_T"]), triton.cdiv(V, constants["BLOCK_V"])
        processors = torch.cuda.get_device_properties(device).multi_processor_count if hidden.is_cuda else 4
        tiles = triton.cdiv(all_tiles, _splits(blocks, all_tiles, processors))  # of one split
        splits = triton.cdiv(all_tiles, tiles)  # none of them empty
        partial = torch.empty(splits, 3 if hidden_ref is None else 6, T, dtype=torch.float32, device=device)
        # A target outside of [0, V) belongs to no program: its log p stays NaN, and the loss shows it.
        z_target = torch.full((T,), torch.nan, dtype=torch.float32, device=device)
        with torch.cuda.device_of(hidden):
            _forward_kernel[(blocks * splits,)](
                *inputs, z_target, partial, T, V, splits, tiles, LOG2E / temperature, **constants
            )
        m, log_s, entropy, *ref = _merge(partial, temperature)  # all (T,)
        logp = (z_target - m) / temperature - log_s  # ≤ 0: m is a maximum, z_target among the rest, and s ≥ 1
        m_ref, log_s_ref, kl = ref or (torch.zeros_like(m),) * 3
        ctx.save_for_backward(*saved, torch.stack([m, log_s, m_ref, log_s_ref, kl]))
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, _, grad_kl):
        *saved, stats = ctx.saved_tensors  # stats (5, T)
        hidden, weight = saved[:2]
        inputs, constants = _arguments(*saved)
        T, V, block = hidden.shape[0], weight.shape[0], constants["BLOCK_V"]
        upstream = torch.stack([grad_logp, grad_kl]) / ctx.temperature  # (2, T); the 1/τ of dh and dW
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # None: a frozen head
        grad_hidden, total = torch.empty_like(hidden), torch.zeros_like(hidden, dtype=torch.float32)
        width = min(max(SLAB_BYTES // (max(T, 1) * hidden.itemsize) // block, 1), triton.cdiv(V, block)) * block
        # zeros: the last slab is narrower than the buffer, a CPU's matmul may read past the end of its rows, and 0·NaN is NaN.
        buffer = torch.zeros(T, width, dtype=hidden.dtype, device=hidden.device)
        for slab in _slices(V, width):
            grad_z = buffer[:, : slab.stop - slab.start]  # (T, entries of this slab)
            grid = triton.cdiv(T, constants["BLOCK_T"]) * triton.cdiv(grad_z.shape[1], block)
            with torch.cuda.device_of(hidden):
                _slab_kernel[(grid,)](
                    *inputs, stats, upstream, grad_z, width, slab.start, T, V, grad_z.shape[1], 1 / ctx.temperature,
                    **constants,
                )  # fmt: skip
            if grad_weight is not None:
                torch.mm(grad_z.T, hidden, out=grad_weight[slab])  # all tokens at once: summed in fp32, rounded once
            total += torch.mm(grad_z, weight[slab], out=grad_hidden)  # grad_hidden holds the part of one slab
        return grad_hidden.copy_(total), grad_weight, None, None, None, None


def token_logp(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) and entropy per token, in nats, of softmax(hidden·weightᵀ / temperature).

    hidden (T, D) and weight (V, D) of one floating dtype, targets (T,) int64 in [0, V), temperature > 0.
    Returns logp (T,) fp32 ≤ 0, with gradients to hidden and weight, and entropy (T,) fp32 without.
    """
    return token_logp_kl(hidden, weight, targets, None, None, temperature)[:2]


def token_logp_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    hidden_ref: torch.Tensor | None,
    weight_ref: torch.Tensor | None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`token_logp`, and per token KL(p ‖ p_ref) over the whole vocabulary at the same temperature, in nats.

    hidden_ref (T, D_ref) and weight_ref (V, D_ref) belong to the second model and get no gradient; None: kl is 0.
    Returns logp (T,), entropy (T,), kl (T,) ≥ 0, all fp32; logp and kl have gradients to hidden and weight.
    """
    head = _TritonHead if hidden.is_cuda and triton is not None else _TorchHead
    return head.apply(hidden, weight, targets, temperature, hidden_ref, weight_ref)
