"""The findings: what each difference is, when it holds, and that every model it names is made."""

import json
from pathlib import Path

import pytest

import s2r  # noqa: F401
from s2r.data import read_jsonl
from s2r.grammar import VERIFY_OPENING
from s2r.run.files import write_jsonl
from s2r.toy import findings
from s2r.toy.__main__ import PLAN

BASE = {"accuracy": 0.5, "first_accuracy": 0.5, "trials": 1.5, "va": 0.8, "va_right": 0.9, "er": 0.7, "cp": 0.9,
        "icr": 0.1, "cir": 0.02, "tokens": 30.0, "right": "0011", "commit": "0123456789abcdef",
        "by_level": {"1": {"trials": 1.0}, "2": {"trials": 1.5}, "4": {"trials": 3.25}}}
NAMES = findings.TABLES[0][1]  # of all models


def test_value_is_in_per_cent_and_counts_trials():
    assert findings.value(BASE, "accuracy") == 50
    assert findings.value(BASE, "trials") == 1.5 and findings.value(BASE, "tokens") == 30
    assert findings.value(BASE, "by_level.4.trials") == 3.25
    assert findings.value(BASE | {"after": {"8": 0.25}}, "after.8") == 25
    for name in ("after.8", "by_level.3.trials", "by_level.1.accuracy"):
        assert findings.value(BASE, name) is None
    assert findings.value(BASE | {"va": None}, "va") is None


def test_value_harder_and_bias_by_hand():
    assert findings.value(BASE, "harder") == 2.25
    assert findings.value(BASE, "bias") == pytest.approx(20)


@pytest.mark.parametrize("differences, shown", [  # per cent, one per seed
    ([4, 4, 7], "+5.00 ± 4.30 | holds |"),
    ([-4, -4, -7], "-5.00 ± 4.30 | fails |"),
    ([3, 3, 6], "+4.00 ± 4.30 | undecided |"),  # four standard errors above zero: not enough for three seeds
])
def test_page_judges_a_difference_by_its_interval(differences, shown):
    seeds = [{name: BASE | {"accuracy": 0.5} for name in NAMES} for _ in differences]
    for reports, difference in zip(seeds, differences):
        reports["sft"] = BASE | {"accuracy": 0.5 + difference / 100}
    assert f"| SFT beats the base: accuracy | 51.0 → 81.6 | {shown} 0 up, 0 down |\n" in findings.page(seeds)


def test_page_counts_seeds_that_are_significant_by_themselves():
    seeds = [{name: BASE | {"right": "0" * 20} for name in NAMES} for _ in range(3)]
    seeds[0]["sft"] = BASE | {"right": "1" * 10 + "0" * 10}  # p = 0.002
    seeds[1]["sft"] = BASE | {"right": "1" * 5 + "0" * 15}  # p = 0.06
    seeds[2]["base"] = BASE | {"right": "1" * 20}
    assert "| 51.0 → 81.6 | +0.00 ± 0.00 | undecided | 1 up, 1 down |" in findings.page(seeds)


def test_page_finds_every_report_among_the_stages():
    made = {makes.removesuffix(".json") for makes, _, _ in (*PLAN, *findings.ABLATIONS)}
    assert set(findings.REPORTS) <= made and set(NAMES) == {*findings.REPORTS, *findings.VOTES}
    seeds = [{name: BASE | {"accuracy": x, "va": x if name != "base" else None} for name in NAMES} for x in (0.4, 0.6)]
    text = findings.page(seeds)
    assert "over 2 seeds" in text and "--seeds 2`, commits 0123456." in text
    assert "\n| base | 50.0 ± 127.1 | 50.0 ± 0.0 | 1.50 ± 0.00 | – | 90.0" in text
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    rows = sum(len(models) for _, models, _ in findings.TABLES)
    assert len(tables) == 1 + len(findings.FINDINGS) + len(findings.TABLES) + rows


def test_page_leaves_out_what_a_seed_has_not_made():
    seeds = [{name: BASE for name in NAMES} for _ in range(2)]
    del seeds[1]["sft-solving"]
    text = findings.page(seeds)
    assert "| sft-solving |" not in text and "problem-solving" not in text and "| sft-unmasked | 50.0 ± 0.0" in text


