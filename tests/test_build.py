"""Stage 0: one test per rule of METHOD §2 (paper App. C.1), on hand-made rollout rows."""

import os
import random
from collections import Counter

import pytest

from s2r.data import load_trajectories
from s2r.grammar import VERDICT_SENTENCE
from s2r.run.files import write_jsonl
from s2r.stage0 import build as stage0

PROBLEM = "Which number is a multiple of 17: 30, 31, 32, 33, 34, 35 or 36?"  # 34
RIGHT, WRONG = VERDICT_SENTENCE["correct"], VERDICT_SENTENCE["incorrect"]
CHECKS = [(str(n), f"{n} by 17. {WRONG if n % 17 else RIGHT}") for n in range(30, 37)]


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
    *answers: str | None, checks: list[tuple[str, str]] = CHECKS, **other
) -> tuple[list[dict] | None, Counter]:
    counts = Counter()
    return stage0.build(rows(*answers, **other), checks, random.Random(0), counts), counts


def settings(**change) -> stage0.Config:
    return stage0.Config(**{"rollouts": "r.jsonl", "verifications": "v.jsonl", "out": "t.jsonl"} | change)


def kinds(steps: list[dict]) -> list:
    return [step["correct"] if step["kind"] == "solve" else step["verdict"] for step in steps]


@pytest.mark.parametrize("samples, trials", [
    (5, [1, 2, 3, 3, 4, 4]),  # of the release: 0, 1, 2, … wrong
    (1, [1, 4]),
    (3, [1, 3, 4, 4]),
    (8, [1, 2, 3, 3, 3, 4, 4, 4, 4]),
    (10, [1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]),
])  # fmt: skip
def test_trials_wanted_is_one_only_without_a_wrong_sample(samples, trials):
    assert [stage0.trials_wanted(wrong, samples) for wrong in range(samples + 1)] == trials


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
    steps, counts = build("34", "31", "32", checks=[("34", RIGHT), ("31", RIGHT), ("32", WRONG)])
    assert kinds(steps) == [False, "incorrect", True, "correct"] and "{32}" in steps[0]["text"]
    assert counts["verification: its verdict does not match the truth, or there is none"] == 1


def test_build_drops_verifications_that_say_cannot_be_verified():
    steps, counts = build("34", "31", checks=[(n, VERDICT_SENTENCE["unverified"]) for n in ("34", "31")])
    assert steps is None and counts["problem: no true verification of the right answer"] == 1


def test_build_takes_the_first_true_verification_and_counts_answers_without_any():
    checks = [("31", WRONG), ("34.0", WRONG), ("34", f"B. {RIGHT}"), ("34", RIGHT)]
    steps, counts = build("34", "31", "32", checks=checks)
    assert kinds(steps) == [False, "incorrect", True, "correct"] and steps[3]["text"] == f"B. {RIGHT}"
    assert counts["verification: none of this answer"] == 1


@pytest.mark.parametrize("wrong, checks", [
    ("31", [("34", RIGHT)]),  # no check of the wrong answer
    ("31", [("34", RIGHT), ("31", RIGHT)]),  # an untrue one
    (None, CHECKS),  # no answer
])  # fmt: skip
def test_build_of_wrong_samples_of_which_none_is_usable_gives_nothing(wrong, checks):
    """k = 1 is for problems without a wrong sample."""
    steps, counts = build("34", "34", wrong, checks=checks)
    assert steps is None and counts["problem: has wrong samples, none with an answer and a true check"] == 1


def test_build_takes_no_check_of_another_answer_that_is_only_close():
    """2,1 is 1,2 in any order, and 1,2 is (1,2). The check of 2,1 that calls it right is untrue, also beside 1,2."""
    checks = [("2,1", RIGHT), ("2,1", WRONG)]
    steps, counts = build("2,1", *["1,2"] * 4, checks=checks, answer="(1,2)")
    assert steps is None and counts["verification: none of this answer"] == 1


@pytest.mark.parametrize("verification, why", [
    (f"4*34=136. {RIGHT}", None),
    (rf"136/4=\boxed{{34}}. {RIGHT}", None),  # a check that boxes an answer: nobody reads it
    (f"4*34=136. {RIGHT} Or is it?", "its verdict does not match the truth, or there is none"),
    (f"{'4 times ' * 99}34. {RIGHT}", None),  # longer than its solution
])  # fmt: skip
def test_build_counts_the_rule_that_a_verification_breaks(verification, why):
    steps, counts = build("34", checks=[("34", verification)])
    assert (steps is None) == (why is not None)
    assert {name for name in +counts if name.startswith("verification")} == ({f"verification: {why}"} if why else set())


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
    examples, counts = stage0.trajectories(samples, {PROBLEM: CHECKS}, settings(keep=(0.25, 1.0, 1.0, 1.0)))
    easy = [e for e in examples if len(e["trajectory"]) == 2]
    assert len(examples) - len(easy) == 200
    assert 30 <= len(easy) <= 70
    assert counts["kept"] + counts["problem: dropped to balance the classes, k = 1"] == 400


