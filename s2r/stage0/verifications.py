"""Verifications for stage 0, written by a language model: a local one, or one behind an endpoint (App. C.1).

    rollout file ─▶ distinct (problem, answer) ─▶ check the answer ─▶ reword as a self-check ─▶ verification file

    python -m s2r.stage0.verifications --rollouts R.jsonl --out V.jsonl --model DIR
    python -m s2r.stage0.verifications --rollouts R.jsonl --out V.jsonl \\
        --api-base http://localhost:8000/v1 --api-model NAME

The first prompt asks for a *confirmative* check, which tests the answer without solving the problem again.
`--style solving` is the alternative that the paper rejects: solve again and compare. The second prompt asks for
the check in the words of somebody rereading their own work, with the verdict as the last sentence. A verdict may
be untrue here: `s2r.stage0.build` drops those.

A verification file has one JSON object per line, {"unique_id", "problem", "answer", "verification"}. You can
also write one yourself. Each verification is saved at once, and the same command resumes an aborted run. The key
of an endpoint is read from the environment variable named by --api-key-variable.
"""

import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from s2r.data import check_output, drop_torn_line
from s2r.generate import generate
from s2r.grade import equivalent
from s2r.grammar import VERDICT_SENTENCE, VERIFY_OPENING, cut
from s2r.run.flags import check, start
from s2r.run.loop import load, pick
from s2r.stage0.build import by_problem, distinct, load_verifications, read_rollouts, usable_answer


@dataclass(frozen=True)
class Config:
    rollouts: str  # rollout file of the base model (sample.py --n 5 --temperature 0.7 --out)
    out: str  # verification file to write; one that exists is continued
    model: str = ""  # Hugging Face folder of the model that verifies, for example the base model itself
    api_base: str = ""  # instead of --model: address of an OpenAI-compatible endpoint, up to /v1
    api_model: str = ""  # name of the model at the endpoint
    api_key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key of the endpoint
    style: Literal["confirmative", "solving"] = "confirmative"  # of the checks
    temperature: float = 0.7  # of the sampling
    max_new_tokens: int = 1024  # tokens, the longest reply
    batch: int = 64  # answers at a time, for --model
    seed: int = 0  # of the sampling, for --model
    device: str = "auto"  # cpu, cuda or cuda:1; auto: a GPU if there is one, for --model
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, for --model


AT_ONCE = 16  # answers that an endpoint verifies in parallel
STYLES = {
    "confirmative": (
        "Check whether the proposed answer is right. Do not solve the problem from the beginning. Put the answer "
        "to the test instead: substitute it back into the problem, work backwards from it, or look at its units, "
        "its size and the conditions that it has to meet."
    ),
    "solving": (
        "Check whether the proposed answer is right. Solve the problem step by step on your own, then compare "
        "your result with the proposed answer."
    ),
}
CHECK = """{style} Say at the end whether the answer is correct, incorrect, or cannot be verified.

Problem: {problem}

Proposed answer: {answer}"""
REWORD = """\
Here is a check of an answer to a problem. Rewrite it as the thoughts of the person who gave the answer and now
rereads their own work, in the first person, keeping every step of the calculation and adding none. Leave out any
greeting or heading. The last sentence has to be exactly one of these three:
{sentences}

Problem: {problem}

Answer: {answer}

Check: {check}"""


@dataclass(frozen=True)
class Wanted:
    """One answer of the model to one problem, which is to be verified."""

    unique_id: str
    problem: str
    answer: str

    def question(self, style: str) -> str:
        return CHECK.format(style=STYLES[style], problem=self.problem, answer=self.answer)

    def rewording(self, check: str) -> str:
        sentences = "\n".join(VERDICT_SENTENCE.values())
        return REWORD.format(sentences=sentences, problem=self.problem, answer=self.answer, check=check)

    def row(self, verification: str) -> dict:
        return asdict(self) | {"verification": verification}


Verifier = Callable[[Sequence[Wanted]], Iterator[tuple[Wanted, str]]]
"""Yields each answer with its verification, in any order; some answers may get none."""


