"""Several processes: the same rollouts, the same steps and the same weights as one, whatever their number."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from forked import finish, launch
from safetensors.torch import load_file
from test_scripts import RL, SFT, log

import sample
import train_rl
import train_sft
from s2r.data import load_problems, read_jsonl
from s2r.packing import pack
from s2r.run.files import write_jsonl
from s2r.run.journal import Journal
from s2r.run.ranks import Ranks
from s2r.stage0 import verifications
from tiny_model import problem_file, tiny_model, trajectory_file

# Three steps; two problems a step, so that of three ranks one has nothing to sample. A small rate: Adam makes a whole step
# of a gradient that is rounding error, and at a large one that soon moves a probability past a rollout's random number.
JOBS = {
    "sft": (train_sft, SFT | {"epochs": 1, "batch_size": 6, "tokens_per_microbatch": 200}),
    "outcome": (train_rl, RL | {"level": "outcome", "problems": 2, "steps": 3, "lr": 2e-4, "tokens_per_microbatch": 200}),
    "lora": (train_rl, RL | {"level": "process", "problems": 2, "steps": 3, "lr": 2e-3, "lora": 4}),
    "lora offline": (train_rl, RL | {"problems": 2, "rollouts": 2, "steps": 3, "lr": 2e-3, "lora": 4, "data": ""}),
    "process": (train_rl, RL | {"level": "process", "problems": 2, "steps": 3, "lr": 2e-4, "tokens_per_microbatch": 200}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, its data, and what one process makes of each job: name -> run folder."""
    folder = tmp_path_factory.mktemp("world")
    base, taught = tiny_model(folder / "model"), folder / "taught"
    trajectories, problems = trajectory_file(folder / "t.jsonl"), problem_file(folder / "p.jsonl")
    train_sft.main(train_sft.Config(model=str(base), data=str(trajectories), out=str(taught), **SFT | {"epochs": 12}))
    rollouts = {"model": str(taught), "data": str(problems), "n": 4, "temperature": 0.7, "max_new_tokens": 60}
    sample.main(sample.Config(**rollouts, out=str(folder / "r.jsonl"), device="cpu"))

    def settings(name: str, out: Path) -> dict:
        model, data = (base, trajectories) if name == "sft" else (taught, problems)
        files = {"offline": str(folder / "r.jsonl")} if "offline" in name else {"data": str(data)}
        return JOBS[name][1] | {"model": str(model), "out": str(out)} | files

    for name, (script, _) in JOBS.items():
        script.main(script.Config(**settings(name, folder / name)))
    return folder, settings


def run(ranks: int, module: str, settings: dict, output: Path) -> str:
    """What the command of a module prints on so many processes."""
    statuses = finish(launch(module, ranks, settings, output))
    assert statuses == [0] * ranks, output.read_text()[-3000:]
    return output.read_text()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", JOBS)
def test_ranks_take_the_steps_of_one_process(name, ranks, world, tmp_path):
    folder, settings = world
    run(ranks, JOBS[name][0].__name__, settings(name, tmp_path / "out"), tmp_path / "printed")
    rows, wanted = log(tmp_path / "out"), log(folder / name)
    assert len(rows) == len(wanted) == 3
    for row, one in zip(rows, wanted):
        for key in one:
            if "seconds" in key or "per_second" in key:
                continue
            assert row[key] == one[key] or row[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key
        assert row["tokens"] == one["tokens"]  # of the very same rollouts
        assert one["grad_norm"] > 0
    found, exact = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder / name))
    assert found.keys() == exact.keys()
    for key in exact:  # by norm: where a gradient is nearly zero, Adam makes a visible step of its rounding error
        assert (found[key] - exact[key]).norm() <= 1e-5 * exact[key].norm(), key


def compare(found: Path, wanted: Path, tolerance: float) -> None:
    """The same steps of the same rollouts, and weights equal up to a relative tolerance, by norm."""
    rows, one = log(found), log(wanted)
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in one]
    for row, other in zip(rows, one):
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=tolerance)
    found, exact = (load_file(path / "model.safetensors") for path in (found, wanted))
    for key in exact:
        assert (found[key].double() - exact[key].double()).norm() <= tolerance * exact[key].double().norm(), key


def test_two_machines_of_two_processes_take_the_steps_of_one_process(world, tmp_path):
    """Parameters are spread over the two of a machine, and each machine has all of them. As users start them."""
    folder, settings = world
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings("process", tmp_path / "out").items()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2",
              "--master-addr=127.0.0.1", f"--master-port={port}"]
    machines = [subprocess.Popen([*launch, f"--node-rank={i}", str(ROOT / "train_rl.py"), *flags], cwd=ROOT,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in range(2)]
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)[-6000:]
    compare(tmp_path / "out", folder / "process", 1e-5)


def test_ranks_take_the_steps_of_one_process_in_bfloat16_up_to_its_rounding(world, tmp_path):
    """A gradient has 8 bits in a micro-batch, of which ranks have others; weights are 8 bits when they are saved."""
    _, settings = world
    script, names = JOBS["sft"][0], {1: tmp_path / "one", 2: tmp_path / "two"}
    script.main(script.Config(**settings("sft", names[1]) | {"dtype": "bfloat16"}))
    run(2, "train_sft", settings("sft", names[2]) | {"dtype": "bfloat16"}, tmp_path / "printed")
    compare(names[2], names[1], 2**-8)


