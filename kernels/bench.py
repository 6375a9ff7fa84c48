"""What the kernels cost on a GPU: `python -m kernels.bench` prints a table per kernel, in three minutes.

`--flex` adds torch's flex_attention, which compiles for minutes.

Ours beside PyTorch's own ways of doing the same, measured in one run, in the shapes of Qwen2.5-Math-1.5B and -7B and
Llama-3.1-8B. Times are medians after warm-up. Percentages are fractions of the ceiling: what a plain matmul, or a plain
copy, reaches on the same chip in the same run. FLOPs are those of the maths (causal: half; backward: 2.5 times the
forward), so work done twice lowers the rate.
"""

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from kernels import attention as A
from kernels import logprob as P
from kernels import triton
from kernels.decode import decode_attention, decode_attention_torch

MODELS = {  # name: H, G, E, D, V
    "Qwen2.5-Math-1.5B": (12, 2, 128, 1536, 151_936),
    "Qwen2.5-Math-7B": (28, 4, 128, 3584, 151_936),
    "Llama-3.1-8B": (32, 8, 128, 4096, 128_256),
}
E64 = {"Llama-3.2-1B": (32, 8, 64)}


def milliseconds(function: Callable[[], object]) -> float:
    """Median time of a call on the GPU, after warm-up, with the L2 cache flushed before each."""
    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def extra_memory(function: Callable[[], object]) -> float:
    """Peak GPU memory during a call beyond what is held before it, in MB; its results count."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def attempt(measure: Callable[[], float]) -> float:
    """A measurement, NaN where this PyTorch or this chip cannot do it (a backend refuses, memory runs out)."""
    try:
        return measure()
    except (RuntimeError, ImportError, triton.runtime.errors.OutOfResources) as error:
        torch.cuda.empty_cache()
        print(f"    not measured: {str(error).splitlines()[0][:90]}", file=sys.stderr)
        return float("nan")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def ceilings() -> tuple[float, float]:
    """What this chip does in one large bf16 matmul, TFLOP/s, and in copying 2 GB, GB/s read and written."""
    a, b = normal(8192, 8192), normal(8192, 8192)
    x = torch.empty(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9, 4 * x.numel() / milliseconds(lambda: y.copy_(x)) / 1e6


def borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device="cuda").cumsum(0)


def rl_lengths(tokens: int = 16_384, mean: int = 500) -> list[int]:
    """Lengths as rollouts have them: exponential from 100 on, packed to so many tokens."""
    draw = 100 + torch.empty(tokens // 100).exponential_(1 / (mean - 100), generator=torch.Generator().manual_seed(0))
    lengths = []
    for length in draw.int().tolist():
        length = min(length, 4 * mean, tokens - sum(lengths))
        if length:
            lengths.append(length)
    return lengths


def forward_and_backward(function: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward pass, and of the backward pass alone."""
    forward = milliseconds(function)
    out = function()
    upstream = torch.randn_like(out)
    return forward, milliseconds(lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True))


def bench_attention(peak: float, with_flex: bool) -> None:
    print("\n## Causal attention, bf16. ms (TFLOP/s, fraction of the matmul ceiling)\n")
    names = ("ours", "SDPA flash", "cuDNN", *["flex"] * with_flex)
    print("| heads | sequences | " + " | ".join(f"{name} fwd | bwd" for name in names) + " |")
    print("|---|---" + "|---|---" * len(names) + "|")
    heads = {name: shape[:3] for name, shape in MODELS.items()} | E64
    packs = {"8 × 2,048": [2048] * 8, "2 × 8,192": [8192] * 2, "RL, mean 500": rl_lengths()}
    for name, (H, G, E) in heads.items():
        for what, lengths in packs.items():
            S, longest, T = len(lengths), max(lengths), sum(lengths)
            pairs = sum(n * (n + 1) / 2 for n in lengths)
            flops = 4 * pairs * H * E
            q, k, v = (normal(T, n, E).requires_grad_() for n in (H, G, G))
            padded = [normal(S, n, longest, E).requires_grad_() for n in (H, G, G)]
            cu_seqlens = borders(lengths)
            times = [attempt_pair(lambda: A.attention(q, k, v, cu_seqlens), [q, k, v])]
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                with sdpa_kernel(backend):
                    times.append(
                        attempt_pair(
                            lambda: F.scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=True), padded
                        )
                    )
            if with_flex:
                times.append(attempt_pair(lambda: flex(q, k, v, lengths), [q, k, v]))
            cells = []
            for forward, backward in times:
                for ms, work in ((forward, flops), (backward, 2.5 * flops)):
                    rate = work / ms / 1e9
                    cells.append(f"{ms:.3f} ({rate:.0f}, {rate / peak:.0%})" if ms == ms else "–")
            print(f"| {name} {H}:{G}, E={E} | {what} | " + " | ".join(cells) + " |", flush=True)
    print("\nThe rates of SDPA on RL lengths are those of the useful pairs: it runs on the padded batch.")


