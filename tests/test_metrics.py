"""Metrics: tables worked out by hand, and the identity of METHOD's accuracies over random responses."""

import re
from dataclasses import dataclass, field
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2r import metrics as page
from s2r.data import Problem
from s2r.grammar import Action
from s2r.metrics import at_k, majority, summarize, warnings


@dataclass
class Response:
    actions: list[Action]
    ids: list[int] = field(default_factory=list)
    finished: bool = True
    level: int | None = None
    name: str = "id"
    sample: int = 0

    @property
    def problem(self) -> Problem:
        return Problem("p", "1", self.name, level=self.level)


def response(code: str, **others) -> Response:
    """Solves `+` right, `-` wrong, `0` wrong for want of an answer; verifies `c`, `i`, `?` for Parser(v)."""
    actions, truth = [], None
    for i, letter in enumerate(code):
        if letter in "+-0":
            answer, truth = None if letter == "0" else "1", "correct" if letter == "+" else "incorrect"
            actions.append(Action("solve", i, i + 1, "", answer=answer, correct=letter == "+"))
        else:
            verdict = {"c": "correct", "i": "incorrect", "?": None}[letter]
            actions.append(Action("verify", i, i + 1, "", verdict=verdict, truth=truth))
    return Response(actions, **others)


def test_summarize_agrees_with_the_example_in_its_docstring():
    metrics = summarize([response(code) for code in ("+c", "-i+c", "-c", "+i-c")])
    example = re.findall(r"^    (\w+) .* (\d)/(\d)$", page.__doc__, re.MULTILINE)
    assert len(example) == 10
    for name, above, below in example:
        assert metrics[name] == int(above) / int(below), name


def test_summarize_by_hand():
    metrics = summarize([
        response("+c", level=1, ids=[1, 2]),  # right at once
        response("-i+c", level=5, ids=[1, 2, 3, 4]),  # corrected
        response("-c", level=5, ids=[1]),  # wrong and not noticed
        response("+i-?", level=5, ids=[1] * 9, finished=False),  # right, spoilt by its check
        response("-i0", ids=[1, 2]),  # tried again in vain
    ])
    assert metrics == {
        "accuracy": 2 / 5,
        "first_accuracy": 2 / 5,
        "trials": 8 / 5,
        "va": 4 / 7,  # of c, i, c, c, i, ?, i: all but c after -, i after +, ? after -
        "er": 2 / 4,  # after wrong solves: i, c, ?, i
        "va_right": 2 / 3,  # after right solves: c, c, i
        "va_by_trial": {"1": 3 / 5, "2": 1 / 2},
        "cp": 2 / 3,
        "icr": 1 / 3,
        "cir": 1 / 2,
        "say_correct": 3 / 6,  # all but the unreadable one
        "by_level": {"1": {"accuracy": 1.0, "trials": 1.0, "responses": 1},
                     "5": {"accuracy": 1 / 3, "trials": 5 / 3, "responses": 3}},
        "finished": 4 / 5,
        "tokens": 18 / 5,
        "no_answer": 1 / 5,
        "no_verdict": 1 / 7,
        "repeats": 2 / 3,  # every solve here answers "1", but for the last
        "responses": 5,
    }


def test_summarize_without_solve_is_wrong_with_no_trials():
    metrics = summarize([response("i"), response("c"), response("")])
    assert (metrics["accuracy"], metrics["first_accuracy"], metrics["trials"]) == (0, 0, 0)
    assert (metrics["va"], metrics["er"], metrics["cp"]) == (0, None, None)  # nothing to be right about
    assert metrics["icr"] == 0 and metrics["no_answer"] == 1


def test_summarize_holds_two_verifies_against_the_same_solve():
    metrics = summarize([response("-+cic")])
    assert metrics["va"] == 2 / 3 and metrics["cp"] == 1 and metrics["er"] is None


def test_summarize_counts_say_correct_among_readable_verdicts():
    assert summarize([response("+c"), response("-i"), response("-?"), response("cc")])["say_correct"] == 3 / 4
    assert summarize([response("+?"), response("-")])["say_correct"] is None


def test_summarize_fractions_of_nothing_are_none():
    metrics = summarize([])
    assert metrics.pop("by_level") == metrics.pop("va_by_trial") == {} and metrics.pop("responses") == 0
    assert set(metrics.values()) == {None}
    metrics = summarize([response("+")])
    assert [metrics[name] for name in ("va", "er", "cp", "icr", "say_correct", "no_verdict")] == [None] * 6
    assert metrics["cir"] == 0


def test_summarize_wants_judged_actions():
    with pytest.raises(AssertionError, match="judge"):
        summarize([Response([Action("solve", 0, 1, "")])])


@given(st.lists(st.text(alphabet="+-0ci?", max_size=6), min_size=1, max_size=12))
def test_accuracy_identity(codes):
    metrics = summarize([response(code) for code in codes])
    first, icr, cir = (metrics[name] or 0 for name in ("first_accuracy", "icr", "cir"))
    assert metrics["accuracy"] == pytest.approx(first * (1 - cir) + (1 - first) * icr)


