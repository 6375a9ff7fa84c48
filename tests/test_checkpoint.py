"""The run folder: settings, log, checkpoints, what a full disk or a kill leaves, and what is resumed."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_loop import ALONE, BATCH, Config, adam, start, step

from s2r.hf.tokenizer import Tokenizer
from s2r.model import Transformer
from s2r.run import checkpoint
from tiny_model import digest


MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture
def cfg(base, tmp_path) -> Config:
    return Config(model=str(base), out=str(tmp_path / "run"))


def take_up(cfg: Config, data: str = "config.json") -> checkpoint.Run:
    """The run folder of these settings; `data`, what is learnt from, is a file of the model folder for want of any."""
    return checkpoint.Run(cfg, ALONE, torch.float32, data=f"{cfg.model}/{data}", steps=cfg.steps)


@pytest.fixture
def saved(cfg, model):
    """A run with a checkpoint at step 1, its model and optimizer one step further on."""
    run, optimizer = take_up(cfg), adam(model)
    step(model, optimizer)
    run.log({"step": 1})
    run.save(model, optimizer, 1)
    step(model, optimizer)
    return run, model, optimizer


def test_run_writes_its_settings(cfg, base, tmp_path):
    take_up(cfg)
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {"command", "commit", "torch"} <= set(written)
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name != "resume"}
    assert written == written | settings | {"data_sha256": hashlib.sha256((base / "config.json").read_bytes()).hexdigest()}


def test_run_refuses_a_folder_that_holds_a_run(cfg, saved, tmp_path):
    before = digest(tmp_path)
    with pytest.raises(FileExistsError, match="run holds a run already"):
        take_up(replace(cfg, lr=0.1))
    assert digest(tmp_path) == before


def test_run_resumes_with_the_same_settings_only(cfg, saved, tmp_path):
    before = digest(tmp_path)
    for change, said in (
        ({"lr": 0.25}, "--lr was 0.5, now 0.25"),
        ({"max_new_tokens": 9}, "--max-new-tokens was 8, now 9"),
        ({"level": "process"}, "--level was 'outcome', now 'process'"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            take_up(replace(cfg, resume=True, **change))
    assert digest(tmp_path) == before
    take_up(replace(cfg, resume=True, steps=9, keep=1, offload=True))  # a run may be made longer, and fit another machine
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 9


def test_run_resumes_with_the_same_data_only(cfg, saved, tmp_path):
    before = digest(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.json is not what \S+run learnt from"):
        take_up(replace(cfg, resume=True), "tokenizer.json")
    assert digest(tmp_path) == before


def test_resume_of_a_run_that_does_not_exist_starts_it(cfg, model, tmp_path):
    """So a script of commands with --resume can be started again as it is."""
    assert take_up(replace(cfg, resume=True)).restore(model, adam(model)) == 0
    assert (tmp_path / "run" / "run.json").is_file()


def test_run_that_stopped_before_its_first_checkpoint_starts_anew(cfg, model, tmp_path):
    take_up(cfg).log({"step": 1})
    with pytest.raises(FileExistsError, match="--resume this one"):
        take_up(cfg)
    assert take_up(replace(cfg, resume=True, lr=0.25)).restore(model, adam(model)) == 0
    assert (tmp_path / "run" / "log.jsonl").read_text() == ""
    assert json.loads((tmp_path / "run" / "run.json").read_text())["lr"] == 0.25


def test_tensorboard_that_is_not_installed_is_named_before_anything_is_written(cfg, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError):
        take_up(replace(cfg, tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_run_whose_checkpoints_were_taken_away_is_not_started_anew(cfg, saved, tmp_path):
    shutil.rmtree(tmp_path / "run" / "step-1")
    before = digest(tmp_path)
    with pytest.raises(FileExistsError, match="a run whose checkpoints are gone"):
        take_up(replace(cfg, resume=True))
    assert digest(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_run_does_not_write_over_checkpoints_without_settings(cfg, saved, tmp_path, resume):
    (tmp_path / "run" / "run.json").unlink()
    before = digest(tmp_path)
    with pytest.raises(FileExistsError, match="would write over"):
        take_up(replace(cfg, resume=resume))
    assert digest(tmp_path) == before


def test_run_resumes_in_the_dtype_that_it_began_with(cfg, saved):
    with pytest.raises(ValueError, match="--dtype was 'float32', now 'bfloat16'"):
        checkpoint.Run(replace(cfg, resume=True), ALONE, torch.bfloat16, data=f"{cfg.model}/config.json", steps=cfg.steps)


def test_run_refuses_machines_with_different_copies(cfg, base, tmp_path, monkeypatch):
    """Of the data, or of weights of equal size: without a check each machine would learn from its own."""
    shutil.copytree(base, other := tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    data = [base / "config.json", base / "tokenizer.json"]
    for copy in ((data[1], base), (data[0], other)):
        monkeypatch.setattr(ALONE, "gather", lambda mine, copy=copy: [*mine, checkpoint._digests(*copy)])
        with pytest.raises(ValueError, match="different copies"):
            take_up(cfg)
    assert not (tmp_path / "run").exists()


def test_run_does_not_write_over_a_model(cfg, base):
    """--out that is --model, or any other model folder: its weights would be lost at the first checkpoint."""
    before = digest(base)
    with pytest.raises(FileExistsError, match="holds a model"):
        take_up(replace(cfg, out=cfg.model))
    assert digest(base) == before


def test_save_and_restore_give_back_weights_optimizer_and_step(cfg, saved, base, tmp_path):
    run, model, optimizer = saved
    run.log({"step": 2})
    run.save(model, optimizer, 2)
    assert set(digest(tmp_path / "run")) == {
        *MODEL, "run.json", "log.jsonl", *(f"step-{n}/{name}" for n in (1, 2) for name in (*MODEL, "state.pt"))}
    for name in MODEL:  # the run folder is the newest checkpoint, and takes no room of its own
        assert (tmp_path / "run" / name).samefile(tmp_path / "run" / "step-2" / name)
        if "token" in name:
            assert (tmp_path / "run" / name).read_bytes() == (base / name).read_bytes()

    other = Transformer.from_pretrained(base)
    fresh = adam(other)
    assert take_up(replace(cfg, resume=True)).restore(other, fresh) == 2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    step(model, optimizer)
    step(other, fresh)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_save_keeps_fp32_weights_beside_a_bf16_model(cfg, base, tmp_path):
    model = Transformer.from_pretrained(base, torch.bfloat16, param_dtype=torch.float32)
    run, optimizer = take_up(cfg), adam(model)
    step(model, optimizer)
    run.save(model, optimizer, 1)
    assert Transformer.from_pretrained(cfg.out, torch.bfloat16).embed.equal(model.embed.bfloat16())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    other = Transformer.from_pretrained(base, torch.bfloat16, param_dtype=torch.float32)
    take_up(replace(cfg, resume=True)).restore(other, adam(other))
    assert other.embed.dtype == torch.float32 and other.embed.equal(model.embed)


@pytest.mark.parametrize("settings", [{"eos_token_id": 0, "top_p": 0.8}, None])
def test_save_names_the_end_of_turn_among_what_ends_a_response(settings, cfg, base, tmp_path):
    """Base models end a text, not a turn: by their settings `transformers` would run on past the end of a response."""
    other = shutil.copytree(base, tmp_path / "base")
    (other / "generation_config.json").unlink()
    if settings:
        (other / "generation_config.json").write_text(json.dumps(settings))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    model, end = Transformer.from_pretrained(other), Tokenizer.from_pretrained(other).end_id
    take_up(replace(cfg, model=str(other))).save(model, adam(model), 1)
    written = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert end != 0 and written == (settings or {}) | {"eos_token_id": [0, end]}
    assert Tokenizer.from_pretrained(tmp_path / "run").stop_ids == {0, end}


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
    (os, "fsync", 3, OSError(5, "Input/output error")),
    (os, "rename", 0, FULL),
])
def test_save_that_fails_leaves_the_checkpoint_before(where, name, count, error, saved, monkeypatch, tmp_path):
    run, model, optimizer = saved
    before = digest(tmp_path)
    monkeypatch.setattr(where, name, refuse(count, error, getattr(where, name)))
    with pytest.raises(OSError, match="could not save step 2 .*--resume takes the newest that is whole"):
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
    assert torch.load(tmp_path / "run" / "step-2" / "state.pt")["step"] == 2


@pytest.mark.parametrize("count", range(len(MODEL)))
def test_save_that_stops_between_its_links_can_be_resumed(count, cfg, saved, base, monkeypatch, tmp_path):
    """The checkpoint is whole by then; the run folder has the model of either, and that of the checkpoint on resuming."""
    run, model, optimizer = saved
    old = torch.load(tmp_path / "run" / "step-1" / "state.pt")["model"]["embed"]
    monkeypatch.setattr(os, "replace", refuse(count, FULL, os.replace))
    with pytest.raises(OSError, match="could not save"):
        run.save(model, optimizer, 2)
    monkeypatch.undo()
    assert any(Transformer.from_pretrained(cfg.out).embed.equal(x) for x in (old, model.embed))
    other = Transformer.from_pretrained(base)
    assert take_up(replace(cfg, resume=True)).restore(other, adam(other)) == 2 and other.embed.equal(model.embed)
    assert Transformer.from_pretrained(cfg.out).embed.equal(model.embed) and not list((tmp_path / "run").glob("*.partial"))


def test_save_copies_where_there_are_no_hard_links(saved, monkeypatch, tmp_path):
    run, model, optimizer = saved
    monkeypatch.setattr(os, "link", refuse(0, OSError(1, "Operation not permitted"), os.link))
    run.save(model, optimizer, 2)
    for name in MODEL:
        ours, theirs = tmp_path / "run" / name, tmp_path / "run" / "step-2" / name
        assert ours.read_bytes() == theirs.read_bytes() and not ours.samefile(theirs)
        assert ours.stat().st_mtime == theirs.stat().st_mtime  # by which the next stage tells that its --model has changed


def test_save_forces_log_and_checkpoint_onto_the_disk_before_the_rename(saved, monkeypatch):
    run, model, optimizer = saved
    forced = []
    monkeypatch.setattr(checkpoint, "sync", lambda path: forced.append(path.name))
    monkeypatch.setattr(os, "rename", lambda *names, rename=os.rename: forced.append("rename") or rename(*names))
    run.log({"step": 2})
    run.save(model, optimizer, 2)
    assert {"log.jsonl", "state.pt", "model.safetensors", "saving.tmp"} <= set(forced[: forced.index("rename")])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_save_keeps_the_newest(keep, cfg, model, tmp_path):
    run, optimizer = take_up(replace(cfg, keep=keep)), adam(model)
    for n in (1, 2, 9, 10, 11):
        run.save(model, optimizer, n)
    found = sorted(int(folder.name[5:]) for folder in (tmp_path / "run").glob("step-*"))
    assert found == [1, 2, 9, 10, 11][-keep:]


def test_save_does_nothing_where_a_checkpoint_is_the_newest_already(saved, monkeypatch):
    run, model, optimizer = saved
    monkeypatch.setattr(torch, "save", refuse(0, FULL, torch.save))
    run.save(model, optimizer, 1)


def mount(folder: Path, options: str) -> None:
    """A file system of its own on `folder`; skips the test where mounting is not allowed."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.decode().strip()}")


