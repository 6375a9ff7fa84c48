"""The memory estimate against the peak of real runs, and its parts against what the code keeps."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer as HfTokenizer

from s2r.hf.config import ModelConfig
from s2r.model import Cache, Transformer
from s2r.run import memory
from s2r.run.files import write_jsonl
from tiny import tiny_tokenizer
from tiny_model import problem_file, steps, tiny_model

SMALL = ModelConfig(
    vocab_size=1000, hidden_size=96, intermediate_size=200, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=16
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random Llama of 29 million parameters with a vocabulary of 8,192, and data of some 240 tokens an example."""
    folder = tmp_path_factory.mktemp("memory")
    model = tiny_tokenizer(folder / "model")
    tokenizer = HfTokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra {i}>" for i in range(8192 - tokenizer.get_vocab_size())])
    tokenizer.save(str(model / "tokenizer.json"))
    config = {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    transformer = Transformer(ModelConfig.from_folder(model))
    transformer.init_weights(0)
    transformer.save_pretrained(model)
    rows = []
    for i in range(8):
        solve, verify = steps(i % 5, 4, 0)
        solve["text"] = "x+y " * 30 + solve["text"]
        row = {"unique_id": f"long/{i}", "problem": f"{i % 5}+4?", "answer": str(i % 5 + 4)}
        rows.append(row | {"trajectory": [solve, verify]})
    write_jsonl(folder / "trajectories.jsonl", rows)
    problem_file(folder / "problems.jsonl", 2)
    return folder


SFT = {"data": "trajectories.jsonl", "epochs": 1, "batch_size": 4, "kl": 0.01, "tokens_per_microbatch": 500}
RL = {"data": "problems.jsonl", "problems": 2, "rollouts": 4, "updates": 2, "steps": 1, "max_new_tokens": 150,
      "beta": 0.05, "tokens_per_microbatch": 500}  # fmt: skip
RUNS = {"sft": ("sft", SFT), "sft-recompute": ("sft", SFT | {"checkpointing": True}), "rl": ("rl", RL), "rl-lora": ("rl", RL | {"lora": 4})}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which Linux has")
@pytest.mark.parametrize("run", RUNS)
def test_estimate_agrees_with_peak(run, world, tmp_path):
    script, settings = RUNS[run]
    folders = {"model": str(world / "model"), "data": str(world / settings["data"]), "out": str(tmp_path / "out"), "device": "cpu"}
    command = [sys.executable, str(Path(__file__).with_name("peak.py")), script, json.dumps(settings | folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.splitlines()[-1]) / memory.GB
    estimated = float(re.findall(r"± 25 %: .* = ([\d.]+) GB at the peak", done.stdout)[-1])
    print(f"estimated {estimated:.3f} GB, measured {measured:.3f} GB, {estimated / measured - 1:+.1%}")
    assert abs(estimated / measured - 1) < 0.25


def test_parameters_are_counted():
    for family in ({}, {"qkv_bias": True, "tied": True}, {"qk_norm": True}):
        config = replace(SMALL, **family)
        assert memory.parameters(config)[0] == sum(p.numel() for p in Transformer(config).parameters())


def estimate(**settings) -> dict[str, dict[str, float]]:
    usual = {"ranks": 1, "itemsize": 2, "gpu": True, "tokens": 1000, "checkpointing": False, "offload": False,
             "reference": True, "slots": 5, "capacity": 70}  # fmt: skip
    return memory.estimate(SMALL, **usual | settings)


def test_cache_is_what_the_sampler_allocates():
    cache = Cache(SMALL, 5, 70, torch.bfloat16, torch.device("cpu"))
    assert estimate()["rollout"]["cache"] == cache.k.nbytes + cache.v.nbytes


def test_ranks_share_all_but_the_sampler():
    one, eight = (estimate(ranks=n)["always"] for n in (1, 8))
    assert eight["sampler"] == one["sampler"] == 2 * memory.parameters(SMALL)[0]
    assert all(eight[name] == one[name] / 8 for name in ("weights", "AdamW", "reference"))


def test_what_a_run_does_without_is_not_counted():
    P = memory.parameters(SMALL)[0]
    assert estimate()["always"] == {"weights": 4 * P, "AdamW": 8 * P, "reference": 2 * P, "sampler": 2 * P}
    assert estimate(offload=True)["always"]["AdamW"] == 0
    assert estimate(reference=False)["always"]["reference"] == 0
    assert estimate(slots=0, ranks=8)["always"]["sampler"] == 0
    rest = 2 * memory.parameters(SMALL)[2]  # of π_base, whose head SFT's KL reads in the backward pass
    sft, rl = (estimate(sft=sft, ranks=8)["update"]["working copy"] for sft in (True, False))
    assert sft == rl + rest and estimate(sft=True, ranks=8, reference=False)["update"]["working copy"] == rl
    assert estimate()["rollout"]["packed"] == estimate(slots=0, gpu=False)["rollout"]["packed"] == 0
    assert estimate(gpu=False)["rollout"]["packed"] == 2 * P
    assert estimate(itemsize=4)["always"]["sampler"] == 0  # one process in fp32 samples from the weights themselves
    assert estimate(itemsize=4)["update"]["working copy"] == estimate(checkpointing=True)["update"]["working copy"] == 0


def test_example_of_docs_scaling_is_what_the_formulas_give():
    qwen = ModelConfig(152_064, 3584, 18_944, 28, 28, 4, 128, tied=False, qkv_bias=True)  # Qwen2.5-7B
    parts = memory.estimate(qwen, ranks=8, itemsize=2, gpu=True, tokens=8192, checkpointing=True, offload=False,
                            reference=True, slots=32, capacity=4296)  # fmt: skip
    assert "= 45.6 GB at the peak, in the update; 36.4 GB" in memory.text(parts)
    example = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").partition("*Example: RL of Qwen2.5-7B")[2]
    shown = re.findall(r"\| \*{0,2}(\d+\.\d)\*{0,2} \|\n", example.partition("The cache")[0])
    sizes = [size / memory.GB for size in (parts["always"] | parts["update"]).values()]
    assert shown == [f"{size:.1f}" for size in (*sizes, sum(sizes))]


def test_report_takes_settings_and_lengths_from_the_script(monkeypatch):
    """Sequences of 100 tokens; a prompt of 20 whose response may fill the rest of 60."""
    monkeypatch.setattr(memory, "text", lambda parts: parts)
    model = SimpleNamespace(config=SMALL, dtype=torch.float32)
    common = {"checkpointing": False, "offload": False, "lora": 0, "tokens_per_microbatch": 150}
    common |= {"slots": 6, "max_new_tokens": 40}
    sft = SimpleNamespace(batch_size=8, kl=0.1, **common)
    rl = SimpleNamespace(problems=4, rollouts=4, updates=2, beta=0.0, offline="", **common)

    def parts(cfg, ranks: int = 1, **data):
        return memory.report(cfg, model, SimpleNamespace(size=ranks, spread=ranks, device=torch.device("cpu")), **data)

    def wanted(ranks: int = 1, **settings):
        return estimate(ranks=ranks, itemsize=4, gpu=False, **settings)

    assert parts(sft, sequences=[[0] * 100, [0]]) == wanted(tokens=150, sft=True, slots=0, capacity=100)
    sft.tokens_per_microbatch = 10**6  # more than there is: 8 sequences on one rank, 2 on each of four
    assert parts(sft, sequences=[[0] * 100])["update"] == wanted(tokens=800)["update"]
    assert parts(sft, ranks=4, sequences=[[0] * 100])["update"] == wanted(ranks=4, tokens=200, sft=True)["update"]
    found = parts(rl, ranks=4, prompts=[[0] * 20, [0]])
    assert found == wanted(ranks=4, tokens=120, reference=False, slots=4, capacity=60)
    rl.beta, rl.tokens_per_microbatch = 0.1, 10  # a longer sequence is a micro-batch of its own
    assert parts(rl, prompts=[[0] * 20]) == wanted(tokens=60, slots=6, capacity=60)
    rl.slots = 128  # 16 rollouts a step, 30 answers at once in an evaluation
    assert parts(rl, prompts=[[0] * 20] * 50, held_out=[[0]] * 30) == wanted(tokens=60, slots=30, capacity=60)
    assert parts(rl, prompts=[[0] * 20] * 50, held_out=[[0]] * 3) == wanted(tokens=60, slots=16, capacity=60)
    longer = parts(rl, prompts=[[0] * 20] * 50, held_out=[[0] * 30] * 3)  # an evaluation makes no update longer
    assert longer == wanted(tokens=60, slots=16, capacity=70)
    rl.beta, rl.offline = 0.0, "rollouts.jsonl"
    rl.max_new_tokens = 400
    assert parts(rl, sequences=[[0] * 100], held_out=[[0] * 20] * 3) == wanted(tokens=100, slots=3, capacity=420)
    assert parts(rl, sequences=[[0] * 100]) == wanted(tokens=100, slots=0, capacity=100)


def test_command_prints_sft_and_rl(tmp_path, capsys):
    folder = tiny_model(tmp_path)
    memory.main(memory.Config(model=str(folder), gpus=2, slots=64, max_new_tokens=100))
    out = capsys.readouterr().out
    sft, rl = out.splitlines()[1:]
    terms = re.match(r"SFT: memory, estimated to ± 25 %: (.*) = ([\d.]+) GB at the peak, in the update$", sft)
    assert sum(float(term.split()[-1]) for term in terms[1].split(" + ")) == pytest.approx(float(terms[2]), rel=0.01)
    assert rl.startswith("RL: ") and " + sampler " in rl and rl.endswith("GB in the rollout")
