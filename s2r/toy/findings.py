r"""The paper's qualitative findings, tried in the toy world: one command, three seeds, a table and a figure.

    python -m s2r.findings                   what is done is not done again
    pip install matplotlib                   for the figure: an optional dependency of this command alone

A stage runs on every core (`toy.make_all`); what they print is in FOLDER/seed-N/log.txt.

Every finding is a difference that the paper says is positive, taken for each seed and averaged. It holds when the mean
is more than two standard errors (over seeds) above zero, fails when it is as far below, and is undecided in between. A
seed has its own problems, test problems, samples, order and rollouts; the base model is one. Settings are the scripts'
own toy defaults: nothing is tuned per finding.
"""

import argparse
import json
import math
import subprocess
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

from s2r import runtime, toy

SIZES = (50, 100, 200, 400)  # SFT trajectories, for data efficiency
SFT_STEPS = 160  # about as many optimizer steps as three epochs of all trajectories are
STAGES = ("base", "sft", "rl-outcome", "rl-process")
Reports = dict[str, dict]  # of one seed: name of the model -> what sample.py --report wrote


def stages(folder: str, seed: int) -> toy.Stages:
    """Those of `toy.stages`, and what the ablations need: a report FOLDER/NAME.json for every model FOLDER/NAME."""
    made, s = toy.stages(folder, seed), ["--seed", str(seed)]
    train, test, sft = f"{folder}/train.jsonl", f"{folder}/test.jsonl", f"{folder}/sft"
    samples, trajectories = f"{folder}/base.rollouts.jsonl", f"{folder}/trajectories.jsonl"
    solving, rollouts = f"{folder}/trajectories-solving.jsonl", f"{folder}/sft.rollouts.jsonl"
    made[solving] = [samples], [*made[trajectories][1], "--style", "solving", "--out", solving]
    made[rollouts] = (
        [train, sft],
        ["sample.py", "--model", sft, "--data", train, "--limit", "1000", "--n", "8", "--temperature", "0.7",
         "--max-new-tokens", "320", "--show", "0", "--out", rollouts, *s],
    )  # fmt: skip
    models = {
        "sft-unmasked": (trajectories, ["train_sft.py", "--data", trajectories, "--unmasked"]),
        "sft-solving": (solving, ["train_sft.py", "--data", solving]),
    }
    for size in SIZES:
        few = f"{folder}/trajectories-{size}.jsonl"
        made[few] = [trajectories], ["-m", "s2r.findings", "--head", str(size), trajectories, few]
        epochs = round(SFT_STEPS / math.ceil(size / 32))
        models[f"sft-{size}"] = few, ["train_sft.py", "--data", few, "--epochs", str(epochs)]
    for level in ("outcome", "process"):
        command = ["train_rl.py", "--model", sft, "--offline", rollouts, "--level", level]
        models[f"offline-{level}"] = rollouts, command
    for name, (data, command) in models.items():
        model, report = f"{folder}/{name}", f"{folder}/{name}.json"
        made[model] = [data], [*command, "--out", model, *s]
        made[report] = [test, model], [*toy.EVALUATE, "--model", model, "--data", test, "--report", report]
    longer = f"{folder}/longer.jsonl"
    for name in STAGES:
        model, report = toy.BASE if name == "base" else f"{folder}/{name}", f"{folder}/{name}-longer.json"
        made[report] = [longer], [*toy.EVALUATE, "--model", model, "--data", longer, "--report", report]
    return made


def gain(metric: str, after: str, before: str) -> Callable[[Reports], float]:
    """A metric of one model less that of another, in points for shares."""
    scale = 1 if metric == "trials" else 100
    return lambda reports: scale * (reports[after][metric] - reports[before][metric])


def harder(name: str) -> Callable[[Reports], float]:
    """Trials at the hardest level less those at the easiest."""
    return lambda reports: (
        (levels := reports[name]["by_level"])[max(levels)]["trials"] - levels[min(levels)]["trials"]
    )


