"""What a training run needs before it is started, as tables: memory by `s2r/memory.py`, traffic and time by formulas.

    python -m s2r.scaling --model DIR --gpus 8 --checkpointing           one model, phase by phase, SFT and RL
    python -m s2r.scaling --presets                                      README: settings for common machines
    python -m s2r.scaling --table                                        docs/scaling.md: 1.5B to 32B on 1 to 64 GPUs

Everything here is estimated, nothing measured on a GPU. With P parameters, n GPUs, a step of N·M rollouts of `ANSWER`
tokens on average after `PROMPT` tokens of prompt, hence R = N·M/n rollouts and t = R·(PROMPT + ANSWER) tokens a GPU:

    rollout   (2P·LONGEST + κ·R·(PROMPT·ANSWER + ANSWER²/2)) / read + 2P·R·ANSWER / compute
              every decode step until the longest answer ends reads all weights; each token reads its cache, κ bytes a token
    score     2 · 2P·t / compute                                         policy and reference, forward
    update    6P·t / compute, or 8P·t with checkpointing                 forward 2, backward 4, recomputing 2
    traffic   (n−1)/n · (4P + micro-batches · (4P + 8P))  bytes a GPU    sampler: fp32 weights once; score: bf16 weights
              of two models; update: bf16 weights for forward and backward, fp32 gradients reduced

No part overlaps another. Attention's arithmetic is left out: at these lengths a few per cent of the matrices'.
"""

import argparse
import math
from dataclasses import replace

from s2r.config import ModelConfig
from s2r.generate import PREFILL
from s2r.memory import GB, Job, cache, on_host, peak, report, total

# L, D, F, H, G, V, tied head, bias (Qwen2), context: config.json of these models at huggingface.co.
PUBLIC = {
    "Qwen2.5-0.5B": (24, 896, 4864, 14, 2, 151_936, True, True, 32_768),
    "Qwen2.5-1.5B": (28, 1536, 8960, 12, 2, 151_936, True, True, 131_072),
    "Qwen2.5-7B": (28, 3584, 18_944, 28, 4, 152_064, False, True, 131_072),
    "Qwen2.5-14B": (48, 5120, 13_824, 40, 8, 152_064, False, True, 131_072),
    "Qwen2.5-32B": (64, 5120, 27_648, 40, 8, 152_064, False, True, 131_072),
    "Qwen2.5-Math-7B": (28, 3584, 18_944, 28, 4, 152_064, False, True, 4096),
    "Qwen2-7B-Instruct": (28, 3584, 18_944, 28, 4, 152_064, False, True, 32_768),
    "Llama-3.1-8B-Instruct": (32, 4096, 14_336, 32, 8, 128_256, False, False, 131_072),
}
# The card of the time columns, H100 SXM: peaks of its data sheet, times shares that are assumed.
COMPUTE = 0.4 * 989e12  # FLOP/s, bf16
READ = 0.6 * 3.35e12  # bytes/s of its memory
LINK = {True: 0.7 * 450e9, False: 0.7 * 50e9}  # bytes/s a GPU sends: inside a node of 8 (NVLink), between nodes (400 Gb/s)
CARD = 80  # GB
NODE = 8  # GPUs in a machine
N, M, UPDATES = 64, 4, 4  # of the paper
PROMPT, ANSWER, LONGEST = 200, 800, 4096  # tokens, assumed
BUDGET = 8192  # --tokens-per-microbatch


