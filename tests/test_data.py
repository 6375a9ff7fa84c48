"""Problem and trajectory files: the three formats, and one line naming file and row for every kind of bad one."""

import json
import os
from pathlib import Path

import pytest

from s2r.data import Example, Problem, draw, load_problems, load_trajectories, read_jsonl
from s2r.grade import equivalent
from s2r.grammar import VERDICT_SENTENCE
from s2r.run.files import check_output, drop_torn_line, write_jsonl

SHARED = Path(__file__).parents[2] / "shared" / "data"
RIGHT, WRONG = VERDICT_SENTENCE["correct"], VERDICT_SENTENCE["incorrect"]


def write(folder: Path, *rows: dict | str) -> Path:
    path = folder / "file.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- rows ---


def test_jsonl_round_trip(tmp_path):
    rows = [{"text": "a\nb\u2028é🙂", "ids": [1, 2], "none": None}, {}]
    write_jsonl(tmp_path / "rows.jsonl", iter(rows))
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_write_jsonl_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": 2}, {"a": object()}])
    assert read_jsonl(path) == [{"a": 1}]


def test_read_jsonl_takes_blank_lines_windows_ends_and_bom(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"b": "\\ud83d\\ude42"}')
    assert read_jsonl(path) == [{"a": 1}, {"b": "🙂"}]


@pytest.mark.parametrize("content, words", [
    (b"", "no rows; the file is empty"),
    (b"\n \n", "no rows; the file is empty"),
    (b'{"a": 1}\n{"a": \n', "row 2: not JSON .*one object per line"),
    (b'{"a": "\xff"}', "row 1: not JSON"),
    (b'{"a": "\\ud83d"}', "row 1: not JSON .*surrogates"),
    (b"[" * 100_000, "row 1: not JSON"),
    (b"[1]", "row 1: a list, not an object"),
])
def test_read_jsonl_names_the_bad_row(tmp_path, content, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [read_jsonl, load_problems, load_trajectories])
def test_missing_file_says_what_to_give(tmp_path, load):
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file; give a JSON-lines file"):
            load(path)


# --- problems ---


def test_load_problems_reads_our_format(tmp_path):
    path = write(tmp_path, {"problem": "1+1?", "answer": "2", "unique_id": "a", "level": 3, "subject": "S",
                            "solution": "s"}, {"problem": "2+2?", "answer": 4}, {"problem": "3?", "answer": "3", "unique_id": 0})
    assert load_problems(path) == [
        Problem("1+1?", "2", "a", 3, "s"), Problem("2+2?", "4", "file/1"), Problem("3?", "3", "0")]  # fmt: skip
    assert len(load_problems(path, limit=1)) == 1 and len(load_problems(path, limit=9)) == 3


def test_load_problems_reads_gsm8k_as_published(tmp_path):
    path = write(tmp_path, {"question": "How many?", "answer": "500 * 2 = <<500*2=1000>>1000.\n#### 1,000"})
    assert load_problems(path) == [
        Problem("How many?", "1,000", "file/0", solution="500 * 2 = <<500*2=1000>>1000.\n#### 1,000",
                formula="500*2=1000")]


def test_load_problems_reads_math_as_published(tmp_path):
    row = {"problem": "x?", "level": "Level 4", "type": "Algebra", "solution": r"\boxed{1}, so \boxed{\frac{1}{2}}."}
    path = write(tmp_path, row, row | {"level": "Level ?"})
    first, second = load_problems(path)
    assert first == Problem("x?", r"\frac{1}{2}", "file/0", 4, row["solution"])
    assert second.level is None


