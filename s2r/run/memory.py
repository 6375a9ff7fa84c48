"""Peak memory of one process (one GPU) of the training scripts, computed from the model's shape and the settings.

Memory is a maximum over phases that follow one another, each a sum of what is alive in it:

    load      weights + reference + sampler's copy
    rollout   weights + optimizer + reference + sampler's copy + cache + decoding
    score     weights + optimizer + reference + sampler's copy + one forward pass
    update    weights + optimizer + reference + sampler's copy + gradients + activations + backward pass
    save      on a CPU: weights + optimizer + reference + sampler's copy + what is written

Counted: tensors at their peak, from the second step on (optimizer state) and the second micro-batch on (gradients).
Not counted: torch itself, the CUDA context, NCCL's buffers, and what an allocator holds without need. Every formula is
derived from what the code keeps, none is fitted; `tests/test_memory.py` holds them against measured peaks on a CPU.
T is the tokens of a micro-batch, `a` the bytes of a number in the compute dtype; other letters as in `s2r/__init__.py`.
Called by the training scripts, which print `report`, and by `s2r/scaling.py`, which makes tables.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kernels.logprob import CHUNK_ELEMENTS, SLAB_BYTES
from s2r.hf.config import ModelConfig
from s2r.generate import PREFILL
from s2r.model import SHARD_BYTES, Transformer
from s2r.run.ranks import Ranks

GB = 10**9


@dataclass(frozen=True)
class Job:
    """What decides how much memory a script takes, beside the model."""

    stage: str  # sft or rl
    tokens: int  # T of a micro-batch: --tokens-per-microbatch, or the longest sequence if that is longer
    itemsize: int = 2  # a: 2 for bf16, 4 for fp32
    gpu: bool = True  # Triton kernels and CUDA graphs, or the PyTorch twins
    ranks: int = 1  # processes that share weights, gradients, optimizer and reference (FSDP2)
    checkpointing: bool = False
    offload: bool = False  # optimizer state in the host's memory
    reference: bool = True  # π_ref of RL, π_base of SFT with --kl
    slots: int = 0  # rows sampled at a time; 0: nothing is sampled
    capacity: int = 0  # C, tokens of a row of the cache
    prefill: int = 0  # tokens of prompts run through the model at a time

    @property
    def copies(self) -> bool:
        """Whether the compute dtype is another than that of the fp32 master weights."""
        return self.itemsize != 4

    @property
    def base(self) -> bool:
        """Whether the reference runs while the activations of the model are alive: the KL of SFT."""
        return self.stage == "sft" and self.reference


def parameters(c: ModelConfig) -> tuple[int, int]:
    """Numbers in one block, and in embedding, head and last norm together."""
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    block = c.hidden_size * (heads + c.num_heads * c.head_dim + 3 * c.intermediate_size + 2)
    block += heads * c.qkv_bias + 2 * c.head_dim * c.qk_norm
    return block, c.vocab_size * c.hidden_size * (1 if c.tied else 2) + c.hidden_size


def total(c: ModelConfig) -> int:
    """Numbers in the whole model."""
    block, rest = parameters(c)
    return c.num_layers * block + rest


def resident(c: ModelConfig, job: Job) -> dict[str, float]:
    """What stays from the first step to the last: 4 bytes per weight, AdamW's two moments 8, reference and sampler a.

    All are spread over the ranks but the sampler's copy, which every rank that samples has whole; one process in fp32
    samples from the weights themselves.
    """
    P, own_copy = total(c), job.slots > 0 and (job.ranks > 1 or job.copies)
    return {
        "weights": 4 * P / job.ranks,
        "optimizer": 0 if job.offload else 8 * P / job.ranks,
        "reference": job.itemsize * P / job.ranks if job.reference else 0,
        "sampler": job.itemsize * P if own_copy else 0,
    }


def gradients(c: ModelConfig, job: Job) -> float:
    """fp32, one per weight, spread over the ranks."""
    return 4 * total(c) / job.ranks


def compute_copies(c: ModelConfig, job: Job) -> float:
    """Weights in the compute dtype that the update holds beside the masters.

    One process: the graph keeps each weight it has cast until its backward, a·P; with checkpointing one block's and the
    head's. Several: embedding, head and norm, gathered until the backward pass ends, with their gradients; two blocks,
    one at work and one on its way; and one block's gradients, which are copied into fp32 to be reduced.
    """
    block, rest = parameters(c)
    if job.ranks > 1:
        return job.itemsize * (2 * rest + 3 * block) + 4 * block
    if not job.copies:
        return 0
    return job.itemsize * (c.vocab_size * c.hidden_size + block * (1 if job.checkpointing else c.num_layers))


def saved_by_block(c: ModelConfig, job: Job) -> float:
    """Bytes per token that one block keeps for its backward pass.

    GPU: input and output of both norms 4D, the whole of qkv (v is a view of it), rotated q and k, output of the
    attention 3(H+G)E and its log-sum 4H, gate and up, silu(gate), their product 4F.
    CPU: the norms keep two fp32 arrays each beside their output; the attention keeps q, k and v per query head, its
    output, and that output again with heads side by side, 5HE.
    """
    D, F, H, G, E, a = c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim, job.itemsize
    if job.gpu:
        return a * (4 * D + 3 * (H + G) * E + 4 * F) + 4 * H
    norms = 4 * 4 * D + a * 2 * D
    if c.qk_norm:  # q and k: in fp32, normalised in fp32; fp32 q and k are views of the whole qkv
        norms += 4 * (H + G) * E + (4 * (H + G) * E if job.copies else 4 * (H + 2 * G) * E)
    return norms + a * (5 * H * E + 4 * F) + 4 * H


def activations(c: ModelConfig, job: Job) -> float:
    """All blocks' share; with checkpointing the input of each block and, in the backward pass, one block's share.

    To that come cos and sin, the last norm, the hidden states that the scored tokens are predicted from, of the reference
    too in SFT, and 48 bytes a token: its id, target and place, and six sums of the head.
    """
    a, D, saved = job.itemsize, c.hidden_size, saved_by_block(c, job)
    blocks = c.num_layers * a * D + saved if job.checkpointing else c.num_layers * saved
    norm = a * D if job.gpu else 8 * D
    hidden = a * D * (2 if job.base else 1)
    return job.tokens * (blocks + norm + hidden + 2 * a * c.head_dim + 48)


def forward_work(c: ModelConfig, job: Job, tokens: int) -> float:
    """One block without a graph: the residual stream, and gate, up, silu(gate) and their product, or the attention's."""
    E, H, G = c.head_dim, c.num_heads, c.num_kv_heads
    attention = (2 * H + 3 * G if job.gpu else 6 * H + 2 * G) * E
    return job.itemsize * tokens * (c.hidden_size + max(4 * c.intermediate_size, attention))


