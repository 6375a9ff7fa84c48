"""The weights of a Hugging Face folder: which of our parameters each name is, reading them and writing them.

    q_proj  (H·E, D) ─┐                        gate_proj (F, D) ─┐
    k_proj  (G·E, D) ─┼─ qkv ((H+2G)·E, D)     up_proj   (F, D) ─┴─ gate_up (2F, D)
    v_proj  (G·E, D) ─┘                        every other weight is a parameter of its own

A model is handed in; only its `config`, `embed`, `blocks`, `norm` and `head` are used. Called by
`Transformer.from_pretrained` and `Transformer.save_pretrained` in `s2r/model.py`.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from s2r.hf import adapter
from s2r.hf.config import read_json

SHARD_BYTES = 5 * 10**9  # size at which `save` starts the next file


def places(model) -> dict[str, tuple[torch.nn.Parameter, int, int]]:
    """Hugging Face name → our parameter, its first row and the row after its last. For reading and writing."""
    c = model.config
    q, kv, F = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    whole = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm.weight}
    if model.head is not None:
        whole["lm_head.weight"] = model.head
    found = {name: (p, 0, len(p)) for name, p in whole.items()}
    for i, block in enumerate(model.blocks):
        for name, module, *rows in (
            ("input_layernorm", block.attention_norm),
            ("self_attn.q_proj", block.qkv, 0, q),
            ("self_attn.k_proj", block.qkv, q, q + kv),
            ("self_attn.v_proj", block.qkv, q + kv, q + 2 * kv),
            ("self_attn.q_norm", block.q_norm),  # None but for Qwen3
            ("self_attn.k_norm", block.k_norm),
            ("self_attn.o_proj", block.o),
            ("post_attention_layernorm", block.mlp_norm),
            ("mlp.gate_proj", block.gate_up, 0, F),
            ("mlp.up_proj", block.gate_up, F, 2 * F),
            ("mlp.down_proj", block.down),
        ):
            # "weight", and of Qwen2's q, k, v a "bias"; LoRA's are in adapter.py.
            for kind, p in module.named_parameters(recurse=False) if module else ():
                found[f"model.layers.{i}.{name}.{kind}"] = p, *(rows or (0, len(p)))
    return found


@torch.no_grad()
def load(model, folder: str | Path) -> None:
    """Fill the parameters of `model` from the folder. Where they are spread over ranks, each reads its own rows.

    Raises FileNotFoundError for a missing file, and ValueError for a file that cannot be read and for weights that
    are missing, unexpected or of another shape.
    """
    wanted = places(model)
    for shard in shards(Path(folder)):
        try:
            with safe_open(shard, framework="pt", device=str(model.embed.device)) as file:
                for name in file.keys():
                    if name in wanted:
                        _read(shard, name, file.get_slice(name), *wanted.pop(name))
                    elif name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tied):
                        continue  # derived from the config, or a second copy of the embedding
                    else:
                        raise ValueError(f"{shard}: unexpected weight {name}; is config.json of another model?")
        except SafetensorError as error:
            raise ValueError(f"{shard}: not a whole safetensors file ({error}); fetch it again") from None
    if wanted:
        raise ValueError(f"{folder}: {len(wanted)} weights missing, the first is {min(wanted)}; fetch it again")


def _read(shard: Path, name: str, weight, p: torch.nn.Parameter, start: int, end: int) -> None:
    """Copy one weight of the file into rows start … end of parameter p, only those that this rank has."""
    found, wanted = tuple(weight.get_shape()), (end - start, *p.shape[1:])
    if found != wanted:
        raise ValueError(f"{shard}: {name} is {found}, config.json says {wanted}; fetch both files again")
    ours, first = local_rows(p)
    low, high = max(start, first), min(end, first + len(ours))
    if low < high:
        ours[low - first : high - first].copy_(weight[low - start : high - start])


def local_rows(p: torch.nn.Parameter) -> tuple[torch.Tensor, int]:
    """The rows of a parameter that this rank has, and the number of the first."""
    if not isinstance(p, DTensor):
        return p, 0
    # Spread by FSDP: the same number of rows to every rank, to the last ones fewer.
    return p.to_local(), -(-len(p) // p.device_mesh.shape[-1]) * p.device_mesh.get_coordinate()[-1]


def shards(folder: Path) -> list[Path]:
    """The weight files of a folder: one, or those that its index names. Raises as `load`."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor model.safetensors.index.json")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: names no shard; fetch the file again")
    files = [folder / name for name in sorted(set(map(str, names.values())))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing, though {index.name} names it; fetch the folder again")
    return files


def save(model, folder: str | Path, dtype: torch.dtype) -> None:
    """Write config.json and the weights in `dtype`, in one file or, beyond SHARD_BYTES, in several with an index.

    A LoRA is added to its matrix in fp32, and the sum is rounded once; folder/adapter has it in the format of PEFT.
    Raises ValueError when the model was not read from a Hugging Face folder and has no config.json to write.
    """
    folder = Path(folder)
    if model.config.hf is None:
        raise ValueError("save_pretrained needs ModelConfig.hf, the config.json to write")
    folder.mkdir(parents=True, exist_ok=True)
    weights, loras = places(model), adapter.loras(model)
    sizes = {name: p[start:end].numel() * dtype.itemsize for name, (p, start, end) in weights.items()}
    groups, room = [], 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(name)
        room -= size
    files = ["model.safetensors"]
    if len(groups) > 1:
        files = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
        index = {name: file for file, group in zip(files, groups) for name in group}
        text = json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text)
    for file, group in zip(files, groups):  # one file in memory at a time
        copies = {}
        for name in group:
            p, start, end = weights[name]
            weight = p.detach()[start:end]
            if lora := loras.get(p):
                weight = weight.float() + lora.scale * (lora.B[start:end] @ lora.A).detach()
            copies[name] = weight.to("cpu", dtype, copy=True).contiguous()
        save_file(copies, folder / file, {"format": "pt"})
    if loras:
        adapter.save(weights, loras, folder / "adapter")
    hf = {key: value for key, value in model.config.hf.items() if key not in ("torch_dtype", "dtype")}
    hf["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