@pytest.fixture
def disk(cfg, tmp_path):
    """`cfg` with its run folder on a disk that has room for two checkpoints, not for three."""
    if not shutil.which("mount"):
        pytest.skip("no mount here")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=1200k")
    yield replace(cfg, out=str(folder / "run"))
    subprocess.run(["umount", "--lazy", folder], check=True)  # a save that failed may hold a file open


def refused(main, monkeypatch, capsys) -> str:
    """The one line that `main` ends with."""
    with pytest.raises(SystemExit) as exit:
        start(lambda _: main(), monkeypatch)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_disk_that_is_full_keeps_the_checkpoints_before(disk, base, monkeypatch, capsys):
    model = Transformer.from_pretrained(base)
    run, optimizer, out = take_up(disk), adam(model), Path(disk.out)
    for n in (1, 2):
        step(model, optimizer)
        run.log({"step": n})
        run.save(model, optimizer, n)
    before = digest(out)
    assert "could not save step 3" in refused(lambda: run.save(model, optimizer, 3), monkeypatch, capsys)
    assert digest(out) == before
    assert "could not add step 3" in refused(lambda: run.log({"step": 3, "x": "x" * 10**6}), monkeypatch, capsys)
    shutil.rmtree(out / "step-1")  # room again; the row was torn
    again, other = take_up(replace(disk, resume=True)), Transformer.from_pretrained(base)
    assert again.restore(other, adam(other)) == 2 and other.embed.equal(model.embed)
    assert (out / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_disk_that_is_read_only_is_named(disk, model, monkeypatch, capsys):
    run, optimizer, out = take_up(disk), adam(model), Path(disk.out)
    run.save(model, optimizer, 1)
    mount(out.parent, "remount,ro,size=1200k")
    before = digest(out)
    for main in (lambda: take_up(replace(disk, resume=True)), lambda: take_up(replace(disk, out=f"{out}2")),
                 lambda: run.log({"step": 2}), lambda: run.save(model, optimizer, 2)):
        error = refused(main, monkeypatch, capsys)
        assert "Read-only file system" in error and str(out) in error
    assert digest(out) == before


def truncate(file: Path, size: int | None) -> None:
    """Leave the first bytes of a file; None: not even its name."""
    if size is None:
        file.unlink()
    else:
        os.truncate(file, size)


@pytest.mark.parametrize(("name", "size"), [
    ("state.pt", 0), ("state.pt", 1), ("state.pt", 5_000), ("state.pt", 360_000), ("model.safetensors", 0),
    ("model.safetensors", 100_000), ("state.pt", None),
])
def test_restore_falls_back_to_the_checkpoint_before(name, size, cfg, saved, base, capsys, tmp_path):
    """A newest checkpoint that is truncated, or lacks a file, is named in a warning; the next one saved replaces it."""
    run, model, optimizer = saved
    old = torch.load(tmp_path / "run" / "step-1" / "state.pt")["model"]["embed"]
    run.log({"step": 2})
    run.save(model, optimizer, 2)
    truncate(tmp_path / "run" / "step-2" / name, size)
    capsys.readouterr()
    for _ in range(2):  # once more, had it been killed right after that
        again, other = take_up(replace(cfg, resume=True)), Transformer.from_pretrained(base)
        fresh = adam(other)
        assert again.restore(other, fresh) == 1 and other.embed.equal(old)
        warning = capsys.readouterr().err
        assert warning.startswith(f"warning: {tmp_path / 'run' / 'step-2'} cannot be read (") and warning.count("\n") == 1
    assert (tmp_path / "run" / "log.jsonl").read_text() == '{"step": 1}\n'
    assert Transformer.from_pretrained(cfg.out).embed.equal(old)
    step(other, fresh)
    again.save(other, fresh, 2)
    assert take_up(replace(cfg, resume=True)).restore(other, fresh) == 2 and capsys.readouterr().err == ""


def test_save_takes_away_a_later_checkpoint_that_could_not_be_read(cfg, saved, base, tmp_path):
    """Else it would count as one of the newest, and the good one before it would go first."""
    run, model, optimizer = saved
    run.save(model, optimizer, 5)
    truncate(tmp_path / "run" / "step-5" / "state.pt", 9)
    again = take_up(replace(cfg, resume=True))
    assert again.restore(model, optimizer) == 1
    again.save(model, optimizer, 3)
    assert sorted(folder.name for folder in (tmp_path / "run").glob("step-*")) == ["step-1", "step-3"]


def test_restore_without_a_readable_checkpoint_is_an_error(cfg, saved, tmp_path):
    _, model, optimizer = saved
    truncate(tmp_path / "run" / "step-1" / "state.pt", 9)
    before = digest(tmp_path)
    with pytest.raises(ValueError, match="none of its 1 checkpoints can be read"):
        take_up(replace(cfg, resume=True)).restore(model, optimizer)
    assert {**digest(tmp_path), "run/run.json": ""} == {**before, "run/run.json": ""}


def test_restore_with_offload_leaves_the_state_on_the_cpu_and_the_numbers_as_they_are(cfg, saved, base):
    run, model, optimizer = saved
    run.save(model, optimizer, 2)
    other = Transformer.from_pretrained(base)
    fresh, again = adam(other), take_up(replace(cfg, resume=True, offload=True))
    assert again.restore(other, fresh) == 2
    step(model, optimizer)
    step(other, fresh, run=again)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    again.save(other, fresh, 3)


def test_keep_batch_saves_tensors_that_load_without_this_code(saved, tmp_path):
    run, *_ = saved
    assert run.keep_batch(7, BATCH) == f"the batch is saved in {tmp_path / 'run' / 'batch-step-7-rank-0.pt'}"
    (batch,) = torch.load(tmp_path / "run" / "batch-step-7-rank-0.pt", weights_only=True)
    assert batch["ids"].tolist() == [1, 2, 3] and batch["scored"].tolist() == [1, 2]


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
    again = take_up(replace(cfg, resume=True))
    assert again.restore(other, adam(other)) == 1
    again.log({"step": 2, "nll": None})
    assert (tmp_path / "run" / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2, "nll": null}\n'


def test_resume_on_a_full_disk_loses_neither_settings_nor_log(cfg, saved, base, monkeypatch, tmp_path):
    run, *_ = saved
    run.log({"step": 2})

    def torn(path, text):
        path.write_bytes(text[:5].encode())
        raise FULL

    again, other = take_up(replace(cfg, resume=True)), Transformer.from_pretrained(base)
    before = digest(tmp_path)
    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="No space"):
        take_up(replace(cfg, resume=True))
    assert digest(tmp_path) == before
    assert again.restore(other, adam(other)) == 1  # to cut a log needs no room
    assert (tmp_path / "run" / "log.jsonl").read_text() == '{"step": 1}\n'


def test_log_prints_a_line_and_writes_a_row(cfg, capsys, tmp_path):
    run = take_up(cfg)
    run.log({"step": 1, "nll": 0.123456789, "icr": None})
    assert capsys.readouterr().out == "step 1/4, ? left  nll 0.1235  icr –\n"
    run.pace = (time.time() - 600, 1)  # step 1 ended ten minutes ago
    run.log({"step": 2, "nll": 0.5, "icr": 1.0})
    assert capsys.readouterr().out == "step 2/4, 20 min left  nll 0.5  icr 1\n"
    assert (tmp_path / "run" / "log.jsonl").read_text().splitlines()[0] == '{"step": 1, "nll": 0.123456789, "icr": null}'
    run.add("eval.jsonl", {"step": 2, "accuracy": 0.5, "by_level": {"1": {"accuracy": 0.5}}}, "evaluation after step 2")
    assert capsys.readouterr().out == "evaluation after step 2  accuracy 0.5\n"
    row = json.loads((tmp_path / "run" / "eval.jsonl").read_text())
    assert row == {"step": 2, "accuracy": 0.5, "by_level": {"1": {"accuracy": 0.5}}}