def head_forward(c: ModelConfig, job: Job) -> float:
    """log p without a graph: on a CPU one chunk of logits twice, of both models for the KL; no logits on a GPU."""
    return 0 if job.gpu else 4 * min(CHUNK_ELEMENTS, job.tokens * c.vocab_size) * (4 if job.base else 2)


def head_work(c: ModelConfig, job: Job) -> float:
    """log p and its backward pass: never the (T, V) logits, but one slab of them, on a CPU three of them for the KL.

    With it dh twice in the compute dtype and once in fp32, and dW (V, D), which autograd copies once more out of the
    slice that cuts the vocabulary: in fp32, or in the compute dtype where the weights are gathered from several ranks.
    """
    T, V, D, a = job.tokens, c.vocab_size, c.hidden_size, job.itemsize
    slab = min(SLAB_BYTES, T * V * a) if job.gpu else 4 * min(CHUNK_ELEMENTS, T * V) * (3 if job.base else 1)
    gathered = a if job.ranks > 1 else 4
    return 2 * a * T * D + max(slab + 4 * T * D + a * V * D, 2 * gathered * V * D)


def update_work(c: ModelConfig, job: Job) -> float:
    """Temporaries of the update: the most of the head's, a block's backward pass, and in SFT the reference's forward.

    A block's: the gradients of gate and up 2F and of the residual stream 2D, beyond what its backward has let go, and
    the gradient of its largest matrix (2F, D). The head's gradient of a tied embedding waits for the embedding's.
    Several processes: at the end, activations gone, the gradients of embedding and head are copied into fp32.
    """
    a, D, F = job.itemsize, c.hidden_size, c.intermediate_size
    waiting = 4 * c.vocab_size * D if c.tied and job.ranks == 1 else 0
    matrix = 2 * F * D * (a + 4 * job.copies)
    block = job.tokens * a * (2 * F + 2 * D) + matrix + waiting
    base = forward_work(c, job, job.tokens) if job.base else 0
    reduced = 4 * parameters(c)[1] - activations(c, job) if job.ranks > 1 else 0
    return max(head_work(c, job), block, base, reduced)


def cache(c: ModelConfig, job: Job, rows: int, capacity: int) -> float:
    """Keys and values: 2·L·G·E numbers a token, `rows` × `capacity` tokens."""
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * job.itemsize * rows * capacity


