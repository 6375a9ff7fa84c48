"""Peak memory of one process (one GPU) of the training scripts: a sum to check by hand, right to ± 25 %.

    python -m s2r.run.memory --model DIR --gpus 8 --checkpointing

In bytes, with P parameters, n processes, a = 2 (computing in bf16) or 4 (fp32), T tokens of a micro-batch and
the other letters of `s2r/__init__.py`. With several machines n counts those of one. The peak is "always" plus the
larger of "rollout" and "update".

    always    weights        4P/n                       fp32, spread over the processes of a machine (FSDP2)
              AdamW          8P/n                       two moments in fp32; 0 with --offload
              reference      aP/n                       π_ref or π_base; 0 with --beta 0 or --kl 0
              sampler        aP                         a whole copy, if anything is sampled and a = 2 or n > 1
    rollout   cache          a·2·L·G·E per token        of --slots rows, each with prompt and response
              packed         aP                         on a CPU: the matrices once more, laid out for decoding
    update    gradients      4P/n                       fp32
              working copy   aP                         0 in fp32 or with --checkpointing
                             a·(2·rest + 3·block)       n > 1: rest with its gradients (SFT: and π_base's), three blocks
              activations    a·T·L·(4D + 3(H+G)E + 4F)  norms, q, k, v and attention, SwiGLU (3F on a GPU)
                             a·T·(L·D + one layer's)    with --checkpointing
              head           8·V·D + a slab of logits   the gradient of its matrix, twice

With --lora, of A parameters, these lines become: weights (aP + 4A)/n, AdamW 8A/n, reference 0, sampler 0 if n = 1,
gradients 4A/n, working copy 0 or a·(rest + 3·block), head a slab of logits. Evaluations count as rollouts.

Not counted: torch and CUDA themselves, NCCL's buffers, the work of a single layer, the allocator's reserve.
`tests/test_memory.py` compares the sum with peaks measured on a CPU, docs/gpu.md with one on a GPU. Called by the training
scripts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kernels.logprob import CHUNK_ELEMENTS, SLAB_BYTES
from s2r.hf.config import ModelConfig
from s2r.run.flags import check, start

GB = 10**9
PROMPT, ROLLOUTS = 200, 256  # of the command: tokens of a prompt, assumed; rollouts of a step (paper: 64 × 4)


def parameters(c: ModelConfig) -> tuple[int, int, int]:
    """P, and of these the numbers in one block, and in embedding, head and last norm together ("rest")."""
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    block = c.hidden_size * (heads + c.num_heads * c.head_dim + 3 * c.intermediate_size + 2)
    block += heads * c.qkv_bias + 2 * c.head_dim * c.qk_norm
    rest = c.vocab_size * c.hidden_size * (1 if c.tied else 2) + c.hidden_size
    return c.num_layers * block + rest, block, rest


def estimate(
    c: ModelConfig, *, ranks: int, itemsize: int, gpu: bool, tokens: int, checkpointing: bool, offload: bool,
    reference: bool, sft: bool = False, slots: int = 0, capacity: int = 0, lora: int = 0,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Phase → part → bytes, as in the table above; `slots` rows of `capacity` tokens are sampled at once."""
    n, a, T, (P, block, rest) = ranks, itemsize, tokens, parameters(c)
    L, D, H, G, E, F = c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size
    layer = 4 * D + 3 * (H + G) * E + (3 if gpu else 4) * F
    trained = L * lora * (4 * D + 2 * (H + G) * E + 3 * F) if lora else P  # in rows and columns of the four matrices
    rests = 1 if lora else 3 if reference and sft else 2  # SFT's KL reads the base's head in the backward pass
    copy = slots and (n > 1 or (a == 2 and not lora))
    cast = a * P if a == 2 and not checkpointing and not lora else 0
    return {
        "always": {
            "weights": (a * P * (lora > 0) + 4 * trained) / n,
            "AdamW": 0 if offload else 8 * trained / n,
            "reference": a * P / n if reference and not lora else 0,
            "sampler": a * P if copy else 0,
        },
        "rollout": {"cache": a * 2 * L * G * E * slots * capacity, "packed": 0 if gpu or not slots else a * P},
        "update": {
            "gradients": 4 * trained / n,
            "working copy": a * (rests * rest + 3 * block) if n > 1 else cast,
            "activations": a * T * (L * D + layer if checkpointing else L * layer),
            "head": 8 * c.vocab_size * D * (not lora) + (SLAB_BYTES if gpu else 4 * CHUNK_ELEMENTS),
        },
    }


