"""Everything that only a GPU can tell, in parts of half a minute to five minutes each, as one Markdown page.

    python tests/first_light.py --out DIR                            all parts; DIR/gpu.md is the page
    python tests/first_light.py --parts tests,sampler --out DIR      the parts that are named; the page keeps the others
    python tests/first_light.py --out DIR --small                    tiny shapes, half a minute on a CPU

Every part is a process with a time limit, and its result lies in DIR/PART.json as soon as it is there. Models are random,
in the shapes of real ones; nothing is fetched. The predictions were written down before anything was measured.
docs/gpu.md has what was found.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import s2r  # isort: skip  # noqa: F401  before torch

import contextlib
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import numpy as np
import torch
import torch.distributed as dist

import s2r.model
from kernels import elementwise, sampling
from s2r import generate as sampler
from s2r.data import read_jsonl
from s2r.hf.config import ModelConfig
from s2r.model import Transformer
from s2r.packing import pack, policy_logp
from s2r.run.files import write_jsonl
from s2r.run.flags import start

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
Row = tuple[str, str, str]  # what, measured, predicted

# name: D, L, H, G, F, V, tied
SHAPES = {
    "0.5B": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
    "7B": (3584, 28, 28, 4, 18_944, 152_064, False),
    "tiny": (64, 2, 4, 2, 128, 512, True),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    out: str  # folder of the results
    parts: str = "all"  # comma-separated names, in the order they run
    small: bool = False  # tiny shapes, as on a CPU
    run: str = ""  # one part in this process; the command calls itself with it


def shape(name: str, small: bool) -> ModelConfig:
    D, L, H, G, F, V, tied = SHAPES["tiny" if small else name]
    hf = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": V, "hidden_size": D,
        "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": G,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32_768,
        "tie_word_embeddings": tied, "eos_token_id": 2, "bos_token_id": None,
    }  # fmt: skip
    return ModelConfig(V, D, F, L, H, G, D // H, 1e6, None, 1e-6, tied, True, False, 32_768, hf)


def model(name: str, small: bool, param_dtype: torch.dtype | None = None) -> Transformer:
    found = Transformer(shape(name, small), DTYPE, DEVICE, param_dtype)
    found.init_weights(0)
    found.vocab_size -= 271 * (not small)  # an odd number, as Qwen's tokenizer has
    return found


def seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """Median time of a call, after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        wait()
        begin = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def top(work: Callable[[], object], many: int = 8) -> list[Row]:
    """The kernels that a call spends most time in."""
    if not CUDA:
        return []
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        work()
        wait()
    events = [e for e in found.key_averages() if e.device_type.name == "CUDA"]
    total = sum(e.self_device_time_total for e in events)
    events.sort(key=lambda e: -e.self_device_time_total)
    return [
        (f"· {short(e.key)} ×{e.count}", f"{e.self_device_time_total / 1e3:.2f} ms, {e.self_device_time_total / total:.0%}", "")
        for e in events[:many]
    ]


