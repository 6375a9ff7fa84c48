"""Stage 1, behaviour initialisation: masked SFT on trajectories that check and correct themselves (paper §2.2.4).

    python train_sft.py --model DIR --data TRAJ.jsonl --out DIR2
    torchrun --nproc-per-node 8 -- train_sft.py …                       the same flags, one process per GPU

The loss is equation (1) plus β_sft · KL(π ‖ π_base), both on the target tokens; --kl is β_sft. Targets are every
verify, the last solve, the stop token and the transitions from one action to the next. The wrong solves are
input only: the model reads them and never learns to write them.
"""

import s2r  # isort: skip  # noqa: F401  before torch: it settles how torch's threads wait

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.logprob import token_logp_kl
from s2r.data import draw, load_trajectories
from s2r.packing import pack, predictors, sft_sequences
from s2r.run import flags, loop, memory
from s2r.run.checkpoint import Run


@dataclass(frozen=True)
class Config:
    model: str  # Hugging Face folder to start from, π_base
    data: str  # trajectory file, JSONL
    out: str  # run folder to write
    epochs: int = 3  # passes over the data (paper: 3)
    lr: float = 5e-6  # learning rate after warm-up (paper: 5e-6)
    warmup: int = 5  # updates of linear warm-up (paper: 5)
    batch_size: int = 32  # trajectories per step (paper: 32)
    kl: float = 0.1  # weight of the KL to the base model (paper: 0.1; 0.01 for Qwen2.5-Math-7B)
    max_length: int = 8000  # tokens; longer examples are left out (paper: 8000, 6000 for Qwen2)
    unmasked: bool = False  # learn the wrong solves too (paper: an ablation, which does worse)
    max_grad_norm: float = 1.0  # gradient norm is clipped to this (paper: 1)
    seed: int = 0  # of the order of the data
    eval_data: str = ""  # problem file to evaluate on, greedily
    eval_every: int = 0  # steps between evaluations, the first before step 1; 0: none
    max_new_tokens: int = 2048  # length limit of a response in an evaluation
    slots: int = 128  # responses sampled at a time in an evaluation
    save_every: int = 200  # steps between checkpoints; there is always one at the end
    keep: int = 2  # checkpoints to keep, the newest
    resume: bool = False  # continue the run in --out; start it if there is none
    tensorboard: bool = False  # write the log for TensorBoard too
    lora: int = 0  # rank of the adapters that are trained in place of the weights (LoRA); 0: train the weights
    lora_alpha: float = 32.0  # α of LoRA: adapters are multiplied by α/rank
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    offload: bool = False  # keep the optimizer's state in CPU memory: 8 bytes per parameter less on the GPU, slower
    tokens_per_microbatch: int = 8192  # tokens run through the model at a time; changes memory, not the gradient
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …


def main(cfg: Config) -> None:
    flags.check(cfg, "epochs", "batch_size", "max_length", "max_new_tokens", "slots")
    flags.check(cfg, "save_every", "keep", "max_grad_norm", "lora_alpha")
    examples = load_trajectories(cfg.data)
    ranks, dtype = loop.pick(cfg)
    model, tokenizer = loop.load(cfg, ranks, dtype, train=True)  # π_θ
    base = loop.load_frozen(cfg, ranks, dtype, model) if cfg.kl else None  # π_base
    longest = min(cfg.max_length, model.config.max_positions)
    sequences, scored = sft_sequences(examples, tokenizer, longest, cfg.unmasked)
    if not sequences:
        raise ValueError(f"{cfg.data}: no example is within {longest} tokens, the lesser of --max-length and the context")
    steps = cfg.epochs * math.ceil(len(sequences) / cfg.batch_size)
    stop = loop.Stop(ranks)
    sampler = loop.Sampler(cfg, ranks, model, tokenizer, stop)
    if ranks.first:
        print(f"{len(sequences)} of {len(examples)} examples within {longest} tokens, {steps} steps")
        print(memory.report(cfg, model, ranks, sequences=sequences, held_out=sampler.prompts))
    run = Run(cfg, ranks, dtype, data=cfg.data, steps=steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
    done = run.restore(model, optimizer)
    sampler.evaluate(run, done)
    run.end_step(model, optimizer, done, stop)  # exits if a signal cut the evaluation short

    for step in range(done + 1, steps + 1):
        start = time.perf_counter()
        batch = draw(len(sequences), cfg.batch_size, step, cfg.seed, partial=True)
        mine = [batch[j] for j in ranks.share([len(sequences[i]) for i in batch])]
        packs = pack([sequences[i] for i in mine], [scored[i] for i in mine], cfg.tokens_per_microbatch, ranks.device)
        # Departs from the paper: (1) divided by the target tokens of the batch, not by its trajectories. Counted over the
        # whole batch, so that micro-batches and ranks do not change the gradient.
        tokens = sum(len(scored[i]) for i in batch)
        total = nll = kl = 0.0
        for p in ranks.even(packs):
            with torch.no_grad():
                theirs = (predictors(base, p), base.head_weight) if base else (None, None)
            logp, _, divergence = token_logp_kl(predictors(model, p), model.head_weight, p.targets, *theirs)  # (Q,) each
            loss = (-logp + cfg.kl * divergence).sum() / tokens
            (loss * ranks.size).backward()  # the ranks' gradients are averaged, and we want their sum
            total += loss.item()
            nll -= logp.sum().item() / tokens
            kl += divergence.sum().item() / tokens
        lr = cfg.lr * min(1.0, step / max(cfg.warmup, 1))
        what = f"examples {batch}"
        norm = loop.optimizer_step(run, model, optimizer, step=step, lr=lr, loss=total, what=what, batch=packs)

        nll, kl = ranks.sum([nll, kl])
        read = sum(len(sequences[i]) for i in batch)
        row = {"step": step, "nll": nll, "kl": kl, "grad_norm": norm, "lr": lr, "tokens": read}
        run.log(row | {"tokens_per_second": read / (time.perf_counter() - start)})
        sampler.evaluate(run, step)
        run.end_step(model, optimizer, step, stop)


if __name__ == "__main__":
    flags.start(main, Config)
