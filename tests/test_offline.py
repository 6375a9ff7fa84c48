"""Offline RL: which problems and rollouts are learnt from, the baselines over a recorded set, and the run itself."""

import json
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from test_rl import response
from test_scripts import log

import sample
import train_rl
from s2r import offline, rl
from s2r.data import Problem, load_problems, read_jsonl
from s2r.model import Transformer
from s2r.hf.tokenizer import Tokenizer
from s2r.packing import pack, policy_logp
from s2r.rollouts import load_rollouts
from s2r.run.files import write_jsonl
from s2r.stage0 import select
from tiny_model import problem_file, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), std=0.1)


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


def of(problem: str, code: str, tokenizer: Tokenizer):
    """The trajectory of a code as in test_rl.py, of a problem of this name, its text as in a rollout file."""
    trajectory = response(code, tokenizer)
    text = tokenizer.decode(trajectory.ids[:-1])  # without the stop token
    return replace(trajectory, problem=Problem("3+4?", "7", problem), text=text)


# --- which rollouts, METHOD: offline RL ---


@pytest.mark.parametrize("code, why", [
    ("+", None), ("+c", None), ("-i+c", None), ("-i-", None), ("-i-i+c", None), ("+i+c", None), ("-c-i+c", None),
    ("-c+c", None), ("+?+c", None),
    ("+cc", "alternate"), ("--i+c", "alternate"), ("c", "alternate"), ("c+c", "alternate"), ("-ii+c", "alternate"),
    ("+c+", "right answer was found right"), ("+c+c", "right answer was found right"),
    ("-i+c-i+c", "right answer was found right"),
    ("-i" * 10, None), ("-i" * 10 + "+", "more than 20"), ("-i" * 9 + "+c", None),
])  # fmt: skip
def test_unfit_names_the_rule_that_a_trajectory_breaks(code, why, tokenizer):
    found = offline.unfit(response(code, tokenizer).actions)
    assert found is None if why is None else why in found


def recall(group, tokenizer, tmp_path, per_step=1):
    write_jsonl(tmp_path / "r.jsonl", (t.to_row() for t in group))
    return offline.recall(tmp_path / "r.jsonl", tokenizer, 0.7, per_step)


@pytest.mark.parametrize("right, kept", [(0, False), (1, True), (5, True), (7, True), (8, False), (10, False)])
def test_recall_keeps_problems_of_medium_sampled_accuracy(right, kept, tokenizer, tmp_path):
    group = [of("p", "+c" if i < right else "-i", tokenizer) for i in range(10)]
    chosen, accuracy, counts = recall(group, tokenizer, tmp_path, per_step=0)
    assert chosen == (group if kept else []) and accuracy == [right / 10] * len(chosen)
    assert counts["rollouts"] == 10 and counts["kept"] == len(chosen)


def test_recall_counts_dropped_rollouts_in_the_accuracy_of_their_problem(tokenizer, tmp_path):
    group = [of("p", code, tokenizer) for code in ("+c+", "-i", "+cc", "-c")]  # half right; two break a rule
    chosen, accuracy, counts = recall(group, tokenizer, tmp_path)
    assert chosen == [group[1], group[3]] and accuracy == [0.5, 0.5]
    assert counts["kept"] == 2 and sum(counts.values()) == 8 and len(counts) == 4
    with pytest.raises(ValueError, match="2 of 4 rollouts are fit to learn from .* a step takes 3"):
        recall(group, tokenizer, tmp_path, per_step=3)


def test_problems_of_medium_difficulty_are_written_as_a_problem_file(tmp_path, capsys):
    rows = [{"unique_id": f"p/{right}", "problem": f"{right}+0?", "answer": str(right), "level": right,
             "reward": 1 if i < right else -1} for right in range(5) for i in range(4)]
    write_jsonl(tmp_path / "rollouts.jsonl", rows)
    select.main(select.Config(str(tmp_path / "rollouts.jsonl"), str(tmp_path / "new" / "p.jsonl")))
    found = load_problems(tmp_path / "new" / "p.jsonl")
    assert [(p.unique_id, p.answer, p.level) for p in found] == [("p/1", "1", 1), ("p/2", "2", 2)]
    assert "1  problem too hard" in capsys.readouterr().out
    select.main(select.Config(str(tmp_path / "rollouts.jsonl"), str(tmp_path / "all.jsonl"), (0.0, 1.0)))
    assert len(load_problems(tmp_path / "all.jsonl")) == 5
    with pytest.raises(ValueError, match="widen --accuracy"):
        select.main(select.Config(str(tmp_path / "rollouts.jsonl"), str(tmp_path / "none.jsonl"), (0.3, 0.4)))
    write_jsonl(tmp_path / "bad.jsonl", [{"unique_id": "p"}])
    with pytest.raises(ValueError, match="bad.jsonl: a row has no 'reward'"):
        select.main(select.Config(str(tmp_path / "bad.jsonl"), str(tmp_path / "none.jsonl")))


