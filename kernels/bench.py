"""What the kernels cost: `python -m kernels.bench` prints a table per kernel.

On a GPU: ours beside PyTorch's own ways of doing the same, measured in one run, in the shapes of Qwen2.5-Math-1.5B and
-7B and Llama-3.1-8B. Medians after warm-up; "of ceiling" is the share of what a plain matmul, or a plain copy, reaches
on the same chip in the same run. FLOPs are those of the maths (causal: half; backward: 2.5 times the forward), so work
done twice lowers the figure. Without a GPU: the compile report, what the compiler makes of each kernel for sm_80 and
sm_90: registers per thread, bytes of local memory (spills), shared memory per program, tensor-core instructions.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import attention as A
from kernels import logprob as P
from kernels import triton

MODELS = {  # name: H, G, E, D, V
    "Qwen2.5-Math-1.5B": (12, 2, 128, 1536, 151_936),
    "Qwen2.5-Math-7B": (28, 4, 128, 3584, 151_936),
    "Llama-3.1-8B": (32, 8, 128, 4096, 128_256),
}
E64 = {"Llama-3.2-1B": (32, 8, 64)}


# ---- compile report ----

POINTERS = {"cu_seqlens": "*i64", "lengths": "*i64", "targets": "*i64", "scale": "fp32", "inverse_temperature": "fp32"}
FP32 = ("lse", "delta", "partial", "target_logit", "stats", "upstream")
INTEGERS = ("sequences", "T", "V", "splits", "tiles", "first", "width")


def signature(kernel) -> dict[str, str]:
    """Argument name → type, for bf16 tensors; constants are told by their capitals."""
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            types[name] = "constexpr"
        elif name in INTEGERS or "stride" in name:
            types[name] = "i32"
        else:
            types[name] = POINTERS.get(name, "*fp32" if name in FP32 else "*bf16")
    return types


def kernels(capability: int) -> Iterator[tuple[str, object, dict[str, int], int, int]]:
    """Every kernel with the constants, warps and stages that it runs with: attention by E, log p of the 7B model."""
    for with_kl in (False, True):
        tiles = P._tiles(2, with_kl, capability // 10)
        warps, stages = tiles.pop("num_warps"), tiles.pop("num_stages")
        constants = {"D": 3584, "D_REF": 3584, "WITH_KL": with_kl, "GROUP": P.GROUP, **tiles}
        for name, kernel in (("forward", P._forward_kernel), ("slab of dz", P._slab_kernel)):
            yield f"log p{' and KL' if with_kl else ''} {name}", kernel, constants, warps, stages
    for E in (64, 80, 128, 256):
        BLOCK_E, tiles = A._tiles(E, torch.bfloat16)
        for name, kernel in (
            ("forward", A._forward_kernel),
            ("dq", A._backward_q_kernel),
            ("dk, dv", A._backward_kv_kernel),
        ):
            BLOCK_Q, BLOCK_K, warps, stages = tiles[name]
            constants = {"H": 28, "GROUP": 7, "E": E, "BLOCK_E": BLOCK_E, "BLOCK_Q": BLOCK_Q, "BLOCK_K": BLOCK_K}
            yield f"attention {name}, E={E}", kernel, constants, warps, stages
        split = {"H": 28, "GROUP": 7, "E": E, "BLOCK_E": BLOCK_E, "BLOCK_H": 16, **A._decode_tiles(BLOCK_E)}
        warps, stages = split.pop("num_warps"), split.pop("num_stages")
        for SPLITS in (1, 8):
            yield f"decode forward, E={E}, {SPLITS} splits", A._decode_kernel, split | {"SPLITS": SPLITS}, warps, stages
        yield f"decode merge, E={E}", A._merge_kernel, {"E": E, "SPLITS": 8, "BLOCK_E": BLOCK_E}, 2, 3


def compile_report() -> list[dict]:
    """One row per kernel and architecture, as the module docstring says; needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows = []
    for capability in (80, 90):
        for name, kernel, constants, warps, stages in kernels(capability):
            types = signature(kernel)
            aligned = {  # what the launcher finds out at run time: pointers and strides divide by 16
                (i,): [["tt.divisibility", 16]]
                for i, (argument, kind) in enumerate(types.items())
                if kind.startswith("*") or "stride" in argument
            }
            source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
            options = {"num_warps": warps, "num_stages": stages}
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            registers, local = resources(compiled.asm["cubin"])
            instructions = re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])
            rows.append(
                {
                    "kernel": name,
                    "sm": capability,
                    "warps": warps,
                    "registers": registers,
                    "local": local,
                    "shared": compiled.metadata.shared,
                    "tensor_cores": instructions[0] if instructions else "",
                }
            )
    return rows


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory per thread, which is where spilled registers go, of a binary."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


def print_compile_report() -> None:
    print(f"| {'kernel':34} | sm | warps | registers | local bytes | shared KB | tensor cores |")
    print(f"|{'-' * 36}|----|-------|-----------|-------------|-----------|--------------|")
    for row in compile_report():
        print(
            f"| {row['kernel']:34} | {row['sm']} | {row['warps']:5} | {row['registers']:9} | {row['local']:11} | "
            f"{row['shared'] / 1024:9.0f} | {row['tensor_cores'].split('.')[0]:12} |"
        )


# ---- measurements ----


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
    except (RuntimeError, ImportError) as error:
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


def bench_attention(peak: float) -> None:
    print("\n## Causal attention, bf16. ms (TFLOP/s, share of the matmul ceiling)\n")
    print("| heads | sequences | ours fwd | ours bwd | SDPA flash fwd | bwd | cuDNN fwd | bwd | flex fwd | bwd |")
    print("|---|---|---|---|---|---|---|---|---|---|")
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
    print("\n## Decode attention, bf16. GB/s of keys and values read (share of the copy ceiling)\n")
    print("| heads | rows × tokens | ours, ms | GB/s | twin, ms |\n|---|---|---|---|---|")
    for name, (H, G, E, *_) in (MODELS | E64).items():
        for S, C in ((256, 1024), (64, 8192), (8, 8192), (1, 32_768)):
            q = normal(S, H, E)
            k, v = (normal(S, G, C, E).transpose(1, 2) for _ in "kv")
            lengths = torch.full((S,), C, device="cuda")
            ours = milliseconds(lambda: A.decode_attention(q, k, v, lengths))
            twin = attempt(lambda: milliseconds(lambda: A.decode_attention_torch(q, k, v, lengths)))
            rate = 4 * S * C * G * E / ours / 1e6
            print(f"| {name} {H}:{G}, E={E} | {S} × {C:,} | {ours:.3f} | {rate:,.0f} ({rate / bandwidth:.0%}) | {twin:.3f} |")


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
            "Liger": lambda: liger(hidden, weight, targets),
        }
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


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Liger's fused linear cross-entropy, where it is installed: the mean loss, without entropy or a gradient per token."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)


def main() -> None:
    if "--json" in sys.argv:
        print(json.dumps(compile_report()))
    elif not torch.cuda.is_available():
        print("No GPU here: this is what the compiler makes of the kernels; times need a GPU.\n")
        print_compile_report()
    else:
        peak, bandwidth = ceilings()
        chip = torch.cuda.get_device_name()
        print(f"{chip}, torch {torch.__version__}, triton {triton.__version__}")
        print(f"ceilings: bf16 matmul {peak:.0f} TFLOP/s, copy {bandwidth:,.0f} GB/s")
        bench_attention(peak)
        bench_decode(bandwidth)
        bench_logprob()


if __name__ == "__main__":
    main()
