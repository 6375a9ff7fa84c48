"""LoRA: the written-out sum, base and merged weights, PEFT's files, and runs of the scripts with it."""

import copy
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_model import save
from test_scripts import RL, SFT, log

import sample
import train_rl
import train_sft
from kernels.logprob import token_logp
from s2r.generate import generate
from s2r.hf import adapter
from s2r.model import Frozen, Linear, LoRA, Transformer
from s2r.run import memory
from tiny_model import digest, problem_file, tiny_model, trajectory_file

IDS, BORDERS = torch.arange(3, 40), torch.tensor([0, 20, 37])


def adapted(folder, rank: int = 4, alpha: float = 8.0, dtype=torch.float32, filled: bool = True) -> Transformer:
    """The model of a folder with LoRA; `filled`: B is random, as after training."""
    model = Transformer.from_pretrained(folder, dtype)
    model.add_lora(rank, alpha)
    model.init_lora(0)
    if filled:
        generator = torch.Generator().manual_seed(1)
        for lora in model.adapters():
            lora.B.data = 0.05 * torch.randn(lora.B.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS, BORDERS) @ model.head_weight.T


def written_out(model: Transformer, folder) -> Transformer:
    """A plain model whose matrices are W + α/r·B·A, in fp32."""
    plain = Transformer.from_pretrained(folder)
    for module, other in zip(linears(model), linears(plain)):
        other.weight.data = module.weight.float() + module.lora.scale * module.lora.B.detach() @ module.lora.A.detach()
    return plain


def linears(model: Transformer) -> list[Linear]:
    return [m for m in model.modules() if isinstance(m, Linear)]


# --- the layer ---


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_gradients_are_those_of_the_written_out_sum(rank):
    generator = torch.Generator().manual_seed(rank)
    layer = Linear(16, 24, bias=True)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    layer.requires_grad_(False)
    layer.lora = LoRA(16, 24, rank, 8.0, torch.device("cpu"))
    for p in layer.lora.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    x, upstream = torch.randn(7, 16, generator=generator), torch.randn(7, 24, generator=generator)
    found = torch.autograd.grad(layer(x), [layer.lora.A, layer.lora.B], upstream)
    A, B = (p.detach().double().requires_grad_() for p in (layer.lora.A, layer.lora.B))
    out = x.double() @ (layer.weight.double() + 8.0 / rank * B @ A).T + layer.bias.double()
    for mine, exact in zip(found, torch.autograd.grad(out, [A, B], upstream.double())):
        assert (mine - exact).norm() <= 1e-6 * exact.norm()
    assert layer.weight.grad is None and not layer.weight.requires_grad


def test_a_new_adapter_changes_nothing_and_one_switched_off_is_the_base_to_the_bit(base):
    plain = logits(Transformer.from_pretrained(base))
    assert torch.equal(logits(adapted(base, filled=False)), plain)
    model = adapted(base)
    assert not torch.equal(logits(model), plain)
    assert torch.equal(logits(Frozen(model)), plain)
    assert not torch.equal(logits(model), plain)  # and on again


def test_init_is_uniform_within_its_bound_and_repeats(base):
    first, again = (adapted(base, filled=False).adapters() for _ in "ab")
    for lora, other in zip(first, again):
        bound = 1 / math.sqrt(lora.A.shape[1])
        assert torch.equal(lora.A, other.A) and lora.A.abs().max() <= bound and lora.A.std() > bound / 2.5
        assert not lora.B.any()
    assert len(first) == 8  # four matrices in each of two blocks


