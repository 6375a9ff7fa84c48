"""RL equations: hand-worked tables, a float64 reference written in loops, and what one step does to a model."""

import math
import random
import re
from fractions import Fraction
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_rl
import train_sft
from s2r import rl
from s2r.data import Problem, load_trajectories
from s2r.model import Transformer
from s2r.packing import policy_logp, sft_sequences
from s2r.run import loop
from s2r.run.ranks import Ranks
from s2r.rollouts import Trajectory
from s2r.hf.tokenizer import Tokenizer
from s2r.grammar import RETRY_OPENING, VERDICT_SENTENCE, VERIFY_OPENING, judge, parse, prompt
from tiny_model import problem_file, tiny_model, trajectory_file

# One letter per action, the way a model may write it; the gold answer is 7.
WRITES = {
    "+": r"3+4=\boxed{7}.",
    "-": r"3+4=\boxed{8}.",
    "0": "3+4 is something.",  # no boxed answer
    "c": VERDICT_SENTENCE["correct"],
    "i": VERDICT_SENTENCE["incorrect"],
    "u": VERDICT_SENTENCE["unverified"],
    "?": "Hm, I am not sure",  # no verdict to read
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), std=0.1)


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder) -> Transformer:
    return Transformer.from_pretrained(folder)


def response(code: str, tokenizer: Tokenizer, finished: bool = True) -> Trajectory:
    """The judged trajectory of a code such as "-i+c"; `finished` False leaves out the stop token."""
    texts = []
    for i, letter in enumerate(code):
        opening = (RETRY_OPENING + " " if i else "") if letter in "+-0" else VERIFY_OPENING + " "
        texts.append(opening + WRITES[letter])
    ids = tokenizer.encode("\n\n".join(texts)) + [tokenizer.end_id] * finished
    actions = judge(parse(ids, tokenizer), "7")
    assert [a.kind for a in actions] == ["solve" if letter in "+-0" else "verify" for letter in code]
    problem = Problem("3+4?", "7", "sum")
    logp = [-1.0] * len(ids)
    return Trajectory(problem, 0, 0.7, prompt("3+4?", tokenizer), ids, logp, finished, tokenizer.decode(ids), actions)


# --- rewards and reward contexts, by hand ---

TABLE = {  # name: (actions, finished, R_a of each, R_o)
    "R": ("+", True, [1], 1),
    "R V": ("+c", True, [1, 1], 1),
    "wrong": ("-", True, [-1], -1),
    "R⁻V⁻R": ("-i+", True, [-1, 1, 1], 1),
    "R⁻V⁻R V": ("-i+c", True, [-1, 1, 1, 1], 1),
    "R⁻V⁻R⁻V⁻R V": ("-i-i+c", True, [-1, 1, -1, 1, 1, 1], 1),
    "R⁻V⁺": ("-c", True, [-1, -1], -1),
    "R⁻V⁺, then continues to a right answer": ("-c+c", True, [-1, -1, 1, 1], 1),
    "R⁻V⁺, then continues to a wrong answer": ("-c-", True, [-1, -1, -1], -1),
    "R V⁻, a right answer taken back": ("+i-c", True, [1, -1, -1, -1], -1),
    "truncated in the first solve": ("0", False, [-1], -1),
    "truncated in a solve after its answer": ("-i+", False, [-1, 1, -1], 1),
    "truncated in a verify": ("+?", False, [1, -1], 1),
    "truncated after a true verdict": ("-i", False, [-1, -1], -1),
    "two verifies in a row, both true": ("+cc", True, [1, 1, 1], 1),
    "two verifies in a row that disagree": ("-ci+", True, [-1, -1, 1, 1], 1),
    "two solves in a row, the last right": ("-+c", True, [-1, 1, 1], 1),
    "two solves in a row, the last wrong": ("+-c", True, [1, -1, -1], -1),
    "verify first": ("c+c", True, [-1, 1, 1], 1),
    "verify first, saying incorrect": ("i+", True, [-1, 1], 1),
    "verify first, unreadable": ("?+", True, [-1, 1], 1),
    "verify only": ("i", True, [-1], -1),
    "no boxed answer": ("0", True, [-1], -1),
    "no boxed answer, noticed": ("0i+c", True, [-1, 1, 1, 1], 1),
    "no boxed answer, called right": ("0c", True, [-1, -1], -1),
    "no boxed answer at the end": ("+i0", True, [1, -1, -1], -1),
    "verdict unreadable after a right solve": ("+?", True, [1, -1], 1),
    "verdict unreadable after a wrong solve": ("-?+c", True, [-1, -1, 1, 1], 1),
    "cannot be verified": ("-u", True, [-1, -1], -1),
}


