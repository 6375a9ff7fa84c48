"""The paper's qualitative findings, and controls, in the toy world over several seeds. `PAGE` says what is compared.

    python -m s2r.toy.findings               20 minutes a seed on two cores; what is made is not made again

A seed has its own problems, samples and training runs; the base model is the same. Settings were chosen on seed 100.
The reports of a seed go to docs/findings/seed-N, small files that are kept. A seed that is there is not run again.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from s2r.data import read_jsonl
from s2r.run.files import check_output, write_jsonl
from s2r.run.flags import check, start
from s2r.run.stages import make
from s2r.stage0.audit import mark
from s2r.toy.__main__ import BASE, BUILD, LONGEST, MODELS, PLAN, RL, SFT, Plan, evaluation, stages
from s2r.toy.audit import fault
from s2r.toy.world import problems
from s2r.view.report import interval, mcnemar

PAGE = """\
# The paper's findings in the toy world

Which of the paper's qualitative findings hold in the toy world? Every number is mean ± half the width of the
95 % interval over {seeds} seeds (t distribution). Each row is a difference, positive if its claim is true. It holds
if its interval lies above zero, fails if its interval lies below, and is undecided otherwise. The last column counts
seeds whose gain or loss is significant by itself: McNemar's test on the same 1,000 problems, p < 0.05, two-sided.
One base model serves all seeds, so the intervals leave its variation out. Of {findings} intervals about one can be
expected to miss its true value by chance. Offline RL uses the settings of online RL; none were chosen for it. It has no
KL term.

The paper's numbers are those of Qwen2.5-Math-7B on MATH500; the arrow leads to the model that the claim is about.
Fractions are in per cent. `s2r/metrics.py` explains the columns. `sound` is the fraction of true verdicts whose check
is right for the right reason (`s2r/toy/audit.py`), `no_verdict` the fraction of checks that have no verdict, which `va`
counts as untrue, and `unchecked` the fraction of right first answers that end the response.
Made by `python -m s2r.toy.findings --seeds {seeds}`, commits {commits}. [What was tried before](findings/settled.md).
All answers here are greedy, but for the votes. [Sampled answers of five more seeds](findings/sampled.md) gain more from checks.
"""
ALL = """All models:

- `sft-plus`, the control of RL: SFT for at least as many updates as SFT and RL. `sft-more`: SFT for as many updates on
  trajectories from twice the problems. `sft-200`: SFT for the updates of `sft` on 200 trajectories.