def row(problem: str, actions: str, answer: str = "plus", ids=()) -> dict:
    """A row of a rollout file; actions as in s2r/metrics.py: right and wrong solves, checks that say c or i."""
    found, right = [], False
    for letter in actions:
        if letter in "+-":
            right, kind = letter == "+", {"kind": "solve", "answer": answer}
            found.append(kind | {"reward": 1 if right else -1})
        else:
            found.append({"kind": "verify", "verdict": {"c": "correct", "i": "incorrect"}[letter],
                          "reward": 1 if right == (letter == "c") else -1})
    texts = {"+": "Let me try again. 1\n\n", "-": "Let me try again. 2\n\n"}
    check = f"{VERIFY_OPENING} Therefore, the answer is {{}}.\n\n"
    texts |= {"c": check.format("correct"), "i": check.format("incorrect")}
    return {"unique_id": problem, "problem": "Put plus or minus in the gaps: 62 _ 7 _ 11 = 58.", "ids": list(ids),
            "text": "".join(texts[letter] for letter in actions), "actions": found, "reward": 1 if right else -1}


def test_extended_counts_the_first_trials_and_audits():
    report = findings.extended(BASE, [row("p", "-i-i+c"), row("q", "+c"), row("r", "+i-c")])
    assert report["after"] == {"1": pytest.approx(2 / 3), "2": pytest.approx(1 / 3), "4": pytest.approx(2 / 3),
                               "8": pytest.approx(2 / 3)}
    assert report["unchecked"] == 0  # of two right first solves
    bare = findings.extended(BASE, [row("p", "+"), row("q", "+c"), row("r", "-"), row("s", "")])
    assert bare["unchecked"] == 1 / 2 and findings.extended(BASE, [row("p", "-")])["unchecked"] is None
    assert report["sound"] == 0 and report["sound_by_trial"] == {"1": 0, "2": 0, "3": 0}  # checks without sums


def test_voted_takes_as_many_answers_as_the_tokens_allow():
    rows = [row("p", "-", "a", [1, 2]), row("p", "+", "b", [1, 2]), row("p", "+", "b", [1, 2]),
            row("q", "-", "a", [1, 2]), row("q", "-", "a", [1, 2]), row("q", "+", "b", [1, 2])]
    found = findings.voted(rows, tokens=7.9)
    assert found["base-majority"] == {"accuracy": 0.5, "right": "10", "tokens": 6, "k": 3}
    assert found["base-checked"]["right"] == "11"
    assert findings.voted(rows, tokens=5)["base-majority"]["right"] == "00"  # a tie: the earlier answer


def test_main_writes_reports_and_page_and_runs_no_seed_twice(tmp_path, monkeypatch, capsys):
    made = []

    def make(stages):  # what the commands would leave behind
        for stage in stages:
            made.append(path := tmp_path / stage.makes)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json":
                path.write_text(json.dumps(BASE | {"right": "1", "accuracy": 0.5 + 0.01 * int(stage.makes.split("seed-")[1][0])}))
                write_jsonl(path.with_suffix(".test.jsonl"), [row("p", "-i+c")])
            elif path.name == "base.votes.jsonl":
                write_jsonl(path, [row("p", "+", ids=[1, 2])] * 3)
            elif path.name == "trajectories.jsonl":
                write_jsonl(path, ({"row": i} for i in range(600)))
            elif not path.suffix:  # a run folder
                path.mkdir()
                (path / "run.json").write_text('{"commit": "0123456789abcdef"}')

    monkeypatch.setattr(findings, "make", make)
    monkeypatch.chdir(tmp_path)
    findings.main(findings.Config(seeds=2, out="out/findings.md"))
    text = Path("out/findings.md").read_text()
    assert "| base | 50.5 ± 6.4 |" in text and "commits 0123456." in text
    assert json.loads(Path("out/findings/seed-1/sft.json").read_text())["after"]["1"] == 0
    assert read_jsonl("runs/findings/seed-0/trajectories-200.jsonl") == [{"row": i} for i in range(200)]

    made.clear()
    findings.main(findings.Config(seeds=2, out="out/findings.md"))
    assert not made and Path("out/findings.md").read_text() == text
    findings.main(findings.Config(seeds=3, out="out/findings.md"))
    assert made and all("seed-2" in str(path) for path in made)


def test_published_page_is_what_the_kept_reports_give():
    docs = Path(__file__).resolve().parents[1] / "docs"
    folders = sorted((docs / "findings").glob("seed-*"))
    seeds = [{path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")} for folder in folders]
    published = (docs / "findings.md").read_text(encoding="utf-8")
    assert findings.page(seeds) == published