@pytest.mark.parametrize(("code", "finished", "process", "outcome"), TABLE.values(), ids=TABLE.keys())
def test_rewards_hand_table(code, finished, process, outcome, tokenizer):
    actions = response(code, tokenizer, finished).actions
    assert rl.process_rewards(actions, finished) == process
    assert rl.outcome_reward(actions) == outcome


def test_rewards_of_no_actions():
    assert rl.process_rewards([], False) == [] and rl.reward_contexts([]) == []
    assert rl.outcome_reward([]) == -1


def test_reward_contexts_hand_table():
    assert rl.reward_contexts([1.0]) == [()]
    assert rl.reward_contexts([-1.0, 1.0, 1.0]) == [(), (-1.0,), (-1.0, 1.0)]
    assert rl.reward_contexts([-1.0, -1.0, 1.0, -1.0]) == [(), (-1.0,), (-1.0, -1.0), (-1.0, -1.0, 1.0)]


# --- baselines, by hand ---

def test_leave_one_out_hand_table():
    rewards = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    third = 1 / 3
    expected = torch.tensor([[-third, -third, third, third], [-1.0, -third, -third, -third], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(rl.leave_one_out(rewards), expected)
    assert rl.leave_one_out(torch.tensor([[1.0, -1.0]])).tolist() == [[-1.0, 1.0]]


def test_leave_one_out_refuses_a_single_rollout():
    with pytest.raises(ValueError, match="--rollouts 2"):
        rl.leave_one_out(torch.tensor([[1.0], [-1.0]]))


def test_context_baseline_hand_table():
    """Members by context: () 1 −1 −1 1 −1; (1) 1; (−1) 1 −1 1; (−1 1) 1 −1; (−1 1 1) 1."""
    rewards = [[1, 1], [-1, 1, 1, 1], [-1, -1], [1], [-1, 1, -1]]
    expected = [[-0.2, 1.0], [-0.2, 1 / 3, 0.0, 1.0], [-0.2, 1 / 3], [-0.2], [-0.2, 1 / 3, 0.0]]
    assert rl.context_baseline(rewards) == [pytest.approx(row) for row in expected]


def test_context_baseline_crosses_problems_and_sees_order():
    assert rl.context_baseline([[1, -1], [1, 1]]) == [[1.0, 0.0], [1.0, 0.0]]  # same context (1), two trajectories
    assert rl.context_baseline([[1, -1, 1], [-1, 1, -1]]) == [[0.0, -1.0, 1.0], [0.0, 1.0, -1.0]]  # order counts
    assert rl.context_baseline([[], [1]]) == [[], [1.0]]


def test_outcome_credit_is_one_span_a_trajectory_with_the_baseline_of_its_problem(tokenizer):
    group = [response(code, tokenizer) for code in ("+c", "-", "-i+c", "+i-", "+", "-c")]  # 2 problems × 3 rollouts
    credits = rl.online_credit(group, "outcome", 3)
    assert [c.tokens for c in credits] == [[len(t.ids)] for t in group]
    assert [c.reward for c in credits] == [[1.0], [-1.0], [1.0], [-1.0], [1.0], [-1.0]]
    assert [c.baseline for c in credits] == [[0.0], [1.0], [0.0], [0.0], [-1.0], [0.0]]


def test_process_credit_tiles_the_tokens_with_its_actions(tokenizer):
    group = [response("+c", tokenizer), response("-i+?", tokenizer, finished=False)]
    credits = rl.online_credit(group, "process", 1)
    assert [sum(c.tokens) for c in credits] == [len(t.ids) for t in group]
    assert [c.reward for c in credits] == [[1.0, 1.0], [-1.0, 1.0, 1.0, -1.0]]
    assert [c.baseline for c in credits] == [[0.0, 1.0], [0.0, 1.0, 1.0, -1.0]]


# --- spans, advantages, loss ---

CREDITS = [rl.Credit([2, 1, 3], [1.0, -1.0, 1.0], [0.5, 0.0, -0.5]), rl.Credit([4], [-1.0], [0.25])]


def test_spans_hand_table():
    span, reward, baseline, weight = rl.spans(CREDITS, 2, torch.device("cpu"))
    assert span.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3]
    assert reward.tolist() == [1.0, -1.0, 1.0, -1.0] and baseline.tolist() == [0.5, 0.0, -0.5, 0.25]
    torch.testing.assert_close(weight, torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2]))


