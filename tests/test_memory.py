"""The memory estimate against the peak of real runs, and its parts against what the code keeps."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as HfTokenizer

from s2r import memory
from s2r.hf.config import ModelConfig
from s2r.data import write_jsonl
from s2r.run.memory import Job
from s2r.model import Cache, Transformer
from s2r.packing import pack, policy_logp
from tiny import tiny_tokenizer
from tiny_model import problem_file, steps

SMALL = ModelConfig(
    vocab_size=1000, hidden_size=96, intermediate_size=200, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=16
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random Llama of 29 million parameters, 8,192 tokens in its vocabulary, and data of some 240 tokens an example."""
    folder = tmp_path_factory.mktemp("memory")
    model = tiny_tokenizer(folder / "model")
    tokenizer = HfTokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra {i}>" for i in range(8192 - tokenizer.get_vocab_size())])
    tokenizer.save(str(model / "tokenizer.json"))
    config = {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
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


SFT = {"data": "trajectories.jsonl", "epochs": 1, "batch_size": 4, "tokens_per_microbatch": 500}
RL = {"data": "problems.jsonl", "problems": 2, "rollouts": 4, "steps": 1, "max_new_tokens": 150, "tokens_per_microbatch": 500}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which Linux has")
@pytest.mark.parametrize(
    "script, settings", [("sft", SFT), ("sft", SFT | {"checkpointing": True}), ("rl", RL)], ids=["sft", "sft-recompute", "rl"]
)
def test_estimate_agrees_with_peak(script, settings, world, tmp_path):
    settings = settings | {"model": str(world / "model"), "data": str(world / settings["data"]), "out": str(tmp_path / "out")}
    command = [sys.executable, str(Path(__file__).with_name("peak.py")), script, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.splitlines()[-1]) / memory.GB
    estimated = float(re.findall(r"= ([\d.]+) GB at the peak", done.stdout)[-1])
    print(f"estimated {estimated:.3f} GB, measured {measured:.3f} GB, {estimated / measured - 1:+.1%}")
    assert abs(estimated / measured - 1) < 0.15


def saved_bytes(model: Transformer, T: int) -> int:
    """Bytes that the graph of one forward pass over T tokens keeps, parameters aside, each storage once."""
    (batch,) = pack([list(range(1, T + 1))], [range(1, T)], T, "cpu")
    storages = {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy_logp(model, batch, 1.0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(storage.nbytes() for at, storage in storages.items() if at not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [{}, {"qkv_bias": True, "tied": False}, {"qk_norm": True}], ids=["llama", "qwen2", "qwen3"])
def test_activations_are_what_autograd_saves(dtype, checkpointing, family):
    config = replace(SMALL, **family)
    model = Transformer(config, dtype, param_dtype=torch.float32)
    model.init_weights(0)
    model.checkpointing = checkpointing
    job = Job("rl", tokens=512, itemsize=dtype.itemsize, gpu=False, checkpointing=checkpointing)
    found = saved_bytes(model, job.tokens)
    wanted = memory.activations(config, job) + memory.compute_copies(config, job)
    if checkpointing:  # in the forward pass no block's inside is kept
        block = job.tokens * memory.saved_by_block(config, job) + job.copies * 2 * memory.parameters(config)[0]
        wanted -= block
    assert abs(wanted / found - 1) < 0.02


def test_parameters_are_counted():
    for family in ({}, {"qkv_bias": True, "tied": False}, {"qk_norm": True}):
        config = replace(SMALL, **family)
        assert memory.total(config) == sum(p.numel() for p in Transformer(config).parameters())


def test_cache_is_what_the_sampler_allocates():
    cache = Cache(SMALL, 5, 70, torch.bfloat16, torch.device("cpu"))
    job = Job("rl", tokens=1, slots=5, capacity=70)
    assert memory.cache(SMALL, job, 5, 70) == cache.k.nbytes + cache.v.nbytes


def test_ranks_share_all_but_the_sampler():
    one, eight = (memory.resident(SMALL, Job("rl", tokens=1, ranks=n, slots=4)) for n in (1, 8))
    assert eight["sampler"] == one["sampler"] == 2 * memory.total(SMALL)
    assert all(eight[name] == one[name] / 8 for name in ("weights", "optimizer", "reference"))


def test_the_first_machine_holds_what_is_saved_and_what_is_offloaded():
    P = memory.total(SMALL)
    alone, sixteen = (Job("rl", tokens=1, ranks=n) for n in (1, 16))
    assert memory.on_host(SMALL, alone, 1) == memory.on_host(SMALL, replace(alone, offload=True), 1) == 12 * P
    assert memory.on_host(SMALL, sixteen, 8) == 14 * P
    assert memory.on_host(SMALL, replace(sixteen, offload=True), 8) == 14 * P + 8 * P / 2


def test_offline_no_copy_is_held_to_sample_from():
    assert memory.resident(SMALL, Job("rl", tokens=1, ranks=8))["sampler"] == 0


def test_offload_takes_the_optimizer_away():
    job = Job("rl", tokens=1000, slots=4, capacity=100)
    before, after = (sum(memory.phases(SMALL, j)["update"].values()) for j in (job, replace(job, offload=True)))
    assert before - after == 8 * memory.total(SMALL)
