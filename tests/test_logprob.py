"""The chunked head against torch.log_softmax in float64 on all the logits at once: values, gradients, memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import logprob
from kernels.logprob import token_logp, token_logp_kl

T, D, D_REF, V = 37, 24, 20, 211  # V a prime: no chunk size divides it
CHUNKS = [1, 3 * V + 5, 10 * V, 2**24]  # elements: one token at a time, 3 tokens, 10 tokens, all
# fp32: rounding of sums of V terms. bf16: the logits themselves (|z| up to 16) are rounded to 8 bits, 2^-5 at most.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2}


@pytest.fixture(params=CHUNKS, ids=lambda size: f"chunk{size}")
def chunk(request, monkeypatch) -> int:
    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", request.param)
    return request.param


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """hidden (T, D), weight (V, D), targets (T,), hidden_ref (T, D_REF), weight_ref (V, D_REF), upstream (2, T)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(T, D), (V, D), (T, D_REF), (V, D_REF), (2, T)]
    hidden, weight, hidden_ref, weight_ref, upstream = (torch.randn(*size, generator=generator) for size in sizes)
    targets = torch.randint(V, (T,), generator=generator)
    targets[:3] = torch.tensor([0, V - 1, V - 1])
    rounded = (x.to(dtype) for x in (hidden, weight * 0.6))
    return *rounded, targets, hidden_ref.to(dtype), (weight_ref * 0.6).to(dtype), upstream


def exact(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0):
    """log p (T, V), logp (T,) and entropy (T,) in float64."""
    log_p = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    return log_p, log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
def test_token_logp_equals_log_softmax(temperature, dtype, chunk):
    hidden, weight, targets, _, _, (upstream, _) = inputs(dtype)
    exact_leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    _, wanted_logp, wanted_entropy = exact(*exact_leaves, targets, temperature)
    wanted = torch.autograd.grad(wanted_logp, exact_leaves, upstream.double())
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    logp, entropy = token_logp(hidden, weight, targets, temperature)
    assert logp.dtype == entropy.dtype == torch.float32 and logp.shape == entropy.shape == (T,)
    tolerance = TOLERANCE[dtype] / min(temperature, 1.0)
    torch.testing.assert_close(logp.double(), wanted_logp, atol=tolerance, rtol=0)
    torch.testing.assert_close(entropy.double(), wanted_entropy, atol=tolerance, rtol=0)
    assert (logp <= 0).all() and (entropy >= 0).all()
    for found, expected, leaf in zip(torch.autograd.grad(logp, leaves, upstream), wanted, leaves):
        assert found.dtype == dtype and found.shape == leaf.shape
        assert relative(found, expected) < {torch.float32: 5e-6, torch.bfloat16: 2e-2}[dtype]


def test_token_logp_kl_equals_log_softmax(chunk):
    hidden, weight, targets, hidden_ref, weight_ref, upstream = inputs()
    exact_leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    log_p, wanted_logp, wanted_entropy = exact(*exact_leaves, targets)
    log_ref, _, _ = exact(hidden_ref.double(), weight_ref.double(), targets)
    wanted_kl = (log_p.exp() * (log_p - log_ref)).sum(-1)
    wanted = torch.autograd.grad((wanted_logp, wanted_kl), exact_leaves, tuple(upstream.double()))
    leaves = [x.requires_grad_() for x in (hidden, weight, hidden_ref, weight_ref)]
    logp, entropy, kl = token_logp_kl(hidden, weight, targets, hidden_ref, weight_ref)
    for found, expected in ((logp, wanted_logp), (entropy, wanted_entropy), (kl, wanted_kl)):
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    assert (kl > 0).all()
    found = torch.autograd.grad((logp, kl), leaves, tuple(upstream), allow_unused=True)
    assert found[2] is None and found[3] is None  # the reference gets no gradient
    for one, expected in zip(found, wanted):
        assert relative(one, expected) < 5e-6


def test_token_logp_kl_gradient_of_each_part_alone():
    """A loss of kl only, and one of logp only: the other upstream gradient is then zero, not missing."""
    hidden, weight, targets, hidden_ref, weight_ref, _ = inputs()
    leaf = hidden.requires_grad_()
    both = torch.zeros_like(hidden)
    for part in (0, 2):
        both += torch.autograd.grad(token_logp_kl(leaf, weight, targets, hidden_ref, weight_ref)[part].sum(), leaf)[0]
    logp, _, kl = token_logp_kl(leaf, weight, targets, hidden_ref, weight_ref)
    torch.testing.assert_close(torch.autograd.grad((logp + kl).sum(), leaf)[0], both)
    alone, _ = token_logp(hidden, weight, targets)
    assert torch.equal(alone, logp)


def test_kl_of_equal_models_is_zero(chunk):
    hidden, weight, targets, *_ = inputs()
    leaf = hidden.clone().requires_grad_()
    _, _, kl = token_logp_kl(leaf, weight, targets, hidden, weight)
    assert torch.equal(kl, torch.zeros(T))
    assert torch.autograd.grad(kl.sum(), leaf)[0].abs().max() < 1e-6


def test_entropy_has_no_gradient():
    hidden, weight, targets, hidden_ref, weight_ref, _ = inputs()
    leaf = hidden.requires_grad_()
    assert not token_logp(leaf, weight, targets)[1].requires_grad
    assert not token_logp_kl(leaf, weight, targets, hidden_ref, weight_ref)[1].requires_grad


def test_token_logp_of_extreme_logits_is_finite():
    """One token holds all the mass, and one of mass zero is the target: −10,000 nats, not −inf, and entropy 0."""
    hidden = torch.tensor([[1e4], [1e4]], requires_grad=True)
    logp, entropy = token_logp(hidden, torch.tensor([[1.0], [0.0], [0.5]]), torch.tensor([0, 1]))
    logp.sum().backward()
    assert logp.tolist() == [0.0, -1e4] and entropy.tolist() == [0.0, 0.0]
    assert hidden.grad[:, 0].tolist() == [0.0, -1.0]


def test_token_logp_of_no_tokens_is_empty():
    hidden, weight = torch.zeros(0, D, requires_grad=True), torch.zeros(V, D, requires_grad=True)
    logp, entropy = token_logp(hidden, weight, torch.zeros(0, dtype=torch.int64))
    logp.sum().backward()
    assert logp.shape == entropy.shape == (0,) and not weight.grad.any()


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *(x.untyped_storage().nbytes() // x.itemsize for x in made), 0)
        return out


@pytest.mark.parametrize("with_kl", [False, True])
def test_no_tensor_has_all_the_logits(with_kl, monkeypatch):
    """Every tensor that any operation makes, forward and backward, is one chunk of logits or smaller than T·V."""

    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", 8 * V)
    hidden, weight, targets, hidden_ref, weight_ref, upstream = inputs()
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    with Largest() as largest:
        if with_kl:
            logp, _, kl = token_logp_kl(hidden, weight, targets, hidden_ref, weight_ref)
            torch.autograd.grad((logp, kl), leaves, tuple(upstream))
        else:
            torch.autograd.grad(token_logp(hidden, weight, targets)[0], leaves, upstream[0])
    assert 8 * V <= largest.elements <= max(8 * V, V * D, T * D) < T * V
