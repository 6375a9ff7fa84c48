"""Stage 2, reinforcement learning with outcome-level or process-level rewards (paper §2.3; equations in s2r/rl.py).

    python train_rl.py --model DIR2 --data F.jsonl --out DIR3 --level outcome
    python train_rl.py --model DIR2 --offline ROLLOUTS.jsonl --out DIR4 --level process --baseline position
    torchrun --nproc-per-node 8 -- train_rl.py …                                the same flags, one process per GPU

DIR2 is the SFT model. One RL step samples M rollouts of each of N problems, judges them by rule, computes their
log-probabilities under π_old and π_ref, and takes several clipped policy-gradient updates on them. Offline, the
rollouts come from a file that DIR2 sampled (`sample.py --n 8 --temperature 0.7 --out`), and π_old stays DIR2.
"""

import s2r  # isort: skip  # noqa: F401  before torch: it settles how torch's threads wait

import sys
from dataclasses import dataclass
from typing import Literal

import torch

from s2r import metrics, offline, rl
from s2r.data import draw, load_problems
from s2r.model import Frozen, Transformer
from s2r.packing import Pack, pack, policy_logp
from s2r.rollouts import Trajectory, encode_prompts, sequences
from s2r.run import flags, loop, memory
from s2r.run.checkpoint import Run
from s2r.run.ranks import Ranks
from s2r.view.terminal import show


@dataclass(frozen=True)
class Config:
    model: str  # Hugging Face folder to start from: the SFT model, also π_ref
    out: str  # run folder to write
    data: str = ""  # problem file to sample from, JSONL
    offline: str = ""  # or a rollout file to learn from; N·M of its rollouts a step
    level: Literal["outcome", "process"] = "outcome"  # what has a reward: the trajectory or each action
    baseline: Literal["position", "context", "context-only"] = "position"  # offline RL: which spans share b̂ (App. F)
    problems: int = 64  # N, problems per step (paper: 64)
    rollouts: int = 4  # M, rollouts per problem (paper: 4)
    updates: int = 4  # optimizer updates per RL step, each on its own rollouts; online split by problem (paper: 4)
    temperature: float = 0.7  # of sampling, and of every log-probability (paper: 0.7)
    beta: float = 0.05  # β, weight of the KL to π_ref; no effect offline (paper: 0.05; 0.01 for Qwen2.5-Math-7B)
    epsilon: float = 0.2  # ε, clip range of the ratio (paper: 0.2)
    lr: float = 5e-7  # learning rate after warm-up (paper: 5e-7)
    warmup: int = 5  # updates of linear warm-up (paper: 5)
    steps: int = 500  # RL steps (paper: 500)
    max_new_tokens: int = 8000  # length limit of a rollout (paper: 8000)
    max_grad_norm: float = 1.0  # gradient norm is clipped to this (paper: 1)
    seed: int = 0  # of the order of the data and of the random stream
    eval_data: str = ""  # problem file to evaluate on, greedily
    eval_every: int = 0  # steps between evaluations, the first before step 1; 0: none
    show_every: int = 10  # steps between rollouts printed in full, 0: none
    save_every: int = 50  # steps between checkpoints; there is always one at the end
    keep: int = 2  # checkpoints to keep, the newest
    resume: bool = False  # continue the run in --out; start it if there is none
    tensorboard: bool = False  # write the log for TensorBoard too
    lora: int = 0  # rank of the adapters that are trained in place of the weights (LoRA); 0: train the weights
    lora_alpha: float = 32.0  # α of LoRA: adapters are multiplied by α/rank
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    offload: bool = False  # keep the optimizer's state in CPU memory: 8 bytes per parameter less on the GPU, slower
    slots: int = 128  # rollouts sampled at a time; fewer take less memory
    tokens_per_microbatch: int = 8192  # tokens run through the model at a time; changes memory, not the gradient
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …


