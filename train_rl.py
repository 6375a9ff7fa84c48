"""Stage 2, reinforcement learning with outcome-level or process-level rewards (paper §2.3; equations in s2r/rl.py).

    python train_rl.py --level outcome                                 toy world
    python train_rl.py --model DIR2 --data F.jsonl --out DIR3 --level process --problems 64 --rollouts 4 --updates 4 \\
        --temperature 0.7 --beta 0.05 --epsilon 0.2 --lr 5e-7 --steps 500 --max-new-tokens 8000
    python train_rl.py --model DIR2 --offline ROLLOUTS.jsonl --baseline position --out DIR3 --level process

A step: sample M rollouts of N problems, judge them by rule, score them under the old and the reference policy, then
take several clipped policy-gradient updates on them. Offline the rollouts come from a file that `sample.py --n 8
--temperature 0.7 --out` wrote with the model that training starts from, and π_old stays that model (paper §2.4, App. F).
"""

# Before torch: s2r settles how torch's threads wait.
import s2r  # isort: skip  # noqa: F401

import sys
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from s2r import memory, rl, runtime, toy
from s2r.data import Problem, load_problems
from s2r.metrics import summarize, table
from s2r.model import Transformer
from s2r.packing import Pack, pack, policy_logp
from s2r.run.ranks import Ranks
from s2r.rollouts import Trajectory, encode_prompts, load_rollouts, roll_out, show
from s2r.offline import select
from s2r.hf.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    model: str = toy.SFT  # Hugging Face folder to start from: the SFT model, also π_ref
    data: str = toy.TRAIN  # problem file, JSONL
    out: str = ""  # run folder to write [in the toy world: runs/toy/rl-LEVEL]
    level: Literal["outcome", "process"] = "outcome"  # what has a reward: the trajectory or each action
    offline: str = ""  # rollout file to learn from instead of sampling; N·M of its rollouts a step
    baseline: Literal["position", "context"] = "position"  # offline, within an accuracy bin (paper: both tried)
    problems: int = 32  # N, problems per step (paper: 64)
    rollouts: int = 4  # M, rollouts per problem (paper: 4)
    updates: int = 2  # optimizer steps per step, each on a share of the rollouts (paper: 4)
    temperature: float = 0.7  # of sampling, and of every log-probability (paper: 0.7)
    beta: float = 0.01  # β, weight of the KL to π_ref in the advantage (paper: 0.05; 0.01 for Qwen2.5-Math-7B)
    epsilon: float = 0.2  # ε, clip range of the ratio (paper: 0.2)
    lr: float = 5e-5  # learning rate after warm-up (paper: 5e-7)
    warmup: int = 5  # steps of linear warm-up (paper: 5)
    steps: int = 40  # (paper: 500)
    max_new_tokens: int = 320  # length limit of a rollout (paper: 8000)
    max_grad_norm: float = 1.0  # gradient norm is clipped to this (paper: 1)
    seed: int = 0  # of the order of the data and of the random stream
    eval_data: str = ""  # problem file to evaluate on, greedily
    eval_every: int = 0  # steps between evaluations, 0: none
    show_every: int = 10  # steps between rollouts printed in full, 0: none
    save_every: int = 50  # steps between checkpoints; there is always one at the end
    keep: int = 2  # checkpoints to keep, the newest
    resume: bool = False  # go on with the run in --out
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    offload: bool = False  # keep the optimizer's state in CPU memory: 8 bytes per parameter less on the GPU, slower
    slots: int = 128  # rollouts sampled at a time; fewer take less memory
    tokens_per_microbatch: int = 8192  # tokens run through the model at a time; changes memory, not the gradient
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …


def main(cfg: Config) -> None:
    runtime.positive(cfg, "problems", "rollouts", "updates", "temperature", "steps", "max_new_tokens", "slots")
    runtime.positive(cfg, "save_every", "keep")
    runtime.not_negative(cfg, "warmup", "beta", "epsilon")
    if bool(cfg.eval_data) != (cfg.eval_every > 0):
        raise ValueError("--eval-data and --eval-every go together; give both or neither")
    cfg = replace(cfg, out=cfg.out or f"{toy.RUNS}/rl-{cfg.level}")
    toy.ensure(cfg.offline or cfg.data)
    problems = [] if cfg.offline else load_problems(cfg.data)
    held_out = load_problems(cfg.eval_data) if cfg.eval_every else []
    if cfg.problems > len(problems) and not cfg.offline:
        raise ValueError(f"{cfg.data} holds {len(problems)} problems, --problems asks for {cfg.problems} a step")
    if cfg.level == "outcome" and cfg.rollouts < 2 and not cfg.offline:
        raise ValueError("--rollouts 1: the leave-one-out baseline of the outcome level needs 2 or more")
    if cfg.updates > cfg.problems * cfg.rollouts:
        raise ValueError(f"--updates {cfg.updates}: a step has only {cfg.problems * cfg.rollouts} rollouts")
    device, dtype = runtime.pick(cfg.device, cfg.dtype)
    ranks = Ranks(device)
    model, tokenizer = runtime.load(cfg.model, device, dtype, train=True, spread=ranks.shard)
    model.checkpointing = cfg.checkpointing
    prompts = encode_prompts(problems + held_out, tokenizer, model.config.max_positions)  # an error now, not at their turn
    recorded, recorded_credits = recall(cfg, tokenizer, ranks.rank == 0) if cfg.offline else ([], [])
    reference = runtime.load(cfg.model, device, dtype, spread=ranks.shard)[0]  # π_ref, fixed
    # Where the weights are fp32 and the compute is not, or spread over ranks, the sampler has a copy in the compute dtype.
    alone = ranks.size == 1 and model.embed.dtype == dtype
    sampler = Transformer(model.config, dtype, device) if prompts and not alone else model
    answers = [t.prompt_ids + t.ids for t in recorded]
    if ranks.rank == 0:
        job = memory.job_of(cfg, model, ranks, sequences=answers, prompts=prompts, held_out=len(held_out))
        print(memory.report(model.config, job))
    stop, watchdog = runtime.Stop(ranks), runtime.Watchdog()
    sampling = {"max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed, "slots": cfg.slots, "stop": stop.asked}

    run = runtime.Run(cfg, ranks, cfg.offline or cfg.data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
    done = run.restore(model, optimizer) if cfg.resume else 0
    if done >= cfg.steps and run.first:
        print(f"{cfg.out}: {done} steps are done, and --steps asks for {cfg.steps}; nothing to do")
    # What one pass goes through, and how much of it a step takes.
    items, share = (recorded, cfg.problems * cfg.rollouts) if cfg.offline else (problems, cfg.problems)
    per_epoch = len(items) // share
    for step in range(done + 1, cfg.steps + 1):
        watchdog.begin(step)
        clock = runtime.Clock()

        # 1. Sample M responses to each of N problems from the current policy, and judge them; or recall some.
        epoch, at = divmod(step - 1, per_epoch)
        chosen = runtime.order(len(items), cfg.seed, epoch)[at * share :][:share]
        if cfg.offline:
            trajectories = [recorded[i] for i in chosen]
        else:
            if sampler is not model:
                sampler.copy_from(model)
            batch = [problems[i] for i in chosen]
            trajectories = roll_out_shares(
                ranks, sampler, tokenizer, batch, n=cfg.rollouts, temperature=cfg.temperature, step=step, **sampling
            )
        if stop.agreed():  # then the rollouts are not all there, and the step is given up
            run.stop(model, optimizer, step - 1)
            break
        clock.lap("rollout")

        # 2. Give each span its reward and baseline: the whole trajectory, or each of its actions.
        if cfg.offline:
            credits = [recorded_credits[i] for i in chosen]
        else:
            credits = rl.online_credit(trajectories, cfg.level, cfg.rollouts)

        # 3. Split the rollouts over the updates; score them under π_old and π_ref; advantage of each span.
        updates = []
        shuffled = runtime.order(len(trajectories), cfg.seed + 1, step)
        for rows in np.array_split(shuffled, cfg.updates):
            part = [(trajectories[i], credits[i]) for i in rows]
            updates.append(score(part, ranks, reference if cfg.offline else model, reference, cfg))
        clock.lap("score")

        # 4. Policy gradient: one optimizer step per update, its loss the sum over its micro-batches.
        ratios, norms = [], []
        what = f"problems {list(dict.fromkeys(t.problem.unique_id for t in trajectories))}"
        for work in updates:
            total = torch.zeros((), device=device)
            for m in work:
                logp, _ = policy_logp(model, m.pack, cfg.temperature)
                loss, ratio = rl.policy_loss(logp, m.logp_old, m.span, m.advantage, m.weight, epsilon=cfg.epsilon)
                (loss * ranks.size).backward()  # the ranks' gradients are averaged, and we want their sum
                ratios.append(ratio)
                total += loss.detach()
            lr = cfg.lr * min(1.0, step / max(cfg.warmup, 1))
            clip, loss = cfg.max_grad_norm, total.item()
            norm = runtime.optimizer_step(
                model, optimizer, run, step=step, lr=lr, clip=clip, loss=loss, what=what, batch=work
            )
            norms.append(norm)
        clock.lap("update")

        # 5. Log, show, evaluate, save.
        scored = [m for work in updates for m in work]
        run.log(
            {"step": step}
            | measure(trajectories, credits, scored, torch.cat(ratios), ranks, cfg)
            | {"grad_norm": sum(norms) / len(norms), "lr": lr}
            | clock.parts
        )
        watchdog.end()
        if cfg.show_every and step % cfg.show_every == 0 and run.first:
            print(show(trajectories[0], colour=sys.stdout.isatty()), end="\n\n")
        if cfg.eval_every and step % cfg.eval_every == 0:
            if sampler is not model:
                sampler.copy_from(model)
            greedy = roll_out_shares(ranks, sampler, tokenizer, held_out, n=1, temperature=0.0, **sampling)
            if not stop.agreed() and run.first:
                print(table({f"step {step}, {cfg.eval_data}": summarize(greedy)}))
        if step % cfg.save_every == 0 or step == cfg.steps:
            run.save(model, optimizer, step)
        if stop.agreed():
            run.stop(model, optimizer, step)
            break


def recall(cfg: Config, tokenizer: Tokenizer, first: bool) -> tuple[list[Trajectory], list[rl.Credit]]:
    """The rollouts of --offline that are fit to learn from, with their credit over those that are kept.

    The `first` rank says what was dropped and why. Raises ValueError for rollouts of another temperature and when too
    few are left.
    """
    trajectories = load_rollouts(cfg.offline, tokenizer)
    for t in trajectories:
        if t.temperature != cfg.temperature:
            raise ValueError(
                f"{cfg.offline}: problem {t.problem.unique_id} was sampled at temperature {t.temperature}, --temperature "
                f"is {cfg.temperature}; make them the same, or no probability is right"
            )
    kept, accuracy, counts = select(trajectories)
    if first:
        print("\n".join(f"{count:7,}  {what}" for what, count in counts.items()))
    if len(kept) < cfg.problems * cfg.rollouts:
        raise ValueError(
            f"{cfg.offline}: {len(kept)} of {len(trajectories)} rollouts are fit to learn from (reasons above), a step "
            f"takes {cfg.problems * cfg.rollouts}; lower --problems or --rollouts, or sample more"
        )
    return kept, rl.offline_credit(kept, cfg.level, accuracy, cfg.baseline)


@dataclass(frozen=True)
class Scored:
    """One micro-batch ready for the update: K response tokens in A spans."""

    pack: Pack
    span: torch.Tensor  # (K,) int64, the span of each response token
    advantage: torch.Tensor  # (A,)
    weight: torch.Tensor  # (A,) share of each span in the loss of the update
    logp_old: torch.Tensor  # (K,)
    logp_ref: torch.Tensor  # (K,)
    logp_sampled: torch.Tensor  # (K,) what the sampler said
    entropy: torch.Tensor  # (K,)


def roll_out_shares(ranks: Ranks, sampler, tokenizer, problems: list[Problem], **settings) -> list[Trajectory]:
    """`roll_out`, each rank a share of the problems; every rank gets all trajectories, problem by problem."""
    mine = list(range(ranks.rank, len(problems), ranks.size))
    found = roll_out(sampler, tokenizer, [problems[i] for i in mine], streams=mine, **settings)
    place = {problem.unique_id: i for i, problem in enumerate(problems)}
    return sorted(ranks.gather(found), key=lambda t: (place[t.problem.unique_id], t.sample))


@torch.no_grad()
def score(part: list[tuple[Trajectory, rl.Credit]], ranks: Ranks, old, reference, cfg: Config) -> list[Scored]:
    """This rank's micro-batches of one update. They are formed once, so that π_θ starts out as π_old to the last bit."""
    total, device = len(part), ranks.device
    part = [part[i] for i in ranks.share([len(t.prompt_ids) + len(t.ids) for t, _ in part])]
    ids = [t.prompt_ids + t.ids for t, _ in part]
    scored = [list(range(len(t.prompt_ids), len(t.prompt_ids) + len(t.ids))) for t, _ in part]  # no prompt token
    out = []
    for p in ranks.even(pack(ids, scored, cfg.tokens_per_microbatch, device)):
        span, reward, baseline, weight = rl.spans([part[row][1] for row in p.rows], total, device)
        logp_old, entropy = policy_logp(old, p, cfg.temperature)
        logp_ref = logp_old if old is reference else policy_logp(reference, p, cfg.temperature)[0]
        advantage = rl.advantages(reward, baseline, logp_old, logp_ref, span, beta=cfg.beta)
        sampled = torch.tensor([x for row in p.rows for x in part[row][0].logp], device=device)
        out.append(Scored(p, span, advantage, weight, logp_old, logp_ref, sampled, entropy))
    return out


def measure(trajectories, credits, scored: list[Scored], ratio: torch.Tensor, ranks: Ranks, cfg: Config) -> dict:
    """The numbers of one step, over all its rollouts and tokens and all ranks (README, "What is logged")."""
    metrics = summarize(trajectories)
    rewards = [sum(credit.reward) / len(credit.reward) for credit in credits]  # weighed as in the loss: 1/|y|_a each
    old, ref, sampled, entropy = (
        torch.cat([getattr(m, name) for m in scored]) for name in ("logp_old", "logp_ref", "logp_sampled", "entropy")
    )
    parts = (old - ref, entropy, (sampled - old).abs(), torch.ones_like(old), (ratio - 1).abs() > cfg.epsilon, ratio > 0)
    kl, surprise, gap, tokens, clipped, spans = ranks.sum([part.sum().item() for part in parts])
    return {
        "reward": sum(rewards) / len(rewards),
        **{
            name: metrics[name]
            for name in ("accuracy", "first_accuracy", "trials", "va", "icr", "cir", "tokens", "finished")
        },
        "kl": kl / tokens,
        "entropy": surprise / tokens,
        "gap": gap / tokens,
        "clipped": clipped / spans,
    }


if __name__ == "__main__":
    runtime.start(main, Config)