def test_load_problems_reads_the_rows_of_the_qwen_evaluation_suite(tmp_path):
    """CollegeMath and OlympiadBench: `question`, dollars around answers, lists of final answers, "or"."""
    path = tmp_path / "suite.jsonl"
    write_jsonl(path, [
        {"data_source": "college_math.calculus", "question_number": "1", "question": "Find x.", "answer": "$x=\\frac{1}{2}$"},
        {"question": "Find both.", "answer": "$3$ or $-5$"},
        {"id": 1606, "subfield": "Algebra", "context": None, "question": "How many?", "solution": ["It is 2.", "So 2."],
         "final_answer": ["2"], "is_multiple_answer": False, "unit": None, "answer_type": "Numerical"},
        {"id": 1610, "context": "Let $a=1$.", "question": "Solve.", "solution": ["…"], "final_answer": ["$-3$", "$3$"]},
    ])
    problems = load_problems(path)
    for problem, right, wrong in zip(problems, (r"\frac12", "-5, 3", "2", r"3,-3"), ("2", "3", "1606", "3")):
        assert equivalent(right, problem.answer) and not equivalent(wrong, problem.answer)
    assert problems[3].problem == "Let $a=1$.\nSolve." and problems[2].solution == "It is 2.\nSo 2."
    write_jsonl(path, [{"question": "Find x.", "final_answer": [2]}])
    with pytest.raises(ValueError, match="row 1: .*answer"):
        load_problems(path)


OPTIONS = "Which?\n(A) 21\n(B) 22\nAnswer with the letter of the right option."
PUBLISHED = [  # a row of each set as published; the problem, the gold answer and the formula that are read
    ({"body": "Seven apples and two apples.", "question": "How many?", "solution_type": "Addition", "answer": "9 (apples)",
      "formula": "7+2=9"}, "Seven apples and two apples.\nHow many?", "9", "7+2=9"),
    ({"body": "b", "question": "q", "answer": "-(1/3)", "formula": "f"}, "b\nq", "-(1/3)", "f"),
    ({"Body": "Ed has 8.", "Question": "And now?", "Answer": 5.0, "Equation": "( 8.0 - 3.0 )", "Type": "Subtraction"},
     "Ed has 8.\nAnd now?", "5", "( 8.0 - 3.0 )=5.0"),
    ({"passage": None, "question": "1+1?", "options": None, "answer": "2"}, "1+1?", "2", None),
    ({"input": "Ed has 8. And now?", "target": "5.5"}, "Ed has 8. And now?", "5.5", None),
    ({"question": "Which?", "choices": ["21", "22"], "answer": 1, "subject": "algebra"}, OPTIONS, "B", None),  # MMLU-STEM
    ({"question": "Which?", "options": [21, 22], "answer": "B", "answer_index": 1}, OPTIONS, "B", None),  # MMLU-Pro
    ({"question": "Which?", "options": ["A)21", "B)22"], "rationale": "r", "correct": "A"}, OPTIONS, "A", None),  # AQuA
    ({"question": "Who?", "choices": ["C. Hull", "B. F. Skinner"], "answer": 1},  # the B is no label
     "Who?\n(A) C. Hull\n(B) B. F. Skinner\nAnswer with the letter of the right option.", "B", None),
    ({"question": "Is it?", "answer": True, "facts": []}, "Is it?\nAnswer Yes or No.", "Yes", None),  # StrategyQA
    ({"question": "Is it?", "answer": False}, "Is it?\nAnswer Yes or No.", "No", None),
    ({"premises": ["All a are b.", "c is a."], "conclusion": "c is b.", "label": "True"},
     "All a are b.\nc is a.\nConclusion: c is b.\nIs the conclusion True, False or Uncertain?", "True", None),
    ({"premises": "p", "conclusion": "c", "label": "Unknown"},
     "p\nConclusion: c\nIs the conclusion True, False or Uncertain?", "Uncertain", None),
    ({"code": "def f(a):\n    return a", "input": "'x'", "output": "'x'", "id": "sample_0"},
     "```python\ndef f(a):\n    return a\n```\nWhat does f('x') return? Answer with a Python literal.", "'x'", None),
    ({"problem": "How long?", "answer": 2, "unit": "m"}, "How long?\nGive the answer in m.", "2", None),
    ({"question": "How long?", "final_answer": ["3"], "unit": "cm", "error": None}, "How long?\nGive the answer in cm.", "3", None),
    ({"question": "q", "answer": "2*3=<<2*3=6>>6, +1=<<6+1=7>>7\n#### 7"}, "q", "7", "2*3=6; 6+1=7"),
    ({"problem": "p", "answer": "1", "formula": "0+1=1"}, "p", "1", "0+1=1"),
]


