"""Stage 1, behaviour initialisation: masked SFT on trajectories that check and correct themselves (paper §2.2.4).

    python train_sft.py                                                toy world
    python train_sft.py --model DIR --data TRAJ.jsonl --out DIR2 --epochs 3 --lr 5e-6 --batch-size 32 --kl 0.1 \\
        --max-length 8000

The target is what a good trajectory does, never its mistakes: every verify, the last solve and the stop token have a
loss, the wrong solves before are context. Equation (1), plus kl · KL(π ‖ π_base) on the same tokens.
"""

# Before torch: s2r settles how torch's threads wait.
import s2r  # isort: skip  # noqa: F401

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.logprob import token_logp, token_logp_kl
from s2r import memory, runtime, toy
from s2r.data import load_trajectories
from s2r.packing import pack, predictors, sft_targets
from s2r.run.ranks import Ranks
from s2r.grammar import encode, prompt


@dataclass(frozen=True)
class Config:
    model: str = toy.BASE  # Hugging Face folder to start from, π_base
    data: str = toy.TRAJECTORIES  # trajectory file, JSONL
    out: str = toy.SFT  # run folder to write
    epochs: int = 3  # passes over the data (paper: 3)
    lr: float = 2e-3  # learning rate after warm-up (paper: 5e-6)
    warmup: int = 5  # steps of linear warm-up (paper: 5)
    batch_size: int = 32  # trajectories per step (paper: 32)
    kl: float = 0.01  # weight of the KL to the base model (paper: 0.1; 0.01 for Qwen2.5-Math-7B)
    max_length: int = 1024  # tokens; longer examples are left out (paper: 8000, 6000 for Qwen2)
    unmasked: bool = False  # learn the wrong solves too (paper: an ablation, which does worse)
    max_grad_norm: float = 1.0  # gradient norm is clipped to this (paper: 1)
    seed: int = 0  # of the order of the data
    save_every: int = 200  # steps between checkpoints; there is always one at the end
    keep: int = 2  # checkpoints to keep, the newest
    resume: bool = False  # go on with the run in --out
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    offload: bool = False  # keep the optimizer's state in CPU memory: 8 bytes per parameter less on the GPU, slower
    tokens_per_microbatch: int = 8192  # tokens run through the model at a time; changes memory, not the gradient
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …


def main(cfg: Config) -> None:
    runtime.positive(cfg, "epochs", "batch_size", "save_every", "keep")
    runtime.not_negative(cfg, "warmup", "kl")
    toy.ensure(cfg.data)
    examples = load_trajectories(cfg.data)
    device, dtype = runtime.pick(cfg.device, cfg.dtype)
    ranks = Ranks(device)
    model, tokenizer = runtime.load(cfg.model, device, dtype, train=True, spread=ranks.shard)
    model.checkpointing = cfg.checkpointing
    base = runtime.load(cfg.model, device, dtype, spread=ranks.shard)[0] if cfg.kl else None  # π_base, fixed

    longest = min(cfg.max_length, model.config.max_positions)
    sequences, scored = [], []  # token ids of each example; positions in it that have a loss, δ = 1 in (1)
    for example in examples:
        prefix = prompt(example.problem, tokenizer)
        ids, actions = encode(example.trajectory, tokenizer)
        if len(prefix) + len(ids) <= longest:
            sequences.append(prefix + ids)
            targets = range(len(ids)) if cfg.unmasked else sft_targets(actions)
            scored.append([len(prefix) + t for t in targets])
    if not sequences:
        raise ValueError(f"{cfg.data}: no example is within {longest} tokens, the lesser of --max-length and the context")
    per_epoch = math.ceil(len(sequences) / cfg.batch_size)
    steps = cfg.epochs * per_epoch
    if ranks.rank == 0:
        print(f"{len(sequences)} of {len(examples)} examples within {longest} tokens, {steps} steps")
        print(memory.report(model.config, memory.job_of(cfg, model, ranks, sequences=sequences)))

    run = runtime.Run(cfg, ranks, cfg.data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
    done = run.restore(model, optimizer) if cfg.resume else 0
    if done >= steps and run.first:
        print(f"{cfg.out}: {done} steps are done, and --epochs {cfg.epochs} asks for {steps}; nothing to do")
    stop, watchdog = runtime.Stop(ranks), runtime.Watchdog()
    for step in range(done + 1, steps + 1):
        watchdog.begin(step)
        start = time.perf_counter()
        epoch, at = divmod(step - 1, per_epoch)
        batch = runtime.order(len(sequences), cfg.seed, epoch)[at * cfg.batch_size :][: cfg.batch_size]
        mine = [batch[j] for j in ranks.share([len(sequences[i]) for i in batch])]
        packs = pack([sequences[i] for i in mine], [scored[i] for i in mine], cfg.tokens_per_microbatch, device)
        # Departs from the paper: (1) divided by the target tokens of the batch, not by its trajectories. Counted over the
        # whole batch, so that micro-batches and ranks do not change the gradient.
        tokens = sum(len(scored[i]) for i in batch)

        total = nll = kl = 0.0
        packs = ranks.even(packs)
        for p in packs:
            hidden = predictors(model, p)  # (K, D)
            if base is None:
                logp, _ = token_logp(hidden, model.head_weight, p.targets)
                loss = -logp.sum() / tokens
            else:
                with torch.no_grad():
                    hidden_base = predictors(base, p)
                logp, _, divergence = token_logp_kl(hidden, model.head_weight, p.targets, hidden_base, base.head_weight)
                loss = (-logp + cfg.kl * divergence).sum() / tokens
                kl += divergence.sum().item() / tokens
            (loss * ranks.size).backward()  # the ranks' gradients are averaged, and we want their sum
            total += loss.item()
            nll -= logp.sum().item() / tokens
        lr = cfg.lr * min(1.0, step / max(cfg.warmup, 1))
        clip, what = cfg.max_grad_norm, f"examples {batch}"
        norm = runtime.optimizer_step(
            model, optimizer, run, step=step, lr=lr, clip=clip, loss=total, what=what, batch=packs
        )

        nll, kl = ranks.sum([nll, kl])
        seconds = time.perf_counter() - start
        read = sum(len(sequences[i]) for i in batch)
        row = {"step": step, "epoch": epoch, "nll": nll, "kl": kl, "grad_norm": norm, "lr": lr, "tokens": read}
        run.log(row | {"tokens_per_second": read / seconds})
        watchdog.end()
        if step % cfg.save_every == 0 or step == steps:
            run.save(model, optimizer, step)
        if stop.agreed():
            run.stop(model, optimizer, step)
            break


if __name__ == "__main__":
    runtime.start(main, Config)