def bias(name: str) -> Callable[[Reports], float]:
    """How much likelier a verification is true of a right answer than of a wrong one, in points."""
    return lambda reports: 100 * (reports[name]["va_right"] - reports[name]["er"])


FINDINGS = (  # what the paper says, its numbers (Qwen2.5-Math-7B; MATH500 where a test set is needed), the difference
    ("SFT beats the base: accuracy", "51.0 → 81.6", gain("accuracy", "sft", "base")),
    ("outcome RL beats SFT: accuracy", "81.6 → 84.4", gain("accuracy", "rl-outcome", "sft")),
    ("process RL beats SFT: accuracy", "81.6 → 83.4", gain("accuracy", "rl-process", "sft")),
    ("masked SFT beats unmasked: accuracy", "–", gain("accuracy", "sft", "sft-unmasked")),
    ("more trials on harder problems, after outcome RL", "1.05 → 2.15", harder("rl-outcome")),
    ("outcome RL raises ICR", "6.5 → 13.6", gain("icr", "rl-outcome", "sft")),
    ("process RL raises ICR", "6.5 → 12.2", gain("icr", "rl-process", "sft")),
    ("outcome RL lowers CIR (drop)", "2.0 → 1.0", gain("cir", "sft", "rl-outcome")),
    ("process RL lowers CIR (drop)", "2.0 → 1.5", gain("cir", "sft", "rl-process")),
    ("VA is higher after process than after outcome RL", "66.5 → 74.6", gain("va", "rl-process", "rl-outcome")),
    ("CP is higher after process than after outcome RL", "87.9 → 90.3", gain("cp", "rl-process", "rl-outcome")),
    ("accuracy is higher after outcome than after process RL", "83.4 → 84.4", gain("accuracy", "rl-outcome", "rl-process")),
    ("offline, process beats outcome level: accuracy", "–", gain("accuracy", "offline-process", "offline-outcome")),
    ("offline process RL beats SFT: accuracy", "81.6 → 83.4", gain("accuracy", "offline-process", "sft")),
    ("problem-solving checks lean towards “correct”: VA on right − wrong answers, against confirmative",
     "14.8 → 34.5", lambda reports: bias("sft-solving")(reports) - bias("sft")(reports)),
    (f"more SFT data help, steps alike: all trajectories against {SIZES[0]}", "–", gain("accuracy", "sft", f"sft-{SIZES[0]}")),
)  # fmt: skip


def verdict(differences: list[float]) -> tuple[float, float, str]:
    """Mean difference over the seeds, its standard error, and whether the finding holds."""
    middle, error = mean(differences), stdev(differences) / len(differences) ** 0.5
    return middle, error, "holds" if middle > 2 * error else "fails" if middle < -2 * error else "undecided"


def report(seeds: list[Reports]) -> str:
    """The findings as a Markdown table."""
    lines = ["| finding | paper | toy: difference ± s.e. | |", "|---|---|---|---|"]
    for name, paper, difference in FINDINGS:
        middle, error, holds = verdict([difference(reports) for reports in seeds])
        lines.append(f"| {name} | {paper} | {middle:+.2f} ± {error:.2f} | {holds} |")
    return "\n".join(lines)


