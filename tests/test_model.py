"""The transformer against Hugging Face's own classes on small random models of every family that it reads."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from kernels.logprob import token_logp
from s2r.hf import weights as hf_weights
from s2r.hf.config import ModelConfig
from s2r.model import Transformer, positions

transformers.logging.disable_progress_bar()

V = 97
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": None}  # fmt: skip
# Of the 8 rotary pairs one keeps its speed, two are blended and five divided by 8; contexts go far beyond 64 tokens.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 10_000.0}  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama3": (LlamaConfig, {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama3-tied": (LlamaConfig, {"rope_parameters": LLAMA3, "head_dim": 16, "tie_word_embeddings": True}),
    "smollm2": (LlamaConfig, {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3,
                              "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 12}),
    "qwen3-tied": (Qwen3Config, {"head_dim": 12, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": 320, "head_dim": 6}),  # no context here is longer
}  # fmt: skip
LENGTHS = [1, 7, 300, 32]


@cache
def hugging_face(family: str) -> PreTrainedModel:
    """A random model of a family whose logits are a few nats wide, with biases and norms that are not 0 and 1."""
    config_class, others = FAMILIES[family]
    config = config_class(**{**SIZES, **others})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 2:
            p.data = noise / p.shape[1] ** 0.5
        else:
            p.data = 0.3 * noise + (0 if name.endswith("bias") else 1)
    return model


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def save(family: str, folder: Path, old: bool = False, **how) -> Path:
    """The family's folder as transformers writes it, its config.json in today's spelling or in that of 2024."""
    hugging_face(family).save_pretrained(folder, **how)
    config = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in config and "dtype" in config
    if old:
        rope = config.pop("rope_parameters")
        config |= {"torch_dtype": config.pop("dtype"), "rope_theta": rope.pop("rope_theta"), "rope_scaling": None}
        if rope["rope_type"] != "default":
            config["rope_scaling"] = rope
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def pack(lengths: list[int] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(V, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([0, *lengths]).cumsum(0)


def hf_logits(model: PreTrainedModel, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits (T, V) of a pack, each sequence in a call of its own."""
    return torch.cat([model(part[None]).logits[0] for part in ids.split(lengths)])


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shard", "old"), [("1GB", False), ("9KB", True)], ids=["single, new", "sharded, old"])
@torch.no_grad()
def test_logits_equal_transformers(family, shard, old, tmp_path):
    """A pack of four sequences, one of a single token and one of 300, against each sequence alone."""
    save(family, tmp_path, old, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > (1 if shard == "9KB" else 0)
    ids, cu_seqlens = pack()
    wanted = hf_logits(hugging_face(family), ids, LENGTHS)
    assert wanted.std() > 0.5  # or 1e-4 would mean nothing
    model = Transformer.from_pretrained(tmp_path)
    hidden = model(ids, cu_seqlens)
    assert hidden.shape == (len(ids), model.config.hidden_size)
    torch.testing.assert_close(model.logits(hidden), wanted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_packed_sequence_equals_itself_alone(family, tmp_path):
    model = Transformer.from_pretrained(save(family, tmp_path))
    ids, cu_seqlens = pack()
    packed = model(ids, cu_seqlens)
    alone = [model(part, torch.tensor([0, len(part)])) for part in ids.split(LENGTHS)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)
    with_empty = torch.tensor([0, 0, *cu_seqlens[1:].tolist(), len(ids)])
    torch.testing.assert_close(model(ids, with_empty), packed, atol=1e-5, rtol=0)


def test_positions_start_again_in_every_sequence():
    assert positions(torch.tensor([0, 2, 2, 5, 6]), 6).tolist() == [0, 1, 0, 1, 2, 0]


@torch.no_grad()
def test_llama3_scaling_matters_and_reads_its_oldest_spelling(tmp_path):
    """`type` for `rope_type`; and the logits of test_logits_equal_transformers do depend on the scaling."""
    ids, cu_seqlens = pack()
    save("llama3", tmp_path, old=True)
    right = Transformer.from_pretrained(tmp_path)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_scaling"]
    edit_config(tmp_path, rope_scaling={"type": rope.pop("rope_type"), **rope})
    assert torch.equal(Transformer.from_pretrained(tmp_path)(ids, cu_seqlens), right(ids, cu_seqlens))
    edit_config(tmp_path, rope_scaling=None)
    plain = Transformer.from_pretrained(tmp_path)
    assert (plain(ids, cu_seqlens) - right(ids, cu_seqlens)).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "llama3"])
