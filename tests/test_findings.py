"""The findings: what each difference is, when it holds, and that every model it names is made."""

import json
from pathlib import Path

import pytest

import s2r  # noqa: F401
from s2r.data import read_jsonl, write_jsonl
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


def names() -> list[str]:
    """Of the reports that the stages make."""
    made = [makes for makes, _, _ in (*PLAN, *findings.ABLATIONS)]
    return [output.removesuffix(".json") for output in made if output.endswith(".json")]


@pytest.mark.parametrize("differences, shown", [  # per cent, one per seed
    ([4, 4, 7], "+5.00 ± 4.30 | holds |"),
    ([-4, -4, -7], "-5.00 ± 4.30 | fails |"),
    ([3, 3, 6], "+4.00 ± 4.30 | undecided |"),  # four standard errors above zero: not enough for three seeds
])
def test_page_judges_a_difference_by_its_interval(differences, shown):
    seeds = [{name: BASE | {"accuracy": 0.5} for name in names()} for _ in differences]
    for reports, difference in zip(seeds, differences):
        reports["sft"] = BASE | {"accuracy": 0.5 + difference / 100}
    assert f"| SFT beats the base: accuracy | 51.0 → 81.6 | {shown}\n" in findings.page(seeds, "abc")


def test_page_finds_every_report_among_the_stages():
    seeds = [{name: BASE | {"accuracy": x, "va": x if name != "base" else None} for name in names()}
             for x in (0.4, 0.6)]
    text = findings.page(seeds, "abc")
    assert "over 2 seeds" in text and "--seeds 2`, commit abc." in text
    assert "\n| base | 50.0 ± 127.1 | 50.0 ± 0.0 | 1.50 ± 0.00 | – | 90.0" in text
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(tables) == 2 + len(findings.FINDINGS) + len(names())


def test_ablations_make_what_later_stages_need():
    known = {stage.makes for stage in stages(PLAN, "f", 0)}
    for stage in stages(findings.ABLATIONS, "f", 0):
        assert set(stage.needs) <= known and stage.makes not in known
        known.add(stage.makes)


def test_main_writes_a_page_of_what_the_stages_left(tmp_path, monkeypatch, capsys):
    def make(stages):  # what the commands would leave behind
        for stage in stages:
            path = tmp_path / stage.makes
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json":
                path.write_text(json.dumps(BASE | {"accuracy": 0.5 + 0.01 * int(stage.makes.split("seed-")[1][0])}))
            elif path.name == "trajectories.jsonl":
                write_jsonl(path, ({"row": i} for i in range(300)))
            elif path.name == "sft":
                path.mkdir()
                (path / "run.json").write_text('{"commit": "0123456789abcdef"}')

    monkeypatch.setattr(findings, "make", make)
    monkeypatch.chdir(tmp_path)
    findings.main(findings.Config(seeds=2, out="out/findings.md"))
    text = Path("out/findings.md").read_text()
    assert "| base | 50.5 ± 6.4 |" in text and "commit 0123456." in text
    assert text in capsys.readouterr().out
    assert read_jsonl("runs/findings/seed-1/trajectories-50.jsonl") == [{"row": i} for i in range(50)]


def test_main_refuses_one_seed():
    with pytest.raises(ValueError, match="--seeds 1: an interval needs two or more"):
        findings.main(findings.Config(seeds=1))
