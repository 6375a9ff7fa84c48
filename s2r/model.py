"""The policy: a decoder-only transformer over packed tokens, in the shape that Hugging Face folders hold.

    ids ─ embed ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─ … ─ norm ─ hidden ─ head ─ logits
                 └────────────────────┘   └──────────────┘       L blocks

One class serves Llama 3.x, SmolLM2, Mistral, Qwen2/2.5 and Qwen3; what differs between them is read from
`config.json`. Training, scoring, prefill and cached decoding run through the same blocks: they differ only in the
function that the blocks are given to attend with. Called by the sampler, by `s2r/rl.py` and by the three scripts.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention, decode_attention
from kernels.linear import linear, prepack
from s2r.hf.config import ModelConfig, read_json

SHARD_BYTES = 5 * 10**9  # size at which `save_pretrained` starts the next file


class Linear(nn.Module):
    """x·Wᵀ + b in the dtype of x: the weights may be fp32 master weights while the activations are bf16."""

    def __init__(self, d_in: int, d_out: int, bias: bool, **where):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in, **where))
        self.bias = nn.Parameter(torch.empty(d_out, **where)) if bias else None
        self.packed: torch.Tensor | None = None  # see Transformer.prepacked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.weight.to(x.dtype), bias, self.packed)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, the division in fp32."""

    def __init__(self, size: int, eps: float, **where):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **where))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q (T, H, E), k (T, G, E), v (T, G, E)) -> (T, H, E): how a block attends, chosen by who runs the model."""


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + SwiGLU(norm(x)). q, k, v and gate, up are one matrix each."""

    def __init__(self, config: ModelConfig, layer: int, **where):
        super().__init__()
        c, self.config, self.layer = config, config, layer
        width = c.num_heads * c.head_dim
        self.attention_norm = RMSNorm(c.hidden_size, c.norm_eps, **where)
        self.qkv = Linear(c.hidden_size, width + 2 * c.num_kv_heads * c.head_dim, c.qkv_bias, **where)
        self.o = Linear(width, c.hidden_size, False, **where)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps, **where) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps, **where) if c.qk_norm else None
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps, **where)
        self.gate_up = Linear(c.hidden_size, 2 * c.intermediate_size, False, **where)
        self.down = Linear(c.intermediate_size, c.hidden_size, False, **where)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        c = self.config
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, c.head_dim))  # (T, H+2G, E)
        q, k, v = qkv.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)  # (T, H, E)
        x = x + self.o(out.flatten(1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)  # (T, F) each
        return x + self.down(F.silu(gate) * up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) of x (T, heads, E) by cos, sin (T, 1, E); the first half of `sin` is negated.

    Hugging Face weights pair dimension e with e + E/2, hence the roll by half a head.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Angular speed per position of each rotary pair, (E/2,) fp32, with Llama 3.1's scaling where the config has it.

    Llama 3.1 divides the speed by `factor` for wavelengths beyond the old context and blends in between:
    github.com/meta-llama/llama-models, models/llama3/model.py.
    """
    E = config.head_dim
    speed = config.rope_theta ** (-torch.arange(0, E, 2, dtype=torch.float32) / E)
    s = config.rope_scaling
    if s is None:
        return speed
    turns = s["original_max_position_embeddings"] * speed / (2 * math.pi)  # full turns within the old context
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow pair, scaled; 1: fast pair, as it was
    return speed * (kept + (1 - kept) / s["factor"])


class Cache:
    """Keys and values of up to S rows, C tokens each, and how many tokens each row holds.

    k, v (L, S, C, G, E), the tokens of one head next to each other in memory; lengths (S,) int64. The sampler fills it.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, rows, config.num_kv_heads, capacity, config.head_dim)
        # Zeros, because what lies beyond a row's length is masked, and a masked NaN would still poison a sum.
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device).transpose(2, 3) for _ in "kv")
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)