def test_inverse_frequencies_equal_transformers(family, tmp_path):
    """Relative 2e-7: at position 10,000 a speed that is off by more turns a pair visibly."""
    ours = ModelConfig.from_folder(save(family, tmp_path)).inverse_frequencies()
    torch.testing.assert_close(ours, hugging_face(family).model.rotary_emb.inv_freq, atol=0, rtol=2e-7)


def test_config_defaults(tmp_path):
    """What old folders leave out: head_dim, key/value heads, tie, rope_theta. Mistral's window bounds the context."""
    save("llama", tmp_path, old=True)
    path = tmp_path / "config.json"
    hf = json.loads(path.read_text())
    for key in ("head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_theta", "rope_scaling"):
        hf.pop(key, None)
    path.write_text(json.dumps(hf))
    config = ModelConfig.from_folder(tmp_path)
    assert (config.head_dim, config.num_kv_heads, config.tied) == (8, 4, False)
    assert (config.rope_theta, config.rope_scaling, config.max_positions) == (10_000.0, None, 512)
    save("mistral", tmp_path)
    edit_config(tmp_path, sliding_window=128)
    assert ModelConfig.from_folder(tmp_path).max_positions == 128


@torch.no_grad()
def test_old_checkpoints_with_extra_weights_load(tmp_path):
    """Rotary buffers of 2023, and a tied model that stores its head a second time."""
    ids, cu_seqlens = pack()
    save("llama-tied", tmp_path)
    wanted = Transformer.from_pretrained(tmp_path)(ids, cu_seqlens)

    def add(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    edit_weights(tmp_path, add)
    assert torch.equal(Transformer.from_pretrained(tmp_path)(ids, cu_seqlens), wanted)


def test_from_pretrained_reads_into_the_asked_dtype(tmp_path):
    save("qwen2", tmp_path)
    model = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    masters = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16, param_dtype=torch.float32)
    assert {p.dtype for p in masters.parameters()} == {torch.float32}
    assert torch.equal(masters.embed.detach(), hugging_face("qwen2").model.embed_tokens.weight.detach())
    copy = Transformer(model.config, torch.bfloat16)
    copy.copy_from(masters)
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), model.parameters()))


def test_from_pretrained_spreads_the_model_before_it_takes_memory(tmp_path):
    """What the rows of a rank then are is seen in test_ranks.py, by two and three ranks."""
    save("qwen2", tmp_path)
    devices = []
    model = Transformer.from_pretrained(
        tmp_path, spread=lambda model: devices.extend(x.device.type for x in (*model.parameters(), *model.buffers()))
    )
    assert set(devices) == {"meta"} and {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(model.speed, Transformer(model.config).speed)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "shard_bytes"), [(torch.float32, 9_000), (torch.bfloat16, 10**9)], ids=str)
@torch.no_grad()
def test_save_pretrained_opens_in_transformers(family, dtype, shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_weights, "SHARD_BYTES", shard_bytes)
    model = Transformer.from_pretrained(save(family, tmp_path / "in"))
    model.save_pretrained(tmp_path / "out", dtype=dtype)
    stored = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.stat().st_size < 20_000 or shard_bytes == 10**9
        stored |= load_file(path)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_bytes == 9_000)
    assert ("lm_head.weight" in stored) != model.config.tied
    assert {weight.dtype for weight in stored.values()} == {dtype}
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert opened.dtype == dtype and type(opened) is type(hugging_face(family))
    theirs, ours = opened.state_dict(), hugging_face(family).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name].to(dtype)) for name in ours)
    ids, _ = pack()
    again = Transformer.from_pretrained(tmp_path / "out")
    wanted = hf_logits(opened.float(), ids, LENGTHS)
    torch.testing.assert_close(again.logits(again(*pack())), wanted, atol=1e-4, rtol=0)


