"""From a problem to a judged trajectory, and the file in which trajectories are kept.

    problem ─ prompt ─▶ prompt ids ─ generate ─▶ response ids ─ parse ─▶ actions ─ judge ─▶ each right or wrong

`roll_out` does all of this; the scripts call it by way of `s2r/run/loop.py`. A rollout file has one line per trajectory,
written by `to_row`. `load_rollouts` reads it, for offline RL and for the page of `s2r/view/page.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from s2r import rl
from s2r.data import Problem, read_jsonl
from s2r.generate import generate
from s2r.grade import parsable
from s2r.grammar import Action, judge, parse, prompt
from s2r.hf.tokenizer import Tokenizer
from s2r.model import Transformer


@dataclass(frozen=True)
class Trajectory:
    """One response to one problem, its actions judged."""

    problem: Problem
    sample: int  # 0 … M−1
    temperature: float
    prompt_ids: list[int]
    ids: list[int]  # response, stop token included
    logp: list[float]  # nats; logp[t] scores ids[t] under the sampler
    finished: bool  # ended by a stop token, not by the length limit
    text: str  # of the response, without the stop token
    actions: list[Action]  # spans index `ids`

    @classmethod
    def judged(cls, tokenizer: Tokenizer, problem: Problem, ids: list[int], *, finished: bool, **more) -> "Trajectory":
        """The trajectory of sampled ids: reads their text and actions, and judges these by the problem's answer."""
        text = tokenizer.decode(ids[:-1] if finished else ids)
        actions = judge(parse(ids, tokenizer), problem.answer)
        return cls(problem=problem, ids=ids, finished=finished, text=text, actions=actions, **more)

    def to_row(self) -> dict:
        """The row of a rollout file: problem, ids, log-probabilities, actions with their rewards R_a, and R_o."""
        own = ("sample", "temperature", "prompt_ids", "ids", "logp", "finished", "text")
        row = {name: getattr(self.problem, name) for name in ("unique_id", "problem", "answer", "level")}
        row |= {name: getattr(self, name) for name in own} | {"actions": []}
        row["logp"] = [round(x, 6) for x in self.logp]
        for action, reward in zip(self.actions, rl.process_rewards(self.actions, self.finished)):
            read = {"answer": action.answer} if action.kind == "solve" else {"verdict": action.verdict}
            span = {"kind": action.kind, "start": action.start, "end": action.end}
            audit = {} if action.sound is None else {"sound": action.sound}
            row["actions"].append(span | read | {"reward": int(reward)} | audit)
        return row | {"reward": int(rl.outcome_reward(self.actions))}


def load_rollouts(path: str | Path, tokenizer: Tokenizer) -> list[Trajectory]:
    """The trajectories of a rollout file, parsed and judged anew.

    Raises FileNotFoundError, and ValueError naming file and row: a field that is missing or cannot be read, ids that
    this tokenizer does not have, an answer that cannot be graded against.
    """
    trajectories = []
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            ids, prompt_ids = ([int(x) for x in row[name]] for name in ("ids", "prompt_ids"))
            logp = [float(x) for x in row["logp"]]
            if not all(0 <= x < tokenizer.vocab_size for x in ids + prompt_ids) or len(logp) != len(ids):
                raise ValueError("its ids are not this tokenizer's, or not one log-probability each")
            if not ids or not prompt_ids:
                raise ValueError("its prompt or its response is empty")
            if not parsable(str(row["answer"])):
                raise ValueError(f"gold answer {row['answer']!r} cannot be parsed")
            problem = Problem(row["problem"], str(row["answer"]), str(row["unique_id"]), row.get("level"))
            trajectory = Trajectory.judged(
                tokenizer, problem, ids, finished=ids[-1] in tokenizer.stop_ids, prompt_ids=prompt_ids, logp=logp,
                sample=int(row["sample"]), temperature=float(row["temperature"]),
            )  # fmt: skip
            audits = {action["start"]: action.get("sound") for action in row.get("actions", [])}
            actions = [replace(action, sound=audits.get(action.start)) for action in trajectory.actions]
            trajectories.append(replace(trajectory, actions=actions))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: row {number}: {what}; give a file that sample.py --out wrote") from None
    return trajectories


def sequences(trajectories: Sequence[Trajectory]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each, prompt and response, and the positions of the response in them: what `pack` takes."""
    ids = [t.prompt_ids + t.ids for t in trajectories]
    return ids, [list(range(len(t.prompt_ids), len(row))) for t, row in zip(trajectories, ids)]


def encode_prompts(problems: Sequence[Problem], tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """Prompt ids of each problem. Raises ValueError, naming the problem, where they leave no room in the context."""
    prompts = [prompt(problem.problem, tokenizer) for problem in problems]
    for problem, ids in zip(problems, prompts):
        if len(ids) >= context:
            raise ValueError(
                f"problem {problem.unique_id}: its prompt has {len(ids)} tokens, the model's context {context}; "
                "drop it from the file"
            )
    return prompts


def roll_out(
    model: Transformer, tokenizer: Tokenizer, problems: Sequence[Problem], *, temperature: float, **options
) -> list[Trajectory]:
    """Sample responses to each problem and judge them, in the order problem 0 sample 0, problem 0 sample 1, …

    `options` go to `generate`: n, max_new_tokens, seed, step, … Raises ValueError as `encode_prompts` does.
    """
    prompts = encode_prompts(problems, tokenizer, model.config.max_positions)
    rollouts = generate(model, prompts, temperature=temperature, stop_ids=tokenizer.stop_ids, **options)
    return [
        Trajectory.judged(
            tokenizer, problems[r.prompt], r.ids, finished=r.finished, prompt_ids=prompts[r.prompt], logp=r.logp,
            sample=r.sample, temperature=temperature,
        )
        for r in rollouts
    ]  # fmt: skip