def attempt_pair(function: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> tuple[float, float]:
    pair = []
    attempt(lambda: pair.extend(forward_and_backward(function, leaves)) or 0.0)
    return (pair[0], pair[1]) if pair else (float("nan"), float("nan"))


_flex: dict[str, object] = {}


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The same pack by torch's flex_attention, compiled, with a block mask for documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if _flex.get("lengths") != lengths:
        document = torch.repeat_interleave(
            torch.arange(len(lengths), device=q.device), torch.tensor(lengths, device=q.device)
        )
        mask = create_block_mask(
            lambda b, h, i, j: (document[i] == document[j]) & (i >= j), None, None, len(document), len(document)
        )
        _flex.update(lengths=lengths, mask=mask, run=torch.compile(flex_attention, dynamic=False))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return _flex["run"](q, k, v, block_mask=_flex["mask"], enable_gqa=True)


def bench_decode(bandwidth: float) -> None:
    print("\n## Decode attention, bf16. GB/s of keys and values read (fraction of the copy ceiling)\n")
    print("| heads | rows × tokens | ours, ms | GB/s | twin, ms |\n|---|---|---|---|---|")
    for name, (H, G, E, *_) in (MODELS | E64).items():
        for S, C in ((256, 1024), (64, 8192), (8, 8192), (1, 32_768)):
            q = normal(S, H, E)
            k, v = (normal(S, G, C, E).transpose(1, 2) for _ in "kv")
            lengths = torch.full((S,), C, device="cuda")
            ours = milliseconds(lambda: decode_attention(q, k, v, lengths))
            twin = attempt(lambda: milliseconds(lambda: decode_attention_torch(q, k, v, lengths)))
            rate = 4 * S * C * G * E / ours / 1e6
            print(
                f"| {name} {H}:{G}, E={E} | {S} × {C:,} | {ours:.3f} | {rate:,.0f} ({rate / bandwidth:.0%}) | "
                f"{twin:.3f} |"
            )


def naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p from whole logits."""
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]


def bench_logprob(T: int = 8192) -> None:
    print(f"\n## log p and entropy, T = {T:,}, bf16. ms (multiple of the bare matmuls), and MB beyond the inputs\n")
    print("| D, V | | forward | forward + backward | MB forward | MB forward + backward, dX and dW in it |")
    print("|---|---|---|---|---|---|")
    for name, (*_, D, V) in MODELS.items():
        hidden, weight = normal(T, D).requires_grad_(), (normal(V, D) * D**-0.5).requires_grad_()
        targets, upstream = torch.randint(V, (T,), device="cuda"), torch.randn(T, device="cuda")
        logits = torch.empty(T, V, device="cuda", dtype=torch.bfloat16)
        bare = milliseconds(lambda: torch.mm(hidden.detach(), weight.detach().T, out=logits))
        del logits
        ways = {
            "ours": lambda: P.token_logp(hidden, weight, targets)[0],
            "whole logits": lambda: naive(hidden, weight, targets),
            "chunked PyTorch": lambda: P._TorchHead.apply(hidden, weight, targets, 1.0, None, None)[0],
            "compiled chunks": lambda: compiled_chunks(hidden, weight, targets),
            "Liger": lambda: liger(hidden, weight, targets),
        }
        if core := getattr(F, "linear_cross_entropy", None):  # from torch 2.12 on
            ways["PyTorch's own"] = lambda: -core(hidden, weight, targets, reduction="none")
        print(f"| {name}: {D:,}, {V:,} | bare matmuls | {bare:.1f} | {3 * bare:.1f} | | |")
        for way, function in ways.items():

            def both():
                out = function()
                return torch.autograd.grad(out, [hidden, weight], upstream if out.dim() else None)

            def forward():
                with torch.no_grad():
                    return function()

            ms, both_ms = attempt(lambda: milliseconds(forward)), attempt(lambda: milliseconds(both))
            mb, both_mb = attempt(lambda: extra_memory(forward)), attempt(lambda: extra_memory(both))
            print(
                f"| | {way} | {ms:.1f} ({ms / bare:.2f}×) | {both_ms:.1f} ({both_ms / bare / 3:.2f}×) | {mb:,.0f} | "
                f"{both_mb:,.0f} |",
                flush=True,
            )


@torch.compile(dynamic=False)
def _compiled_chunk(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return naive(hidden, weight, targets)


def compiled_chunks(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p in eight chunks of tokens, each recomputed in the backward pass, under torch.compile."""
    chunks = zip(hidden.chunk(8), targets.chunk(8))
    return torch.cat([checkpoint(_compiled_chunk, h, weight, t, use_reentrant=False) for h, t in chunks])


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Liger's fused linear cross-entropy, where it is installed: the mean loss; no entropy, no gradient per token."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flex", action="store_true", help="also torch's flex_attention")
    with_flex = parser.parse_args().flex
    if not torch.cuda.is_available():
        print("error: torch sees no GPU here, and the tables are measured on one", file=sys.stderr)
        sys.exit(2)
    peak, bandwidth = ceilings()
    chip = torch.cuda.get_device_name()
    print(f"{chip}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"ceilings: bf16 matmul {peak:.0f} TFLOP/s, copy {bandwidth:,.0f} GB/s")
    bench_decode(bandwidth)
    bench_logprob()
    bench_attention(peak, with_flex)


if __name__ == "__main__":
    main()
