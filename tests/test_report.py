"""Results side by side: the table, its command, and intervals against a printed table of t quantiles."""

import json
from statistics import stdev

import pytest
from test_metrics import response, samples

from s2r.metrics import at_k, summarize
from s2r.view.report import Config, interval, main, mcnemar, table


def test_table_lines_up_and_marks_the_undefined():
    before = summarize([response("+", level=2, ids=[1] * 12)])
    after = summarize([response("-i+c", level=2), response("-", level=4)])
    assert table({"base": before, "after SFT": after}) == "\n".join([
        "           accuracy  first_accuracy  trials     va  va_right     er     cp   icr  cir  finished  tokens",
        "base          100.0           100.0    1.00      –         –      –      –     –  0.0     100.0      12",
        "after SFT      50.0             0.0    1.50  100.0     100.0  100.0  100.0  50.0    –     100.0       0",
        "",
        "accuracy / trials       level 2     level 4",
        "base               100.0 / 1.00       – / –",
        "after SFT          100.0 / 2.00  0.0 / 1.00",
    ])
    assert "level" not in table({"a": summarize([response("+")])})


def test_reports_are_compared_in_one_table(tmp_path, capsys):
    rows = samples(p="+---", q="++++")
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(summarize(rows) | at_k(rows)))
    main(Config((str(tmp_path / "a.json"), str(tmp_path / "b.json"))))
    printed = capsys.readouterr().out
    assert printed.count("62.5 ±37.5") == 2 and "pass / maj" in printed and "100.0 / 100.0" in printed


def test_reports_on_the_same_problems_are_paired(tmp_path, capsys):
    sets = {  # e, f: differences of 50, 0 and 100 points, so a standard error of 50/√3; the others have no such partner
        "a": dict(p="+", q="-", r="-"), "b": dict(p="-", q="+", r="+"), "c": dict(p="+", q="+", r="+"), "d": dict(p="+"),
        "e": dict(p="+-", q="-+", r="--"), "f": dict(p="++", q="+-", r="++"), "g": dict(p="++++++"), "h": dict(p="++++++"),
    }  # fmt: skip
    for name, codes in sets.items():
        data = {"data": "other.jsonl" if name in "cd" else "F.jsonl"}
        (tmp_path / f"{name}.json").write_text(json.dumps(summarize(rows := samples(**codes)) | at_k(rows) | data))
    main(Config(tuple(str(tmp_path / f"{name}.json") for name in sets)))
    paired = [line for line in capsys.readouterr().out.splitlines() if "against" in line]
    assert paired == [
        f"{tmp_path}/b against {tmp_path}/a: 2 problems gained, 1 lost, McNemar's p = 1",
        f"{tmp_path}/f against {tmp_path}/e: +50.0 ± 124.2 points of accuracy",
    ]


def test_reports_of_one_name_are_one_model_over_seeds(tmp_path, capsys):
    """Three seeds: 50, 75, 100 % after 50, 50, 50 %. With ν = 2, t is 4.303 and the standard error 25/√3."""
    paths = []
    for seed, after in enumerate(("++--", "+++-", "++++")):
        (tmp_path / f"{seed}").mkdir()
        for name, codes in (("base", "++--"), ("sft", after)):
            paths.append(tmp_path / f"{seed}" / f"{name}.json")
            rows = samples(**dict(zip("pqrs", codes)))
            paths[-1].write_text(json.dumps(summarize(rows) | at_k(rows)))
    main(Config(tuple(map(str, paths))))
    seeds, _, base, sft, difference = capsys.readouterr().out.splitlines()
    assert seeds.endswith("interval over 0, 1, 2")
    assert base.split()[:3] == ["base", "50.0", "±0.0"] and sft.split()[:3] == ["sft", "75.0", "±62.1"]
    each = "; ".join(f"{gained} problems gained, 0 lost, McNemar's p = {p}" for gained, p in ((0, 1), (1, 1), (2, 0.5)))
    assert difference == f"sft against base: accuracy +25.0 ± 62.1 over 3 seeds ({each})"
    report = json.loads(paths[-1].read_text())
    paths[-1].write_text(json.dumps(report | {"by_level": {"1": {"accuracy": 1.0, "trials": 1.0}}, "pass_at_k": {"1": 1.0}}))
    main(Config(tuple(map(str, paths))))  # a level, and pass@k, that one seed has alone
    assert "level 1" in capsys.readouterr().out
    (again := tmp_path / "again" / "0").mkdir(parents=True)
    (again / "base.json").write_text(paths[0].read_text())
    one_missing, other_seeds, other_order = paths[:-1], [*paths[:3], paths[5]], [paths[0], paths[2], paths[3], paths[1]]
    for wrong in (one_missing, other_seeds, other_order, [*paths, again / "base.json"]):
        with pytest.raises(ValueError, match="^base of .*; sft of .*: give one report of each model and seed"):
            main(Config(tuple(map(str, wrong))))


def test_report_refuses_what_is_not_one(tmp_path):
    with pytest.raises(ValueError, match="c.json: no report there; give"):
        main(Config((str(tmp_path / "c.json"),)))
    for content in ("[]", "{}", '{"by_level": ', "3"):
        (tmp_path / "d.json").write_text(content)
        with pytest.raises(ValueError, match="d.json: no report there; give"):
            main(Config((str(tmp_path / "d.json"),)))


@pytest.mark.parametrize("freedom, t", [  # two-sided 95 %, from a printed table of Student's t distribution
    (1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (20, 2.086), (30, 2.042),
    (60, 2.000), (120, 1.980),
])  # fmt: skip
def test_interval_uses_the_t_distribution(freedom, t):
    values = [(-1) ** i * i for i in range(freedom + 1)]
    middle, half = interval(values)
    assert middle == pytest.approx(sum(values) / len(values))
    assert half == pytest.approx(t * stdev(values) / len(values) ** 0.5, rel=2e-4)


def test_interval_by_hand_and_of_one_value():
    assert interval([1, 2, 3]) == pytest.approx((2, 4.3027 / 3**0.5), rel=1e-4)  # standard deviation 1
    assert interval([0.5, 0.5]) == (0.5, 0)
    with pytest.raises(ValueError, match="at least two"):
        interval([1.0])


@pytest.mark.parametrize("after, before, expected", [
    ("1100", "1010", (1, 1, 1.0)),
    ("1" * 6, "0" * 6, (6, 0, 2 / 2**6)),
    ([False] * 5 + [True], [True] * 5 + [False], (1, 5, 2 * 7 / 2**6)),  # P(0 or 1 heads of 6) = 7/64
    ("11", "11", (0, 0, 1.0)),
])
def test_mcnemar_by_hand(after, before, expected):
    assert mcnemar(after, before) == pytest.approx(expected)


def test_mcnemar_needs_the_same_problems():
    with pytest.raises(ValueError):
        mcnemar("10", "1")