- `sft-unmasked`: wrong solves are targets too. `sft-solving`: the checks solve the problem again.
- `rl-solve-only`: outcome RL of the base, whose answers have no checks. `offline-…`: offline RL (App. F) of `sft`.
- `base-majority` and `base-checked`: several answers of the base model to each problem, together as many tokens as a mean
  response after outcome RL. The first takes the most frequent answer. The second is right if one of them is, as if a
  perfect checker chose."""
LENGTH = f"Accuracy if only the first k trials count. {LONGEST} tokens, the limit, admit 7 trials with five gaps."
LEVEL = "Accuracy and trials by level, which is the number of gaps less 1."
AUDIT = "Fraction of sound checks among those with a true verdict: first checks of a response, second ones, and so on."

# Claim, the paper's numbers, the value compared, the models with more and with less of it (of several, their sum).
FINDINGS = (
    ("SFT beats the base: accuracy", "51.0 → 81.6", "accuracy", "sft", "base"),
    ("outcome RL beats SFT: accuracy", "81.6 → 84.4", "accuracy", "rl-outcome", "sft"),
    ("process RL beats SFT: accuracy", "81.6 → 83.4", "accuracy", "rl-process", "sft"),
    ("control: outcome RL beats sft-plus: accuracy", "–", "accuracy", "rl-outcome", "sft-plus"),
    ("control: process RL beats sft-plus: accuracy", "–", "accuracy", "rl-process", "sft-plus"),
    ("control: outcome RL beats SFT on twice the trajectories: accuracy", "–", "accuracy", "rl-outcome", "sft-more"),
    ("control: outcome RL gains more over SFT than RL without checks over the base: accuracy", "–", "accuracy",
     "rl-outcome base", "sft rl-solve-only"),
    ("control: outcome RL beats a majority vote of the base, equal tokens", "–", "accuracy", "rl-outcome",
     "base-majority"),
    ("control: outcome RL beats base samples with a perfect checker, equal tokens", "–", "accuracy", "rl-outcome",
     "base-checked"),
    ("masked SFT beats unmasked: accuracy", "–", "accuracy", "sft", "sft-unmasked"),
    ("more trials on harder problems, after outcome RL: five gaps − two gaps (paper: level 1 → 5)", "1.05 → 2.15",
     "harder", "rl-outcome", ""),
    ("outcome RL raises ICR", "6.5 → 13.6", "icr", "rl-outcome", "sft"),
    ("process RL raises ICR", "6.5 → 12.2", "icr", "rl-process", "sft"),
    ("outcome RL lowers CIR (drop)", "2.0 → 1.0", "cir", "sft", "rl-outcome"),
    ("process RL lowers CIR (drop)", "2.0 → 1.5", "cir", "sft", "rl-process"),
    ("process RL raises VA", "61.6 → 74.6", "va", "rl-process", "sft"),
    ("VA is higher after process than after outcome RL", "66.5 → 74.6", "va", "rl-process", "rl-outcome"),
    ("CP is higher after process than after outcome RL", "87.9 → 90.3", "cp", "rl-process", "rl-outcome"),
    ("accuracy is higher after outcome than after process RL", "83.4 → 84.4", "accuracy", "rl-outcome", "rl-process"),
    ("offline, process beats outcome level: accuracy", "–", "accuracy", "offline-process", "offline-outcome"),
    ("offline process RL beats SFT: accuracy", "81.6 → 83.4", "accuracy", "offline-process", "sft"),
    ("checks that solve the problem again lean towards “correct”: (VA on right − VA on wrong answers), sft-solving − sft",
     "14.8 → 34.5", "bias", "sft-solving", "sft"),
    ("more SFT data help, at equal steps: all trajectories against 200", "–", "accuracy", "sft", "sft-200"),
)  # fmt: skip
# What the findings need beyond the toy's own plan.
TRAINED = (
    ("rl-solve-only", "", f"{RL.replace('F/sft', BASE)} --data F/train.jsonl --level outcome"),
    ("sft-unmasked", "", f"{SFT} --data F/trajectories.jsonl --epochs 5 --unmasked"),
    ("sft-solving", "trajectories-solving.jsonl", f"{SFT} --data F/trajectories-solving.jsonl --epochs 5"),
    *[(f"offline-{level}", "sft.rollouts.jsonl", f"{RL} --offline F/sft.rollouts.jsonl --level {level}")
      for level in ("outcome", "process")],
    ("sft-200", "", f"{SFT} --data F/trajectories-200.jsonl --epochs 46"),  # about as many updates as SFT
    ("sft-more", "more.trajectories.jsonl", f"{SFT} --data F/more.trajectories.jsonl --epochs 3"),  # about as many as sft-plus
)  # fmt: skip
ABLATIONS: Plan = (
    ("verifications-solving.jsonl", "", """-m s2r.toy.world --style solving --rollouts F/base.rollouts.jsonl
        --out F/verifications-solving.jsonl"""),
    ("trajectories-solving.jsonl", "verifications-solving.jsonl",
        f"{BUILD} --verifications F/verifications-solving.jsonl --out F/trajectories-solving.jsonl"),
    ("sft.rollouts.jsonl", "", f"""sample.py --device cpu --model F/sft --data F/train.jsonl --out F/sft.rollouts.jsonl
        --limit 1000 --n 8 --temperature 0.7 --max-new-tokens {LONGEST} --show 0"""),
    ("more.rollouts.jsonl", "", f"""sample.py --device cpu --model {BASE} --data F/more.jsonl
        --out F/more.rollouts.jsonl --n 5 --temperature 0.7 --max-new-tokens 32 --show 0"""),
    ("more.verifications.jsonl", "more.rollouts.jsonl",
        "-m s2r.toy.world --rollouts F/more.rollouts.jsonl --out F/more.verifications.jsonl"),
    ("more.trajectories.jsonl", "more.verifications.jsonl", """-m s2r.stage0.build --rollouts F/more.rollouts.jsonl
        --verifications F/more.verifications.jsonl --out F/more.trajectories.jsonl"""),
    ("base.votes.jsonl", "", f"""sample.py --device cpu --model {BASE} --data F/test.jsonl --out F/base.votes.jsonl
        --n 32 --temperature 0.7 --max-new-tokens 32 --show 0"""),
    *[(name, needs, f"{command} --out F/{name}") for name, needs, command in TRAINED],
    *[evaluation(name) for name, _, _ in TRAINED],
)  # fmt: skip
REPORTS = (*MODELS, *(name for name, _, _ in TRAINED))  # of sample.py


CHECKING = tuple(name for name in REPORTS if not name.startswith(("base", "rl-solve")))
VOTES = ("base-majority", "base-checked")
TABLES = (  # what a table shows, its rows, its columns as `value` takes them
    (ALL, (*REPORTS, *VOTES), "accuracy first_accuracy trials va va_right er cp icr cir no_verdict sound unchecked finished tokens"),
    (LENGTH, CHECKING, "after.1 after.2 after.4 after.8"),
    (LEVEL, MODELS, " ".join(f"by_level.{level}.{name}" for name in ("accuracy", "trials") for level in (1, 2, 3, 4))),
    (AUDIT, CHECKING, " ".join(f"sound_by_trial.{number}" for number in (1, 2, 3, 4))),
)


def extended(report: dict, rows: list[dict]) -> dict:
    """A report with more about its rollouts.

    "after": accuracy if only the first k solves count, by k. "unchecked": fraction of right first solves that end the
    response. "sound…": the audit.
    """
    solves = [[action["reward"] > 0 for action in row["actions"] if action["kind"] == "solve"] for row in rows]
    for right, row in zip(solves, rows):
        if right:
            right[-1] = row["reward"] > 0  # R_o: the R_a of a right solve is −1 where the limit cut it off
    after = {str(k): mean(bool(row) and row[min(k, len(row)) - 1] for row in solves) for k in (1, 2, 4, 8)}
    unchecked = [len(row["actions"]) == 1 for row, right in zip(rows, solves) if right[:1] == [True]]
    faults = mark(rows, fault)
    total = sum(faults.values(), Counter())
    return report | {
        "after": after, "unchecked": mean(unchecked) if unchecked else None,
        "sound": total[""] / total.total() if total else None,
        "sound_by_trial": {str(number): count[""] / count.total() for number, count in sorted(faults.items())},
    }  # fmt: skip


def voted(rows: list[dict], tokens: float) -> dict[str, dict]:
    """Reports of k answers of the base model per problem; k of them have at most so many tokens in the mean."""
    problems = defaultdict(list)
    for row in rows:
        problems[row["unique_id"]].append((row["actions"][0].get("answer"), row["reward"] > 0))
    length = mean(len(row["ids"]) for row in rows)
    k = min(int(tokens / length), *map(len, problems.values()))
    first = [samples[:k] for samples in problems.values()]
    # A tie goes to the earlier answer; a sample without one has no vote.
    given = [Counter(sample for sample in row if sample[0] is not None).most_common(1) for row in first]
    most = [bool(row) and row[0][0][1] for row in given]
    found = zip(VOTES, (most, [any(right for _, right in row) for row in first]))
    return {name: {"accuracy": mean(r), "right": "".join("01"[x] for x in r), "tokens": k * length, "k": k}
            for name, r in found}  # fmt: skip


def reports(folder: str) -> dict[str, dict]:
    """Reports of all models of a seed, from what the stages left in its folder."""
    found = {name: json.loads(Path(folder, f"{name}.json").read_text()) for name in REPORTS}
    found = {name: extended(report, read_jsonl(f"{folder}/{name}.test.jsonl")) for name, report in found.items()}
    return found | voted(read_jsonl(f"{folder}/base.votes.jsonl"), found["rl-outcome"]["tokens"])


def value(report: dict, name: str) -> float | None:
    """A number of a report, fractions in per cent; None where the report has none. A dot leads into a part of it.

    "harder": trials with five gaps less those with two. "bias": VA on right less VA on wrong answers.
    """
    if name == "harder":
        return report["by_level"]["4"]["trials"] - report["by_level"]["1"]["trials"]
    if name == "bias":
        return 100 * (report["va_right"] - report["er"])
    found = report
    for key in name.split("."):
        found = (found or {}).get(key)
    return found if found is None or name.endswith(("trials", "tokens")) else 100 * found


def cell(values: list[float | None], digits: int) -> str:
    return "–" if None in values else "{:.{d}f} ± {:.{d}f}".format(*interval(values), d=digits)


def grid(lines: list[list[str]]) -> str:
    """A Markdown table; the first line is its head."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])


