"""The run folder of a training script: its settings, its logs, its checkpoints, and how it resumes after a stop.

    OUT/run.json        the settings, the SHA-256 of the data, when --model was written, the command, commit and torch
    OUT/log.jsonl       one row per step; OUT/eval.jsonl: one row per evaluation
    OUT/step-40/        a checkpoint: a Hugging Face folder with state.pt, which is what --resume needs: fp32 weights,
    OUT/step-60/        optimizer, step; the last --keep of them are kept
    OUT/config.json …   the model of the newest one, by hard links to its files: OUT too is a Hugging Face folder

A checkpoint is written under a temporary name, synced to the disk, then renamed: whenever the process dies, every
step-N is whole. No random state and no position in the data is saved: both are functions of (seed, step).
"""

import dataclasses
import hashlib
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed.checkpoint.state_dict as dcp
from safetensors import SafetensorError, safe_open

from s2r.hf.config import read_json
from s2r.hf.tokenizer import Tokenizer
from s2r.model import Transformer
from s2r.run.files import replacing, sync
from s2r.run.flags import ROOT
from s2r.run.ranks import Ranks

STATE = "state.pt"
# What of the base folder goes along with the weights: files whose name begins like this.
TOKENIZER = ("tokenizer", "vocab", "merges.txt", "chat_template", "generation_config.json", "special_tokens")
# What a resumed run may change: length, memory, place and printing, none of which changes what a step learns.
FREE = {"out", "epochs", "steps", "save_every", "keep", "show_every", "eval_data", "eval_every", "tensorboard"}
FREE |= {"tokens_per_microbatch", "slots", "checkpointing", "offload", "device", "command", "commit", "torch"}


