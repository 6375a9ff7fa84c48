"""docs/forks: every diff applies to a copy of this tree, its own tests pass there, and it trains two steps."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

from s2r.toy.findings import cell, value
from tiny_model import problem_file

FORKS = ROOT / "docs" / "forks"
PAGES = sorted(page for page in FORKS.glob("*.md") if page.name != "README.md")
COLUMNS = {"final": "accuracy", "first": "first_accuracy", "trials": "trials", "VA": "va", "VA on right": "va_right",
           "VA on wrong": "er", "ICR": "icr", "CIR": "cir", "repeats": "repeats", "finished": "finished",
           "unchecked": "unchecked", "pass@4": "pass_at_k.4",
           **{f"check {k}": f"va_by_trial.{k}" for k in "1234"}}  # fmt: skip
TWO_STEPS = """--problems 2 --rollouts 2 --updates 1 --steps 2 --lr 1e-3 --max-new-tokens 32 --tokens-per-microbatch 512
    --device cpu""".split()

TRY = """
import json, sys
import pytest
tests, trainings = map(json.loads, sys.argv[1:])
for words in tests:
    assert pytest.main(["-q", *words]) == 0
import train_rl
from s2r.run.flags import from_command_line
for argv in trainings:
    train_rl.main(from_command_line(train_rl.Config, argv))
"""  # in one process: most of its time is that of importing torch


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tried(request, tmp_path_factory, base):
    """page -> its fork being tried; as many at a time as there are cores, because each is a row of short processes."""
    asked = [item.callspec.params["page"] for item in request.session.items if "fork_applies" in item.name]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {page: pool.submit(try_fork, page, tmp_path_factory.mktemp(page.stem), base) for page in asked}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_fork_applies_its_tests_pass_and_it_trains(page, tried):
    tried[page].result()


def try_fork(page: Path, folder: Path, base: Path) -> None:
    text, tree = page.read_text(encoding="utf-8"), folder / "tree"
    for name in ("s2r", "kernels", "tests", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, tree)
    run("git", "apply", page, cwd=tree)
    tests = re.findall(r"^python -m pytest (.*)", text, re.MULTILINE)
    runs = re.findall(r"^sh docs/forks/run.sh (\S+)(.*)", text, re.MULTILINE)
    assert tests and runs, "the page names no test, or no run"
    common = ["--model", str(base), "--data", str(problem_file(folder / "problems.jsonl")), *TWO_STEPS]
    trainings = [[*common, "--out", str(folder / name), *flags.split("#")[0].split()] for name, flags in runs]
    tests = [words.split() for words in tests]
    run(sys.executable, "-c", TRY, json.dumps(tests), json.dumps(trainings), cwd=tree)
    for name, _ in runs:
        assert len((folder / name / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_fork_states_its_lines(page):
    """Lines added and removed, those of tests not counted; the page and the table of docs/forks/README.md say them."""
    text = page.read_text(encoding="utf-8")
    files = re.split(r"^diff --git ", re.search(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1], flags=re.MULTILINE)
    code = "\n".join(file.split("\n@@", 1)[1] for file in files if file and not file.startswith("a/tests/"))
    added, removed = (len(re.findall(rf"^{sign}", code, re.MULTILINE)) for sign in (r"\+", "-"))
    stated = f"+{added} −{removed}"
    assert stated in text
    assert re.search(rf"\({page.name}\).*{re.escape(stated)}", (FORKS / "README.md").read_text(encoding="utf-8"))


def reports(model: str, seeds: range) -> list[dict]:
    """The kept reports of a model."""
    parts = ("findings", "findings/sampled", "forks")
    folders = [ROOT / "docs" / part / f"seed-{seed}" for seed in seeds for part in parts]
    found = [json.loads((folder / f"{model}.json").read_text()) for folder in folders if (folder / f"{model}.json").exists()]
    assert len(found) == len(seeds), model
    return found


TABLES = [*PAGES, FORKS / "README.md", ROOT / "docs" / "running.md", ROOT / "docs" / "findings" / "sampled.md"]


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.stem)
def test_measured_numbers_are_those_of_the_reports(page):
    """Rows of a table name their report: mean ± half of the 95 % interval over seeds 0 to 2 or those named, or a number each.

    A column "− `model`" has the differences of the final accuracies.
    """
    for table in re.findall(r"^\| toy, .*\n(?:\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
        named = re.match(r"[^|]*\|[^|]*seeds (\d) to (\d)", table)
        seeds = range(int(named[1]), int(named[2]) + 1) if named else range(3)
        (_, *names), _, *rows = [[part.strip() for part in line.strip("|").split("|")] for line in table.splitlines()]
        assert rows
        for model, *found in rows:
            measured = reports(re.search(r"`(.*)`", model)[1], seeds)
            for name, number in zip(names, found, strict=True):
                less = re.fullmatch(r"− `(.*)`", name)
                values = [value(report, "accuracy" if less else COLUMNS[name]) for report in measured]
                if less:
                    gains = [x - value(report, "accuracy") for x, report in zip(values, reports(less[1], seeds))]
                    text = cell(gains, 1).replace("-", "−")
                    assert number == (("" if text.startswith("−") else "+") + text if any(gains) else "–")
                elif "," in number:
                    assert number == ", ".join(f"{x:.0f}" for x in values)
                else:
                    assert number == cell(values, 2 if name == "trials" else 1)


def test_every_kept_report_stands_in_a_table():
    text = "".join(page.read_text(encoding="utf-8") for page in (FORKS / "README.md", ROOT / "docs" / "running.md"))
    rows = set(re.findall(r"^\| [^|]*\(`([^`]*)`\) \|.* ± ", text, re.MULTILINE))
    assert {report.stem for report in FORKS.glob("seed-*/*.json")} <= rows