def decoding(c: ModelConfig, job: Job) -> float:
    """The sampler's work: prompts run through the model (their keys and values twice), logits, random numbers, ids.

    GPU: logits in the compute dtype and twice in fp32, once per CUDA graph: rows 1 + 1/4 + 1/16 + … = 4/3. CPU: three
    times in fp32, and the weights again in oneDNN's layout.
    """
    a, block = job.itemsize, parameters(c)[0]
    prefill = forward_work(c, job, job.prefill) + 2 * cache(c, job, 1, job.prefill)
    rows = job.slots * c.vocab_size * ((a + 8) * 4 / 3 if job.gpu else 12) + job.slots * job.capacity * 16
    packed = 0 if job.gpu else a * (c.num_layers * block + c.vocab_size * c.hidden_size)
    return packed + max(prefill, rows + cache(c, job, 1, job.prefill))


def on_host(c: ModelConfig, job: Job, processes: int) -> float:
    """Bytes of memory of a GPU machine that runs the first `processes` of the ranks.

    The first rank gathers fp32 weights and optimizer to save them, 12 bytes per weight, and of several ranks' parts it
    makes a model to write. What --offload keeps here is the very state that one process saves; several gather it anew.
    """
    P = total(c)
    if job.ranks == 1:
        return 12 * P
    return (12 + job.itemsize) * P + (8 * P * processes / job.ranks if job.offload else 0)


def phases(c: ModelConfig, job: Job) -> dict[str, dict[str, float]]:
    """Phase → part → bytes."""
    stays = resident(c, job)
    out = {"load": stays | {"optimizer": 0}}
    if job.slots:
        out["rollout"] = stays | {"cache": cache(c, job, job.slots, job.capacity), "decoding": decoding(c, job)}
    if job.stage == "rl":
        forward = max(forward_work(c, job, job.tokens), head_forward(c, job))
        out["score"] = stays | {"copies": compute_copies(c, replace(job, checkpointing=True)), "forward": forward}
    out["update"] = stays | {
        "gradients": gradients(c, job),
        "copies": compute_copies(c, job),
        "activations": activations(c, job),
        "backward": update_work(c, job),
    }
    if not job.gpu:
        out["save"] = stays | {"file": min(job.itemsize * total(c), SHARD_BYTES)}
    return out


def peak(c: ModelConfig, job: Job) -> tuple[str, float]:
    """The phase that takes the most, and its bytes."""
    sizes = {phase: sum(parts.values()) for phase, parts in phases(c, job).items()}
    return max(sizes.items(), key=lambda item: item[1])


def report(c: ModelConfig, job: Job) -> str:
    """The parts of the peak and the sums of the other phases, in two lines, in GB."""
    sums = phases(c, job)
    at, most = peak(c, job)
    parts = " + ".join(f"{name} {size / GB:.3g}" for name, size in sums[at].items() if size)
    others = ", ".join(f"{phase} {sum(p.values()) / GB:.3g}" for phase, p in sums.items() if phase != at)
    return f"memory, estimated: {parts} = {most / GB:.3g} GB at the peak, in the {at}\n    other phases: {others or 'none'}"


def job_of(
    cfg,
    model: Transformer,
    ranks: Ranks,
    *,
    sequences: Sequence[list[int]],
    prompts: Sequence[list[int]] = (),
    held_out: int = 0,
) -> Job:
    """The job of a training script: its settings, the sequences it learns from and the prompts it samples from.

    `held_out` of the prompts are for evaluation, one response each.
    """
    rl, prompt, slots = hasattr(cfg, "rollouts"), max(map(len, prompts), default=0), 0
    longest = max(map(len, sequences), default=0)
    if prompts:
        longest = max(longest, min(prompt + cfg.max_new_tokens, model.config.max_positions))
        problems, evaluated = math.ceil(cfg.problems / ranks.size), math.ceil(held_out / ranks.size)
        slots = min(cfg.slots, max(problems * cfg.rollouts, evaluated))
    rows = math.ceil((cfg.problems * cfg.rollouts / cfg.updates if rl else cfg.batch_size) / ranks.size)
    return Job(
        "rl" if rl else "sft",
        tokens=min(max(cfg.tokens_per_microbatch, longest), rows * longest),
        itemsize=model.dtype.itemsize,
        gpu=ranks.device.type == "cuda",
        ranks=ranks.size,
        checkpointing=cfg.checkpointing,
        offload=cfg.offload,
        reference=rl or cfg.kl > 0,
        slots=slots,
        capacity=longest,
        prefill=min(PREFILL, max(problems, evaluated) * prompt) if slots else 0,
    )