def test_spans_weights_sum_to_one_however_the_update_is_split():
    rng = random.Random(0)
    credits = [rl.Credit([1] * n, [1.0] * n, [0.0] * n) for n in (rng.randrange(1, 7) for _ in range(20))]
    for size in (1, 3, 20):
        parts = [rl.spans(credits[i : i + size], 20, torch.device("cpu"))[3].sum() for i in range(0, 20, size)]
        assert sum(parts).item() == pytest.approx(1.0)


def test_span_sum_hand_table():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.bfloat16)
    total = rl.span_sum(x, torch.tensor([0, 0, 2, 2]), 4)
    assert total.tolist() == [3.0, 0.0, 12.0, 0.0] and total.dtype == torch.float32


def test_advantages_hand_table():
    """A = R − b̂ − β·Σ log(π_old/π_ref): the log-ratio of a span is a sum over its tokens, not a mean."""
    span, reward, baseline, _ = rl.spans(CREDITS, 2, torch.device("cpu"))
    old = torch.tensor([-1.0, -1.0, -2.0, -1.0, -1.0, -1.0, -3.0, -3.0, -3.0, -3.0])
    ref = torch.tensor([-2.0, -1.5, -2.0, -0.5, -1.0, -1.0, -3.5, -3.5, -3.5, -3.5])
    found = rl.advantages(reward, baseline, old, ref, span, beta=0.1)
    torch.testing.assert_close(found, torch.tensor([0.5 - 0.15, -1.0, 1.5 + 0.05, -1.25 - 0.2]))
    assert rl.advantages(reward, baseline, old, ref, span, beta=0.0).tolist() == [0.5, -1.0, 1.5, -1.25]


def reference_loss(logp, logp_old, credits, advantage, epsilon) -> float:
    """(3) and (6) as they stand on the page, trajectory by trajectory, in Python floats."""
    loss, t, a = 0.0, 0, 0
    for credit in credits:
        gain = 0.0
        for n in credit.tokens:
            ratio = math.exp(sum(logp[t + i] - logp_old[t + i] for i in range(n)) / n)
            gain += min(ratio * advantage[a], min(max(ratio, 1 - epsilon), 1 + epsilon) * advantage[a])
            t, a = t + n, a + 1
        loss -= gain / len(credit.tokens) / len(credits)
    return loss