def short(kernel: str) -> str:
    """The name of a CUDA kernel without what it is a template of, and of PyTorch's elementwise ones what they compute."""
    inside = re.search(r"(\w+_kernel_cuda|\w+Functor|direct_copy\w*)", kernel)
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::", "", kernel).split("<")[0].split("(")[0]
    return f"{name} {inside[1]}" if inside else name[:60]


def filled(net: Transformer, prompts: list[list[int]], new: int) -> "sampler._Rows":
    """The sampler's rows, 4 of each of 64 prompts, at work and with their graph recorded."""
    jobs = [(i, j) for i in range(64) for j in range(4)]
    rows = sampler._Rows(net, prompts, 256, 0.7, new, (), 16_384)
    rows.start(list(range(256)), jobs, [np.random.default_rng(job) for job in jobs])
    rows.step()
    rows.step()
    return rows


def bf16_logits(self: Transformer, hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(hidden, self.head_weight)


# What a change replaced: name, where it is looked up, its name there, the plain version.
PLAIN = [
    ("fp32 logits of all rows", Transformer, "logits", bf16_logits),
    ("the sampling kernel", sampler, "sample", sampling.sample_torch),
    ("the rotary kernel", s2r.model, "rotate", elementwise.rotate_torch),
    ("the SwiGLU kernel", s2r.model, "swiglu", elementwise.swiglu_torch),
]


# ---- parts ----


def part_tests(small: bool) -> list[Row]:
    """The tests whose code runs on the GPU."""
    names = "attention attention_triton logprob logprob_triton sampling elementwise linear generate model packing"
    files = [f"tests/test_{name}.py" for name in ("linear packing" if small else names).split()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *files]
    try:
        import xdist  # noqa: F401

        command += ["-n", "12"]
    except ImportError:
        pass
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-100_000:])
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?", done.stdout, re.M)
    return [("test-suite", done.stdout.strip().splitlines()[-1], "all pass"), *((a, b[:150], "") for a, b in failed[:40])]


def part_sampler(small: bool) -> list[Row]:
    """64 prompts × 4 samples; tokens/s with prefill, ms a decode step, what a step spends its time in."""
    rows, new, long = [], (8 if small else 512), (5 if small else 200)
    predicted = {"0.5B": "64,000", "1.5B": "39,000", "7B": "19,000"}
    for name in ("0.5B",) if small else predicted:
        net = model(name, small)
        ids = torch.randint(net.vocab_size, (64, long)).tolist()

        def run(count=new, prompts=ids, n=4):
            return sampler.generate(net, prompts, n=n, temperature=0.7, max_new_tokens=count, stop_ids=(), slots=256,
                                    progress=False)  # fmt: skip

        run(40)
        spent = seconds(run, 1)
        rows.append((f"{name}: 256 rows × {new}, tokens/s", f"{256 * new / spent:,.0f}", predicted[name]))
        if CUDA:
            rows.append((f"{name}: memory reserved, GB", f"{torch.cuda.max_memory_reserved() / 1e9:.1f}", ""))
        with torch.inference_mode():
            grid = filled(net, ids, new)
            step = seconds(grid.step, 5) / grid.steps_per_look
            rows.append((f"{name}: ms a decode step, 256 rows", f"{1000 * step:.2f}", ""))
            rows += top(grid.step)
        del grid
        for what, where, attribute, other in PLAIN if CUDA else ():
            kept = getattr(where, attribute)
            setattr(where, attribute, other)
            with torch.inference_mode():
                plain = filled(net, ids, new)
                rows.append((f"{name}: … without {what}", f"{1000 * seconds(plain.step, 5) / plain.steps_per_look:.2f}", ""))
                del plain
            setattr(where, attribute, kept)
        if name != "7B":
            one = seconds(lambda: run(64 if not small else 4, ids[:1], 1), 1)
            rows.append((f"{name}: one row, tokens/s", f"{(64 if not small else 4) / one:,.0f}", ""))
        if name == "0.5B" and CUDA:
            graph = run(48 if not small else 4)
            replay, sampler._Rows._replay = sampler._Rows._replay, sampler._Rows._advance
            eager = run(48 if not small else 4)
            sampler._Rows._replay = replay
            same = sum(a.ids == b.ids for a, b in zip(graph, eager))
            rows.append(("0.5B: rows of 256 with the same ids, graph and eager", f"{same}", "256"))
        del net
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return rows


def hf_model(name: str, small: bool):
    import transformers

    return transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen2Config(**{k: v for k, v in shape(name, small).hf.items() if k not in ("architectures", "model_type")}),
        dtype=DTYPE,
    ).to(DEVICE)  # fmt: skip


