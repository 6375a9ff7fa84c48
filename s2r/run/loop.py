"""What the loops of the three scripts share: device, model folder, sampler, signals, the optimizer's step, evaluation.

The folder that a training run writes is in `s2r/run/checkpoint.py`; several processes are in `s2r/run/ranks.py`.
"""

import math
import os
import re
import signal
import time
from collections.abc import Callable, Sequence

import torch
from torch.distributed.tensor import DTensor

from s2r.data import Problem, load_problems
from s2r.hf.tokenizer import Tokenizer
from s2r.metrics import summarize
from s2r.model import Transformer
from s2r.rollouts import Trajectory, encode_prompts
from s2r.run.checkpoint import Run, move
from s2r.run.ranks import Ranks, roll_out_shares


def pick(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype by name; "auto" is the GPU if there is one, and bf16 on it, fp32 on a CPU.

    A GPU becomes the current device. Raises ValueError for a device that is not here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # one GPU per process of torchrun
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: not a device; use auto, cpu, cuda or cuda:1")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here; use --device cpu")
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: torch sees {torch.cuda.device_count()} GPUs here, the first is cuda:0")
        device = f"cuda:{index}"
        torch.cuda.set_device(device)  # streams and CUDA graphs are those of the current device
    if dtype == "auto":
        dtype = "bfloat16" if device != "cpu" else "float32"
        if device != "cpu" and torch.cuda.get_device_capability(device)[0] < 8:
            dtype = "float32"
            print(f"{torch.cuda.get_device_name(device)} has no bfloat16 (sm_80 and later do): computing in float32")
    return torch.device(device), getattr(torch, dtype)


def load(
    folder: str, device: torch.device, dtype: torch.dtype, train: bool = False, spread: Callable | None = None
) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a folder; to train, the weights are kept in fp32, whatever the compute dtype.

    `spread` as `Transformer.from_pretrained` takes it. Raises ValueError when the tokenizer has ids that the embedding
    does not.
    """
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Transformer.from_pretrained(folder, dtype, device, torch.float32 if train else None, spread)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {model.config.vocab_size} rows; "
            "the two files belong to different models"
        )
    model.vocab_size = tokenizer.vocab_size  # rows beyond it stand for nothing and are never sampled or scored
    return model, tokenizer


def policy(cfg) -> tuple[Ranks, Transformer, Tokenizer]:
    """The processes of this run, and the model of `cfg.model` that is trained, π_θ, with its tokenizer."""
    device, dtype = pick(cfg.device, cfg.dtype)
    ranks = Ranks(device)
    model, tokenizer = load(cfg.model, device, dtype, train=True, spread=ranks.shard)
    model.checkpointing = cfg.checkpointing
    return ranks, model, tokenizer


def frozen(cfg, ranks: Ranks) -> Transformer:
    """The same model in the compute dtype, never trained: π_ref, or π_base of SFT."""
    return load(cfg.model, *pick(cfg.device, cfg.dtype), spread=ranks.shard)[0]


def held_out(cfg) -> list[Problem]:
    """The problems of --eval-data. Raises ValueError if one of --eval-data and --eval-every is given alone."""
    if bool(cfg.eval_data) != (cfg.eval_every > 0):
        raise ValueError("--eval-data and --eval-every go together; give both or neither")
    return load_problems(cfg.eval_data) if cfg.eval_data else []


class Sampler:
    """Rollouts of the model that is being trained, from its current weights, each rank a part of the problems.

    Where the weights are fp32 and the compute is not, or where they are spread over ranks, it keeps a copy of them in
    the compute dtype. When `stop` is asked for, sampling ends at once, and rollouts are missing.
    """

    def __init__(self, cfg, ranks: Ranks, model: Transformer, tokenizer: Tokenizer, stop: "Stop"):
        self.cfg, self.ranks, self.model, self.tokenizer, self.stop = cfg, ranks, model, tokenizer, stop
        self.held_out = held_out(cfg)
        self.prompts = encode_prompts(self.held_out, tokenizer, model.config.max_positions)  # an error now, if any
        self.copy: Transformer | None = None

    def __call__(self, problems: Sequence[Problem], **settings) -> list[Trajectory]:
        """As `roll_out`; every rank gets all trajectories, problem by problem."""
        if self.copy is None:
            alone = self.ranks.size == 1 and self.model.embed.dtype == self.model.dtype
            self.copy = self.model if alone else Transformer(self.model.config, self.model.dtype, self.ranks.device)
        if self.copy is not self.model:
            self.copy.copy_from(self.model)
        settings |= {"max_new_tokens": self.cfg.max_new_tokens, "seed": self.cfg.seed, "slots": self.cfg.slots}
        return roll_out_shares(self.ranks, self.copy, self.tokenizer, problems, stop=self.stop.asked, **settings)

    def evaluate(self, run: Run, step: int) -> None:
        """If --eval-every asks for it: greedy responses to --eval-data, and their metrics into eval.jsonl."""
        if self.held_out and step % self.cfg.eval_every == 0:
            greedy = self(self.held_out, n=1, temperature=0.0)
            if not self.stop.agreed():  # else some are missing
                run.evaluated(step, summarize(greedy))


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
    """SIGTERM or SIGINT asks a training run to end its step, save and exit. Alone, a second one ends it at once."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.signalled = ranks, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.signalled = True
        if self.ranks.size == 1:  # torchrun hands on one Ctrl-C several times
            signal.signal(number, signal.SIG_DFL)

    def asked(self) -> bool:
        """Has this rank been asked to stop?"""
        return self.signalled

    def agreed(self) -> bool:
        """Has any rank? All ranks call this at the same place, and hear the same."""
        return self.ranks.sum([float(self.signalled)])[0] > 0


def optimizer_step(
    run: Run,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    lr: float,
    loss: float,
    what: str,
    batch: list,
) -> float:
    """Clip the gradient's norm to --max-grad-norm, take one step at `lr`, zero the gradient; the norm before clipping.

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
    pairs = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    for p, gradient in pairs:  # the optimizer passes over parameters without gradient
        p.grad = gradient
        move(optimizer.state[p], p.device)
        optimizer.step()
        move(optimizer.state[p], "cpu")
        p.grad = None
