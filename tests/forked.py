"""Commands on several processes, one per rank, forked from one that has imported torch: torchrun without its start-up."""

import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from s2r.run import flags

if "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("needs a system that forks", allow_module_level=True)
FORK = multiprocessing.get_context("forkserver")
MODULES = ["train_rl", "train_sft", "sample", "s2r.stage0.verifications"]
FORK.set_forkserver_preload(["s2r", *MODULES, "torch._dynamo", "torch._inductor"])  # the last two are AdamW's


def process(name: str, argv: list[str], rank: int, ranks: int, port: int, output: str, prepare) -> None:
    """What a forked process does: one rank of a command, as the command does it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.stdout = sys.stderr = open(output, "a", buffering=1)
    sys.argv = [name, *argv]
    torch.set_num_threads(1)
    prepare(rank)
    module = importlib.import_module(name)
    flags.start(module.main, module.Config)


def nothing(rank: int) -> None:
    pass


def launch(name: str, ranks: int, settings: dict, output: str | Path, prepare=nothing) -> list:
    """The processes of a module's command, started; each calls `prepare(rank)` first. `output` gets what they print."""
    argv = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in settings.items()]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [FORK.Process(target=process, args=(name, argv, i, ranks, port, str(output), prepare)) for i in range(ranks)]
    for one in started:
        one.start()
    return started


def finish(started: list) -> list[int]:
    """Their exit statuses; minus the signal's number for one that a signal ended."""
    for one in started:
        one.join()
    return [one.exitcode for one in started]
