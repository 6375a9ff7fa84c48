"""Stages: what is made is not made again, needs come first, and a failure is named."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s2r.run.stages import Stage, make


def copy(tmp_path, name: str, *needs: str) -> Stage:
    """A stage that writes what it needs and its own name into the file `name`, and fails if a need is not there."""
    needs, path = tuple(str(tmp_path / need) for need in needs), str(tmp_path / name)
    script = f"text = ''.join(open(need).read() for need in {needs}); open({path!r}, 'x').write(text + {name!r})"
    return Stage(path, ("-c", script), needs)


def run_folder(tmp_path, name: str, *needs: str) -> Stage:
    """A stage that makes a folder, with a line more in it each time the stage runs."""
    folder = tmp_path / name
    script = (f"import os; os.makedirs({str(folder)!r}, exist_ok=True)\n"
              f"open({str(folder / 'log')!r}, 'a').write('ran\\n')")
    return Stage(str(folder), ("-c", script), tuple(str(tmp_path / need) for need in needs))


@pytest.mark.parametrize("at_once", (1, 3))
def test_make_runs_every_stage_once_after_its_needs(tmp_path, at_once):
    stages = [copy(tmp_path, "d", "b", "c"), copy(tmp_path, "b", "a"), copy(tmp_path, "c", "a"), copy(tmp_path, "a")]
    for _ in range(2):  # mode "x" fails on a file that is there, so a stage that ran twice would fail
        make(stages, at_once)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a": "a", "b": "ab", "c": "ac", "d": "abacd"}


def test_make_runs_at_most_at_once_stages_together(tmp_path):
    busy, too_many = str(tmp_path / "busy"), str(tmp_path / "too_many")
    script = (f"import os, time; number = len(os.listdir({busy!r})); open(os.path.join({busy!r}, 'NAME'), 'w')\n"
              f"if number >= 2: open({too_many!r}, 'w')\n"
              f"time.sleep(0.1); os.remove(os.path.join({busy!r}, 'NAME')); open({str(tmp_path / 'NAME')!r}, 'w')")
    (tmp_path / "busy").mkdir()
    make([Stage(str(tmp_path / name), ("-c", script.replace("NAME", name)), ()) for name in "abcde"], 2)
    assert {path.name for path in tmp_path.iterdir()} == {"busy", *"abcde"}


def test_make_runs_a_folder_again_until_something_is_made_of_it(tmp_path):
    folder, report = run_folder(tmp_path, "run"), copy(tmp_path, "report", "run/log")
    report = Stage(report.makes, report.command, (folder.makes,))
    make([folder])
    make([folder])  # nothing says that the first run was complete
    make([folder, report])
    assert (tmp_path / "report").read_text() == "ran\n" * 3 + "report"
    make([folder, report])
    assert (tmp_path / "run/log").read_text() == "ran\n" * 3


def test_make_takes_what_no_stage_makes_to_be_there(tmp_path):
    (tmp_path / "given").write_text("given ")
    make([copy(tmp_path, "a", "given")])
    assert (tmp_path / "a").read_text() == "given a"


def test_make_names_the_stage_that_fails_and_begins_no_other(tmp_path, capsys):
    fails = Stage(str(tmp_path / "bad"), ("-c", "1 / 0"), ())
    stages = [fails, copy(tmp_path, "after", "bad"), copy(tmp_path, "other")]
    with pytest.raises(ValueError, match=r"the stage that makes \S+/bad failed"):
        make(stages, 1)
    assert list(tmp_path.iterdir()) == []
    assert "            bad │ ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_make_awaits_the_stages_that_run_when_one_fails(tmp_path):
    script = f"import time; time.sleep(1); open({str(tmp_path / 'slow')!r}, 'w')"
    slow = Stage(str(tmp_path / "slow"), ("-c", script), ())
    with pytest.raises(ValueError, match="bad failed"):
        make([slow, Stage(str(tmp_path / "bad"), ("-c", "1 / 0"), ())], 2)
    assert (tmp_path / "slow").exists()


def test_a_stage_that_leaves_no_output_has_failed(tmp_path):
    with pytest.raises(ValueError, match="nothing failed"):
        make([Stage(str(tmp_path / "nothing"), ("-c", "pass"), ())])


def test_a_stage_has_one_thread_and_its_lines_its_name(tmp_path, capfd):
    script = ("import os, sys; print(os.environ['OMP_NUM_THREADS'], os.environ['TQDM_MININTERVAL'], flush=True)\n"
              f"print('1\\r2', file=sys.stderr); open({str(tmp_path / 'rl-outcome')!r}, 'w')")
    Stage(str(tmp_path / "rl-outcome"), ("-c", script), ()).run()
    lines = [line for line in capfd.readouterr().out.splitlines() if "│" in line]
    assert lines == [f"     rl-outcome │ {said}" for said in ("1 10", "1", "2")]


def test_make_begins_no_stage_after_ctrl_c(tmp_path):
    """A training script that is interrupted saves a checkpoint and exits with status 1: it is not complete."""
    train = ("import os, signal; signal.signal(signal.SIGINT, lambda *_: os._exit(1))\n"
             f"os.mkdir({str(tmp_path / 'run')!r}); signal.pause()")
    stages = [Stage(str(tmp_path / "run"), ("-c", train), ()), copy(tmp_path, "after", "run")]
    script = f"from s2r.run.stages import Stage, make; make({stages!r}, 2)"
    options = {"cwd": Path(__file__).resolve().parents[1], "start_new_session": True, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script], **options)
    until = time.monotonic() + 60
    while not (tmp_path / "run").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1] and process.returncode
    assert not (tmp_path / "after").exists()
