"""All of S²R on a laptop's CPU, in a world of arithmetic: base model → stage 0 → SFT → RL. Start reading here.

    python -m s2r.toy                        eight minutes on two cores; at the end, a table of what each model reached

`stages` lists the commands. They are those that train a large model, with smaller settings. What is made is not made
again: a second call continues where the first was stopped. The problems are in `s2r/toy/world.py`.

    FOLDER/train.jsonl, test.jsonl, longer.jsonl      problems; the test set is held out
    FOLDER/base.rollouts.jsonl                        five samples of the base model for each training problem
    FOLDER/verifications.jsonl                        a check of every answer in them
    FOLDER/trajectories.jsonl                         solve, check, and solve again: the data of SFT
    FOLDER/sft, rl-outcome, rl-process                run folders: log and model
    FOLDER/base.json, sft.json, …                     accuracy and other metrics of each model on the test set
"""

import json
from dataclasses import dataclass
from pathlib import Path

from s2r.run.flags import check, start
from s2r.run.stages import Stage, make
from s2r.view.report import table

BASE = "s2r/toy/base"  # relative to the root of the repository, where every command runs
MODELS = ("base", "sft", "rl-outcome", "rl-process")
SAMPLES = "--n 5 --temperature 0.7 --max-new-tokens 32 --show 0".split()
KEEP = "--keep 1 0.5 0.3 0.3".split()  # fraction of the trajectories with 1, 2, 3, 4 trials
SFT = """--lr 2e-3 --warmup 5 --batch-size 32 --kl 0.01 --max-length 1024 --save-every 200
         --tokens-per-microbatch 8192 --resume""".split()
RL = """--problems 32 --rollouts 4 --updates 2 --temperature 0.7 --beta 0.01 --epsilon 0.2 --lr 5e-5 --warmup 5
        --steps 40 --max-new-tokens 320 --save-every 50 --show-every 10 --tokens-per-microbatch 8192 --resume""".split()
GREEDY = "--n 1 --temperature 0 --max-new-tokens 320".split()


@dataclass(frozen=True)
class Config:
    folder: str = "runs/toy"  # where all files and run folders go
    seed: int = 0  # of everything random


def stages(folder: str, seed: int) -> list[Stage]:
    """The commands of the toy world, in order."""
    train, samples = f"{folder}/train.jsonl", f"{folder}/base.rollouts.jsonl"
    rest = ["--out", samples, *SAMPLES, "--seed", str(seed)]
    return [
        Stage(train, ("-m", "s2r.toy.world", "--folder", folder, "--seed", str(seed)), ()),
        Stage(samples, ("sample.py", "--model", BASE, "--data", train, *rest), (train,)),
        *stage0(folder, seed),
        sft(folder, seed),
        rl(folder, seed, "rl-outcome", "--data", train, "--level", "outcome"),
        rl(folder, seed, "rl-process", "--data", train, "--level", "process"),
        *[evaluation(folder, model) for model in MODELS],
    ]


def stage0(folder: str, seed: int, style: str = "confirmative", suffix: str = "") -> list[Stage]:
    """From samples to trajectories, by way of checks in this style; `suffix` goes into the names of both files."""
    samples, checks = f"{folder}/base.rollouts.jsonl", f"{folder}/verifications{suffix}.jsonl"
    made, rest = f"{folder}/trajectories{suffix}.jsonl", [*KEEP, "--seed", str(seed)]
    verify = ("-m", "s2r.toy.world", "--rollouts", samples, "--out", checks, "--style", style)
    build = ("-m", "s2r.stage0.build", "--rollouts", samples, "--verifications", checks, "--out", made, *rest)
    return [Stage(checks, verify, (samples,)), Stage(made, build, (samples, checks))]


def sft(folder: str, seed: int, name: str = "sft", data: str = "trajectories", epochs: int = 3, *flags: str) -> Stage:
    """Stage 1: FOLDER/NAME, the base model trained on FOLDER/DATA.jsonl."""
    data, rest = f"{folder}/{data}.jsonl", ["--epochs", str(epochs), *SFT, *flags, "--seed", str(seed)]
    command = ("train_sft.py", "--model", BASE, "--data", data, "--out", f"{folder}/{name}", *rest)
    return Stage(f"{folder}/{name}", command, (data,))


def rl(folder: str, seed: int, name: str, *flags: str) -> Stage:
    """Stage 2: FOLDER/NAME, the SFT model trained on; `flags` begin with --data or --offline and a file."""
    rest = [*flags, *RL, "--seed", str(seed)]
    command = ("train_rl.py", "--model", f"{folder}/sft", "--out", f"{folder}/{name}", *rest)
    return Stage(f"{folder}/{name}", command, (f"{folder}/sft", flags[1]))


def evaluation(folder: str, name: str, test: str = "test") -> Stage:
    """FOLDER/NAME.json, what the model FOLDER/NAME reaches on the problems of FOLDER/TEST.jsonl."""
    model = BASE if name == "base" else f"{folder}/{name}"
    report = f"{folder}/{name}.json" if test == "test" else f"{folder}/{name}-{test}.json"
    command = ("sample.py", "--model", model, "--data", f"{folder}/{test}.jsonl", "--report", report, *GREEDY)
    return Stage(report, command, (f"{folder}/train.jsonl", model))  # train.jsonl is written after the test sets


def rewards(run: str) -> list[float]:
    """The mean reward in each step of an RL run."""
    return [json.loads(row)["reward"] for row in Path(run, "log.jsonl").read_text().splitlines()]


def main(cfg: Config) -> None:
    check(cfg)
    make(stages(cfg.folder, cfg.seed))
    reports = {model: json.loads(Path(cfg.folder, f"{model}.json").read_text()) for model in MODELS}
    print(f"\n{cfg.folder}/test.jsonl, greedy; fractions in per cent (the columns are explained in s2r/metrics.py)\n")
    print(table(reports))
    for name in MODELS[2:]:
        steps = rewards(f"{cfg.folder}/{name}")
        first, last = sum(steps[:10]) / 10, sum(steps[-10:]) / 10
        print(f"\n{name}: mean reward {first:.3f} in the first ten steps, {last:.3f} in the last ten")


if __name__ == "__main__":
    start(main, Config)
