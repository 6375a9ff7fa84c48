"""Checks and solutions by undoing a formula: hand-made rows of both signs, formulas that cannot be undone, hostile ones."""

from fractions import Fraction

import pytest
from conftest import ROOT

from s2r.data import Problem, load_problems, read_jsonl
from s2r.grade import equivalent, extract_answer
from s2r.grammar import VERDICT_SENTENCE, parse_verdict
from s2r.run.files import write_jsonl
from s2r.stage0 import formula, verifications

ASDIV = ROOT.parent / "shared" / "data" / "asdiv.jsonl"


def problem(text: str, answer: str | None = None) -> Problem:
    """A problem that says the numbers of its formula, and whose gold answer is the formula's."""
    return Problem(f"How many? {text.partition('=')[0]}", answer or text.rpartition("=")[2] or "0", "p", formula=text)


def said(text: str, answer: str) -> tuple[str, str]:
    """The steps of a check without its opening, and its verdict."""
    check = formula.verify(problem(text), answer)
    starts = [opening.format(answer.replace(",", "")) for opening in formula.OPENINGS]
    (start,) = [start for start in starts if check.startswith(start)]
    verdict = parse_verdict(check)
    return check.removeprefix(start).removesuffix(VERDICT_SENTENCE[verdict]).strip(), verdict


@pytest.mark.parametrize("text, answer, steps, verdict", [
    ("7+2=9", "9", "9 − 2 = 7, and the problem says 7.", "correct"),
    ("7+2=9", "8", "8 − 2 = 6, but the problem says 7.", "incorrect"),
    ("7+2=9", "1", "1 is less than 2, so it cannot be.", "incorrect"),
    ("21-17=4", "4", "4 + 17 = 21, and the problem says 21.", "correct"),
    ("21-17=4", "38", "38 + 17 = 55, but the problem says 21.", "incorrect"),
    ("6*8=48", "48", "48 ÷ 8 = 6, and the problem says 6.", "correct"),
    ("6*8=48", "50", "50 ÷ 8 = 6.25, but the problem says 6.", "incorrect"),
    ("6*3=18", "14", "14 ÷ 3 does not come out even, so it cannot be.", "incorrect"),
    ("50/5=10", "10", "10 × 5 = 50, and the problem says 50.", "correct"),
    ("50/5=10", "3", "3 × 5 = 15, but the problem says 50.", "incorrect"),
    ("34.26/3=11.42", "11.42", "11.42 × 3 = 34.26, and the problem says 34.26.", "correct"),
    ("(53-2)/3=17", "17", "17 × 3 = 51; 51 + 2 = 53, and the problem says 53.", "correct"),
    ("(53-2)/3=17", "15", "15 × 3 = 45; 45 + 2 = 47, but the problem says 53.", "incorrect"),
    ("10-(3+2)=5", "5", "3 + 2 = 5; 5 + 5 = 10, and the problem says 10.", "correct"),
    ("10-(3+2)=5", "6", "3 + 2 = 5; 6 + 5 = 11, but the problem says 10.", "incorrect"),
    ("48/2=24; 48+24=72", "72", "48 ÷ 2 = 24; 72 − 24 = 48, and the problem says 48.", "correct"),
    ("48/2=24; 48+24=72", "70", "48 ÷ 2 = 24; 70 − 24 = 46, but the problem says 48.", "incorrect"),
    ("18+20+17=55", "1,055", "1055 − 17 = 1038; 1038 − 20 = 1018, but the problem says 18.", "incorrect"),
])  # fmt: skip
def test_verify_undoes_the_formula(text, answer, steps, verdict):
    assert said(text, answer) == (steps, verdict)


@pytest.mark.parametrize("text", [
    "", "47/6=7 r5", "15:18=5:6", "GCD(16,12)=4", "LCM[12,15]=60", "8, 16, 24", "7+2=10", "1/0=0", "0/0=0", "5=5", "-3+5=2",
    "x=3", "2**9=512", "2**999999999=1", "9//2=4", "(((((1+1=2", "1+1", "=2", "07+2=9", "7+2=9;", "1e3+1=1001",
    "__import__('os').system('x')=0", "9" * 10**6 + "+1=2", "(" * 5000 + "1" + ")" * 5000 + "=1", "1+" * 40 + "1=41" * 2,
    ";".join(f"{2**i}+{2**i}={2 ** (i + 1)}" for i in range(40))])  # fmt: skip
