"""What the three scripts share around their loops: flags, errors, device, model folder, signals, the optimizer's step.

Called by the scripts, and for errors by the `python -m s2r.*` commands. The folder that a training run writes is in
`s2r/checkpoint.py`.
"""

import argparse
import dataclasses
import inspect
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from s2r import toy
from s2r.checkpoint import Run, move
from s2r.model import Transformer
from s2r.parallel import Ranks
from s2r.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]


def parse(config: type, argv: list[str] | None = None):
    """The flat dataclass `config` from the command line: a flag per field, its help the comment beside the field.

    Exits with usage and status 2 for an unknown flag or a value of the wrong type.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.MULTILINE))
    doc = sys.modules[config.__module__].__doc__
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        flag, kind = "--" + field.name.replace("_", "-"), types[field.name]
        help = f"{comments[field.name]} [{field.default}]".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=help)
        elif typing.get_origin(kind) is typing.Literal:
            parser.add_argument(flag, choices=typing.get_args(kind), default=field.default, help=help)
        else:
            parser.add_argument(flag, type=kind, default=field.default, metavar=kind.__name__.upper(), help=help)
    return config(**vars(parser.parse_args(argv)))


def start(main: Callable, config: type) -> None:
    """Run a script's `main` on its flags, as `command` does. Out of memory is one line too, with the flags to turn."""

    def run() -> None:
        main(parse(config))
        if dist.is_initialized():
            dist.barrier()  # the first rank may still be writing
            dist.destroy_process_group()
            # FSDP keeps the threads of gloo alive, and one that lets go of a tensor while Python shuts down aborts the
            # process (github.com/pytorch/pytorch/pull/179291). All is written: leave without shutting down.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    try:
        command(run)
    except (MemoryError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in said:
            raise
        flags = {field.name for field in dataclasses.fields(config)}
        less = [f"a lower --{name.replace('_', '-')}" for name in ("tokens_per_microbatch", "slots") if name in flags]
        more = [f"--{name}" for name in ("checkpointing", "offload") if name in flags]
        print(f"error: out of memory ({said}); what takes less: {', '.join(less + more)}", file=sys.stderr)
        sys.exit(2)


def command(main: Callable[[], None]) -> None:
    """Run `main`. What we raise about a user's input ends in one line and exit status 2.

    So does what the operating system refuses, which names the file; a ValueError out of a library keeps its traceback.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        folder = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent  # exact: .venv may lie in ROOT
        if isinstance(error, ValueError) and folder not in (ROOT, ROOT / "s2r", ROOT / "kernels"):
            raise  # not our message: the traceback says more
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def positive(cfg, *names: str) -> None:
    """Raises ValueError for the first of these settings that is not above 0."""
    for name in names:
        if not getattr(cfg, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: give a number above 0")


def not_negative(cfg, *names: str) -> None:
    """Raises ValueError for the first of these settings that is below 0."""
    for name in names:
        if not getattr(cfg, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: give 0 or more")


def pick(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype by name; "auto" is the GPU if there is one, and bf16 there, fp32 on a CPU.

    A GPU becomes the current device. Raises ValueError for a device that is not here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # one GPU per process of torchrun
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: not a device; use auto, cpu, cuda or cuda:1")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here; use --device cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: torch sees {torch.cuda.device_count()} GPUs here, the first is cuda:0")
        device = f"cuda:{index}"
        torch.cuda.set_device(device)  # streams and CUDA graphs are those of the current device
    return torch.device(device), getattr(torch, dtype)


def load(
    folder: str, device: torch.device, dtype: torch.dtype, train: bool = False, spread: Callable | None = None
) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a folder; to train, the weights are kept in fp32, whatever the compute dtype.

    `spread` as `Transformer.from_pretrained` takes it. Raises ValueError when the tokenizer has ids that the embedding
    does not.
    """
    toy.ensure(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Transformer.from_pretrained(folder, dtype, device, torch.float32 if train else None, spread)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {model.config.vocab_size} rows; "
            "the two files belong to different models"
        )
    model.vocab_size = tokenizer.vocab_size  # rows beyond it stand for nothing and are never sampled or scored
    return model, tokenizer


class Clock:
    """Seconds of each part of a step."""

    def __init__(self):
        self.parts: dict[str, float] = {}
        self.at = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to `name`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[f"seconds_{name}"], self.at = now - self.at, now


def order(items: int, seed: int, epoch: int) -> list[int]:
    """A random order of range(items), a function of (seed, epoch) alone: what --resume relies on."""
    return torch.randperm(items, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


class Stop:
    """SIGTERM or SIGINT asks a training run to end its step, save and exit. Alone, a second one ends it at once."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.signalled = ranks, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.signalled = True
        if self.ranks.size == 1:  # torchrun hands on one Ctrl-C several times
            signal.signal(number, signal.SIG_DFL)

    def asked(self) -> bool:
        """Has this rank been asked to stop?"""
        return self.signalled

    def agreed(self) -> bool:
        """Has any rank? All ranks call this at the same place, and hear the same."""
        return self.ranks.sum([float(self.signalled)])[0] > 0


class Watchdog:
    """Says on stderr that a step is taking much longer than those before it, while it does."""

    def __init__(self, factor: float = 10.0):
        self.factor, self.seconds, self.timer = factor, [], None

    def begin(self, step: int) -> None:
        """A step starts."""
        self.start = time.perf_counter()
        if len(self.seconds) >= 5:  # enough for a median to mean something
            usual = statistics.median(self.seconds)
            line = f"watchdog: step {step} takes more than {self.factor:g} times the median of {usual:.3g} s"
            self.timer = threading.Timer(self.factor * usual, print, [line], {"file": sys.stderr, "flush": True})
            self.timer.daemon = True
            self.timer.start()

    def end(self) -> None:
        """It is over."""
        self.seconds.append(time.perf_counter() - self.start)
        if self.timer:
            self.timer.cancel()


def optimizer_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    run: Run,
    *,
    step: int,
    lr: float,
    clip: float,
    loss: float,
    what: str,
    batch: list,
) -> float:
    """Clip the gradient to norm `clip`, take one step at `lr`, zero the gradient; the norm before clipping.

    Raises ValueError, on all ranks, when the loss of any rank or the gradient is not finite; the weights are then
    untouched, and the message says `what` the batch was and where the micro-batches in `batch` are saved.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # over the parameters of all ranks
    (loss,) = run.ranks.sum([loss])
    if not math.isfinite(norm) or not math.isfinite(loss):
        raise ValueError(
            f"step {step}, {what}: the loss is {loss}, the gradient's norm is {norm}; {run.keep_batch(step, batch)}, "
            "the last checkpoint is kept. A lower --lr may help"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    if run.offload:
        _step_offloaded(optimizer)
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _step_offloaded(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step, its state kept in CPU memory and brought to the parameters' device for one at a time."""
    pairs = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    for p, gradient in pairs:  # the optimizer passes over parameters without gradient
        p.grad = gradient
        move(optimizer.state[p], p.device)
        optimizer.step()
        move(optimizer.state[p], "cpu")
        p.grad = None
