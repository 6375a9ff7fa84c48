"""The Triton head, on a GPU or under the interpreter, against log_softmax over all the logits in float64."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import ROOT
from interpreter import DEVICE
from test_logprob import Largest, exact, relative

from kernels import logprob
from kernels.logprob import _splits, _TorchHead, _TritonHead, token_logp, token_logp_kl

pytest.importorskip("triton")

LENGTHS = [1, 17, 64, 127, 128, 129, 257]
# Absolute error of logp, entropy and kl in nats; relative RMS error of a gradient. Products of 16-bit numbers are exact
# in fp32, so the values have fp32's error in every dtype. dz is rounded to the dtype, which costs up to 2⁻⁹ in bf16, and
# so are the gradients themselves and, with several slabs, each slab's part of dh.
TOLERANCE = {torch.float32: (1e-5, 2e-6), torch.bfloat16: (1e-5, 4e-3)}
# RMS error against float64 as a multiple of that of PyTorch in the same dtype. In fp32 the order of the sums is all the
# error there is, and either may be luckier. In 16 bits PyTorch rounds the logits too: ours is as a rule far smaller.
NO_WORSE = {torch.float32: 2.0, torch.bfloat16: 1.05}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dataclass(frozen=True)
class Case:
    """hidden (T, D), weight (V, D), targets (T,), upstream (2, T) of logp and kl; the reference's (T, 24), (V, 24)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    upstream: torch.Tensor
    hidden_ref: torch.Tensor | None = None
    weight_ref: torch.Tensor | None = None
    temperature: float = 1.0