def test_what_cannot_be_undone_has_no_check_and_no_solution(text):
    assert formula.verify(problem(text), "4") is None and formula.solution(problem(text, "4")) is None


@pytest.mark.parametrize("answer", ["", "four", "4 or 5", "-3", "1/2", r"\frac12", "9" * 10**6, "4; 5", "nan", "١", "3,4", "1.23456"])
def test_an_answer_that_is_no_plain_number_has_no_check(answer):
    assert formula.verify(problem("7+2=9"), answer) is None


def test_a_check_that_rounding_would_make_untrue_is_not_given():
    assert formula.verify(problem("(10/3)*3=10"), "10") is None  # 10 ÷ 3 does not come out even, and 10 is right


def test_a_formula_that_does_not_give_the_gold_answer_has_no_check():
    assert formula.verify(problem("7+2=9", "10"), "10") is None and formula.verify(problem("7+2=9", "10"), "9") is None


def test_the_problem_says_a_number_in_digits_or_words_or_it_should_be():
    for text in ("Seven and 2?", "7.0 and 7, and 2?", "7 and 2?"):
        assert "= 7, and the problem says 7." in formula.verify(Problem(text, "9", "p", formula="7+2=9"), "9")
    for text in ("70 and 2?", "seventy and 2?", "seventeen", ""):
        assert "= 7, and it should be 7." in formula.verify(Problem(text, "9", "p", formula="7+2=9"), "9")


@pytest.mark.parametrize("text, expected", [
    ("", []), ("1,250 and 3.5", [1250, Fraction(7, 2)]), ("2,3 and 1,2500", [2, 3, 1, 2500]), ("Forty-three and forty; Three?", [43, 40, 3]), ("someone often", []),
    ("a one-way ticket, ninety-nine", [99]), ("zero twelve nineteen", [0, 12, 19]),
])  # fmt: skip
def test_numbers_of_a_problem(text, expected):
    assert formula.numbers(text) == set(map(Fraction, expected))


QUESTION = "Fifty-three apples, 2 are bad. How many for each of 3?"  # (53 - 2) / 3


