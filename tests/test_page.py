"""The web page: what it holds, what its filters pick, and that model text stays text."""

import json
import re
from dataclasses import replace

import pytest
from test_rl import response

import sample
from s2r.hf.tokenizer import Tokenizer
from s2r.run.files import write_jsonl
from s2r.view.page import Config, labels, main, page
from tiny_model import problem_file, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


def content(html: str) -> dict:
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)
    return json.loads(data)


@pytest.mark.parametrize("code, expected", [
    ("+c", []), ("-i+c", ["corrected"]), ("+i-c", ["spoiled", "missed", "false alarm"]), ("-c", ["missed"]),
    ("+i+c", ["false alarm", "repeats an answer"]), ("-i-?", ["repeats an answer"]), ("?", []),
])  # fmt: skip
def test_labels_name_what_happened(code, expected, tokenizer):
    assert labels(response(code, tokenizer)) == expected
    assert labels(response(code, tokenizer, finished=False)) == [*expected, "cut off"]


def test_page_marks_a_true_verdict_whose_check_is_unsound(tokenizer):
    base = response("-i+c", tokenizer)
    for places, expected in (((1,), True), ((), False), ((0, 2), False)):  # a solve has no reasons
        actions = [replace(action, sound=i not in places if action.kind == "verify" else None)
                   for i, action in enumerate(base.actions)]
        audited = replace(base, actions=actions)
        assert ("right verdict, wrong reason" in labels(audited)) is expected
        shown = content(page([audited], tokenizer, "title"))["rows"][0]["actions"]
        assert [action.get("sound") for action in shown] == [action.sound for action in actions]
    untrue = response("-c", tokenizer)
    untrue = replace(untrue, actions=[untrue.actions[0], replace(untrue.actions[1], sound=False)])
    assert labels(untrue) == ["missed"]


def test_page_holds_every_action_with_reward_advantage_and_tokens(tokenizer):
    group = [response("-i+c", tokenizer), response("+c", tokenizer)]
    found = content(page(group, tokenizer, "title"))
    assert found["title"] == "title"
    first, second = found["rows"]
    assert [a["reward"] for a in first["actions"]] == [-1, 1, 1, 1]
    assert [a["advantage"] for a in first["actions"]] == [-1, 0, 0, 0]  # the mean of −1 and 1, then alone in its context
    assert second["actions"][0]["answer"] == "7" and second["actions"][1]["verdict"] == "correct"
    assert second["labels"] == []
    for trajectory, row in zip(group, found["rows"]):
        pieces = [token for action in row["actions"] for token in action["tokens"]]
        assert "".join(text for text, _ in pieces) == trajectory.text.removesuffix("<|im_end|>") and len(pieces) == len(trajectory.ids)
        assert all(logp == -1.0 for _, logp in pieces)


def test_page_keeps_model_text_from_becoming_markup(tokenizer):
    trouble = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--"
    base = response("+c", tokenizer)
    ids = tokenizer.encode(trouble)
    hostile = replace(base, problem=replace(base.problem, problem=trouble), ids=ids, logp=[0.0] * len(ids),
                      actions=[replace(base.actions[0], start=0, end=len(ids), answer=trouble)])
    html = page([hostile], tokenizer, trouble)
    assert html.count("</script>") == 2 and "<img" not in html and "<!--" not in html
    row = content(html)["rows"][0]
    assert row["problem"] == row["actions"][0]["answer"] == trouble
    assert "".join(text for text, _ in row["actions"][0]["tokens"]) == trouble


def test_sample_writes_a_page(folder, tmp_path):
    out = tmp_path / "new" / "page.html"
    sample.main(sample.Config(model=str(folder), data=str(problem_file(tmp_path / "p.jsonl", 3)), max_new_tokens=9,
                              show=0, html=str(out)))
    assert len(content(out.read_text())["rows"]) == 3


def test_page_of_a_rollout_file_is_that_of_its_trajectories(tokenizer, folder, tmp_path):
    group = [response("-i+c", tokenizer), response("+c", tokenizer)]
    write_jsonl(tmp_path / "r.jsonl", (t.to_row() for t in group))
    main(Config(str(tmp_path / "r.jsonl"), str(folder), str(tmp_path / "page.html")))
    assert (tmp_path / "page.html").read_text() == page(group, tokenizer, str(tmp_path / "r.jsonl"))
