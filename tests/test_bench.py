"""Every kernel compiled for Ampere and Hopper without a GPU, and what the compiler made of it.

    python tests/test_bench.py        prints the table of kernels/README.md
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

triton = pytest.importorskip("triton")
from kernels import attention, decode, elementwise, logprob, sampling  # noqa: E402

SHARED_KB = {80: 163, 90: 227}  # of one program: A100 and H100, CUDA C++ Programming Guide, "Technical Specifications"

POINTERS = {"cu_seqlens": "*i64", "lengths": "*i64", "targets": "*i64", "scale": "fp32", "inverse_temperature": "fp32"}
POINTERS |= {"token": "*i64", "sign": "fp32", "prefix": "*i64", "reach": "*i64"}
FP32 = ("lse", "delta", "partial", "target_logit", "stats", "upstream", "logits", "largest", "mass", "uniform", "logp")
INTEGERS = ("sequences", "T", "V", "splits", "tiles", "first", "width", "chunks")


def signature(kernel) -> dict[str, str]:
    """Argument name → type, for bf16 tensors."""
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
        tiles = logprob._tiles(2, with_kl, capability // 10)
        warps, stages = tiles.pop("num_warps"), tiles.pop("num_stages")
        constants = {"D": 3584, "D_REF": 3584, "WITH_KL": with_kl, "GROUP": logprob.GROUP, **tiles}
        for name, kernel in (("forward", logprob._forward_kernel), ("slab of dz", logprob._slab_kernel)):
            yield f"log p{' and KL' if with_kl else ''} {name}", kernel, constants, warps, stages
    yield "sampling, chunks", sampling._chunk_kernel, {"CHUNK": sampling.CHUNK}, 8, 3
    choose = {"CHUNK": sampling.CHUNK, "BLOCK": 64, "GREEDY": False}
    yield "sampling, choice", sampling._choose_kernel, choose, 8, 3
    yield "rotate", elementwise._rotate_kernel, {"HEADS": 28, "HALF": 64, "BLOCK_H": 32, "BLOCK_E": 64}, 4, 3
    for name, backward in (("forward", False), ("backward", True)):
        yield f"SwiGLU {name}", elementwise._swiglu_kernel, {"WIDTH": 18_944, "BACKWARD": backward, "BLOCK": 1024}, 4, 3
    for E in (64, 128):
        BLOCK_E, tiles = attention._tiles(E, torch.bfloat16)
        heads = {"H": 28, "GROUP": 7, "E": E, "BLOCK_E": BLOCK_E}
        for name, kernel in (
            ("forward", attention._forward_kernel),
            ("dq", attention._backward_q_kernel),
            ("dk, dv", attention._backward_kv_kernel),
        ):
            BLOCK_Q, BLOCK_K, warps, stages = tiles[name]
            for shared in (False, True):
                constants = heads | {"BLOCK_Q": BLOCK_Q, "BLOCK_K": BLOCK_K, "SHARED": shared}
                yield f"attention {name}, E={E}{', shared prompts' * shared}", kernel, constants, warps, stages
        constants = heads | {"BLOCK_H": 16, **decode._tiles(BLOCK_E, 2)}
        warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
        for SPLITS in (1, 8):
            constants = constants | {"SPLITS": SPLITS}
            yield f"decode forward, E={E}, {SPLITS} splits", decode._decode_kernel, constants, warps, stages
        for SPLITS, warps in ((8, 2), (128, 8)):
            constants = {"E": E, "SPLITS": SPLITS, "BLOCK_E": BLOCK_E}
            yield f"decode merge, E={E}, {SPLITS} splits", decode._merge_kernel, constants, warps, 3


def compile_all() -> list[dict]:
    """A row per kernel and chip: registers and local bytes (spills) per thread, shared bytes, matmul instruction."""
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
            matmuls = re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])
            rows.append({"kernel": name, "sm": capability, "registers": registers, "local": local,
                         "shared": compiled.metadata.shared, "matmul": matmuls[0] if matmuls else ""})  # fmt: skip
    return rows


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory per thread, which is where spilled registers go, of a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


def run(*command: str) -> subprocess.CompletedProcess:
    """A Python process where the interpreter is off and no GPU is seen."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_DEFAULT_FP_FUSION": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


def test_kernels_compile_within_the_limits_of_the_chips():
    """No spills in forward kernels (few with shared prompts), shared memory within the chip's, matmuls on tensor cores."""
    done = run(__file__, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    for sm in (80, 90):
        names = [row["kernel"] for row in rows if row["sm"] == sm]
        kinds = {name.split()[0].strip(",") for name in names}
        assert len(names) == len(set(names)) and kinds == {"attention", "decode", "log", "sampling", "rotate", "SwiGLU"}
    for row in rows:
        assert row["registers"] <= 255 and row["shared"] <= SHARED_KB[row["sm"]] * 1024, row
        if "forward" in row["kernel"]:  # seen with shared prompts: 24 at E = 128
            assert row["local"] <= 32 * ("shared" in row["kernel"]), row
        assert row["local"] < 512, row
        multiplies = row["kernel"].startswith(("attention", "decode", "log")) and "merge" not in row["kernel"]
        assert bool(row["matmul"]) == multiplies, row
        if multiplies and row["sm"] == 90 and ("forward" in row["kernel"] or "dq" in row["kernel"]) and "decode" not in row["kernel"]:
            assert row["matmul"].startswith("wgmma"), row


def test_decode_tiles_fit_in_the_shared_memory_of_small_chips():
    """Two buffers of keys and of values, within 64 of the 99 KB of sm_86, sm_89 and sm_120, and 16 rows for a dot."""
    for E, itemsize in ((E, itemsize) for E in (16, 64, 128, 256) for itemsize in (2, 4)):
        rows = decode._tiles(E, itemsize)["BLOCK_K"]
        assert 16 <= rows and 4 * rows * E * itemsize <= 2**16


def test_bench_without_a_gpu_ends_in_one_line():
    done = run("-m", "kernels.bench")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: torch sees no GPU")


if __name__ == "__main__":
    rows = compile_all()
    if "--json" in sys.argv:
        print(json.dumps(rows))
    else:
        for sm80, sm90 in zip(rows, rows[len(rows) // 2 :]):
            cells = (f"{row['registers']}, {row['local']}, {row['shared'] // 1024}" for row in (sm80, sm90))
            print(f"| {sm80['kernel']} | {' | '.join(cells)} |")
