"""Rotary embedding and SwiGLU in Triton, on a GPU or under the interpreter, against PyTorch in float64."""

import pytest
import torch
from interpreter import DEVICE

from kernels.elementwise import _Rotate, _SwiGLU, rotate_torch, swiglu_torch

pytest.importorskip("triton")

# RMS error relative to the values': the result is rounded once, by at most 2⁻⁹ of it in bf16.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-9}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def both(ours, plain, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Value and gradient of `ours` against `plain` in float64."""
    x = x.to(dtype)
    ours_in, exact_in = x.to(DEVICE).requires_grad_(), x.double().requires_grad_()
    out, exact = ours(ours_in), plain(exact_in)
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (grad,) = torch.autograd.grad(out, ours_in, upstream.to(DEVICE))
    (wanted,) = torch.autograd.grad(exact, exact_in, upstream.double())
    for found, right in ((out, exact), (grad, wanted)):
        assert found.dtype == dtype and found.shape == right.shape
        error = (found.detach().cpu().double() - right.detach()).square().mean().sqrt()
        assert error <= TOLERANCE[dtype] * right.detach().square().mean().sqrt()


@dtypes
@pytest.mark.parametrize("T, heads, E", [(1, 1, 16), (5, 3, 64), (7, 14, 80), (3, 12, 128)])
def test_rotate_equals_pytorch_on_a_slice_of_q_k_and_v(T, heads, E, dtype):
    generator = torch.Generator().manual_seed(T)
    angle = torch.rand(T, 1, E // 2, generator=generator) * 100
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1).to(dtype), torch.cat((-angle.sin(), angle.sin()), -1).to(dtype)
    qkv = torch.randn(T, heads + 4, E, generator=generator)
    both(
        lambda x: _Rotate.apply(x[:, 1 : heads + 1], cos.to(DEVICE), sin.to(DEVICE)),
        lambda x: rotate_torch(x[:, 1 : heads + 1], cos.double(), sin.double()), qkv, dtype,
    )  # fmt: skip


@dtypes
@pytest.mark.parametrize("T, width", [(1, 10), (3, 1000), (2, 2500)])
def test_swiglu_equals_pytorch(T, width, dtype):
    x = 3 * torch.randn(T, 2 * width, generator=torch.Generator().manual_seed(width))
    both(_SwiGLU.apply, swiglu_torch, x, dtype)


def test_swiglu_survives_large_gates():
    x = torch.tensor([[-1e4, 1e4, -100.0, 100.0, 1.0, 1.0, 1.0, 1.0]])
    both(_SwiGLU.apply, swiglu_torch, x, torch.float32)