def page(seeds: list[dict[str, dict]]) -> str:
    """PAGE and its tables, of the models that every seed has; `seeds` holds for each: name of a model -> its report."""
    made = set.intersection(*map(set, seeds))
    findings = [["finding", "paper", "toy: difference", "holds?", "seeds significant"]]
    for claim, paper, name, more, less in [row for row in FINDINGS if {*row[3].split(), *row[4].split()} <= made]:
        differences = [
            sum(value(r[model], name) for model in more.split()) - sum(value(r[model], name) for model in less.split())
            for r in seeds
        ]
        middle, half = interval(differences)
        holds = "holds" if middle > half else "fails" if middle < -half else "undecided"
        paired = name == "accuracy" and {more, less} <= made  # one model with one
        tests = [mcnemar(r[more]["right"], r[less]["right"]) for r in seeds] if paired else []
        up, down = (sum(p < 0.05 and sign * (gained - lost) > 0 for gained, lost, p in tests) for sign in (1, -1))
        findings.append([claim, paper, f"{middle:+.2f} ± {half:.2f}", holds, f"{up} up, {down} down" if tests else ""])
    commits = ", ".join(sorted({report["commit"][:7] for r in seeds for report in r.values()}))
    parts = [PAGE.format(seeds=len(seeds), commits=commits, findings=len(findings) - 1) + "\n" + grid(findings)]
    for text, models, names in TABLES:
        lines = [["", *names.split()]]
        for model in filter(made.__contains__, models):
            columns = [[value(r[model], name) for r in seeds] for name in names.split()]
            digits = [2 if name.endswith("trials") else 0 if name == "tokens" else 1 for name in names.split()]
            lines.append([model, *map(cell, columns, digits)])
        parts.append(text + "\n\n" + grid(lines))
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Config:
    folder: str = "runs/findings"  # where the runs go, a folder for each seed
    seeds: int = 5  # how many, two or more
    out: str = "docs/findings.md"  # page to write, Markdown; the reports go to the folder of this name


