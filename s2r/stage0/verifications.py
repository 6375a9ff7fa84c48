"""Verifications for stage 0, written by a language model, local or behind an endpoint (App. C.1), or by a rule.

    rollout file ─▶ distinct (problem, answer) ─▶ check the answer ─▶ reword as a self-check ─▶ verification file

    python -m s2r.stage0.verifications --rollouts R.jsonl --out V.jsonl --model DIR
    python -m s2r.stage0.verifications --rollouts R.jsonl --out V.jsonl \\
        --api-base http://localhost:8000/v1 --api-model NAME
    python -m s2r.stage0.verifications --rollouts R.jsonl --out V.jsonl --by formula --data asdiv.jsonl

The first prompt asks for a *confirmative* check, which tests the answer without solving the problem again.
`--style solving` is the alternative that the paper rejects: solve again and compare. The second prompt asks for
the check in the words of somebody rereading their own work, with the verdict as the last sentence. A verdict may
be untrue here: `s2r.stage0.build` drops those.

A verification file has one JSON object per line, {"unique_id", "problem", "answer", "verification"}. You can
also write one yourself. The same command resumes an aborted run.
"""

import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from s2r.data import load_problems
from s2r.generate import generate
from s2r.grade import equivalent
from s2r.grammar import VERDICT_SENTENCE, VERIFY_OPENING, cut
from s2r.run.files import check_output, drop_torn_line
from s2r.run.flags import check, start
from s2r.run.loop import load, pick
from s2r.run.ranks import Ranks
from s2r.stage0 import formula
from s2r.stage0.build import by_problem, distinct, load_verifications, read_rollouts, usable_answer


@dataclass(frozen=True)
class Config:
    rollouts: str  # rollout file of the base model (sample.py --n 5 --temperature 0.7 --out)
    out: str  # verification file to write; one that exists is continued
    model: str = ""  # Hugging Face folder of the model that verifies, for example the base model itself
    api_base: str = ""  # instead of --model: address of an OpenAI-compatible endpoint, up to /v1
    api_model: str = ""  # name of the model at the endpoint
    api_key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key of the endpoint
    by: Literal["model", "formula"] = "model"  # formula: the rule of s2r/stage0/formula.py in place of a model
    data: str = ""  # problem file with the formulas, for --by formula
    style: Literal["confirmative", "solving"] = "confirmative"  # of the checks
    temperature: float = 0.7  # of the sampling
    max_new_tokens: int = 1024  # tokens, the longest reply
    batch: int = 64  # answers at a time, for --model
    seed: int = 0  # of the sampling, for --model
    device: str = "auto"  # cpu, cuda or cuda:1; auto: a GPU if there is one, for --model
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, for --model


Verified = Iterator[tuple[dict, str]]  # rows of `wanted`, each with its verification, in any order; some get none
AT_ONCE = 16  # answers that an endpoint verifies in parallel
STYLES = {
    "confirmative": "Do not solve the problem from the beginning. Put the answer to the test instead: substitute it "
    "back into the problem, work backwards from it, or look at its units, its size and the conditions that it has to "
    "meet.",
    "solving": "Solve the problem step by step on your own, then compare your result with the proposed answer.",
}
CHECK = """\
Check whether the proposed answer is right. {style}
Say at the end whether the answer is correct, incorrect, or cannot be verified.

Problem: {problem}

Proposed answer: {answer}"""
SENTENCES = "\n".join(VERDICT_SENTENCE.values())
REWORD = f"""\
Here is a check of an answer to a problem. Rewrite it as the thoughts of the person who gave the answer and now
rereads their own work, in the first person, keeping every step of the calculation and adding none. Leave out any
greeting or heading. The last sentence has to be exactly one of these three:
{SENTENCES}

Problem: {{problem}}

Answer: {{answer}}

Check: {{check}}"""


