"""The three scripts end to end on a tiny model: what they write, exact resume, and what bad input gets (DESIGN §5)."""

import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import train_rl
import train_sft
from s2r.data import load_trajectories, read_jsonl
from s2r.hf.tokenizer import Tokenizer
from s2r.packing import sft_sequences
from s2r.rollouts import roll_out
from s2r.run import checkpoint, loop, ranks
from s2r.run.flags import start
from s2r.run.journal import Journal
from s2r.grammar import SYSTEM_PROMPT
from s2r.run.files import write_jsonl
from tiny_model import digest, problem_file, same, steps, tiny_model, trajectory_file

ROOT = Path(__file__).resolve().parents[1]
SFT = {"batch_size": 8, "lr": 1e-2, "kl": 0.05, "max_length": 400, "device": "cpu"}
RL = {"problems": 4, "rollouts": 4, "updates": 2, "steps": 4, "max_new_tokens": 60, "lr": 2e-3, "warmup": 5,
      "save_every": 2, "beta": 0.01, "device": "cpu"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A base model, problems, trajectories, and the SFT run that half learnt them: its rollouts are of every kind."""
    folder = tmp_path_factory.mktemp("world")
    world = SimpleNamespace(
        base=str(tiny_model(folder / "base")), problems=str(problem_file(folder / "problems.jsonl")),
        trajectories=str(trajectory_file(folder / "trajectories.jsonl")), sft=str(folder / "sft"))
    train_sft.main(train_sft.Config(model=world.base, data=world.trajectories, out=world.sft, epochs=12, **SFT))
    return world


def log(out: Path) -> list[dict]:
    """Rows of log.jsonl without what a clock says."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in read_jsonl(out / "log.jsonl")]


SCRIPTS = {"sample": sample, "train_sft": train_sft, "train_rl": train_rl}


# --- what they write ---

def test_train_sft_learns_and_writes_a_run_folder(world):
    out = Path(world.sft)
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(digest(out)) == model | {"run.json", "log.jsonl"} | {f"step-24/{name}" for name in (*model, "state.pt")}
    settings = asdict(train_sft.Config(model=world.base, data=world.trajectories, out=world.sft, epochs=12, **SFT))
    settings["data_sha256"] = hashlib.sha256(Path(world.trajectories).read_bytes()).hexdigest()
    settings["dtype"] = "float32"  # what auto means here
    settings["weights_changed"] = Path(world.base, "model.safetensors").stat().st_mtime
    written = json.loads((out / "run.json").read_text())
    made = {name: written.pop(name) for name in ("command", "commit", "torch")}
    assert written == {k: v for k, v in settings.items() if k != "resume"}
    assert made["torch"] == torch.__version__ and len(made["commit"]) in (40, 7) and "pytest" in made["command"]
    rows = read_jsonl(out / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert set(rows[0]) == {"step", "nll", "kl", "grad_norm", "lr", "tokens", "tokens_per_second"}
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] > 0.1
    assert rows[-1]["nll"] < 0.2 * rows[0]["nll"]
    assert [row["lr"] for row in rows[:6]] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2, 1e-2])


def test_sft_epochs_go_through_the_data(world, tmp_path):
    """The batches of an epoch differ, each epoch reads every token once, and the logged KL is not times its weight."""
    rows = {}
    for kl in (0.5, 1e-9):
        settings = SFT | {"model": world.base, "data": world.trajectories, "out": str(tmp_path / f"{kl}"), "epochs": 3, "lr": 1e-4}
        train_sft.main(train_sft.Config(**settings | {"kl": kl, "warmup": 0}))
        rows[kl] = log(tmp_path / f"{kl}")
    tokens = [row["tokens"] for row in rows[0.5]]
    sequences, _ = sft_sequences(load_trajectories(world.trajectories), Tokenizer.from_pretrained(world.base), 10**6, unmasked=False)
    assert sum(tokens[:2]) == sum(tokens[2:4]) == sum(tokens[4:]) == sum(map(len, sequences)) and len(set(tokens)) > 2
    assert rows[0.5][1]["kl"] == pytest.approx(rows[1e-9][1]["kl"], rel=0.05) and rows[0.5][1]["kl"] > 1e-6


def test_train_sft_teaches_the_form_of_a_trajectory(world):
    """After SFT the greedy response to a problem of the data is a solve, then a verify with a verdict, then the end."""
    model, tokenizer = loop.load(SimpleNamespace(model=world.sft), ranks.Ranks(torch.device("cpu")), torch.float32)
    problems = train_rl.load_problems(world.problems)
    found = roll_out(model, tokenizer, problems, n=1, temperature=0.0, max_new_tokens=200, seed=0, progress=False)
    kinds = [[action.kind for action in t.actions] for t in found]  # of up to three trials, 120 tokens
    assert sum(k[:2] == ["solve", "verify"] for k in kinds) >= 12 and sum(t.finished for t in found) >= 12
    assert all(id < tokenizer.vocab_size for t in found for id in t.ids)


