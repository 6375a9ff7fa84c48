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

from s2r.hf.config import read_json

SHARD_BYTES = 5 * 10**9  # size at which `save` starts the next file


def places(model) -> dict[str, tuple[torch.nn.Parameter, int, int]]:
    """Hugging Face name → our parameter, its first row and the row after its last. For reading and writing."""
    c = model.config
    q, kv, F = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    parts = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    halves = {"gate": (0, F), "up": (F, 2 * F)}
    whole = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm.weight}
    if model.head is not None:
        whole["lm_head.weight"] = model.head
    found = {}
    for i, block in enumerate(model.blocks):
        at = f"model.layers.{i}."
        whole[at + "input_layernorm.weight"] = block.attention_norm.weight
        whole[at + "post_attention_layernorm.weight"] = block.mlp_norm.weight
        whole[at + "self_attn.o_proj.weight"] = block.o.weight
        whole[at + "mlp.down_proj.weight"] = block.down.weight
        if c.qk_norm:
            whole[at + "self_attn.q_norm.weight"] = block.q_norm.weight
            whole[at + "self_attn.k_norm.weight"] = block.k_norm.weight
        for name, rows in parts.items():
            found[at + f"self_attn.{name}_proj.weight"] = block.qkv.weight, *rows
            if c.qkv_bias:
                found[at + f"self_attn.{name}_proj.bias"] = block.qkv.bias, *rows
        for name, rows in halves.items():
            found[at + f"mlp.{name}_proj.weight"] = block.gate_up.weight, *rows
    return found | {name: (p, 0, len(p)) for name, p in whole.items()}


def views(model) -> dict[str, torch.Tensor]:
    """Hugging Face name → view of our parameter's rows."""
    return {name: p.detach()[start:end] for name, (p, start, end) in places(model).items()}


@torch.no_grad()
def load(model, folder: str | Path) -> None:
    """Fill the parameters of `model` from the folder. Where they are spread over ranks, each reads its own rows.

    Raises FileNotFoundError for a missing file, and ValueError for a file that cannot be read and for weights that
    are missing, unexpected or of another shape.
    """
    wanted = places(model)
    missing = set(wanted)
    for shard in shards(Path(folder)):
        try:
            with safe_open(shard, framework="pt", device=str(own_rows(model.embed)[0].device)) as file:
                for name in file.keys():
                    if name in wanted:
                        _read(shard, name, file.get_slice(name), *wanted[name])
                        missing.discard(name)
                    elif name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tied):
                        continue  # derived from the config, or a second copy of the embedding
                    else:
                        raise ValueError(f"{shard}: unexpected weight {name}; is config.json of another model?")
        except SafetensorError as error:
            raise ValueError(f"{shard}: not a whole safetensors file ({error}); fetch it again") from None
    if missing:
        raise ValueError(f"{folder}: {len(missing)} weights missing, the first is {min(missing)}; fetch it again")


def _read(shard: Path, name: str, weight, p: torch.nn.Parameter, start: int, end: int) -> None:
    """Copy one weight of the file into rows start … end of parameter p, as far as this rank has them."""
    found, wanted = tuple(weight.get_shape()), (end - start, *p.shape[1:])
    if found != wanted:
        raise ValueError(f"{shard}: {name} is {found}, config.json says {wanted}; fetch both files again")
    ours, first = own_rows(p)
    low, high = max(start, first), min(end, first + len(ours))
    if low < high:
        ours[low - first : high - first].copy_(weight[low - start : high - start])


def own_rows(p: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a parameter, and the number of the first: all of them, unless FSDP has spread it."""
    if not isinstance(p, DTensor):
        return p, 0
    rows = -(-len(p) // p.device_mesh.size())  # the last ranks may have fewer
    return p.to_local(), rows * p.device_mesh.get_local_rank()


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

    Raises ValueError when the model was not read from a Hugging Face folder and has no config.json to write.
    """
    folder = Path(folder)
    if model.config.hf is None:
        raise ValueError("save_pretrained needs ModelConfig.hf, the config.json to write")
    folder.mkdir(parents=True, exist_ok=True)
    weights, groups, size = views(model), [[]], 0
    for name, view in weights.items():
        bytes = view.numel() * dtype.itemsize
        if size + bytes > SHARD_BYTES and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes
    files = ["model.safetensors"]
    if len(groups) > 1:
        files = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
        index = {name: file for file, group in zip(files, groups) for name in group}
        total = sum(view.numel() * dtype.itemsize for view in weights.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text)
    for file, group in zip(files, groups):  # one file in memory at a time
        copies = {name: weights[name].to("cpu", dtype, copy=True).contiguous() for name in group}
        save_file(copies, folder / file, {"format": "pt"})
        del copies
    hf = {key: value for key, value in model.config.hf.items() if key not in ("torch_dtype", "dtype")}
    hf["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
