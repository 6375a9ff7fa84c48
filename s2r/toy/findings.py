"""The paper's qualitative findings, tried in the toy world over several seeds. `PAGE` says what is compared.

    python -m s2r.toy.findings               an hour on two cores; what is made is not made again

A seed has its own problems, samples and training runs; the base model is the same. No setting is tuned for a finding.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from s2r.data import check_output, read_jsonl, write_jsonl
from s2r.run.flags import check, start
from s2r.run.stages import make
from s2r.toy.__main__ import BUILD, MODELS, PLAN, RL, SFT, Plan, evaluation, stages
from s2r.view.report import interval

COLUMNS = ("accuracy", "first_accuracy", "trials", "va", "va_right", "er", "cp", "icr", "cir")
PAGE = """\
# The paper's findings in the toy world

Which of the paper's qualitative findings hold in the toy world? Every number is mean ± half the width of the
95 % interval over {seeds} seeds (t distribution). Each finding is a difference, positive in the paper. It holds
if its interval lies above zero, fails if its interval lies below, and is undecided otherwise.
This toy world is being replaced: its candidates stand in the prompt, so correcting is elimination.

The paper's numbers are those of Qwen2.5-Math-7B on MATH500. Fractions are in per cent; `s2r/metrics.py`
explains the columns. Made by `python -m s2r.toy.findings --seeds {seeds}`, commit {commit}.

{findings}

