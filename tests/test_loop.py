"""Flags, errors, signals, the optimizer's step: what the three scripts share around their loops."""

import ast
import dataclasses
import inspect
import importlib
import importlib.util
import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

import sample
import train_rl
import train_sft
from s2r.data import order
from s2r.run import checkpoint, flags, loop, ranks
from s2r.model import Transformer
from s2r.packing import pack
from s2r.run.ranks import Ranks
from s2r.stage0 import verifications
from tiny_model import same, tiny_model

ROOT = Path(__file__).resolve().parents[1]
ALONE = Ranks(torch.device("cpu"))
SCRIPTS = (sample, train_sft, train_rl)


@dataclass(frozen=True)
class Config:
    model: str  # folder to start from
    out: str = "run"  # folder to write
    level: Literal["outcome", "process"] = "outcome"  # what has a reward
    max_new_tokens: int = 8  # 50% of the limit
    lr: float = 0.5  # learning rate
    steps: int = 4  # (paper: 500)
    resume: bool = False  # continue
    keep: int = 2  # checkpoints
    offload: bool = False  # optimizer state on the CPU
    lora: int = 0  # rank
    max_grad_norm: float = 1.0  # clip
    save_every: int = 50  # steps
    tensorboard: bool = False  # log


@dataclass(frozen=True)
class Lists:
    files: list[str]  # files to read
    range: tuple[float, float] = (0.1, 0.7)  # two numbers


# --- from_command_line ---

def test_from_command_line_reads_every_kind_of_flag():
    assert flags.from_command_line(Config, ["--model", "base"]) == Config("base")
    argv = "--model a --level process --max-new-tokens 9 --lr 1e-3 --resume --steps=7".split()
    assert flags.from_command_line(Config, argv) == Config("a", "run", "process", 9, 1e-3, 7, True)
    assert flags.from_command_line(Lists, ["a", "b", "--range", "0", "1"]) == Lists(("a", "b"), (0.0, 1.0))
    assert flags.from_command_line(Lists, ["a"]) == Lists(("a",))
    with pytest.raises(SystemExit):
        flags.from_command_line(Lists, [])


@pytest.mark.parametrize(("script", "missing"), [
    (sample, "--model"), (train_sft, "--model, --data, --out"), (train_rl, "--model, --out")])
def test_from_command_line_names_every_required_flag_that_is_missing_and_the_toy(script, missing, capsys):
    with pytest.raises(SystemExit) as exit:
        flags.from_command_line(script.Config, [])
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and f"missing: {missing} (" in error and "python -m s2r.toy" in error


@pytest.mark.parametrize(("argv", "named"), [
    ("--bogus 1", "--bogus"),
    ("--max_new_tokens 9", "--max_new_tokens"),
    ("--step 9", "--step"),  # no abbreviations: a mistyped flag is an unknown flag
    ("--steps many", "--steps"),
    ("--steps 1.5", "--steps"),
    ("--lr fast", "--lr"),
    ("--level both", "--level"),
    ("--resume yes", "yes"),
    ("--steps", "--steps"),
    ("--lr 1", "missing: --model"),
])
def test_from_command_line_exits_2_with_usage(argv, named, capsys):
    with pytest.raises(SystemExit) as exit:
        flags.from_command_line(Config, argv.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("usage:") and named in error.splitlines()[-1]


@pytest.mark.parametrize("config", [Config, *(script.Config for script in SCRIPTS)])
def test_from_command_line_help_says_what_each_setting_is(config, capsys):
    with pytest.raises(SystemExit) as exit:
        flags.from_command_line(config, ["--help"])
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines at blanks and hyphens
    assert exit.value.code == 0
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.MULTILINE))
    for field in dataclasses.fields(config):
        assert "--" + field.name.replace("_", "-") in text
        shown = "(required)" if field.default is dataclasses.MISSING else f"[{field.default}]"
        assert "".join(f"{comments[field.name]} {shown}".split()) in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_setting_is_read(script):
    """A flag that nothing reads does nothing in silence: each field is a `cfg.name` in the script or in s2r/run, or a name
    in `getattr(cfg, name) for name in (…)`."""
    read = set()
    for file in (script, checkpoint, loop, ranks):
        for node in ast.walk(ast.parse(Path(file.__file__).read_text())):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", getattr(node.value, "attr", "")) == "cfg":
                read.add(node.attr)
            if isinstance(node, ast.DictComp) and ast.unparse(node.value) == "getattr(cfg, name)":
                read |= {part.value for part in node.generators[0].iter.elts}
    assert {field.name for field in dataclasses.fields(script.Config)} <= read


# --- start ---

def start(main, monkeypatch, *argv: str):
    monkeypatch.setattr(sys, "argv", ["script.py", *(argv or ("--model", "base"))])
    flags.start(main, Config)


