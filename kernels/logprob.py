"""log p of given tokens, their entropy, and the KL to a second model, without ever holding the (T, V) logits.

With z = h·Wᵀ/τ the logits of one token, target y and p = softmax(z):

    forward    logp = z_y − log Σ e^z      entropy = log Σ e^z − Σ p·z      kl = Σ p·(log p − log p_ref)
    backward   dz = g_logp·(onehot(y) − p) + g_kl·p·(log p − log p_ref − kl)      dh = dz·W/τ      dW = dzᵀ·h/τ

Both directions walk over chunks of tokens and keep one chunk of logits alive; the backward computes it again instead
of saving it. At T = 8,192 and V = 151,936 the logits in fp32 would take 5 GB, with their gradient 10 GB.
Called by `s2r/packing.py` (policy and reference of the RL step) and `train_sft.py`.
"""

import torch

CHUNK_ELEMENTS = 2**22  # logits of one chunk, 16 MB in fp32; two or three such buffers are alive at a time


def token_logp(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) and entropy per token, in nats, of softmax(hidden·weightᵀ / temperature).

    hidden (T, D) and weight (V, D) of one floating dtype, targets (T,) int64 in [0, V), temperature > 0.
    Returns logp (T,) fp32 ≤ 0, with gradients to hidden and weight, and entropy (T,) fp32 without.
    """
    logp, entropy, _ = _Head.apply(hidden, weight, targets, temperature, None, None)
    return logp, entropy


def token_logp_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    hidden_ref: torch.Tensor,
    weight_ref: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`token_logp` at temperature 1, and per token KL(p ‖ p_ref) over the whole vocabulary, in nats.

    hidden_ref (T, D_ref) and weight_ref (V, D_ref) belong to the second model and get no gradient.
    Returns logp (T,), entropy (T,), kl (T,) ≥ 0, all fp32; logp and kl have gradients to hidden and weight.
    """
    return _Head.apply(hidden, weight, targets, 1.0, hidden_ref, weight_ref)


class _Head(torch.autograd.Function):
    """The maths of the module docstring, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, hidden_ref, weight_ref):
        T = hidden.shape[0]
        logp, entropy = hidden.new_empty(T, dtype=torch.float32), hidden.new_empty(T, dtype=torch.float32)
        kl = hidden.new_zeros(T, dtype=torch.float32)
        for chunk in _chunks(T, weight.shape[0]):
            log_p = _log_softmax(hidden[chunk], weight, temperature)  # (t, V)
            logp[chunk] = log_p.gather(1, targets[chunk, None])[:, 0]
            p = log_p.exp()
            entropy[chunk] = -torch.linalg.vecdot(p, log_p)
            if hidden_ref is not None:
                log_p -= _log_softmax(hidden_ref[chunk], weight_ref, temperature)
                kl[chunk] = torch.linalg.vecdot(p, log_p)
        ctx.save_for_backward(hidden, weight, targets, hidden_ref, weight_ref, kl)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy, kl

    @staticmethod
    def backward(ctx, grad_logp, _, grad_kl):
        hidden, weight, targets, hidden_ref, weight_ref, kl = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for chunk in _chunks(hidden.shape[0], weight.shape[0]):
            log_p = _log_softmax(hidden[chunk], weight, ctx.temperature)  # (t, V)
            if hidden_ref is None:
                grad_z = log_p.exp_().mul_(-grad_logp[chunk, None])
            else:
                p = log_p.exp()
                log_p -= _log_softmax(hidden_ref[chunk], weight_ref, ctx.temperature)
                grad_z = log_p.sub_(kl[chunk, None]).mul_(grad_kl[chunk, None]).sub_(grad_logp[chunk, None]).mul_(p)
            grad_z.scatter_add_(1, targets[chunk, None], grad_logp[chunk, None])
            grad_z = grad_z.div_(ctx.temperature).to(hidden.dtype)
            grad_hidden[chunk] = grad_z @ weight
            if hidden.dtype == torch.float32:
                grad_weight.addmm_(grad_z.T, hidden[chunk])  # in place: a second (V, D) would be the largest buffer
            else:
                grad_weight += grad_z.T @ hidden[chunk]  # products in bf16, their sum in fp32
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _log_softmax(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities (t, V) in fp32 of one chunk of hidden states (t, D)."""
    return torch.log_softmax((hidden @ weight.T).float().div_(temperature), dim=-1)


def _chunks(T: int, V: int) -> list[slice]:
    """Slices of at most CHUNK_ELEMENTS logits that cover T tokens."""
    step = max(1, CHUNK_ELEMENTS // V)
    return [slice(t, min(t + step, T)) for t in range(0, T, step)]
