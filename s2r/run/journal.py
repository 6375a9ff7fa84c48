"""The rollouts of a run of sample.py as they end, so that a run that was killed can continue.

    OUT.begun     first line: the run's settings; then one line per finished rollout
    OUT           the rollout file, written at the end, when OUT.begun is deleted
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from s2r.data import Problem, check_output, drop_torn_line, read_jsonl
from s2r.generate import Rollout
from s2r.run.ranks import Ranks


class Journal:
    """`known`: the rollouts of the run that was killed; `add`: write one more. Without --out it does nothing."""

    def __init__(self, cfg, problems: Sequence[Problem], ranks: Ranks, dtype) -> None:
        """All ranks add to the same file. Opens `cfg.out`.begun. Raises ValueError when it belongs to another model, data set or setting."""
        self.path, self.known = Path(f"{cfg.out}.begun") if cfg.out else None, []
        if not cfg.out:
            return
        check_output(self.path)
        self.settings = {name: getattr(cfg, name) for name in ("n", "temperature", "max_new_tokens", "seed")}
        changed = max(file.stat().st_mtime for file in Path(cfg.model).glob("*.safetensors"))
        self.settings["model"] = f"{cfg.model}, weights of {changed}"
        self.settings["data"] = f"{cfg.data or cfg.ask}, checksum {zlib.crc32(repr(problems).encode()):08x}"
        self.settings["dtype"] = str(dtype)
        if not ranks.rank and not (self.path.exists() and drop_torn_line(self.path)):
            self.path.write_text(json.dumps(self.settings) + "\n")
        ranks.sum([0.0])  # the others wait for the first
        if self.path.exists():
            begun, *rows = read_jsonl(self.path)
            for name, value in self.settings.items():
                if begun.get(name) != value:
                    was = f"rollouts of a run that was cut short, with --{name.replace('_', '-')} {begun.get(name)}"
                    raise ValueError(f"{self.path} holds {was}; give the same flags to continue it, or delete it")
            self.known = [Rollout(**row) for row in rows]
            if rows and not ranks.rank:
                print(f"continuing a run that was cut short: {len(self.known):,} rollouts are there")

    def add(self, rollout: Rollout) -> None:
        """Write a rollout that has ended."""
        if self.path:
            with self.path.open("ab", buffering=0) as file:  # one write for a line, so that ranks do not mix theirs
                file.write((json.dumps(asdict(rollout)) + "\n").encode())

    def remove(self) -> None:
        """Delete the file, once the rollout file is written."""
        self.path.unlink(missing_ok=True)
