"""What the loops of the three scripts share: device, model, sampler, evaluation, signals, the optimizer's step.

The folder that a training run writes is in `s2r/run/checkpoint.py`; several processes are in `s2r/run/ranks.py`.
"""

import math
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from s2r.data import Problem, load_problems
from s2r.generate import Rollout
from s2r.hf.tokenizer import Tokenizer
from s2r.metrics import summarize
from s2r.model import Frozen, Transformer
from s2r.rollouts import Trajectory, encode_prompts, roll_out
from s2r.run.checkpoint import Run, to_host
from s2r.run.ranks import Ranks


def pick(cfg) -> tuple[Ranks, torch.dtype]:
    """The processes of this run on --device, and the dtype to compute in.

    "auto" is the GPU if there is one, and bf16 on it, fp32 elsewhere. A GPU becomes the current device. Raises ValueError
    for a device that is not here.
    """
    device, dtype = cfg.device, cfg.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # one per process of torchrun
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"cpu|cuda:\d+", device):
        raise ValueError(f"--device {device}: not a device; use auto, cpu, cuda or cuda:1")
    if device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(device.removeprefix("cuda:")) >= count:
            raise ValueError(f"--device {device}: torch sees {count} GPUs here, from cuda:0 on; or use --device cpu")
        torch.cuda.set_device(device)  # streams and CUDA graphs are those of the current device
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums stay in fp32
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
        if dtype == "bfloat16" and torch.cuda.get_device_capability(device)[0] < 8:
            dtype = "float32"
            print(f"{torch.cuda.get_device_name(device)} has no bfloat16 (sm_80 and later do): computing in float32")
    return Ranks(torch.device(device)), getattr(torch, dtype)


def load(
    cfg, ranks: Ranks, dtype: torch.dtype, train: bool = False, whole: bool = False
) -> tuple[Transformer, Tokenizer]:
    """Model of --model, spread over the ranks or `whole` on each, and its tokenizer.

    To train, the weights are fp32, whatever `dtype`, or with --lora frozen in `dtype` with fp32 adapters. Raises
    ValueError when the tokenizer has ids that the embedding does not.
    """
    tokenizer = Tokenizer.from_pretrained(cfg.model)
    lora = train and cfg.lora

    def spread(model: Transformer) -> None:
        if lora:
            model.add_lora(cfg.lora, cfg.lora_alpha)
        if not whole:
            ranks.shard(model)

    param_dtype = torch.float32 if train and not lora else None
    model = Transformer.from_pretrained(cfg.model, dtype, ranks.device, param_dtype, spread)
    if lora:
        model.init_lora(cfg.seed)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{cfg.model}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {model.config.vocab_size} rows; "
            "the two files belong to different models"
        )
    model.vocab_size = tokenizer.vocab_size  # rows beyond it stand for nothing and are never sampled or scored
    model.checkpointing = train and cfg.checkpointing
    return model, tokenizer


def load_frozen(cfg, ranks: Ranks, dtype: torch.dtype, model: Transformer) -> Transformer | Frozen:
    """π_ref or π_base: the model of --model once more, or with --lora the policy `model` with its adapters off."""
    return Frozen(model) if cfg.lora else load(cfg, ranks, dtype)[0]


def roll_out_together(
    ranks: Ranks, model: Transformer, tokenizer: Tokenizer, problems: Sequence[Problem],
    known: Sequence[Rollout] = (), each: Callable[[Rollout], None] = lambda rollout: None, to_first: bool = False,
    **settings,
) -> list[Trajectory]:  # fmt: skip
    """`roll_out`, each rank a part of the problems; every rank gets all trajectories, problem by problem.

    With `to_first`, the other ranks get an empty list.

    `known` and `each` have rollouts whose `prompt` is the index into all problems.
    """
    mine = range(ranks.rank, len(problems), ranks.size)
    found = roll_out(
        model, tokenizer, [problems[i] for i in mine], streams=mine,
        known=[replace(rollout, prompt=mine.index(rollout.prompt)) for rollout in known if rollout.prompt in mine],
        each=lambda rollout: each(replace(rollout, prompt=mine[rollout.prompt])), **settings,
    )  # fmt: skip
    place = {problem.unique_id: i for i, problem in enumerate(problems)}
    return sorted(ranks.gather(found, to_first), key=lambda t: (place[t.problem.unique_id], t.sample))


