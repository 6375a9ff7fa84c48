"""A soak: hundreds of RL steps of two processes on a random model; what they hold at step 50 is what they hold at the end.

    python tests/soak.py                 300 steps: a few minutes on two cores

Exits with status 1 if the resident memory of a process grows by 2 % or more, if it has more files open, or if a row of
the log is missing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tiny_model import problem_file, tiny_model  # noqa: E402

SETTINGS = {"problems": 4, "rollouts": 4, "updates": 2, "max_new_tokens": 60, "lr": 1e-3, "save_every": 10, "show_every": 0,
            "eval_every": 25, "level": "process"}


def holds(pid: int) -> tuple[int, int]:
    """Resident memory in KB and the number of open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]), len(list(Path(f"/proc/{pid}/fd").iterdir()))


def watch(launched: subprocess.Popen, log: Path) -> dict[int, dict[int, list[tuple[int, int]]]]:
    """Step -> process -> what it held while that was the newest step, until the run is over."""
    seen: dict[int, dict[int, list[tuple[int, int]]]] = {}
    while launched.poll() is None:
        time.sleep(0.02)
        step = log.read_text().count("\n") if log.exists() else 0
        try:
            for pid in map(int, Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()):
                if step and "train_rl" in Path(f"/proc/{pid}/cmdline").read_text():
                    seen.setdefault(step, {}).setdefault(pid, []).append(holds(pid))
        except (OSError, ValueError):  # it ended meanwhile
            pass
    return seen


def main(steps: int) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model(folder / "model")
        problem_file(folder / "problems.jsonl")
        settings = SETTINGS | {"model": folder / "model", "data": folder / "problems.jsonl", "out": folder / "out",
                               "eval_data": folder / "problems.jsonl", "steps": steps}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        log = folder / "out" / "log.jsonl"
        start = time.perf_counter()
        with (folder / "output").open("w") as output:
            launched = subprocess.Popen([*launch, str(ROOT / "train_rl.py"), *flags], stdout=output, stderr=output)
            seen = watch(launched, log)
        if launched.returncode:
            print((folder / "output").read_text()[-3000:])
            return 1
        rows = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        good = rows == list(range(1, steps + 1))
        print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s, complete: {good}")
        for pid in sorted({pid for held in seen.values() for pid in held}):
            (memory, files), (memory_then, files_then) = (
                (statistics.median(m for m, _ in held), min(f for _, f in held))  # a row or a checkpoint is being written
                for held in ([x for step in span for x in seen.get(step, {}).get(pid, [])]
                             for span in (range(50, 61), range(steps - 10, steps)))
            )
            growth = memory_then / memory - 1
            good &= growth < 0.02 and files_then <= files
            print(f"process {pid}: resident {memory / 1024:.1f} MB after step 50, {memory_then / 1024:.1f} MB at the end, "
                  f"{growth:+.2%}; open files {files}, then {files_then}")
        return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="[%(default)s]")
    sys.exit(main(parser.parse_args().steps))