def part_generate(small: bool) -> list[Row]:
    """`transformers.generate` on the same shapes."""
    rows, new, long = [], (4 if small else 128), (5 if small else 200)
    for name in ("0.5B",) if small else ("0.5B", "1.5B"):
        net, theirs = model(name, small), hf_model(name, small)
        ids = torch.randint(net.vocab_size, (64, long))

        def ours():
            sampler.generate(net, ids.tolist(), n=4, temperature=0.7, max_new_tokens=new, stop_ids=(), slots=256,
                             progress=False)  # fmt: skip

        def other():
            theirs.generate(ids.to(DEVICE), attention_mask=torch.ones_like(ids, device=DEVICE), max_new_tokens=new,
                            min_new_tokens=new, do_sample=True, temperature=0.7, top_k=0, top_p=1.0,
                            num_return_sequences=4, pad_token_id=2)  # fmt: skip

        a, b = seconds(ours, 1), seconds(other, 1)
        rows.append((f"{name}: 256 rows × {new}, ours and `generate`, tokens/s",
                     f"{256 * new / a:,.0f}, {256 * new / b:,.0f}: {b / a:.1f} ×", "5 to 10 ×"))  # fmt: skip
        del net, theirs
    return rows


def folder(name: str, small: bool, where: Path) -> Path:
    """A model folder with random weights and a tokenizer of as many ids as the real one has."""
    from tokenizers import Tokenizer

    from tiny import tiny_tokenizer

    tiny_tokenizer(where)
    config = shape(name, small)
    backend = json.loads(Tokenizer.from_file(str(where / "tokenizer.json")).to_str())
    vocab = backend["model"]["vocab"]
    for i in range(len(vocab), config.vocab_size - 271 * (not small)):
        vocab[f"filler{i}"] = i
    (where / "tokenizer.json").write_text(json.dumps(backend))
    (where / "config.json").write_text(json.dumps(config.hf))
    (where / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    net = Transformer(config, torch.bfloat16, DEVICE)
    net.init_weights(0)
    net.save_pretrained(where)
    write_jsonl(where / "problems.jsonl", ({"problem": f"What is {i} plus 1? " + "Think about it. " * 10,
                                            "answer": str(i + 1), "unique_id": str(i)} for i in range(64)))  # fmt: skip
    return where


def rl(name: str, small: bool, new: int, *flags: str) -> tuple[list[dict], str, float]:
    """Two steps of train_rl.py in this process: its log, what it printed, GB reserved."""
    import train_rl
    from s2r.run.flags import from_command_line

    where = Path(tempfile.mkdtemp())
    try:
        base, out = folder(name, small, where / "model"), io.StringIO()
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        few = ["--problems", "4", "--updates", "2"] if small else []
        with contextlib.redirect_stdout(out):
            train_rl.main(from_command_line(train_rl.Config, [
                "--model", str(base), "--data", str(base / "problems.jsonl"), "--out", str(where / "run"), "--steps", "2",
                "--max-new-tokens", str(new), "--show-every", "0", "--save-every", "9", *few, *flags]))  # fmt: skip
        print(out.getvalue())
        reserved = torch.cuda.max_memory_reserved() / 1e9 if CUDA else 0.0
        return list(read_jsonl(where / "run" / "log.jsonl")), out.getvalue(), reserved
    finally:
        shutil.rmtree(where)


def step_rows(what: str, log: list[dict], printed: str, reserved: float) -> list[Row]:
    estimate = re.search(r"memory, estimated.*", printed)
    rows = [(f"{what}: memory reserved, GB", f"{reserved:.1f}", estimate[0] if estimate else "")]
    for row in log:
        times = ", ".join(f"{k[8:]} {v:.1f}" for k, v in row.items() if k.startswith("seconds_"))
        rows.append((f"{what}: step {row['step']}, seconds", times, ""))
        rows.append((f"{what}: step {row['step']}, gap of sampler and trainer, nats", f"{row['gap']:.5f}", "0.02"))
    return rows


def part_rl(small: bool) -> list[Row]:
    """Two RL steps, 256 rollouts each: README's block for one GPU, 1.5B, up to 1,024 tokens."""
    return step_rows("1.5B", *rl("1.5B", small, 8 if small else 1024, "--level", "process", "--checkpointing"))


def part_step(small: bool) -> list[Row]:
    """An RL step of 0.5B, 256 rollouts of 256 tokens, against `transformers`: generate, padding, whole logits."""
    new = 8 if small else 256
    log, printed, reserved = rl("0.5B", small, new, "--level", "process")
    rows = step_rows("0.5B", log, printed, reserved)
    ours = sum(log[-1][k] for k in ("seconds_rollout", "seconds_score", "seconds_update"))
    policy, reference = hf_model("0.5B", small).float(), hf_model("0.5B", small)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-7, fused=True)
    many, at_once = (16, 4) if small else (256, 16)
    ids = torch.randint(500, (many // 4, 60), device=DEVICE)
    cast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA)

    def logp(net, batch):
        with cast:
            z = net(batch).logits[:, 59:-1].float() / 0.7
        return torch.log_softmax(z, -1).gather(2, batch[:, 60:, None])[..., 0]

    def step():
        with torch.no_grad(), cast:
            whole = policy.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                                    do_sample=True, temperature=0.7, top_k=0, num_return_sequences=4, pad_token_id=2)  # fmt: skip
        with torch.no_grad():
            old = [logp(policy, part) for part in whole.split(at_once)]
            _ = [logp(reference, part) for part in whole.split(at_once)]
        for i, (part, before) in enumerate(zip(whole.split(at_once), old)):
            (-(logp(policy, part) - before).exp().mean()).backward()
            if (i + 1) % (many // at_once // 4) == 0:
                optimizer.step()
                optimizer.zero_grad()

    theirs = seconds(step, 1)
    return [*rows, ("0.5B: a whole step, ours and `transformers`, s", f"{ours:.1f}, {theirs:.1f}: {theirs / ours:.1f} ×", "5 to 10 ×")]


def part_update(small: bool) -> list[Row]:
    """Forward and backward of 8,192 tokens in responses of 500 on average: MFU (6·P·T), with and without recomputing."""
    rows = []
    for name in ("0.5B",) if small else ("0.5B", "1.5B", "7B"):
        from kernels.bench import rl_lengths

        net = model(name, small, torch.float32 if name != "7B" else None)
        lengths = rl_lengths(300 if small else 8192)
        batch = pack([torch.randint(net.vocab_size, (n,)).tolist() for n in lengths],
                     [list(range(1, n)) for n in lengths], 10**6, DEVICE)[0]  # fmt: skip
        P, T = sum(p.numel() for p in net.parameters()), sum(lengths)

        def work():
            policy_logp(net, batch, 0.7)[0].mean().backward()

        for net.checkpointing in (False, True):
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            spent = seconds(work)
            peak = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if CUDA else ""
            rate = 6 * P * T / spent / 1e12
            rows.append((f"{name}, {'recomputing' if net.checkpointing else 'keeping'} activations",
                         f"{1000 * spent:.0f} ms, {T / spent:,.0f} tokens/s, {rate:.0f} TFLOP/s, MFU {rate / 989:.0%}{peak}",
                         "MFU 35 to 45 %"))  # fmt: skip
        net.checkpointing = False
        for what, where, attribute, other in PLAIN[2:]:
            kept = getattr(where, attribute)
            setattr(where, attribute, other)
            rows.append((f"{name}: … without {what}", f"{1000 * seconds(work):.0f} ms", ""))
            setattr(where, attribute, kept)
        rows += top(work)
        with torch.no_grad():
            spent = seconds(lambda: policy_logp(net, batch, 0.7))
        rows.append((f"{name}, scoring", f"{1000 * spent:.0f} ms, {T / spent:,.0f} tokens/s", ""))
        del net
        if CUDA:
            torch.cuda.empty_cache()
    return rows


def part_fsdp(small: bool) -> list[Row]:
    """FSDP2 with one process: gradients equal to those without."""
    from s2r.run.ranks import Ranks

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl" if CUDA else "gloo")
    grads = []
    for spread in (False, True):
        net = model("0.5B", small, torch.float32)
        if spread:
            Ranks(DEVICE).shard(net)
        ids = torch.randint(net.vocab_size, (300,), generator=torch.Generator().manual_seed(0)).tolist()
        (batch,) = pack([ids], [list(range(1, 300))], 10**6, DEVICE)
        policy_logp(net, batch, 1.0)[0].mean().backward()
        grads.append([getattr(p.grad, "full_tensor", lambda: p.grad)() for p in net.parameters()])
    spread = any(type(p).__name__ == "DTensor" for p in net.parameters())
    off = max(((a - b).norm() / a.norm().clamp(min=1e-12)).item() for a, b in zip(*grads))
    dist.destroy_process_group()
    return [("largest relative difference of a gradient", f"{off:.1e}" + ("" if spread else " (not spread!)"), "0")]


def part_bench(small: bool) -> list[Row]:
    """`python -m kernels.bench`."""
    if not CUDA:
        return [("kernels.bench", "needs a GPU", "")]
    done = subprocess.run([sys.executable, "-m", "kernels.bench"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return [("kernels.bench", done.stdout, "")]


def part_sanitizer(small: bool) -> list[Row]:
    """compute-sanitizer over one test of the attention kernels."""
    tool = shutil.which("compute-sanitizer")
    if not (CUDA and tool):
        return [("compute-sanitizer", "not here", "")]
    chosen = "test_triton_attention_sums_over_the_query_heads_of_a_group and bfloat16 and 4-2"
    done = subprocess.run([tool, "--tool", "memcheck", sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                           "tests/test_attention_triton.py", "-k", chosen], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    print(done.stdout[-5000:])
    return [("compute-sanitizer memcheck, attention", done.stdout.strip().splitlines()[-1], "0 errors")]


PARTS = {name.removeprefix("part_"): value for name, value in list(globals().items()) if name.startswith("part_")}
LIMIT = {"tests": 300, "bench": 300}  # seconds; others 200


def page(out: Path) -> str:
    head = json.loads((out / "machine.json").read_text())
    text = [f"# Measured on {head['card']}\n", f"{head['versions']}, {head['date']}. Made by `python tests/first_light.py`.\n"]
    for name, function in PARTS.items():
        path = out / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        text.append(f"## {name}: {function.__doc__}\n")
        if name == "bench" and CUDA:
            text.append(found[0][1])
            continue
        text += ["| what | measured | predicted |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in found), ""]
    return "\n".join(text) + "\n"


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    if cfg.run:
        (out / f"{cfg.run}.json").write_text(json.dumps(PARTS[cfg.run](cfg.small)))
        return
    out.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if CUDA else "a CPU"
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    (out / "machine.json").write_text(json.dumps({
        "card": card, "versions": f"torch {torch.__version__}, triton {triton}", "date": date.today().isoformat()}))  # fmt: skip
    for name in PARTS if cfg.parts == "all" else cfg.parts.split(","):
        begin = time.perf_counter()
        command = [sys.executable, __file__, "--out", str(out), "--run", name, *["--small"] * cfg.small]
        with open(out / f"{name}.log", "w") as log:
            try:
                code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT.get(name, 200)).returncode
            except subprocess.TimeoutExpired:
                code = "time limit"
        if code:
            last = (out / f"{name}.log").read_text().strip().splitlines()[-1:]
            (out / f"{name}.json").write_text(json.dumps([("failed", f"{code}: {' '.join(last)[:200]}", "")]))
        print(f"{name}: {'done' if not code else code} in {time.perf_counter() - begin:.0f} s", flush=True)
    (out / "gpu.md").write_text(page(out), encoding="utf-8")
    print(page(out))


if __name__ == "__main__":
    start(main, Config)