class Sampler:
    """Rollouts of the model that is being trained, from its current weights, each rank a part of the problems.

    Where the weights are fp32 and the compute is not, or where they are spread over ranks, it keeps a copy of them
    in the compute dtype. When `stop` is asked for, sampling ends at once, and rollouts are missing. Raises ValueError
    for --eval-data without --eval-every, or the other way round, and for a prompt of --eval-data that is too long.
    """

    def __init__(self, cfg, ranks: Ranks, model: Transformer, tokenizer: Tokenizer, stop: "Stop"):
        self.cfg, self.ranks, self.model, self.tokenizer, self.stop = cfg, ranks, model, tokenizer, stop
        if bool(cfg.eval_data) != (cfg.eval_every > 0):
            raise ValueError("--eval-data and --eval-every go together; give both or neither")
        self.held_out = load_problems(cfg.eval_data) if cfg.eval_data else []
        self.prompts = encode_prompts(self.held_out, tokenizer, model.config.max_positions)
        self.copy: Transformer | None = None

    def __call__(self, problems: Sequence[Problem], *, n: int, temperature: float, step: int = 0) -> list[Trajectory]:
        """n judged responses to each problem, on every rank, problem by problem; `step` chooses the random numbers."""
        if self.copy is None:
            alone = self.ranks.size == 1 and self.model.embed.dtype == self.model.dtype
            self.copy = self.model if alone else Transformer(self.model.config, self.model.dtype, self.ranks.device)
            if self.cfg.lora and not alone:
                self.copy.add_lora(self.cfg.lora, self.cfg.lora_alpha)
        if self.copy is not self.model:
            self.copy.copy_from(self.model)
        return roll_out_together(
            self.ranks, self.copy, self.tokenizer, problems, n=n, temperature=temperature, seed=self.cfg.seed, step=step,
            slots=self.cfg.slots, max_new_tokens=self.cfg.max_new_tokens, prefill_tokens=self.cfg.tokens_per_microbatch,
            stop=lambda: self.stop.asked, progress=self.ranks.first,
        )  # fmt: skip

    def evaluate(self, run: Run, step: int) -> None:
        """If --eval-every asks for it: greedy responses to --eval-data, and their metrics into eval.jsonl.

        One that is in eval.jsonl is skipped. One that was aborted is repeated by a resumed run.
        """
        if self.held_out and step % self.cfg.eval_every == 0 and not run.evaluated(step):
            greedy = self(self.held_out, n=1, temperature=0.0)
            if not self.stop.agreed():  # else some are missing
                row = {"step": step, "data": self.cfg.eval_data} | summarize(greedy)
                run.add("eval.jsonl", row, f"evaluation after step {step}")


class Clock:
    """Seconds of each part of a step."""

    def __init__(self):
        self.parts: dict[str, float] = {}
        self.at = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to `name`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[f"seconds_{name}"], self.at = now - self.at, now


class Stop:
    """SIGTERM or SIGINT asks a run to end its step, save and exit. With one process, a second signal ends it at once."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.asked = False  # this rank
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.asked = True
        if self.ranks.size == 1:  # torchrun hands on one Ctrl-C several times
            signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> bool:
        """Has any rank been asked to? All ranks call this at the same place, and hear the same."""
        return self.ranks.sum([float(self.asked)])[0] > 0


def optimizer_step(
    run: Run, model: Transformer, optimizer: torch.optim.Optimizer,
    *, step: int, lr: float, loss: float, what: str, batch: list,
) -> float:  # fmt: skip
    """Clip the gradient's norm to --max-grad-norm and take one step at `lr`; returns the norm before clipping.

    Raises ValueError, on all ranks, when the loss of any rank or the gradient is not finite. The weights are then
    untouched, and the message says `what` the batch was and where the micro-batches in `batch` are saved.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.cfg.max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # over the parameters of all ranks
    (loss,) = run.ranks.sum([loss])
    if not math.isfinite(norm) or not math.isfinite(loss):
        raise ValueError(
            f"step {step}, {what}: the loss is {loss}, the gradient's norm is {norm}; {run.keep_batch(step, batch)}, "
            "the last checkpoint is kept. A lower --lr may help"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    if run.cfg.offload:
        _step_offloaded(optimizer)
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _step_offloaded(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step, its state kept in CPU memory and brought to the parameters' device for one at a time."""
    pairs = [(p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    optimizer.zero_grad(set_to_none=True)
    for p, gradient in pairs:  # step() skips parameters without a gradient, so each call updates one
        p.grad = gradient
        kept = dict(optimizer.state[p])
        optimizer.state[p].update({name: x.to(p.device, non_blocking=True) for name, x in kept.items()})
        optimizer.step()
        to_host(optimizer.state[p], kept)
        p.grad = None
