"""Curves of run folders: what is drawn, that it is reproducible, and what is refused."""

import re
import sys

import pytest

from s2r.run.files import write_jsonl
from s2r.run.flags import start
from s2r.view.curves import Config, main

POINT = r"<use [^>]*fill: #1f77b4"  # in the colour of the first run


@pytest.fixture
def runs(tmp_path) -> tuple[str, str]:
    """Two run folders: one with evaluations and a column that is None at first, one of SFT."""
    pytest.importorskip("matplotlib")
    folders = tmp_path / "outcome", tmp_path / "sft"
    for folder in folders:
        folder.mkdir()
    steps = ({"step": t, "reward": t / 4, "accuracy": 0.5, "va": None if t == 1 else 0.6} for t in (1, 2, 3))
    write_jsonl(folders[0] / "log.jsonl", steps)
    write_jsonl(folders[0] / "eval.jsonl", ({"step": t, "accuracy": 0.4, "by_level": {}} for t in (0, 3)))
    write_jsonl(folders[1] / "log.jsonl", ({"step": t, "nll": 2 / t, "kl": 0.1} for t in (1, 2)))
    return tuple(map(str, folders))


def test_curves_draw_all_runs_with_their_names_and_columns(runs, tmp_path):
    out = tmp_path / "new" / "curves.svg"
    main(Config(runs, str(out)))
    drawn = out.read_text()
    assert drawn.startswith("<?xml") and all(f">{run}</text>" in drawn for run in runs)
    assert all(f">{column}</text>" in drawn for column in ("reward", "nll", "accuracy", "va", "kl"))
    assert ">trials</text>" not in drawn and ">step</text>" in drawn
    again = tmp_path / "again.svg"
    main(Config(runs, str(again)))
    assert again.read_bytes() == out.read_bytes()


def test_curves_draw_the_columns_asked_for_and_evaluations_as_points(runs, tmp_path):
    out = tmp_path / "curves.svg"
    main(Config(runs, str(out), columns="accuracy"))
    drawn = out.read_text()
    assert ">accuracy</text>" in drawn and ">reward</text>" not in drawn
    assert len(re.findall(POINT, drawn)) == 2
    (tmp_path / "outcome" / "eval.jsonl").write_text('{"step": 1, "icr": 0.5, "by_level": {}}\n')
    main(Config(runs, str(out), columns="accuracy, icr"))  # icr: in evaluations alone
    assert ">icr</text>" in out.read_text()
    with pytest.raises(ValueError, match="--columns by_level: not in these logs"):
        main(Config(runs, str(out), columns="by_level"))
    (tmp_path / "outcome" / "eval.jsonl").write_text("")  # no evaluation yet
    main(Config(runs, str(out), columns="accuracy"))
    assert not re.findall(POINT, out.read_text())


def test_curves_refuse_what_they_cannot_draw(runs, tmp_path):
    out = str(tmp_path / "curves.svg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no log.jsonl"):
        main(Config((*runs, str(tmp_path / "empty")), out))
    (tmp_path / "empty" / "log.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(FileNotFoundError, match="no log.jsonl with a step"):
        main(Config((str(tmp_path / "empty"),), out))
    with pytest.raises(ValueError, match="--columns loss: not in these logs, which have accuracy, kl, nll"):
        main(Config(runs, out, columns="accuracy,loss"))
    with pytest.raises(ValueError, match="ends in .svg"):
        main(Config(runs, str(tmp_path / "curves.png")))
    assert not (tmp_path / "curves.svg").exists()


def test_curves_without_matplotlib_say_what_to_install(runs, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["curves", *map(str, runs), "--out", str(tmp_path / "f.svg")])
    with pytest.raises(SystemExit):
        start(main, Config)
    assert capsys.readouterr().err.rstrip().endswith("pip install matplotlib")
