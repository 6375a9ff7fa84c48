"""Many trajectories as one web page that needs nothing else: `sample.py --html FILE`.

Each trajectory is a column of blocks, one per action, with verdict, reward and advantage; each token shows its log p under
the pointer. Filters pick what is worth reading: answers that were corrected or spoiled, errors that a check missed,
right answers that it called wrong. Model text reaches the page as data and is set as text, never as markup.
"""

import json
from collections.abc import Sequence

from s2r.rl import Credit, outcome_reward
from s2r.rollouts import Trajectory
from s2r.hf.tokenizer import Tokenizer

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
    """The page as HTML; `credits` are those of the process level, one per trajectory, for rewards and advantages."""
    rows = []
    for trajectory, credit in zip(trajectories, credits):
        actions = []
        for action, reward, baseline in zip(trajectory.actions, credit.reward, credit.baseline):
            pieces = [
                ("" if id in tokenizer.stop_ids else tokenizer.token_bytes(id).decode("utf-8", "replace"), round(logp, 3))
                for id, logp in zip(*(x[action.start : action.end] for x in (trajectory.ids, trajectory.logp)))
            ]
            read = action.answer if action.kind == "solve" else action.verdict
            actions.append(
                {
                    "kind": action.kind,
                    "read": read,
                    "reward": reward,
                    "advantage": round(reward - baseline, 3),
                    "tokens": pieces,
                }
            )
        rows.append(
            {
                "id": trajectory.problem.unique_id,
                "problem": trajectory.problem.problem,
                "answer": trajectory.problem.answer,
                "reward": outcome_reward(trajectory.actions),
                "labels": labels(trajectory),
                "actions": actions,
            }
        )
    data = json.dumps({"title": title, "filters": FILTERS, "rows": rows}, ensure_ascii=True)
    return _PAGE.replace("DATA", data.replace("<", "\\u003c"))  # no text can end the script element


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>S²R trajectories</title>
<link rel="icon" href="data:,">
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
  h1 { font-size: 1.2rem } h2 { font-size: 1rem; margin: 0 0 .4rem; white-space: pre-wrap; overflow-wrap: anywhere }
  button { font: inherit; padding: .15rem .7rem; margin: 0 .4rem .4rem 0; border: 1px solid #bbb; border-radius: 1rem; background: #fff; cursor: pointer }
  button.on { background: #222; color: #fff }
  article { border-top: 1px solid #ddd; padding: 1rem 0 }
  .action { border-left: .3rem solid; border-radius: .2rem; padding: .3rem .7rem; margin: .4rem 0 }
  .solve { border-color: #3b6fb6; background: #f1f5fb } .verify { border-color: #b67a1e; background: #fcf6ec }
  .head { font-size: .8rem; color: #555 } .good { color: #187a33; font-weight: 600 } .bad { color: #b3261e; font-weight: 600 }
  pre { margin: .2rem 0 0; font: .85rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
  pre span:hover { outline: 1px solid #222; background: #fff }
</style>
<h1></h1>
<nav></nav>
<main></main>
<script id="data" type="application/json">DATA</script>
<script>
  const data = JSON.parse(document.getElementById("data").textContent);
  const make = (tag, where, text, kind) => {
    const node = where.appendChild(document.createElement(tag));
    if (text !== undefined) node.textContent = text;
    if (kind) node.className = kind;
    return node;
  };
  const signed = x => (x > 0 ? "+" : "") + x;
  const show = wanted => {
    const main = document.querySelector("main");
    main.replaceChildren();
    for (const button of document.querySelectorAll("button")) button.classList.toggle("on", button.dataset.filter === wanted);
    for (const row of data.rows.filter(row => wanted === "all" || row.labels.includes(wanted))) {
      const article = make("article", main);
      make("h2", article, row.problem);
      const head = make("div", article, `${row.id} · gold answer ${row.answer} · outcome reward `, "head");
      make("span", head, signed(row.reward), row.reward > 0 ? "good" : "bad");
      if (row.labels.length) make("span", head, " · " + row.labels.join(", "));
      for (const action of row.actions) {
        const block = make("div", article, undefined, "action " + action.kind);
        const said = make("div", block, `${action.kind} · ${action.kind === "solve" ? "answer" : "verdict"} ${action.read ?? "none"} · reward `, "head");
        make("span", said, signed(action.reward), action.reward > 0 ? "good" : "bad");
        make("span", said, ` · advantage without its KL term ${signed(action.advantage)}`);
        const text = make("pre", block);
        for (const [piece, logp] of action.tokens) {
          const token = make("span", text, piece);
          token.title = `log p ${logp.toFixed(3)}, p ${Math.exp(logp).toFixed(3)}`;
          token.style.backgroundColor = `rgba(179, 38, 30, ${Math.min(0.5, -logp / 6)})`;
        }
      }
    }
  };
  document.querySelector("h1").textContent = data.title;
  for (const name of ["all", ...data.filters]) {
    const count = name === "all" ? data.rows.length : data.rows.filter(row => row.labels.includes(name)).length;
    const button = make("button", document.querySelector("nav"), `${name} (${count})`);
    button.dataset.filter = name;
    button.onclick = () => show(name);
  }
  show("all");
</script>
</html>
"""
