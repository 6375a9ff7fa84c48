"""Stages: commands that make files and run folders from one another. What is made is not made again.

A run folder may be half trained. It counts as made once something that needs it exists, because that is begun only
after the folder's command has ended. Until then the command runs again; it has --resume, so a finished run is quick.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    makes: str  # file or run folder
    command: tuple[str, ...]  # arguments after `python`
    needs: tuple[str, ...]  # outputs of other stages; what no stage makes is taken to be there

    def run(self) -> None:
        """Run the command on one thread and print its lines after its name. Raises ValueError when it fails."""
        print("\n$ python", *self.command, flush=True)
        start = time.perf_counter()
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        options["env"] = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "10"}
        with subprocess.Popen([sys.executable, *self.command], **options) as process:
            for line in filter(str.strip, process.stdout):
                print(f"{Path(self.makes).name:>15} │ {line}", end="", flush=True)
        if process.returncode or not Path(self.makes).exists():
            raise ValueError(f"the stage that makes {self.makes} failed (its last lines are above)")
        print(f"{self.makes}: {time.perf_counter() - start:.0f} s", flush=True)


def make(stages: list[Stage], at_once: int = os.cpu_count()) -> None:
    """Run the stages that are not made, each after those it needs, `at_once` together.

    Raises ValueError when a stage fails: those that are running are awaited, the others are not begun.
    """
    there = [stage for stage in stages if Path(stage.makes).exists()]
    made = [s for s in there if Path(s.makes).is_file() or any(s.makes in user.needs for user in there)]
    left, running = [stage for stage in stages if stage not in made], {}
    with ThreadPoolExecutor(at_once) as pool:
        while left:
            pending = {stage.makes for stage in left}
            ready = [s for s in left if s not in running.values() and pending.isdisjoint(s.needs)]
            running |= {pool.submit(stage.run): stage for stage in ready[: at_once - len(running)]}
            assert running, f"stages that need each other: {left}"
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                left.remove(running.pop(done))
                done.result()