@pytest.mark.parametrize("row, problem, answer, formula", PUBLISHED)
def test_load_problems_reads_sets_as_published(tmp_path, row, problem, answer, formula):
    (read,) = load_problems(write(tmp_path, row))
    assert (read.problem, read.answer, read.formula) == (problem, answer, formula)


@pytest.mark.parametrize("row, words", [
    ({"problem": "p", "answer": "2", "choices": ["1", "2"]}, "'choices' beside "),
    ({"problem": "p", "answer": "2", "options": ["1", "2"]}, "'options' beside "),
    ({"question": "p", "final_answer": ["2"], "error": "1e-2"}, "'error' beside "),
    ({"question": "q", "answer": "2", "body": "b", "image": "x.png"}, "'image' beside "),
    ({"question": "q", "answer": "2", "passage": "text"}, "'passage' beside "),
    ({"input": "q", "target": "2", "context": "c"}, "'context' beside "),
    ({"question": "q", "choices": ["1", "2"], "answer": 2}, "answer 2 is neither the letter nor the index"),
    ({"question": "q", "choices": ["1", "2"], "answer": "C"}, "answer 'C' is neither"),
    ({"question": "q", "choices": ["1", "2"], "answer": True}, "answer True is neither"),
    ({"question": "q", "options": "A) 1, B) 2", "answer": "A"}, "not a list of 2 to 26 options"),
    ({"body": "b", "question": "q", "answer": None}, '"answer" is empty'),
    ({"input": 3, "target": "2"}, 'no "problem"'),
    ({"question": None, "choices": ["1", "2"], "answer": "A"}, "'question' is None; write a text"),
    ({"body": None, "question": "q", "answer": "2"}, "'body' is None; write a text"),
    ({"premises": [1], "conclusion": 2, "label": "True"}, "'conclusion' is 2; write a text"),
])
def test_load_problems_refuses_what_it_would_read_in_part(tmp_path, row, words):
    with pytest.raises(ValueError, match=f"file.jsonl: row 1: .*{words}"):
        load_problems(write(tmp_path, row))


def test_load_problems_reads_asdiv_whole():
    if not (SHARED / "asdiv.jsonl").is_file():
        pytest.skip("no ../shared/data")
    rows, problems = read_jsonl(SHARED / "asdiv.jsonl"), load_problems(SHARED / "asdiv.jsonl")
    assert len(problems) == len(rows) == 2215
    for row, problem in zip(rows, problems):
        assert row["body"] in problem.problem and row["question"] in problem.problem and problem.formula == row["formula"]
        assert equivalent(row["answer"].partition(" (")[0], problem.answer)
    assert (problems[0].answer, problems[0].formula) == ("9", "7+2=9")


@pytest.mark.parametrize("row, words", [
    ({"answer": "2"}, 'no "problem" .*keys are answer; add it'),
    ({}, "keys are none"),
    ({"problem": "  ", "answer": "2"}, 'no "problem"'),
    ({"problem": "p"}, '"answer" is empty or missing'),
    ({"problem": "p", "answer": " "}, '"answer" is empty or missing'),
    ({"problem": "p", "answer": None}, '"answer" is empty or missing'),
    ({"problem": "p", "answer": True}, '"answer" is empty or missing'),
    ({"question": "p", "answer": "so ####  "}, '"answer" is empty or missing'),
    ({"problem": "p", "solution": "no box"}, '"answer" is empty or missing'),
    ({"problem": "p", "answer": "2", "level": [3]}, '"level" is .3.; write a whole number'),
    ({"problem": "p", "answer": "2", "solution": 5}, '"solution" is 5; write a text'),
    ({"problem": "p", "answer": "2", "unique_id": "a"}, "unique_id 'a' is that of row 1 already"),
])
def test_load_problems_names_the_bad_row(tmp_path, row, words):
    path = write(tmp_path, {"problem": "p", "answer": "2", "unique_id": "a"}, row)
    with pytest.raises(ValueError, match=f"file.jsonl: row 2: .*{words}"):
        load_problems(path)
    assert len(load_problems(path, limit=1)) == 1


