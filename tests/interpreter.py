"""Triton's interpreter, on where there is no GPU, with bfloat16 mended. Imported by conftest.py, before any kernel.

As of Triton 3.9 the interpreter keeps bfloat16 as raw 16-bit integers, multiplies those integers in `tl.dot`, and
truncates where it should round to nearest even; a chip does neither.
"""

import importlib.util
import os

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # as `s2r/run/loop.py` has it


def mend() -> None:
    """Make the interpreter convert and multiply bfloat16 as PyTorch does."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle) -> np.ndarray:
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def cast(self, source, target):
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return TensorHandle(widened(source), tl.float32)
        return cast_before(self, source, target)

    def dot(self, a, b, d, *precision):
        return TensorHandle(np.matmul(widened(a), widened(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    cast_before = InterpreterBuilder.cast_impl
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot


if DEVICE == "cpu" and importlib.util.find_spec("triton"):
    mend()