def main(cfg: Config) -> None:
    check(cfg)
    if cfg.seeds < 2:
        raise ValueError(f"--seeds {cfg.seeds}: an interval needs two or more")
    if not cfg.out.endswith(".md"):
        raise ValueError(f"--out {cfg.out}: give a name that ends in .md")
    check_output(cfg.out)
    kept = [Path(cfg.out).with_suffix("") / f"seed-{seed}" for seed in range(cfg.seeds)]
    folders = {seed: f"{cfg.folder}/seed-{seed}" for seed, path in enumerate(kept)
               if not all((path / f"{name}.json").exists() for name in TABLES[0][1])}  # fmt: skip
    make([stage for seed, folder in folders.items() for stage in stages(PLAN, folder, seed)])
    for seed, folder in folders.items():
        write_jsonl(f"{folder}/trajectories-200.jsonl", read_jsonl(f"{folder}/trajectories.jsonl")[:200])
        write_jsonl(f"{folder}/more.jsonl", problems("train", 8000, seed))  # the 4,000 of train.jsonl and 4,000 others
    for seed, folder in folders.items():
        make(stages(ABLATIONS, folder, seed))
        kept[seed].mkdir(parents=True, exist_ok=True)
        for name, report in reports(folder).items():
            run = Path(folder, name if name in REPORTS[1:] else "sft", "run.json")  # the base has none
            report["commit"] = json.loads(run.read_text())["commit"]
            (kept[seed] / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    seeds = [{path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")} for folder in kept]
    text = page(seeds)
    print(f"\n{text}")
    Path(cfg.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    start(main, Config)
