"""The paper's qualitative findings, tried in the toy world: a table and a figure over several seeds.

    python -m s2r.toy.findings               an hour on two cores; what is made is not made again
    pip install matplotlib                   for the figure, optional

Each finding is a difference that the paper says is positive, taken for each seed. It holds if the 95 % interval of
the mean (t distribution) lies above zero, fails if it lies below, and is undecided otherwise. A seed has its own
problems, samples and training runs; the base model is the same. No setting is tuned for a finding.
"""

import json
import math
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from s2r.data import read_jsonl, write_jsonl
from s2r.run.flags import check, start
from s2r.run.stages import make
from s2r.toy.__main__ import BUILD, MODELS, PLAN, RL, SFT, Plan, evaluation, rewards, stages
from s2r.view.report import interval

SIZES = (50, 100, 200, 400)  # SFT trajectories, for data efficiency
SFT_STEPS = 160  # about as many optimizer steps as three epochs of all trajectories take
COLUMNS = ("accuracy", "first_accuracy", "trials", "va", "va_right", "er", "cp", "icr", "cir")
Reports = dict[str, dict]  # of one seed: name of the model -> what sample.py --report wrote

# Claim; the paper's numbers (Qwen2.5-Math-7B, MATH500); the value compared; the models with more and with less of it.
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


# What the findings need beyond the toy's own plan; `main` writes trajectories-N.jsonl, the first N rows.
TRAINED = (
    ("sft-unmasked", "", f"{SFT} --data F/trajectories.jsonl --epochs 3 --unmasked"),
    ("sft-solving", "trajectories-solving.jsonl", f"{SFT} --data F/trajectories-solving.jsonl --epochs 3"),
    *[(f"sft-{n}", "", f"{SFT} --data F/trajectories-{n}.jsonl --epochs {round(SFT_STEPS / math.ceil(n / 32))}")
      for n in SIZES],
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
    *[evaluation(name, "longer") for name in MODELS],
)  # fmt: skip


def value(report: dict, name: str) -> float | None:
    """A number of a report, fractions in per cent; None where the report has none.

    "harder": trials at the hardest level less those at the easiest. "bias": how much more often the verdict is true on
    right answers than on wrong ones.
    """
    if name == "harder":
        levels = report["by_level"]
        return levels[max(levels)]["trials"] - levels[min(levels)]["trials"]
    if name == "bias":
        return 100 * (report["va_right"] - report["er"])
    return report[name] if name == "trials" or report[name] is None else 100 * report[name]


def verdict(differences: list[float]) -> tuple[float, float, str]:
    """Mean difference over the seeds, half the width of its interval, and whether the finding holds."""
    middle, half = interval(differences)
    return middle, half, "holds" if middle > half else "fails" if middle < -half else "undecided"


def report(seeds: list[Reports]) -> str:
    """The findings as a Markdown table."""
    lines = ["| finding | paper | toy: difference, 95 % interval | |", "|---|---|---|---|"]
    for claim, paper, name, more, less in FINDINGS:
        differences = [value(r[more], name) - (value(r[less], name) if less else 0) for r in seeds]
        middle, half, holds = verdict(differences)
        lines.append(f"| {claim} | {paper} | {middle:+.2f} ± {half:.2f} | {holds} |")
    return "\n".join(lines)


def models(seeds: list[Reports]) -> str:
    """The metrics of every model, mean ± half the width of the interval over the seeds, as a Markdown table."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for model in seeds[0]:
        cells = []
        for name in COLUMNS:
            values, digits = [value(reports[model], name) for reports in seeds], 2 if name == "trials" else 1
            cells.append("–" if None in values else "{:.{d}f} ± {:.{d}f}".format(*interval(values), d=digits))
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(seeds: list[Reports], curves: dict[str, list[list[float]]], path: Path) -> None:
    """Accuracy by stage, reward by RL step, trials by level, accuracy by SFT trajectories; bars are 95 % intervals."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "s2r"  # the same numbers make the same file
    from matplotlib import pyplot

    def over_seeds(names: list[str], metric: str) -> tuple[tuple[float, ...], ...]:
        """(means, half widths), one of each for each model."""
        return tuple(zip(*(interval([value(reports[name], metric) for reports in seeds]) for name in names)))

    figure, ((stages, reward), (trials, data)) = pyplot.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for shift, metric, label in ((-0.2, "first_accuracy", "first attempt"), (0.2, "accuracy", "final")):
        height, half = over_seeds(MODELS, metric)
        stages.bar([i + shift for i in range(len(MODELS))], height, 0.4, yerr=half, label=label)
    stages.set(title="accuracy, held-out problems", ylabel="%", xticks=range(len(MODELS)), xticklabels=MODELS)
    for name, runs in curves.items():
        reward.plot(range(1, len(runs[0]) + 1), [mean(step) for step in zip(*runs)], label=name)
    reward.set(title="mean reward of the rollouts", xlabel="RL step")
    for name in MODELS:
        levels = sorted(seeds[0][name]["by_level"])
        mean_trials = [mean(reports[name]["by_level"][level]["trials"] for reports in seeds) for level in levels]
        trials.plot(levels, mean_trials, "o-", label=name)
    trials.set(title="trials by difficulty", xlabel="level")
    for panel in (stages, reward, trials):
        panel.legend()
    accuracy, half = over_seeds([*(f"sft-{n}" for n in SIZES), "sft"], "accuracy")
    data.errorbar([*map(str, SIZES), "all"], accuracy, half, fmt="o-")
    data.set(title=f"accuracy after {SFT_STEPS} steps of SFT", xlabel="trajectories", ylabel="%")
    figure.savefig(path, metadata={"Date": None})


@dataclass(frozen=True)
class Config:
    folder: str = "runs/findings"  # where the runs go, a folder for each seed
    seeds: int = 3  # how many, two or more
    out: str = "docs/findings"  # table and figure: OUT.md, OUT.svg


def main(cfg: Config) -> None:
    check(cfg)
    if cfg.seeds < 2:
        raise ValueError(f"--seeds {cfg.seeds}: an interval needs two or more")
    folders = [f"{cfg.folder}/seed-{seed}" for seed in range(cfg.seeds)]
    make([stage for seed, folder in enumerate(folders) for stage in stages(PLAN, folder, seed)])
    for folder in folders:
        trajectories = read_jsonl(f"{folder}/trajectories.jsonl")
        for size in SIZES:
            write_jsonl(f"{folder}/trajectories-{size}.jsonl", trajectories[:size])
    make([stage for seed, folder in enumerate(folders) for stage in stages(ABLATIONS, folder, seed)])
    names = [makes.removesuffix(".json") for makes, _, _ in (*PLAN, *ABLATIONS) if makes.endswith(".json")]
    seeds = [{name: json.loads(Path(folder, f"{name}.json").read_text()) for name in names} for folder in folders]
    text = f"{report(seeds)}\n\n{models(seeds)}\n"
    print(f"\n{text}")
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    origin = f"`python -m s2r.toy.findings --seeds {cfg.seeds}`, commit {commit or 'unknown'}."
    Path(f"{cfg.out}.md").write_text(f"# The paper's findings in the toy world\n\n{origin}\n\n{text}")
    curves = {name: [rewards(f"{folder}/{name}") for folder in folders] for name in ("rl-outcome", "rl-process")}
    try:
        plot(seeds, curves, Path(f"{cfg.out}.svg"))
    except ImportError:
        print("no figure: pip install matplotlib")


if __name__ == "__main__":
    start(main, Config)
