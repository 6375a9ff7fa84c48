"""Ask a model one problem, or run it over a data set: trajectories, rollout file, metrics.

    python sample.py --model DIR --ask "What is 7 times 6?" --answer 42
    python sample.py --model DIR --data F.jsonl --max-new-tokens 2048 --out ROLLOUTS.jsonl --report R.json
    torchrun --nproc-per-node 8 -- sample.py …         the same flags and the same rollouts, a part of them on each GPU

With `--n 5 --temperature 0.7` it collects the samples of stage 0 (paper §2.2: K = 5 samples a problem). Partial results
are kept in OUT.begun; rerun the same command to continue.
"""

import s2r  # isort: skip  # noqa: F401  before torch: it settles how torch's threads wait

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from s2r.data import Problem, load_problems
from s2r.grade import parsable
from s2r.metrics import at_k, summarize
from s2r.rollouts import encode_prompts
from s2r.run import flags, loop
from s2r.run.files import check_output, replacing, write_jsonl
from s2r.run.journal import Journal
from s2r.view.page import page
from s2r.view.report import table
from s2r.view.terminal import show


@dataclass(frozen=True)
class Config:
    model: str  # Hugging Face folder
    data: str = ""  # problem file, JSONL
    ask: str = ""  # or one problem
    answer: str = ""  # gold answer of the problem asked; without it nothing is graded
    n: int = 1  # responses per problem (paper: 1 to evaluate, 5 for stage 0)
    temperature: float = 0.0  # 0: argmax (paper: 0 to evaluate, 0.7 for stage 0 and RL)
    max_new_tokens: int = 2048  # length limit of a response (paper: 2048 for stage 0)
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
    check_settings(cfg)
    problems = [Problem(cfg.ask, cfg.answer, "asked")] if cfg.ask else load_problems(cfg.data, cfg.limit)
    ranks, dtype = loop.pick(cfg)
    model, tokenizer = loop.load(cfg, ranks, dtype, whole=True)
    encode_prompts(problems, tokenizer, model.config.max_positions)  # one that is too long: before anything is written
    journal = Journal(cfg, problems, ranks, dtype)

    settings = {name: getattr(cfg, name) for name in ("n", "temperature", "max_new_tokens", "seed", "slots")}
    options = {"known": journal.known, "each": journal.add, "progress": not cfg.ask and ranks.first}
    start = time.perf_counter()
    trajectories = loop.roll_out_together(
        ranks, model, tokenizer, problems, prefill_tokens=cfg.tokens_per_microbatch, to_first=True, **settings, **options
    )
    seconds = time.perf_counter() - start
    if not ranks.first:
        return  # it writes for all

    for trajectory in trajectories if cfg.ask else trajectories[: cfg.show]:
        print(show(trajectory), end="\n\n")
    if cfg.out:
        write_jsonl(cfg.out, (trajectory.to_row() for trajectory in trajectories))
    if cfg.html:
        title = f"{cfg.model} on {cfg.ask or cfg.data}"
        Path(cfg.html).write_text(page(trajectories, tokenizer, title), "utf-8")
    if cfg.data:
        sampled = sum(len(t.ids) for t in trajectories) - sum(len(rollout.ids) for rollout in journal.known)
        metrics = summarize(trajectories) | at_k(trajectories) | {"tokens_per_second": sampled / seconds}
        print(table({cfg.model: metrics}))
    if cfg.report:
        report = {"model": cfg.model, "data": cfg.data} | settings | metrics
        with replacing(Path(cfg.report)) as partial:  # whole or not there: scripts take a report for the end of the work
            partial.write_text(json.dumps(report, indent=2) + "\n")
    if cfg.out:
        journal.remove()


def check_settings(cfg: Config) -> None:
    """Raises ValueError for settings that make no sense, alone or together."""
    flags.check(cfg, "n", "max_new_tokens", "slots")
    if bool(cfg.data) == bool(cfg.ask):
        raise ValueError(f"give --data, a problem file, or --ask, one problem, and not both; {flags.TOY}")
    if cfg.n > 1 and cfg.temperature == 0:
        raise ValueError(f"--n {cfg.n} at --temperature 0: the {cfg.n} responses would be the same; give --temperature 0.7")
    if cfg.ask and (cfg.report or ((cfg.out or cfg.html) and not cfg.answer)):
        raise ValueError("--ask: --out and --html judge and need --answer; --report is of a data set, leave it out")
    if cfg.data and cfg.answer:
        raise ValueError("--answer belongs to --ask; the problem file of --data has its own")
    if cfg.out and cfg.data and os.path.realpath(cfg.out) == os.path.realpath(cfg.data):
        raise ValueError(f"--out {cfg.out}: it is the problem file, and would be written over; give another path")
    if cfg.answer and not parsable(cfg.answer):
        raise ValueError(f"--answer {cfg.answer}: cannot be parsed, so nothing can be graded against it")
    for path in filter(None, (cfg.out, cfg.report, cfg.html)):
        check_output(path)


if __name__ == "__main__":
    flags.start(main, Config)
