"""What is read: problems, SFT trajectories, JSONL rows of any kind; and the order in which they are used.

    problem file, one JSON object a line     {"problem", "answer",
                                              "solution"?, "formula"?, "level"?, "unique_id"?}
    or a published set as it comes           GSM8K, MATH, ASDiv, MMLU and more: `s2r/sets.py`

    trajectory file   {"unique_id", "problem", "answer", "trajectory": [solve, verify, solve, verify, …]}
    with steps        {"kind": "solve", "text", "correct"}   {"kind": "verify", "text", "verdict"}
    or a problem file with `solution`: one right solve, no verify (the paper's SFT baselines)

All files come from a user: one that cannot be used raises a ValueError or FileNotFoundError that names file and row.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from s2r.grade import parsable
from s2r.grammar import parse_verdict, render
from s2r.sets import boxed, plain


@dataclass(frozen=True)
class Problem:
    """One problem with its gold answer."""

    problem: str
    answer: str
    unique_id: str
    level: int | None = None  # difficulty, 1 (easy) to 5 in MATH
    solution: str | None = None
    formula: str | None = None  # of the solution, as "7+2=9"; several are joined by "; "


@dataclass(frozen=True)
class Example:
    """One SFT trajectory: wrong solves with their checks, then a right one with its check."""

    problem: str
    trajectory: list[dict]  # steps, see the module docstring


def draw(items: int, count: int, step: int, seed: int, *, partial: bool = False) -> list[int]:
    """The `count` indices out of range(items) that step number `step` (from 1) uses.

    Each epoch is a new permutation, a function of (seed, epoch) alone, which is what --resume relies on. The rest of
    an epoch that does not fill a step is left out; with `partial` it is a smaller step of its own.
    """
    per_epoch = -(-items // count) if partial else items // count  # steps; partial rounds up
    epoch, at = divmod(step - 1, per_epoch)
    return order(items, seed, epoch)[at * count :][:count]


def order(items: int, seed: int, epoch: int) -> list[int]:
    """A random permutation of range(items), a function of (seed, epoch) alone."""
    return torch.randperm(items, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def read_jsonl(path: str | Path) -> list[dict]:
    """Rows of a JSON-lines file, blank lines left out.

    Raises FileNotFoundError, and ValueError for an empty file or a row that is not a JSON object in valid UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a JSON-lines file, one object per line")
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(filter(bytes.strip, file), start=1):
            try:
                row = json.loads(line.decode("utf-8-sig"), parse_constant=int)  # int("NaN") is refused
                if b"\\ud" in line.lower():  # half of a surrogate pair passes json.loads and breaks every tokenizer
                    json.dumps(row, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: row {number}: not JSON ({error}); write one object per line") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}: row {number}: a {type(row).__name__}, not an object like {{…}}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows; the file is empty")
    return rows


def load_problems(path: str | Path, limit: int = 0) -> list[Problem]:
    """The problems in the first `limit` rows of a file (0: in all).

    It skips rows whose answer is the empty string (public sets hold a few) and prints their numbers.
    Raises FileNotFoundError, and ValueError naming file and rows: no problem, no answer, an answer that cannot be
    graded against, a `unique_id` that another row has, no row left.
    """
    if limit < 0:
        raise ValueError(f"limit {limit}: give a number of problems, 0 for all")
    problems, failed, blank, first_row = [], {}, [], {}
    for number, row in enumerate(read_jsonl(path)[: limit or None], start=1):
        if row.get("answer") == "":
            blank.append(number)
            continue
        try:
            problem = _problem(row, f"{Path(path).stem}/{number - 1}")
            seen = first_row.setdefault(problem.unique_id, number)
            if seen != number:  # rollouts are grouped by it
                raise ValueError(f"unique_id {problem.unique_id!r} is that of row {seen} already; make it unique")
            problems.append(problem)
        except ValueError as error:
            failed[number] = error
    if failed:
        number, error = next(iter(failed.items()))
        more = f" ({len(failed)} rows fail, the first: {list(failed)[:10]})" if len(failed) > 1 else ""
        raise ValueError(f"{path}: row {number}: {error}{more}") from error
    if blank:
        print(f"{path}: rows with an empty answer, skipped: {', '.join(map(str, blank))}", file=sys.stderr)
    if not problems:
        raise ValueError(f"{path}: no row with an answer; give a file with gold answers")
    return problems


def load_trajectories(path: str | Path) -> list[Example]:
    """Trajectories of a file, each checked against the grammar and the transition rule; or the solutions of one.

    Raises FileNotFoundError, and ValueError naming file and row.
    """
    examples = []
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            problem = _problem(row, f"{Path(path).stem}/{number - 1}")
            steps = row.get("trajectory")
            if steps is None and problem.solution:
                steps = [{"kind": "solve", "text": boxed(problem.solution, problem.answer), "correct": True}]
            else:
                _check_steps(steps)
            render(steps)  # raises for a text that `parse` would not read back
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}") from error
        examples.append(Example(problem.problem, steps))
    return examples


def _problem(row: dict, default_id: str) -> Problem:
    """One row as a Problem, with `default_id` if it has no unique_id; ValueError saying what is wrong with it."""
    fix = f"keys are {', '.join(row) or 'none'}; add it or drop the row"
    row = plain(row)
    problem, answer, level = row["problem"], row["answer"], row["level"]
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError(f'no "problem" (or GSM8K\'s "question"), {fix}')
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f'"answer" is empty or missing, and no "solution" has one in \\boxed, {fix}')
    if not parsable(answer) or answer.strip().lower() == "nan":
        raise ValueError(f"gold answer {answer!r} cannot be parsed; correct it or drop the row")
    if not isinstance(level, int | None):
        raise ValueError(f'"level" is {level!r}; write a whole number or leave it out')
    if not isinstance(row["solution"], str | None):
        raise ValueError(f'"solution" is {row["solution"]!r}; write a text or leave it out')
    unique_id = default_id if row.get("unique_id") in (None, "") else str(row["unique_id"])
    return Problem(problem, answer, unique_id, level, row["solution"], row["formula"])


def _check_steps(steps: object) -> None:
    """Raises ValueError unless the steps are (wrong solve, "incorrect")*, right solve, "correct", all readable."""
    if not isinstance(steps, list) or not steps or len(steps) % 2:
        raise ValueError('"trajectory" is not a list of pairs of solve and verify; give a file that stage 0 wrote')
    for i, step in enumerate(steps):
        kind = ("solve", "verify")[i % 2]
        if not isinstance(step, dict) or step.get("kind") != kind or not isinstance(step.get("text"), str):
            raise ValueError(f"step {i + 1} is not a {kind} with a text; solve and verify alternate, solve first")
        last = i >= len(steps) - 2
        if kind == "solve" and step.get("correct") is not last:
            raise ValueError(f'step {i + 1} has "correct": {step.get("correct")!r}; the last solve is right, no other')
        expected = "correct" if last else "incorrect"
        if kind == "verify" and not step.get("verdict") == parse_verdict(step["text"]) == expected:
            said, end = step.get("verdict"), step["text"].strip()[-60:]
            raise ValueError(f'step {i + 1} has "verdict": {said!r} and ends in {end!r}; both have to say {expected}')