SAMPLE = {"n": 3, "temperature": 0.7, "max_new_tokens": 60, "slots": 4, "device": "cpu"}


def test_ranks_sample_what_one_process_does(world, tmp_path):
    """The same rollout file, and a report that differs in its speed alone; also where a run was cut short before."""
    folder, _ = world
    whole = SAMPLE | {"model": str(folder / "taught"), "data": str(folder / "p.jsonl")}

    def files(name: str) -> dict:
        return {"out": str(tmp_path / f"{name}.jsonl"), "report": str(tmp_path / f"{name}.json")}

    sample.main(sample.Config(**whole, **files("one")))
    rows = read_jsonl(tmp_path / "one.jsonl")
    run(2, "sample", whole | files("two"), tmp_path / "printed")
    assert_same(read_jsonl(tmp_path / "two.jsonl"), rows)
    assert not (tmp_path / "two.jsonl.begun").exists()
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert all(report.pop("tokens_per_second") > 0 for report in reports) and reports[0] == reports[1]

    # What a run that was killed leaves: some rollouts in the order in which they ended, the last line torn.
    settings = sample.Config(**whole, **files("cut"))
    problems = load_problems(settings.data)
    Journal(settings, problems, Ranks(torch.device("cpu")), torch.float32)
    places = {problem.unique_id: i for i, problem in enumerate(problems)}
    found = [{"prompt": places[row["unique_id"]], **{k: row[k] for k in ("sample", "ids", "logp", "finished")}} for row in rows]
    with open(f"{settings.out}.begun", "a") as begun:
        begun.writelines(json.dumps(row) + "\n" for row in found[::-5])
        begun.write(json.dumps(found[0])[:40])
    assert f"{len(found[::-5])} rollouts are there" in run(3, "sample", whole | files("cut"), tmp_path / "printed")
    assert_same(read_jsonl(tmp_path / "cut.jsonl"), rows)


def assert_same(found: list[dict], wanted: list[dict]) -> None:
    """The same rows; log p up to the rounding of sums in batches of other sizes."""
    for row, one in zip(found, wanted, strict=True):
        assert row.pop("logp") == pytest.approx(one["logp"], abs=1e-5)
        assert row == {key: value for key, value in one.items() if key != "logp"}


def test_ranks_verify_what_one_process_does(world, tmp_path):
    folder, _ = world
    problems = [{"unique_id": f"sum/{i}", "problem": f"{i}+1?", "answer": str(i + 1)} for i in range(5)]
    write_jsonl(tmp_path / "r.jsonl", [row | {"finished": True, "text": rf"\boxed{{{said}}}"}
                                       for row in problems for said in (row["answer"], "77")])  # fmt: skip
    settings = {"rollouts": str(tmp_path / "r.jsonl"), "model": str(folder / "taught"), "max_new_tokens": 20, "batch": 3,
                "device": "cpu"}  # fmt: skip
    verifications.main(verifications.Config(**settings, out=str(tmp_path / "one.jsonl")))
    run(2, "s2r.stage0.verifications", settings | {"out": str(tmp_path / "two.jsonl")}, tmp_path / "printed")
    one, two = (sorted(read_jsonl(tmp_path / f"{name}.jsonl"), key=str) for name in ("one", "two"))
    assert one == two and len(one) == 10


def test_resume_with_another_number_of_ranks_goes_on_where_it_was(world, tmp_path):
    folder, settings = world
    out = tmp_path / "out"
    whole = settings("process", out)
    for ranks, change in ((2, {"steps": 2}), (3, {"steps": 3, "resume": True})):
        run(ranks, "train_rl", whole | change, tmp_path / "printed")
    rows, wanted = log(out), log(folder / "process")
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in wanted]
    assert rows[-1]["reward"] == pytest.approx(wanted[-1]["reward"])


def test_an_error_ends_all_ranks_and_is_said(world, tmp_path):
    _, settings = world
    statuses = finish(launch("train_rl", 2, settings("process", tmp_path / "out") | {"problems": 99}, tmp_path / "printed"))
    assert all(statuses) and "error: " in (printed := (tmp_path / "printed").read_text()) and "--problems asks for 99" in printed
    assert not (tmp_path / "out").exists()


# --- who does what ---


def test_share_covers_every_item_once_and_evens_out_the_costs(monkeypatch):
    costs = [900, 20, 300, 310, 5, 290, 0, 40]
    shares = []
    for rank in range(3):
        ranks = Ranks(torch.device("cpu"))
        ranks.rank, ranks.size = rank, 3
        shares.append(ranks.share(costs))
    assert sorted(i for share in shares for i in share) == list(range(8))
    assert max(sum(costs[i] for i in share) for share in shares) == 900
    assert all(share == sorted(share) for share in shares)


def test_one_process_does_everything_by_itself():
    ranks = Ranks(torch.device("cpu"))
    packs = pack([[1, 2]], [[1]], 9, "cpu")
    assert (ranks.rank, ranks.size) == (0, 1) and ranks.share([3, 1, 2]) == [0, 1, 2]
    assert ranks.even(packs) is packs and ranks.gather([1]) == [1] and ranks.sum([2.0]) == [2.0]