@pytest.mark.parametrize("answer, check, fault", [
    ("17", "Going backwards from 17: 17 × 3 = 51; 51 + 2 = 53, and the problem says 53. Therefore, the answer is correct.", ""),
    ("15", "If the answer is 15, then 15 × 3 = 45; 45 + 2 = 47, but the problem says 53. Therefore, the answer is incorrect.", ""),
    ("7", "7 ÷ 3 does not come out even, so it cannot be. Therefore, the answer is incorrect.", ""),
    ("1", "Going backwards from 1: 1 is less than 2, so it cannot be. Therefore, the answer is incorrect.", ""),
    ("17", "17 × 3 = 51, but it should be 53. Therefore, the answer is incorrect.", ""),  # other steps, yet all of it is true
    ("16", "Going backwards from 17: 17 × 3 = 51; 51 + 2 = 53, and the problem says 53. Therefore, the answer is correct.",
     "not about the answer"),
    (None, "Going backwards from 17: 17 × 3 = 51. Therefore, the answer is correct.", "not about the answer"),
    ("17", "Therefore, the answer is correct.", "not about the answer"),
    ("15", "Going backwards from 15: 15 × 3 = 51; 51 + 2 = 53, and the problem says 53. Therefore, the answer is correct.",
     "a wrong calculation"),
    ("9", "9 ÷ 3 does not come out even, so it cannot be. Therefore, the answer is incorrect.", "a wrong calculation"),
    ("17", "17 ÷ 0 = 3, but the problem says 2. Therefore, the answer is incorrect.", "a number that the problem does not say"),
    ("0", "0 ÷ 0 = 0, but the problem says 2. Therefore, the answer is incorrect.", "a wrong calculation"),
    ("17", "17 × 4 = 68, but the problem says 53. Therefore, the answer is incorrect.", "a number that the problem does not say"),
    ("17", "17 × 3 = 51, but the problem says 54. Therefore, the answer is incorrect.", "a number that the problem does not say"),
    ("17", "17 is less than 3, so it cannot be. Therefore, the answer is incorrect.", "a wrong comparison"),
    ("17", "17 × 3 = 51. Therefore, the answer is correct.", "nothing that follows from the answer is compared"),
    ("15", "If the answer is 15, then 53 − 2 = 51, but the problem says 3. Therefore, the answer is incorrect.",
     "nothing that follows from the answer is compared"),
    ("15", "If the answer is 15, then 2 is less than 3, so it cannot be. Therefore, the answer is incorrect.",
     "nothing that follows from the answer is compared"),
    ("15", "If the answer is 15, then 2 − 3 does not come out even. Therefore, the answer is incorrect.", "a wrong calculation"),
    ("15", "15 x 3 = 99; 15 × 3 = 45, but the problem says 53. Therefore, the answer is incorrect.", "an unreadable calculation"),
    ("15", "If the answer is 15, then 2 − 3 = −7; 15 × 3 = 45, but the problem says 53. Therefore, the answer is incorrect.", "an unreadable calculation"),
    ("6", "If the answer is 6, then 2 + 3 = 5; 6 + 5 = 11, but the problem says 53. Therefore, the answer is incorrect.", ""),
    ("17", "Going backwards from 17: 17 × 3 = 51; 51 + 2 = 53, and the problem says 53. Therefore, the answer is incorrect.",
     "a verdict that does not follow"),
    ("1", "1 is less than 2, so it cannot be. Therefore, the answer is correct.", "a verdict that does not follow"),
    ("17", "17, and the problem says 53. Therefore, the answer is incorrect.", "nothing that follows from the answer is compared"),
])  # fmt: skip
def test_fault_names_the_first_thing_wrong_with_a_check(answer, check, fault):
    assert formula.fault(QUESTION, answer, check) == fault


@pytest.mark.skipif(not ASDIV.exists(), reason="no shared/data/asdiv.jsonl")
def test_checks_by_formula_are_sound_but_for_numbers_that_go_without_saying():
    """"How many legs have 109 dogs?": the 4 is not in the problem."""
    found = []
    for problem in load_problems(ASDIV):
        for answer in (problem.answer, problem.answer + "0", "7"):
            if check := formula.verify(problem, answer):
                found.append(formula.fault(problem.problem, answer, check))
    assert set(found) == {"", "a number that the problem does not say"} and found.count("") > 0.9 * len(found)


def test_solution_shows_the_steps_and_the_gold_answer_only():
    assert formula.solution(problem("(53-2)/3=17", "17")) == (
        r"We compute 53 − 2 = 51 and 51 ÷ 3 = 17. So the answer is \boxed{17}.")  # fmt: skip
    assert formula.solution(problem("(53-2)/3=17", "18")) is None


def test_number_writes_at_most_four_decimals():
    cases = {"7": "7", "7/2": "3.5", "1/16": "0.0625", "1/3": None, "1/32": None, "-1": None, "1000000": "1000000"}
    assert {text: formula.number(Fraction(text)) for text in cases} == cases