def make(T: int, dtype: torch.dtype, V: int = 300, D: int = 40, with_kl: bool = False, **settings) -> Case:
    """Logits of about ±6; V = 300 leaves the last tile of the vocabulary partial, D = 40 that of the width."""
    generator = torch.Generator().manual_seed(T + V + D)
    hidden, weight, upstream = (torch.randn(*size, generator=generator) for size in ((T, D), (V, D), (2, T)))
    hidden_ref, weight_ref = (torch.randn(n, 24, generator=generator) for n in (T, V))
    targets = torch.randint(V, (T,), generator=generator)
    targets[-3:] = torch.tensor([0, V // 2, V - 1])[-T:]  # the borders of the vocabulary and of its tiles
    ref = ((hidden_ref / 2).to(DEVICE, dtype), (weight_ref / 2).to(DEVICE, dtype)) if with_kl else (None, None)
    inputs = hidden.to(DEVICE, dtype), (weight / 4).to(DEVICE, dtype), targets.to(DEVICE), upstream.to(DEVICE)
    return Case(*inputs, *ref, **settings)


def run(head, case: Case, leaves: str = "hidden weight") -> dict[str, torch.Tensor]:
    """Values and gradients of the loss upstream·(logp, kl) by one of the two implementations."""
    kinds = {name: getattr(case, name).detach().requires_grad_() for name in leaves.split()}
    on = replace(case, **kinds)
    out = head.apply(on.hidden, on.weight, on.targets, on.temperature, on.hidden_ref, on.weight_ref)
    grads = torch.autograd.grad((out[0], out[2]), list(kinds.values()), tuple(case.upstream))
    return dict(zip(("logp", "entropy", "kl", *leaves.split()), (*(x.detach() for x in out), *grads)))


def float64(case: Case) -> dict[str, torch.Tensor]:
    """What `run` should give."""
    leaves = [x.detach().double().requires_grad_() for x in (case.hidden, case.weight)]
    log_p, logp, entropy = exact(*leaves, case.targets, case.temperature)
    kl = torch.zeros_like(logp)
    if case.hidden_ref is not None:
        ref = (x.double() for x in (case.hidden_ref, case.weight_ref))
        kl = (log_p.exp() * (log_p - exact(*ref, case.targets, case.temperature)[0])).sum(-1)
    loss = (logp * case.upstream[0]).sum() + (kl * case.upstream[1]).sum()
    values = (x.detach() for x in (logp, entropy, kl))
    return dict(zip(("logp", "entropy", "kl", "hidden", "weight"), (*values, *torch.autograd.grad(loss, leaves))))


def rms(found: torch.Tensor, wanted: torch.Tensor | float) -> float:
    return (found.double() - wanted).square().mean().sqrt().item()


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal but for the order of sums, and what a last bit of dz flipped by it does to a gradient."""
    for name, one in found.items():
        limit = TOLERANCE[wanted["hidden"].dtype][1] * rms(wanted[name], 0.0) + 1e-6
        assert rms(one, wanted[name].double()) <= limit, name


def check(case: Case, values: float | None = None, cancelled: float = 0.0) -> dict[str, torch.Tensor]:
    """Close to float64, no further from it than PyTorch in the same dtype, and of the promised signs, dtypes, shapes.

    `values` replaces the table's tolerance of the values; `cancelled` adds to that of the gradients.
    """
    wanted, plain, found = float64(case), run(_TorchHead, case), run(_TritonHead, case)
    value, gradient = TOLERANCE[case.hidden.dtype]
    for name, one in found.items():
        assert one.isfinite().all() and one.shape == wanted[name].shape, name
        if name in ("hidden", "weight"):
            assert one.dtype == case.hidden.dtype, name
            assert rms(one, wanted[name]) <= (gradient + cancelled) * rms(wanted[name], 0.0), name
        else:
            assert one.dtype == torch.float32, name
            torch.testing.assert_close(one.double(), wanted[name], atol=values or value, rtol=0, msg=name)
        limit = NO_WORSE[case.hidden.dtype] * rms(plain[name], wanted[name]) + 1e-7  # PyTorch may happen to be exact
        assert rms(one, wanted[name]) <= limit, name
    assert (found["logp"] <= 0).all() and (found["entropy"] >= 0).all() and (found["kl"] >= 0).all()
    return found


@dtypes
@pytest.mark.parametrize("T", LENGTHS)
def test_triton_logp_equals_log_softmax_at_odd_lengths(T, dtype):
    check(make(T, dtype))


@dtypes
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
def test_triton_logp_equals_log_softmax_at_every_temperature(temperature, dtype):
    check(make(33, dtype, temperature=temperature))


@dtypes
@pytest.mark.parametrize("V, D", [(1, 16), (5, 1), (255, 24), (256, 64), (257, 72), (1100, 128)])
def test_triton_logp_equals_log_softmax_at_odd_widths(V, D, dtype):
    check(make(19, dtype, V=V, D=D))


@dtypes
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_triton_logp_of_confident_targets(p, dtype):
    """Targets of probability p: log p near 0 keeps its digits, and gradients that nearly cancel keep theirs."""
    case = make(33, dtype, temperature=1.0)
    case.weight[:, 0] = 0  # one column for the target alone, which is the last entry
    case.weight[-1] = 0
    case.weight[-1, 0] = 1
    case.targets[:] = len(case.weight) - 1
    others = (case.hidden.double() @ case.weight[:-1].double().T).logsumexp(-1)
    case.hidden[:, 0] = (others + torch.tensor(p / (1 - p), dtype=torch.float64).log()).to(dtype)
    found = check(case, values=2e-6, cancelled=5e-7 / (1 - p))  # 1 − p, from a p with the error of fp32
    assert abs(found["logp"].exp().mean().item() - p) < (1 - p) / 10  # the case is what it says
    torch.testing.assert_close(found["logp"].double(), float64(case)["logp"], atol=2e-7, rtol=1e-4)


@dtypes
def test_triton_logp_of_large_logits(dtype):
    """Logits as large as ±80 in every row, and every second target the least likely token of all."""
    case = make(33, dtype)
    scale = 80 / (case.hidden.double() @ case.weight.double().T).abs().amax(-1, keepdim=True)
    case = replace(case, hidden=(case.hidden * scale).to(dtype))
    case.targets[::2] = (case.hidden @ case.weight.T).argmin(-1)[::2]
    assert check(case, values=1e-4)["logp"].min() < -120


def test_triton_logp_of_extreme_logits():
    """One token holds all the mass, and one of mass zero is the target: −10,000 nats, not −inf, and entropy 0."""
    hidden, weight = torch.tensor([[1e4], [1e4]], device=DEVICE), torch.tensor([[1.0], [0.0], [0.5]], device=DEVICE)
    case = Case(hidden, weight, torch.tensor([0, 1], device=DEVICE), torch.ones(2, 2, device=DEVICE))
    found = run(_TritonHead, case)
    assert found["logp"].tolist() == [0.0, -1e4] and found["entropy"].tolist() == [0.0, 0.0]
    assert found["hidden"][:, 0].tolist() == [0.0, -1.0]


@dtypes
@pytest.mark.parametrize("T", [1, 129])
def test_triton_kl_equals_log_softmax(T, dtype):
    check(make(T, dtype, with_kl=True))


def test_triton_kl_to_a_reference_of_another_dtype():
    """A policy in fp32 with its base model in bf16."""
    case, ref = make(33, torch.float32, with_kl=True), make(33, torch.bfloat16, with_kl=True)
    check(replace(case, hidden_ref=ref.hidden_ref, weight_ref=ref.weight_ref))


@dtypes
def test_triton_kl_of_equal_models_is_zero(dtype):
    case = make(33, dtype, V=600)
    equal = run(_TritonHead, replace(case, hidden_ref=case.hidden, weight_ref=case.weight))
    assert not equal["kl"].any()
    alone = run(
        _TritonHead, replace(case, upstream=torch.stack([case.upstream[0], torch.zeros_like(case.upstream[1])]))
    )
    assert_same(equal, alone)  # so the gradient of the KL is zero as well


@dtypes
def test_triton_head_takes_any_strides(dtype):
    """Rows apart, columns apart, every second target, and one upstream value seen by all tokens."""
    case = make(33, dtype, with_kl=True)
    case = replace(case, upstream=case.upstream[:, :1].expand(2, 33).contiguous())
    wanted = run(_TritonHead, case)
    apart = torch.stack([case.hidden, case.hidden], 1)[:, 0]  # stride (2·D, 1)
    turned = case.weight.T.contiguous().T  # stride (1, V)
    targets = torch.stack([case.targets, case.targets], 1)[:, 0]  # stride 2
    ref = {"hidden_ref": case.hidden_ref.T.contiguous().T, "weight_ref": case.weight_ref}
    one_value = case.upstream[:, :1].expand(2, 33)  # stride (33, 0)
    strided = Case(apart, turned, targets, one_value, **ref)
    assert_same(run(_TritonHead, strided), wanted)


@pytest.mark.parametrize("leaves", ["hidden", "weight"])
def test_triton_head_gradient_of_one_side_alone(leaves):
    case = make(70, torch.float32)
    assert torch.equal(run(_TritonHead, case, leaves)[leaves], run(_TritonHead, case)[leaves])


def test_triton_head_gradient_of_a_tied_weight():
    """The embedding that made the hidden states is the head too: both gradients arrive at it."""
    case = make(33, torch.float32)
    found = []
    for dtype, logp_of in ((torch.float64, exact), (torch.float32, _TritonHead.apply)):
        leaf = case.weight.to(dtype).requires_grad_()
        hidden = torch.tanh(leaf[case.targets.roll(1)]) * 4
        if dtype == torch.float64:
            logp = logp_of(hidden, leaf, case.targets)[1]
        else:
            logp = logp_of(hidden, leaf, case.targets, 1.0, None, None)[0]
        found += torch.autograd.grad(logp, leaf, case.upstream[0].to(dtype))
    assert relative(found[1], found[0]) < TOLERANCE[torch.float32][1]


@dtypes
@pytest.mark.parametrize("with_kl", [False, True])
def test_triton_head_overwrites_its_buffers_and_leaves_its_inputs(with_kl, dtype, monkeypatch):
    case = make(129, dtype, with_kl=with_kl)
    names = ("hidden", "weight", "targets", "upstream") + (("hidden_ref", "weight_ref") if with_kl else ())
    before = {name: getattr(case, name).clone() for name in names}
    clean = run(_TritonHead, case)
    poison = lambda x: x.fill_(torch.nan) if x.is_floating_point() else x
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, plain=plain, **kw: poison(plain(*a, **kw)))
    poisoned = run(_TritonHead, case)
    monkeypatch.undo()
    for name, found in clean.items():  # so two runs agree to the bit, too
        assert torch.equal(found, poisoned[name]), name
    for name, one in before.items():
        assert torch.equal(one, getattr(case, name)), name


@dtypes
@pytest.mark.parametrize("splits, with_kl", [(1, True), (2, False), (99, True)])
def test_triton_head_in_any_splits_slabs_and_groups(splits, with_kl, dtype, monkeypatch):
    """Wherever tokens and vocabulary are cut, the result is the same but for the order of the sums."""
    T = 33 if with_kl else 257
    case = make(T, dtype, V=700, with_kl=with_kl)
    whole = run(_TritonHead, case)
    monkeypatch.setattr(logprob, "_splits", lambda blocks, tiles, processors: min(splits, tiles))
    monkeypatch.setattr(logprob, "SLAB_BYTES", 256 * T * case.hidden.itemsize)  # three slabs, the last one smaller
    monkeypatch.setattr(logprob, "GROUP", 2)  # of three blocks in 16 bits, five in fp32
    monkeypatch.setitem(NO_WORSE, dtype, max(1.25, NO_WORSE[dtype]))  # one rounding more: of each slab's share of dh
    assert_same(check(case), whole)


@dtypes
def test_triton_head_reads_nothing_it_has_not_written(dtype):
    """New memory holds NaN here. (oneDNN's AMX matmul reads past the end of rows that are not neighbours.)"""
    case = make(33, dtype, V=601, with_kl=True)
    wanted = run(_TritonHead, case)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives with NaN
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        assert_same(run(_TritonHead, case), wanted)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("processors", [4, 108, 132])
def test_splits_leave_none_without_tiles_and_few_processors_idle(processors):
    for blocks in (0, 1, 2, 7, 16, 64, 100):
        for tiles in (1, 2, 9, 192, 594, 1187):
            splits = _splits(blocks, tiles, processors)
            assert 1 <= splits <= tiles
    assert processors == 4 or _splits(1, 594, processors) > processors / 2  # one block of tokens, the whole chip


def test_triton_head_of_no_tokens():
    case = make(4, torch.bfloat16, with_kl=True)
    empty = {name: getattr(case, name)[:0] for name in ("hidden", "targets", "hidden_ref")}
    found = run(_TritonHead, replace(case, **empty, upstream=case.upstream[:, :0]))
    assert found["logp"].shape == found["entropy"].shape == found["kl"].shape == (0,)
    assert found["hidden"].shape == (0, 40) and not found["weight"].any()


def test_triton_head_of_a_target_outside_the_vocabulary_is_nan():
    case = make(5, torch.float32)
    case.targets[1], case.targets[3] = -100, len(case.weight)
    assert run(_TritonHead, case)["logp"].isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("with_kl", [False, True])
def test_triton_head_holds_no_tensor_of_all_the_logits(with_kl, monkeypatch):
    monkeypatch.setattr(logprob, "SLAB_BYTES", 1)  # one tile of entries per slab
    case = make(257, torch.bfloat16, V=1100, with_kl=with_kl)
    with Largest() as largest:
        run(_TritonHead, case)
    assert largest.elements < 257 * 1100 / 2  # 257 × 256 in a slab; the interpreter's copies of it count bytes


@pytest.mark.skipif(DEVICE == "cpu", reason="dispatch to the kernels needs a GPU")
def test_token_logp_on_a_gpu_is_the_triton_head():
    case = make(70, torch.bfloat16, with_kl=True)
    alone = replace(case, hidden_ref=None, weight_ref=None)  # other tiles, so another order of sums
    inputs = case.hidden, case.weight, case.targets
    assert torch.equal(token_logp(*inputs)[0], run(_TritonHead, alone)["logp"])
    found = token_logp_kl(*inputs, case.hidden_ref, case.weight_ref)
    assert torch.equal(found[2], run(_TritonHead, case)["kl"])


def python(code: str, **environment: str) -> str:
    """What `code` prints in a process of its own, where the interpreter is off."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_import_and_run_on_a_cpu_without_triton():
    python("""
import sys
sys.modules["triton"] = None  # an import of it fails
import torch
import kernels.attention
from kernels.logprob import token_logp
assert token_logp(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))[0].isfinite().all()
""")
