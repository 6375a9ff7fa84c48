"""The run folder of a training script: its settings, its logs, its checkpoints, and how it resumes after a stop.

    OUT/run.json        the settings, the SHA-256 of the data, the command, the commit and the version of torch
    OUT/log.jsonl       one row per step
    OUT/eval.jsonl      one row per evaluation
    OUT/step-40/        a checkpoint: a Hugging Face folder with state.pt, which is what --resume needs: fp32 weights,
    OUT/step-60/        optimizer, step; the last --keep of them are kept
    OUT/config.json …   the model of the newest one, by hard links to its files: OUT too is a Hugging Face folder

A checkpoint is written under a temporary name, forced onto the disk, then renamed: whenever the process dies, every
step-N is whole. No random state and no position in the data is saved, because the order of the data and every random
stream are functions of (seed, step).
"""

import dataclasses
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from s2r.model import Transformer
from s2r.run.flags import ROOT
from s2r.run.ranks import Ranks

STATE = "state.pt"
# What of the base folder goes along with the weights.
TOKENIZER = re.compile(r"(tokenizer.*|vocab.*|merges\.txt|chat_template.*|generation_config\.json|special_tokens.*)$")
# What a resumed run may change: length, memory, place and printing, none of which changes what a step learns.
FREE = {"steps", "save_every", "keep", "show_every", "eval_data", "eval_every", "tensorboard"}
FREE |= {"tokens_per_microbatch", "slots", "checkpointing", "offload", "device", "command", "commit", "torch"}