def test_start_turns_our_error_into_one_line_and_status_2(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        start(lambda cfg: train_sft.load_trajectories(cfg.model), monkeypatch, "--model", "nowhere.jsonl")
    out, error = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert error.startswith("error: nowhere.jsonl: no such file") and error.count("\n") == 1


def test_start_leaves_a_bug_its_traceback(monkeypatch, tmp_path):
    """A ValueError that a library raises says little in one line; the library may lie in a .venv in the clone."""
    with pytest.raises(json.JSONDecodeError):
        start(lambda cfg: json.loads("{"), monkeypatch)

    library = tmp_path / ".venv" / "lib" / "library.py"
    library.parent.mkdir(parents=True)
    library.write_text("def work(cfg):\n    raise ValueError('shapes do not match')\n")
    spec = importlib.util.spec_from_file_location("library", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(flags, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="shapes"):
        start(module.work, monkeypatch)


def test_start_names_a_package_that_is_not_installed(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        start(lambda cfg: importlib.import_module("plotting"), monkeypatch)
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: No module named 'plotting'; pip install plotting\n"


def test_start_takes_an_error_of_every_room_for_ours(monkeypatch, tmp_path, capsys):
    (tmp_path / "root").mkdir()
    link = tmp_path / "link"  # to a clone, as home folders are on some machines
    link.symlink_to(tmp_path / "root")
    monkeypatch.setattr(flags, "ROOT", link.resolve())
    for room in ("", "s2r", "kernels", *(f"s2r/{room}" for room in ("hf", "grade", "run", "stage0", "view", "toy"))):
        file = link / room / "room.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"def work(cfg):\n    raise ValueError('said in {room}')\n")
        spec = importlib.util.spec_from_file_location("room", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with pytest.raises(SystemExit):
            start(module.work, monkeypatch)
        assert capsys.readouterr().err == f"error: said in {room}\n"


@pytest.mark.parametrize(("name", "words"), [
    ("train_sft", "--model nowhere --data nowhere.jsonl --out out"),
    ("s2r.stage0.select", "--rollouts nowhere.jsonl --out out"),
    ("s2r.stage0.build", "--rollouts nowhere.jsonl --verifications nowhere.jsonl --out out"),
    ("s2r.stage0.verifications", "--rollouts nowhere.jsonl --out out --model nowhere"),
    ("s2r.view.report", "nowhere.json"),
    ("s2r.view.curves", "nowhere --out out.svg"),
    ("s2r.run.memory", "--model nowhere --gpus 1"),
    ("s2r.toy.world", "--rollouts nowhere.jsonl --out out"),
])
def test_refusal_of_every_room_is_one_line(name, words, tmp_path, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *words.split()])
    with pytest.raises(SystemExit) as exit:
        flags.start(script.main, script.Config)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: nowhere") and error.count("\n") == 1, error


def test_every_command_starts_its_main():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("s2r/**/*.py")]:
        if "\ndef main(cfg: Config)" in (text := path.read_text(encoding="utf-8")):
            assert re.search(r'^if __name__ == "__main__":\n    (flags\.)?start\(main, Config\)$', text, re.MULTILINE), path


@pytest.mark.parametrize(("value", "named"), [
    ({"steps": -3}, "--steps -3"), ({"lr": float("inf")}, "--lr inf"), ({"lr": float("nan")}, "--lr nan"),
    ({"keep": 0}, "--keep 0")])
def test_check_refuses_numbers_that_make_no_sense(value, named):
    flags.check(Config("m"), "keep")
    with pytest.raises(ValueError, match=named):
        flags.check(dataclasses.replace(Config("m"), **value), "keep")
    with pytest.raises(ValueError, match="--range -1.0"):
        flags.check(Lists(("a",), (0.1, -1.0)))


# --- device, order, load ---

def pick(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    ranks, found = loop.pick(SimpleNamespace(device=device, dtype=dtype))
    return ranks.device, found


def test_pick_auto_is_fp32_on_a_cpu():
    assert pick("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert pick("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("device", ["nonsense", "cuda:x", pytest.param("cuda", marks=pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU"))])
def test_pick_names_a_device_that_is_not_here(device):
    with pytest.raises(ValueError, match=f"--device {device}"):
        pick(device, "auto")


def test_pick_names_a_gpu_beyond_those_there_are_and_makes_the_one_it_takes_current(monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8 if device == "cuda:1" else 7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    assert pick("cuda:1", "auto") == (torch.device("cuda:1"), torch.bfloat16)
    assert pick("cuda:0", "auto") == (torch.device("cuda:0"), torch.float32)  # no bf16 before sm_80, and it says so
    assert "an old card has no bfloat16" in capsys.readouterr().out
    taken.pop()
    assert pick("cuda", "float32") == (torch.device("cuda:0"), torch.float32)
    assert taken == ["cuda:1", "cuda:0"]
    with pytest.raises(ValueError, match="--device cuda:2: torch sees 2 GPUs"):
        pick("cuda:2", "auto")


def test_order_is_a_permutation_by_seed_and_epoch():
    assert sorted(order(50, 3, 7)) == list(range(50)) and order(50, 3, 7) == order(50, 3, 7)
    assert len({tuple(order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_load_keeps_fp32_weights_to_train_and_cuts_the_vocabulary(tmp_path):
    tiny_model(tmp_path, spare=7)
    cfg = SimpleNamespace(model=str(tmp_path), checkpointing=True, lora=0)
    model, tokenizer = loop.load(cfg, ALONE, torch.bfloat16, train=True)
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.checkpointing
    assert model.vocab_size == tokenizer.vocab_size == len(model.embed) - 7 == len(model.head_weight)
    model, _ = loop.load(cfg, ALONE, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.checkpointing


def test_load_refuses_a_tokenizer_larger_than_the_embedding(tmp_path):
    tiny_model(tmp_path, spare=-5)
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ ids, the embedding \d+ rows"):
        loop.load(SimpleNamespace(model=str(tmp_path)), ALONE, torch.float32)


# --- optimizer step ---

BATCH = pack([[1, 2, 3]], [[1, 2]], 9, "cpu")
RUN = SimpleNamespace(ranks=ALONE, cfg=Config("m"), keep_batch=lambda step, batch: f"{len(batch)} of step {step} saved")


def adam(model: Transformer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)


def step(model: Transformer, optimizer: torch.optim.Optimizer, gradient: float = 1.0, run=RUN, loss: float = 0.5) -> float:
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    return loop.optimizer_step(
        run, model, optimizer, step=3, lr=1e-2, loss=loss, what="examples [5]", batch=BATCH)


def test_optimizer_step_clips_and_uses_the_rate_it_is_given(model):
    size = sum(p.numel() for p in model.parameters())
    before = model.embed.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    assert step(model, optimizer, 2.0) == pytest.approx(2 * size**0.5, rel=1e-5)  # the norm before clipping
    torch.testing.assert_close(before - model.embed, torch.full_like(before, 1e-2 / size**0.5), rtol=0, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_optimizer_step_stops_at_what_is_not_finite(where, bad, model, monkeypatch, capsys):
    """ValueError that names the batch, exit status 2, weights and optimizer state untouched."""
    optimizer = adam(model)
    step(model, optimizer)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]

    with pytest.raises(SystemExit) as exit:
        start(lambda cfg: step(model, optimizer, **{where: bad}), monkeypatch)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: step 3, examples [5]: the loss is ") and "last checkpoint is kept" in error
    assert str(abs(bad)) in error and "1 of step 3 saved" in error
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(torch.equal(state["exp_avg"], m) for state, m in zip(optimizer.state.values(), moments))


def test_optimizer_step_is_the_same_with_its_state_offloaded(model, base):
    other = Transformer.from_pretrained(base)
    offloaded = SimpleNamespace(**vars(RUN) | {"cfg": Config("m", offload=True)})
    optimizers = adam(model), adam(other)
    for gradient in (1.0, -2.0, 0.5):
        step(model, optimizers[0], gradient)
        step(other, optimizers[1], gradient, run=offloaded)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    assert same(*(optimizer.state_dict() for optimizer in optimizers)) and all(p.grad is None for p in other.parameters())


# --- signals, memory ---

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_notes_the_first_signal_and_leaves_the_second_its_effect(number, handlers):
    stop = loop.Stop(ALONE)
    assert not stop.asked and not stop.agreed()
    os.kill(os.getpid(), number)
    assert stop.asked and stop.agreed() and signal.getsignal(number) == signal.SIG_DFL


def test_stop_under_torchrun_takes_any_number_of_signals(handlers):
    stop = loop.Stop(SimpleNamespace(size=2))
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked


@pytest.mark.parametrize(("script", "less"), [
    (sample, "a lower --tokens-per-microbatch, a lower --slots\n"),
    (verifications, "a lower --batch\n"),
    (train_sft, "a lower --tokens-per-microbatch, a lower --slots, --checkpointing, --lora, --offload\n"),
    (train_rl, "a lower --tokens-per-microbatch, a lower --slots, --checkpointing, --lora, --offload\n"),
])
@pytest.mark.parametrize("how", ["gpu", "torch", "python"])
def test_out_of_memory_names_the_flags_that_help(how, script, less, monkeypatch, capsys):
    """What a GPU says is made up here; the CPU really has no petabyte to give."""

    def main(cfg):
        if how == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")
        torch.empty(10**15) if how == "torch" else bytearray(10**18)

    required = ["--rollouts", "r"] if script is verifications else ["--data", "d"]
    monkeypatch.setattr(sys, "argv", ["script.py", "--model", "m", "--out", "o", *required])
    with pytest.raises(SystemExit) as exit:
        flags.start(main, script.Config)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: out of memory (") and error.endswith(less)
    assert error.count("\n") == 1


def test_start_leaves_another_runtime_error_its_traceback(monkeypatch):
    def main(cfg):
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match="Connection"):
        start(main, monkeypatch)


def test_clock_parts_the_time():
    clock = loop.Clock()
    clock.lap("rollout")
    clock.lap("update")
    assert list(clock.parts) == ["seconds_rollout", "seconds_update"] and min(clock.parts.values()) >= 0
