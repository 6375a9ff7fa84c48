"""Runs that end early: killed at any moment and resumed, asked to stop by a signal, with one rank of two lost or at NaN.

    python -m pytest tests/test_kills.py                  a few moments
    python -m pytest tests/test_kills.py --kills 20       twenty for each script and number of processes
"""

import os
import random
import signal
import time
from pathlib import Path

import forked
import pytest
import torch
from forked import finish
from test_scripts import RL, SFT, log

import train_rl
import train_sft
from tiny_model import problem_file, same, tiny_model, trajectory_file

SCRIPTS = {"sft": "train_sft", "rl": "train_rl"}
STEPS = 6
SETTINGS = {
    "sft": SFT | {"epochs": 3, "batch_size": 8, "save_every": 1},  # two steps an epoch
    "rl": RL | {"level": "process", "problems": 2, "updates": 2, "steps": STEPS, "save_every": 1, "max_new_tokens": 40},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    data, base = str(trajectory_file(folder / "sft.jsonl")), str(tiny_model(folder / "sft"))
    train_sft.main(train_sft.Config(model=base, data=data, out=str(folder / "rl"), **SFT | {"epochs": 12}))
    problem_file(folder / "rl.jsonl")
    return folder  # `rl`, the model for it, half learnt the trajectories: its rollouts differ in reward


def poisoned(model, batch, temperature, policy_logp=train_rl.policy_logp):
    """`policy_logp`, in the update not a number."""
    logp, entropy = policy_logp(model, batch, temperature)
    return (logp * float("nan") if logp.requires_grad else logp), entropy


def poison_the_second(rank: int) -> None:
    if rank == 1:
        train_rl.policy_logp = poisoned


def launch(name: str, ranks: int, folder: Path, out: Path, prepare=forked.nothing, **change) -> list:
    """The processes of a run, started."""
    settings = SETTINGS[name] | {"model": folder / name, "data": folder / f"{name}.jsonl", "out": out} | change
    return forked.launch(SCRIPTS[name], ranks, settings, f"{out}.output", prepare)


def await_rows(out: Path, count: int, started: list) -> None:
    """Wait until the log has so many rows, or the run is over."""
    while any(one.is_alive() for one in started):
        if count == 0 or (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") >= count:
            return
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(folder):
    """(script, number of processes) -> the run folder of six steps in one go."""
    made = {}

    def run(name: str, ranks: int) -> Path:
        out = folder / f"{name}-{ranks}"
        if out not in made:
            assert finish(launch(name, ranks, folder, out)) == [0] * ranks
            made[out] = all(row["grad_norm"] > 0 for row in log(out))
        assert made[out]
        return out

    return run


def same_run(out: Path, wanted: Path) -> bool:
    """The same weights, optimizer state and rows as the run in one go, to the bit."""
    states = (torch.load(run / f"step-{STEPS}" / "state.pt") for run in (out, wanted))
    weights = ((run / "model.safetensors").read_bytes() for run in (out, wanted))
    return same(*states) and same(*weights) and log(out) == log(wanted) and len(log(out)) == STEPS


def test_killed_at_any_moment_and_resumed_is_as_in_one_go(folder, whole, tmp_path, kills, capsys):
    """kill -9 of all processes at a random moment: in a step, while saving, before the first step or after the last."""
    moments = random.Random(0)
    for name in SCRIPTS:
        for ranks in (1, 2):
            wanted = whole(name, ranks)
            for i in range(kills):
                out, rows, later = tmp_path / f"{name}-{ranks}-{i}", moments.randrange(STEPS), moments.uniform(0, 0.2)
                started = launch(name, ranks, folder, out)
                await_rows(out, rows, started)
                time.sleep(later)
                for one in started:
                    one.kill()
                killed = finish(started)
                found = sorted(file.name for file in out.glob("*")) if out.exists() else []
                assert finish(launch(name, ranks, folder, out, resume=True)) == [0] * ranks, (out, found)
                assert same_run(out, wanted), (out, found)
                assert "cannot be read" not in Path(f"{out}.output").read_text()  # every newest checkpoint is whole
                with capsys.disabled():
                    saved = [file for file in found if file.startswith("step") or file.endswith(("tmp", "partial"))]
                    print(f"\n{name}, {ranks} processes, {rows} rows + {later:.3f} s: {killed} {saved}", end="")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", SCRIPTS)
def test_signal_to_one_process_ends_all_at_the_same_step(name, ranks, folder, whole, tmp_path):
    """Exit status 1 and a checkpoint of the last whole step; resumed, the run is as in one go."""
    out = tmp_path / "out"
    started = launch(name, ranks, folder, out, save_every=99)
    await_rows(out, 2, started)
    os.kill(started[-1].pid, signal.SIGTERM)
    assert finish(started) == [1] * ranks
    (checkpoint,) = out.glob("step-*")
    assert checkpoint.name == f"step-{len(log(out))}"
    assert finish(launch(name, ranks, folder, out, save_every=99, resume=True)) == [0] * ranks
    assert same_run(out, whole(name, ranks))


def test_offload_changes_no_number_and_can_be_given_up(folder, whole, tmp_path):
    """Two steps with the optimizer's state offloaded, two more after resuming, two without."""
    out = tmp_path / "out"
    for change in ({"steps": 2, "offload": True}, {"steps": 4, "offload": True, "resume": True}, {"resume": True}):
        assert finish(launch("rl", 2, folder, out, **change)) == [0, 0]
    assert same_run(out, whole("rl", 2))


def test_rank_that_is_lost_ends_the_other(folder, tmp_path):
    out = tmp_path / "out"
    started = launch("rl", 2, folder, out, steps=10_000, save_every=1)
    await_rows(out, 2, started)
    started[1].kill()
    assert finish(started)[1] == -signal.SIGKILL and started[0].exitcode > 0
    assert "Traceback" in Path(f"{out}.output").read_text()
    done = max(int(file.name[5:]) for file in out.glob("step-*"))
    assert finish(launch("rl", 2, folder, out, steps=done + 1, save_every=1, resume=True)) == [0, 0]
    assert len(log(out)) == done + 1


def test_nan_on_one_rank_stops_both_and_each_saves_its_batch(folder, tmp_path):
    out = tmp_path / "out"
    statuses = finish(launch("rl", 2, folder, out, prepare=poison_the_second))
    errors = Path(f"{out}.output").read_text()
    assert statuses == [2, 2], errors
    for rank in (0, 1):
        file = out / f"batch-step-1-rank-{rank}.pt"
        assert f"the loss is nan, the gradient's norm is nan; the batch is saved in {file}" in errors
        assert all(part["reward"].isfinite().all() for part in torch.load(file, weights_only=True))
    assert not list(out.glob("step-*"))