{models}
"""

# Claim, the paper's numbers, the value compared, the models with more and with less of it.
FINDINGS = (
    ("SFT beats the base: accuracy", "51.0 → 81.6", "accuracy", "sft", "base"),
    ("outcome RL beats SFT: accuracy", "81.6 → 84.4", "accuracy", "rl-outcome", "sft"),
    ("process RL beats SFT: accuracy", "81.6 → 83.4", "accuracy", "rl-process", "sft"),
    ("masked SFT beats unmasked: accuracy", "–", "accuracy", "sft", "sft-unmasked"),
    ("more trials on harder problems, after outcome RL", "1.05 → 2.15", "harder", "rl-outcome", None),
    ("outcome RL raises ICR", "6.5 → 13.6", "icr", "rl-outcome", "sft"),
    ("process RL raises ICR", "6.5 → 12.2", "icr", "rl-process", "sft"),
    ("outcome RL lowers CIR (drop)", "2.0 → 1.0", "cir", "sft", "rl-outcome"),
    ("process RL lowers CIR (drop)", "2.0 → 1.5", "cir", "sft", "rl-process"),
    ("VA is higher after process than after outcome RL", "66.5 → 74.6", "va", "rl-process", "rl-outcome"),
    ("CP is higher after process than after outcome RL", "87.9 → 90.3", "cp", "rl-process", "rl-outcome"),
    ("accuracy is higher after outcome than after process RL", "83.4 → 84.4", "accuracy", "rl-outcome", "rl-process"),
    ("offline, process beats outcome level: accuracy", "–", "accuracy", "offline-process", "offline-outcome"),
    ("offline process RL beats SFT: accuracy", "81.6 → 83.4", "accuracy", "offline-process", "sft"),
    ("problem-solving checks lean towards “correct”: VA on right − wrong answers, against confirmative",
     "14.8 → 34.5", "bias", "sft-solving", "sft"),
    ("more SFT data help, at equal steps: all trajectories against 50", "–", "accuracy", "sft", "sft-50"),
)  # fmt: skip
# What the findings need beyond the toy's own plan.
TRAINED = (
    ("sft-unmasked", "", f"{SFT} --data F/trajectories.jsonl --epochs 3 --unmasked"),
    ("sft-solving", "trajectories-solving.jsonl", f"{SFT} --data F/trajectories-solving.jsonl --epochs 3"),
    ("sft-50", "", f"{SFT} --data F/trajectories-50.jsonl --epochs 80"),  # about as many steps as all take in 3
    *[(f"offline-{level}", "sft.rollouts.jsonl", f"{RL} --offline F/sft.rollouts.jsonl --level {level}")
      for level in ("outcome", "process")],
)  # fmt: skip
ABLATIONS: Plan = (
    ("verifications-solving.jsonl", "", """-m s2r.toy.world --style solving --rollouts F/base.rollouts.jsonl
        --out F/verifications-solving.jsonl"""),
    ("trajectories-solving.jsonl", "verifications-solving.jsonl",
        f"{BUILD} --verifications F/verifications-solving.jsonl --out F/trajectories-solving.jsonl"),
    ("sft.rollouts.jsonl", "", """sample.py --model F/sft --data F/train.jsonl --out F/sft.rollouts.jsonl
        --limit 1000 --n 8 --temperature 0.7 --max-new-tokens 320 --show 0"""),
    *[(name, needs, f"{command} --out F/{name}") for name, needs, command in TRAINED],
    *[evaluation(name) for name, _, _ in TRAINED],
)  # fmt: skip


def value(report: dict, name: str) -> float | None:
    """A number of a report, fractions in per cent; None where the report has none.

    "harder": trials at the hardest level less those at the easiest. "bias": VA on right answers less VA on wrong ones.
    """
    if name == "harder":
        levels = report["by_level"]
        return levels[max(levels)]["trials"] - levels[min(levels)]["trials"]
    if name == "bias":
        return 100 * (report["va_right"] - report["er"])
    return report[name] if name == "trials" or report[name] is None else 100 * report[name]


def page(seeds: list[dict[str, dict]], commit: str) -> str:
    """PAGE with its tables; `seeds` holds for each seed: name of a model -> what sample.py --report wrote."""
    findings = ["| finding | paper | toy: difference | |", "|---|---|---|---|"]
    for claim, paper, name, more, less in FINDINGS:
        differences = [value(r[more], name) - (value(r[less], name) if less else 0) for r in seeds]
        middle, half = interval(differences)
        holds = "holds" if middle > half else "fails" if middle < -half else "undecided"
        findings.append(f"| {claim} | {paper} | {middle:+.2f} ± {half:.2f} | {holds} |")
    models = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for model in seeds[0]:
        cells = [model]
        for name in COLUMNS:
            values, digits = [value(r[model], name) for r in seeds], 2 if name == "trials" else 1
            cells.append("–" if None in values else "{:.{d}f} ± {:.{d}f}".format(*interval(values), d=digits))
        models.append(f"| {' | '.join(cells)} |")
    return PAGE.format(seeds=len(seeds), commit=commit, findings="\n".join(findings), models="\n".join(models))


@dataclass(frozen=True)
class Config:
    folder: str = "runs/findings"  # where the runs go, a folder for each seed
    seeds: int = 3  # how many, two or more
    out: str = "docs/findings.md"  # page to write, Markdown


def main(cfg: Config) -> None:
    check(cfg)
    if cfg.seeds < 2:
        raise ValueError(f"--seeds {cfg.seeds}: an interval needs two or more")
    check_output(cfg.out)
    folders = [f"{cfg.folder}/seed-{seed}" for seed in range(cfg.seeds)]
    make([stage for seed, folder in enumerate(folders) for stage in stages(PLAN, folder, seed)])
    for folder in folders:
        write_jsonl(f"{folder}/trajectories-50.jsonl", read_jsonl(f"{folder}/trajectories.jsonl")[:50])
    make([stage for seed, folder in enumerate(folders) for stage in stages(ABLATIONS, folder, seed)])
    names = [*MODELS, *(name for name, _, _ in TRAINED)]
    seeds = [{name: json.loads(Path(folder, f"{name}.json").read_text()) for name in names} for folder in folders]
    commit = json.loads(Path(folders[0], "sft/run.json").read_text())["commit"]
    text = page(seeds, commit[:7])
    print(f"\n{text}")
    Path(cfg.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    start(main, Config)
