"""All of S²R on a laptop's CPU, in a world of arithmetic: base model → stage 0 → SFT → RL.

    python -m s2r.toy                        10 to 11 minutes on two cores; ends with a table of what each model reached

`PLAN` lists the commands. They are those that train a large model, with smaller settings. What is made is not made
again, so a second call continues where the first was stopped. `s2r/toy/world.py` explains the problems.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from s2r.run.flags import check, start
from s2r.run.stages import Stage, make
from s2r.view.report import table

Plan = tuple[tuple[str, str, str], ...]  # (what is made, what it needs, command); F is the folder of all these files

BASE = "s2r/toy/base"  # relative to the root of the repository, where every command runs
BUILD = "-m s2r.stage0.build --rollouts F/base.rollouts.jsonl"
LONGEST = 480  # tokens of a response: 7 trials with 5 gaps, all 8 rows with 3
SFT = f"""train_sft.py --model {BASE} --lr 5e-4 --warmup 5 --batch-size 32 --kl 0.01 --max-length 1024
    --save-every 200 --tokens-per-microbatch 8192 --device cpu --resume"""
RL = f"""train_rl.py --model F/sft --problems 64 --rollouts 4 --updates 1 --temperature 0.7 --beta 0.01 --epsilon 0.2
    --lr 1e-4 --warmup 5 --steps 20 --max-new-tokens {LONGEST} --save-every 50 --show-every 10
    --tokens-per-microbatch 8192 --device cpu --resume"""
MODELS = ("base", "sft", "sft-plus", "rl-outcome", "rl-process")


def evaluation(model: str) -> tuple[str, str, str]:
    """The stage that evaluates a model on F/test.jsonl: makes its report MODEL.json, rollouts in MODEL.test.jsonl."""
    folder, need = (BASE, "train.jsonl") if model == "base" else (f"F/{model}", model)
    command = f"sample.py --device cpu --model {folder} --data F/test.jsonl --out F/{model}.test.jsonl"
    return f"{model}.json", need, f"{command} --report F/{model}.json --temperature 0 --max-new-tokens {LONGEST}"


PLAN: Plan = (
    ("train.jsonl", "", "-m s2r.toy.world --folder F/"),  # and test.jsonl before it
    ("base.rollouts.jsonl", "train.jsonl", f"""sample.py --device cpu --model {BASE} --data F/train.jsonl
        --out F/base.rollouts.jsonl --n 5 --temperature 0.7 --max-new-tokens 32 --show 0"""),
    ("verifications.jsonl", "base.rollouts.jsonl",
        "-m s2r.toy.world --rollouts F/base.rollouts.jsonl --out F/verifications.jsonl"),
    ("trajectories.jsonl", "verifications.jsonl",
        f"{BUILD} --verifications F/verifications.jsonl --out F/trajectories.jsonl"),
    ("sft", "trajectories.jsonl", f"{SFT} --data F/trajectories.jsonl --out F/sft --epochs 5"),
    # The control of RL: SFT alone, for at least as many updates as SFT and RL make together.
    ("sft-plus", "trajectories.jsonl", f"{SFT} --data F/trajectories.jsonl --out F/sft-plus --epochs 6"),
    ("rl-outcome", "sft", f"{RL} --data F/train.jsonl --out F/rl-outcome --level outcome"),
    ("rl-process", "sft", f"{RL} --data F/train.jsonl --out F/rl-process --level process"),
    *map(evaluation, MODELS),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    folder: str = ""  # where all files and run folders go [runs/toy-SEED]
    seed: int = 0  # of everything random


def stages(plan: Plan, folder: str, seed: int) -> list[Stage]:
    """The stages of a plan in this folder and with this seed."""
    found = []
    for makes, needs, command in plan:
        words = [word.replace("F/", f"{folder}/") for word in command.split()]
        needs = tuple(f"{folder}/{need}" for need in needs.split())
        found.append(Stage(f"{folder}/{makes}", (*words, "--seed", str(seed)), needs))
    return found


def main(cfg: Config) -> None:
    check(cfg)
    folder = cfg.folder or f"runs/toy-{cfg.seed}"
    make(stages(PLAN, folder, cfg.seed))
    reports = {model: json.loads(Path(folder, f"{model}.json").read_text()) for model in MODELS}
    print(f"\n{folder}/test.jsonl, greedy; fractions in per cent (s2r/metrics.py explains the columns)\n")
    print(table(reports))


if __name__ == "__main__":
    start(main, Config)