class Run:
    """A run folder, from its settings to its last checkpoint. Only the first rank writes, but for `keep_batch`."""

    def __init__(self, cfg, ranks: Ranks, dtype: torch.dtype, *, data: str, steps: int):
        """Make `cfg.out`, or with `cfg.resume` continue the run in it; `data` is the file that is learnt from.

        Raises FileExistsError when the folder holds a model, a run (without --resume), or a run without its checkpoints,
        and ValueError when its checkpoints had other settings or other data, or when the ranks see different copies of
        data or model. `dtype` is what --dtype auto has become.
        """
        self.cfg, self.ranks, self.steps, self.folder = cfg, ranks, steps, Path(cfg.out)
        self.saved = 0  # step of the newest checkpoint
        self.pace = None  # (time, step) at the first log row of this process
        self.writer = None  # of --tensorboard
        copies = ranks.gather([_digests(data, cfg.model)])
        if any(copy != copies[0] for copy in copies):
            raise ValueError(f"the machines have different copies of {data} or {cfg.model}; copy one to all of them")
        if not ranks.first:
            return
        file = self.folder / "run.json"
        if file.exists() and not cfg.resume:
            raise FileExistsError(f"{self.folder} holds a run already; take another --out, or --resume this one")
        before = json.loads(file.read_text()) if file.exists() else {}
        now = {name: value for name, value in dataclasses.asdict(cfg).items() if name != "resume"}
        now["dtype"] = str(dtype).removeprefix("torch.")
        now["data_sha256"] = copies[0][0]
        now["weights_changed"] = max(file.stat().st_mtime for file in Path(cfg.model).glob("*.safetensors"))
        there = self._checkpoints()
        for name, value in before.items() if there else ():  # before the first checkpoint settings may be corrected
            if name == "data_sha256" and value != now[name]:
                raise ValueError(f"{data} is not what {self.folder} learnt from; give that or take another --out")
            if name == "weights_changed" and value != now[name]:  # they are the reference, and the base of --lora
                what = f"its weights were written at another time than those that {self.folder} began with"
                raise ValueError(f"{cfg.model}: {what}; give those or take another --out")
            if name not in FREE and value != now.get(name):
                what = f"--{name.replace('_', '-')} was {value!r}, now {now.get(name)!r}"
                raise ValueError(f"{file}: {what}; resume with the same settings or take another --out")
        if (there or (self.folder / "config.json").exists()) and not (there and before):
            what = "a run whose checkpoints are gone" if before else "a model, which the run would write over"
            raise FileExistsError(f"{self.folder} holds {what}; take another --out")
        if max(there, default=0) >= steps:
            return  # nothing to do; run.json still says what made the run
        status, commit = subprocess.getstatusoutput(f"git -C {shlex.quote(str(ROOT))} rev-parse HEAD")
        now |= {"command": shlex.join(sys.argv), "commit": "unknown" if status else commit, "torch": torch.__version__}
        if cfg.tensorboard:
            import_module("torch.utils.tensorboard")  # if it is not installed, nothing is written
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            partial.write_text(json.dumps(now, indent=2) + "\n")

    def log(self, row: dict) -> None:
        """One step: a row of log.jsonl and a line on the screen, with an estimate of the time left."""
        step, now = row["step"], time.time()
        self.pace = self.pace or (now, step)
        left = "?"
        if step > self.pace[1]:
            seconds = (self.steps - step) * (now - self.pace[0]) / (step - self.pace[1])
            left = f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.0f} min"
        self.add("log.jsonl", row, f"step {step}/{self.steps}, {left} left")

    def evaluated(self, step: int) -> bool:
        """Whether eval.jsonl has a row of this step and --eval-data. All ranks call this together, and hear the same."""
        file, found = self.folder / "eval.jsonl", False
        if self.ranks.first and file.exists():
            rows = map(json.loads, file.read_text().splitlines())
            found = any((row["step"], row.get("data")) == (step, self.cfg.eval_data) for row in rows)
        return self.ranks.sum([found])[0] > 0

    def add(self, name: str, row: dict, title: str) -> None:
        """Add a row to a log and print it after `title`. Raises OSError when it cannot be written."""
        if not self.ranks.first:
            return
        file, step, words = self.folder / name, row["step"], [title]
        try:
            with file.open("a") as rows:
                rows.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(f"{file}: could not add step {step} ({error}); the last checkpoint is kept") from error
        for key, value in row.items():
            if self.writer and isinstance(value, int | float):
                self.writer.add_scalar(f"{file.stem}/{key}", value, step)
            if key != "step" and not isinstance(value, dict):
                shown = f"{value:.4g}" if isinstance(value, float) else value
                words.append(f"{key} {'–' if value is None else shown}")
        if self.writer:
            self.writer.flush()
        print("  ".join(words), flush=True)

    def end_step(self, model: Transformer, optimizer: torch.optim.Optimizer, step: int, stop) -> None:
        """Save if it is time to. If a signal asks to stop, save in any case and exit with status 1."""
        asked = stop.agreed()
        if asked or step % self.cfg.save_every == 0 or step == self.steps:
            self.save(model, optimizer, step)
        if asked:
            if self.ranks.first:
                print(f"stopped by a signal; {step} steps are done, --resume continues from there", flush=True)
            sys.exit(1)  # not 0: the next command of a script would take the run for complete

    def save(self, model: Transformer, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Checkpoint after `step` steps. Raises OSError when it cannot be written; the one before is untouched."""
        if step == self.saved:
            return
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights, moments = dcp.get_state_dict(model, optimizer, options=options)  # gathered: all ranks take part
        if self.ranks.first:
            self._write_checkpoint(model, {"step": step, "model": weights, "optimizer": moments})
        self.ranks.sum([0.0])  # all wait here, in the group that waits for hours, and not in one of FSDP's, for minutes
        self.saved = step

    def _write_checkpoint(self, model: Transformer, state: dict) -> None:
        """step-N as a whole or not at all, then the links to it; then the oldest are deleted."""
        step = state["step"]
        if self.ranks.size > 1:
            if self.cfg.lora:  # the checkpoint has the adapters alone
                whole = Transformer.from_pretrained(self.cfg.model, model.dtype)
                whole.add_lora(self.cfg.lora, self.cfg.lora_alpha)
            else:
                whole = Transformer(model.config, model.dtype)
            whole.load_state_dict(state["model"], strict=not self.cfg.lora)
            model = whole
        scratch, checkpoint = self.folder / "saving.tmp", self.folder / f"step-{step}"
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            model.save_pretrained(scratch)
            for file in Path(self.cfg.model).iterdir():
                if file.name.startswith(TOKENIZER):
                    shutil.copyfile(file, scratch / file.name)
            generation = scratch / "generation_config.json"  # where `transformers` and vLLM look up what ends a response
            settings = read_json(generation) if generation.exists() else {}
            stops = sorted(Tokenizer.from_pretrained(scratch).stop_ids)  # base models do not list the end of turn
            generation.write_text(json.dumps(settings | {"eos_token_id": stops}, indent=2) + "\n")
            torch.save(state, scratch / STATE)
            for path in (*scratch.rglob("*"), scratch, *self.folder.glob("*.jsonl")):
                sync(path)
            shutil.rmtree(checkpoint, ignore_errors=True)  # there is one if it could not be read
            os.rename(scratch, checkpoint)
            self._publish(checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors on a full disk
            shutil.rmtree(scratch, ignore_errors=True)
            what = f"{self.folder}: could not save step {step} ({error}); --resume takes the newest that is whole"
            raise OSError(what) from error
        steps = self._checkpoints()
        kept = [n for n in steps if n <= step][-self.cfg.keep :]  # a later one could not be read on resume
        for n in set(steps) - set(kept):
            shutil.rmtree(self.folder / f"step-{n}", ignore_errors=True)

    def restore(self, model: Transformer, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint that can be read, cut the logs to its step and return it, 0 if there is none.

        Each checkpoint that cannot be read is named in a warning. Raises ValueError when none can be read.
        """
        state = self._newest() if self.ranks.first and self.cfg.resume else {"step": 0}
        self.saved = step = int(self.ranks.sum([state["step"]])[0])  # that of the first rank, the others add 0
        if step:
            alone = self.ranks.size == 1
            options = dcp.StateDictOptions(
                full_state_dict=True, broadcast_from_rank0=not alone, strict=not self.cfg.lora, ignore_frozen_params=True
            )
            if self.cfg.offload and alone:
                model.to("cpu")  # or the optimizer state would pass through the GPU, all of it at once
            dcp.set_model_state_dict(model, state.get("model", {}), options=options)
            dcp.set_optimizer_state_dict(model, optimizer, state.get("optimizer", {}), options=options)
            if self.cfg.offload:
                model.to(self.ranks.device)
                for moments in optimizer.state.values():
                    to_host(moments, {})
        if self.ranks.first:
            for log in filter(Path.exists, (self.folder / "log.jsonl", self.folder / "eval.jsonl")):
                rows = [row for row in log.read_bytes().splitlines(keepends=True) if row.endswith(b"\n")]  # none torn
                kept = [row for row in rows if step and json.loads(row)["step"] <= step]  # without a checkpoint none
                os.truncate(log, sum(map(len, kept)))
            if self.cfg.tensorboard and step < self.steps:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(self.folder, purge_step=step + 1)
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
        names = (file.name.removeprefix("step-") for file in self.folder.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def _newest(self) -> dict:
        """The state of the newest checkpoint that can be read; that of step 0 when there is no checkpoint at all."""
        steps = self._checkpoints()
        for n in reversed(steps):
            checkpoint = self.folder / f"step-{n}"
            try:
                for weights in checkpoint.glob("*.safetensors"):
                    safe_open(weights, framework="pt")  # checks its length
                state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
                why = str(error).partition("\n")[0]
                print(f"warning: {checkpoint} cannot be read ({why}); trying the one before it", file=sys.stderr)
                continue
            self._publish(checkpoint)  # the process may have died before it linked them
            return state
        if steps:
            raise ValueError(f"{self.folder}: none of its {len(steps)} checkpoints can be read; take another --out")
        return {"step": 0}

    def _publish(self, checkpoint: Path) -> None:
        """Make the run folder itself a Hugging Face folder with the model of this checkpoint."""
        for file in set(filter(Path.is_file, checkpoint.rglob("*"))) - {checkpoint / STATE}:
            place = self.folder / file.relative_to(checkpoint)  # LoRA's files lie in a folder of their own
            place.parent.mkdir(exist_ok=True)
            with replacing(place) as partial:
                try:
                    os.link(file, partial)
                except OSError:  # not every file system has hard links
                    shutil.copy2(file, partial)  # with its time, by which others know that it has not changed
        sync(self.folder)


def _digests(data: str, model: str) -> tuple[str, ...]:
    """SHA-256 of the data, and of the first MiB of each file of weights: enough to tell copies from one another."""
    heads = []
    for file in sorted(Path(model).glob("*.safetensors")):
        with file.open("rb") as weights:
            heads.append(weights.read(2**20))
    return tuple(hashlib.sha256(content).hexdigest() for content in (Path(data).read_bytes(), *heads))


def to_host(state: dict, kept: dict) -> None:
    """Copy one parameter's optimizer state into CPU memory: into the tensors of `kept`, or into new ones.

    They are not pinned: torch rounds a pinned block up to a power of two, which nearly doubles the moments of 7B.
    """
    for name, x in state.items():
        state[name] = kept[name].copy_(x) if name in kept else x.to("cpu")
