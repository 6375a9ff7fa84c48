"""docs/real_model.sh: every command it runs is one that the scripts accept, and it resumes after a stop at any of them."""

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import pytest
from conftest import ROOT
from test_docs import module

from s2r.run.flags import from_command_line
from s2r.view.report import COLUMNS, interval, mcnemar, table

# Stands in for python: records the words, makes what the command would make, and ends like a killed one when told to.
STUB = r"""#!/bin/sh
printf '%s\037' "$@" >> log
echo >> log
[ "$(wc -l < log)" -eq "$KILL_AT" ] && kill -9 $$
while [ $# -gt 0 ]; do
  case $1 in
    --out | --report) case ${2##*/} in *.*) mkdir -p "${2%/*}"; : >> "$2" ;; *) mkdir -p "$2" ;; esac ;;
    --folder) mkdir -p "$2"; for name in sft rl test; do : >> "$2/$name.jsonl"; done ;;
  esac
  shift
done
exit 0
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def run(kill_at: int = 0, folder: str = "a folder") -> tuple[int, list[list[str]]]:
        """Status of the script and the commands that it ran."""
        Path("log").unlink(missing_ok=True)
        command = ["sh", str(ROOT / "docs" / "real_model.sh"), "MODEL", "asdiv.jsonl", folder, "7", "bfloat16"]
        status = subprocess.run(command, env=os.environ | {"KILL_AT": str(kill_at)}).returncode
        return status, [line.split("\x1f")[:-1] for line in Path("log").read_text().split("\n")[:-1]]

    return run


def test_every_command_is_one_that_its_script_accepts(run):
    status, commands = run()
    assert status == 0 and len(commands) > 20
    for words in commands:
        name, argv = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        cfg = from_command_line(module(name).Config, argv)
        seed = {"s2r.stage0.arithmetic": 8, "s2r.stage0.verifications": 0}.get(name, 7)  # the rule has no use for one
        assert getattr(cfg, "seed", seed) == seed, words
    trained = {words[words.index("--out") + 1]: words for words in commands if words[0].startswith("train")}
    assert set(trained) == {f"a folder/{name}" for name in "warm-2 warm sft rl-outcome rl-process rl-warm warm-plus sft-plus sft-more".split()}
    assert all(words[words.index("--seed") + 1] == "7" and "--resume" in words for words in trained.values())


def test_a_killed_run_goes_on_with_the_command_that_was_killed(run):
    """Before it at most one command runs again, which resumes by itself; afterwards all that was left, in order."""
    _, whole = run(folder="whole")
    tables = sum("s2r.view.report" in words or "s2r.stage0.audit" in words for words in whole)  # printed each time
    last = len(whole) - tables
    trained = [number for number, words in enumerate(whole, start=1) if words[0].startswith("train")]
    for at in sorted({*range(1, last, 5), *trained, last}):
        status, before = run(kill_at=at, folder=f"{at}")
        again, after = run(folder=f"{at}")
        expected = json.loads(json.dumps(whole).replace("whole", f"{at}"))
        assert status != 0 and again == 0 and before == expected[:at]
        start = after.index(expected[at - 1])
        assert after[start:] == expected[at - 1 :] and start <= 1
        assert all("--resume" in words or "s2r.stage0.verifications" in words for words in after[:start])


def test_usage(run):
    done = subprocess.run(["sh", str(ROOT / "docs" / "real_model.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage:")


MODELS = {
    "base": "after practice",
    "warm": "warm-up",
    "rl-warm": "warm-up + outcome-level RL (control)",
    "warm-plus": "warm-up, {} epochs (control)",
    "sft": "+ SFT",
    "sft-plus": "+ SFT, {} epochs (control)",
    "sft-more": "+ SFT on RL's problems (control)",
    "rl-outcome": "+ SFT + outcome-level RL",
    "rl-process": "+ SFT + process-level RL",
}
EPOCHS = {  # by settings
    "first": {"warm-plus": 5, "sft-plus": 3},
    "second": {"warm-plus": 7, "sft-plus": 6},
    "third": {"warm-plus": 9, "sft-plus": 6},
}
DIFFERENCES = {
    "SFT against its own first attempts": ("sft", "sft"),
    "SFT against more warm-up": ("warm-plus", "sft"),
    "more SFT against SFT": ("sft", "sft-plus"),
    "SFT on RL's problems against SFT": ("sft", "sft-more"),
    "outcome level against SFT": ("sft", "rl-outcome"),
    "outcome level against more SFT": ("sft-plus", "rl-outcome"),
    "outcome level against SFT on RL's problems": ("sft-more", "rl-outcome"),
    "outcome level against more warm-up": ("warm-plus", "rl-outcome"),
    "outcome level against the same without checks": ("rl-warm", "rl-outcome"),
    "process level against SFT": ("sft", "rl-process"),
    "process level against more SFT": ("sft-plus", "rl-process"),
    "process level against SFT on RL's problems": ("sft-more", "rl-process"),
    "process level against outcome level": ("rl-outcome", "rl-process"),
}


def report(folder: str, name: str) -> dict:
    return json.loads((ROOT / "docs" / "real" / folder / f"{name}.json").read_text())


def model_row(text: str, seeds: list[dict]) -> str:
    """A line of a table of models: means over the seeds, and the accuracy of each."""
    values = {key: [one[key] for one in seeds] for key in COLUMNS}
    means = {key: None if None in value else mean(value) for key, value in values.items()}
    accuracy, *cells = re.split(" {2,}", table({"": means | {"by_level": {}}}).splitlines()[1].strip())
    del cells[5]  # CP, which the page leaves out
    each = f" ({', '.join(f'{100 * value:.1f}' for value in values['accuracy'])})" if len(seeds) > 1 else ""
    return f"| {text} | {accuracy}{each} | {' | '.join(cells)} |"


def difference(before: dict, after: dict) -> tuple[float, str]:
    """Points of accuracy by which a model is better, and what stands behind them in brackets."""
    if before is after:  # its last answers against its first ones
        n, first = after["responses"], after["first_accuracy"]
        gained, lost = round(after["icr"] * (1 - first) * n), round(after["cir"] * first * n)
        p = mcnemar("1" * gained + "0" * lost, "0" * gained + "1" * lost)[2]
        points = 100 * (gained - lost) / n
        return points, f" ({gained}, {lost}, {p:.2g})" if n == len(after["right"]) else ""
    n = after["responses"] / len(after["right"])
    points, half = interval([100 * (int(y) - int(x)) / n for x, y in zip(before["right"], after["right"], strict=True)])
    if n > 1:
        return points, f" ± {half:.1f}"
    return points, " ({}, {}, {:.2g})".format(*mcnemar(after["right"], before["right"]))


def difference_row(text: str, pairs: list[tuple[dict, dict]]) -> str:
    """A line of a table of differences: each seed's, and the mean over the seeds if there are three or more."""
    found = [difference(*pair) for pair in pairs]
    cells = [f"{points:+.1f}{bracket}" for points, bracket in found]
    if len(pairs) > 2:  # an interval over two says nothing
        cells.insert(0, "{:+.1f} ± {:.1f}".format(*interval([points for points, _ in found])))
    return f"| {text} | {' | '.join(cells)} |"