def wanted(rows: Sequence[dict]) -> list[dict]:
    """What has to be verified: the distinct usable answers to each problem that has a right one among them.

    The other problems and answers give no trajectory. Takes the rows of a rollout file and returns those of a
    verification file, still without the verification.
    """
    found = []
    for unique_id, samples in by_problem(rows).items():
        answers = [answer for row in samples if (answer := usable_answer(row)) is not None]
        right = [answer for answer in answers if equivalent(answer, samples[0]["answer"])]
        wrong = [answer for answer in answers if answer not in right]
        if right:
            row = {"unique_id": unique_id, "problem": samples[0]["problem"]}
            found += [row | {"answer": part[i]} for part in (right, wrong) for i in distinct(part)]
    return found


def as_self_check(reply: str) -> str:
    """A model's reply as the text of a verify action, without the opening, which `grammar.render` adds.

    If a line of it would open another action, its line breaks become spaces.
    """
    text = reply.strip().removeprefix(VERIFY_OPENING).strip()
    return text if cut(f"{VERIFY_OPENING} {text}".encode()) == [(0, "verify")] else " ".join(text.split())


def local_model(cfg: Config, todo: Sequence[dict], ranks: Ranks, dtype: torch.dtype) -> Verified:
    """A Hugging Face folder, through our own sampler; each rank a part. Raises ValueError as `load` does."""
    model, tokenizer = load(cfg, ranks, dtype, whole=True)
    sampling = {"temperature": cfg.temperature, "max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed}

    def replies(questions: dict[int, str], step: int) -> Iterator[tuple[int, str]]:
        """(key, reply) of each question that leaves room in the context; a random stream per `step` and key."""
        prompts = {i: tokenizer.chat([{"role": "user", "content": question}]) for i, question in questions.items()}
        asked = {i: prompt for i, prompt in prompts.items() if len(prompt) < model.config.max_positions}
        options = {"stop_ids": tokenizer.stop_ids, "streams": list(asked), "step": step, **sampling}
        for i, rollout in zip(asked, generate(model, list(asked.values()), **options)):
            yield i, tokenizer.decode(rollout.ids[:-1] if rollout.finished else rollout.ids)

    for first in range(0, len(todo), cfg.batch):
        part = dict(enumerate(todo[first : first + cfg.batch]))
        questions = {i: CHECK.format(style=STYLES[cfg.style], **part[i]) for i in list(part)[ranks.rank :: ranks.size]}
        checked = dict(replies(questions, 2 * first))
        questions = {i: REWORD.format(check=text, **part[i]) for i, text in checked.items()}
        for i, text in replies(questions, 2 * first + 1):
            yield part[i], text


def rule(cfg: Config, todo: Sequence[dict]) -> Verified:
    """The formulas of --data, undone. Raises ValueError as `load_problems` does, and for other problems."""
    problems = {(problem.unique_id, problem.problem): problem for problem in load_problems(cfg.data)}
    if not any((row["unique_id"], row["problem"]) in problems for row in todo):
        raise ValueError(f"{cfg.data}: has none of the problems of {cfg.rollouts}; give the file that was sampled from")
    for row in todo:
        problem = problems.get((row["unique_id"], row["problem"]))
        if problem and (text := formula.verify(problem, row["answer"])):
            yield row, text


def endpoint(cfg: Config, todo: Sequence[dict], key: str | None, *, timeout=120.0, retries=6, pause=1.0) -> Verified:
    """An OpenAI-compatible endpoint, AT_ONCE answers at a time; `timeout` and `pause` in seconds.

    A failure that may pass (no connection, time-out, status 408, 409, 429 or 5xx, malformed reply) is retried up
    to `retries` times: first after `pause`, then after twice as long each time. After that the answer gets no
    verification. Any other refusal, for example of a wrong key, raises ValueError.
    """
    url = cfg.api_base.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    settings = {"model": cfg.api_model, "temperature": cfg.temperature, "max_tokens": cfg.max_new_tokens}

    def reply(question: str) -> str | None:
        body = json.dumps(settings | {"messages": [{"role": "user", "content": question}]}).encode()
        for attempt in range(retries + 1):
            if attempt:
                time.sleep(pause * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                request = urllib.request.Request(url, body, headers)
                with urllib.request.urlopen(request, timeout=timeout) as response:
                    content = json.loads(response.read())["choices"][0]["message"]["content"]
                    if isinstance(content, str) and content.strip():
                        return content
            except urllib.error.HTTPError as error:
                if error.code not in (408, 409, 429) and error.code < 500:
                    said = error.read(200).decode(errors="replace")
                    raise ValueError(f"{url}: refused with status {error.code}: {said}") from None
            except (OSError, HTTPException, ValueError, LookupError, TypeError):  # may pass
                pass
        return None

    def verification(row: dict) -> str | None:
        text = reply(CHECK.format(style=STYLES[cfg.style], **row))
        return text and reply(REWORD.format(check=text, **row))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {pool.submit(verification, row): row for row in todo}
        try:
            for future in as_completed(futures):
                if text := future.result():
                    yield futures[future], text
        finally:
            pool.shutdown(cancel_futures=True)


def main(cfg: Config) -> None:
    check(cfg, "max_new_tokens", "batch")
    given = [bool(cfg.model), bool(cfg.api_base), cfg.by == "formula"]
    if sum(given) != 1 or bool(cfg.api_base) != bool(cfg.api_model) or given[2] != bool(cfg.data):
        raise ValueError("give --model, or --api-base with --api-model, or --by formula with --data")
    if cfg.api_base and not cfg.api_base.startswith(("http://", "https://")):
        raise ValueError(f"--api-base {cfg.api_base}: no address; it begins with http:// or https://")
    if not cfg.model and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("torchrun is for --model; start the command without it")
    check_output(cfg.out)
    ranks, dtype = pick(cfg) if cfg.model else (Ranks(torch.device("cpu")), torch.float32)
    todo = ranks.gather([unverified(cfg)] if ranks.first else [])[0]  # by the first rank, for all: nobody writes yet
    if not todo:
        return
    if cfg.by == "formula":
        verified, why = rule(cfg, todo), "that the rule cannot check"
    elif cfg.model:
        verified, why = local_model(cfg, todo, ranks, dtype), "whose question is too long for the model's context"
    else:
        verified = endpoint(cfg, todo, os.environ.get(cfg.api_key_variable))
        why = "without a reply; run the same command to ask again"
    written = 0
    # No bar before an error about flags.
    for row, text in tqdm(verified, total=len(todo) // ranks.size, unit=" answers", delay=1, disable=not ranks.first):
        line = json.dumps(row | {"verification": as_self_check(text)}, ensure_ascii=False) + "\n"
        with open(cfg.out, "ab", buffering=0) as file:  # one write for a line, so that ranks do not mix theirs
            if file.write(line.encode()) < len(line.encode()):
                raise OSError(f"{cfg.out}: a line was written in part; is the disk full?")
        written += 1
    written = int(ranks.sum([written])[0])
    if not ranks.first:
        return
    print(f"{written:7,}  verifications written")
    if written < len(todo):
        print(f"{len(todo) - written:7,}  {why}")


def unverified(cfg: Config) -> list[dict]:
    """The answers that have no verification yet. Raises ValueError when there is no answer to verify at all."""
    rows, out = wanted(read_rollouts(cfg.rollouts)), Path(cfg.out)
    before = load_verifications(cfg.out) if out.exists() and drop_torn_line(out) else {}
    todo = [row for row in rows if row["answer"] not in dict(before.get(row["problem"], []))]
    print(f"{len(rows):7,}  answers to verify, {len(rows) - len(todo):,} of them verified before")
    if not rows:
        raise ValueError(
            f"{cfg.rollouts}: no problem has a right answer, in \\boxed, in a finished sample, so no trajectory "
            "can be built; give more samples, a higher --max-new-tokens, easier problems or another base model"
        )
    return todo


if __name__ == "__main__":
    start(main, Config)