def test_verifications_by_formula_are_a_file_that_build_reads(tmp_path, capsys):
    write_jsonl(tmp_path / "p.jsonl", [
        {"unique_id": "a", "problem": "A?", "answer": "9", "formula": "7+2=9"},
        {"unique_id": "b", "problem": "B?", "answer": "5", "formula": "47/6=7 r5"},
        {"unique_id": "c", "problem": "another C?", "answer": "9", "formula": "7+2=9"}])  # fmt: skip
    write_jsonl(tmp_path / "r.jsonl", [
        {"unique_id": id, "problem": f"{id.upper()}?", "answer": gold, "finished": True, "text": rf"It is \boxed{{{answer}}}."}
        for id, gold, answer in (("a", "9", "9"), ("a", "9", "8"), ("b", "5", "5"), ("c", "9", "9"))])  # fmt: skip
    files = {"rollouts": str(tmp_path / "r.jsonl"), "out": str(tmp_path / "v.jsonl")}
    verifications.main(verifications.Config(**files, by="formula", data=str(tmp_path / "p.jsonl")))
    rows = read_jsonl(tmp_path / "v.jsonl")
    assert [(row["answer"], parse_verdict(row["verification"])) for row in rows] == [("9", "correct"), ("8", "incorrect")]
    out = capsys.readouterr().out
    assert "2  verifications written" in out and "2  that the rule cannot check" in out
    write_jsonl(tmp_path / "q.jsonl", [{"unique_id": "d", "problem": "D?", "answer": "9", "formula": "7+2=9"}])
    with pytest.raises(ValueError, match="q.jsonl: has none of the problems of .*r.jsonl"):
        verifications.main(verifications.Config(**files, by="formula", data=str(tmp_path / "q.jsonl")))
    for wrong in ({"by": "formula"}, {"data": "x"}, {"by": "formula", "data": "x", "model": "m"}, {}):
        with pytest.raises(ValueError, match="give --model, or --api-base with --api-model, or --by formula with --data"):
            verifications.main(verifications.Config(**files, **wrong))


def test_split_puts_a_problem_in_one_part_and_leaves_long_formulas_out(tmp_path):
    problems = [{"problem": f"{a} and {b}?", "answer": str(a + b), "formula": f"{a}+{b}={a + b}"} for a in range(20) for b in range(1, 6)]
    long = {"problem": "1, 2, 3 and 4?", "answer": "10", "formula": "1+2+3+4=10"}
    write_jsonl(tmp_path / "p.jsonl", (row | {"unique_id": f"{copy}/{i}"} for copy in "ab" for i, row in enumerate([*problems, long])))
    formula.main(formula.Config(data=str(tmp_path / "p.jsonl"), folder=str(tmp_path)))
    parts = [{row["problem"] for row in read_jsonl(tmp_path / f"{name}.jsonl")} for name in ("sft", "rl", "test")]
    assert sum(map(len, parts)) == 100 and set.union(*parts) == {row["problem"] for row in problems}
    assert list(map(len, parts)) == pytest.approx([40, 40, 20], abs=15)


def test_split_of_problems_without_formulas_leaves_the_files_as_they_were(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"problem": f"{i}?", "answer": "9"} for i in range(50)])
    (tmp_path / "test.jsonl").write_text("before")
    with pytest.raises(ValueError, match="p.jsonl: a part would be empty"):
        formula.main(formula.Config(data=str(tmp_path / "p.jsonl"), folder=str(tmp_path)))
    assert (tmp_path / "test.jsonl").read_text() == "before" and len(list(tmp_path.iterdir())) == 2


def test_svamp_as_published_has_checks(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"Body": "Ed has 8.", "Question": "And now?", "Answer": 5.0, "Equation": "( 8.0 - 3.0 )"}])
    (svamp,) = load_problems(tmp_path / "p.jsonl")
    assert formula.solution(svamp) == r"We compute 8 − 3 = 5. So the answer is \boxed{5}."
    assert "5 + 3 = 8, and the problem says 8." in formula.verify(svamp, "5")


@pytest.mark.skipif(not ASDIV.exists(), reason="ASDiv as published is not here")
def test_every_problem_of_asdiv_that_is_kept_has_a_true_check_of_right_and_wrong_answers(tmp_path):
    formula.main(formula.Config(data=str(ASDIV), folder=str(tmp_path)))
    parts = {name: load_problems(tmp_path / f"{name}.jsonl") for name in ("sft", "rl", "test")}
    problems = [p for part in parts.values() for p in part]
    assert len(problems) > 1400 and len({p.unique_id for p in problems}) == len(problems)
    for p in problems:
        assert parse_verdict(formula.verify(p, p.answer)) == "correct"
        for wrong in (str(int(float(p.answer)) + 1), "0.5", "7777"):
            check = formula.verify(p, wrong)
            assert check is None or parse_verdict(check) == "incorrect", (p, check)
        assert equivalent(extract_answer(p.solution), p.answer)