# --- baselines ---


def test_offline_baseline_by_accuracy_and_position_or_context_or_by_context_alone():
    """Three problems, of accuracy 1/4, 3/8 (two trajectories) and 1/2, which share no group. Worked by hand."""
    rewards, accuracy = [[1, 1], [-1, 1, 1], [-1, -1], [1, -1]], [0.25, 0.375, 0.375, 0.5]
    assert offline.offline_baseline(rewards, accuracy, "position") == [[1, 1], [-1, 0, 1], [-1, 0], [1, -1]]
    assert offline.offline_baseline([[1, 1], [-1, 1], [-1, -1]], [0.375] * 3, "position") == [
        pytest.approx([-1 / 3, 1 / 3])] * 3
    assert offline.offline_baseline([[1, 1], [-1, 1], [-1, -1]], [0.375] * 3, "context") == [
        pytest.approx(row) for row in ([-1 / 3, 1], [-1 / 3, 0], [-1 / 3, 0])]
    # Context alone: () holds 1, -1, -1, 1; (1,) holds 1, -1; (-1,) holds 1, -1; (-1, 1) holds 1.
    assert offline.offline_baseline(rewards, accuracy, "context-only") == [[0, 0], [0, 0, 1], [0, 0], [0, 0]]


def test_offline_credit_at_the_outcome_level_is_a_mean_over_problems_of_one_accuracy(tokenizer):
    group = [of(name, code, tokenizer) for name, code in (("a", "+c"), ("a", "-i"), ("b", "-i"), ("c", "+c"))]
    credits = offline.offline_credit(group, "outcome", [0.5, 0.5, 0.5, 0.7], "context")
    assert [c.baseline for c in credits] == [[pytest.approx(-1 / 3)]] * 3 + [[1.0]]
    assert [c.tokens for c in credits] == [[len(t.ids)] for t in group]


# --- the rollout file ---


def test_load_rollouts_gives_back_what_was_written(tokenizer, tmp_path):
    group = [of("p", "-i+c", tokenizer), of("q", "+?", tokenizer)]
    write_jsonl(tmp_path / "r.jsonl", (t.to_row() for t in group))
    assert load_rollouts(tmp_path / "r.jsonl", tokenizer) == group
    write_jsonl(tmp_path / "r.jsonl", (t.to_row() | {"finished": not t.finished} for t in group))  # the stop token tells
    assert load_rollouts(tmp_path / "r.jsonl", tokenizer) == group


@pytest.mark.parametrize("field, value", [
    ("ids", None), ("ids", [10**6]), ("ids", ["x"]), ("ids", [-1]), ("logp", [0.0]), ("prompt_ids", []), (("ids", "logp"), []),
    ("answer", ""), ("temperature", "warm"), ("problem", None),
])  # fmt: skip
def test_load_rollouts_names_the_row_it_cannot_use(field, value, tokenizer, tmp_path):
    row = of("p", "+c", tokenizer).to_row()
    broken = row | ({field: value} if isinstance(field, str) else dict.fromkeys(field, value))
    if value is None:
        del broken[field]
    write_jsonl(tmp_path / "r.jsonl", [row, broken])
    with pytest.raises(ValueError, match=r"r.jsonl: row 2: .*give a file that sample.py"):
        load_rollouts(tmp_path / "r.jsonl", tokenizer)


# --- the run ---


@pytest.fixture(scope="module")
def recorded(folder, tokenizer, tmp_path_factory):
    """A rollout file with right and wrong responses to four problems, their log-probabilities those of the model."""
    path, model = tmp_path_factory.mktemp("rollouts") / "r.jsonl", Transformer.from_pretrained(folder)
    rows = []
    for i in range(4):
        for j, code in enumerate(("+c", "-i+c", "-c", "-i-i")):
            t = of(f"p{i}", code, tokenizer)
            positions = list(range(len(t.prompt_ids), len(t.prompt_ids) + len(t.ids)))
            (batch,) = pack([t.prompt_ids + t.ids], [positions], 10**6, "cpu")
            logp = policy_logp(model, batch, 0.7)[0].tolist()
            rows.append(replace(t, sample=j, logp=logp).to_row())
    write_jsonl(path, rows)
    return path


def test_offline_refuses_rollouts_of_another_model(folder, recorded, tmp_path):
    """The same tokenizer, other weights: nothing but the recorded log-probabilities tells them apart."""
    other = tiny_model(tmp_path / "other", std=0.1, seed=1)
    with pytest.raises(ValueError, match="r.jsonl: its log-probabilities are on average .* away from those of --model"):
        train_rl.main(train_rl.Config(model=str(other), offline=str(recorded), out=str(tmp_path / "out"), problems=4))
    assert not (tmp_path / "out").exists()