def models(seeds: list[Reports]) -> str:
    """Every model's metrics, mean ± standard error over the seeds, as a Markdown table."""
    columns = ("accuracy", "first_accuracy", "trials", "va", "va_right", "er", "cp", "icr", "cir")
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in seeds[0]:
        cells = []
        for column in columns:
            values = [reports[name][column] for reports in seeds]
            scale = 1 if column == "trials" else 100
            middle, error, _ = verdict([scale * value for value in values]) if None not in values else (None, None, None)
            cells.append("–" if middle is None else f"{middle:.{2 if scale == 1 else 1}f} ± {error:.{2 if scale == 1 else 1}f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(seeds: list[Reports], rewards: dict[str, list[list[float]]], path: Path) -> None:
    """Four panels: accuracy by stage, reward by RL step, trials by level, accuracy by SFT trajectories."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "s2r"  # the same numbers make the same file
    from matplotlib import pyplot

    figure, ((stages, reward), (trials, data)) = pyplot.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    def bars(metric: str) -> tuple[list[float], list[float]]:
        found = [verdict([100 * reports[name][metric] for reports in seeds]) for name in STAGES]
        return [middle for middle, _, _ in found], [error for _, error, _ in found]

    for shift, metric, label in ((-0.2, "first_accuracy", "first attempt"), (0.2, "accuracy", "final")):
        height, error = bars(metric)
        stages.bar([i + shift for i in range(len(STAGES))], height, 0.4, yerr=error, label=label)
    stages.set(title="accuracy, held-out problems", ylabel="%", xticks=range(len(STAGES)), xticklabels=STAGES)
    stages.legend()
    for name, curves in rewards.items():
        reward.plot(range(1, len(curves[0]) + 1), [mean(step) for step in zip(*curves)], label=name)
    reward.set(title="mean reward of the rollouts", xlabel="RL step")
    reward.legend()
    for name in STAGES:
        levels = sorted(seeds[0][name]["by_level"])
        trials.plot(levels, [mean(r[name]["by_level"][level]["trials"] for r in seeds) for level in levels], "o-", label=name)
    trials.set(title="trials by difficulty", xlabel="level")
    trials.legend()
    sizes = {str(size): f"sft-{size}" for size in SIZES} | {"all": "sft"}
    accuracy = [[100 * reports[name]["accuracy"] for reports in seeds] for name in sizes.values()]
    data.errorbar(list(sizes), [mean(a) for a in accuracy], [verdict(a)[1] for a in accuracy], fmt="o-")
    data.set(title=f"accuracy after {SFT_STEPS} steps of SFT", xlabel="trajectories", ylabel="%")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/findings", help="where the runs go, a folder a seed [%(default)s]")
    parser.add_argument("--seeds", default=3, type=int, help="how many, two or more [%(default)s]")
    parser.add_argument("--out", default="docs/findings", help="table and figure: OUT.md, OUT.svg [%(default)s]")
    parser.add_argument("--head", nargs=3, metavar=("N", "IN", "OUT"), help="copy the first N rows of a file, and stop")
    flags = parser.parse_args()
    if flags.head:
        size, source, target = flags.head
        with open(source) as lines:
            Path(target).write_text("".join(islice(lines, int(size))))
        return
    if flags.seeds < 2:
        raise ValueError(f"--seeds {flags.seeds}: a standard error needs two or more")
    names = [f"{flags.folder}/seed-{seed}" for seed in range(flags.seeds)]
    folders = {folder: stages(folder, seed) for seed, folder in enumerate(names)}
    commands = {tuple(command) for made in folders.values() for _, command in made.values()}
    for _ in tqdm(toy.make_all(folders), total=len(commands), desc="stages"):
        pass
    seeds, rewards = [], {"rl-outcome": [], "rl-process": []}
    for folder, made in folders.items():
        reports = [Path(output) for output in made if output.endswith(".json")]
        seeds.append({path.stem: json.loads(path.read_text()) for path in reports})
        for name, curves in rewards.items():
            log = Path(folder, name, "log.jsonl").read_text().splitlines()
            curves.append([json.loads(row)["reward"] for row in log])
    text = f"{report(seeds)}\n\n{models(seeds)}\n"
    print(f"\n{text}")
    Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    origin = f"`python -m s2r.findings --seeds {flags.seeds}`, commit {commit or 'unknown'}."
    Path(f"{flags.out}.md").write_text(f"# The paper's findings in the toy world\n\n{origin}\n\n{text}")
    try:
        plot(seeds, rewards, Path(f"{flags.out}.svg"))
    except ImportError:
        print("no figure: pip install matplotlib")


if __name__ == "__main__":
    runtime.command(main)