@pytest.mark.parametrize("seed", range(10))
def test_policy_loss_and_gradient_match_float64_reference(seed):
    rng = random.Random(seed)
    credits = [rl.Credit([rng.randrange(1, 6) for _ in range(n)], [0.0] * n, [0.0] * n) for n in (1, 4, 2, 3)]
    tokens, actions = sum(sum(c.tokens) for c in credits), sum(len(c.tokens) for c in credits)
    old = [-3 * rng.random() for _ in range(tokens)]
    new = [x + rng.gauss(0, 0.4) for x in old]
    advantage = [rng.gauss(0, 1) for _ in range(actions)]
    span, _, _, weight = rl.spans(credits, len(credits), torch.device("cpu"))
    logp = torch.tensor(new, requires_grad=True)
    loss, outside = rl.policy_loss(logp, torch.tensor(old), span, torch.tensor(advantage), weight, epsilon=0.2)
    loss.backward()
    assert outside.any() and not outside.all()

    h, slope = 1e-6, []
    for t in range(tokens):
        ends = [reference_loss(new[:t] + [new[t] + d] + new[t + 1 :], old, credits, advantage, 0.2) for d in (-h, h)]
        slope.append((ends[1] - ends[0]) / (2 * h))
    assert loss.item() == pytest.approx(reference_loss(new, old, credits, advantage, 0.2), abs=1e-6)
    torch.testing.assert_close(logp.grad, torch.tensor(slope), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), [
    (1.3, 1.0, -1.2, 0.0),  # far enough up: no more
    (1.1, 1.0, -1.1, -1.1),
    (0.9, 1.0, -0.9, -0.9),
    (0.7, 1.0, -0.7, -0.7),  # the wrong way: never clipped
    (0.7, -1.0, 0.8, 0.0),  # far enough down: no more
    (0.9, -1.0, 0.9, 0.9),
    (1.1, -1.0, 1.1, 1.1),
    (1.3, -1.0, 1.3, 1.3),  # the wrong way: never clipped
])
def test_policy_loss_clips_on_both_sides(ratio, advantage, loss, slope):
    """d loss / d log r is `slope`, shared by the tokens; a clipped span gets a gradient of exactly zero."""
    logp = torch.tensor([-1.0 + math.log(ratio), -2.0 + math.log(ratio)], requires_grad=True)
    found, outside = rl.policy_loss(logp, torch.tensor([-1.0, -2.0]), torch.tensor([0, 0]), torch.tensor([advantage]),
                                    torch.tensor([1.0]), epsilon=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss) and outside.item() == (abs(ratio - 1) > 0.2)
    assert logp.grad.tolist() == pytest.approx([slope / 2, slope / 2])
    assert slope or not logp.grad.any()


def test_policy_loss_ratio_is_length_normalised():
    logp = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
    old = torch.tensor([-1.4, -1.0, -1.0, -1.0, -1.4])
    args = logp, old, torch.tensor([0, 0, 0, 0, 1]), torch.ones(2)
    ratio = [-rl.policy_loss(*args, torch.tensor(weight), epsilon=0.9)[0].item() for weight in ([1, 0], [0, 1])]
    assert ratio == pytest.approx([math.exp(0.4 / 4), math.exp(0.4)])


# --- on a model ---

def scored(model, trajectories, credits, **settings) -> list[train_rl.Scored]:
    """`train_rl.score` of one update, with the model as its own reference."""
    cfg = train_rl.Config(model="", out="", data="", **settings)
    return train_rl.score(list(zip(trajectories, credits)), Ranks(model.embed.device), model, model, cfg)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("level", ["outcome", "process"])
