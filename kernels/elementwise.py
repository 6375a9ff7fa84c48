"""Two steps of a transformer block that only move memory: rotary embedding and SwiGLU's product.

    rotate    x·cos + roll(x, E/2)·sin        four passes over x in PyTorch, one in Triton; the same in the backward pass
    swiglu    silu(gate)·up                   two passes, one in Triton; the backward pass computes silu(gate) again

PyTorch's kernels are slow here because x is a slice of q, k and v together, and gate and up are halves of one matrix.
Called by `s2r/model.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import jit, tl, triton


def rotate_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotate` in PyTorch."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


@jit
def _rotate_kernel(
    x, out, cos, sin, stride_t, stride_h, sign, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Program t rotates all heads of token t; out (T, HEADS, 2·HALF) is contiguous. `sign` −1 turns the other way."""
    t = tl.program_id(0).to(tl.int64)
    head, e = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_E)[None, :]
    inside = (head < HEADS) & (e < HALF)
    at = x + t * stride_t + head * stride_h + e
    a = tl.load(at, mask=inside).to(tl.float32)  # (BLOCK_H, BLOCK_E), the first half of each head
    b = tl.load(at + HALF, mask=inside).to(tl.float32)
    angle = t * 2 * HALF + HALF + e  # the second half of cos and sin; the first is the same, sin negated
    c = tl.load(cos + angle, mask=e < HALF).to(tl.float32)
    s = tl.load(sin + angle, mask=e < HALF).to(tl.float32) * sign
    to = out + (t * HEADS + head) * 2 * HALF + e
    tl.store(to, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


class _Rotate(torch.autograd.Function):
    """`rotate` by the kernel above; the gradient is rotated back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad):
        return _turn(grad, *ctx.saved_tensors, -1.0), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    T, heads, E = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = x.new_empty(x.shape)
    blocks = {"BLOCK_H": triton.next_power_of_2(heads), "BLOCK_E": triton.next_power_of_2(E // 2)}
    with torch.cuda.device_of(x):
        _rotate_kernel[T,](x, out, cos, sin, *x.stride()[:2], sign, HEADS=heads, HALF=E // 2, **blocks)
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) of x (T, heads, E) by cos, sin (T, 1, E), which get no gradient.

    Hugging Face weights pair dimension e with e + E/2, hence the roll by half a head. The first half of sin is negated.
    """
    return _Rotate.apply(x, cos, sin) if x.is_cuda and triton is not None else rotate_torch(x, cos, sin)


def swiglu_torch(gate_up: torch.Tensor) -> torch.Tensor:
    """`swiglu` in PyTorch."""
    gate, up = gate_up.chunk(2, dim=-1)  # (T, F) each
    return F.silu(gate) * up


@jit
def _swiglu_kernel(gate_up, out, grad, WIDTH: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Program (t, n) owns BLOCK columns of token t: of out (T, F), or, BACKWARD, of the gradient out (T, 2F)."""
    t, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < WIDTH
    at = t * 2 * WIDTH + f
    gate = tl.load(gate_up + at, mask=inside).to(tl.float32)  # (BLOCK,)
    up = tl.load(gate_up + at + WIDTH, mask=inside).to(tl.float32)
    s = tl.sigmoid(gate)
    if BACKWARD:
        g = tl.load(grad + t * WIDTH + f, mask=inside).to(tl.float32)
        tl.store(out + at, (g * up * s * (1 + gate * (1 - s))).to(out.dtype.element_ty), mask=inside)
        tl.store(out + at + WIDTH, (g * gate * s).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + t * WIDTH + f, (gate * s * up).to(out.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    """`swiglu` by the kernel above."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        T, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(T, width)
        _launch(gate_up.contiguous(), out, out, width, BACKWARD=False)
        return out

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        _launch(gate_up.contiguous(), out, grad.contiguous(), gate_up.shape[1] // 2, BACKWARD=True)
        return out


def _launch(gate_up: torch.Tensor, out: torch.Tensor, grad: torch.Tensor, width: int, BACKWARD: bool) -> None:
    with torch.cuda.device_of(gate_up):
        grid = len(gate_up), triton.cdiv(width, 1024)
        _swiglu_kernel[grid](gate_up, out, grad, WIDTH=width, BACKWARD=BACKWARD, BLOCK=1024)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate)·up (T, F) of gate_up (T, 2F), the two side by side."""
    return _SwiGLU.apply(gate_up) if gate_up.is_cuda and triton is not None else swiglu_torch(gate_up)
