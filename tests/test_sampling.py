"""The sampling kernels, on a GPU or under the interpreter, against PyTorch's cumulative sum in float64."""

import pytest
import torch
from interpreter import DEVICE

from kernels import sampling
from kernels.sampling import sample_torch

pytest.importorskip("triton")


def sample_triton(logits, uniform, temperature):
    found = sampling.sample_triton(logits.to(DEVICE), uniform.to(DEVICE), temperature)
    return [x.cpu() for x in found]


def exact(logits, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and cumulative mass (S, V) in float64."""
    log_p = torch.log_softmax(logits.double() / (temperature or 1.0), dim=1)
    return log_p, log_p.exp().cumsum(1)


@pytest.mark.parametrize("chunk, V", [(64, 1), (64, 5), (64, 64), (64, 65), (32, 300), (4096, 300)])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 3.0])
def test_token_is_where_the_cumulative_mass_passes_the_random_number(temperature, V, chunk, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(V)
    logits, uniform = 3 * torch.randn(12, V, generator=generator), torch.rand(12, 1, generator=generator)
    uniform[:2] = torch.tensor([[0.0], [1 - 2**-24]])
    token, logp = sample_triton(logits, uniform, temperature)
    log_p, cumulative = exact(logits, temperature)
    assert (logp.double() - log_p.gather(1, token[:, None])[:, 0]).abs().max() < 1e-5
    if temperature == 0:
        assert torch.equal(token, logits.argmax(1))
        return
    after = cumulative.gather(1, token[:, None])
    before = after - log_p.exp().gather(1, token[:, None])
    assert (before <= uniform + 1e-6).all() and (after >= uniform - 1e-6).all()
    assert (token == sample_torch(logits, uniform, temperature)[0]).sum() >= 11  # a sum's last bit may differ


def test_no_token_of_mass_zero_is_drawn(monkeypatch):
    """Whole chunks without mass, at the start, in the middle and at the end."""
    monkeypatch.setattr(sampling, "CHUNK", 16)
    logits = torch.full((8, 80), -torch.inf)
    logits[:, 20:24], logits[:, 50] = 0.0, 1.0
    uniform = torch.tensor([0.0, 1e-7, 0.3, 0.5, 0.6, 0.9, 0.999, 1 - 2**-24])[:, None]
    token, logp = sample_triton(logits, uniform, 1.0)
    assert logits.gather(1, token[:, None]).isfinite().all() and logp.isfinite().all() and (logp <= 0).all()
    assert token[0] == 20 and token[-1] == 50


def test_the_first_of_equal_logits_is_the_argmax(monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 16)
    logits = torch.zeros(1, 50)
    logits[0, [37, 21, 45]] = 2.0
    assert sample_triton(logits, torch.zeros(1, 1), 0.0)[0].item() == 21


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_broken_row_still_gives_a_token_of_the_vocabulary(value, temperature):
    token, _ = sample_triton(torch.full((2, 100), value), torch.tensor([[0.0], [0.9]]), temperature)
    assert ((0 <= token) & (token < 100)).all()


def test_rows_may_be_slices_of_longer_ones_and_of_any_dtype():
    logits = torch.randn(6, 400).bfloat16()
    uniform = torch.rand(6, 1)
    whole = sample_triton(logits[:, :301].contiguous(), uniform, 0.7)
    on = logits.to(DEVICE)
    found = sampling.sample_triton(on[:, :301], uniform.to(DEVICE), 0.7)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(whole, found))
    assert found[0].dtype == torch.int64 and found[1].dtype == torch.float32


def test_frequencies_are_the_probabilities():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0])
    uniform = (torch.arange(80) + 0.5)[:, None] / 80
    token, _ = sample_triton(probabilities.log().expand(80, 5).contiguous(), uniform, 1.0)
    assert token.bincount(minlength=5).tolist() == [40, 20, 10, 10, 0]
