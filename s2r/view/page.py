"""Many trajectories as one web page that needs no other file: `sample.py --html FILE`.

Each trajectory is a column of blocks, one per action, with verdict, reward and advantage. The pointer on a token
shows its log p. The filters select what is worth reading: answers that were corrected or spoiled, errors that a
verify missed, right answers that it called wrong. `page.html` is the template. Model text goes into it as data
and is displayed as text, never as markup. Called by `sample.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from s2r.hf.tokenizer import Tokenizer
from s2r.rl import Credit
from s2r.rollouts import Trajectory

FILTERS = ("corrected", "spoiled", "missed", "false alarm", "cut off")


def labels(trajectory: Trajectory) -> list[str]:
    """Which of FILTERS a judged trajectory belongs to."""
    solves = [action for action in trajectory.actions if action.kind == "solve"]
    first, last = (bool(solves and solves[i].correct) for i in (0, -1))
    checks = {(action.truth, action.verdict) for action in trajectory.actions if action.kind == "verify"}
    holds = {
        "corrected": last and not first,
        "spoiled": first and not last,
        "missed": ("incorrect", "correct") in checks,
        "false alarm": ("correct", "incorrect") in checks,
        "cut off": not trajectory.finished,
    }
    return [name for name in FILTERS if holds[name]]


def page(trajectories: Sequence[Trajectory], credits: Sequence[Credit], tokenizer: Tokenizer, title: str) -> str:
    """The page as HTML; `credits` are those of the process level, one per trajectory: rewards and baselines."""
    rows = []
    for trajectory, credit in zip(trajectories, credits):
        row = trajectory.to_row()
        texts = [b"" if id in tokenizer.stop_ids else tokenizer.token_bytes(id) for id in trajectory.ids]
        tokens = [(text.decode("utf-8", "replace"), round(p, 3)) for text, p in zip(texts, trajectory.logp)]
        for action, reward, baseline in zip(row["actions"], credit.reward, credit.baseline):
            action["advantage"] = round(reward - baseline, 3)
            action["tokens"] = tokens[action["start"] : action["end"]]
        shown = ("unique_id", "problem", "answer", "reward", "actions")
        rows.append({name: row[name] for name in shown} | {"labels": labels(trajectory)})
    data = json.dumps({"title": title, "filters": FILTERS, "rows": rows}, ensure_ascii=True)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("DATA", data.replace("<", "\\u003c"))  # no text can end the script element
