"""The policy: a decoder-only transformer over packed tokens, in the shape that Hugging Face folders hold.

    ids ─ embed ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─ … ─ norm ─ hidden ─ head ─ logits
                 └────────────────────┘   └──────────────┘       L blocks

One class serves Llama 3.x, SmolLM2, Mistral, Qwen2/2.5 and Qwen3; what differs between them is read from
`config.json`. Training, scoring, prefill and cached decoding run through the same blocks; they differ only in
the function that the blocks attend with. Called by `s2r/packing.py` (training and scoring) and by
`s2r/generate.py` (sampling); folders are read and written by `s2r/hf/weights.py`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention
from kernels.decode import decode_attention
from kernels.elementwise import rotate, swiglu
from kernels.linear import linear, prepack
from s2r.hf import weights
from s2r.hf.config import ModelConfig


class Linear(nn.Module):
    """x·Wᵀ + b in the dtype of x: the weights may be fp32 master weights while the activations are bf16."""

    def __init__(self, d_in: int, d_out: int, bias: bool, **where):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in, **where))
        self.bias = nn.Parameter(torch.empty(d_out, **where)) if bias else None
        self.packed: torch.Tensor | None = None  # see `Transformer.prepacked`
        self.lora: LoRA | None = None  # see `Transformer.add_lora`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out = linear(x, self.weight.to(x.dtype), bias, self.packed)
        if self.lora is not None and self.lora.on:
            out = out + self.lora(x)
        return out


class LoRA(nn.Module):
    """α/r·B·A·x, of rank r, beside a frozen matrix (arXiv 2106.09685); A (r, d_in) and B (d_out, r) are fp32."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float, device: torch.device):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, d_in, device=device))
        self.B = nn.Parameter(torch.empty(d_out, rank, device=device))
        self.scale, self.on = alpha / rank, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scale


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, the division in fp32."""

    def __init__(self, size: int, eps: float, **where):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **where))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q (T, H, E), k (T, G, E), v (T, G, E)) -> (T, H, E): how a block attends, chosen by the caller."""


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + SwiGLU(norm(x)). q, k, v are one matrix, gate and up too."""

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
        return x + self.down(swiglu(self.gate_up(self.mlp_norm(x))))  # gate and up: (T, 2F)


class Cache:
    """Keys and values of up to S rows, C tokens each, and how many tokens each row holds.

    k, v (L, S, C, G, E), the tokens of one head next to each other in memory; lengths (S,) int64.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, rows, config.num_kv_heads, capacity, config.head_dim)
        # Zeros, because what lies beyond a row's length is masked, and a masked NaN would still poison a sum.
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device).transpose(2, 3) for _ in "kv")
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)