def test_check_policy_lets_rounding_pass_and_nothing_more_in_either_direction(folder, recorded, tokenizer):
    """In fp32 a mean difference of 0.01 nats per token is let pass."""
    model, rollouts = Transformer.from_pretrained(folder), load_rollouts(recorded, tokenizer)
    for shift in (0.0, 0.008, -0.008):
        offline.check_policy("r.jsonl", [replace(t, logp=[x + shift for x in t.logp]) for t in rollouts], model, 10**6)
    for shift in (0.02, -0.02):
        with pytest.raises(ValueError, match="on average 0.02 nats"):
            offline.check_policy("r.jsonl", [replace(t, logp=[x + shift for x in t.logp]) for t in rollouts], model, 10**6)


def test_steps_go_through_the_file(folder, recorded, tmp_path, monkeypatch):
    used = []

    def score(part, *args, score=train_rl.score):
        used.extend((t.problem.unique_id, t.sample) for t, _ in part)
        return score(part, *args)

    monkeypatch.setattr(train_rl, "score", score)
    train_rl.main(train_rl.Config(model=str(folder), offline=str(recorded), out=str(tmp_path / "out"), problems=2, rollouts=2,
                                  updates=1, steps=4, show_every=0))
    assert len(used) == len(set(used)) == 16


@pytest.mark.parametrize("level", ["outcome", "process"])
@pytest.mark.parametrize("baseline", get_args(get_type_hints(train_rl.Config)["baseline"]))
def test_train_rl_offline_prefers_what_was_right(level, baseline, folder, tokenizer, recorded, tmp_path):
    out = tmp_path / "out"
    settings = {"problems": 4, "rollouts": 4, "updates": 1, "steps": 8, "lr": 3e-3, "warmup": 0, "show_every": 0}
    train_rl.main(train_rl.Config(model=str(folder), offline=str(recorded), baseline=baseline, level=level,
                                  out=str(out), **settings))
    rows = log(out)
    assert len(rows) == 8 and all(row["kl"] == 0 for row in rows)  # π_old is π_ref: both are where the run began
    assert {row["accuracy"] for row in rows} == {0.5}
    before, after = Transformer.from_pretrained(folder), Transformer.from_pretrained(out)
    right, wrong = response("+c", tokenizer), response("-c", tokenizer)

    def logp(model, trajectory) -> float:
        ids, t = torch.tensor(trajectory.prompt_ids + trajectory.ids), len(trajectory.prompt_ids)
        with torch.no_grad():
            scores = model.logits(model(ids, torch.tensor([0, len(ids)]))).log_softmax(-1)
        return scores[t - 1 : -1].gather(1, ids[t:, None]).sum().item()

    gain = [logp(after, x) - logp(before, x) for x in (right, wrong)]
    assert gain[0] > gain[1] + 1


def test_train_rl_offline_keeps_the_sampling_policy_as_pi_old(folder, recorded, tmp_path, monkeypatch):
    """The ratio is 1 in the first update and, unlike online, not in the second step's."""
    apart = []  # does a ratio differ from 1 at all? by more than 1e-3?

    def watched(*args, policy_loss=rl.policy_loss, **kwargs):
        apart.append([policy_loss(*args, epsilon=e)[1].any().item() for e in (0, 1e-3)])
        return policy_loss(*args, **kwargs)

    monkeypatch.setattr(rl, "policy_loss", watched)
    train_rl.main(train_rl.Config(model=str(folder), offline=str(recorded), level="process", out=str(tmp_path / "out"),
                                  problems=4, rollouts=4, updates=1, steps=2, lr=1e-2, warmup=0, show_every=0))
    assert apart == [[False, False], [True, True]]


def test_offline_runs_from_a_file_that_sample_wrote(folder, tmp_path):
    """Nothing in it is usable, because a random model answers nothing: the run says so and writes nothing."""
    problems, rollouts = problem_file(tmp_path / "p.jsonl", 2), tmp_path / "r.jsonl"
    sample.main(sample.Config(model=str(folder), data=str(problems), n=2, temperature=0.7, max_new_tokens=8,
                              out=str(rollouts), show=0))
    assert len(read_jsonl(rollouts)) == 4
    with pytest.raises(ValueError, match="0 of 4 rollouts are fit to learn from"):
        train_rl.main(train_rl.Config(model=str(folder), offline=str(rollouts), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_offline_refuses_another_temperature(folder, recorded, tmp_path):
    with pytest.raises(ValueError, match="sampled at temperature 0.7, --temperature is 1.0"):
        train_rl.main(train_rl.Config(model=str(folder), offline=str(recorded), temperature=1.0,
                                      out=str(tmp_path / "out")))
    assert json.loads(recorded.read_text().splitlines()[0])["temperature"] == 0.7