@given(st.lists(st.tuples(st.text(alphabet="+-0ci?", max_size=6), st.integers(1, 5)), min_size=1, max_size=12))
def test_levels_average_to_the_whole(rows):
    metrics = summarize([response(code, level=level) for code, level in rows])
    for name in ("accuracy", "trials"):
        total = sum(at[name] * at["responses"] for at in metrics["by_level"].values())
        assert metrics[name] == pytest.approx(total / metrics["responses"])


# --- several responses per problem ---


def samples(**codes: str) -> list[Response]:
    """Responses of one solve each: samples(p="+-") has a right and a wrong one to the problem p."""
    return [response(letter, name=name, sample=j) for name, code in codes.items() for j, letter in enumerate(code)]


def test_at_k_by_hand():
    found = at_k(samples(p="+---", q="----", r="++-+"))
    assert found["pass_at_k"] == pytest.approx({"1": 1 / 3, "2": (1 / 2 + 0 + 1) / 3, "4": 2 / 3})
    accuracy = [1 / 4, 0, 3 / 4]
    assert found["right"] == [1, 0, 3]
    assert found["standard_error"] == pytest.approx((sum((x - 1 / 3) ** 2 for x in accuracy) / 2 / 3) ** 0.5)
    one = at_k(samples(p="+", q="-"))  # one response each: no k
    assert set(one) == {"standard_error", "right"} and one["right"] == "10"
    assert at_k(samples(p="+-"))["standard_error"] is None  # one problem: no spread over problems


@given(st.lists(st.booleans(), min_size=1, max_size=7))
def test_pass_at_k_is_the_fraction_of_subsets_with_a_right_response(right):
    found = at_k(samples(p="".join("-+"[x] for x in right)))
    for k, fraction in found.get("pass_at_k", {}).items():
        subsets = list(combinations(right, int(k)))
        assert fraction == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_joins_equivalent_answers_and_breaks_ties_by_order():
    def solves(*answers: str | None) -> list[Action]:
        return [Action("solve", 0, 1, "", answer=answer) for answer in answers]

    assert majority(solves("3", "0.5", r"\frac{1}{2}")).answer == "0.5"
    assert majority(solves("3", "4", "4", "3")).answer == "3"
    assert majority(solves(None, None, "9")).answer == "9"
    assert majority([*solves(None), None]) is None


def test_maj_at_k_looks_at_the_first_k_samples_whatever_their_order():
    def answer(sample: int, text: str, correct: bool) -> Response:
        return Response([Action("solve", 0, 1, "", answer=text, correct=correct)], sample=sample)

    rows = [answer(2, "7", True), answer(0, "8", False), answer(3, "7", True), answer(1, "8", False)]
    assert at_k(rows)["maj_at_k"] == {"1": 0.0, "2": 0.0, "4": 0.0}
    rows = [answer(2, "7", True), answer(0, "8", False), answer(3, "7", True), answer(1, "7", True)]
    assert at_k(rows)["maj_at_k"] == {"1": 0.0, "2": 0.0, "4": 1.0}


# --- steps that have nothing to learn from ---


def test_warnings_are_none_for_a_step_with_something_to_learn():
    assert warnings(summarize([response("+c"), response("-i0c")]), [1.0, -1.0]) == []
    assert warnings(summarize([response("+"), response("-")]), [1.0, -1.0]) == []  # no verdicts at all


@pytest.mark.parametrize("codes, rewards, expected", [
    (["+c", "+i"], [1.0, 1.0], "all rewards are equal"),
    (["0c", "0i"], [-1.0, -0.5], "no response ends in a boxed answer"),
    (["+c"] * 20 + ["-i"], [1.0] * 20 + [-1.0], 'more than 95 % of the verdicts say "correct"'),
    (["-i"] * 20 + ["+c"], [-1.0] * 20 + [1.0], 'more than 95 % of the verdicts say "incorrect"'),
    (["-i+c"] * 9 + ["-i0"] * 2, [1.0] * 9 + [-1.0] * 2, "more than 80 % of the retries"),
])  # fmt: skip
def test_warnings_name_what_a_step_cannot_learn_from(codes, rewards, expected):
    (found,) = warnings(summarize([response(code) for code in codes]), rewards)
    assert expected in found


def test_warnings_of_a_step_in_which_no_response_finished():
    rows = [response("+c", finished=False), response("-i", finished=False)]
    assert ["no response finished" in found for found in warnings(summarize(rows), [1.0, -1.0])] == [True]
    rows[0].finished = True
    assert warnings(summarize(rows), [1.0, -1.0]) == []


def test_warnings_begin_above_80_percent_of_repeated_answers():
    rows = [response("-i+c")] * 4 + [response("-i0")]
    assert warnings(summarize(rows), [1.0, 1.0, 1.0, 1.0, -1.0]) == []
    assert len(warnings(summarize(rows + [response("-i+c")]), [1.0, 1.0, 1.0, 1.0, -1.0, 1.0])) == 1


@pytest.mark.parametrize("few, many", ["ci", "ic"])
def test_warnings_begin_above_95_percent_of_equal_verdicts(few, many):
    rows = [response("-" + few)] + [response("+" + many)] * 19
    assert warnings(summarize(rows), [1.0, *[-1.0] * 19]) == []
    assert len(warnings(summarize(rows + [response("+?"), response("+" + many)]), [1.0, *[-1.0] * 21])) == 1
