"""Rollouts: sampled ids to judged trajectories, and the rollout file's contract."""

import json

import pytest

from s2r.data import Problem, read_jsonl
from s2r.generate import Rollout
from s2r.model import Transformer
from s2r.rollouts import encode_prompts, load_rollouts, roll_out
from s2r.hf.tokenizer import Tokenizer
from s2r.grammar import encode, prompt
from s2r.run.files import write_jsonl
from tiny_model import steps, tiny_model

PROBLEM = Problem("3+4?", "7", "sum/34", level=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), context=160)


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder) -> Transformer:
    return Transformer.from_pretrained(folder)


@pytest.fixture
def written(model, tokenizer, monkeypatch):
    """`roll_out` with a sampler that writes given ids: -> the trajectories of PROBLEM."""

    def run(*responses: tuple[list[int], bool]):
        def generate(model, prompts, *, n, **options):
            assert n == len(responses) and options["stop_ids"] == tokenizer.stop_ids
            return [Rollout(0, i, ids, [-0.12345678] * len(ids), end) for i, (ids, end) in enumerate(responses)]

        monkeypatch.setattr("s2r.rollouts.generate", generate)
        return roll_out(model, tokenizer, [PROBLEM], n=len(responses), temperature=0.7, max_new_tokens=99, seed=0)

    return run


def test_to_row_is_the_rollout_contract(written, tokenizer, tmp_path):
    """DESIGN §3: keys, spans that index and tile `ids`, rewards ±1; one wrong attempt, noticed, then right."""
    ids, actions = encode(steps(3, 4, wrong=1), tokenizer)
    (trajectory,) = written((ids, True))
    write_jsonl(tmp_path / "rollouts.jsonl", [trajectory.to_row()])
    (row,) = read_jsonl(tmp_path / "rollouts.jsonl")
    assert list(row) == ["unique_id", "problem", "answer", "level", "sample", "temperature", "prompt_ids", "ids",
                         "logp", "finished", "text", "actions", "reward"]
    assert (row["unique_id"], row["problem"], row["answer"], row["level"]) == ("sum/34", "3+4?", "7", 2)
    assert (row["sample"], row["temperature"], row["finished"], row["reward"]) == (0, 0.7, True, 1)
    assert row["prompt_ids"] == prompt("3+4?", tokenizer) and row["ids"] == ids
    assert row["logp"] == pytest.approx([-0.12345678] * len(ids), abs=1e-6)
    assert row["text"] == tokenizer.decode(ids[:-1]) and "<|im_end|>" not in row["text"]
    assert row["actions"] == [
        {"kind": "solve", "start": 0, "end": actions[0].end, "answer": "8", "reward": -1},
        {"kind": "verify", "start": actions[0].end, "end": actions[1].end, "verdict": "incorrect", "reward": 1},
        {"kind": "solve", "start": actions[1].end, "end": actions[2].end, "answer": "7", "reward": 1},
        {"kind": "verify", "start": actions[2].end, "end": len(ids), "verdict": "correct", "reward": 1},
    ]


def test_rollout_file_keeps_what_an_audit_says_of_a_check(written, tokenizer, tmp_path):
    ids, _ = encode(steps(3, 4, wrong=1), tokenizer)
    row = written((ids, True))[0].to_row()
    row["actions"][1]["sound"] = False  # the first check; the second has not been read
    write_jsonl(tmp_path / "rollouts.jsonl", [row])
    (trajectory,) = load_rollouts(tmp_path / "rollouts.jsonl", tokenizer)
    assert [action.sound for action in trajectory.actions] == [None, False, None, None]
    assert trajectory.to_row() == row


def test_to_row_of_a_cut_off_response(written, tokenizer):
    """No stop token to leave out of the text, null for what cannot be read, −1 for the action that was cut off."""
    ids = encode(steps(3, 4, wrong=0), tokenizer)[0][:-4]
    row = written((ids, False))[0].to_row()
    assert row["text"] == tokenizer.decode(ids) and not row["finished"]
    assert [a["reward"] for a in row["actions"]] == [1, -1] and row["actions"][1]["verdict"] is None
    assert row["reward"] == 1 and row["actions"][-1]["end"] == len(ids)
    assert json.dumps(row)


def test_roll_out_samples_in_order_and_judges_each(model, tokenizer):
    problems = [PROBLEM, Problem("1+1?", "2", "sum/11")]
    settings = {"n": 3, "temperature": 1.0, "max_new_tokens": 12, "seed": 1, "progress": False}
    found = roll_out(model, tokenizer, problems, **settings)
    assert [(t.problem.unique_id, t.sample) for t in found] == [(p.unique_id, j) for p in problems for j in range(3)]
    for t in found:
        assert len(t.ids) == len(t.logp) <= 12 and t.prompt_ids == prompt(t.problem.problem, tokenizer)
        assert t.finished == (t.ids[-1] in tokenizer.stop_ids)
        assert t.finished or len(t.ids) == 12
        assert all(action.correct is not None for action in t.actions if action.kind == "solve")
        assert [i for a in t.actions for i in range(a.start, a.end)] == list(range(len(t.ids)))
    again = roll_out(model, tokenizer, problems, slots=1, **settings)
    assert [t.ids for t in again] == [t.ids for t in found]
    other = roll_out(model, tokenizer, problems, step=2, **settings)
    assert [t.ids for t in other] != [t.ids for t in found]


def test_roll_out_names_the_problem_whose_prompt_leaves_no_room(model, tokenizer):
    problems = [PROBLEM, Problem("word " * 200, "7", "long/9")]
    with pytest.raises(ValueError, match=r"long/9: its prompt has \d+ tokens, the model's context 160"):
        roll_out(model, tokenizer, problems, n=1, temperature=1.0, max_new_tokens=9, seed=0)


def test_prompt_that_fills_the_context_is_refused(tokenizer):
    ids = prompt(PROBLEM.problem, tokenizer)
    assert encode_prompts([PROBLEM], tokenizer, len(ids) + 1) == [ids]
    with pytest.raises(ValueError, match="problem sum/34: its prompt has"):
        encode_prompts([PROBLEM], tokenizer, len(ids))
