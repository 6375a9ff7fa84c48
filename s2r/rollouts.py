"""From problems to judged trajectories, and the rollout file that stores them.

    problem ─ prompt ─▶ ids ─ generate ─▶ ids of a response ─ parse ─▶ actions ─ judge ─▶ right or wrong, true or untrue

`sample.py` and `train_rl.py` sample with `roll_out`. `s2r/offline.py` reads rollout files with `load_rollouts`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s2r import rl
from s2r.data import Problem, read_jsonl
from s2r.generate import generate
from s2r.grade import parsable
from s2r.grammar import Action, judge, parse, prompt
from s2r.hf.tokenizer import Tokenizer
from s2r.model import Transformer

FIELDS = {"ids": int, "prompt_ids": int, "logp": float}  # the lists in a rollout file's row, and their types


@dataclass(frozen=True)
class Trajectory:
    """One response to one problem, its actions judged."""

    problem: Problem
    sample: int  # 0 … M−1
    temperature: float
    prompt_ids: list[int]
    ids: list[int]  # response, stop token included
    logp: list[float]  # log p of each of `ids`, in nats, as the sampler computed it
    finished: bool
    text: str
    actions: list[Action]  # spans index `ids`

    def to_row(self) -> dict:
        """The row of a rollout file: problem, ids, log-probabilities, actions with their rewards R_a, and R_o."""
        own = ("sample", "temperature", "prompt_ids", "ids", "logp", "finished", "text")
        row = {name: getattr(self.problem, name) for name in ("unique_id", "problem", "answer", "level")}
        row |= {name: getattr(self, name) for name in own} | {"actions": []}
        row["logp"] = [round(x, 6) for x in self.logp]
        for action, reward in zip(self.actions, rl.process_rewards(self.actions, self.finished)):
            read = {"answer": action.answer} if action.kind == "solve" else {"verdict": action.verdict}
            span = {"kind": action.kind, "start": action.start, "end": action.end}
            row["actions"].append(span | read | {"reward": int(reward)})
        return row | {"reward": int(rl.outcome_reward(self.actions))}


def load_rollouts(path: str | Path, tokenizer: Tokenizer) -> list[Trajectory]:
    """The trajectories of a rollout file, parsed and judged anew.

    Raises FileNotFoundError, and ValueError naming file and row: a field that is missing or of another type, ids that
    this tokenizer does not have, an answer that cannot be graded against.
    """
    trajectories = []
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            ids, prompt_ids, logp = ([kind(x) for x in row[name]] for name, kind in FIELDS.items())
            if not all(0 <= x < tokenizer.vocab_size for x in ids + prompt_ids) or len(logp) != len(ids):
                raise ValueError("its ids are not this tokenizer's, or not one log-probability each")
            if not ids or not prompt_ids:
                raise ValueError("its prompt or its response is empty")
            if not parsable(str(row["answer"])):
                raise ValueError(f"gold answer {row['answer']!r} cannot be parsed")
            problem = Problem(row["problem"], str(row["answer"]), str(row["unique_id"]), row.get("level"))
            trajectories.append(
                Trajectory(
                    problem=problem,
                    sample=int(row["sample"]),
                    temperature=float(row["temperature"]),
                    prompt_ids=prompt_ids,
                    ids=ids,
                    logp=logp,
                    finished=bool(row["finished"]),
                    text=str(row["text"]),
                    actions=judge(parse(ids, tokenizer), problem.answer),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: row {number}: {error!r}; give a file that sample.py --out wrote") from None
    return trajectories


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

    `options` (n, max_new_tokens, seed, …) go to `generate`. Raises ValueError as `encode_prompts` does.
    """
    prompts = encode_prompts(problems, tokenizer, model.config.max_positions)
    rollouts = generate(model, prompts, temperature=temperature, stop_ids=tokenizer.stop_ids, **options)
    return [
        Trajectory(
            problem=problems[r.prompt],
            sample=r.sample,
            temperature=temperature,
            prompt_ids=prompts[r.prompt],
            ids=r.ids,
            logp=r.logp,
            finished=r.finished,
            text=tokenizer.decode(r.ids[:-1] if r.finished else r.ids),
            actions=judge(parse(r.ids, tokenizer), problems[r.prompt].answer),
        )
        for r in rollouts
    ]
