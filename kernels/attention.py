"""Causal attention over packed sequences (training, prefill) and over a slot cache (decoding).

A packed batch lays S sequences end to end in one flat array of T tokens; `cu_seqlens` holds the S + 1 borders:

    tokens       a a a a b b c c c
    cu_seqlens   0       4   6     9

No token sees another sequence, so there is nothing to pad and no mask to store. Called by `s2r/model.py`.
"""

import torch
import torch.nn.functional as F


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Causal softmax(q·kᵀ/√E)·v inside each sequence of a pack; query head h reads key/value head h // (H/G).

    q (T, H, E), k and v (T, G, E), one floating dtype; cu_seqlens (S+1,) integer, first 0, last T. Returns (T, H, E).
    """
    return attention_torch(q, k, v, cu_seqlens)


def attention_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """`attention` in PyTorch: one fused call per sequence, which on a CPU beats one call under a (T, T) mask."""
    group = q.shape[1] // k.shape[1]
    # One copy of k and v per query head here, because SDPA on the CPU is slower when it does the same itself.
    q, k, v = q.transpose(0, 1), *(x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))  # (H, T, E)
    lengths = cu_seqlens.diff().tolist()
    # split, not slices: its backward is one concatenation, that of a slice a whole (H, T, E) of zeros per sequence.
    parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v)))
    out = [F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0] for q, k, v in parts]
    return torch.cat(out, dim=1).transpose(0, 1)  # (T, H, E)


def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Attention of one new token per row over that row's cache, its own key and value included.

    q (S, H, E); k_cache and v_cache (S, C, G, E), of which row s holds `lengths[s]` tokens; lengths (S,) integer, ≥ 1.
    Returns (S, H, E).
    """
    return decode_attention_torch(q, k_cache, v_cache, lengths)


def decode_attention_torch(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """`decode_attention` in PyTorch: the H/G query heads that share a key head stand as that head's "query length"."""
    S, H, E = q.shape
    G = k_cache.shape[2]
    longest = int(lengths.max())
    k, v = (x[:, :longest].transpose(1, 2) for x in (k_cache, v_cache))  # (S, G, C, E), views
    filled = None
    if S > 1:
        filled = (torch.arange(longest, device=q.device) < lengths[:, None])[:, None, None]  # (S, 1, 1, C)
    out = F.scaled_dot_product_attention(q.view(S, G, H // G, E), k, v, attn_mask=filled)  # (S, G, H/G, E)
    return out.reshape(S, H, E)