def wanted(rows: Sequence[dict]) -> list[Wanted]:
    """What has to be verified: the distinct usable answers to each problem that has a right one among them.

    The other problems and answers give no trajectory. `rows` are those of a rollout file.
    """
    found = []
    for unique_id, samples in by_problem(rows).items():
        answers = [answer for row in samples if (answer := usable_answer(row)) is not None]
        if any(equivalent(answer, samples[0]["answer"]) for answer in answers):
            found += [Wanted(unique_id, samples[0]["problem"], answers[i]) for i in distinct(answers)]
    return found


def as_self_check(reply: str) -> str:
    """A model's reply as the text of a verify action, without the opening, which `grammar.render` adds.

    If a line of it would open another action, its line breaks become spaces.
    """
    text = reply.strip().removeprefix(VERIFY_OPENING).strip()
    return text if cut(f"{VERIFY_OPENING} {text}".encode()) == [(0, "verify")] else " ".join(text.split())


# ---- who verifies ----


def local_model(cfg: Config) -> Verifier:
    """A Hugging Face folder, through our own sampler. Raises ValueError as `pick` and `load` do."""
    model, tokenizer = load(cfg, *pick(cfg))

    def replies(questions: Sequence[str], step: int) -> Iterator[tuple[int, str]]:
        """(index, reply) of each question that leaves room in the context; a random stream per `step`."""
        prompts = [tokenizer.chat([{"role": "user", "content": question}]) for question in questions]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < model.config.max_positions]
        sampling = {"temperature": cfg.temperature, "max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed}
        rollouts = generate(
            model, [prompts[i] for i in fitting], stop_ids=tokenizer.stop_ids, step=step, **sampling
        )
        for i, rollout in zip(fitting, rollouts):
            yield i, tokenizer.decode(rollout.ids[:-1] if rollout.finished else rollout.ids)

    def verify(todo: Sequence[Wanted]) -> Iterator[tuple[Wanted, str]]:
        for first in range(0, len(todo), cfg.batch):
            part = todo[first : first + cfg.batch]
            questions = [item.question(cfg.style) for item in part]
            checked = [(part[i], text) for i, text in replies(questions, 2 * first)]
            for i, text in replies([item.rewording(text) for item, text in checked], 2 * first + 1):
                yield checked[i][0], text

    return verify


def endpoint(
    cfg: Config, key: str | None, *, timeout: float = 120.0, retries: int = 6, pause: float = 1.0
) -> Verifier:
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

    def verification(item: Wanted) -> str | None:
        text = reply(item.question(cfg.style))
        return text and reply(item.rewording(text))

    def verify(todo: Sequence[Wanted]) -> Iterator[tuple[Wanted, str]]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = {pool.submit(verification, item): item for item in todo}
            try:
                for future in as_completed(futures):
                    if text := future.result():
                        yield futures[future], text
            finally:
                pool.shutdown(cancel_futures=True)

    return verify


# ---- the run ----


def main(cfg: Config) -> None:
    check(cfg, "max_new_tokens", "batch")
    if bool(cfg.model) == bool(cfg.api_base) or bool(cfg.api_base) != bool(cfg.api_model):
        raise ValueError("give --model, or --api-base with --api-model")
    check_output(cfg.out)
    asked, out = wanted(read_rollouts(cfg.rollouts)), Path(cfg.out)
    before = load_verifications(cfg.out) if out.exists() and drop_torn_line(out) else {}
    todo = [item for item in asked if item.answer not in dict(before.get(item.problem, []))]
    print(f"{len(asked):7,}  answers to verify, {len(asked) - len(todo):,} of them verified before")
    if not asked:
        raise ValueError(
            f"{cfg.rollouts}: no problem has a right answer, in \\boxed, in a finished sample, so no trajectory "
            "can be built; give more samples, easier problems or another base model"
        )
    if not todo:
        return
    verify = local_model(cfg) if cfg.model else endpoint(cfg, os.environ.get(cfg.api_key_variable))
    written = 0
    with out.open("a", encoding="utf-8") as file:
        for item, text in tqdm(verify(todo), total=len(todo), unit=" answers"):
            file.write(json.dumps(item.row(as_self_check(text)), ensure_ascii=False) + "\n")
            file.flush()
            written += 1
    print(f"{written:7,}  verifications written")
    if written < len(todo):
        print(f"{len(todo) - written:7,}  without a reply; run the same command to ask again")


if __name__ == "__main__":
    start(main, Config)
