"""The expensive places of a language-model policy, each in a file of its own.

    attention.py  causal attention over packed sequences
    decode.py     attention of one new token per row over the sampler's cache
    logprob.py    log p of given tokens without ever holding the (T, V) logits
    sampling.py   one token per row from the logits, with its log-probability
    elementwise.py  rotary embedding and SwiGLU in one pass each
    linear.py     matrix products with few rows, for decoding on a CPU

Nothing here knows of S²R. Dimension letters are those of `s2r/__init__.py`.
"""

try:  # comes with PyTorch for CUDA; without it (macOS, Windows) the kernels are imported and never called
    import triton
    import triton.language as tl

    # Triton compiles a kernel again when an integer argument becomes 1, or starts or stops being a
    # multiple of 16. These change from call to call, so they are exempt.
    jit = triton.jit(do_not_specialize=["T", "sequences", "splits", "tiles", "first"])
except ImportError:
    triton = tl = None

    def jit(kernel):
        """Stands in for `triton.jit`, so that files with kernels can be imported."""
        return kernel