class Transformer(nn.Module):
    """The policy network. `dtype` is that of the activations; the weights may be kept in another (`param_dtype`)."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        param_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.checkpointing = False  # recompute each block's activations in the backward pass
        self.vocab_size = config.vocab_size  # V; the tokenizer's size where the embedding has unused rows beyond it
        where = {"dtype": param_dtype or dtype, "device": device}
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, **where))
        self.blocks = nn.ModuleList(Block(config, layer, **where) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, **where)
        self.packed_head: torch.Tensor | None = None
        self.head = None if config.tied else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, **where))
        self.register_buffer("speed", inverse_frequencies(config).to(device), persistent=False)

    def forward(self, ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Hidden states (T, D) after the last norm, of packed ids (T,) int64 with borders cu_seqlens (S+1,) int64."""
        return self._run(ids, positions(cu_seqlens, len(ids)), lambda layer, q, k, v: attention(q, k, v, cu_seqlens))

    def prefill(self, ids: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of every layer, each (L, T, G, E), of a pack such as `forward` takes, for a cache."""
        keys, values = [], []

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys.append(k)
            values.append(v)
            return attention(q, k, v, cu_seqlens)

        self._run(ids, positions(cu_seqlens, len(ids)), attend)
        return torch.stack(keys), torch.stack(values)

    def decode(self, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Append ids (S,), one token to each of the cache's first S rows; hidden states (S, D) of those tokens."""
        S = ids.shape[0]
        rows, at = torch.arange(S, device=ids.device), cache.lengths[:S]
        lengths = at + 1

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cache.k[layer, rows, at], cache.v[layer, rows, at] = k, v
            return decode_attention(q, cache.k[layer, :S], cache.v[layer, :S], lengths)

        hidden = self._run(ids, at, attend)
        cache.lengths[:S] = lengths
        return hidden

    def _run(self, ids: torch.Tensor, position: torch.Tensor, attend: Attend) -> torch.Tensor:
        angle = torch.outer(position.float(), self.speed)[:, None]  # (T, 1, E/2)
        cos = torch.cat((angle.cos(), angle.cos()), dim=-1).to(self.dtype)
        sin = torch.cat((-angle.sin(), angle.sin()), dim=-1).to(self.dtype)
        x = F.embedding(ids, self.embed).to(self.dtype)  # (T, D)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend)
        return self.norm(x)

    @property
    def head_weight(self) -> torch.Tensor:
        """The head's matrix (V, D) in the activations' dtype, cut to the tokenizer's vocabulary."""
        weight = self.embed if self.head is None else self.head
        return weight[: self.vocab_size].to(self.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (T, V) of hidden states (T, D)."""
        return linear(hidden, self.head_weight, packed=self.packed_head)

    @contextmanager
    def prepacked(self, rows: int) -> Iterator[None]:
        """For many decode steps of about `rows` rows with fixed weights: on a CPU, hold them laid out for that."""
        layers = [module for module in self.modules() if isinstance(module, Linear)]
        try:
            for layer in layers:
                layer.packed = prepack(layer.weight, rows)
            self.packed_head = prepack(self.head_weight, rows)
            yield
        finally:
            for layer in layers:
                layer.packed = None
            self.packed_head = None

    @torch.no_grad()
    def copy_from(self, other: "Transformer") -> None:
        """Take over the weights of a model of the same shape, cast to the dtype of this one's, and its vocabulary.

        The other's parameters may be spread over ranks; all of them have to call this then.
        """
        self.vocab_size = other.vocab_size
        for ours, theirs in zip(self.parameters(), other.parameters(), strict=True):
            ours.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)

    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Fresh weights as GPT-2 draws them: normal, the two matrices that end a residual branch scaled down."""
        generator = torch.Generator(self.embed.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
            else:
                branch_end = name.endswith(("o.weight", "down.weight"))
                scale = std / math.sqrt(2 * self.config.num_layers) if branch_end else std
                nn.init.normal_(p, std=scale, generator=generator)

    def hf_places(self) -> dict[str, tuple[nn.Parameter, int, int]]:
        """Hugging Face weight name → our parameter, first row and row after the last: the one map to load and to save."""
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        parts = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
        halves = {"gate": (0, c.intermediate_size), "up": (c.intermediate_size, 2 * c.intermediate_size)}
        whole = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm.weight}
        if self.head is not None:
            whole["lm_head.weight"] = self.head
        places = {}
        for i, block in enumerate(self.blocks):
            at = f"model.layers.{i}."
            whole[at + "input_layernorm.weight"] = block.attention_norm.weight
            whole[at + "post_attention_layernorm.weight"] = block.mlp_norm.weight
            whole[at + "self_attn.o_proj.weight"] = block.o.weight
            whole[at + "mlp.down_proj.weight"] = block.down.weight
            for name, rows in parts.items():
                places[at + f"self_attn.{name}_proj.weight"] = block.qkv.weight, *rows
                if c.qkv_bias:
                    places[at + f"self_attn.{name}_proj.bias"] = block.qkv.bias, *rows
            for name, rows in halves.items():
                places[at + f"mlp.{name}_proj.weight"] = block.gate_up.weight, *rows
            if c.qk_norm:
                whole[at + "self_attn.q_norm.weight"] = block.q_norm.weight
                whole[at + "self_attn.k_norm.weight"] = block.k_norm.weight
        return places | {name: (p, 0, len(p)) for name, p in whole.items()}

    def hf_weights(self) -> dict[str, torch.Tensor]:
        """Hugging Face weight name → view of our parameter."""
        return {name: p.detach()[start:end] for name, (p, start, end) in self.hf_places().items()}

    @classmethod
    @torch.no_grad()
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        param_dtype: torch.dtype | None = None,
        spread: Callable[["Transformer"], None] | None = None,
    ) -> "Transformer":
        """The model of a Hugging Face folder, every tensor read once, straight into its place, dtype and device.

        `spread` is called on the model while it has no memory yet, and may spread its parameters over ranks: each then
        reads the rows that are its own. Raises FileNotFoundError for a missing file, ValueError for an unsupported
        config, a shard that cannot be read, and weights that are missing, unexpected or of another shape.
        """
        folder = Path(folder)
        model = cls(ModelConfig.from_folder(folder), dtype, "meta", param_dtype)
        if spread:
            spread(model)
        model.to_empty(device=device)
        model.speed = inverse_frequencies(model.config).to(device)
        places = model.hf_places()
        missing = set(places)
        for shard in _shards(folder):
            try:
                with safe_open(shard, framework="pt", device=str(device)) as file:
                    for name in file.keys():
                        if name not in places:
                            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tied):
                                continue  # derived from the config, or a second copy of the embedding
                            raise ValueError(f"{shard}: unexpected weight {name}; is config.json of another model?")
                        (p, start, end), weight = places[name], file.get_slice(name)
                        found, wanted = tuple(weight.get_shape()), (end - start, *p.shape[1:])
                        if found != wanted:
                            raise ValueError(f"{shard}: {name} is {found}, config.json says {wanted}")
                        ours, first = own_rows(p)
                        low, high = max(start, first), min(end, first + len(ours))
                        if low < high:
                            ours[low - first : high - first].copy_(weight[low - start : high - start])
                        missing.discard(name)
            except SafetensorError as error:
                raise ValueError(f"{shard}: not a whole safetensors file ({error}); fetch it again") from None
        if missing:
            raise ValueError(f"{folder}: {len(missing)} weights are missing, the first is {min(missing)}")
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and the weights (in `dtype`, default that of the activations) as Hugging Face names them.

        Raises ValueError when the model was not read from a Hugging Face folder and has no config.json to write.
        """
        folder, dtype = Path(folder), dtype or self.dtype
        if self.config.hf is None:
            raise ValueError("save_pretrained needs ModelConfig.hf, the config.json to write")
        folder.mkdir(parents=True, exist_ok=True)
        views, shards, size = self.hf_weights(), [[]], 0
        for name, view in views.items():
            size += view.numel() * dtype.itemsize
            if size > SHARD_BYTES and shards[-1]:
                shards.append([])
                size = view.numel() * dtype.itemsize
            shards[-1].append(name)
        files = ["model.safetensors"]
        if len(shards) > 1:
            files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
            index = {name: file for file, shard in zip(files, shards) for name in shard}
            total = sum(view.numel() * dtype.itemsize for view in views.values())
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
            (folder / "model.safetensors.index.json").write_text(text)
        for file, shard in zip(files, shards):  # one shard in memory at a time; copies, because views share storage
            save_file(
                {n: views[n].to("cpu", dtype, copy=True).contiguous() for n in shard}, folder / file, {"format": "pt"}
            )
        hf = {k: v for k, v in self.config.hf.items() if k not in ("torch_dtype", "dtype")}
        hf["torch_dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


def positions(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """Position of each of T packed tokens in its own sequence, (T,) int64."""
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    return torch.arange(T, device=cu_seqlens.device) - starts.repeat_interleave(lengths, output_size=T)


def own_rows(p: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a parameter, and the number of the first: all of them, unless FSDP has spread it."""
    if not isinstance(p, DTensor):
        return p, 0
    rows = -(-len(p) // p.device_mesh.size())  # of every rank but the last ones
    return p.to_local(), rows * p.device_mesh.get_local_rank()


def _shards(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder, one or those that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor model.safetensors.index.json")
    shards = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    if not shards:
        raise ValueError(f"{index}: names no shard; fetch the file again")
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: missing, though {index.name} names it; fetch the folder again")
    return shards