@pytest.mark.parametrize("level", ["outcome", "process"])
def test_train_rl_writes_a_run_folder_that_opens_again(level, world, tmp_path, capsys):
    out = tmp_path / "rl"
    cfg = train_rl.Config(model=world.sft, data=world.problems, out=str(out), level=level, eval_data=world.problems,
                          eval_every=4, show_every=2, **RL)
    train_rl.main(cfg)
    printed = capsys.readouterr().out
    assert printed.count("outcome reward") == 2 and "step 2/4, " in printed
    assert "evaluation after step 0" in printed and "evaluation after step 4" in printed
    evaluations = read_jsonl(out / "eval.jsonl")
    assert [row["step"] for row in evaluations] == [0, 4] and all(row["responses"] == 16 for row in evaluations)
    assert json.loads((out / "run.json").read_text())["level"] == level
    rows = read_jsonl(out / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert list(rows[0]) == [
        "step", "reward", "accuracy", "first_accuracy", "trials", "va", "va_right", "er", "cp", "icr", "cir",
        "say_correct", "repeats", "tokens", "finished", "kl", "entropy", "gap", "clipped", "grad_norm", "lr", "seconds_rollout", "seconds_score", "seconds_update"]
    assert [row["lr"] for row in rows] == pytest.approx([8e-4, 1.6e-3, 2e-3, 2e-3])  # two updates a step
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] != 0  # starts as its own reference
    assert all(row["gap"] < 1e-5 and -1 <= row["reward"] <= 1 and row["entropy"] > 0 for row in rows)
    assert min(row["grad_norm"] for row in rows) > 0  # the rollouts of this world differ in reward
    if level == "outcome":
        assert all(row["reward"] == pytest.approx(2 * row["accuracy"] - 1) for row in rows)

    start, end = (load_file(folder / "model.safetensors") for folder in (Path(world.sft), out))
    assert start.keys() == end.keys() and any(not torch.equal(start[name], end[name]) for name in start)
    sample.main(sample.Config(model=str(out), ask="1+1?", answer="2", max_new_tokens=20))
    assert "gold answer 2, outcome reward" in capsys.readouterr().out


def test_steps_of_rl_go_through_the_data_and_evaluations_are_greedy(world, tmp_path, monkeypatch):
    asked, seen = [], []

    def watched(model, tokenizer, problems, prepared=loop.roll_out, **options):
        asked.append((len(problems), options["n"], options["temperature"]))
        seen.extend(problem.unique_id for problem in problems)
        return prepared(model, tokenizer, problems, **options)

    monkeypatch.setattr(loop, "roll_out", watched)
    train_rl.main(train_rl.Config(model=world.base, data=world.problems, out=str(tmp_path / "rl"), eval_data=world.problems,
                                  eval_every=4, **RL | {"max_new_tokens": 8}))  # fmt: skip
    assert asked == [(16, 1, 0.0), *[(4, 4, 0.7)] * 4, (16, 1, 0.0)]
    assert sorted(seen[16:32]) == sorted(seen[:16])  # each problem once


def test_train_rl_process_level_needs_one_rollout_only(world, tmp_path):
    settings = RL | {"rollouts": 1, "steps": 1, "problems": 8, "level": "process"}
    train_rl.main(train_rl.Config(model=world.sft, data=world.problems, out=str(tmp_path / "rl"), **settings))
    assert (tmp_path / "rl" / "step-1" / "state.pt").is_file()


def test_train_rl_in_bf16_samples_from_the_current_weights(world, tmp_path, monkeypatch):
    """The sampler's copy is the fp32 master weights, cast anew each step; its vocabulary is the tokenizer's."""
    padded, masters, seen = shutil.copytree(world.sft, tmp_path / "padded"), [], []
    weights = load_file(padded / "model.safetensors")
    embed = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat((embed, torch.full_like(embed[:7], 10.0)))  # rows that shout
    save_file(weights, padded / "model.safetensors")
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": len(embed) + 7}))

    def load(*args, load=loop.load, **kwargs):
        model, tokenizer = load(*args, **kwargs)
        masters.append(model)
        return model, tokenizer

    def watched(sampler, tokenizer, problems, **options):
        master = masters[0]
        assert sampler is not master and {p.dtype for p in sampler.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in master.parameters()} == {torch.float32}
        for p, q in zip(sampler.parameters(), master.parameters(), strict=True):
            assert torch.equal(p, q.bfloat16())
        assert len(sampler.head_weight) == tokenizer.vocab_size < len(sampler.embed)  # never samples a spare row
        assert options["step"] == len(seen) + 1 and options["temperature"] == 0.7  # a stream of its own for each step
        seen.append(sampler.embed.detach().clone())
        return roll_out(sampler, tokenizer, problems, **options)

    monkeypatch.setattr(loop, "load", load)
    monkeypatch.setattr(loop, "roll_out", watched)
    settings = RL | {"dtype": "bfloat16", "steps": 3}
    out = tmp_path / "rl"
    train_rl.main(train_rl.Config(model=str(padded), data=world.problems, out=str(out), level="process", **settings))
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert all(row["gap"] < 0.1 for row in log(out))


