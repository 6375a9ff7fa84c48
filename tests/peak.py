"""Run a training script in this process and print by how many bytes its resident memory grew at most.

    python tests/peak.py rl '{"model": "DIR", "data": "F.jsonl", "out": "DIR2"}' [--as-is]

What torch loads when it first trains does not count: a first run, of a model of 30,000 parameters, comes before.
glibc keeps freed blocks of up to 32 MB unless MALLOC_MMAP_THRESHOLD_ is set. It is set here, so that the peak is that
of the memory in use; `--as-is` leaves glibc alone.
"""

import os
import sys

if "--as-is" not in sys.argv and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})

import json
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import s2r  # isort: skip  # noqa: F401  before torch

import tiny_model
import train_rl
import train_sft


def status(field: str) -> int:
    """A number of /proc/self/status in bytes: VmRSS is what is resident now, VmHWM the most that ever was."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def warm_up(script, folder: Path) -> None:
    model, out = tiny_model.tiny_model(folder / "model"), str(folder / "out")
    if script is train_rl:
        data = tiny_model.problem_file(folder / "problems.jsonl", 4)
        settings = {"problems": 2, "rollouts": 2, "updates": 2, "steps": 1, "max_new_tokens": 8}
    else:
        data = tiny_model.trajectory_file(folder / "trajectories.jsonl", 4)
        settings = {"epochs": 1, "batch_size": 4, "kl": 0.1}
    script.main(script.Config(model=str(model), data=str(data), out=out, **settings))


if __name__ == "__main__":
    script = {"sft": train_sft, "rl": train_rl}[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        warm_up(script, Path(folder))
    before = status("VmRSS")
    script.main(script.Config(**json.loads(sys.argv[2])))
    print(status("VmHWM") - before)
