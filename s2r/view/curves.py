"""Curves of training runs, several side by side: one panel per column of the log, one colour per run.

    python -m s2r.view.curves runs/rl-outcome runs/rl-process --out curves.svg
    python -m s2r.view.curves runs/sft --columns nll,kl --out sft.svg

A line is a run's log.jsonl; points are its eval.jsonl, the evaluations on --eval-data. Needs matplotlib.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from s2r.data import read_jsonl
from s2r.run.files import check_output
from s2r.run.flags import start

USUAL = "reward nll accuracy first_accuracy trials va va_right er cp say_correct kl entropy grad_norm".split()


@dataclass(frozen=True)
class Config:
    runs: list[str]  # folders that train_sft.py or train_rl.py wrote
    out: str  # figure to write, SVG
    columns: str = ""  # columns to draw, separated by commas [the usual ones]


def main(cfg: Config) -> None:
    import matplotlib.figure  # optional: without it, `start` says what to install

    if not cfg.out.endswith(".svg"):
        raise ValueError(f"--out {cfg.out}: give a name that ends in .svg")
    check_output(cfg.out)
    logs = {run: (_rows(run, "log.jsonl"), _rows(run, "eval.jsonl")) for run in cfg.runs}
    if empty := ", ".join(run for run, (log, _) in logs.items() if not log):
        raise FileNotFoundError(f"{empty}: no log.jsonl with a step; give the folder of a training run")
    numbers = [item for both in logs.values() for rows in both for row in rows for item in row.items()]
    known = {name for name, value in numbers if isinstance(value, int | float)}
    columns = cfg.columns.replace(" ", "").split(",") if cfg.columns else [name for name in USUAL if name in known] or ["step"]
    if unknown := ", ".join(name for name in columns if name not in known):
        raise ValueError(f"--columns {unknown}: not in these logs, which have {', '.join(sorted(known))}")
    across = math.ceil(len(columns) ** 0.5)
    down = math.ceil(len(columns) / across)
    with matplotlib.rc_context({"svg.hashsalt": "s2r", "svg.fonttype": "none"}):  # the same logs make the same file
        figure = matplotlib.figure.Figure(figsize=(4 * across, 2.6 * down + 0.6), layout="constrained")
        for place, column in enumerate(columns, start=1):
            panel = figure.add_subplot(down, across, place, title=column, xlabel="step")
            for i, (run, both) in enumerate(logs.items()):
                for rows, style, label in zip(both, "-o", (run, None)):
                    found = [row for row in rows if isinstance(row.get(column), int | float)]
                    steps, values = [row["step"] for row in found], [row[column] for row in found]
                    panel.plot(steps, values, style, color=f"C{i}", label=label)
        handles, title = panel.get_lines()[::2], "lines: training, points: evaluation"
        figure.legend(handles=handles, loc="outside upper center", title=title)
        figure.savefig(cfg.out, metadata={"Date": None})


def _rows(run: str, name: str) -> list[dict]:
    """Rows with a step in one file of a run folder, none if the file is missing or empty."""
    path = Path(run, name)
    return [row for row in read_jsonl(path) if "step" in row] if path.is_file() and path.stat().st_size else []


if __name__ == "__main__":
    start(main, Config)
