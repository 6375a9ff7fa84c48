"""The findings: what each difference is, when it holds, and that every model it names is made."""

import json
import sys

import pytest

import s2r  # noqa: F401
from s2r import findings, toy

BASE = {"accuracy": 0.5, "first_accuracy": 0.5, "trials": 1.5, "va": 0.8, "va_right": 0.9, "er": 0.7, "cp": 0.9,
        "icr": 0.1, "cir": 0.02, "by_level": {"1": {"trials": 1.0}, "2": {"trials": 1.5}, "4": {"trials": 3.25}}}


def test_gain_is_in_points_and_counts_trials():
    reports = {"a": BASE, "b": BASE | {"accuracy": 0.25, "trials": 1.0}}
    assert findings.gain("accuracy", "a", "b")(reports) == 25
    assert findings.gain("trials", "a", "b")(reports) == 0.5


def test_harder_and_bias_by_hand():
    assert findings.harder("a")({"a": BASE}) == 2.25
    assert findings.bias("a")({"a": BASE}) == pytest.approx(20)


@pytest.mark.parametrize("differences, middle, error, holds", [
    ([3.0, 3.0, 6.0], 4.0, 1.0, "holds"),
    ([-3.0, -3.0, -6.0], -4.0, 1.0, "fails"),
    ([0.0, 3.0, 3.0], 2.0, 1.0, "undecided"),  # two standard errors exactly: not more
])
def test_verdict_by_hand(differences, middle, error, holds):
    found = findings.verdict(differences)
    assert found == (pytest.approx(middle), pytest.approx(error), holds)


def test_every_finding_finds_its_reports_among_the_stages():
    made = findings.stages("f", 0)
    names = [output.removeprefix("f/").removesuffix(".json") for output in made if output.endswith(".json")]
    one, two = ({name: BASE | {"accuracy": x, "va": None if name == "base" else x} for name in names} for x in (0.4, 0.6))
    assert findings.report([one, two]).count("\n") == 1 + len(findings.FINDINGS)
    assert "| base | 50.0 ± 10.0 |" in findings.models([one, two])


def test_stages_make_what_later_stages_need():
    known = set()
    for output, (needs, _) in findings.stages("f", 0).items():
        assert set(needs) <= known
        known.add(output)


def test_main_writes_table_and_figure_of_the_reports_that_are_there(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def make(output, made, log):  # what the commands would leave behind
        path = tmp_path / output
        path.parent.mkdir(parents=True, exist_ok=True)
        if output.endswith(".json"):
            path.write_text(json.dumps(BASE | {"accuracy": 0.5 + 0.01 * int(output.split("seed-")[1][0])}))
        elif "/rl-" in output:
            path.mkdir()
            (path / "log.jsonl").write_text('{"reward": 0.5}\n{"reward": 0.75}\n')

    monkeypatch.setattr(toy, "make", make)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["findings", "--seeds", "2", "--out", "out/findings"])
    findings.main()
    table = (tmp_path / "out/findings.md").read_text()
    assert "| base | 50.5 ± 0.5 |" in table and table.strip().endswith("|") and table in capsys.readouterr().out + table
    assert (tmp_path / "out/findings.svg").read_text().count("</svg>") == 1