def test_save_pretrained_keeps_the_rest_of_the_config(tmp_path):
    save("llama3", tmp_path / "in", old=True)
    edit_config(tmp_path / "in", eos_token_id=[2, 5])
    Transformer.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "out"))
    assert after == before


def test_save_pretrained_without_hf_config_raises(tmp_path):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 2,
             "num_kv_heads": 1, "head_dim": 4}  # fmt: skip
    with pytest.raises(ValueError, match="config.json"):
        Transformer(ModelConfig(**sizes)).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    """The gradient of every weight under its Hugging Face name."""
    holder = Transformer(model.config, model.embed.dtype)
    with torch.no_grad():
        for place, p in zip(holder.parameters(), model.parameters(), strict=True):
            place.copy_(p.grad)
    return {name: p.detach()[start:end] for name, (p, start, end) in hf_weights.places(holder).items()}


def backward(model: Transformer, weights: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of Σ weights · log p(next id), the loss of the whole pack."""
    ids, cu_seqlens = pack()
    model.zero_grad()
    logp, _ = token_logp(model(ids, cu_seqlens), model.head_weight, ids.roll(-1), temperature)
    (weights * logp).sum().backward()
    return logp.detach()


def test_gradients_equal_transformers(family, tmp_path):
    """Every weight's, of a weighted sum of log p at temperature 0.7 through model, attention and chunked head."""
    theirs = hugging_face(family)
    ids, _ = pack()
    weights = torch.randn(len(ids), generator=torch.Generator().manual_seed(2))
    theirs.zero_grad()
    logits = hf_logits(theirs, ids, LENGTHS)
    wanted_logp = torch.log_softmax(logits / 0.7, -1).gather(1, ids.roll(-1)[:, None])[:, 0]
    (weights * wanted_logp).sum().backward()
    model = Transformer.from_pretrained(save(family, tmp_path))
    logp = backward(model, weights, 0.7)
    torch.testing.assert_close(logp, wanted_logp, atol=1e-4, rtol=0)
    wanted, found = dict(theirs.named_parameters()), gradients(model)
    assert wanted.keys() == found.keys()
    for name, p in wanted.items():
        assert (found[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name
    theirs.zero_grad()


def test_activation_checkpointing_changes_no_gradient(family, tmp_path):
    model = Transformer.from_pretrained(save(family, tmp_path))
    weights = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(2))
    logp = backward(model, weights, 1.0)
    plain = gradients(model)
    model.checkpointing = True
    assert torch.equal(backward(model, weights, 1.0), logp)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_compute_gives_fp32_gradients_to_master_weights(family, checkpointing, tmp_path):
    folder = save(family, tmp_path)
    model = Transformer.from_pretrained(folder, dtype=torch.bfloat16, param_dtype=torch.float32)
    model.checkpointing = checkpointing
    weights = torch.ones(sum(LENGTHS))
    logp = backward(model, weights, 1.0)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    ids, cu_seqlens = pack()
    assert model(ids, cu_seqlens).dtype == torch.bfloat16
    exact = Transformer.from_pretrained(folder)
    torch.testing.assert_close(logp, backward(exact, weights, 1.0), atol=0.3, rtol=0)
    found, wanted = gradients(model), gradients(exact)
    for name in wanted:  # bf16 through two layers: a few percent
        assert (found[name] - wanted[name]).norm() <= 0.1 * wanted[name].norm(), name


# --- what bad folders get --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, found", [
    ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    ({"model_type": None}, "model_type None"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "rope type 'yarn'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"use_sliding_window": True}, "use_sliding_window True"),
], ids=str)  # fmt: skip
def test_unsupported_config_raises(changes, found, tmp_path):
    save("llama", tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    assert f"{tmp_path / 'config.json'}: {found} is not supported; known: " in str(error.value)


@pytest.mark.parametrize("changes, words", [
    ({"num_attention_heads": "four"}, 'num_attention_heads is "four", where a whole number'),
    ({"hidden_size": -128}, "hidden_size is -128, where a whole number"),
    ({"hidden_size": 32.0}, "hidden_size is 32.0, where a whole number"),
    ({"num_hidden_layers": True}, "num_hidden_layers is true, where a whole number"),
    ({"intermediate_size": 0}, "intermediate_size is 0, where a whole number"),
    ({"vocab_size": None}, "vocab_size is null, where a whole number"),
    ({"num_key_value_heads": "2"}, 'num_key_value_heads is "2", where a whole number'),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    ({"head_dim": [8]}, "head_dim is [8], where a whole number"),
    ({"head_dim": 7}, "head_dim 7 is odd"),
    ({"max_position_embeddings": -1}, "max_position_embeddings is -1, where a whole number"),
    ({"rms_norm_eps": None}, "rms_norm_eps is null, where a number"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0, where a number"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05, where a number"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps is Infinity, where a number"),
    ({"rope_parameters": None, "rope_theta": "1e6"}, 'rope_theta is "1e6", where a number'),
    ({"rope_parameters": "llama3"}, "the rope settings are 'llama3', not an object"),
    ({"rope_parameters": LLAMA3 | {"factor": "8"}}, 'factor is "8", where a number'),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings 'no' is not supported"),
], ids=str)  # fmt: skip
def test_impossible_config_raises(changes, words, tmp_path):
    """One line with the file, the field, what was found and what to do."""
    save("llama", tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        ModelConfig.from_folder(tmp_path)
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'config.json'}: {words}") and "\n" not in said
    assert said.endswith("fetch the file again") or "; known: " in said


@pytest.mark.parametrize("text", ["{", "", "[]", '{"model_type": "llama"}'], ids=["cut", "empty", "list", "no sizes"])
def test_unreadable_config_raises(text, tmp_path):
    save("llama", tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("text", ["", '{"metadata": {}}', '{"weight_map": ["a"]}'], ids=["empty", "no map", "list"])
def test_unreadable_index_raises(text, tmp_path):
    save("llama", tmp_path, max_shard_size="9KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    assert str(index) in str(error.value)


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings"])
def test_incomplete_rope_scaling_raises(key, tmp_path):
    save("llama", tmp_path)
    edit_config(tmp_path, rope_parameters={name: value for name, value in LLAMA3.items() if name != key})
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value) and key in str(error.value)


def test_missing_files_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*config.json"):
        Transformer.from_pretrained(tmp_path / "nowhere")
    save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        Transformer.from_pretrained(tmp_path)


def test_missing_shard_raises(tmp_path):
    save("llama", tmp_path, max_shard_size="9KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError) as error:
        Transformer.from_pretrained(tmp_path)
    assert str(shard) in str(error.value) and "model.safetensors.index.json" in str(error.value)


@pytest.mark.parametrize("left", [0, 5, 100, 0.5, -1], ids=lambda left: f"left{left}")
@pytest.mark.parametrize("shard", ["1GB", "9KB"], ids=["single", "sharded"])
def test_truncated_shard_raises(shard, left, tmp_path):
    """Nothing, part of the header, the header alone, half, all but a byte."""
    save("llama", tmp_path, max_shard_size=shard)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data)) if isinstance(left, float) else left])
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_missing_weight_raises(name, tmp_path):
    edit_weights(save("llama", tmp_path), lambda weights: weights.pop(name))
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and name in str(error.value) and "1 weight" in str(error.value)


def test_unexpected_weight_raises(tmp_path):
    """A bias that Llama does not have; Qwen2's weights under a Llama config.json are caught the same way."""
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_weights(save("llama", tmp_path), lambda weights: weights.update({name: torch.zeros(32)}))
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value) and name in str(error.value)


def test_wrong_shape_raises(tmp_path):
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_weights(save("llama", tmp_path), lambda weights: weights.update({name: torch.zeros(8, 32)}))
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    for part in (str(tmp_path / "model.safetensors"), name, "(8, 32)", "(16, 32)"):
        assert part in str(error.value)
