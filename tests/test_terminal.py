"""A trajectory in the terminal: what is printed of it, with and without a gold answer."""

from dataclasses import replace

import pytest
from test_rl import response

from s2r.hf.tokenizer import Tokenizer
from s2r.view.terminal import show
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_show_prints_every_action_with_what_was_read_and_its_reward(tokenizer):
    assert show(response("-i+c", tokenizer)) == "\n".join([
        "── problem sum: 3+4?",
        "── solve: answer 8, reward -1",
        r"3+4=\boxed{8}.",
        "── verify: verdict incorrect, reward +1",
        "Wait, let me recheck my solution. Therefore, the answer is incorrect.",
        "── solve: answer 7, reward +1",
        r"Let me try again. 3+4=\boxed{7}.",
        "── verify: verdict correct, reward +1",
        "Wait, let me recheck my solution. Therefore, the answer is correct.",
        "── stopped by itself; gold answer 7, outcome reward +1",
    ])
    assert show(response("0", tokenizer, finished=False)).splitlines()[1:] == [
        "── solve: answer None, reward -1",
        "3+4 is something.",
        "── cut off by the length limit; gold answer 7, outcome reward -1",
    ]


def test_show_grades_nothing_without_a_gold_answer(tokenizer):
    """`sample.py --ask` without --answer: there is no reward to show."""
    asked = response("-i+c", tokenizer)
    printed = show(replace(asked, problem=replace(asked.problem, answer="")))
    assert "answer 8" in printed and "reward" not in printed and "gold" not in printed