def test_load_problems_refuses_a_gold_that_cannot_be_graded(tmp_path, monkeypatch):
    monkeypatch.setattr("s2r.data.parsable", lambda answer: answer != "???")
    with pytest.raises(ValueError, match=r"row 1: gold answer '\?\?\?' cannot be parsed; correct it"):
        load_problems(write(tmp_path, {"problem": "p", "answer": "???"}))


def test_load_problems_lists_all_bad_rows(tmp_path):
    good, bad = {"problem": "p", "answer": "2"}, {"problem": "p", "answer": None}
    with pytest.raises(ValueError, match=r"row 2: .*\(2 rows fail, the first: \[2, 4\]\)"):
        load_problems(write(tmp_path, good, bad, good, bad))
    with pytest.raises(ValueError, match=r"row 2: .*\(1000 rows fail, the first: \[2, 3, 4, 5, 6, 7, 8, 9, 10, 11\]\)"):
        load_problems(write(tmp_path, good, *[bad] * 1000))


def test_load_problems_refuses_a_negative_limit(tmp_path):
    with pytest.raises(ValueError, match="limit -1"):
        load_problems(write(tmp_path, {"problem": "p", "answer": "2"}), limit=-1)


@pytest.mark.parametrize("name, count, bad", [
    ("math500", 500, []), ("gsm8k_test", 1319, []), ("aime24", 30, []), ("amc23", 40, []),
    ("gaokao2023en", 385, [168, 193]), ("math_train", 12000, [5342, 5344]),
])
def test_load_problems_reads_the_public_sets(name, count, bad):
    """Every row loads but the few whose published answer is empty."""
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"shared/data/{name}.jsonl is not beside the repository")
    rows = [row for number, row in enumerate(read_jsonl(path), start=1) if number not in bad]
    problems = load_problems(path)
    assert len(problems) == count - len(bad)
    assert [(p.problem, p.answer, p.unique_id, p.level) for p in problems] == [
        (row["problem"], row["answer"], row["unique_id"], row.get("level")) for row in rows]


# --- trajectories ---


def solve(correct: bool, text: str = r"\boxed{2}") -> dict:
    return {"kind": "solve", "text": text, "correct": correct}


def verify(verdict: str, text: str | None = None) -> dict:
    return {"kind": "verify", "text": text or f"Check. {VERDICT_SENTENCE[verdict]}", "verdict": verdict}


def example(*steps: dict) -> dict:
    return {"unique_id": "u", "problem": "p", "answer": "2", "trajectory": list(steps)}


def test_load_trajectories_reads_one_and_more_trials(tmp_path):
    short = [solve(True), verify("correct")]
    long = [solve(False), verify("incorrect"), solve(False), verify("incorrect"), *short]
    assert load_trajectories(write(tmp_path, example(*short), example(*long))) == [
        Example("p", short), Example("p", long)]


def test_load_trajectories_takes_the_solutions_of_a_problem_file(tmp_path):
    """SFT on solutions: boxed as MATH has them, after #### as GSM8K has them."""
    path = write(tmp_path, {"problem": "p", "solution": r"It is \boxed{2}."}, {"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"})
    math, gsm = load_trajectories(path)
    assert math.trajectory == [solve(True, r"It is \boxed{2}.")]
    assert gsm.trajectory == [solve(True, "1+1=2\nThe answer is \\boxed{2}.")]
    path = write(tmp_path, {"problem": "p", "solution": "\\boxed{2}\n\nWait, let me recheck my solution. Hm."})
    with pytest.raises(ValueError, match="row 1: .*opens another action"):
        load_trajectories(path)