def test_sample_writes_rollouts_and_report(world, tmp_path, capsys):
    rollouts, report = tmp_path / "new" / "rollouts.jsonl", tmp_path / "other" / "report.json"
    sample.main(sample.Config(model=world.sft, data=world.problems, n=2, temperature=0.7, max_new_tokens=60, limit=5,
                              seed=3, out=str(rollouts), report=str(report)))
    rows = read_jsonl(rollouts)
    assert [(row["unique_id"], row["sample"]) for row in rows] == [(f"sum/{i}", j) for i in range(5) for j in range(2)]
    assert all(len(row["ids"]) == len(row["logp"]) and row["reward"] in (-1, 1) for row in rows)
    found = json.loads(report.read_text())
    assert {"accuracy", "first_accuracy", "trials", "va", "er", "cp", "icr", "cir", "by_level", "finished", "tokens",
            "tokens_per_second"} <= set(found)  # DESIGN §3
    assert found["accuracy"] == sum(row["reward"] == 1 for row in rows) / 10 and found["responses"] == 10
    assert found["tokens"] == sum(len(row["ids"]) for row in rows) / 10 and found["tokens_per_second"] > 0
    assert set(found["by_level"]) == {"1", "2"} and found["model"] == world.sft
    printed = capsys.readouterr().out
    assert printed.count("── problem") == 1 and world.sft in printed  # one trajectory, then the table


def test_sample_killed_at_any_point_goes_on_and_samples_nothing_twice(world, tmp_path, monkeypatch):
    def run(name: str, **flags) -> tuple[list[dict], int]:
        """Rows of the rollout file, and how many rollouts were sampled for it."""
        sampled, add = [], Journal.add
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "add", lambda journal, rollout: (sampled.append(rollout), add(journal, rollout)))
            flags = {"n": 2, "temperature": 0.7, "max_new_tokens": 60, "limit": 5, "seed": 3, "slots": 4} | flags
            sample.main(sample.Config(model=world.sft, data=world.problems, out=str(tmp_path / name), **flags))
        return read_jsonl(tmp_path / name), len(sampled)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda journal: None)
        expected, sampled = run("whole")
    assert sampled == len(expected) == 10
    journal = (tmp_path / "whole.begun").read_bytes()
    lines = [i for i, byte in enumerate(journal) if byte == ord("\n")]
    for cut in (0, 7, lines[0] + 1, lines[1], lines[4] + 1, lines[6] + 9, lines[-2] + 1, len(journal)):
        begun = tmp_path / "killed.begun"
        begun.write_bytes(journal[:cut])
        rows, sampled = run("killed")
        assert sampled == 10 - max(journal[:cut].count(b"\n") - 1, 0) and not begun.exists()
        assert [{**row, "logp": pytest.approx(row["logp"], abs=1e-5)} for row in rows] == expected
    for flags in ({"seed": 4}, {"temperature": 0.8}, {"max_new_tokens": 61}, {"limit": 4}, {"n": 3}):
        begun.write_bytes(journal)
        with pytest.raises(ValueError, match="killed.begun holds rollouts of a run that was cut short.*delete it"):
            run("killed", **flags)
        assert begun.read_bytes() == journal


@pytest.mark.parametrize("name", ["write_jsonl", "page", "replacing"])  # of the rollouts, the page, the report
def test_sample_keeps_what_it_sampled_until_all_is_written(world, tmp_path, monkeypatch, name):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, name, full)
    with pytest.raises(OSError, match="No space"):
        sample.main(sample.Config(
            model=world.base, data=world.problems, limit=2, max_new_tokens=4, show=0,
            out=str(tmp_path / "r.jsonl"), html=str(tmp_path / "r.html"), report=str(tmp_path / "r.json")))  # fmt: skip
    assert len((tmp_path / "r.jsonl.begun").read_text().splitlines()) == 3  # settings and two rollouts


def test_sample_asks_one_problem(world, tmp_path, capsys):
    asked = {"model": world.sft, "ask": "3+4?", "n": 2, "temperature": 1.0, "max_new_tokens": 20}
    sample.main(sample.Config(**asked))
    printed = capsys.readouterr().out
    assert printed.count("── problem asked: 3+4?") == 2 and "reward" not in printed  # no --answer, nothing graded
    sample.main(sample.Config(**asked, answer="7", out=str(tmp_path / "asked.jsonl")))
    assert "reward" in capsys.readouterr().out
    assert len(read_jsonl(tmp_path / "asked.jsonl")) == 2


