"""The sampler: M rollouts of each prompt, many rows at a time, every sampled token with its log-probability.

    slot 0   prompt 0 │ sample 0 ········ <end>   prompt 2 │ sample 0 ······        one decode step
    slot 1   prompt 0 │ sample 1 ···· <end>   prompt 1 │ sample 1 ···········       moves every slot
    slot 2   prompt 1 │ sample 0 ··················· <end>   prompt 2 │ sample 1    one token to the right

Rows live in the slots of one preallocated cache. A prompt is run through the model once and its keys and values are
copied to its rows; a row that stops gives its slot to the next one; at the end, when none is waiting, the last row
moves into the hole, so the rows at work are always slots 0 … S−1. A rollout's random numbers depend on nothing but
(seed, step, place of the prompt in the list, sample): neither on its slot nor on its neighbours.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from tqdm import tqdm

from kernels import triton
from kernels.sampling import sample
from s2r.model import Cache, Transformer

PATIENCE = 5  # seconds without a progress bar


@dataclass(frozen=True)
class Rollout:
    """One sampled response: `ids` ends with the stop token when `finished`; `logp[t]` scores `ids[t]`."""

    prompt: int  # index into the prompts
    sample: int  # 0 … n−1
    ids: list[int]
    logp: list[float]  # nats, at the sampling temperature (at 1 for temperature 0)
    finished: bool  # a stop token was sampled before the length limit


def generate(
    model: Transformer, prompts: Sequence[list[int]], *,
    n: int = 1, temperature: float = 1.0, max_new_tokens: int, stop_ids: Iterable[int], seed: int = 0, step: int = 0,
    streams: Sequence[int] | None = None, slots: int = 128, prefill_tokens: int = 16_384, progress: bool = True,
    stop: Callable[[], bool] = lambda: False, known: Iterable[Rollout] = (),
    each: Callable[[Rollout], None] = lambda rollout: None,
) -> list[Rollout]:  # fmt: skip
    """Sample n responses to each prompt, from the whole distribution softmax(logits / temperature); 0 takes the argmax.

    `seed` and `step` choose the random numbers, and `streams` those of each prompt (default: its index), so that a rank
    that samples a part of the prompts draws what one process would. `slots`, the rows decoded at a time, and
    `prefill_tokens`, the prompt tokens run through the model at a time, change memory and speed alone. As soon as
    `stop()` is true, sampling ends with the rollouts that are complete. `known` rollouts, of an aborted run, are not
    sampled again; `each` gets a new one as it ends. Returns the rollouts in order: prompt 0 sample 0, prompt 0 sample 1,
    … Raises ValueError for settings that make no sense, an empty prompt, or one that leaves no room in the context.
    """
    assert model.embed.dtype == model.dtype, "sample from a copy in the compute dtype, not from master weights"
    if max_new_tokens < 1 or not temperature >= 0 or slots < 1 or n < 1:
        found = f"max_new_tokens {max_new_tokens}, temperature {temperature}, slots {slots}, n {n}"
        raise ValueError(f"{found}: the temperature is at least 0, the others at least 1")
    context = model.config.max_positions
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; the model's context holds 1 to {context - 1}")
    streams = range(len(prompts)) if streams is None else streams
    rollouts = {(rollout.prompt, rollout.sample): rollout for rollout in known}
    waiting = deque((i, j) for i in range(len(prompts)) for j in range(n) if (i, j) not in rollouts)
    if not waiting:
        return [rollouts[key] for key in sorted(rollouts)]
    slots = min(slots, len(waiting))
    rows = _Rows(model, prompts, slots, temperature, max_new_tokens, stop_ids, prefill_tokens)
    tokens, start = 0, time.perf_counter()
    bar = tqdm(total=len(waiting), unit=" rollouts", delay=PATIENCE, disable=not progress)
    # A CUDA graph is captured on the current device.
    with torch.inference_mode(), torch.cuda.device_of(model.embed), model.prepacked(slots), bar:
        free = list(range(slots))
        while True:
            jobs = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
            generators = [np.random.default_rng((seed, step, streams[i], j)) for i, j in jobs]
            rows.start(free[: len(jobs)], jobs, generators, waiting)
            for slot in reversed(free[len(jobs) :]):  # nothing waits: close the hole
                rows.close(slot)
            if not rows.jobs or stop():
                return [rollouts[key] for key in sorted(rollouts)]
            free = rows.step()
            for slot in free:
                rollout = rows.take(slot)
                rollouts[rollout.prompt, rollout.sample] = rollout
                each(rollout)
                tokens += len(rollout.ids)
            if free:
                unfinished = int((rows.produced * ~rows.done).sum())  # tokens in rows that continue
                speed = (tokens + unfinished) / (time.perf_counter() - start)
                bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
                bar.update(len(free))


def pace(device: torch.device) -> tuple[int, int]:
    """Decode steps between two checks for stopped rows, and the factor between allowed batch sizes (1: any size).

    On a GPU a check makes the host wait for the device, so it is rare. Every batch size needs its own CUDA graph, so
    there are few sizes. Until the next check, stopped and empty rows are decoded too, and their results are discarded.
    """
    return (8, 4) if device.type == "cuda" else (1, 1)


class _Rows:
    """The rows at work: slot s holds job `jobs[s]` = (prompt, sample). All tensors lie on the model's device."""

    def __init__(self, model, prompts, slots, temperature, max_new_tokens, stop_ids, prefill_tokens):
        device = model.embed.device
        capacity = min(max(map(len, prompts)) + max_new_tokens, model.config.max_positions)
        self.model, self.prompts, self.temperature = model, prompts, temperature
        self.prefill_tokens, self.room = prefill_tokens, min(max_new_tokens, capacity)
        self.jobs: list[tuple[int, int]] = []
        self.prefilled: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # prompt → its k and v, (L, t, G, E)
        self.cache = Cache(model.config, slots, capacity, model.dtype, device)
        self.stop_ids = torch.tensor(sorted(stop_ids), device=device)
        self.token = torch.zeros(slots, dtype=torch.int64, device=device)  # the next input of each row
        self.uniform = torch.zeros(slots, self.room + 1, device=device)  # one random number per token to come
        self.ids = torch.zeros(slots, self.room + 1, dtype=torch.int64, device=device)  # stopped rows write to the last
        self.logp = torch.zeros(slots, self.room + 1, device=device)
        self.produced = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens sampled so far
        self.done = torch.ones(slots, dtype=torch.bool, device=device)  # has stopped, or holds no job
        self.steps_per_look, ratio = pace(device)
        self.sizes = [slots // ratio**i for i in range(20) if slots // ratio**i] if ratio > 1 else []  # of a batch; none: any
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # batch size → its step; None: has run once
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # they run one at a time

    def start(
        self, slots: list[int], jobs: list[tuple[int, int]], generators: list[np.random.Generator],
        waiting: Iterable[tuple[int, int]] = (),
    ) -> None:  # fmt: skip
        """Put jobs, which come in the order of their prompts, into free slots; `waiting` jobs come next."""
        cache = self.cache
        for at, (slot, (i, j), generator) in enumerate(zip(slots, jobs, generators)):
            if i not in self.prefilled:
                self.prefilled = k = v = None  # frees those of the prompts before, of which k and v are views
                self.prefilled = self._prefill(following for following, _ in chain(jobs[at:], waiting))
            prompt, (k, v) = self.prompts[i], self.prefilled[i]
            t = len(prompt) - 1  # the prompt's last token is the row's first input
            cache.k[:, slot, :t], cache.v[:, slot, :t], cache.lengths[slot] = k, v, t
            self.token[slot] = prompt[-1]
            self.uniform[slot, : self.room] = torch.from_numpy(generator.random(self.room, dtype=np.float32))
            self.produced[slot], self.done[slot] = 0, False
            self.jobs[slot : slot + 1] = [(i, j)]  # replaces the slot's job, or appends one

    def _prefill(self, indices: Iterable[int]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the first of these prompts, and of as many that follow as `prefill_tokens` allows."""
        chosen, ids, borders = [], [], [0]
        for i in dict.fromkeys(indices):
            if chosen and len(ids) + len(self.prompts[i]) > self.prefill_tokens:
                break
            chosen.append(i)
            ids += self.prompts[i][:-1]
            borders.append(len(ids))
        where = {"dtype": torch.int64, "device": self.token.device}
        k, v = self.model.prefill(torch.tensor(ids, **where), torch.tensor(borders, **where))
        return {i: (k[:, a:b], v[:, a:b]) for i, a, b in zip(chosen, borders, borders[1:])}

    def step(self) -> list[int]:
        """Sample one token for every row, on a GPU several. Returns the slots whose row is now complete, ascending."""
        S = min((size for size in self.sizes if size >= len(self.jobs)), default=len(self.jobs))
        # Without Triton, attention asks the GPU for a length, and a CUDA graph cannot hold that.
        advance = self._replay if self.token.is_cuda and triton is not None else self._advance
        for _ in range(self.steps_per_look):
            advance(S)
        return self.done[: len(self.jobs)].nonzero()[:, 0].tolist()

    def _advance(self, S: int) -> None:
        """One decode step of slots 0 … S−1. It reads and writes nothing but tensors that stay where they are."""
        stopped = self.done[:S]
        at = torch.where(stopped, self.room, self.produced[:S])[:, None]  # (S, 1)
        hidden = self.model.decode(self.token[:S], self.cache)  # (S, D)
        token, logp = sample(self.model.logits(hidden), self.uniform[:S].gather(1, at), self.temperature)  # (S,) each
        self.ids[:S].scatter_(1, at, token[:, None])
        self.logp[:S].scatter_(1, at, logp[:, None])
        self.token[:S] = torch.where(stopped, self.token[:S], token)
        self.produced[:S] += ~stopped
        self.cache.lengths[:S] -= stopped.long()  # decode made every row longer, stopped ones too
        full = (self.produced[:S] == self.room) | (self.cache.lengths[:S] == self.model.config.max_positions - 1)
        self.done[:S] |= (token[:, None] == self.stop_ids).any(1) | full

    def _replay(self, S: int) -> None:
        """`_advance` as a CUDA graph: one launch instead of some hundred. The first time compiles, the next records."""
        if S not in self.graphs:
            self.graphs[S] = None
            self._advance(S)
            return
        if self.graphs[S] is None:
            self.graphs[S] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[S], pool=self.pool, capture_error_mode="thread_local"):
                self._advance(S)
        self.graphs[S].replay()

    def take(self, slot: int) -> Rollout:
        """The finished rollout of a slot."""
        i, j = self.jobs[slot]
        n = int(self.produced[slot])
        finished = bool((self.token[slot] == self.stop_ids).any())
        return Rollout(i, j, self.ids[slot, :n].tolist(), self.logp[slot, :n].tolist(), finished)

    def close(self, slot: int) -> None:
        """Give up a slot: the last row moves into it."""
        last = len(self.jobs) - 1
        if slot != last:
            t = int(self.cache.lengths[last])
            for x in (self.cache.k, self.cache.v):
                x[:, slot, :t] = x[:, last, :t]
            state = (self.token, self.uniform, self.ids, self.logp, self.produced, self.done, self.cache.lengths)
            for x in (*state, self.jobs):
                x[slot] = x[last]
        self.done[last], self.cache.lengths[last] = True, 0  # as long as it is decoded, it reads one token
        self.jobs.pop()
