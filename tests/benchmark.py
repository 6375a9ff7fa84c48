"""Our sampler, training step and log-prob against `transformers` and plain PyTorch, side by side in one run on a CPU.

    python tests/benchmark.py --model DIR --data gsm8k_test.jsonl            about 15 minutes on two cores

Each row gives the median over rounds in which the two take turns, and the median of their ratio; a ratio above 1 is
in our favour. The machine should be idle otherwise. Sampling is at temperature 0.7 from the whole distribution.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import s2r  # isort: skip  # noqa: F401  before torch: settles how its threads wait

import argparse
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

from kernels.logprob import token_logp
from s2r.data import load_problems
from s2r.generate import generate
from s2r.model import Transformer
from s2r.packing import pack, policy_logp
from s2r.hf.tokenizer import Tokenizer
from s2r.grammar import prompt

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 3


def side_by_side(name: str, ours: Callable[[], int], theirs: Callable[[], int], unit: str = "tokens/s") -> None:
    """Print one row: each function returns how much useful work it did."""
    speeds = []
    for turn in range(ROUNDS + 1):
        row = []
        for run in (ours, theirs):
            start = time.perf_counter()
            work = run()
            row.append(work / (time.perf_counter() - start))
        if turn:  # the first warms up
            speeds.append(row)
    a, b = (statistics.median(column) for column in zip(*speeds))
    ratio = statistics.median(x / y for x, y in speeds)
    print(f"{name:40} ours {a:8.1f}   theirs {b:8.1f} {unit}   ratio {ratio:.2f}", flush=True)


def hf_generate(hf, prompts: list[list[int]], stop_ids: list[int], new: int, n: int, fixed: bool) -> int:
    """Useful tokens of one `transformers.generate` on left-padded prompts: those up to each row's stop token."""
    width = max(map(len, prompts))
    pad = stop_ids[0]
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    kwargs = {"min_new_tokens": new} if fixed else {"eos_token_id": stop_ids}
    out = hf.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=True, temperature=0.7, top_k=0, top_p=1.0,
        num_return_sequences=n, pad_token_id=pad, **kwargs,
    )[:, width:].tolist()
    if fixed:
        return sum(map(len, out))
    return sum(next((i + 1 for i, t in enumerate(row) if t in stop_ids), len(row)) for row in out)


def sampling(folder: str, data: str) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_pretrained(folder)
    prompts = [prompt(p.problem, tokenizer) for p in load_problems(data, 32)]
    stops = sorted(tokenizer.stop_ids)
    for name, dtype in DTYPES.items():
        ours = Transformer.from_pretrained(folder, dtype)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

        def run(prompts, stops, new, n):
            rollouts = generate(
                ours, prompts, n=n, temperature=0.7, max_new_tokens=new, stop_ids=stops, progress=False
            )
            return sum(len(r.ids) for r in rollouts)

        for many, n in ((1, 1), (1, 8), (1, 32), (32, 1)):
            some = prompts[:many]
            side_by_side(
                f"sample {name}, {many:2} problems x {n:2}, 64 new",
                lambda: run(some, [], 64, n),
                lambda: hf_generate(theirs, some, stops, 64, n, fixed=True),
            )
        side_by_side(
            f"sample {name},  8 problems x  4, <= 128 new",
            lambda: run(prompts[:8], stops, 128, 4),
            lambda: hf_generate(theirs, prompts[:8], stops, 128, 4, fixed=False),
        )


def training(folder: str) -> None:
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(40, 256, 8).int().tolist()
    sequences = [torch.randint(100, 40_000, (n,), generator=generator).tolist() for n in lengths]
    width, total = max(lengths), sum(lengths)
    for name, dtype in DTYPES.items():
        ours = Transformer.from_pretrained(folder, dtype, param_dtype=torch.float32)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        ours_opt, theirs_opt = (torch.optim.AdamW(m.parameters(), lr=1e-6, fused=True) for m in (ours, theirs))
        packs = pack(sequences, [range(1, n) for n in lengths], 8192, "cpu")
        ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        labels = ids.masked_fill(~mask, -100)

        def ours_step():
            for p in packs:
                (-policy_logp(ours, p, 1.0)[0].sum() / (total - len(lengths))).backward()
            ours_opt.step()
            ours_opt.zero_grad()
            return total

        def theirs_step():
            theirs(input_ids=ids, attention_mask=mask.long(), labels=labels).loss.backward()
            theirs_opt.step()
            theirs_opt.zero_grad()
            return total

        side_by_side(f"SFT step {name}, 8 x 40-256 tokens", ours_step, theirs_step)


T, D, V = 4096, 576, 49_152  # the shape of the memory test


def high_water() -> int:
    """Peak resident memory of this program in KB; getrusage would carry over that of the process that started it."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def peak_memory(which: str) -> None:
    """Print the growth of peak resident memory, in MB, over forward and backward of one way to get log p."""
    hidden = torch.randn(T, D, requires_grad=True)
    weight = (0.02 * torch.randn(V, D)).requires_grad_()
    targets = torch.randint(0, V, (T,))
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)  # both ways need these
    before = high_water()
    if which == "ours":
        logp, _ = token_logp(hidden, weight, targets)
    else:
        logp = torch.log_softmax(hidden @ weight.T, dim=-1).gather(1, targets[:, None])[:, 0]
    logp.sum().backward()
    print((high_water() - before) // 1024)


def memory() -> None:
    ours, full = (int(subprocess.check_output([sys.executable, __file__, "--peak", w])) for w in ("ours", "full"))
    print(f"log p of {T} tokens, V {V}, D {D}: peak {ours} MB, with full logits {full} MB   1/{full / ours:.1f}")


def _spin() -> None:
    while True:
        pass


def neighbour(folder: str, data: str) -> None:
    """The RL shape alone, and with another process busy on one of the cores."""
    tokenizer = Tokenizer.from_pretrained(folder)
    prompts = [prompt(p.problem, tokenizer) for p in load_problems(data, 8)]
    model = Transformer.from_pretrained(folder)

    def run() -> float:
        start = time.perf_counter()
        generate(model, prompts, n=4, temperature=0.7, max_new_tokens=32, stop_ids=[], progress=False)
        return time.perf_counter() - start

    run()
    ratios = []
    for _ in range(ROUNDS):
        alone = run()
        other = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
        other.start()
        time.sleep(2)
        ratios.append(run() / alone)
        other.kill()
        other.join()
    print(f"one busy neighbour core: {statistics.median(ratios):.2f} times slower (GOMP_SPINCOUNT {os.environ['GOMP_SPINCOUNT']})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder of a small model")
    parser.add_argument("--data", help="problem file of at least 32 problems")
    parser.add_argument("--only", choices=("sampling", "training", "memory", "neighbour"))
    parser.add_argument("--peak", choices=("ours", "full"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        peak_memory(args.peak)
        sys.exit()
    parts = {
        "sampling": lambda: sampling(args.model, args.data),
        "training": lambda: training(args.model),
        "memory": memory,
        "neighbour": lambda: neighbour(args.model, args.data),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, part in parts.items():
        if args.only in (None, name):
            part()