def test_step_moves_log_probability_the_way_of_the_advantage(level, sign, model, tokenizer):
    """One span of a batch has an advantage; one small plain gradient step has to move its log-probability that way."""
    group = [response(code, tokenizer) for code in ("-i+c", "+c")]
    tokens = [[len(t.ids)] if level == "outcome" else [a.end - a.start for a in t.actions] for t in group]
    for target in range(len(tokens[0])):
        credits = [rl.Credit(n, [0.0] * len(n), [0.0] * len(n)) for n in tokens]
        credits[0].reward[target] = sign
        (work,) = scored(model, group, credits)
        policy = Transformer(model.config)
        policy.load_state_dict(model.state_dict())
        before, _ = policy_logp(policy, work.pack, 0.7)
        loss, _ = rl.policy_loss(before, work.logp_old, work.span, work.reward - work.baseline, work.weight, epsilon=0.2)
        loss.backward()
        torch.optim.SGD(policy.parameters(), lr=1e-3).step()
        with torch.no_grad():
            after, _ = policy_logp(policy, work.pack, 0.7)
        change = rl.span_sum(after - before.detach(), work.span, len(work.reward))[target].item()
        assert sign * change > 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [150, 10**6])
def test_ratio_is_exactly_one_before_the_first_update(budget, dtype, checkpointing, folder, tokenizer):
    model = Transformer.from_pretrained(folder, dtype, param_dtype=torch.float32)
    model.checkpointing = checkpointing
    group = [response(code, tokenizer) for code in ("+c", "-i+c", "-", "-c")]
    for work in scored(model, group, rl.online_credit(group, "process", 1), temperature=0.7, tokens_per_microbatch=budget):
        logp, _ = policy_logp(model, work.pack, 0.7)
        assert logp.requires_grad and torch.equal(logp, work.logp_old) and torch.equal(work.logp_ref, work.logp_old)
        other = rl.policy_loss(logp, work.logp_old, work.span, work.reward - work.baseline, work.weight, epsilon=0.0)[1]
        assert not other.any()


def test_score_covers_the_response_and_nothing_of_the_prompt(model, tokenizer):
    group = [response(code, tokenizer) for code in ("-i+c", "+c", "-")]
    work = scored(model, group, rl.online_credit(group, "process", 1), tokens_per_microbatch=150)
    assert len(work) > 1  # several micro-batches
    assert torch.cat([m.pack.targets for m in work]).tolist() == [id for t in group for id in t.ids]
    assert torch.cat([m.logp_sampled for m in work]).tolist() == [x for t in group for x in t.logp]
    assert sum(m.weight.sum().item() for m in work) == pytest.approx(1.0)
    for m in work:
        assert len(m.span) == len(m.pack.scored) and m.span.max() == len(m.reward) - 1


class Stop(Exception):
    """Raised in the place of an optimizer step."""


