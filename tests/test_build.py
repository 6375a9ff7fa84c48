"""Stage 0: one test per rule of METHOD §2 (paper App. C.1), on hand-made rollout rows."""

import random
from collections import Counter

import pytest

import s2r  # noqa: F401
from s2r import behavior
from s2r.data import load_trajectories, read_jsonl, write_jsonl
from s2r.grammar import VERDICT_SENTENCE

PROBLEM = "Which number is a multiple of 17: 30, 31, 32, 33, 34, 35 or 36?"  # 34


def rows(*answers: str | None, problem: str = PROBLEM, unique_id: str = "p", **other) -> list[dict]:
    """Rollout rows of one problem, one for each boxed answer."""
    return [
        {
            "unique_id": unique_id,
            "problem": problem,
            "answer": "34",
            "finished": True,
            "sample": i,
            "text": "I give up." if answer is None else rf"The answer is \boxed{{{answer}}}.",
        }
        | other
        for i, answer in enumerate(answers)
    ]


def build(
    *answers: str | None, verify=behavior.by_rule, seed: int = 0, short: bool = False, **other
) -> tuple[list[dict] | None, Counter]:
    counts = Counter()
    return behavior.build(rows(*answers, **other), verify, random.Random(seed), counts, short), counts


def kinds(steps: list[dict]) -> list:
    return [step["correct"] if step["kind"] == "solve" else step["verdict"] for step in steps]


@pytest.mark.parametrize("wrong, k", [(0, 1), (1, 2), (2, 3), (3, 3), (4, 4), (5, 4)])
def test_trials_of_five_samples_are_those_of_the_release(wrong, k):
    assert behavior.trials(wrong, 5) == k


def test_trials_of_other_sample_numbers_are_scaled():
    assert [behavior.trials(wrong, 10) for wrong in (0, 2, 5, 10)] == [1, 2, 3, 4]


def test_build_ends_in_the_right_answer_after_wrong_ones():
    steps, _ = build("34", "31", "32", "33", "34")
    assert kinds(steps) == [False, "incorrect", False, "incorrect", True, "correct"]
    assert steps[-2]["text"] == r"The answer is \boxed{34}."


def test_build_takes_wrong_answers_pairwise_distinct():
    steps, counts = build("34", "31", "31.0", "31", "31")
    assert kinds(steps) == [False, "incorrect", True, "correct"]
    assert counts["problem: fewer distinct wrong answers than its difficulty asks for"] == 1


def test_build_takes_at_most_k_trials():
    steps, _ = build("34", "34", "34", "34", "31")
    assert len(steps) == 4


def test_build_without_a_right_sample_gives_nothing():
    steps, counts = build("30", "31", "32", "33", "35")
    assert steps is None and counts["problem: no right sample"] == 1


def test_build_without_a_wrong_sample_has_one_trial():
    steps, _ = build("34", "34", "34", "34", "34")
    assert kinds(steps) == [True, "correct"]


def test_build_drops_verifications_whose_verdict_is_untrue():
    steps, counts = build("34", "31", verify=lambda problem, answer: [VERDICT_SENTENCE["correct"]])
    assert kinds(steps) == [True, "correct"]
    assert counts["verification: its verdict does not match the truth, or there is none"] == 1


def test_build_drops_verifications_that_say_cannot_be_verified():
    steps, counts = build("34", "31", verify=lambda problem, answer: [VERDICT_SENTENCE["unverified"]])
    assert steps is None and counts["problem: no true verification of the right answer"] == 1


def test_build_takes_the_first_true_verification_and_counts_answers_without_any():
    def several(problem: str, answer: str) -> list[str]:
        return [f"A. {VERDICT_SENTENCE['incorrect']}", f"B. {VERDICT_SENTENCE['correct']}"] if answer == "34" else []

    steps, counts = build("34", "31", verify=several)
    assert kinds(steps) == [True, "correct"] and steps[1]["text"].startswith("B.")
    assert counts["verification: none of this answer"] == 1


def test_build_takes_another_right_sample_where_one_has_no_true_verification():
    def long(problem: str, answer: str) -> list[str]:
        return [f"{'4 times ' * 9}{answer}. {VERDICT_SENTENCE['correct']}"]

    samples = rows("34", "34", "34", "34")
    samples[2]["text"] = "word " * 30 + samples[2]["text"]  # the one solution that is longer than its check
    for seed in range(5):
        steps = behavior.build(samples, long, random.Random(seed), Counter(), True)
        assert kinds(steps) == [True, "correct"] and steps[0]["text"] == samples[2]["text"]


@pytest.mark.parametrize("check, solution, why", [
    ("4*34=136. {}", "x" * 99, None),
    ("4*34=136. {}", "x" * 20, "longer than the solution"),
    ("4*34=136. {}", None, None),  # no limit
    (r"136/4=\boxed{{34}}. {}", "x" * 99, "solves the problem again"),
    ("4*34=136. {} Or is it?", "x" * 99, "does not match the truth"),
])  # fmt: skip
def test_fault_names_the_rule_that_a_verification_breaks(check, solution, why):
    found = behavior.fault(check.format(VERDICT_SENTENCE["correct"]), "correct", solution)
    assert found is None if why is None else why in found


