"""Many trajectories as one web page that needs no other file.

    python sample.py --model DIR --data F.jsonl --html PAGE.html
    python -m s2r.view.page --rollouts R.jsonl --model DIR --out PAGE.html      of rollouts that DIR sampled before

Each trajectory is a column of blocks, one per action, with verdict, reward and advantage. The pointer on a token
shows its log p. The filters select what is worth reading: answers that were corrected or spoiled, errors that a
verify missed, right answers that it called wrong. `page.html` is the template. Model text goes into it as data
and is displayed as text, never as markup.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s2r.hf.tokenizer import Tokenizer
from s2r.rl import online_credit
from s2r.rollouts import Trajectory, load_rollouts
from s2r.run.files import check_output
from s2r.run.flags import start


@dataclass(frozen=True)
class Config:
    rollouts: str  # rollout file (sample.py --out)
    model: str  # the model that sampled them, for its tokenizer
    out: str  # web page to write


def labels(trajectory: Trajectory) -> list[str]:
    """The filters that a judged trajectory belongs to."""
    solves = [action for action in trajectory.actions if action.kind == "solve"]
    first, last = (bool(solves and solves[i].correct) for i in (0, -1))
    checks = {(action.truth, action.verdict) for action in trajectory.actions if action.kind == "verify"}
    answers = [solve.answer for solve in solves if solve.answer]
    holds = {
        "corrected": last and not first,
        "spoiled": first and not last,
        "missed": ("incorrect", "correct") in checks,
        "false alarm": ("correct", "incorrect") in checks,
        "right verdict, wrong reason": any(a.sound is False and a.verdict == a.truth for a in trajectory.actions),
        "repeats an answer": len(set(answers)) < len(answers),
        "cut off": not trajectory.finished,
    }
    return [name for name, true in holds.items() if true]


def page(trajectories: Sequence[Trajectory], tokenizer: Tokenizer, title: str) -> str:
    """The page as HTML. Rewards and advantages are those of the process level, without the KL term."""
    rows = []
    for trajectory, credit in zip(trajectories, online_credit(trajectories, "process", 1)):
        row = trajectory.to_row()
        texts = [b"" if id in tokenizer.stop_ids else tokenizer.token_bytes(id) for id in trajectory.ids]
        tokens = [(text.decode("utf-8", "replace"), round(p, 3)) for text, p in zip(texts, trajectory.logp)]
        for action, reward, baseline in zip(row["actions"], credit.reward, credit.baseline):
            action["advantage"] = round(reward - baseline, 3)
            action["tokens"] = tokens[action["start"] : action["end"]]
        shown = ("unique_id", "problem", "answer", "reward", "actions")
        rows.append({name: row[name] for name in shown} | {"labels": labels(trajectory)})
    data = json.dumps({"title": title, "rows": rows}, ensure_ascii=True)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("DATA", data.replace("<", "\\u003c"))  # no text can end the script element


def main(cfg: Config) -> None:
    check_output(cfg.out)
    tokenizer = Tokenizer.from_pretrained(cfg.model)
    Path(cfg.out).write_text(page(load_rollouts(cfg.rollouts, tokenizer), tokenizer, cfg.rollouts), "utf-8")


if __name__ == "__main__":
    start(main, Config)