def text(parts: dict[str, dict[str, float]]) -> str:
    """The sum at the peak, and where something is sampled that of the other phase too, in GB."""
    sums = {phase: sum((parts["always"] | parts[phase]).values()) / GB for phase in ("update", "rollout")}
    most, other = sorted(sums, key=sums.get, reverse=True)
    terms = " + ".join(f"{name} {size / GB:.3g}" for name, size in (parts["always"] | parts[most]).items() if size)
    less = f"; {sums[other]:.3g} GB in the {other}" if parts["rollout"]["cache"] else ""
    return f"memory, estimated to ± 25 %: {terms} = {sums[most]:.3g} GB at the peak, in the {most}{less}"


def report(
    cfg, model, ranks, *, sequences: Sequence[list[int]] = (), prompts: Sequence[list[int]] = (),
    held_out: Sequence[list[int]] = (),
) -> str:  # fmt: skip
    """The estimate for a training script with these settings. All three arguments are lists of token ids.

    It learns from `sequences`, or from rollouts of a step's `prompts`. An evaluation samples all of `held_out` at once.
    """
    rl, c = hasattr(cfg, "rollouts"), model.config
    batch = cfg.problems * cfg.rollouts if rl else cfg.batch_size
    # Of a row of the cache, and of a sequence in an update; slots is 0 where nothing is sampled.
    capacity, sampled = (
        min(max(map(len, asked), default=0) + cfg.max_new_tokens, c.max_positions) for asked in ([*prompts, *held_out], prompts)
    )
    longest = sampled if prompts else max(map(len, sequences), default=0)
    slots = min(cfg.slots, math.ceil(max(len(held_out), batch if prompts else 0) / ranks.size))
    largest = math.ceil(cfg.problems / cfg.updates) * cfg.rollouts if rl else batch  # sequences of an optimizer step
    rows = math.ceil(largest / ranks.size)
    reference = cfg.kl > 0 if not rl else cfg.beta > 0 or bool(cfg.offline)  # offline it is π_old as well
    return text(estimate(
        c, ranks=ranks.spread, itemsize=model.dtype.itemsize, gpu=ranks.device.type == "cuda",
        tokens=min(max(cfg.tokens_per_microbatch, longest), rows * longest), checkpointing=cfg.checkpointing,
        offload=cfg.offload, reference=reference, sft=not rl, slots=slots, capacity=capacity, lora=cfg.lora,
    ))  # fmt: skip


@dataclass(frozen=True)
class Config:
    model: str  # Hugging Face folder, of which config.json is read
    gpus: int = 1  # processes, one per GPU
    lora: int = 0  # rank of LoRA, 0: all weights are trained
    checkpointing: bool = False  # recompute activations in the backward pass
    offload: bool = False  # keep the optimizer's state in CPU memory
    slots: int = 128  # rollouts sampled at a time on a GPU
    max_new_tokens: int = 8000  # length limit of a rollout
    tokens_per_microbatch: int = 8192  # tokens run through the model at a time


def main(cfg: Config) -> None:
    check(cfg, "gpus", "slots", "max_new_tokens", "tokens_per_microbatch")
    c = ModelConfig.from_folder(cfg.model)
    longest = min(PROMPT + cfg.max_new_tokens, c.max_positions)
    print(f"{cfg.model}: {parameters(c)[0] / 1e9:.3g} billion parameters, bf16; each of {cfg.gpus} GPUs:")
    for stage, slots in (("SFT", 0), ("RL", min(cfg.slots, math.ceil(ROLLOUTS / cfg.gpus)))):
        print(f"{stage}:", text(estimate(
            c, ranks=cfg.gpus, itemsize=2, gpu=True, tokens=max(cfg.tokens_per_microbatch, longest),
            checkpointing=cfg.checkpointing, offload=cfg.offload, reference=True, sft=not slots,
            slots=slots, capacity=longest, lora=cfg.lora,
        )))  # fmt: skip


if __name__ == "__main__":
    start(main, Config)