def test_one_step_at_full_rank_changes_the_logits_as_the_written_out_sum(base):
    model = adapted(base, rank=32, filled=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    token_logp(model(IDS, BORDERS), model.head_weight, IDS)[0].sum().backward()
    optimizer.step()
    before, after = logits(Frozen(model)), logits(model)
    assert (after - before).norm() > 1e-3 * before.norm()
    assert (after - logits(written_out(model, base))).norm() <= 1e-6 * after.norm()


def test_a_frozen_head_gets_no_gradient(base):
    model = adapted(base)
    token_logp(model(IDS, BORDERS), model.head_weight, IDS)[0].sum().backward()
    named = dict(model.named_parameters())
    assert {name for name, p in named.items() if p.grad is not None} == {name for name in named if "lora" in name}


def test_sampled_is_scored_with_an_adapter(base):
    model = adapted(base)
    for rollout in generate(model, [[5, 6, 7]], n=4, max_new_tokens=20, stop_ids=(), progress=False):
        ids = torch.tensor([5, 6, 7, *rollout.ids])
        with torch.no_grad():
            hidden = model(ids, torch.tensor([0, len(ids)]))
            logp = token_logp(hidden[2:-1], model.head_weight, ids[3:])[0]
        torch.testing.assert_close(torch.tensor(rollout.logp), logp, atol=1e-4, rtol=0)


# --- files ---


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_merged_weights_give_the_logits_of_the_adapter(dtype, bound, base, tmp_path):
    """In bf16 the sum is rounded once where base and adapter were rounded apart: 8 bits, relative to the logits."""
    model = adapted(base, dtype=dtype)
    model.save_pretrained(tmp_path)
    merged = logits(Transformer.from_pretrained(tmp_path, dtype)).float()
    assert (merged - logits(model).float()).norm() <= bound * merged.norm()


@pytest.mark.parametrize("family", ["llama", "qwen2-tied", "qwen3"])
def test_peft_reads_the_adapter(family, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder = save(family, tmp_path / "base")
    model = adapted(folder)
    model.save_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out" / "adapter")
    ids = IDS[None, :20]
    with torch.no_grad():
        wanted = theirs(ids).logits[0]
        found = model.logits(model(ids[0], torch.tensor([0, 20])))
    assert (found - wanted).abs().max() <= 1e-4
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert (whole(ids).logits[0] - wanted).abs().max() <= 1e-4


def test_a_model_without_lora_has_no_adapter_folder(base, tmp_path):
    Transformer.from_pretrained(base).save_pretrained(tmp_path)
    assert not (tmp_path / "adapter").exists() and adapter.loras(Transformer.from_pretrained(base)) == {}


# --- runs ---


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    tiny_model(folder / "base")
    trajectory_file(folder / "t.jsonl"), problem_file(folder / "p.jsonl")
    run(folder, "sft", folder / "sft")
    run(folder, "sft", folder / "taught", lora=0, epochs=12, lr=1e-2)
    return folder


def run(folder, stage: str, out, **changes) -> None:
    if stage == "sft":
        settings = SFT | {"model": str(folder / "base"), "data": str(folder / "t.jsonl"), "epochs": 6, "lr": 3e-2}
        train_sft.main(train_sft.Config(**settings | {"out": str(out), "lora": 4} | changes))
    else:
        settings = RL | {"model": str(folder / "taught"), "data": str(folder / "p.jsonl"), "lr": 2e-2}
        train_rl.main(train_rl.Config(**settings | {"out": str(out), "lora": 4} | changes))


def test_sft_with_lora_learns_and_trains_nothing_else(world):
    rows = log(world / "sft")
    assert rows[-1]["nll"] < 0.7 * rows[0]["nll"] and rows[0]["kl"] == 0 and rows[-1]["kl"] > 0.01
    state = torch.load(world / "sft" / f"step-{rows[-1]['step']}" / "state.pt", weights_only=True)
    assert set(state["model"]) == {name for name in state["model"] if ".lora." in name} and len(state["model"]) == 16
    base, merged = (load_file(world / name / "model.safetensors") for name in ("base", "sft"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if "_proj" in name}
    assert (world / "sft" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("stage, change", [
    ("sft", {}), ("rl", {"level": "process"}), ("rl", {"level": "outcome", "checkpointing": True})])  # fmt: skip
def test_a_resumed_run_ends_with_the_same_bits(stage, change, world, tmp_path):
    steps = {"steps": 4} if stage == "rl" else {"epochs": 2}
    run(world, stage, tmp_path / "whole", **change, **steps)
    half = {"steps": 2} if stage == "rl" else {"epochs": 1}
    if stage == "rl":
        run(world, stage, tmp_path / "halves", **change, **half)
        run(world, stage, tmp_path / "halves", resume=True, **change, **steps)
    else:
        run(world, stage, tmp_path / "halves", save_every=1, keep=9, **steps)
        for late in (tmp_path / "halves").glob("step-*"):
            if late.name not in ("step-1", "step-2"):
                shutil.rmtree(late)
        run(world, stage, tmp_path / "halves", save_every=1, keep=9, resume=True, **steps)
    whole, halves = (digest(tmp_path / name) for name in ("whole", "halves"))
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert whole[name] == halves[name]


@pytest.mark.parametrize("lora", [0, 4])
def test_resume_refuses_another_base(lora, world, tmp_path):
    shutil.copytree(world / "taught", tmp_path / "base", ignore=shutil.ignore_patterns("step-*", "*.json[l]", "run.json"))
    settings = {"model": str(tmp_path / "base"), "steps": 1, "lora": lora}
    run(world, "rl", tmp_path / "out", **settings)
    os.utime(tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match="its weights were written at another time than those that .* began with"):
        run(world, "rl", tmp_path / "out", **settings | {"steps": 2, "resume": True})


@pytest.mark.parametrize("change", [{"offload": True}, {"kl": 0.0}, {"checkpointing": True}], ids=str)
def test_sft_options_do_with_lora_what_they_do_without(change, world, tmp_path):
    """Offloading and recomputing change no bit; without the KL there is no base to run."""
    run(world, "sft", tmp_path / "out", epochs=1, **change)
    if "kl" in change:
        assert all(row["kl"] == 0 for row in log(tmp_path / "out"))
    else:
        run(world, "sft", tmp_path / "plain", epochs=1)
        found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_offline_rl_with_lora_learns_from_recorded_rollouts(world, tmp_path):
    sample.main(sample.Config(model=str(world / "taught"), data=str(world / "p.jsonl"), n=4, temperature=0.7,
                              max_new_tokens=60, out=str(tmp_path / "r.jsonl"), device="cpu"))  # fmt: skip
    few = {"problems": 2, "rollouts": 2, "updates": 1}
    run(world, "rl", tmp_path / "out", data="", offline=str(tmp_path / "r.jsonl"), steps=3, beta=0.1, **few)
    rows = log(tmp_path / "out")
    assert any(row["grad_norm"] > 0 for row in rows) and all(row["gap"] < 1e-5 for row in rows)


def test_a_frozen_model_can_be_copied_and_has_no_gradient(base):
    frozen = copy.deepcopy(Frozen(adapted(base)))
    assert not frozen(IDS, BORDERS).requires_grad and frozen.dtype == torch.float32


def test_rl_with_lora_moves_the_policy_and_its_gap_is_rounding(world, tmp_path):
    run(world, "rl", tmp_path / "out", level="process")
    rows = log(tmp_path / "out")
    assert rows[0]["kl"] == 0 and all(abs(row["kl"]) > 1e-4 for row in rows[1:])
    assert all(row["gap"] < 1e-5 for row in rows) and all(row["grad_norm"] > 0 for row in rows)


def test_estimate_counts_the_adapters(base):
    model = adapted(base, rank=4)
    c, trained = model.config, sum(p.numel() for p in model.parameters() if p.requires_grad)
    usual = {"ranks": 1, "itemsize": 2, "gpu": True, "tokens": 100, "checkpointing": True, "offload": False,
             "reference": True, "slots": 5, "capacity": 70}  # fmt: skip
    parts = memory.estimate(c, lora=4, **usual)
    P = memory.parameters(c)[0]
    assert parts["always"] == {"weights": 2 * P + 4 * trained, "AdamW": 8 * trained, "reference": 0, "sampler": 0}
    assert parts["update"]["gradients"] == 4 * trained and parts["update"]["working copy"] == 0