def main(cfg: Config) -> None:
    check_settings(cfg)
    problems = load_problems(cfg.data) if cfg.data else []
    if cfg.data and cfg.problems > len(problems):
        raise ValueError(f"{cfg.data} holds {len(problems)} problems, --problems asks for {cfg.problems} a step; lower it")
    ranks, dtype = loop.pick(cfg)
    model, tokenizer = loop.load(cfg, ranks, dtype, train=True)  # π_θ
    reference = loop.load_frozen(cfg, ranks, dtype, model) if cfg.beta or cfg.offline else None  # π_ref
    old = reference if cfg.offline else model  # π_old: offline it stays the model that sampled
    stop = loop.Stop(ranks)
    sampler = loop.Sampler(cfg, ranks, model, tokenizer, stop)
    prompts = encode_prompts(problems, tokenizer, model.config.max_positions)
    recorded, recorded_credits = load_recorded(cfg, ranks, tokenizer, model, reference) if cfg.offline else ([], [])
    if ranks.first:
        print(memory.report(cfg, model, ranks, sequences=sequences(recorded)[0], prompts=prompts, held_out=sampler.prompts))
    run = Run(cfg, ranks, dtype, data=cfg.offline or cfg.data, steps=cfg.steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
    done = run.restore(model, optimizer)
    sampler.evaluate(run, done)
    run.end_step(model, optimizer, done, stop)  # exits if a signal cut the evaluation short

    for step in range(done + 1, cfg.steps + 1):
        clock = loop.Clock()
        # 1. Sample M responses to each of N problems from the current policy; judge them (offline: draw from the file).
        if cfg.offline:
            rows = draw(len(recorded), cfg.problems * cfg.rollouts, step, cfg.seed)
            trajectories = [recorded[i] for i in rows]
        else:
            rows = draw(len(problems), cfg.problems, step, cfg.seed)
            trajectories = sampler([problems[i] for i in rows], n=cfg.rollouts, temperature=cfg.temperature, step=step)
        run.end_step(model, optimizer, step - 1, stop)  # exits if a signal cut the sampling short: drops this step
        clock.lap("rollout")

        # 2. Give each span its reward and baseline: the whole trajectory, or each of its actions.
        if cfg.offline:
            credits = [recorded_credits[i] for i in rows]
        else:
            credits = rl.online_credit(trajectories, cfg.level, cfg.rollouts)

        # 3. Split the rollouts over the updates (online by problem); score them under π_old and π_ref.
        pairs = list(zip(trajectories, credits))  # N·M, in random order, online problem by problem
        borders = [cfg.problems * u // cfg.updates * cfg.rollouts for u in range(cfg.updates + 1)]
        parts = [pairs[start:end] for start, end in zip(borders, borders[1:])]
        updates = []
        for u, part in enumerate(parts):
            first = u == 0 and not cfg.offline  # the weights are still π_old's: step 4 finds log π_old itself
            updates.append(score(part, ranks, None if first else old, reference, cfg))
        clock.lap("score")

        # 4. Advantages and policy gradient: one optimizer step per update, its loss the sum over its micro-batches.
        outside, norms = [], []  # outside: which ratios left the clip range
        for u, (part, micro_batches) in enumerate(zip(parts, updates)):
            total = torch.zeros((), device=ranks.device)
            for m in micro_batches:
                logp, entropy = policy_logp(model, m.pack, cfg.temperature)
                if m.logp_old is None:
                    m.logp_old, m.entropy = logp.detach(), entropy
                advantage = rl.advantages(m.reward, m.baseline, m.logp_old, m.logp_ref, m.span, beta=cfg.beta)
                loss, left_range = rl.policy_loss(logp, m.logp_old, m.span, advantage, m.weight, epsilon=cfg.epsilon)
                (loss * ranks.size).backward()  # the ranks' gradients are averaged, and we want their sum
                outside.append(left_range)
                total += loss.detach()
            count = (step - 1) * cfg.updates + u + 1  # updates of the run, this one included
            lr = cfg.lr * min(1.0, count / max(cfg.warmup, 1))
            what = f"problems {list(dict.fromkeys(t.problem.unique_id for t, _ in part))}"
            norm = loop.optimizer_step(
                run, model, optimizer, step=step, lr=lr, loss=total.item(), what=what, batch=micro_batches
            )
            norms.append(norm)
        clock.lap("update")

        # 5. Log, show, evaluate, save.
        scored = [m for micro_batches in updates for m in micro_batches]
        row = measure(trajectories, credits, scored, torch.cat(outside), ranks, cfg)
        run.log({"step": step} | row | {"grad_norm": sum(norms) / len(norms), "lr": lr} | clock.parts)
        if cfg.show_every and step % cfg.show_every == 0 and ranks.first:
            print(show(trajectories[0]), end="\n\n")
        sampler.evaluate(run, step)
        run.end_step(model, optimizer, step, stop)


def check_settings(cfg: Config) -> None:
    """Raises ValueError for settings that make no sense, alone or together."""
    flags.check(cfg, "problems", "rollouts", "updates", "steps", "temperature", "max_new_tokens", "slots")
    flags.check(cfg, "save_every", "keep", "max_grad_norm", "lora_alpha")
    if bool(cfg.data) == bool(cfg.offline):
        raise ValueError(f"give --data, to sample from, or --offline, to learn from, and not both; {flags.TOY}")
    if cfg.baseline != "position" and not cfg.offline:
        raise ValueError(f"--baseline {cfg.baseline}: it belongs to --offline; online, --level decides the baseline")
    if cfg.level == "outcome" and cfg.rollouts < 2 and not cfg.offline:
        raise ValueError("--rollouts 1: the leave-one-out baseline of the outcome level needs 2 or more")
    if cfg.updates > cfg.problems:
        raise ValueError(f"--updates {cfg.updates}: a step has only {cfg.problems} problems; lower it or raise --problems")


def load_recorded(
    cfg: Config, ranks: Ranks, tokenizer, model: Transformer, reference: Transformer | Frozen
) -> tuple[list[Trajectory], list[rl.Credit]]:
    """The rollouts of --offline that are fit to learn from, and the credit of each, computed once over all of them."""
    recorded, accuracy, counts = offline.recall(cfg.offline, tokenizer, cfg.temperature, cfg.problems * cfg.rollouts)
    if ranks.first:
        print("\n".join(f"{count:7,}  {what}" for what, count in counts.items()))
    offline.check_policy(cfg.offline, recorded[:8], reference, cfg.tokens_per_microbatch)
    ranks.release(model)  # with --lora the check has run it as π_old and left it gathered; the optimizer needs it sharded
    return recorded, offline.offline_credit(recorded, cfg.level, accuracy, cfg.baseline)


@dataclass
class Scored:
    """One micro-batch ready for the update: Q response tokens in J spans."""

    pack: Pack
    span: torch.Tensor  # (Q,) int64, the span of each response token
    reward: torch.Tensor  # (J,)
    baseline: torch.Tensor  # (J,)
    weight: torch.Tensor  # (J,) weight of each span in the loss of the update
    logp_sampled: torch.Tensor  # (Q,) as the sampler computed it
    logp_ref: torch.Tensor  # (Q,)
    logp_old: torch.Tensor | None  # (Q,); None until the first update of a step has run the model
    entropy: torch.Tensor | None  # (Q,) of π_old, likewise


@torch.no_grad()
def score(
    pairs: list[tuple[Trajectory, rl.Credit]], ranks: Ranks, old: Transformer | Frozen | None,
    reference: Transformer | Frozen | None, cfg: Config,
) -> list[Scored]:  # fmt: skip
    """This rank's micro-batches of one update, scored under π_ref and, if it is given, π_old. The update reuses them."""
    mine = [pairs[i] for i in ranks.share([len(t.prompt_ids) + len(t.ids) for t, _ in pairs])]
    ids, positions = sequences([t for t, _ in mine])
    prompts = [len(t.prompt_ids) for t, _ in mine]
    out = []
    for p in ranks.even(pack(ids, positions, cfg.tokens_per_microbatch, ranks.device, prompts)):
        rows = [mine[row] for row in p.rows]
        span, reward, baseline, weight = rl.spans([credit for _, credit in rows], len(pairs), ranks.device)
        sampled = torch.tensor([x for t, _ in rows for x in t.logp], device=ranks.device)
        logp_old, entropy = policy_logp(old, p, cfg.temperature) if old is not None else (None, None)
        if reference is None:
            logp_ref = sampled  # β = 0: it is multiplied by zero
        else:  # offline π_ref is π_old
            logp_ref = logp_old if reference is old else policy_logp(reference, p, cfg.temperature)[0]
        out.append(Scored(p, span, reward, baseline, weight, sampled, logp_ref, logp_old, entropy))
    ranks.release(reference)
    return out


def measure(trajectories, credits, scored: list[Scored], outside: torch.Tensor, ranks: Ranks, cfg: Config) -> dict:
    """The numbers of one step, over all its rollouts and tokens and all ranks (docs/logging.md). Prints warning signs."""
    summary = metrics.summarize(trajectories)
    rewards = [sum(credit.reward) / len(credit.reward) for credit in credits]  # weighed as in the loss: 1/|y|_a each
    if ranks.first:
        for sentence in metrics.warnings(summary, rewards):
            print(f"warning: {sentence}", file=sys.stderr)
    logged = "accuracy first_accuracy trials va va_right er cp icr cir say_correct repeats tokens finished".split()
    old = torch.cat([m.logp_old for m in scored])  # this rank's sampled tokens of the step; the others alike
    ref = torch.cat([m.logp_ref for m in scored])
    sampled = torch.cat([m.logp_sampled for m in scored])
    entropy = torch.cat([m.entropy for m in scored])
    sums = [x.sum().item() for x in (old - ref, entropy, (sampled - old).abs(), outside)]
    kl, surprise, gap, clipped, tokens, spans = ranks.sum([*sums, len(old), len(outside)])
    return {
        "reward": sum(rewards) / len(rewards),
        **{name: summary[name] for name in logged},
        "kl": kl / tokens if cfg.beta else None,
        "entropy": surprise / tokens,
        "gap": gap / tokens,
        "clipped": clipped / spans,
    }


if __name__ == "__main__":
    flags.start(main, Config)