@pytest.mark.parametrize("row, words", [
    ({"problem": "p", "answer": "2"}, '"trajectory" is not a list'),
    ({"problem": "p", "trajectory": [solve(True), verify("correct")]}, '"answer" is empty or missing'),
    (example(), '"trajectory" is not a list of pairs'),
    (example(solve(True)), "not a list of pairs"),
    (example(verify("correct"), solve(True)), "step 1 is not a solve"),
    (example(solve(True), solve(True)), "step 2 is not a verify"),
    (example(solve(True), "verify"), "step 2 is not a verify"),
    (example({"kind": "solve", "correct": True}, verify("correct")), "step 1 is not a solve with a text"),
    (example(solve(False), verify("incorrect")), 'step 1 has "correct": False; the last solve is right'),
    (example(solve(True), verify("correct"), solve(True), verify("correct")), 'step 1 has "correct": True'),
    (example({"kind": "solve", "text": "x"}, verify("correct")), 'step 1 has "correct": None'),
    (example(solve(True), verify("incorrect")), "step 2 .*both have to say correct"),
    (example(solve(False), verify("correct"), solve(True), verify("correct")), "step 2 .*both have to say incorrect"),
    (example(solve(True), verify("correct", f"x {WRONG}")), "step 2 .*both have to say correct"),
    (example(solve(True), verify("correct", f"{RIGHT} Or not?")), "step 2 .*both have to say correct"),
    (example(solve(True, "x\nLet me try again. y"), verify("correct")), "step 1 .solve. is empty or holds a line"),
    (example(solve(True, " "), verify("correct")), "step 1 .solve. is empty"),
])
def test_load_trajectories_names_the_bad_row(tmp_path, row, words):
    path = write(tmp_path, example(solve(True), verify("correct")), row)
    with pytest.raises(ValueError, match=f"file.jsonl: row 2: .*{words}"):
        load_trajectories(path)


def test_load_problems_leaves_out_empty_answers(tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    path.write_text('{"problem": "a", "answer": ""}\n{"problem": "b", "answer": "2"}\n')
    assert [p.problem for p in load_problems(path)] == ["b"]
    assert "skipped: 1" in capsys.readouterr().err
    path.write_text('{"problem": "a", "answer": ""}\n')
    with pytest.raises(ValueError, match="no row with an answer"):
        load_problems(path)


@pytest.mark.parametrize("content, left", [
    (b"", b""), (b"torn", b""), (b"{}\n", b"{}\n"), (b"{}\n{}", b"{}\n"), (b"{}\n\xc3", b"{}\n"), (b"\n \n", b"\n \n"),
])
def test_drop_torn_line_leaves_whole_lines_and_says_whether_there_are_any(tmp_path, content, left):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    assert drop_torn_line(path) is (b"{}" in left) and path.read_bytes() == left


@pytest.mark.parametrize("answer", ["NaN", "Infinity", '"NaN"', '"nan"'])
def test_gold_answer_that_is_no_number_is_refused(answer, tmp_path):
    (tmp_path / "p.jsonl").write_text(f'{{"problem": "1+1?", "answer": {answer}}}\n')
    with pytest.raises(ValueError, match="p.jsonl: row 1: (not JSON|gold answer)"):
        load_problems(tmp_path / "p.jsonl")


def test_output_that_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="something that is not a file"):
            write_jsonl(path, [{}])
    assert (tmp_path / "pipe").is_fifo()
    check_output(tmp_path / "new" / "file.jsonl")
    assert (tmp_path / "new").is_dir()


def test_draw_covers_each_epoch_once_in_a_new_order():
    """10 items, 4 a step: without a partial step 2 items of each epoch are left out, with it the third has 2."""
    epochs = [[draw(10, 4, step, 0) for step in (1, 2)], [draw(10, 4, step, 0) for step in (3, 4)]]
    assert all(len({i for step in epoch for i in step}) == 8 for epoch in epochs) and epochs[0] != epochs[1]
    steps = [draw(10, 4, step, 0, partial=True) for step in (1, 2, 3)]
    assert [len(step) for step in steps] == [4, 4, 2] and sorted(i for step in steps for i in step) == list(range(10))
    assert steps[:2] == epochs[0] and draw(10, 4, 1, 1) != steps[0]