@pytest.mark.parametrize(
    "other",
    [
        {"finished": False},
        {"text": r"The answer is \boxed{31}." + "\n\nLet me try again. " + r"The answer is \boxed{34}."},
    ],
)
def test_build_leaves_out_samples_that_are_not_one_whole_attempt(other):
    steps, counts = build("34", "34", **other)
    assert steps is None
    assert counts["sample: unfinished, no answer, or more than one attempt"] == 2


def test_build_counts_a_sample_without_an_answer_as_wrong():
    steps, counts = build("34", None, None, None, "31")
    assert kinds(steps) == [False, "incorrect", True, "correct"]
    assert counts["problem: fewer distinct wrong answers than its difficulty asks for"] == 1


def test_trajectories_subsample_the_classes():
    samples = [row for i in range(400) for row in rows("34", "34" if i % 2 else "31", unique_id=str(i))]
    examples, counts = behavior.trajectories(samples, behavior.by_rule, seed=0, keep=(0.25, 1.0, 1.0, 1.0))
    easy = [e for e in examples if len(e["trajectory"]) == 2]
    assert len(examples) - len(easy) == 200
    assert 30 <= len(easy) <= 70
    assert counts["kept"] + counts["problem: left out to balance the classes, k = 1"] == 400


def test_trajectories_of_one_seed_repeat_and_do_not_depend_on_other_problems():
    samples = [row for i in range(20) for row in rows("34", "31", "32", "33", "35", unique_id=str(i))]
    first, _ = behavior.trajectories(samples, behavior.by_rule, seed=3)
    again, _ = behavior.trajectories(samples, behavior.by_rule, seed=3)
    half, _ = behavior.trajectories(samples[50:], behavior.by_rule, seed=3)
    assert first == again
    assert half == [e for e in first if int(e["unique_id"]) >= 10]


def test_main_writes_a_file_that_train_sft_reads(tmp_path, capsys):
    write_jsonl(tmp_path / "rollouts.jsonl", rows("34", "31", "32", "36", "34") + rows("1", "2", unique_id="hard"))
    behavior.main(
        [
            "--rollouts",
            str(tmp_path / "rollouts.jsonl"),
            "--out",
            str(tmp_path / "t.jsonl"),
            "--keep",
            "0",
            "1",
            "1",
            "1",
        ]
    )
    (example,) = load_trajectories(tmp_path / "t.jsonl")
    assert len(example.trajectory) == 6 and example.answer == "34"
    assert "problem: no right sample" in capsys.readouterr().out


def test_main_takes_a_verification_file(tmp_path, capsys):
    """Looked up by problem and equivalent answer; a check longer than its solve is dropped."""
    write_jsonl(tmp_path / "rollouts.jsonl", rows("34", "31", "32", "36", "34"))
    right, wrong = VERDICT_SENTENCE["correct"], VERDICT_SENTENCE["incorrect"]
    checks = [("34.0", f"A. {right}"), ("31", f"B. {wrong}"), ("32", f"C. {right}"), ("36", "D. " * 99 + wrong)]
    write_jsonl(tmp_path / "v.jsonl", [
        {"unique_id": "p", "problem": PROBLEM, "answer": answer, "verification": text} for answer, text in checks])
    flags = ["--rollouts", str(tmp_path / "rollouts.jsonl"), "--out", str(tmp_path / "t.jsonl")]
    with pytest.raises(ValueError, match="no problem gives a trajectory"):
        behavior.main([*flags, "--verifications", str(tmp_path / "v.jsonl")])
    for row in (samples := read_jsonl(tmp_path / "rollouts.jsonl")):
        row["text"] = "I think that " * 9 + row["text"]
    write_jsonl(tmp_path / "rollouts.jsonl", samples)
    behavior.main([*flags, "--verifications", str(tmp_path / "v.jsonl")])
    (example,) = load_trajectories(tmp_path / "t.jsonl")
    assert [step["text"] for step in example.trajectory[1::2]] == [f"B. {wrong}", f"A. {right}"]
    assert "1  verification: longer than the solution" in capsys.readouterr().out


def test_main_names_a_file_that_is_not_of_rollouts(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"unique_id": "p", "problem": PROBLEM, "answer": "34"}])
    with pytest.raises(ValueError, match="p.jsonl: a row has no '.*'; give a file that sample.py"):
        behavior.main(["--rollouts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "t.jsonl")])


def test_main_without_any_trajectory_says_so_and_writes_nothing(tmp_path):
    write_jsonl(tmp_path / "rollouts.jsonl", rows("1", "2"))
    with pytest.raises(ValueError, match="no problem gives a trajectory"):
        behavior.main(["--rollouts", str(tmp_path / "rollouts.jsonl"), "--out", str(tmp_path / "t.jsonl")])
    assert not (tmp_path / "t.jsonl").exists()
    assert read_jsonl(tmp_path / "rollouts.jsonl")