class Run:
    """A run folder, from its settings to its last checkpoint. Only the first rank writes."""

    def __init__(self, cfg, ranks: Ranks, *, data: str, steps: int):
        """Make `cfg.out`, or take up the run in it with `cfg.resume`; `data` is the file that is learnt from.

        Raises FileExistsError when it holds a run already, and ValueError when the run to resume had other settings or
        other data, or has lost its checkpoints.
        """
        self.folder, self.base, self.ranks, self.first = Path(cfg.out), Path(cfg.model), ranks, ranks.rank == 0
        self.cfg, self.steps = cfg, steps
        self.saved = 0  # step of the newest checkpoint
        self.pace = None  # (time, step) at the first log row of this process
        self.writer = None
        if not self.first:
            return
        settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k != "resume"}
        settings["data_sha256"] = hashlib.sha256(Path(data).read_bytes()).hexdigest()
        file, model = self.folder / "run.json", self.folder / "config.json"
        if file.exists() and not cfg.resume:
            raise FileExistsError(f"{self.folder} holds a run already; take another --out, or --resume this one")
        if file.exists():
            self._compare(json.loads(file.read_text()), settings, data)
        if model.exists() and not self._checkpoints():
            what = "a run whose checkpoints are gone" if file.exists() else "a model, which the run would write over"
            raise FileExistsError(f"{self.folder} holds {what}; take another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        settings |= {"command": shlex.join(sys.argv), "commit": _commit(), "torch": torch.__version__}
        _write(file, json.dumps(settings, indent=2) + "\n")
        if cfg.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
            self.writer = SummaryWriter(self.folder)

    def _compare(self, before: dict, now: dict, data: str) -> None:
        """Raises ValueError for the first setting that is not what it was and should be."""
        for name, value in before.items():
            if name in FREE or now.get(name) == value:
                continue
            if name == "data_sha256":
                raise ValueError(f"{data} is not what {self.folder} learnt from; give that file, or take another --out")
            raise ValueError(
                f"{self.folder / 'run.json'}: --{name.replace('_', '-')} was {value!r}, now {now.get(name)!r}; "
                "resume with the same settings or take another --out"
            )

    def log(self, row: dict) -> None:
        """One step: a row of log.jsonl and a line on the screen, with an estimate of the time left."""
        if not self.first:
            return
        self._append("log.jsonl", row)
        step, now = row["step"], time.time()
        self.pace = self.pace or (now, step)
        left = "?"
        if step > self.pace[1]:
            seconds = (self.steps - step) * (now - self.pace[0]) / (step - self.pace[1])
            left = f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.0f} min"
        numbers = {name: value for name, value in row.items() if name != "step"}
        print(f"step {step}/{self.steps}, {left} left  {_line(numbers)}", flush=True)

    def evaluated(self, step: int, metrics: dict) -> None:
        """One evaluation after `step` steps: a row of eval.jsonl and a line on the screen."""
        if self.first:
            self._append("eval.jsonl", {"step": step} | metrics)
            print(f"evaluation after step {step}  {_line(metrics)}", flush=True)

    def _append(self, name: str, row: dict) -> None:
        """Add a row to a log. Raises OSError when it cannot be written."""
        file = self.folder / name
        try:
            with file.open("a") as rows:
                rows.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(f"{file}: could not add step {row['step']} ({error}); the last checkpoint is kept") from error
        if self.writer:
            for key, value in row.items():
                if isinstance(value, int | float):
                    self.writer.add_scalar(f"{file.stem}/{key}", value, row["step"])

    def end_step(self, model: Transformer, optimizer: torch.optim.Optimizer, step: int, stop) -> bool:
        """Save if it is time to; whether the run has been asked to stop, which saves too."""
        if step % self.cfg.save_every == 0 or step == self.steps:
            self.save(model, optimizer, step)
        if stopped := stop.agreed():
            self.stop(model, optimizer, step)
        return stopped

    def save(self, model: Transformer, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Checkpoint after `step` steps. Raises OSError when it cannot be written; the one before is then untouched."""
        if step == self.saved:
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # as of one process, whatever their number
        state = {  # all ranks take part in gathering it; the first has it whole
            "step": step,
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
        if self.first:
            self._write_checkpoint(model, state, step)
        self.saved = step

    def _write_checkpoint(self, model: Transformer, state: dict, step: int) -> None:
        """step-N as a whole or not at all, then the links to it, then away with those that are too old."""
        if any(isinstance(p, DTensor) for p in model.parameters()):
            whole = Transformer(model.config, model.dtype)
            whole.load_state_dict(state["model"])
            model = whole
        scratch, checkpoint, log = (self.folder / name for name in ("saving.tmp", f"step-{step}", "log.jsonl"))
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            model.save_pretrained(scratch)
            for file in filter(lambda file: TOKENIZER.match(file.name), self.base.iterdir()):
                shutil.copyfile(file, scratch / file.name)
            torch.save(state, scratch / STATE)
            for path in (*scratch.iterdir(), scratch, *([log] if log.exists() else [])):
                _sync(path)
            shutil.rmtree(checkpoint, ignore_errors=True)  # there is one if it could not be read
            os.rename(scratch, checkpoint)
            self._publish(checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors on a full disk
            shutil.rmtree(scratch, ignore_errors=True)
            raise OSError(
                f"{self.folder}: could not save step {step} ({error}); the checkpoint before it is whole"
            ) from error
        steps = self._checkpoints()
        kept = [n for n in steps if n <= step][-self.cfg.keep :]  # later ones were unreadable on resume
        for n in set(steps) - set(kept):
            shutil.rmtree(self.folder / f"step-{n}", ignore_errors=True)

    def stop(self, model: Transformer, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Checkpoint after `step` steps because a signal asked to stop, and say so."""
        if step:
            self.save(model, optimizer, step)
        if self.first:
            print(f"stopped by a signal; {step} steps are done, --resume continues from there", flush=True)

    def restore(self, model: Transformer, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint that can be read, cut the logs to its step, and return the number of steps done.

        Without --resume, or without a checkpoint, that is 0. Each checkpoint that cannot be read is named in a warning.
        Raises ValueError when there are some and none can be read.
        """
        state = self._newest() if self.first and self.cfg.resume else {"step": 0}
        (step,) = self.ranks.gather([state["step"]] if self.first else [])
        self.saved = step
        if step:
            alone = self.ranks.size == 1
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=not alone)
            if self.cfg.offload and alone:
                model.to("cpu")  # or the optimizer state would pass through the GPU, all of it at once
            set_model_state_dict(model, state.get("model", {}), options=options)
            set_optimizer_state_dict(model, optimizer, state.get("optimizer", {}), options=options)
            if self.cfg.offload:
                model.to(self.ranks.device)
                for moments in optimizer.state.values():
                    move(moments, "cpu")
        if self.first:
            for log in filter(Path.exists, (self.folder / "log.jsonl", self.folder / "eval.jsonl")):
                lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]  # none torn
                _write(log, "".join(line for line in lines if step and json.loads(line)["step"] <= step))
            if step >= self.steps:
                print(f"{self.folder}: {step} steps are done, the settings ask for {self.steps}; nothing to do")
        return step

    def keep_batch(self, step: int, batch: list) -> str:
        """Save this rank's part of a step, dataclasses of tensors, for inspection; says where, as a clause."""
        file = self.folder / f"batch-step-{step}-rank-{self.ranks.rank}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # on a machine that the first rank is not on
            torch.save([dataclasses.asdict(part) for part in batch], file)
        except (OSError, RuntimeError) as error:
            return f"the batch could not be saved ({error})"
        return f"the batch is saved in {file}"

    def _checkpoints(self) -> list[int]:
        """The steps that there are checkpoints of, rising."""
        found = (re.fullmatch(r"step-(\d+)", file.name) for file in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def _newest(self) -> dict:
        """The state of the newest checkpoint that can be read; that of step 0 when there is no checkpoint at all."""
        steps = self._checkpoints()
        for n in reversed(steps):
            checkpoint = self.folder / f"step-{n}"
            try:
                for weights in checkpoint.glob("*.safetensors"):
                    with safe_open(weights, framework="pt"):
                        pass  # its length is checked
                state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
                why = str(error).partition("\n")[0]
                print(f"warning: {checkpoint} cannot be read ({why}); trying the one before it", file=sys.stderr)
                continue
            self._publish(checkpoint)  # the process may have died before it came to that
            return state
        if steps:
            raise ValueError(f"{self.folder}: none of its {len(steps)} checkpoints can be read; take another --out")
        return {"step": 0}

    def _publish(self, checkpoint: Path) -> None:
        """Make the run folder itself a Hugging Face folder with the model of this checkpoint."""
        for file in checkpoint.iterdir():
            if file.name == STATE:
                continue
            link = self.folder / f"{file.name}.partial"
            link.unlink(missing_ok=True)
            try:
                os.link(file, link)
            except OSError:  # not every file system has hard links
                shutil.copyfile(file, link)
                _sync(link)
            os.replace(link, self.folder / file.name)
            link.unlink(missing_ok=True)  # renaming onto a link to the same file does nothing
        _sync(self.folder)


def move(state: dict, device: str | torch.device) -> None:
    """Move the tensors of one parameter's optimizer state."""
    state.update({name: x.to(device) for name, x in state.items() if isinstance(x, torch.Tensor)})


def _line(numbers: dict) -> str:
    """Names and numbers in one line, without tables inside tables."""
    found = {name: "–" if value is None else value for name, value in numbers.items() if not isinstance(value, dict)}
    return "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items())


def _commit() -> str:
    """The commit of this code, "unknown" outside of a git checkout."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _write(path: Path, text: str) -> None:
    """Write a file by way of a temporary one, so that a full disk leaves the one before."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # which cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
