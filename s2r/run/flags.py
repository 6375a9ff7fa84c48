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


def from_command_line(config: type, argv: list[str] | None = None):
    """The flat dataclass `config` from the command line: a flag per field, its help the comment beside the field.

    Exits with usage and status 2 for an unknown flag, a value of the wrong type, or a missing required flag.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.MULTILINE))
    doc, layout = sys.modules[config.__module__].__doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=layout, allow_abbrev=False)
    types, required = typing.get_type_hints(config), {}  # name → flag
    for field in dataclasses.fields(config):
        name, kind, parts = field.name, types[field.name], typing.get_args(types[field.name])
        flag, default, shown = "--" + name.replace("_", "-"), field.default, f"[{field.default}]"
        if kind == list[str]:
            flag, options = name, {"nargs": "*"}
        elif kind is bool:
            options = {"action": "store_true"}
        elif typing.get_origin(kind) is typing.Literal:
            options = {"choices": parts}
        elif typing.get_origin(kind) is tuple:
            options = {"nargs": len(parts), "type": parts[0]}
        else:
            options = {"type": kind, "metavar": kind.__name__.upper()}
        if default is dataclasses.MISSING:
            required[name], default, shown = flag, None, "(required)"
        help = f"{comments[name]} {shown}".replace("%", "%%")
        parser.add_argument(flag, default=default, help=help, **options)
    values = vars(parser.parse_args(argv))
    if missing := [flag for name, flag in required.items() if not values[name]]:
        parser.error(f"missing: {', '.join(missing)} (--help explains them); {TOY}")
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check(cfg, *positive: str) -> None:
    """Raises ValueError for a number of `cfg` that is negative or not finite, or 0 although named in `positive`."""
    for name, value in vars(cfg).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, str) or 0 < number < math.inf or (number == 0 and name not in positive):
                continue
            wanted = "above 0" if name in positive else "0 or more"
            raise ValueError(f"--{name.replace('_', '-')} {number}: give a finite number, {wanted}")


def start(main: Callable, config: type) -> None:
    """Run `main` on its flags. An error about the user's input is printed as one line, without a traceback, status 2.

    Such an error is a ValueError raised in this repository, an OSError from anywhere, which names the file, or a
    package that is not installed. Out of memory is one line too, with the flags that reduce memory.
    """
    status = 0
    try:
        main(from_command_line(config))
    except SystemExit as ended:  # a run that a signal stopped, --help, a wrong flag
        status = ended.code
    except (ValueError, OSError, ModuleNotFoundError) as error:
        file = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        ours = file.parent == ROOT or any(file.is_relative_to(ROOT / room) for room in ("s2r", "kernels"))
        if isinstance(error, ValueError) and not ours:
            raise
        hint = f"; pip install {error.name.partition('.')[0]}" if isinstance(error, ModuleNotFoundError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in said:
            raise
        sizes = ("tokens_per_microbatch", "slots", "batch")
        less = [f"a lower --{n.replace('_', '-')}" for n in sizes if hasattr(config, n)]
        less += [f"--{n}" for n in ("checkpointing", "lora", "offload") if hasattr(config, n)]
        print(f"error: out of memory ({said}); what takes less: {', '.join(less)}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.barrier()  # the first rank may still be writing
        dist.destroy_process_group()
        # FSDP keeps the threads of gloo alive, and one that lets go of a tensor while Python shuts down aborts the
        # process (github.com/pytorch/pytorch/pull/179291). All is written: leave without shutting down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)