def test_trajectories_of_one_seed_repeat_and_do_not_depend_on_other_problems():
    samples = [row for i in range(20) for row in rows("34", "31", "32", "33", "35", unique_id=str(i))]
    first, _ = stage0.trajectories(samples, {PROBLEM: CHECKS}, settings(seed=3))
    again, _ = stage0.trajectories(samples, {PROBLEM: CHECKS}, settings(seed=3))
    half, _ = stage0.trajectories(samples[50:], {PROBLEM: CHECKS}, settings(seed=3))
    assert first == again
    assert half == [e for e in first if int(e["unique_id"]) >= 10]


def test_seed_chooses_among_the_samples():
    """Over the seeds, every right sample becomes the last solve, and every wrong one the first."""
    samples, found = rows("34", "34", "34", "31", "32"), Counter()
    for i, row in enumerate(samples):
        row["text"] = f"Sample {i}. {row['text']}"
    for seed in range(40):
        ((one,), _), ((two,), _) = (stage0.trajectories(part, {PROBLEM: CHECKS}, settings(seed=seed, keep=(1, 1, 1, 1)))
                                    for part in (samples[:4], samples[2:]))
        found.update([one["trajectory"][-2]["text"][:9], two["trajectory"][0]["text"][:9]])
    assert set(found) == {f"Sample {i}." for i in range(5)} and min(found.values()) >= 4


# --- the command ---


def command(tmp_path, samples: list[dict], checks: list[tuple[str, str]] = CHECKS, **change) -> None:
    """Runs the command on files of these rows; it writes t.jsonl."""
    write_jsonl(tmp_path / "rollouts.jsonl", samples)
    write_jsonl(tmp_path / "v.jsonl", (
        {"unique_id": "p", "problem": PROBLEM, "answer": answer, "verification": text} for answer, text in checks))
    paths = [str(tmp_path / name) for name in ("rollouts.jsonl", "v.jsonl", "t.jsonl")]
    stage0.main(stage0.Config(*paths, **change))


def test_main_writes_a_file_that_train_sft_reads(tmp_path, capsys):
    samples = rows("34", "31", "32", "36", "34") + rows("1", "2", unique_id="hard")
    command(tmp_path, samples, keep=(0, 1, 1, 1))
    (example,) = load_trajectories(tmp_path / "t.jsonl")
    assert len(example.trajectory) == 6 and example.problem == PROBLEM
    assert "1  problem: no right sample" in capsys.readouterr().out


def test_main_finds_checks_by_problem_and_equivalent_answer(tmp_path, capsys):
    checks = [("34.0", f"A. {RIGHT}"), ("31", f"B. {WRONG}"), ("32", f"C. {RIGHT}")]
    command(tmp_path, rows("34", "31", "32", "36", "34"), checks)
    (example,) = load_trajectories(tmp_path / "t.jsonl")
    assert [step["text"] for step in example.trajectory[1::2]] == [f"B. {WRONG}", f"A. {RIGHT}"]
    assert "1  verification: none of this answer" in capsys.readouterr().out


def test_main_names_a_file_that_is_not_of_rollouts(tmp_path):
    with pytest.raises(ValueError, match="rollouts.jsonl: row 1: .* no 'finished'; give a file that sample.py"):
        command(tmp_path, [{"unique_id": "p", "problem": PROBLEM, "answer": "34", "text": "I give up."}])


def test_main_names_a_verification_that_is_none(tmp_path):
    with pytest.raises(ValueError, match='v.jsonl: row 2: .*"verification" have to be strings, keys are unique_id'):
        command(tmp_path, rows("34"), [("34", RIGHT), ("31", None)])


def test_main_refuses_a_fraction_above_one(tmp_path):
    with pytest.raises(ValueError, match="--keep 24: give fractions between 0 and 1"):
        command(tmp_path, rows("34"), keep=(24, 1, 1, 1))


def test_main_replaces_no_fifo(tmp_path):
    os.mkfifo(tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match=r"\bt\.jsonl"):
        command(tmp_path, rows("34", "31"))
    assert (tmp_path / "t.jsonl").is_fifo()


def test_main_without_any_trajectory_says_so_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="no problem gives a trajectory"):
        command(tmp_path, rows("1", "2"))
    assert not (tmp_path / "t.jsonl").exists()
