"""The reason audit: which checks of the toy world are right for the right reason."""

import pytest

from s2r.data import read_jsonl
from s2r.grammar import VERDICT_SENTENCE, VERIFY_OPENING
from s2r.run.files import write_jsonl
from s2r.stage0.audit import audit, mark
from s2r.toy.audit import fault as toy_fault

PROBLEM = "Put plus or minus in the gaps: 62 _ 7 _ 11 = 58."  # plus minus
SUMS, END = "Add up: 62 plus 7 is 69, 69 minus 11 is 58.", "The target is 58. 58 and 58 are the same."


@pytest.mark.parametrize("answer, check, fault", [
    ("plus minus", f"{SUMS} {END} Therefore, the answer is correct.", ""),
    ("plus plus", f"{SUMS} {END} Therefore, the answer is correct.", "other signs than the answer's"),
    (None, f"{SUMS} {END} Therefore, the answer is correct.", "other signs than the answer's"),
    ("plus minus", f"{SUMS.replace('7', '8')} {END} Therefore, the answer is correct.", "other numbers than the puzzle's"),
    ("plus minus", f"{SUMS.replace('69 minus', '68 minus')} {END} Therefore, the answer is correct.", "other numbers than the puzzle's"),
    ("plus minus", "Add up: 62 plus 7 is 70, 70 minus 11 is 59. The target is 58. 59 and 58 are different. Therefore, the answer is "
     "incorrect.", "a wrong sum"),
    ("plus minus", f"{SUMS} The target is 60. 58 and 60 are different. Therefore, the answer is incorrect.", "a wrong comparison"),
    ("plus minus", f"{SUMS} The target is 58. 58 and 58 are different. Therefore, the answer is incorrect.", "a wrong comparison"),
    ("plus minus", f"{SUMS} {END} Therefore, the answer is incorrect.", "a verdict that does not follow"),
    ("plus minus", f"{SUMS} So {END} Therefore, the answer is correct.", "other words"),
    ("plus minus", "Therefore, the answer is correct.", "other signs than the answer's"),
])
def test_fault_names_the_first_thing_wrong(answer, check, fault):
    assert toy_fault(PROBLEM, answer, check) == fault


def test_command_marks_sound_checks_and_counts_true_verdicts(tmp_path, capsys):
    sound, lucky = f"{SUMS} {END} Therefore, the answer is correct.", "Add up: 62 plus 7 is 58. Therefore, the answer is correct."
    rows = [{"unique_id": str(i), "problem": PROBLEM, "answer": "plus minus", "finished": True,
             "text": f"The signs are \\boxed{{plus minus}}.\n\n{VERIFY_OPENING} {check}", "actions": [
                 {"kind": "solve", "answer": "plus minus", "reward": 1}, {"kind": "verify", "verdict": "correct", "reward": 1}]}
            for i, check in enumerate((sound, lucky))]
    write_jsonl(tmp_path / "r.jsonl", rows)
    audit([str(tmp_path / "r.jsonl")], toy_fault)
    assert [row["actions"][1]["sound"] for row in read_jsonl(tmp_path / "r.jsonl")] == [True, False]
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/r.jsonl: checks with a true verdict that are sound: 50.0 % of 2",
        '  "correct": 50.0 % of 2', '  "incorrect": none', "  check 1: 50.0 % of 2  1 other signs than the answer's"]  # fmt: skip


def test_each_check_is_read_against_its_own_solve_and_only_true_verdicts_are_counted():
    checks = [f"{answer}. {VERDICT_SENTENCE[verdict]}" for answer, verdict in ((8, "incorrect"), (7, "correct"))]
    text = f"\\boxed{{8}}\n\n{VERIFY_OPENING} {checks[0]}\n\nLet me try again. \\boxed{{7}}\n\n{VERIFY_OPENING} {checks[1]}"
    row = {"problem": "q", "text": text, "actions": [
        {"kind": "solve", "answer": "8", "reward": -1}, {"kind": "verify", "verdict": "incorrect", "reward": 1},
        {"kind": "solve", "answer": "7", "reward": 1}, {"kind": "verify", "verdict": "correct", "reward": -1}]}
    asked = []
    assert mark([row], lambda problem, answer, check: asked.append((answer, check)) or "") == {1: {"": 1}}
    assert asked == [("8", checks[0]), ("7", checks[1])]
    row["actions"][3]["verdict"] = None  # a check that was cut off
    mark([row], lambda *_: "")
    assert [action.get("sound") for action in row["actions"]] == [None, True, None, False]


def test_command_goes_on_after_a_model_without_checks(tmp_path, capsys):
    write_jsonl(tmp_path / "r.jsonl", [{"unique_id": "0", "problem": PROBLEM, "answer": "plus minus", "finished": True,
        "text": "plus", "actions": [{"kind": "solve", "answer": None, "reward": -1}]}])  # fmt: skip
    audit([str(tmp_path / "r.jsonl")] * 2, toy_fault)
    assert capsys.readouterr().out.count("checks with a true verdict that are sound: none\n") == 2
