"""Every kernel compiled for Ampere and Hopper without a GPU, and what the compiler made of it."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton")
SHARED_KB = {80: 163, 90: 227}  # of one program: A100 and H100, CUDA C++ Programming Guide, "Technical Specifications"


def bench(*flags: str) -> str:
    """What the command prints in a process of its own, where the interpreter is off and no GPU is seen."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "kernels.bench", *flags]
    done = subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_compile_within_the_limits_of_the_chips():
    """No spills in forward kernels, shared memory within the chip's, matmuls on tensor cores."""
    rows = json.loads(bench("--json"))
    for sm in (80, 90):
        names = [row["kernel"] for row in rows if row["sm"] == sm]
        assert len(names) == len(set(names)) and {name.split()[0] for name in names} == {"attention", "decode", "log"}
    for row in rows:
        assert row["registers"] <= 255 and row["shared"] <= SHARED_KB[row["sm"]] * 1024, row
        assert row["local"] == 0 if "forward" in row["kernel"] else row["local"] < 512, row
        if "merge" not in row["kernel"]:
            assert row["tensor_cores"], row
        if row["sm"] == 90 and ("forward" in row["kernel"] or "dq" in row["kernel"]) and "decode" not in row["kernel"]:
            assert row["tensor_cores"].startswith("wgmma"), row


def test_bench_without_a_gpu_prints_the_compile_report():
    printed = bench()
    assert printed.startswith("No GPU here") and "| attention forward, E=128" in printed
