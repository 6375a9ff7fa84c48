"""What the three scripts share around their loops: flags, device, model folder, run folder, checkpoints, errors.

A run folder is a Hugging Face model folder with three files more:

    run.json      the settings            log.jsonl    one row per step
    state.pt      everything that --resume needs: fp32 weights, optimizer, step

A checkpoint is written under temporary names and then renamed, so a crash or a full disk leaves the one before it.
"""

import argparse
import dataclasses
import inspect
import json
import os
import re
import shutil
import sys
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from s2r import toy
from s2r.model import Transformer
from s2r.parallel import Ranks
from s2r.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
STATE = "state.pt"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # as if there were one process, whatever their number


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
    """Run a script's `main` on its flags, as `command` does."""

    def run() -> None:
        main(parse(config))
        if dist.is_initialized():
            dist.barrier()  # the first rank may still be writing
            dist.destroy_process_group()

    command(run)


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


def pick(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype by name; "auto" is the GPU if there is one, and bf16 there, fp32 on a CPU.

    Raises ValueError for a device that is not here.
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
    return torch.device(device), getattr(torch, dtype)


def load(folder: str, device: torch.device, dtype: torch.dtype, train: bool = False) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a folder; to train, the weights are kept in fp32, whatever the compute dtype.

    Raises ValueError when the tokenizer has ids that the embedding does not.
    """
    toy.ensure(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Transformer.from_pretrained(folder, dtype, device, torch.float32 if train else None)
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


class Run:
    """A run folder, from its settings to its last checkpoint. Only the first rank writes."""

    def __init__(self, cfg, ranks: Ranks):
        """Make `cfg.out`, or take up the run in it with `cfg.resume`.

        Raises FileExistsError when it holds a run already, FileNotFoundError when there is none to resume, and
        ValueError when the run to resume had other settings.
        """
        self.folder, self.base, self.first = Path(cfg.out), Path(cfg.model), ranks.rank == 0
        if not self.first:
            return
        settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k != "resume"}
        file = self.folder / "run.json"
        if cfg.resume:
            if not (self.folder / STATE).is_file():
                raise FileNotFoundError(f"{self.folder}: nothing to resume here; start without --resume")
            for name, before in json.loads(file.read_text()).items():
                if name != "steps" and settings.get(name) != before:  # a run may be made longer
                    raise ValueError(
                        f"{file}: --{name.replace('_', '-')} was {before!r}, now {settings.get(name)!r}; "
                        "resume with the same settings or take another --out"
                    )
        elif file.exists():
            saved = (self.folder / STATE).is_file()
            advice = "--resume this one" if saved else "delete this one, which stopped before its first checkpoint"
            raise FileExistsError(f"{self.folder} holds a run already; take another --out, or {advice}")
        elif (self.folder / "config.json").exists():
            raise FileExistsError(f"{self.folder} holds a model, which the run would write over; take another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(file, json.dumps(settings, indent=2) + "\n")

    def log(self, row: dict) -> None:
        """One step: a row of log.jsonl and a line on the screen."""
        if not self.first:
            return
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    def save(self, model: Transformer, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Checkpoint after `step` steps. Raises OSError when it cannot be written; the one before is then untouched."""
        state = {  # all ranks take part in gathering it; the first has it whole
            "step": step,
            "model": get_model_state_dict(model, options=WHOLE),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=WHOLE),
        }
        if not self.first:
            return
        if any(isinstance(p, DTensor) for p in model.parameters()):
            whole = Transformer(model.config, model.dtype)
            whole.load_state_dict(state["model"])
            model = whole
        scratch = self.folder / "saving.tmp"
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            model.save_pretrained(scratch)
            for file in self.base.iterdir():
                if re.match(
                    r"(tokenizer.*|vocab.*|merges\.txt|chat_template.*|generation_config\.json|special_tokens.*)$",
                    file.name,
                ):
                    shutil.copyfile(file, scratch / file.name)
            torch.save(state, scratch / STATE)
            for file in sorted(scratch.iterdir(), key=lambda file: file.name == STATE):  # the state last
                os.replace(file, self.folder / file.name)
            scratch.rmdir()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors on a full disk
            shutil.rmtree(scratch, ignore_errors=True)
            raise OSError(
                f"{self.folder}: could not save step {step} ({error}); the checkpoint before it is whole"
            ) from error

    def restore(self, model: Transformer, optimizer: torch.optim.Optimizer) -> int:
        """Load state.pt into model and optimizer, cut the log to its step, and return the number of steps done."""
        state = torch.load(self.folder / STATE, map_location="cpu", weights_only=True)
        set_model_state_dict(model, state["model"], options=WHOLE)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)
        log = self.folder / "log.jsonl"
        if self.first:
            rows = log.read_text().splitlines(keepends=True) if log.exists() else []
            _write(log, "".join(rows[: state["step"]]))  # a row per step; the last one may be torn
        return state["step"]


def _write(path: Path, text: str) -> None:
    """Write a file by way of a temporary one, so that a full disk leaves the one before."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def order(items: int, seed: int, epoch: int) -> list[int]:
    """A random order of range(items), a function of (seed, epoch) alone: what --resume relies on."""
    return torch.randperm(items, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def optimizer_step(model: Transformer, optimizer: torch.optim.Optimizer, *, lr: float, clip: float, what: str) -> float:
    """Clip the gradient to norm `clip`, take one step at `lr`, zero the gradient; the norm before clipping.

    Raises ValueError, with `what` the batch was, when the gradient is not finite; the weights are then untouched.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # over the parameters of all ranks
    if not norm < float("inf"):
        raise ValueError(f"{what}: the gradient's norm is {norm}; the last checkpoint is kept. A lower --lr may help")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
