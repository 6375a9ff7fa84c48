"""Command lines: a flat dataclass becomes flags, and what a user got wrong becomes one line and exit status 2.

    @dataclass(frozen=True)
    class Config:
        model: str  # Hugging Face folder                        --model, required
        paths: list[str]  # files to read                        every argument without a flag
        keep: tuple[float, float] = (0.1, 0.7)  # two numbers    --keep 0.1 0.7
        level: Literal["a", "b"] = "a"  # one of these           --level a
        resume: bool = False  # continue                         --resume

Called by every script and every `python -m s2r.*` command.
"""

import argparse
import dataclasses
import inspect
import math
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
TOY = "to see the whole method on a toy problem, run: python -m s2r.toy"


def parse(config: type, argv: list[str] | None = None):
    """The flat dataclass `config` from the command line: a flag per field, its help the comment beside the field.

    Exits with usage and status 2 for an unknown flag, a value of the wrong type, or a missing required flag.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.MULTILINE))
    doc = sys.modules[config.__module__].__doc__
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    types, required = typing.get_type_hints(config), []
    for field in dataclasses.fields(config):
        flag, kind = "--" + field.name.replace("_", "-"), types[field.name]
        default, shown = field.default, f" [{field.default}]"
        if default is dataclasses.MISSING:
            default, shown = None, " (required)"
            required.append(field.name)
        help = f"{comments[field.name]}{shown}".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=help)
        elif kind == list[str]:
            parser.add_argument(field.name, nargs="*", help=comments[field.name])
        elif typing.get_origin(kind) is typing.Literal:
            parser.add_argument(flag, choices=typing.get_args(kind), default=default, help=help)
        elif typing.get_origin(kind) is tuple:
            parts = typing.get_args(kind)
            parser.add_argument(flag, nargs=len(parts), type=parts[0], default=default, help=help)
        else:
            parser.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=help)
    values = vars(parser.parse_args(argv))
    if missing := [name for name in required if not values[name]]:
        wanted = (name if types[name] == list[str] else "--" + name.replace("_", "-") for name in missing)
        parser.error(f"missing: {', '.join(wanted)} (--help explains them); {TOY}")
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check(cfg, *positive: str) -> None:
    """Raises ValueError for the first number of `cfg` that is negative or not finite, or not above 0 if in `positive`."""
    for name, value in vars(cfg).items():
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float):
                continue
            if not (math.isfinite(number) and number >= 0) or (name in positive and number == 0):
                wanted = "above 0" if name in positive else "0 or more"
                raise ValueError(f"--{name.replace('_', '-')} {number}: give a finite number, {wanted}")


def start(main: Callable, config: type) -> None:
    """Run `main` on its flags. An error about the user's input is printed as one line, without a traceback, status 2.

    Such an error is a ValueError raised in this repository, or an OSError from anywhere, which names the file. A
    ValueError out of a library keeps its traceback. Out of memory is one line too, with the flags that take less.
    """
    try:
        main(parse(config))
    except (ValueError, OSError) as error:
        file = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = file.parent == ROOT or any(file.is_relative_to(ROOT / room) for room in ("s2r", "kernels"))
        if isinstance(error, ValueError) and not ours:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in said:
            raise
        flags = {field.name for field in dataclasses.fields(config)}
        less = [f"a lower --{name.replace('_', '-')}" for name in ("tokens_per_microbatch", "slots") if name in flags]
        more = [f"--{name}" for name in ("checkpointing", "offload") if name in flags]
        print(f"error: out of memory ({said}); what takes less: {', '.join(less + more)}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.barrier()  # the first rank may still be writing
        dist.destroy_process_group()
        # FSDP keeps the threads of gloo alive, and one that lets go of a tensor while Python shuts down aborts the
        # process (github.com/pytorch/pytorch/pull/179291). All is written: leave without shutting down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
