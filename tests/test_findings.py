"""The findings: what each difference is, when it holds, and that every model it names is made."""

import json
from pathlib import Path

import pytest

import s2r  # noqa: F401
from s2r.data import write_jsonl
from s2r.toy import findings
from s2r.toy.__main__ import PLAN, stages

BASE = {"accuracy": 0.5, "first_accuracy": 0.5, "trials": 1.5, "va": 0.8, "va_right": 0.9, "er": 0.7, "cp": 0.9,
        "icr": 0.1, "cir": 0.02, "by_level": {"1": {"trials": 1.0}, "2": {"trials": 1.5}, "4": {"trials": 3.25}}}


def test_value_is_in_per_cent_and_counts_trials():
    assert findings.value(BASE, "accuracy") == 50
    assert findings.value(BASE, "trials") == 1.5
    assert findings.value(BASE | {"va": None}, "va") is None


def test_value_harder_and_bias_by_hand():
    assert findings.value(BASE, "harder") == 2.25
    assert findings.value(BASE, "bias") == pytest.approx(20)


@pytest.mark.parametrize("differences, middle, half, holds", [
    ([4.0, 4.0, 7.0], 5.0, 4.303, "holds"),
    ([-4.0, -4.0, -7.0], -5.0, 4.303, "fails"),
    ([3.0, 3.0, 6.0], 4.0, 4.303, "undecided"),  # four standard errors above zero: not enough for three seeds
])
def test_verdict_by_hand(differences, middle, half, holds):
    found = findings.verdict(differences)
    assert found == (pytest.approx(middle), pytest.approx(half, abs=1e-3), holds)


def names() -> list[str]:
    """Of the reports that the stages make."""
    made = [makes for makes, _, _ in (*PLAN, *findings.ABLATIONS)]
    return [output.removesuffix(".json") for output in made if output.endswith(".json")]


def test_every_finding_finds_its_reports_among_the_stages():
    one, two = ({name: BASE | {"accuracy": x, "va": x if name != "base" else None} for name in names()}
                for x in (0.4, 0.6))
    assert findings.report([one, two]).count("\n") == 1 + len(findings.FINDINGS)
    assert "| base | 50.0 ± 127.1 |" in findings.models([one, two])


def test_ablations_make_what_later_stages_need():
    known = {stage.makes for stage in stages(PLAN, "f", 0)}
    for stage in stages(findings.ABLATIONS, "f", 0):
        assert set(stage.needs) <= known and stage.makes not in known
        known.add(stage.makes)


def test_main_writes_table_and_figure_of_what_the_stages_left(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def make(stages):  # what the commands would leave behind
        for stage in stages:
            path = tmp_path / stage.makes
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json":
                path.write_text(json.dumps(BASE | {"accuracy": 0.5 + 0.01 * int(stage.makes.split("seed-")[1][0])}))
            elif path.name == "trajectories.jsonl":
                write_jsonl(path, ({"row": i} for i in range(300)))
            elif path.name.startswith("rl-"):
                path.mkdir()
                (path / "log.jsonl").write_text('{"reward": 0.5}\n{"reward": 0.75}\n')

    monkeypatch.setattr(findings, "make", make)
    monkeypatch.chdir(tmp_path)
    findings.main(findings.Config(seeds=2, out="out/findings"))
    table = Path("out/findings.md").read_text()
    assert "| base | 50.5 ± 6.4 |" in table and table.strip().endswith("|")
    assert table.partition("commit")[2].partition("\n")[2].strip() in capsys.readouterr().out
    assert Path("out/findings.svg").read_text().count("</svg>") == 1
    for size, rows in zip(findings.SIZES, (50, 100, 200, 300), strict=True):
        text = Path(f"runs/findings/seed-1/trajectories-{size}.jsonl").read_text()
        assert text.count("\n") == rows


def test_main_refuses_one_seed():
    with pytest.raises(ValueError, match="--seeds 1: an interval needs two or more"):
        findings.main(findings.Config(seeds=1))
