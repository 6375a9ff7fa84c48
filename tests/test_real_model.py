"""docs/real_model.sh: every command it runs is one that the scripts accept, and it resumes after a stop at any of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_docs import module

from s2r.run.flags import from_command_line
from s2r.view.report import table

# Stands in for python: records the words, makes what the command would make, and ends like a killed one when told to.
STUB = """
import json, os, sys
from pathlib import Path
words, log = sys.argv[1:], Path("log")
log.open("a").write(json.dumps(words) + "\\n")
if len(log.read_text().splitlines()) == int(os.environ["KILL_AT"]):
    os.kill(os.getpid(), 9)
flags = dict(zip(words, words[1:]))
made = [flags[name] for name in ("--out", "--report") if name in flags]
made += [flags["--folder"] + "/" + name for name in ("sft.jsonl", "rl.jsonl", "test.jsonl") if "--folder" in flags]
for path in map(Path, made):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch() if path.suffix else path.mkdir(exist_ok=True)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/stub.py "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def run(kill_at: int = 0, folder: str = "a folder") -> tuple[int, list[list[str]]]:
        """Status of the script and the commands that it ran."""
        Path("log").unlink(missing_ok=True)
        command = ["sh", str(ROOT / "docs" / "real_model.sh"), "MODEL", "asdiv.jsonl", folder, "7", "bfloat16"]
        status = subprocess.run(command, env=os.environ | {"KILL_AT": str(kill_at)}).returncode
        return status, [json.loads(line) for line in Path("log").read_text().splitlines()]

    return run


def test_every_command_is_one_that_its_script_accepts(run):
    status, commands = run()
    assert status == 0 and len(commands) > 20
    for words in commands:
        name, argv = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        cfg = from_command_line(module(name).Config, argv)
        assert getattr(cfg, "seed", 7) in (7, 8, 0)  # 8: of the calculations
    trained = {words[words.index("--out") + 1]: words for words in commands if words[0].startswith("train")}
    assert set(trained) == {f"a folder/{name}" for name in "warm sft rl-outcome rl-process warm-plus sft-plus".split()}
    assert all(words[words.index("--seed") + 1] == "7" and "--resume" in words for words in trained.values())


def test_a_killed_run_goes_on_with_the_command_that_was_killed(run):
    """Before it at most one command runs again, which resumes by itself; afterwards all that was left, in order."""
    _, whole = run(folder="whole")
    tables = sum("s2r.view.report" in words or "s2r.stage0.audit" in words for words in whole)  # printed each time
    for at in range(1, len(whole) - tables + 1):
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


def test_the_tables_of_the_page_are_what_the_kept_reports_give():
    names = "base warm warm-plus sft sft-plus rl-outcome rl-process".split()
    page = (ROOT / "docs" / "real_model.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| seed 0 \| final.*\n.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    for kind, models, lines in zip(("", ".sampled"), (names, names[1:]), tables, strict=True):
        for name, line in zip(models, lines.splitlines(), strict=True):
            report = json.loads((ROOT / "docs" / "real" / "seed-0" / f"{name}{kind}.json").read_text())
            cells = re.split(" {2,}", table({name: report}).splitlines()[1])
            del cells[7]  # CP, which the page leaves out
            assert line.replace("± ", "±").strip("| ").split(" | ")[1:] == cells[1:], name
