"""Problem sets as they were published → plain rows, as our own problem files have them. Called by `s2r/data.py`.

    set                    keys                                        problem, gold answer
    MATH, our own files    problem, answer or solution                 answer; without one, the last \\boxed of the solution
    GSM8K                  question, answer                            what follows "####"; the rest is the solution
    OlympiadBench          question, context, final_answer, unit       several answers are joined by commas
    ASDiv                  body, question, answer, formula             "9 (apples)" is 9
    SVAMP                  Body, Question, Answer, Equation
    MAWPS                  input, target
    MMLU, MMLU-Pro, AQuA   question, choices or options, answer or     lettered options; a letter, also where the file
                           correct                                     has an index
    StrategyQA             question, answer                            true is Yes, false is No
    FOLIO                  premises, conclusion, label                 True, False or Uncertain
    CRUXEval               code, input, output                         a Python literal
"""

import re

from s2r.grade import extract_answer

# Without these a problem may say something else: a row is refused if it holds one that its set does not use.
MEANING = {"body", "Body", "context", "choices", "options", "unit", "error", "premises", "code", "passage", "image"}


def plain(row: dict) -> dict:
    """The row with `problem`, `answer`, `solution`, `formula` and `level` in our own form; other keys stay.

    What cannot be converted stays as it is, and the reader of the row says what is wrong. Raises ValueError for a row
    that would be read in part.
    """
    row = {key: value for key, value in row.items() if value or key not in ("choices", "options")}  # null: an open question
    keys, read = next((keys, read) for keys, read in SETS if row.keys() >= set(keys))
    used = [*keys, *(("context", "unit") if read is _question else ())]
    unread = [key for key in row if key in MEANING - set(used) and row[key] not in (None, "", [])]
    if unread:
        there = ", ".join(sorted(row.keys() - set(unread)))
        raise ValueError(f"{unread[0]!r} beside {there} belongs to no known set; convert the row, or drop it")
    for key in keys:
        if key in ("question", "body", "Body", "Question", "conclusion", "code") and not isinstance(row[key], str):
            raise ValueError(f"{key!r} is {row[key]!r}; write a text, or drop the row")
    row = row | read(row)
    solution, answer, level = row.get("solution"), row.get("answer"), row.get("level")
    if isinstance(solution, list):
        solution = "\n".join(map(str, solution))
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not answer and isinstance(solution, str):
        answer = extract_answer(solution)
    if isinstance(level, str):  # "Level 3"; "Level ?" occurs
        digits = level.removeprefix("Level ").strip()
        level = int(digits) if digits.isdecimal() else None
    sums = re.findall(r"<<([^<>]*)>>", solution) if isinstance(solution, str) else []  # GSM8K's calculator annotations
    return row | {
        "problem": row.get("problem"), "answer": answer, "solution": solution, "level": level,
        "formula": row.get("formula") or "; ".join(sums) or None,
    }


def boxed(solution: str, answer: str) -> str:
    """A published solution as one solve: it ends in the answer in a box, also where the file has it after "####"."""
    if extract_answer(solution) is not None:
        return solution
    text = re.sub(r"<<[^<>]*>>", "", solution.partition("####")[0])  # without GSM8K's calculator annotations
    return f"{text.strip()}\nThe answer is \\boxed{{{answer}}}."


def _question(row: dict) -> dict:
    problem, answer, solution = row.get("problem", row.get("question")), row.get("answer"), row.get("solution")
    if isinstance(problem, str) and row.get("context"):
        problem = f"{row['context']}\n{problem}"
    if isinstance(problem, str) and row.get("unit"):
        problem = f"{problem}\nGive the answer in {row['unit']}."
    if isinstance(answer, bool) and "question" in row:
        problem, answer = f"{problem}\nAnswer Yes or No.", "Yes" if answer else "No"
    final = row.get("final_answer")
    if answer is None and isinstance(final, list) and all(isinstance(part, str) for part in final):
        answer = ", ".join(final)
    if isinstance(answer, str) and "####" in answer:
        solution, answer = solution or answer, answer.rpartition("####")[2].strip()
    return {"problem": problem, "answer": answer, "solution": solution}


def _asdiv(row: dict) -> dict:
    answer = re.sub(r"\s+\([^()]*\)\s*$", "", row["answer"]) if isinstance(row["answer"], str) else row["answer"]
    return {"problem": f"{row['body']}\n{row['question']}", "answer": answer}


def _svamp(row: dict) -> dict:
    problem, formula = f"{row['Body']}\n{row['Question']}", row.get("Equation")
    return {"problem": problem, "answer": row["Answer"], "formula": formula and f"{formula}={row['Answer']}"}


def _choice(row: dict) -> dict:
    options, answer = row.get("choices", row.get("options")), row.get("correct", row.get("answer"))
    if not isinstance(options, list) or not 2 <= len(options) <= 26:
        raise ValueError("choices or options are not a list of 2 to 26 options; convert the row, or drop it")
    letters = [chr(ord("A") + i) for i in range(len(options))]
    labels = [re.match(rf"\s*\(?{letter}[).]\s*", str(option)) for letter, option in zip(letters, options)]
    # Of one option alone the letter may be an initial, as in B. F. Skinner.
    texts = [str(option)[label.end() if all(labels) else 0 :] for option, label in zip(options, labels)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        answer = letters[answer]
    if answer not in letters:
        raise ValueError(f"answer {answer!r} is neither the letter nor the index, from 0, of an option; correct it")
    listed = "\n".join(f"({letter}) {text}" for letter, text in zip(letters, texts))
    return {"problem": f"{row['question']}\n{listed}\nAnswer with the letter of the right option.", "answer": answer}


def _folio(row: dict) -> dict:
    premises = "\n".join(map(str, row["premises"])) if isinstance(row["premises"], list) else row["premises"]
    question = f"Conclusion: {row['conclusion']}\nIs the conclusion True, False or Uncertain?"
    return {"problem": f"{premises}\n{question}", "answer": "Uncertain" if row["label"] == "Unknown" else row["label"]}


def _cruxeval(row: dict) -> dict:
    question = f"What does f({row['input']}) return? Answer with a Python literal."
    return {"problem": f"```python\n{row['code']}\n```\n{question}", "answer": row["output"]}


SETS = [  # the first whose keys a row has, all of them, reads it
    (("code", "input", "output"), _cruxeval),
    (("premises", "conclusion", "label"), _folio),
    (("question", "choices", "answer"), _choice),
    (("question", "options", "answer"), _choice),
    (("question", "options", "correct"), _choice),
    (("body", "question", "answer"), _asdiv),
    (("Body", "Question", "Answer"), _svamp),
    (("input", "target"), lambda row: {"problem": row["input"], "answer": row["target"]}),
    ((), _question),
]
