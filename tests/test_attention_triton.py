"""The Triton attention kernels, on a GPU or under the interpreter, against a masked softmax written out in float64."""

import pytest
import torch
from interpreter import DEVICE
from test_attention import SHARED, naive, naive_packed

from kernels.attention import _Attention, attention, attention_torch
from kernels.decode import decode_attention_triton

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16]
GROUPS = [(2, 2), (4, 2), (3, 1), (14, 2)]  # (H, G): H/G = 1, 2, 3, 7
# RMS error against float64 as a multiple of that of PyTorch's attention in the same dtype. Both round p and the output
# once; the order of the sums differs, and in fp32 that is all the error there is.
NO_WORSE = {torch.float32: 2.0, torch.bfloat16: 1.05}
FLOOR = {torch.float32: 1e-7, torch.bfloat16: 1e-4}  # where PyTorch happens to be exact


def make(lengths, H, G, E, dtype, seed=0):
    """q, k, v, upstream gradient, cu_seqlens; q, k, v are slices of one (T, H + 2G, E) array, as in the model."""
    generator = torch.Generator().manual_seed(seed + sum(lengths) + H + E)
    T = sum(lengths)
    qkv = torch.randn(T, H + 2 * G, E, generator=generator).to(DEVICE, dtype)
    upstream = torch.randn(H, T, E, generator=generator).to(DEVICE, dtype).transpose(0, 1)
    return *qkv.split((H, G, G), dim=1), upstream, torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def triton_attention(q, k, v, cu_seqlens, prefix=None):
    return _Attention.apply(q, k, v, cu_seqlens, prefix)


def run(function, q, k, v, upstream, *last):
    """The output of `function` and the gradients to q, k and v, detached."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, *last)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def rms(found, exact):
    return (found.double() - exact).square().mean().sqrt().item()


def check(lengths, H, G, E, dtype, prefix=None):
    q, k, v, upstream, cu_seqlens = make(lengths, H, G, E, dtype)
    on_cpu = [x.double().cpu() for x in (q, k, v, upstream)]
    exact = [x.to(DEVICE) for x in run(naive_packed, *on_cpu, lengths, prefix)]
    shared = None if prefix is None else torch.tensor(prefix, device=DEVICE)
    ours = run(triton_attention, q, k, v, upstream, cu_seqlens, shared)
    plain = run(attention_torch, q, k, v, upstream, cu_seqlens, shared)
    for name, found, reference, wanted in zip(("out", "dq", "dk", "dv"), ours, plain, exact):
        assert found.dtype == dtype and found.shape == wanted.shape and found.isfinite().all(), name
        assert rms(found, wanted) <= NO_WORSE[dtype] * rms(reference, wanted) + FLOOR[dtype], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[1], [17], [64], [127], [128], [129], [257], [1, 17, 64, 0, 127, 1, 47]], ids=str)
def test_triton_attention_equals_masked_softmax_at_odd_lengths(lengths, dtype):
    check(lengths, 2, 1, 32, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H, G", GROUPS)
def test_triton_attention_sums_over_the_query_heads_of_a_group(H, G, dtype):
    check([33, 1, 70], H, G, 16, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [16, 32, 64, 80, 96, 128, 256])
def test_triton_attention_serves_every_head_width(E, dtype):
    check([129, 16], 2, 1, E, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [80, 128])
@pytest.mark.parametrize("lengths, prefix", [*SHARED, ([1, 257, 3], [0, 0, 0]), ([128, 64, 1], [0, 0, 0])], ids=str)
def test_triton_attention_with_shared_prefixes_equals_masked_softmax(lengths, prefix, E, dtype):
    check(lengths, 4, 2, E, dtype, prefix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_attention_survives_large_scores(dtype):
    """Scores of some ±1,000: one key takes all, and nothing overflows on the way."""
    q, k, v, upstream, cu_seqlens = make([5, 140], 2, 1, 16, dtype)
    q, k = q * 20, k * 20
    exact = run(naive_packed, *(x.double().cpu() for x in (q, k, v, upstream)), [5, 140])
    ours = run(triton_attention, q, k, v, upstream, cu_seqlens)
    assert all(x.isfinite().all() for x in ours)
    torch.testing.assert_close(ours[0].double().cpu(), exact[0], atol=3e-2 if dtype != torch.float32 else 1e-3, rtol=0)


def test_triton_attention_overwrites_its_outputs_and_leaves_its_inputs(monkeypatch):
    q, k, v, upstream, cu_seqlens = make([1, 64, 13], 4, 2, 80, torch.bfloat16)
    before = [x.clone() for x in (q, k, v, upstream, cu_seqlens)]
    clean = run(triton_attention, q, k, v, upstream, cu_seqlens)
    poison = lambda x: x.fill_(torch.nan) if x.is_floating_point() else x  # noqa: E731
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, plain=plain, **kw: poison(plain(*a, **kw)))
    poisoned = run(triton_attention, q, k, v, upstream, cu_seqlens)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned))
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, upstream, cu_seqlens)))


def test_triton_attention_repeats_to_the_bit():
    inputs = make([70, 200], 4, 2, 64, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(run(triton_attention, *inputs), run(triton_attention, *inputs)))


def test_triton_attention_takes_inputs_whose_last_stride_is_not_one():
    q, k, v, upstream, cu_seqlens = make([33], 2, 1, 16, torch.float32)
    wanted = run(triton_attention, q, k, v, upstream, cu_seqlens)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert turned[0].stride(2) != 1
    for a, b in zip(wanted, run(triton_attention, *turned, upstream, cu_seqlens)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H, G, E", [(2, 2, 16), (4, 2, 64), (3, 1, 80), (14, 2, 128), (2, 1, 256)])
def test_triton_decode_attention_equals_masked_softmax(H, G, E, dtype, splits):
    """Rows of different lengths, one of a single token, in a cache whose heads lie apart and whose rest is garbage."""
    lengths, C = [1, 257, 64, 130], 260
    generator = torch.Generator().manual_seed(H + E)
    q = torch.randn(len(lengths), H, E, generator=generator).to(DEVICE, dtype)
    k, v = (torch.randn(len(lengths), G, C, E, generator=generator).to(DEVICE, dtype).transpose(1, 2) for _ in "kv")
    exact, plain = [], []
    for s, n in enumerate(lengths):
        row = q[s, None], k[s, :n], v[s, :n]
        exact.append(naive(*(x.double().cpu() for x in row), torch.zeros(1, n).bool()))
        plain.append(naive(*(x.cpu() for x in row), torch.zeros(1, n).bool()))
        k[s, n:], v[s, n:] = torch.nan, torch.nan
    out = decode_attention_triton(q, k, v, torch.tensor(lengths, device=DEVICE), splits).cpu()
    exact, plain = torch.cat(exact), torch.cat(plain)
    assert out.dtype == dtype and rms(out, exact) <= NO_WORSE[dtype] * rms(plain, exact) + FLOOR[dtype]


@pytest.mark.skipif(DEVICE == "cpu", reason="dispatch to the kernels needs a GPU")
def test_attention_on_a_gpu_is_the_triton_kernel():
    inputs = make([70, 200], 4, 2, 64, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(run(attention, *inputs), run(triton_attention, *inputs)))
