"""The run folder of a training script: its settings, its log, its checkpoints, and how it goes on after a stop.

    OUT/run.json        the settings, and the SHA-256 of the data
    OUT/log.jsonl       one row per step
    OUT/step-40/        a checkpoint: a Hugging Face folder with state.pt, which is what --resume needs: fp32 weights,
    OUT/step-60/        optimizer, step; the last --keep of them are kept
    OUT/config.json …   the model of the newest one, by hard links to its files: OUT too is a Hugging Face folder

A checkpoint is written under a temporary name, forced onto the disk, then renamed: whenever the process dies, every
step-N is whole. No random state and no position in the data is saved, because the order of the data and every random
stream are functions of (seed, step). Called by the training scripts, by way of `s2r/runtime.py`.
"""

import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
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
from s2r.run.ranks import Ranks

STATE = "state.pt"
# What of the base folder goes along with the weights.
TOKENIZER = re.compile(r"(tokenizer.*|vocab.*|merges\.txt|chat_template.*|generation_config\.json|special_tokens.*)$")
# What a resumed run may change: length, memory, place and printing, none of which changes what a step learns.
FREE = {"steps", "save_every", "keep", "show_every", "eval_data", "eval_every"}
FREE |= {"tokens_per_microbatch", "slots", "checkpointing", "offload", "device"}


class Run:
    """A run folder, from its settings to its last checkpoint. Only the first rank writes."""

    def __init__(self, cfg, ranks: Ranks, data: str):
        """Make `cfg.out`, or take up the run in it with `cfg.resume`; `data` is the file that is learnt from.

        Raises FileExistsError when it holds a run already, FileNotFoundError when there is none to resume, and
        ValueError when the run to resume had other settings or other data.
        """
        self.folder, self.base, self.ranks, self.first = Path(cfg.out), Path(cfg.model), ranks, ranks.rank == 0
        self.keep, self.offload = cfg.keep, cfg.offload
        self.saved = 0  # step of the newest checkpoint
        if not self.first:
            return
        settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k != "resume"}
        settings["data_sha256"] = hashlib.sha256(Path(data).read_bytes()).hexdigest()
        file, model = self.folder / "run.json", self.folder / "config.json"
        if cfg.resume:
            # Without a checkpoint a run starts anew, unless it has a model, whose checkpoints then were taken away.
            if not file.is_file() or (model.exists() and not self._checkpoints()):
                raise FileNotFoundError(f"{self.folder}: nothing to resume here; start without --resume")
            self._compare(json.loads(file.read_text()), settings, data)
        elif file.exists():
            raise FileExistsError(f"{self.folder} holds a run already; take another --out, or --resume this one")
        elif model.exists():
            raise FileExistsError(f"{self.folder} holds a model, which the run would write over; take another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(file, json.dumps(settings, indent=2) + "\n")

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
        """One step: a row of log.jsonl and a line on the screen. Raises OSError when the row cannot be written."""
        if not self.first:
            return
        file = self.folder / "log.jsonl"
        try:
            with file.open("a") as rows:
                rows.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(f"{file}: could not add step {row['step']} ({error}); the last checkpoint is kept") from error
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

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
        kept = [n for n in steps if n <= step][-self.keep :]  # those after it were passed over when the run was resumed
        for n in set(steps) - set(kept):
            shutil.rmtree(self.folder / f"step-{n}", ignore_errors=True)

    def stop(self, model: Transformer, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Checkpoint after `step` steps because a signal asked to stop, and say so."""
        if step:
            self.save(model, optimizer, step)
        if self.first:
            print(f"stopped by a signal; {step} steps are done, --resume goes on from there", flush=True)

    def restore(self, model: Transformer, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint that can be read, cut the log to its step, and return the number of steps done.

        Each that cannot be read is named in a warning. Raises ValueError when there are some and none can be read.
        """
        state = self._newest() if self.first else {}
        (step,) = self.ranks.gather([state["step"]] if self.first else [])
        self.saved = step
        if step:
            alone = self.ranks.size == 1
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=not alone)
            if self.offload and alone:
                model.to("cpu")  # or the optimizer state would pass through the GPU, all of it at once
            set_model_state_dict(model, state.get("model", {}), options=options)
            set_optimizer_state_dict(model, optimizer, state.get("optimizer", {}), options=options)
            if self.offload:
                model.to(self.ranks.device)
                for moments in optimizer.state.values():
                    move(moments, "cpu")
        log = self.folder / "log.jsonl"
        if self.first:
            rows = log.read_text().splitlines(keepends=True) if log.exists() else []
            _write(log, "".join(rows[:step]))  # a row per step; the last one may be torn
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
            link = self.folder / (file.name + ".partial")
            try:
                link.unlink(missing_ok=True)
                try:
                    os.link(file, link)
                except OSError:  # not every file system has hard links
                    shutil.copyfile(file, link)
                    _sync(link)
                os.replace(link, self.folder / file.name)
            finally:
                link.unlink(missing_ok=True)  # to rename onto a link to the same file does nothing
        _sync(self.folder)


def move(state: dict, device: str | torch.device) -> None:
    """Move the tensors of one parameter's optimizer state."""
    state.update({name: x.to(device) for name, x in state.items() if isinstance(x, torch.Tensor)})


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