def expected_rows(settings: str, seeds: list[int], shown: Sequence[str] = ()) -> list[str]:
    """Those of the models that every one of the seeds has a report of; without those that another table has `shown`."""
    rows = []
    for kind in ("", ".sampled"):
        there = [{file.name for file in (ROOT / "docs" / "real" / f"seed-{seed}").iterdir()} for seed in seeds]
        names = [name for name in MODELS if f"{name}{kind}.json" in set.intersection(*there)]
        models = {name: [report(f"seed-{seed}", name + kind) for seed in seeds] for name in names}
        rows += [model_row(MODELS[name].format(EPOCHS[settings].get(name)), models[name]) for name in names if name not in shown]
        pairs = {text: (x, y) for text, (x, y) in DIFFERENCES.items() if {x, y} <= models.keys() and not {x, y} <= set(shown)}
        rows += [difference_row(text, list(zip(models[x], models[y]))) for text, (x, y) in pairs.items()]
    return rows


def expected_rows_of_seed_100() -> list[str]:
    models = {
        "warm": "warm-up, 4 epochs",
        "sft-early": "+ SFT from 2 epochs of warm-up",
        "sft": "+ SFT from 4 epochs of warm-up",
        "rl-process-24": "+ process-level RL, 24 steps",
        "rl-process-48": "+ process-level RL, 48 steps",
    }
    kinds = {".rl-problems": "RL problems", "": "test", ".sampled": "test, sampled"}
    return [
        model_row(f"{text}, {what}", [report("trial/seed-100", name + kind)])
        for name, text in models.items()
        for kind, what in kinds.items()
        if (ROOT / "docs" / "real" / "trial" / "seed-100" / f"{name}{kind}.json").exists()
    ]


def rows(page: str, first: str, last: str) -> list[str]:
    """The rows of the tables from one heading of a page to another, without those that name the columns."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"## {first}")[2]
    lines = (text.partition(f"## {last}")[0] if last else text).splitlines()
    return [line for line in lines if line.startswith("| ") and not line.startswith(("| seed", "| difference"))]


def test_the_tables_of_the_pages_are_what_the_kept_reports_give():
    reinforced = ["warm", "rl-warm", "sft", "rl-outcome", "rl-process"]
    third = expected_rows("third", [4, 5, 7, 8, 9]) + expected_rows("third", [7, 8, 9], reinforced)
    assert rows("real_model.md", "Result", "The checks") == third
    assert rows("real_settings.md", "Results with the first", "Results with the second") == expected_rows("first", [0, 1, 2])
    assert rows("real_settings.md", "Results with the second", "Trials for") == expected_rows("second", [3])
    assert rows("real_settings.md", "Trials for", "") == expected_rows_of_seed_100()


@pytest.mark.parametrize("text, kind, value", [
    ("first answer right", ".sampled", lambda one: one["first_accuracy"]),
    ("added by corrections", ".sampled", lambda one: one["accuracy"] - one["first_accuracy"]),
    ("one of four answers right (pass@4)", ".sampled", lambda one: one["pass_at_k"]["4"]),
    ("greedy", "", lambda one: one["va_by_trial"]["1"]),
    ("sampled", ".sampled", lambda one: one["va_by_trial"]["1"]),
])  # fmt: skip
def test_a_row_with_every_seed_is_what_the_kept_reports_give(text, kind, value):
    names = [f"{name}{kind}" for name in ("sft", "rl-outcome", "rl-process")]
    models = [[value(report(f"seed-{seed}", name)) for seed in (4, 5, 7, 8, 9)] for name in names]
    cells = [", ".join(f"{100 * each:.1f}" for each in seeds).replace("-", "−") for seeds in models]
    assert f"  | {text} | {' | '.join(cells)} |\n" in (ROOT / "docs" / "real_model.md").read_text(encoding="utf-8")
