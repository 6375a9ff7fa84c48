"""Calculations to practise: every result is true, and the rows are a problem file that SFT reads."""

import re

import pytest

from s2r.data import load_problems
from s2r.stage0 import arithmetic

NUMBER = r"[1-9][0-9]*"


def test_every_calculation_is_true_and_repeats_with_its_seed(tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        arithmetic.main(arithmetic.Config(out=str(tmp_path / name), rows=200, seed=seed))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() != (tmp_path / "other").read_bytes()

    problems, signs = load_problems(str(tmp_path / "one")), ""
    assert len(problems) == len({problem.unique_id for problem in problems}) == 200
    for problem in problems:
        found = re.findall(rf"({NUMBER}) ([+−×÷]) ({NUMBER}) = ({NUMBER})", problem.solution)
        assert len(found) == 10 and problem.answer == found[-1][3]
        assert problem.problem == f"Compute {', '.join(f'{a} {sign} {b}' for a, sign, b, _ in found)}."
        assert problem.solution == f"We compute {', '.join(f'{a} {sign} {b} = {c}' for a, sign, b, c in found)}."
        for a, sign, b, c in found:
            a, b, c = int(a), int(b), int(c)
            assert {"+": a + b == c, "−": a - b == c, "×": a * b == c, "÷": a == b * c}[sign]
            signs += sign
    assert signs.count("−") / len(signs) == pytest.approx(0.4, abs=0.05)  # 2,000 draws: 4.5 standard errors


def test_no_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--rows 0"):
        arithmetic.main(arithmetic.Config(out=str(tmp_path / "out"), rows=0))