def test_trained_folder_opens_in_transformers_with_the_same_greedy_tokens(world, tmp_path):
    transformers = pytest.importorskip("transformers")
    rollouts = tmp_path / "greedy.jsonl"
    sample.main(sample.Config(model=world.sft, data=world.problems, limit=3, max_new_tokens=40, out=str(rollouts)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(world.sft).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.sft)
    for row in read_jsonl(rollouts):
        messages = [{"role": "system", "content": SYSTEM_PROMPT},
                    {"role": "user", "content": row["problem"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == row["prompt_ids"]
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0)
        assert out[0, len(ids) :].tolist() == row["ids"]


# --- settings ---

@pytest.fixture(scope="module")
def weights(world, tmp_path_factory):
    """The hash of the weights that two steps of a script reach with some settings changed."""

    def run(name: str, **change) -> str:
        out = tmp_path_factory.mktemp("settings") / "out"
        if name == "train_sft":
            settings = SFT | {"model": world.base, "data": world.trajectories, "epochs": 1} | change
        else:
            settings = RL | {"model": world.sft, "data": world.problems, "steps": 2} | change
        SCRIPTS[name].main(SCRIPTS[name].Config(out=str(out), **settings))
        return digest(out)["model.safetensors"]

    return run


def test_setting_of_the_method_changes_what_is_learnt(weights):
    default = weights("train_sft")
    for change in ({"kl": 0.0}, {"kl": 1.0}, {"warmup": 0}, {"max_grad_norm": 0.01}, {"unmasked": True}, {"seed": 1}):
        assert weights("train_sft", **change) != default, change
    default = weights("train_rl")
    for change in ({"level": "process"}, {"beta": 1.0}, {"epsilon": 1e-4}, {"temperature": 1.0}, {"updates": 1},
                   {"warmup": 0}, {"max_grad_norm": 0.01}, {"seed": 1}):
        assert weights("train_rl", **change) != default, change


def test_setting_of_the_machine_changes_nothing(weights, world):
    """Memory, printing, saving and evaluating leave the weights as they are, to the bit."""
    for name, changes in (
        ("train_sft", ({"checkpointing": True}, {"save_every": 1, "keep": 1}, {"offload": True})),
        ("train_rl", ({"checkpointing": True}, {"offload": True}, {"slots": 3}, {"show_every": 1, "save_every": 1},
                      {"eval_data": world.problems, "eval_every": 1})),
    ):
        default = weights(name)
        for change in changes:
            assert weights(name, **change) == default, (name, change)


# --- exact resume ---

class Killed(BaseException):
    """What a power cut looks like from inside."""


@pytest.mark.parametrize(("level", "dtype"), [("outcome", "float32"), ("process", "bfloat16")])
def test_resume_of_rl_is_exact(level, dtype, world, tmp_path, monkeypatch):
    """4 steps in one go = killed in step 4, after the checkpoint at 2 and the log row of 3, and resumed."""
    settings = RL | {"model": world.sft, "data": world.problems, "level": level, "dtype": dtype}
    train_rl.main(train_rl.Config(out=str(tmp_path / "whole"), **settings))

    def killed(self, row, log=checkpoint.Run.log):
        if row["step"] == 4:
            raise Killed
        log(self, row)

    monkeypatch.setattr(checkpoint.Run, "log", killed)
    with pytest.raises(Killed):
        train_rl.main(train_rl.Config(out=str(tmp_path / "halves"), **settings))
    monkeypatch.undo()
    assert [row["step"] for row in log(tmp_path / "halves")] == [1, 2, 3]
    assert [file.name for file in (tmp_path / "halves").glob("step-*")] == ["step-2"]
    train_rl.main(train_rl.Config(out=str(tmp_path / "halves"), resume=True, **settings))

    whole, halves = (torch.load(tmp_path / half / "step-4" / "state.pt") for half in ("whole", "halves"))
    assert whole["step"] == 4 and whole["optimizer"]["state"] and same(whole, halves)
    first, second = (digest(tmp_path / half)["model.safetensors"] for half in ("whole", "halves"))
    assert first == second
    assert log(tmp_path / "whole") == log(tmp_path / "halves") and len(log(tmp_path / "whole")) == 4


@pytest.mark.parametrize(("name", "more", "fewer"), [("train_sft", {"epochs": 2}, {"epochs": 1}),
                                                     ("train_rl", {"steps": 4}, {"steps": 2})])  # fmt: skip
def test_resume_may_make_a_copied_run_longer(name, more, fewer, world, tmp_path):
    """Two epochs or 4 steps in one go = half of it, the folder copied, then the rest with --resume; the half stays."""
    base, data, settings = (
        (world.base, world.trajectories, SFT) if name == "train_sft" else (world.sft, world.problems, RL)
    )
    script, settings = SCRIPTS[name], settings | {"model": base, "data": data}
    script.main(script.Config(out=str(tmp_path / "whole"), **settings | more))
    script.main(script.Config(out=str(tmp_path / "half"), **settings | fewer))
    before = digest(tmp_path / "half")
    shutil.copytree(tmp_path / "half", tmp_path / "longer")
    script.main(script.Config(out=str(tmp_path / "longer"), resume=True, **settings | more))
    step = len(log(tmp_path / "whole"))
    states = [torch.load(tmp_path / out / f"step-{step}" / "state.pt") for out in ("whole", "longer")]
    assert same(*states) and log(tmp_path / "whole") == log(tmp_path / "longer") and digest(tmp_path / "half") == before


def test_signal_while_sampling_gives_the_step_up(world, tmp_path, monkeypatch, capsys, handlers):
    """The rollouts of step 3 are not waited for: step 2 is saved, the script exits, and resumed it is as in one go."""
    settings = RL | {"model": world.sft, "data": world.problems, "save_every": 99}
    train_rl.main(train_rl.Config(out=str(tmp_path / "whole"), **settings))
    found = []

    def interrupted(*args, step, **options):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        found.append(roll_out(*args, step=step, **options))
        return found[-1]

    monkeypatch.setattr(loop, "roll_out", interrupted)
    with pytest.raises(SystemExit, match="1"):
        train_rl.main(train_rl.Config(out=str(tmp_path / "halves"), **settings))
    assert [len(rollouts) for rollouts in found] == [16, 16, 0]
    assert capsys.readouterr().out.endswith("stopped by a signal; 2 steps are done, --resume continues from there\n")
    assert [file.name for file in (tmp_path / "halves").glob("step-*")] == ["step-2"]
    monkeypatch.undo()
    train_rl.main(train_rl.Config(out=str(tmp_path / "halves"), resume=True, **settings))
    assert same(*(torch.load(tmp_path / half / "step-4" / "state.pt") for half in ("whole", "halves")))
    assert log(tmp_path / "whole") == log(tmp_path / "halves")


@pytest.mark.parametrize(("name", "length"), [("train_sft", {"epochs": 1}), ("train_rl", {"steps": 1})])
def test_resume_of_a_run_that_is_done_says_so(name, length, started, tmp_path, capsys, handlers):
    started(name, **length)
    before = digest(tmp_path)
    capsys.readouterr()
    started(name, resume=True, **length)
    assert capsys.readouterr().out.splitlines()[-1].endswith("nothing to do") and digest(tmp_path) == before


# --- bad input ---

@pytest.fixture
def started(world, tmp_path, monkeypatch):
    """Start a script as its command does, with flags over small settings that work."""

    def run(name: str, **flags) -> None:
        given = {"model": world.base if name == "train_sft" else world.sft,
                 "data": world.trajectories if name == "train_sft" else world.problems, "out": tmp_path / "out"}
        given |= {"train_sft": SFT, "train_rl": RL, "sample": {"max_new_tokens": 8}}[name] | flags
        argv = [word for flag, value in given.items()
                for word in ("--" + flag.replace("_", "-"), *([] if value is True else [str(value)]))]
        monkeypatch.setattr(sys, "argv", [name + ".py", *argv])
        start(SCRIPTS[name].main, SCRIPTS[name].Config)

    return run


@pytest.fixture
def refused(started, tmp_path, capsys):
    """Start a script on flags that it has to refuse: status 2, one line on stderr, no file touched; -> that line."""

    def run(name: str, **flags) -> str:
        before = digest(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            started(name, **flags)
        error = capsys.readouterr().err
        assert exit.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert digest(tmp_path) == before
        return error

    return run


GOOD = {"problem": "1+1?", "answer": "2"}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(("rows", "says"), [
    ([json.dumps(GOOD), '{"problem": "2+2?", "answer"'], "row 2: not JSON"),
    ([json.dumps(GOOD), "[1]"], "row 2: a list"),
    ([json.dumps({"answer": "2"})], 'row 1: no "problem"'),
    ([json.dumps({"problem": "1+1?"})], 'row 1: "answer" is empty or missing'),
    ([json.dumps({"problem": "1+1?", "answer": "\\frac{1}{"})], "row 1: gold answer"),
    ([], "no rows"),
])
def test_bad_data_row_is_named(rows, says, name, refused, tmp_path):
    if name == "train_sft":
        rows = [row.replace('{"', f'{{"trajectory": {json.dumps(steps(1, 1, 0))}, "', 1) for row in rows]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(rows))
    assert f"error: {data}: {says}" in refused(name, data=data)


def test_bad_trajectory_is_named(refused, tmp_path):
    for trajectory, says in ((None, '"trajectory" is not a list'), (steps(1, 1, 1)[:2], 'step 1 has "correct": False'),
                             (steps(1, 1, 0)[:1], '"trajectory" is not a list of pairs')):
        write_jsonl(tmp_path / "data.jsonl", [GOOD | {"trajectory": steps(1, 1, 0)}, GOOD | {"trajectory": trajectory}])
        assert f"{tmp_path / 'data.jsonl'}: row 2: {says}" in refused("train_sft", data=tmp_path / "data.jsonl")


@pytest.mark.parametrize("name", SCRIPTS)
def test_missing_data_file_is_named(name, refused, tmp_path):
    assert f"{tmp_path / 'nowhere.jsonl'}: no such file" in refused(name, data=tmp_path / "nowhere.jsonl")


def test_several_greedy_responses_to_a_problem_are_refused(refused):
    assert "--n 5 at --temperature 0" in refused("sample", n=5)


def test_gold_answer_of_a_problem_asked_has_to_be_readable(refused):
    assert "--answer" in refused("sample", data="", ask="1+1?", answer="\\frac{1}{")


@pytest.mark.parametrize("name", ["sample", "train_rl"])
def test_prompt_longer_than_the_context_is_named_before_anything_runs(name, refused, tmp_path):
    """Wherever in the file it stands: not on the day that its turn comes."""
    data = tmp_path / "data.jsonl"
    rows = [{"problem": f"{i}+0?", "answer": str(i), "unique_id": f"short/{i}"} for i in range(30)]
    write_jsonl(data, [*rows, {"problem": "word " * 500, "answer": "2", "unique_id": "long/30"}])
    assert "problem long/30: its prompt has" in refused(name, data=data)


def test_no_example_within_max_length_or_the_context_is_an_error(refused, world, tmp_path):
    assert f"{world.trajectories}: no example is within 20 tokens" in refused("train_sft", max_length=20)
    small = tiny_model(tmp_path / "small", context=60)
    assert f"{world.trajectories}: no example is within 60 tokens" in refused("train_sft", model=small)


@pytest.mark.parametrize(("name", "setting"), [
    ("train_sft", "warmup"), ("train_sft", "kl"), ("train_rl", "warmup"), ("train_rl", "beta")])
def test_negative_settings_are_named(name, setting, refused):
    error = refused(name, **{setting: -1})
    assert error.startswith(f"error: --{setting} -1") and error.endswith(": give a finite number, 0 or more\n")


def test_a_problem_asked_has_no_report_and_without_an_answer_no_judged_file(refused, tmp_path):
    assert "--report is of a data set" in refused("sample", data="", ask="1+1?", answer="2", report=tmp_path / "r.json")
    for judged in ({"html": tmp_path / "p.html"}, {"out": tmp_path / "r.jsonl"}):
        assert "need --answer" in refused("sample", data="", ask="1+1?", **judged)


def test_sample_writes_over_no_problem_file_and_takes_no_answer_for_one(refused, world, tmp_path):
    shutil.copy(world.problems, data := tmp_path / "p.jsonl")
    before = data.read_bytes()
    assert "it is the problem file" in refused("sample", data=data, out=tmp_path / "." / "p.jsonl")
    assert "--answer belongs to --ask" in refused("sample", answer="2") and data.read_bytes() == before


def test_settings_that_contradict_are_named(refused, world):
    assert "and not both" in refused("train_rl", offline=world.problems)
    assert "--baseline context: it belongs to --offline" in refused("train_rl", baseline="context")


@pytest.mark.parametrize("config", [train_sft.Config, train_rl.Config])
def test_defaults_are_those_that_the_comments_give_as_the_papers(config):
    said = re.findall(r"^    (\w+): .*\(paper: ([\d.e-]+)[;, )]", inspect.getsource(config), re.MULTILINE)
    assert len(said) >= 7 and all(getattr(config, name) == float(value) for name, value in said)


@pytest.mark.parametrize("name", ["train_sft", "train_rl"])
def test_settings_that_would_train_nothing_are_named(name, refused):
    for setting in ("max_grad_norm", "lora_alpha"):
        assert f"--{setting.replace('_', '-')} 0.0: give a finite number, above 0" in refused(name, **{setting: 0.0})


@pytest.mark.parametrize("name", ["train_sft", "train_rl"])
def test_out_folder_that_holds_a_run_is_left_alone(name, refused, world, tmp_path):
    shutil.copytree(world.sft, tmp_path / "out")
    assert "holds a run already" in refused(name)


@pytest.mark.parametrize("name", ["train_sft", "train_rl"])
def test_out_that_cannot_be_written_is_named(name, refused, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert str(tmp_path / "file") in refused(name, out=tmp_path / "file" / "run")


@pytest.mark.parametrize("flags", [{"eval_every": 5}, {"eval_data": "test.jsonl"}])
def test_evaluation_needs_data_and_interval(flags, refused):
    assert "--eval-data and --eval-every" in refused("train_rl", **flags)


@pytest.mark.parametrize("name", SCRIPTS)
def test_broken_model_folder_is_named(name, refused, world, tmp_path):
    def broken(case: str) -> Path:
        return Path(shutil.copytree(world.base, tmp_path / case))

    folder = broken("shards")
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors",
                            "model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors: missing" in refused(name, model=folder)

    folder = broken("truncated")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert f"{folder / 'model.safetensors'}: not a whole safetensors file" in refused(name, model=folder)

    folder = broken("template")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert f"{folder}: no chat template" in refused(name, model=folder)

    folder = broken("family")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert f"{folder / 'config.json'}: model_type 'mamba' is not supported" in refused(name, model=folder)

    assert str(tmp_path / "nowhere") in refused(name, model=tmp_path / "nowhere")


def test_vocabulary_mismatch_is_named(refused, tmp_path):
    tiny_model(tmp_path / "small", spare=-3)
    assert f"{tmp_path / 'small'}: the tokenizer has" in refused("sample", model=tmp_path / "small")


def test_rl_sizes_that_do_not_fit_are_named(refused, world):
    assert "--rollouts 1" in refused("train_rl", level="outcome", rollouts=1)
    assert "--updates 17" in refused("train_rl", updates=17)
    assert f"{world.problems} holds 16 problems, --problems asks for 17" in refused("train_rl", problems=17)


@pytest.mark.parametrize("script", [train_sft, train_rl])
def test_signal_in_the_last_evaluation_is_no_success_and_the_evaluation_is_made_up_for(
    world, tmp_path, monkeypatch, handlers, script
):
    if script is train_sft:
        settings = SFT | {"model": world.base, "data": world.trajectories, "epochs": 1, "batch_size": 99}
    else:
        settings = RL | {"model": world.sft, "data": world.problems, "steps": 1}
    settings |= {"eval_data": world.problems, "eval_every": 1, "max_new_tokens": 8, "out": str(tmp_path / "out")}

    def interrupted(*args, prepared=loop.roll_out, **options):
        if (tmp_path / "out" / "log.jsonl").exists():  # after step 1, the only one
            os.kill(os.getpid(), signal.SIGTERM)
        return prepared(*args, **options)

    monkeypatch.setattr(loop, "roll_out", interrupted)
    for _ in range(2):  # in the run, and when it is resumed
        with pytest.raises(SystemExit, match="1"):
            script.main(script.Config(**settings, resume=True))
    monkeypatch.undo()
    assert [row["step"] for row in read_jsonl(tmp_path / "out" / "eval.jsonl")] == [0]
    for _ in range(2):
        script.main(script.Config(**settings, resume=True))
        assert [row["step"] for row in read_jsonl(tmp_path / "out" / "eval.jsonl")] == [0, 1]


def test_resume_cuts_both_logs_by_step_and_evaluates_nothing_twice(world, tmp_path, monkeypatch):
    """Killed in step 4 of an SFT run that saves every third step and evaluates every second."""
    settings = SFT | {"epochs": 3, "save_every": 3, "eval_data": world.problems, "eval_every": 2, "max_new_tokens": 8}
    settings |= {"model": world.base, "data": world.trajectories}
    train_sft.main(train_sft.Config(out=str(tmp_path / "whole"), **settings))

    def killed(self, row, log=checkpoint.Run.log):
        log(self, row)
        if row["step"] == 5:
            raise Killed

    monkeypatch.setattr(checkpoint.Run, "log", killed)
    with pytest.raises(Killed):
        train_sft.main(train_sft.Config(out=str(tmp_path / "halves"), **settings))
    monkeypatch.undo()
    assert [row["step"] for row in read_jsonl(tmp_path / "halves" / "eval.jsonl")] == [0, 2, 4]
    train_sft.main(train_sft.Config(out=str(tmp_path / "halves"), resume=True, **settings))
    whole, halves = (read_jsonl(tmp_path / half / "eval.jsonl") for half in ("whole", "halves"))
    assert whole == halves and [row["step"] for row in whole] == [0, 2, 4, 6]
    assert log(tmp_path / "whole") == log(tmp_path / "halves")


def test_beta_0_loads_no_reference(world, tmp_path, monkeypatch):
    loaded, load = [], loop.load

    def counted(*args, **options):
        loaded.append(options)
        return load(*args, **options)

    monkeypatch.setattr(loop, "load", counted)
    settings = RL | {"model": world.sft, "data": world.problems, "steps": 1}
    train_rl.main(train_rl.Config(out=str(tmp_path / "free"), **settings | {"beta": 0.0}))
    assert len(loaded) == 1 and log(tmp_path / "free")[0]["kl"] is None
    train_rl.main(train_rl.Config(out=str(tmp_path / "tied"), **settings))
    assert len(loaded) == 3 and log(tmp_path / "tied")[0]["kl"] is not None


def test_tensorboard_gets_the_log(world, tmp_path):
    pytest.importorskip("tensorboard")
    settings = SFT | {"model": world.base, "data": world.trajectories, "epochs": 1}
    train_sft.main(train_sft.Config(out=str(tmp_path / "out"), tensorboard=True, **settings))
    assert list((tmp_path / "out").glob("events*"))


def test_step_with_nothing_to_learn_from_is_a_warning(world, tmp_path, capsys):
    """The random base model is never right: all rewards of every step are −1."""
    settings = RL | {"model": world.base, "data": world.problems, "steps": 1}
    train_rl.main(train_rl.Config(out=str(tmp_path / "out"), **settings))
    assert "warning: " in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_data_is_required_and_the_toy_is_named(name, refused, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--model", "m", *(["--out", "o"] if name != "sample" else [])])
    with pytest.raises(SystemExit) as exit:
        start(SCRIPTS[name].main, SCRIPTS[name].Config)
    assert exit.value.code == 2 and "python -m s2r.toy" in capsys.readouterr().err
    if name == "sample":
        assert "--ask" in refused(name, data="", ask="")


def test_output_that_is_no_file_is_left_alone(refused, tmp_path):
    """On a pipe; a device would be replaced just so."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for flag in ("out", "report", "html"):
        assert f"{pipe}: there is something that is not a file" in refused("sample", **{"out": "", flag: pipe})
        assert pipe.is_fifo()


@pytest.mark.parametrize(("name", "flag", "value"), [
    ("sample", "seed", -3), ("train_sft", "seed", -3), ("train_rl", "seed", -3), ("sample", "temperature", math.inf),
    ("train_rl", "temperature", math.inf), ("sample", "n", 0), ("sample", "max_new_tokens", 0), ("sample", "slots", 0), ("sample", "temperature", -1.0),
    ("train_sft", "batch_size", 0), ("train_sft", "epochs", 0), ("train_sft", "save_every", 0),
    ("train_rl", "problems", 0), ("train_rl", "rollouts", 0), ("train_rl", "updates", 0), ("train_rl", "steps", 0),
    ("train_rl", "temperature", 0.0), ("train_rl", "max_new_tokens", 0), ("train_rl", "save_every", 0),
    ("train_rl", "slots", 0),
])
def test_setting_that_makes_no_sense_is_named(name, flag, value, refused):
    assert f"--{flag.replace('_', '-')} {value}" in refused(name, **{flag: value})


def test_gradient_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(started, tmp_path, monkeypatch, capsys):
    """The batch is named, status 2, and the checkpoint before it can be opened and resumed."""
    calls = iter(range(100))

    def poisoned(model, batch, temperature, policy_logp=train_rl.policy_logp):
        logp, entropy = policy_logp(model, batch, temperature)
        return (logp * float("nan") if logp.requires_grad and next(calls) == 5 else logp), entropy

    monkeypatch.setattr(train_rl, "policy_logp", poisoned)
    with pytest.raises(SystemExit) as exit:
        started("train_rl")
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and error.startswith("error: step 3, problems ['sum/") and "norm is nan" in error
    (file,) = (tmp_path / "out").glob("batch-*")
    assert f"the batch is saved in {file}" in error
    parts = torch.load(file, weights_only=True)
    assert {"reward", "span", "logp_old", "logp_sampled"} <= set(parts[0])
    assert all(part["logp_old"].isfinite().all() and len(part["pack"]["ids"]) > len(part["logp_old"]) for part in parts)
    state = torch.load(tmp_path / "out" / "step-2" / "state.pt")
    assert state["step"] == 2 and all(x.isfinite().all() for x in state["model"].values())
    started("train_rl", resume=True)  # the poison was one micro-batch
    assert [row["step"] for row in log(tmp_path / "out")] == [1, 2, 3, 4]


# --- as a user starts them ---

def python(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})


def test_command_runs_from_the_shell(world, tmp_path):
    report = tmp_path / "report.json"
    done = python("sample.py", "--model", world.sft, "--data", world.problems, "--limit", "2", "--max-new-tokens", "8",
                  "--report", str(report))
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["responses"] == 2


def test_command_with_bad_data_exits_2_with_one_line(world, tmp_path):
    (tmp_path / "data.jsonl").write_text("no json\n")
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    done = python("train_rl.py", "--model", world.sft, "--data", str(data), "--out", str(out))
    assert (done.returncode, done.stdout) == (2, "") and not out.exists()
    assert done.stderr.startswith(f"error: {data}: row 1: not JSON") and done.stderr.count("\n") == 1
