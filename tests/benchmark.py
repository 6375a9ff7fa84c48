"""Our sampler, training step, RL step and log-prob against `transformers`, TRL and PyTorch, side by side on a CPU.

    python tests/benchmark.py --model DIR --data gsm8k_test.jsonl            about 15 minutes on two cores

Each row gives the median over rounds in which the two take turns, and the median of their ratio; a ratio above 1 is
in our favour. The RL step's ratio is that of the medians. The machine should be idle otherwise. Sampling is at
temperature 0.7 from the whole distribution.
The part "rl" needs `pip install trl` and takes 12 minutes more in fp32, and in bf16 longer where the CPU has no AMX.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import s2r  # isort: skip  # noqa: F401  before torch: settles how its threads wait

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import torch

from kernels.logprob import token_logp
from s2r.data import load_problems
from s2r.generate import generate
from s2r.model import Transformer
from s2r.packing import pack, policy_logp
from s2r.hf.tokenizer import Tokenizer
from s2r.grammar import SYSTEM_PROMPT, prompt

ROOT = Path(__file__).resolve().parents[1]
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


# One RL step: 8 problems × 4 rollouts of at most 96 tokens, a reference model, one update.
RL = {"lr": 1e-6, "beta": 0.05, "problems": 8, "rollouts": 4, "new": 96, "steps": 2}


def ours_rl(folder: str, data: str, dtype: str) -> list[dict]:
    """The rows of our log, one per step, of train_rl.py as a user runs it."""
    with tempfile.TemporaryDirectory() as out:
        command = f"""train_rl.py --model {folder} --data {data} --out {out}/run --problems {RL["problems"]}
            --rollouts {RL["rollouts"]} --updates 1 --beta {RL["beta"]} --lr {RL["lr"]} --warmup 0 --steps {RL["steps"]}
            --max-new-tokens {RL["new"]} --show-every 0 --dtype {dtype} --device cpu"""
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in Path(out, "run/log.jsonl").read_text().splitlines()]


def trl_rl(folder: str, data: str, dtype: str) -> None:
    """TRL's GRPOTrainer with the same settings; prints seconds and sampled tokens of each step as JSON."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows, tokens = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            rows.append({"seconds": time.perf_counter() - self.start, "tokens": sum(tokens)})
            tokens.clear()

    def reward(completion_ids, **_):
        tokens.extend(map(len, completion_ids))
        return [float(len(ids) % 2) for ids in completion_ids]

    system = {"role": "system", "content": SYSTEM_PROMPT}
    chats = [[system, {"role": "user", "content": p.problem}] for p in load_problems(data, 64)]
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, per_device_train_batch_size=RL["problems"] * RL["rollouts"], num_generations=RL["rollouts"],
            max_completion_length=RL["new"], temperature=0.7, top_k=0, beta=RL["beta"], learning_rate=RL["lr"],
            max_steps=RL["steps"], use_cpu=True, bf16=dtype == "bfloat16", gradient_checkpointing=False,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            model_init_kwargs={"dtype": dtype},
        )  # fmt: skip
        data = Dataset.from_list([{"prompt": chat} for chat in chats])
        GRPOTrainer(folder, reward, args=config, train_dataset=data, callbacks=[Clock()]).train()
    print(json.dumps(rows))


def rl_step(folder: str, data: str) -> None:
    """Whole RL steps, programs taking turns; the first step of each warms up."""
    for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours += ours_rl(folder, data, dtype)[1:]
            command = [sys.executable, __file__, "--trl", dtype, "--model", folder, "--data", data]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            theirs += json.loads(output.splitlines()[-1])[1:]
        phases = ("seconds_rollout", "seconds_score", "seconds_update")
        split = [statistics.median(row[phase] for row in ours) for phase in phases]
        seconds = statistics.median(sum(row[phase] for phase in phases) for row in ours)
        other = statistics.median(row["seconds"] for row in theirs)
        speeds = [RL["problems"] * RL["rollouts"] * row["tokens"] / sum(row[phase] for phase in phases) for row in ours]
        other_speeds = [row["tokens"] / row["seconds"] for row in theirs]
        a, b = statistics.median(speeds), statistics.median(other_speeds)
        print(f"RL step {name}: ours {seconds:.1f} s (rollout, score, update {', '.join(f'{x:.1f}' for x in split)}), "
              f"{a:.1f} sampled tokens/s; TRL {other:.1f} s, {b:.1f} tokens/s; ratio {a / b:.2f}", flush=True)  # fmt: skip


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
    parser.add_argument("--only", choices=("sampling", "training", "rl", "memory", "neighbour"))
    parser.add_argument("--peak", choices=("ours", "full"), help=argparse.SUPPRESS)
    parser.add_argument("--trl", choices=("float32", "bfloat16"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        trl_rl(args.model, args.data, args.trl)
        sys.exit()
    if args.peak:
        peak_memory(args.peak)
        sys.exit()
    parts = {
        "sampling": lambda: sampling(args.model, args.data),
        "training": lambda: training(args.model),
        "rl": lambda: rl_step(args.model, args.data),
        "memory": memory,
        "neighbour": lambda: neighbour(args.model, args.data),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, part in parts.items():
        if args.only in (None, name):
            part()
