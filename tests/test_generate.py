"""The sampler: exact log-probabilities, the right distribution, and rollouts that nothing around them can change."""

import math
from functools import cache

import pytest
import torch
from test_model import FAMILIES, V, hugging_face, save

from kernels.logprob import token_logp
from s2r.generate import Rollout, _Rows, generate, sample
from s2r.hf.config import ModelConfig
from s2r.model import Cache, Transformer

STOP = {3, 11, 12, 13, 14}
NEW = 14  # max_new_tokens of most tests here


@cache
def small(max_positions: int = 64, dtype: torch.dtype = torch.float32) -> Transformer:
    config = ModelConfig(vocab_size=41, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                         head_dim=8, max_positions=max_positions)  # fmt: skip
    model = Transformer(config, dtype)
    model.init_weights(0, std=0.25)
    return model


def prompts(lengths: list[int], vocab: int = 41, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = prompts([5, 1, 20, 9, 2, 13, 1])  # seven, two of them of a single token


def run(model: Transformer | None = None, asked: list[list[int]] = PROMPTS, **settings) -> list[Rollout]:
    settings = {"n": 3, "max_new_tokens": NEW, "stop_ids": STOP, "progress": False} | settings
    return generate(model or small(), asked, **settings)


@cache
def base() -> dict[tuple[int, int], Rollout]:
    """(prompt, sample) → rollout of PROMPTS with the default settings."""
    return {(rollout.prompt, rollout.sample): rollout for rollout in run()}


def same(found: Rollout, wanted: Rollout) -> None:
    assert found.ids == wanted.ids and found.finished == wanted.finished
    torch.testing.assert_close(torch.tensor(found.logp), torch.tensor(wanted.logp), atol=1e-4, rtol=0)


def scored(model: Transformer, prompt: list[int], ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log p of a response as the trainer sees it: teacher-forced, through token_logp."""
    packed, t = torch.tensor(prompt + ids), len(prompt)
    with torch.no_grad():
        hidden = model(packed, torch.tensor([0, len(packed)]))
        return token_logp(hidden[t - 1 : -1], model.head_weight, packed[t:], temperature)[0]


# --- sampled = scored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_decoding_equals_full_forward(family, tmp_path):
    """Logits of each token from the cache, rows of different lengths in the order of no pack, against one forward."""
    model = Transformer.from_pretrained(save(family, tmp_path))
    lengths, start = [150, 1, 40, 9], [120, 0, 3, 8]  # tokens in all, and of them prefilled
    ids = [torch.tensor(prompt) for prompt in prompts(lengths, V)]
    wanted = model.logits(model(torch.cat(ids), torch.tensor([0, *lengths]).cumsum(0))).split(lengths)
    cache = Cache(model.config, len(lengths), 160, model.dtype, torch.device("cpu"))
    keys, values = model.prefill(torch.cat([x[:t] for x, t in zip(ids, start)]), torch.tensor([0, *start]).cumsum(0))
    for s, (k, v) in enumerate(zip(keys.split(start, dim=1), values.split(start, dim=1))):
        cache.k[:, s, : start[s]], cache.v[:, s, : start[s]], cache.lengths[s] = k, v, start[s]
    for step in range(37):  # the longest way to go; rows that are through repeat their last token
        at = [min(t + step, length - 1) for t, length in zip(start, lengths)]
        cache.lengths[:] = torch.tensor(at)
        logits = model.logits(model.decode(torch.stack([x[t] for x, t in zip(ids, at)]), cache))
        for s, t in enumerate(at):
            torch.testing.assert_close(logits[s], wanted[s][t], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logp_equals_scored_logp(family, tmp_path):
    """At the sampling temperature, token by token; at temperature 0 that of the model itself."""
    model = Transformer.from_pretrained(save(family, tmp_path))
    asked = prompts([12, 1, 80], V)
    for temperature, scale in ((1.0, 1.0), (0.7, 0.7), (1.5, 1.5), (0, 1.0)):
        for rollout in run(model, asked, n=2, temperature=temperature, max_new_tokens=24):
            assert len(rollout.logp) == len(rollout.ids) > 0 and max(rollout.logp) <= 0
            wanted = scored(model, asked[rollout.prompt], rollout.ids, scale)
            torch.testing.assert_close(torch.tensor(rollout.logp), wanted, atol=1e-4, rtol=0)


def test_sampled_logp_in_bf16_is_close_to_scored_logp():
    model = small(dtype=torch.bfloat16)
    gaps = [torch.tensor(r.logp) - scored(model, PROMPTS[r.prompt], r.ids) for r in run(model)]
    assert torch.cat(gaps).abs().mean() < 0.03 and torch.cat(gaps).abs().max() < 0.3


def test_prompts_that_wait_are_prefilled_with_those_that_start(monkeypatch):
    """Two slots and seven prompts: one call of `prefill`, not one for every prompt, and the same rollouts."""
    calls, prefill, _ = [], Transformer.prefill, base()
    monkeypatch.setattr(Transformer, "prefill", lambda *a: calls.append(len(a[2])) or prefill(*a))
    for rollout in run(slots=2):
        same(rollout, base()[rollout.prompt, rollout.sample])
    assert calls == [8]  # borders of seven prompts
    calls.clear()
    for rollout in run(slots=2, prefill_tokens=30):
        same(rollout, base()[rollout.prompt, rollout.sample])
    assert calls == [4, 5]  # three prompts, then four


def test_vocabulary_is_cut_in_sampler_and_scorer_alike():
    model = Transformer(small().config)
    model.copy_from(small())
    model.vocab_size = 15
    for rollout in run(model, stop_ids={3}):
        assert max(rollout.ids) < 15
        wanted = scored(model, PROMPTS[rollout.prompt], rollout.ids)
        torch.testing.assert_close(torch.tensor(rollout.logp), wanted, atol=1e-4, rtol=0)


def test_weights_changed_between_calls_are_the_ones_sampled_from():
    """No packed copy of old weights survives a call."""
    model = Transformer(small().config)
    model.copy_from(small())
    run(model)
    model.init_weights(1, std=0.25)
    rollout = run(model)[0]
    torch.testing.assert_close(torch.tensor(rollout.logp), scored(model, PROMPTS[0], rollout.ids), atol=1e-4, rtol=0)


# --- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2-tied", "qwen3", "mistral"])
def test_greedy_equals_transformers_generate(family, tmp_path):
    model, asked = Transformer.from_pretrained(save(family, tmp_path)), prompts([6, 1, 30, 17], V)
    stop = [5, 7, 60, 61]
    rollouts = run(model, asked, n=1, temperature=0, max_new_tokens=32, stop_ids=stop)
    for prompt, rollout in zip(asked, rollouts, strict=True):
        ids = torch.tensor([prompt])
        how = {"do_sample": False, "max_new_tokens": 32, "eos_token_id": stop, "pad_token_id": 0}
        wanted = hugging_face(family).generate(ids, attention_mask=torch.ones_like(ids), **how)
        assert rollout.ids == wanted[0, len(prompt) :].tolist()


def test_temperature_zero_is_argmax():
    for rollout in run(temperature=0, n=2):
        prompt, ids = PROMPTS[rollout.prompt], rollout.ids
        with torch.no_grad():
            hidden = small()(torch.tensor(prompt + ids), torch.tensor([0, len(prompt + ids)]))
        assert small().logits(hidden).argmax(1)[len(prompt) - 1 : -1].tolist() == ids
    greedy = run(temperature=0, n=2, seed=5)
    assert [r.ids for r in greedy[0::2]] == [r.ids for r in greedy[1::2]]


# --- what a rollout does not depend on -------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {"slots": 1}, {"slots": 2}, {"slots": 5}, {"slots": 20}, {"prefill_tokens": 1}, {"prefill_tokens": 15},
    {"slots": 2, "prefill_tokens": 1}, {"slots": 4, "prefill_tokens": 25}, {"n": 1}, {"n": 5}, {"max_new_tokens": 40},
], ids=str)  # fmt: skip
def test_rollouts_do_not_depend_on_batching(settings):
    """Nor on how many samples or tokens are asked for: what is sampled more comes after the same beginning."""
    found = {(r.prompt, r.sample): r for r in run(**settings)}
    shared = found.keys() & base().keys()
    assert len(shared) == 7 * min(3, settings.get("n", 3)) and len(found) == 7 * settings.get("n", 3)
    assert len({len(r.ids) for r in found.values()}) > 2  # rows do stop at different times
    for key in shared:
        if "max_new_tokens" in settings and not base()[key].finished:
            assert found[key].ids[:NEW] == base()[key].ids
        else:
            same(found[key], base()[key])


@pytest.mark.parametrize("order", [[6, 5, 4, 3, 2, 1, 0], [3], [1, 6], [2, 0, 5, 1]], ids=str)
@pytest.mark.parametrize("slots", [2, 128])
def test_rollouts_do_not_depend_on_the_other_prompts(order, slots):
    """Any share of the prompts in any order, named by `problems`, draws what the whole draws."""
    for rollout in run(asked=[PROMPTS[i] for i in order], streams=order, slots=slots):
        same(rollout, base()[order[rollout.prompt], rollout.sample])


@pytest.mark.parametrize("pace", [(8, 4), (5, 2), (100, 3)], ids=str)
@pytest.mark.parametrize("slots", [21, 8, 3])
def test_rollouts_do_not_depend_on_how_often_the_sampler_looks(pace, slots, monkeypatch):
    """As on a GPU: several steps between two looks, batches filled up to a few sizes with rows that stand still."""
    monkeypatch.setattr("s2r.generate.pace", lambda device: pace)
    for rollout in run(slots=slots):
        same(rollout, base()[rollout.prompt, rollout.sample])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_rollouts_from_cuda_graphs_are_those_of_the_cpu():
    model = Transformer(small().config, torch.float32, "cuda")
    model.copy_from(small())
    for rollout in run(model, slots=8):
        same(rollout, base()[rollout.prompt, rollout.sample])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("slots", [8, 21, 100])
def test_cuda_graphs_draw_what_single_steps_draw_in_bfloat16(slots, monkeypatch):
    """Rows stop all the time, so that batches of several sizes are recorded and replayed."""
    config = ModelConfig(5001, 256, 512, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64)
    model = Transformer(config, torch.bfloat16, "cuda")
    model.init_weights(0)
    asked = [torch.randint(5001, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(3, 53)]
    found = []
    for replay in (_Rows._replay, _Rows._advance):
        monkeypatch.setattr(_Rows, "_replay", replay)
        rollouts = generate(model, asked, n=2, temperature=1.0, max_new_tokens=100, stop_ids=range(100), slots=slots)
        found.append([r.ids for r in rollouts])
    assert found[0] == found[1] and len({len(ids) for ids in found[0]}) > 20


def test_problems_name_the_stream_and_not_the_index():
    """The same prompt under two names gives two rollouts, and under one name the same."""
    first, other, again = run(asked=[PROMPTS[2]] * 3, streams=[2, 77, 2], n=1, stop_ids=())
    assert first.ids == again.ids != other.ids


def test_random_stream_is_named_by_seed_step_problem_and_sample():
    first = [r.ids for r in run(seed=1, step=2)]
    assert first == [r.ids for r in run(seed=1, step=2)]
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}, {"seed": 2, "step": 1}):
        assert sum(a != b for a, b in zip(first, (r.ids for r in run(**other)), strict=True)) >= 18
    torch.manual_seed(5)  # torch's global stream has no part in it, and is left alone
    before = torch.get_rng_state()
    assert [r.ids for r in run(seed=1, step=2)] == first
    assert torch.equal(torch.get_rng_state(), before)
    long = run(asked=[PROMPTS[2]], n=8, stop_ids=(), max_new_tokens=30)
    assert len({tuple(r.ids) for r in long}) == 8


def test_stop_ends_sampling_with_the_rollouts_that_are_complete():
    answers = iter([False] * 6 + [True])
    found = run(stop=lambda: next(answers))  # a look per step, so six tokens at most
    assert 0 < len(found) < len(base()) and all(len(r.ids) <= 6 for r in found)
    for rollout in found:
        same(rollout, base()[rollout.prompt, rollout.sample])
    assert run(stop=lambda: True) == []


def test_results_come_in_the_order_of_prompts_and_samples():
    for slots in (2, 128):
        assert [(r.prompt, r.sample) for r in run(slots=slots)] == [(i, j) for i in range(7) for j in range(3)]
    assert run(asked=[]) == []


def test_progress_is_shown_when_asked_for_and_when_it_takes_its_time(capsys, monkeypatch):
    quiet = run(n=1)
    assert run(n=1, progress=True) == quiet
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("s2r.generate.PATIENCE", 0)
    assert run(n=1, progress=True) == quiet
    assert "7/7" in (shown := capsys.readouterr().err) and "tokens/s" in shown


# --- where a rollout ends --------------------------------------------------------------------------------------------


def test_rollouts_end_with_a_stop_token_and_only_there():
    rollouts = run(n=12)
    assert {True, False} == {r.finished for r in rollouts}
    assert len({r.ids[-1] for r in rollouts if r.finished}) > 2  # any of the set
    for rollout in rollouts:
        assert not STOP & set(rollout.ids[:-1])
        assert rollout.finished == (rollout.ids[-1] in STOP)
        assert rollout.finished or len(rollout.ids) == NEW


def test_a_stop_set_of_one_and_of_none():
    one = {(r.prompt, r.sample): r for r in run(stop_ids=[12])}
    for key, rollout in base().items():
        ended = rollout.finished and rollout.ids[-1] != 12  # by a token that is an ordinary one now
        assert one[key].ids[: len(rollout.ids)] == rollout.ids and (len(one[key].ids) > len(rollout.ids) or not ended)
    none = run(stop_ids=())
    assert all(len(r.ids) == NEW and not r.finished for r in none)
    assert any(12 in r.ids for r in none)


def test_a_stop_token_as_the_last_allowed_one_is_finished():
    key, rollout = max(((k, r) for k, r in base().items() if r.finished), key=lambda item: len(item[1].ids))
    length = len(rollout.ids)
    assert length > 1
    cut = {(r.prompt, r.sample): r for r in run(max_new_tokens=length)}[key]
    assert cut.finished and cut.ids == rollout.ids
    shorter = {(r.prompt, r.sample): r for r in run(max_new_tokens=length - 1)}[key]
    assert not shorter.finished and shorter.ids == rollout.ids[:-1]


def test_context_limit_cuts_a_rollout():
    """Prompt and response together fill the context of 24 and no more, each row by its own prompt."""
    model, asked = small(max_positions=24), prompts([20, 1, 23, 12])
    rollouts = run(model, asked, n=2, stop_ids=(), max_new_tokens=100)
    assert [len(r.ids) for r in rollouts] == [4, 4, 23, 23, 1, 1, 12, 12]
    for rollout in rollouts:
        assert not rollout.finished
        wanted = scored(model, asked[rollout.prompt], rollout.ids)
        torch.testing.assert_close(torch.tensor(rollout.logp), wanted, atol=1e-4, rtol=0)
    roomy = run(small(), asked, n=2, stop_ids=(), max_new_tokens=30)  # the limit changes the length alone
    assert all(cut.ids == whole.ids[: len(cut.ids)] for cut, whole in zip(rollouts, roomy))


@pytest.mark.parametrize("length", [0, 64, 65])
def test_prompt_without_room_raises(length):
    with pytest.raises(ValueError, match=rf"prompt 1 has {length} tokens.*63"):
        run(asked=[PROMPTS[0], [1] * length])
    assert small().packed is None


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"n": 0}, {"slots": 0}], ids=str)
def test_settings_that_make_no_sense_raise(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} {next(iter(settings.values()))}"):
        run(**settings)


def test_prompts_of_one_token_only():
    """Nothing to prefill at all."""
    asked = [[5], [9]]
    for rollout in run(asked=asked):
        wanted = scored(small(), asked[rollout.prompt], rollout.ids)
        torch.testing.assert_close(torch.tensor(rollout.logp), wanted, atol=1e-4, rtol=0)


# --- the distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_first_tokens_follow_the_softmax(temperature):
    """Pearson's χ² of 4,000 first tokens against softmax(logits / T); rare tokens pooled, seed fixed."""
    n, prompt = 4_000, PROMPTS[0]
    rollouts = run(asked=[prompt], n=n, temperature=temperature, max_new_tokens=1, stop_ids=(), slots=512)
    with torch.no_grad():
        logits = small().logits(small()(torch.tensor(prompt), torch.tensor([0, len(prompt)])))[-1]
    expected = n * torch.softmax(logits.double() / temperature, dim=0)
    counts = torch.bincount(torch.tensor([r.ids[0] for r in rollouts]), minlength=len(expected)).double()
    rare = expected < 8
    pooled = torch.where(rare, 0, 1 + torch.arange(len(expected)))
    expected, counts = (torch.zeros(len(rare) + 1).double().index_add(0, pooled, x) for x in (expected, counts))
    kept = expected > 0
    freedom = int(kept.sum()) - 1
    chi2 = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert freedom >= 8
    # Wilson and Hilferty: (χ²/k)^(1/3) is normal with mean 1 − 2/(9k) and variance 2/(9k). Both tails, 3.3 sigma.
    assert abs((chi2 / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) < 3.3 * math.sqrt(2 / (9 * freedom))


def test_sample_inverts_the_cumulative_sum():
    """Shares 1/4, 0, 1/4, 1/2, 0: the borders belong to the token above, and a share of nothing is never drawn."""
    share = torch.tensor([0.25, 0.0, 0.25, 0.5, 0.0])
    last = 1 - 2.0**-24  # the greatest that the sampler's generator returns
    uniform = torch.tensor([0.0, 0.2, 0.25 - 2**-20, 0.25 + 2**-20, 0.49, 0.5 + 2**-20, 0.9, last])[:, None]
    token, logp = sample(share.log().expand(len(uniform), -1), uniform, 1.0)
    assert token.tolist() == [0, 0, 0, 2, 2, 3, 3, 3]
    torch.testing.assert_close(logp, share[token].log())


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-24])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
def test_sample_never_takes_a_token_of_probability_zero(uniform, temperature):
    """5,000 random rows of 33 logits with −∞ at both ends, in the middle, or everywhere but one place."""
    S = 5_000
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(S, 33, generator=generator)
    logits[torch.rand(S, 33, generator=generator) < 0.3] = -torch.inf
    logits[:, [0, 1, 31, 32]] = -torch.inf
    logits[:, 7] = 1.0
    logits[:9, :7], logits[:9, 8:] = -torch.inf, -torch.inf
    before = logits.clone()
    token, logp = sample(logits, torch.full((S, 1), uniform), temperature)
    assert torch.equal(logits, before)  # its input is left as it was
    assert logits[torch.arange(S), token].isfinite().all() and token[:9].tolist() == [7] * 9
    wanted = torch.log_softmax(logits.double() / (temperature or 1), 1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), wanted, atol=1e-5, rtol=1e-6)
    assert (logp <= 0).all()
    if temperature == 0:
        assert torch.equal(token, logits.argmax(1))
    elif uniform == 0:
        assert torch.equal(token, logits.isfinite().int().argmax(1))  # the first that has any share
