"""The rollouts of a run of sample.py as they end, so that a run that was killed can continue.

    OUT.begun     first line: the run's settings; then one line per finished rollout
    OUT.begun-1   lines of the second process, if there are several; OUT.begun-2, …
    OUT           the rollout file, written at the end, when the others are deleted
"""

import glob
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from s2r.data import Problem, read_jsonl
from s2r.generate import Rollout
from s2r.run.files import check_output, drop_torn_line
from s2r.run.ranks import Ranks


class Journal:
    """`known`: the rollouts of the run that was killed; `add`: write one more. Without --out it does nothing."""

    def __init__(self, cfg, problems: Sequence[Problem], ranks: Ranks, dtype) -> None:
        """Opens `cfg.out`.begun. Raises ValueError when it belongs to another model, data set or setting.

        The first rank reads what all ranks of the run before wrote, on any number of them, and tells the others.
        """
        rank = "" if ranks.first else f"-{ranks.rank}"
        self.path = Path(f"{cfg.out}.begun{rank}") if cfg.out else None
        self.known: list[Rollout] = []
        if not cfg.out:
            return
        check_output(self.path)
        self.known = ranks.gather(self._read(cfg, problems, dtype) if ranks.first else [])
        if not self.known and not ranks.first:
            self.path.unlink(missing_ok=True)  # of an older run

    def _read(self, cfg, problems: Sequence[Problem], dtype) -> list[Rollout]:
        settings = {name: getattr(cfg, name) for name in ("n", "temperature", "max_new_tokens", "seed")}
        changed = max(file.stat().st_mtime for file in Path(cfg.model).glob("*.safetensors"))
        settings["model"] = f"{cfg.model}, weights of {changed}"
        settings["data"] = f"{cfg.data or cfg.ask}, checksum {zlib.crc32(repr(problems).encode()):08x}"
        settings["dtype"] = str(dtype)
        parts = sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}-*"))
        if not (self.path.exists() and drop_torn_line(self.path)):
            for part in parts:
                part.unlink()
            self.path.write_text(json.dumps(settings) + "\n")
            return []
        begun, *rows = read_jsonl(self.path)
        for name, value in settings.items():
            if begun.get(name) != value:
                was = f"rollouts of a run that was cut short, with --{name.replace('_', '-')} {begun.get(name)}"
                raise ValueError(f"{self.path} holds {was}; give the same flags to continue it, or delete it")
        rows += [row for part in parts if drop_torn_line(part) for row in read_jsonl(part)]
        if rows:
            print(f"continuing a run that was cut short: {len(rows):,} rollouts are there")
        return [Rollout(**row) for row in rows]

    def add(self, rollout: Rollout) -> None:
        """Write a rollout that has ended."""
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(rollout)) + "\n")

    def remove(self) -> None:
        """Delete the files, once all that is made of the rollouts is written."""
        for file in (self.path, *self.path.parent.glob(f"{glob.escape(self.path.name)}-*")):
            file.unlink(missing_ok=True)
