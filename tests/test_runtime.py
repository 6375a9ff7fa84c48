"""Flags, run folders, checkpoints and errors: what the three scripts share around their loops."""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch

import sample
import train_rl
import train_sft
from s2r import runtime
from s2r.model import Transformer
from s2r.parallel import Ranks
from tiny_model import digest, tiny_model

ROOT = Path(__file__).resolve().parents[1]
ALONE = Ranks(torch.device("cpu"))
SCRIPTS = (sample, train_sft, train_rl)


@dataclass(frozen=True)
class Config:
    model: str = "base"  # folder to start from
    out: str = "run"  # folder to write
    level: Literal["outcome", "process"] = "outcome"  # what has a reward
    max_new_tokens: int = 8  # 50% of the limit
    lr: float = 0.5  # learning rate
    steps: int = 4  # (paper: 500)
    resume: bool = False  # go on


# --- parse ---

def test_parse_reads_every_kind_of_flag():
    assert runtime.parse(Config, []) == Config()
    argv = "--model a --level process --max-new-tokens 9 --lr 1e-3 --resume --steps=7".split()
    assert runtime.parse(Config, argv) == Config("a", "run", "process", 9, 1e-3, 7, True)


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
])
def test_parse_exits_2_with_usage(argv, named, capsys):
    with pytest.raises(SystemExit) as exit:
        runtime.parse(Config, argv.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("usage:") and named in error.splitlines()[-1]


@pytest.mark.parametrize("config", [Config, *(script.Config for script in SCRIPTS)])
def test_parse_help_says_what_each_setting_is(config, capsys):
    with pytest.raises(SystemExit) as exit:
        runtime.parse(config, ["--help"])
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines at blanks and hyphens
    assert exit.value.code == 0
    source = Path(sys.modules[config.__module__].__file__).read_text()
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    for field in dataclasses.fields(config):
        assert "--" + field.name.replace("_", "-") in text
        assert "".join(f"{comments[field.name]} [{field.default}]".split()) in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_setting_is_read(script):
    """A flag that nothing reads does nothing in silence: each field is a `cfg.name` in the script or the runtime."""
    read = set()
    for file in (script.__file__, runtime.__file__):
        for node in ast.walk(ast.parse(Path(file).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cfg":
                read.add(node.attr)
    assert {field.name for field in dataclasses.fields(script.Config)} <= read


# --- start ---

def start(main, monkeypatch, *argv: str):
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    runtime.start(main, Config)


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
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="shapes"):
        start(module.work, monkeypatch)


def test_sample_refuses_more_than_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="sample.py runs as one process"):
        sample.main(sample.Config(model="nowhere"))


# --- device, order, load ---

def test_pick_auto_is_fp32_on_a_cpu():
    assert runtime.pick("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert runtime.pick("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("device", ["nonsense", "cuda:x", pytest.param("cuda", marks=pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU"))])
def test_pick_names_a_device_that_is_not_here(device):
    with pytest.raises(ValueError, match=f"--device {device}"):
        runtime.pick(device, "auto")


def test_order_is_a_permutation_by_seed_and_epoch():
    assert sorted(runtime.order(50, 3, 7)) == list(range(50)) and runtime.order(50, 3, 7) == runtime.order(50, 3, 7)
    assert len({tuple(runtime.order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_load_keeps_fp32_weights_to_train_and_cuts_the_vocabulary(tmp_path):
    tiny_model(tmp_path, spare=7)
    model, tokenizer = runtime.load(str(tmp_path), torch.device("cpu"), torch.bfloat16, train=True)
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.vocab_size == tokenizer.vocab_size == len(model.embed) - 7 == len(model.head_weight)
    model, _ = runtime.load(str(tmp_path), torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_load_refuses_a_tokenizer_larger_than_the_embedding(tmp_path):
    tiny_model(tmp_path, spare=-5)
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ ids, the embedding \d+ rows"):
        runtime.load(str(tmp_path), torch.device("cpu"), torch.float32)


# --- optimizer step ---

@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base) -> Transformer:
    return Transformer.from_pretrained(base)


def adam(model: Transformer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)


def step(model: Transformer, optimizer: torch.optim.Optimizer, gradient: float = 1.0) -> float:
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    return runtime.optimizer_step(model, optimizer, lr=1e-2, clip=1.0, what="step 3, examples [5]")


def test_optimizer_step_clips_and_uses_the_rate_it_is_given(model):
    size = sum(p.numel() for p in model.parameters())
    before = model.embed.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    assert step(model, optimizer, 2.0) == pytest.approx(2 * size**0.5, rel=1e-5)  # the norm before clipping
    torch.testing.assert_close(before - model.embed, torch.full_like(before, 1e-2 / size**0.5), rtol=0, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_optimizer_step_stops_at_a_gradient_that_is_not_finite(bad, model, monkeypatch, capsys):
    """ValueError that names the batch, exit status 2, weights and optimizer state untouched."""
    optimizer = adam(model)
    step(model, optimizer)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]

    def main(cfg):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        model.blocks[0].o.weight.grad[0, 0] = bad
        runtime.optimizer_step(model, optimizer, lr=1e-2, clip=1.0, what="step 3, examples [5]")

    with pytest.raises(SystemExit) as exit:
        start(main, monkeypatch)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: step 3, examples [5]: ") and "last checkpoint is kept" in error
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(torch.equal(state["exp_avg"], m) for state, m in zip(optimizer.state.values(), moments))


# --- run folder ---

@pytest.fixture
def cfg(base, tmp_path) -> Config:
    return Config(model=str(base), out=str(tmp_path / "run"))


@pytest.fixture
def saved(cfg, model):
    """A run with a checkpoint at step 1, its model and optimizer one step further on."""
    run, optimizer = runtime.Run(cfg, ALONE), adam(model)
    step(model, optimizer)
    run.log({"step": 1})
    run.save(model, optimizer, 1)
    step(model, optimizer)
    return run, model, optimizer


def test_run_writes_its_settings(cfg, tmp_path):
    runtime.Run(cfg, ALONE)
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == {
        "model": cfg.model, "out": cfg.out, "level": "outcome", "max_new_tokens": 8, "lr": 0.5, "steps": 4}


def test_run_refuses_a_folder_that_holds_a_run(cfg, saved, tmp_path):
    before = digest(tmp_path)
    with pytest.raises(FileExistsError, match="run holds a run already"):
        runtime.Run(replace(cfg, lr=0.1), ALONE)
    assert digest(tmp_path) == before


def test_run_resumes_with_the_same_settings_only(cfg, saved, tmp_path):
    before = digest(tmp_path)
    for change, said in (
        ({"lr": 0.25}, "--lr was 0.5, now 0.25"),
        ({"max_new_tokens": 9}, "--max-new-tokens was 8, now 9"),
        ({"level": "process"}, "--level was 'outcome', now 'process'"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            runtime.Run(replace(cfg, resume=True, **change), ALONE)
    assert digest(tmp_path) == before
    runtime.Run(replace(cfg, resume=True, steps=9), ALONE)  # a run may be made longer
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 9


def test_run_has_nothing_to_resume(cfg, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        runtime.Run(replace(cfg, resume=True), ALONE)
    assert not (tmp_path / "run").exists()


def test_run_that_stopped_before_its_first_checkpoint_does_not_ask_for_resume(cfg):
    """There is nothing to resume, so "--resume this one" would send the user in a circle."""
    runtime.Run(cfg, ALONE).log({"step": 1})
    with pytest.raises(FileExistsError) as error:
        runtime.Run(cfg, ALONE)
    assert "--resume" not in str(error.value) and "delete" in str(error.value)


def test_run_does_not_write_over_a_model(cfg, base):
    """--out that is --model, or any other model folder: its weights would be lost at the first checkpoint."""
    before = digest(base)
    with pytest.raises(FileExistsError, match="holds a model"):
        runtime.Run(replace(cfg, out=cfg.model), ALONE)
    assert digest(base) == before


def test_save_and_restore_give_back_weights_optimizer_and_step(cfg, saved, base, tmp_path):
    run, model, optimizer = saved
    run.log({"step": 2})
    run.save(model, optimizer, 2)
    assert set(digest(tmp_path / "run")) == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "run.json", "log.jsonl", "state.pt"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (base / name).read_bytes()

    other = Transformer.from_pretrained(base)
    fresh = adam(other)
    assert runtime.Run(replace(cfg, resume=True), ALONE).restore(other, fresh) == 2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    step(model, optimizer)
    step(other, fresh)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_save_keeps_fp32_weights_beside_a_bf16_model(cfg, base, tmp_path):
    model = Transformer.from_pretrained(base, torch.bfloat16, param_dtype=torch.float32)
    run, optimizer = runtime.Run(cfg, ALONE), adam(model)
    step(model, optimizer)
    run.save(model, optimizer, 1)
    assert Transformer.from_pretrained(cfg.out, torch.bfloat16).embed.equal(model.embed.bfloat16())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    other = Transformer.from_pretrained(base, torch.bfloat16, param_dtype=torch.float32)
    runtime.Run(replace(cfg, resume=True), ALONE).restore(other, adam(other))
    assert other.embed.dtype == torch.float32 and other.embed.equal(model.embed)


def refuse(count: int, error: Exception, function):
    """`function` for `count` calls, then `error` for ever."""
    calls = iter(range(10**6))

    def wrapped(*args, **kwargs):
        if next(calls) >= count:
            raise error
        return function(*args, **kwargs)

    return wrapped


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(("where", "name", "count", "error"), [
    (Transformer, "save_pretrained", 0, FULL),
    (shutil, "copyfile", 0, FULL),
    (shutil, "copyfile", 2, FULL),
    (torch, "save", 0, FULL),
    (torch, "save", 0, RuntimeError("unexpected pos 576 vs 534")),  # what torch says of a full disk
    (os, "replace", 0, FULL),
])
def test_save_that_fails_leaves_the_checkpoint_before(where, name, count, error, saved, monkeypatch, tmp_path):
    run, model, optimizer = saved
    before = digest(tmp_path)
    monkeypatch.setattr(where, name, refuse(count, error, getattr(where, name)))
    with pytest.raises(OSError, match="could not save step 2 .*checkpoint before it is whole"):
        run.save(model, optimizer, 2)
    assert digest(tmp_path) == before and not (tmp_path / "run" / "saving.tmp").exists()


@pytest.mark.parametrize("size", [500, 20_000, 100_000, 300_000])
def test_save_on_a_full_disk_leaves_the_checkpoint_before(size, saved, monkeypatch, capsys, tmp_path):
    """The operating system itself refuses, here files above a size: config, tokenizer, weights or state do not fit."""
    resource = pytest.importorskip("resource")
    run, model, optimizer = saved
    before = digest(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def main(cfg):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            run.save(model, optimizer, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(SystemExit) as exit:
        start(main, monkeypatch)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and "could not save step 2" in error
    assert digest(tmp_path) == before and not (tmp_path / "run" / "saving.tmp").exists()
    run.save(model, optimizer, 2)  # and with room again it saves
    assert torch.load(tmp_path / "run" / "state.pt")["step"] == 2


@pytest.mark.parametrize("count", range(6))
def test_save_that_stops_between_renames_can_be_resumed(count, cfg, saved, base, monkeypatch, tmp_path):
    """The state is renamed last, so it is of the checkpoint before; the model is one of the two, never in between."""
    run, model, optimizer = saved
    old = torch.load(tmp_path / "run" / "state.pt")["model"]["embed"]
    monkeypatch.setattr(os, "replace", refuse(count, FULL, os.replace))
    with pytest.raises(OSError, match="could not save"):
        run.save(model, optimizer, 2)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "saving.tmp").exists()
    assert any(Transformer.from_pretrained(cfg.out).embed.equal(x) for x in (old, model.embed))
    other = Transformer.from_pretrained(base)
    assert runtime.Run(replace(cfg, resume=True), ALONE).restore(other, adam(other)) == 1 and other.embed.equal(old)


def test_save_clears_what_a_killed_one_left(saved, tmp_path):
    run, model, optimizer = saved
    (tmp_path / "run" / "saving.tmp").mkdir()
    (tmp_path / "run" / "saving.tmp" / "model-00001-of-00002.safetensors").write_text("torn")
    run.save(model, optimizer, 2)
    assert not list((tmp_path / "run").glob("*tmp*")) and not list((tmp_path / "run").glob("model-*"))


@pytest.mark.parametrize("tail", ["", '{"step": 3, "nl'])
def test_restore_cuts_the_log_to_the_checkpoint(tail, cfg, saved, base, tmp_path):
    """Rows after the checkpoint go; so does a last row that a full disk or a kill left torn."""
    run, *_ = saved
    run.log({"step": 2, "nll": 1.5})
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write(tail)
    other = Transformer.from_pretrained(base)
    again = runtime.Run(replace(cfg, resume=True), ALONE)
    assert again.restore(other, adam(other)) == 1
    again.log({"step": 2, "nll": None})
    assert (tmp_path / "run" / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2, "nll": null}\n'


def test_resume_on_a_full_disk_loses_neither_settings_nor_log(cfg, saved, base, monkeypatch, tmp_path):
    run, *_ = saved
    run.log({"step": 2})
    before = digest(tmp_path)

    def torn(path, text):
        path.write_bytes(text[:5].encode())
        raise FULL

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="No space"):
        runtime.Run(replace(cfg, resume=True), ALONE)
    other = Transformer.from_pretrained(base)
    with pytest.raises(OSError, match="No space"):
        run.restore(other, adam(other))
    assert digest(tmp_path) == before


def test_log_prints_a_line_and_writes_a_row(cfg, capsys, tmp_path):
    runtime.Run(cfg, ALONE).log({"step": 3, "nll": 0.123456789, "icr": None})
    assert capsys.readouterr().out == "step 3  nll 0.1235  icr None\n"
    assert (tmp_path / "run" / "log.jsonl").read_text() == '{"step": 3, "nll": 0.123456789, "icr": null}\n'


def test_clock_parts_the_time():
    clock = runtime.Clock()
    clock.lap("rollout")
    clock.lap("update")
    assert list(clock.parts) == ["seconds_rollout", "seconds_update"] and min(clock.parts.values()) >= 0