class Transformer(nn.Module):
    """The policy network. `dtype` is that of the activations; the weights may have another (`param_dtype`)."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
        param_dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        self.config, self.dtype = config, dtype
        self.checkpointing = False  # recompute each block's activations in the backward pass
        self.vocab_size = config.vocab_size  # V; the tokenizer's, if the embedding has unused rows beyond it
        where = {"dtype": param_dtype or dtype, "device": device}
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, **where))  # (V, D)
        self.blocks = nn.ModuleList(Block(config, layer, **where) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, **where)
        self.head = None if config.tied else nn.Parameter(torch.empty_like(self.embed))  # (V, D)
        self.packed: torch.Tensor | None = None  # the head's matrix, see `prepacked`
        self.register_buffer("speed", config.inverse_frequencies().to(device), persistent=False)  # of rotation, (E/2,)

    def forward(
        self, ids: torch.Tensor, cu_seqlens: torch.Tensor, prefix: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states (T, D) after the last norm of packed ids (T,) with borders cu_seqlens (S+1,), int64 both.

        prefix (S,) int64: the sequence that each one continues, or itself (`kernels/attention.py`); None: all stand alone.
        """
        position = positions(cu_seqlens, len(ids), prefix)  # (T,)
        return self._run(ids, position, lambda layer, q, k, v: attention(q, k, v, cu_seqlens, prefix))

    def prefill(self, ids: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of every layer, each (L, T, G, E), for a cache; ids and cu_seqlens as in `forward`."""
        c = self.config
        shape = (c.num_layers, len(ids), c.num_kv_heads, c.head_dim)
        keys, values = (torch.empty(shape, dtype=self.dtype, device=ids.device) for _ in "kv")

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys[layer], values[layer] = k, v  # copied: v is a view of q, k and v together
            return attention(q, k, v, cu_seqlens)

        self._run(ids, positions(cu_seqlens, len(ids)), attend)
        return keys, values

    def decode(self, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Append ids (S,), a token to each of the cache's first S rows; hidden states (S, D) of those tokens."""
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
        """Hidden states (T, D) after the last norm, of ids (T,) at these positions (T,)."""
        angle = torch.outer(position.float(), self.speed)[:, None]  # (T, 1, E/2)
        cos = torch.cat((angle.cos(), angle.cos()), dim=-1).to(self.dtype)  # (T, 1, E)
        sin = torch.cat((-angle.sin(), angle.sin()), dim=-1).to(self.dtype)  # as `rotate` wants it: first half negated
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
        """Logits (T, V) of hidden states (T, D); for the sampler on a GPU in fp32, as the trainer's are there."""
        if hidden.is_cuda and hidden.dtype != torch.float32 and not torch.is_grad_enabled():
            weight = self.embed if self.head is None else self.head  # all rows: an odd number of columns is slow
            return torch.mm(hidden, weight.to(self.dtype).T, out_dtype=torch.float32)[:, : self.vocab_size]
        return linear(hidden, self.head_weight, packed=self.packed)

    @contextmanager
    def prepacked(self, rows: int) -> Iterator[None]:
        """On a CPU, hold the weights laid out for many decode steps of about `rows` rows; they must not change."""
        matrices = [(module, module.weight) for module in self.modules() if isinstance(module, Linear)]
        matrices.append((self, self.head_weight))
        try:
            for module, weight in matrices:
                module.packed = prepack(weight, rows)
            yield
        finally:
            for module, _ in matrices:
                module.packed = None

    @torch.no_grad()
    def copy_from(self, other: "Transformer") -> None:
        """Copy the weights of a model of the same shape, cast to this one's dtype, and take its vocabulary.

        The other's parameters may be spread over ranks; all of them have to call this then.
        """
        self.vocab_size = other.vocab_size
        for ours, theirs in zip(self.parameters(), other.parameters(), strict=True):
            # Cast first: ranks exchange half the bytes.
            ours.copy_(theirs.to(ours.dtype).full_tensor() if isinstance(theirs, DTensor) else theirs)

    def add_lora(self, rank: int, alpha: float) -> None:
        """Freeze all weights and put adapters beside the matrices of the blocks; `init_lora` gives them values."""
        self.requires_grad_(False)
        for block in self.blocks:
            for module in block.children():
                if isinstance(module, Linear):
                    module.lora = LoRA(*module.weight.T.shape, rank, alpha, module.weight.device)

    @torch.no_grad()
    def init_lora(self, seed: int) -> None:
        """A uniform in ±1/√d_in, as in PEFT, and B zero: still the base. The same values on any number of ranks."""
        generator = torch.Generator().manual_seed(seed)
        for lora in self.adapters():
            A = (torch.rand(lora.A.shape, generator=generator) * 2 - 1) / math.sqrt(lora.A.shape[1])
            ours, first = weights.local_rows(lora.A)
            ours.copy_(A[first : first + len(ours)])
            weights.local_rows(lora.B)[0].zero_()

    def adapters(self) -> list[LoRA]:
        """The LoRA modules, block by block."""
        return [module for module in self.modules() if isinstance(module, LoRA)]

    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Random weights as in GPT-2: normal, the two matrices that end a residual branch scaled down."""
        generator = torch.Generator(self.embed.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
            else:
                ends_branch = name.endswith(("o.weight", "down.weight"))
                scale = std / math.sqrt(2 * self.config.num_layers) if ends_branch else std
                nn.init.normal_(p, std=scale, generator=generator)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
        param_dtype: torch.dtype | None = None, spread: Callable[["Transformer"], None] | None = None,
    ) -> "Transformer":  # fmt: skip
        """The model of a Hugging Face folder, every weight read straight into its place, dtype and device.

        `spread` is called on the model before it has memory, and may spread its parameters over ranks; each rank then
        reads its own rows only. Raises what `ModelConfig.from_folder` and `weights.load` raise.
        """
        model = cls(ModelConfig.from_folder(folder), dtype, "meta", param_dtype)
        if spread:
            spread(model)
        model.to_empty(device=device)
        model.speed = model.config.inverse_frequencies().to(device)  # to_empty has left it without values
        weights.load(model, folder)
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and the weights, in `dtype` or that of the activations. Raises as `weights.save`."""
        weights.save(self, folder, dtype or self.dtype)


class Frozen:
    """A model with LoRA as it was before training, π_ref or π_base: the same weights, run with the adapters off."""

    def __init__(self, model: Transformer):
        self.model = model

    @torch.no_grad()
    def __call__(
        self, ids: torch.Tensor, cu_seqlens: torch.Tensor, prefix: torch.Tensor | None = None
    ) -> torch.Tensor:
        adapters = self.model.adapters()
        try:
            for lora in adapters:
                lora.on = False
            return self.model(ids, cu_seqlens, prefix)
        finally:
            for lora in adapters:
                lora.on = True

    def __getattr__(self, name: str):
        if name == "model":  # not there yet: a copy that is being made
            raise AttributeError(name)
        return getattr(self.model, name)


def positions(cu_seqlens: torch.Tensor, T: int, prefix: torch.Tensor | None = None) -> torch.Tensor:
    """Position of each of T packed tokens in its own sequence, counted from the start of its prefix, (T,) int64."""
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    if prefix is not None:
        alone = prefix == torch.arange(len(prefix), device=prefix.device)
        starts = starts - lengths[prefix].masked_fill(alone, 0)
    return torch.arange(T, device=cu_seqlens.device) - starts.repeat_interleave(lengths, output_size=T)
