"""Problem sets as they were published → plain rows, as our own problem files have them. Called by `s2r/data.py`.

    {"question", "answer": "… #### 42"}                   GSM8K: the answer stands after "####", the solution before
    {"problem", "solution", "level": "Level 3", "type"}   MATH: the answer is the last \\boxed of the solution
    {"question", "context", "final_answer": [str, …]}     OlympiadBench: several answers are joined by commas
"""

from s2r.grade import extract_answer


def plain(row: dict) -> dict:
    """The row with `problem`, `answer`, `solution`, `level` and `subject` in our own form; other keys stay.

    Nothing is checked here: what cannot be converted stays as it is, and the reader of the row says what is wrong.
    """
    problem = row.get("problem", row.get("question"))
    answer, solution, level = row.get("answer", row.get("final_answer")), row.get("solution"), row.get("level")
    context = row.get("context")
    if isinstance(problem, str) and isinstance(context, str) and context.strip():
        problem = f"{context}\n{problem}"
    if isinstance(answer, list) and all(isinstance(part, str) for part in answer):
        answer = ", ".join(answer)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if isinstance(solution, list):
        solution = "\n".join(map(str, solution))
    if isinstance(answer, str) and "####" in answer:
        solution = answer if solution is None else solution
        answer = answer.rpartition("####")[2].strip()
    elif not answer and isinstance(solution, str):
        answer = extract_answer(solution)
    if isinstance(level, str):  # "Level 3"; "Level ?" occurs
        digits = level.removeprefix("Level ").strip()
        level = int(digits) if digits.isdecimal() else None
    subject = row.get("subject", row.get("type"))
    return row | {"problem": problem, "answer": answer, "solution": solution, "level": level, "subject": subject}


def boxed(solution: str, answer: str) -> str:
    """A published solution as one solve: it ends in the answer in a box, also where the file has it after "####"."""
    if extract_answer(solution) is not None:
        return solution
    return f"{solution.partition('####')[0].strip()}\nThe answer is \\boxed{{{answer}}}."
