"""Ask a model one problem, or run it over a data set: trajectories, rollout file, metrics.

    python sample.py                                                   toy base model, held-out toy problems
    python sample.py --model DIR --ask "What is 7 times 6?" --answer 42
    python sample.py --model DIR --data F.jsonl --max-new-tokens 2048 --out ROLLOUTS.jsonl --report R.json

With `--n 5 --temperature 0.7` it is the collector of stage 0 (paper §2.2: K = 5 samples a problem). A run that was
killed goes on where it was when it is started again with the same flags: until --out is written, --out.begun holds what
there is of it.
"""

# Before torch: s2r settles how torch's threads wait.
import s2r  # isort: skip  # noqa: F401

import json
import os
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from s2r import rl, runtime, toy
from s2r.data import Problem, load_problems, write_jsonl
from s2r.grade import parsable
from s2r.metrics import at_k, summarize, table
from s2r.view.page import page
from s2r.rollouts import Journal, roll_out, show


@dataclass(frozen=True)
class Config:
    model: str = toy.BASE  # Hugging Face folder
    data: str = toy.TEST  # problem file, JSONL
    ask: str = ""  # one problem instead of a file
    answer: str = ""  # gold answer of the problem asked; without it nothing is graded
    n: int = 1  # responses per problem (paper: 1 to evaluate, 5 for stage 0)
    temperature: float = 0.0  # 0: argmax (paper: 0 to evaluate, 0.7 for stage 0 and RL)
    max_new_tokens: int = 512  # length limit of a response (paper: 2048 for stage 0)
    limit: int = 0  # only the first problems of the file, 0: all
    seed: int = 0  # of the random stream
    out: str = ""  # rollout file to write, JSONL
    report: str = ""  # metrics to write, JSON
    html: str = ""  # web page of the trajectories to write
    show: int = 1  # trajectories to print after a run over a file
    slots: int = 128  # rows decoded at a time; fewer take less memory
    tokens_per_microbatch: int = 16_384  # prompt tokens run through the model at a time
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …


def main(cfg: Config) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("sample.py runs as one process; start it without torchrun, on a part of the data per GPU")
    runtime.positive(cfg, "n", "max_new_tokens", "slots")
    runtime.not_negative(cfg, "temperature")
    if cfg.ask and (cfg.report or (cfg.html and not cfg.answer)):
        raise ValueError("--ask: a --report is of a data set, and --html judges, so it needs --answer; leave them out")
    if cfg.answer and not parsable(cfg.answer):
        raise ValueError(f"--answer {cfg.answer}: cannot be parsed, so nothing can be graded against it")
    if cfg.ask:
        problems = [Problem(cfg.ask, cfg.answer, "asked")]
    else:
        toy.ensure(cfg.data)
        problems = load_problems(cfg.data, cfg.limit)
    for path in filter(None, (cfg.out, cfg.report, cfg.html)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    device, dtype = runtime.pick(cfg.device, cfg.dtype)
    model, tokenizer = runtime.load(cfg.model, device, dtype)
    journal = None
    if cfg.out:
        settings = {name: getattr(cfg, name) for name in ("n", "temperature", "max_new_tokens", "seed")}
        settings["model"] = f"{cfg.model}, last changed at {Path(cfg.model).stat().st_mtime}"
        settings["data"] = f"{cfg.data}, checksum {zlib.crc32(repr(problems).encode()):08x}"
        journal = Journal(Path(f"{cfg.out}.begun"), settings | {"dtype": str(dtype)})
        if journal.known:
            print(f"going on with a run that was cut short: {len(journal.known):,} rollouts are there")

    start = time.perf_counter()
    trajectories = roll_out(
        model,
        tokenizer,
        problems,
        n=cfg.n,
        temperature=cfg.temperature,
        max_new_tokens=cfg.max_new_tokens,
        seed=cfg.seed,
        slots=cfg.slots,
        prefill_tokens=cfg.tokens_per_microbatch,
        progress=not cfg.ask,
        **({"known": journal.known, "each": journal.add} if journal else {}),
    )
    seconds = time.perf_counter() - start

    for trajectory in trajectories if cfg.ask else trajectories[: cfg.show]:
        print(show(trajectory, colour=sys.stdout.isatty()), end="\n\n")
    if cfg.out:
        write_jsonl(cfg.out, (trajectory.to_row() for trajectory in trajectories))
        journal.remove()
    if cfg.html:
        credits = rl.online_credit(trajectories, "process", cfg.n)
        Path(cfg.html).write_text(page(trajectories, credits, tokenizer, f"{cfg.model} on {cfg.ask or cfg.data}"))
    if cfg.ask:
        return
    metrics = summarize(trajectories) | at_k(trajectories)
    before = sum(len(rollout.ids) for rollout in journal.known) if journal else 0
    metrics["tokens_per_second"] = (sum(len(t.ids) for t in trajectories) - before) / seconds
    print(table({cfg.model: metrics}))
    if cfg.report:
        settings = {"model": cfg.model, "data": cfg.data, "n": cfg.n, "temperature": cfg.temperature, "seed": cfg.seed}
        Path(cfg.report).write_text(json.dumps(settings | metrics, indent=2) + "\n")


if __name__ == "__main__":
    runtime.start(main, Config)