def shape(name: str) -> ModelConfig:
    """The shape of a model of PUBLIC, or of a folder. Raises what `ModelConfig.from_folder` raises."""
    if name not in PUBLIC:
        return ModelConfig.from_folder(name)
    L, D, F, H, G, V, tied, bias, context = PUBLIC[name]
    heads = {"num_heads": H, "num_kv_heads": G, "head_dim": D // H}
    return ModelConfig(V, D, F, L, **heads, tied=tied, qkv_bias=bias, max_positions=context)


def jobs(c: ModelConfig, gpus: int, *, checkpointing: bool, offload: bool, slots: int, new: int, budget: int) -> list[Job]:
    """SFT and RL of the paper's batches on so many GPUs in bf16."""
    longest = min(PROMPT + new, c.max_positions)
    mine = math.ceil(N / gpus)
    sft = Job("sft", max(budget, longest), ranks=gpus, checkpointing=checkpointing, offload=offload)
    sampling = {"slots": min(slots, mine * M), "capacity": longest, "prefill": min(PREFILL, mine * PROMPT)}
    return [sft, replace(sft, stage="rl", **sampling)]


def seconds(c: ModelConfig, gpus: int, checkpointing: bool) -> dict[str, float]:
    """Expected seconds of the parts of an RL step, and of its traffic if nothing hides it; `bytes` is that traffic."""
    P, R = total(c), N * M / gpus
    tokens = R * (PROMPT + ANSWER)
    kv = cache(c, Job("rl", BUDGET), 1, 1)
    reads = 2 * P * LONGEST + kv * R * (PROMPT * ANSWER + ANSWER**2 / 2)
    micro_batches = UPDATES * math.ceil(tokens / UPDATES / BUDGET)
    traffic = (gpus - 1) / gpus * (4 * P + micro_batches * 12 * P)
    return {
        "rollout": reads / READ + 2 * P * R * ANSWER / COMPUTE,
        "score": 4 * P * tokens / COMPUTE,
        "update": (8 if checkpointing else 6) * P * tokens / COMPUTE,
        "traffic": traffic / LINK[gpus <= NODE],
        "bytes": traffic,
    }


def short(x: float) -> str:
    """Two figures, or all before the point."""
    return f"{x:.0f}" if x >= 10 else f"{x:.2g}"


def table() -> str:
    """Markdown: RL of Qwen2.5 models on H100s. What breaks first is memory, else the largest part of the step."""
    rows = [
        "| model | GPUs | GB a GPU (phase) | host GB a node | sent a GPU and step | rollout / score / update | traffic | breaks first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen2.5-32B"):
        for gpus in (1, 8, 16, 64):
            c = shape(name)
            _, job = jobs(c, gpus, checkpointing=True, offload=False, slots=128, new=LONGEST, budget=BUDGET)
            (phase, most), t = peak(c, job), seconds(c, gpus, True)
            arithmetic = t["score"] + t["update"]
            largest = max(t["rollout"], arithmetic, t["traffic"])
            if most > CARD * GB:
                breaks = f"memory, in the {phase}"
            elif largest == t["rollout"]:
                breaks = "rollout, waiting for the longest answer" + ", then traffic" * (t["traffic"] > arithmetic)
            else:
                breaks = "traffic" if largest == t["traffic"] else "arithmetic"
            host = on_host(c, job, min(gpus, NODE))
            parts = " / ".join(short(t[part]) for part in ("rollout", "score", "update"))
            rows.append(
                f"| {name} | {gpus} | {most / GB:.0f} ({phase}) | {host / GB:.0f} | {t['bytes'] / GB:.0f} GB | {parts} s | "
                f"{short(t['traffic'])} s | {breaks} |"
            )
    return "\n".join(rows)


# Machine, model, GPUs, --checkpointing, --offload, --slots, --max-new-tokens, --tokens-per-microbatch
PRESETS = [
    ("one 24 GB", "Qwen2.5-0.5B", 1, True, False, 64, 4000, 4096),
    ("one 24 GB", "Qwen2.5-1.5B", 1, True, True, 16, 1024, 1024),
    ("one 80 GB", "Qwen2.5-1.5B", 1, True, False, 128, 8000, 8192),
    ("one 141 GB", "Qwen2.5-Math-7B", 1, True, True, 64, 4000, 8192),
    ("one 141 GB", "Llama-3.1-8B-Instruct", 1, True, True, 32, 4000, 8192),
    ("eight 80 GB", "Qwen2.5-Math-7B", 8, True, False, 128, 8000, 8192),
    ("eight 80 GB", "Qwen2-7B-Instruct", 8, True, False, 128, 8000, 8192),
    ("eight 80 GB", "Llama-3.1-8B-Instruct", 8, True, False, 128, 8000, 8192),
]


def presets() -> str:
    """Markdown: what SFT and RL take on common machines, and with which flags."""
    rows = ["| machine | model | flags | SFT | RL (phase) | host |", "|---|---|---|---|---|---|"]
    for machine, name, gpus, checkpointing, offload, slots, new, budget in PRESETS:
        c = shape(name)
        sft, rl = jobs(c, gpus, checkpointing=checkpointing, offload=offload, slots=slots, new=new, budget=budget)
        (phase, most), host = peak(c, rl), on_host(c, rl, min(gpus, NODE))
        flags = f"--checkpointing{' --offload' * offload} --tokens-per-microbatch {budget}; RL: --slots {slots} --max-new-tokens {new}"
        rows.append(
            f"| {machine} | {name} | `{flags}` | {peak(c, sft)[1] / GB:.1f} GB | {most / GB:.1f} GB ({phase}) | {host / GB:.0f} GB |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help=f"Hugging Face folder with config.json, or one of {', '.join(PUBLIC)}")
    what.add_argument("--presets", action="store_true", help="the table of the README")
    what.add_argument("--table", action="store_true", help="the table of docs/scaling.md")
    parser.add_argument("--gpus", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--slots", type=int, default=128, help="[%(default)s]")
    parser.add_argument("--max-new-tokens", type=int, default=8000, help="[%(default)s]")
    parser.add_argument("--tokens-per-microbatch", type=int, default=BUDGET, help="[%(default)s]")
    args = parser.parse_args()
    if args.presets or args.table:
        print(presets() if args.presets else table())
        return
    c = shape(args.model)
    print(f"{args.model}: {total(c) / 1e9:.2f} billion parameters, per GPU of {args.gpus}, in bf16")
    settings = {name: getattr(args, name) for name in ("checkpointing", "offload", "slots")}
    for job in jobs(c, args.gpus, new=args.max_new_tokens, budget=args.tokens_per_microbatch, **settings):
        print(f"{job.stage}: {report(c, job)}")


if __name__ == "__main__":
    from s2r.runtime import command

    command(main)
