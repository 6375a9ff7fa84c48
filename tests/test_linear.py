"""Prepacked weights give what F.linear gives, and are gone when their block of code is left."""

import pytest
import torch
import torch.nn.functional as F

from kernels.linear import linear, prepack
from s2r.hf.config import ModelConfig
from s2r.model import Transformer

# The same products summed in another order; in bf16 the result may then round to the neighbouring value (2^-8).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("hint", [1, 8, 128])
@pytest.mark.parametrize("d_in, d_out", [(32, 48), (17, 31), (64, 1)])
def test_prepacked_linear_equals_linear(d_in, d_out, hint, bias, dtype):
    """Also for other numbers of rows than the hint: rows stop one by one, and prefill brings many (or none)."""
    generator = torch.Generator().manual_seed(d_in)
    weight = (torch.randn(d_out, d_in, generator=generator) / d_in**0.5).to(dtype)
    b = torch.randn(d_out, generator=generator).to(dtype) if bias else None
    packed = prepack(weight, hint)
    for rows in (0, 1, 2, 8, 19, 128, 300):
        x = torch.randn(rows, d_in, generator=generator).to(dtype)
        out = linear(x, weight, b, packed)
        assert out.dtype == dtype
        torch.testing.assert_close(out, F.linear(x, weight, b), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_prepack_copies_the_weight():
    """What is packed neither follows the weight nor changes it, and carries no gradient."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before, x = weight.detach().clone(), torch.eye(16)
    packed = prepack(weight, 4)
    if packed is None:
        pytest.skip("this machine has no oneDNN")
    with torch.no_grad():
        weight += 1
    out = linear(x, weight, packed=packed)
    assert not out.requires_grad
    torch.testing.assert_close(out, before.T)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prepacked_model_is_the_same_model_and_is_restored(tied, dtype):
    config = ModelConfig(vocab_size=51, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=4,
                         num_kv_heads=2, head_dim=8, tied=tied, qkv_bias=True)  # fmt: skip
    model = Transformer(config, dtype)
    model.init_weights(0, std=0.2)
    model.vocab_size = 50  # the head is cut
    ids, cu_seqlens = torch.arange(12), torch.tensor([0, 5, 12])
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = model.logits(model(ids, cu_seqlens))
    with pytest.raises(KeyError), torch.no_grad(), model.prepacked(4):
        packed = model.logits(model(ids, cu_seqlens))
        raise KeyError("anything")
    assert packed.shape == (12, 50)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]  # bf16: two layers of rounding, logits of about 4
    torch.testing.assert_close(packed, plain, atol=tolerance, rtol=0)
    again = model.logits(model(ids, cu_seqlens))
    assert torch.equal(again, plain) and again.requires_grad  # nothing packed is left
    assert all(getattr(module, "packed", None) is None for module in model.modules())
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
