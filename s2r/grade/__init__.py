"""V_golden: is the boxed answer the gold answer? `judge.py` decides, `latex.py` reads mathematics for it."""

from s2r.grade.judge import MAX_CHARS, equivalent, extract_answer, parsable

__all__ = ["MAX_CHARS", "equivalent", "extract_answer", "parsable"]