def other_model(model: Transformer) -> Transformer:
    """The same model, moved a little."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    return model


def gradient(script, cfg, monkeypatch) -> torch.Tensor:
    """The gradient, in one vector, that `script` has at its first optimizer step, against a reference that is another
    model than the policy, so that every term of the loss has a part in it."""
    found, load = [], loop.load

    def other_reference(*args, train=False):
        model, tokenizer = load(*args, train=train)
        return model if train else other_model(model), tokenizer

    def record(run, model, *_, **__):
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        raise Stop

    monkeypatch.setattr(loop, "load", other_reference)
    monkeypatch.setattr(loop, "optimizer_step", record)
    with pytest.raises(Stop):
        script.main(cfg)
    monkeypatch.undo()
    return found[0]


@pytest.mark.parametrize("name", ["outcome", "process", "sft"])
def test_gradient_does_not_depend_on_the_token_budget(name, folder, tmp_path, monkeypatch):
    """Budgets 512, 4,096 and everything at once: ≤ 1e-6 relative in fp32, for the scripts as they are."""
    problems = str(problem_file(tmp_path / "problems.jsonl"))
    trajectories = str(trajectory_file(tmp_path / "trajectories.jsonl", 50))
    found = []
    for budget in (512, 4096, 10**9):
        settings = {"model": str(folder), "out": str(tmp_path / str(budget)), "tokens_per_microbatch": budget,
                    "device": "cpu"}
        if name == "sft":
            script, cfg = train_sft, train_sft.Config(data=trajectories, batch_size=50, kl=0.1, **settings)
        else:  # a random model is never right: its advantages are the KL to the reference
            script, cfg = train_rl, train_rl.Config(data=problems, level=name, problems=16, updates=1, beta=0.5,
                                                    max_new_tokens=120, **settings)
        found.append(gradient(script, cfg, monkeypatch))
    assert found[2].norm() > 1e-3
    for other in found[:2]:
        assert not torch.equal(other, found[2])  # the budget did split the batch
        assert (other - found[2]).norm() <= 1e-6 * found[2].norm()


def log_p(model, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """(T, V): log p of every next token, from whole logits of one sequence."""
    return (model.logits(model(torch.tensor(ids), torch.tensor([0, len(ids)]))) / temperature).log_softmax(-1)


def assert_gradient(found: torch.Tensor, loss: torch.Tensor, model: Transformer) -> None:
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert wanted.norm() > 1e-3 and (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("level", ["outcome", "process"])
def test_first_update_of_a_step_is_the_plain_policy_gradient(level, folder, tmp_path, monkeypatch):
    """Where π_θ is π_old, the gradient is that of −Σ A·mean log p: here sequence by sequence, without packing, β = 0."""
    seen, rewards = [], cycle([1.0, -1.0, -1.0, 1.0, 1.0])  # the rollouts of a random model have one reward

    def watched(trajectories, *args, credit=rl.online_credit):
        seen.extend(zip(trajectories, credits := credit(trajectories, *args)))
        return credits

    monkeypatch.setattr(rl, "outcome_reward", lambda actions: next(rewards))
    monkeypatch.setattr(rl, "process_rewards", lambda actions, finished: [next(rewards) for _ in actions])
    monkeypatch.setattr(rl, "online_credit", watched)
    problems = str(problem_file(tmp_path / "problems.jsonl"))
    found = gradient(train_rl, train_rl.Config(model=str(folder), data=problems, out=str(tmp_path / "out"), level=level, problems=4,
                                               rollouts=3, updates=1, beta=0.0, max_new_tokens=20, device="cpu"), monkeypatch)
    model, loss = Transformer.from_pretrained(folder), 0.0
    for trajectory, credit in seen:
        ids, end = trajectory.prompt_ids + trajectory.ids, len(trajectory.prompt_ids)
        logp = log_p(model, ids, 0.7)
        for n, reward, baseline in zip(credit.tokens, credit.reward, credit.baseline, strict=True):
            span = torch.arange(end, end := end + n)
            mean = logp[span - 1, torch.tensor(ids)[span]].mean()
            loss = loss - (reward - baseline) * mean / len(credit.tokens) / len(seen)
    assert_gradient(found, loss, model)


def test_sft_gradient_is_that_of_nll_plus_kl_to_the_base(folder, tokenizer, tmp_path, monkeypatch):
    data = trajectory_file(tmp_path / "trajectories.jsonl", 6)
    found = gradient(train_sft, train_sft.Config(model=str(folder), data=str(data), out=str(tmp_path / "out"), batch_size=6,
                                                 kl=0.5, device="cpu"), monkeypatch)
    model, base, loss = Transformer.from_pretrained(folder), other_model(Transformer.from_pretrained(folder)), 0.0
    sequences, scored = sft_sequences(load_trajectories(data), tokenizer, 10**6, unmasked=False)
    for ids, positions in zip(sequences, scored):
        at = torch.tensor(positions)
        ours, theirs = log_p(model, ids)[at - 1], log_p(base, ids)[at - 1].detach()
        kl = (ours.exp() * (ours - theirs)).sum(-1)
        loss = loss + (0.5 * kl - ours.gather(1, torch.tensor(ids)[at, None])[:, 0]).sum() / sum(map(len, scored))
    assert_gradient(found, loss, model)


def test_measure_by_hand(tokenizer):
    """Two micro-batches, of 3 and 1 tokens and 2 and 1 spans: means over the tokens, `clipped` over the spans."""
    names = "logp_old", "logp_ref", "logp_sampled", "entropy"
    scored = [SimpleNamespace(**dict(zip(names, map(torch.tensor, values)))) for values in (
        ([-1.0, -2.0, -3.0], [-2.0, -2.0, -4.0], [-1.5, -1.5, -3.0], [1.0, 2.0, 3.0]), ([-1.0], [-1.0], [-1.0], [0.0]))]
    credits = [rl.Credit([1, 1], [1.0, -1.0], [0.0, 0.0]), rl.Credit([1], [-1.0], [0.0])]
    outside, cfg = torch.tensor([True, False, False]), train_rl.Config(model="", out="")
    group = [response(code, tokenizer) for code in ("+c", "-")]
    row = train_rl.measure(group, credits, scored, outside, Ranks(torch.device("cpu")), cfg)
    assert (row["kl"], row["entropy"], row["gap"], row["reward"]) == (2 / 4, 6 / 4, 1 / 4, -1 / 2)
    assert row["clipped"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("level", ["outcome", "process"])
def test_a_step_of_two_updates_is_measured_against_the_policy_that_sampled(level, folder, tmp_path, monkeypatch):
    """Ratios are 1 in the first update and not in the second; each update has whole problems, so prompts are shared."""
    apart, packs, rewards = [], [], cycle([1.0, -1.0, -1.0, 1.0])  # the rollouts of a random model have one reward

    def watched(*args, policy_loss=rl.policy_loss, **kwargs):
        apart.append([policy_loss(*args, epsilon=e)[1].any().item() for e in (0, 1e-3)])
        return policy_loss(*args, **kwargs)

    def score(part, *args, score=train_rl.score):
        packs.append([t.problem.unique_id for t, _ in part])
        return score(part, *args)

    monkeypatch.setattr(rl, "policy_loss", watched)
    monkeypatch.setattr(train_rl, "score", score)
    monkeypatch.setattr(rl, "outcome_reward", lambda actions: next(rewards))
    monkeypatch.setattr(rl, "process_rewards", lambda actions, finished: [next(rewards) for _ in actions])
    problems = str(problem_file(tmp_path / "problems.jsonl"))
    train_rl.main(train_rl.Config(model=str(folder), data=problems, out=str(tmp_path / "out"), level=level, problems=5,
                                  rollouts=3, updates=2, steps=1, lr=1e-2, warmup=0, max_new_tokens=20, show_every=0))
    assert apart == [[False, False], [True, True]]
    assert [len(names) for names in packs] == [6, 9] and all(names == sorted(names, key=names.index) for names in packs)
    assert [len(set(names)) for names in packs] == [2, 3]


# --- the README's example ---

def test_readme_example_of_four_rollouts_is_what_the_functions_say(tokenizer):
    """Every row of the table: code, R_o, b̂, A, R_a, b̂ by context, A of each action."""
    lines = [line for line in (Path(__file__).parents[1] / "README.md").read_text().splitlines()
             if re.match(r"\| [+−] [+−ci ]+\|", line)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == ["+ c", "− i + c", "− c", "+ i − c"]

    def numbers(cell: str) -> list[float]:
        return [float(Fraction(x.strip().replace("−", "-"))) for x in cell.split(",")]

    group = [response(row[0].replace("−", "-").replace(" ", ""), tokenizer) for row in rows]
    for level, (reward, baseline, advantage) in (("outcome", (1, 2, 3)), ("process", (4, 5, 6))):
        for row, credit in zip(rows, rl.online_credit(group, level, 4)):
            assert credit.reward == numbers(row[reward])
            assert credit.baseline == pytest.approx(numbers(row[baseline]))
            gained = [r - b for r, b in zip(credit.reward, credit.baseline)]
            assert gained == pytest.approx(numbers(row[advantage]))
