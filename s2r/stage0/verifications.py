"""Verifications for stage 0, written by a language model: this one, another one, or one behind an endpoint (App. C.1).

    rollout file ─▶ distinct (problem, answer) ─▶ check the answer ─▶ reword as a self-check ─▶ verification file

    python -m s2r.verifications --rollouts R.jsonl --out V.jsonl --model DIR
    python -m s2r.verifications --rollouts R.jsonl --out V.jsonl --api-base http://localhost:8000/v1 --api-model NAME

The first prompt asks for a *confirmative* check, one that puts the answer to the test without solving the problem
again; `--style solving` is the alternative that the paper rejects: solve again and compare. The second prompt turns the
check into the words of somebody rereading their own work, with the verdict as the last sentence. Whether the verdict is
true is no matter here: `s2r.behavior --verifications V.jsonl` keeps the true ones.

A verification file has one JSON object a line, {"unique_id", "problem", "answer", "verification"}; one that you bring is
as good as one written here. Every answer of a run is written as soon as it is there, and a run that was stopped goes
on where it was. The key of an endpoint is read from the environment variable that --api-key-variable names.
"""

import argparse
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from s2r import runtime
from s2r.data import drop_torn_line, read_jsonl
from s2r.generate import generate
from s2r.grade import equivalent, extract_answer
from s2r.grammar import VERDICT_SENTENCE, VERIFY_OPENING, cut

STYLES = {
    "confirmative": (
        "Check whether the proposed answer is right. Do not solve the problem from the beginning. Put the answer to the "
        "test instead: substitute it back into the problem, work backwards from it, or look at its units, its size and "
        "the conditions that it has to meet."
    ),
    "solving": (
        "Check whether the proposed answer is right. Solve the problem step by step on your own, then compare your "
        "result with the proposed answer."
    ),
}
CHECK = """{style} Say at the end whether the answer is correct, incorrect, or cannot be verified.

Problem: {problem}

Proposed answer: {answer}"""
REWORD = """Here is a check of an answer to a problem. Rewrite it as the thoughts of the person who gave the answer and now
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
        return {"unique_id": self.unique_id, "problem": self.problem, "answer": self.answer, "verification": verification}


Verifier = Callable[[Sequence[Wanted]], Iterator[tuple[Wanted, str]]]
"""Yields what is wanted with its verification, in whatever order they come; some may get none."""


def wanted(rows: Sequence[dict]) -> list[Wanted]:
    """What has to be verified: the distinct answers to each problem that has a right one, as no other gives a trajectory.

    `rows` are those of a rollout file.
    """
    problems: dict[str, list[dict]] = {}
    for row in rows:
        problems.setdefault(row["unique_id"], []).append(row)
    found = []
    for unique_id, samples in problems.items():
        answers: list[str] = []
        for answer in filter(None, (extract_answer(row["text"]) for row in samples)):
            if not any(equivalent(answer, other) for other in answers):
                answers.append(answer)
        if any(equivalent(answer, samples[0]["answer"]) for answer in answers):
            found += [Wanted(unique_id, samples[0]["problem"], answer) for answer in answers]
    return found


def load_verifications(path: str | Path) -> dict[str, list[tuple[str, str]]]:
    """Problem -> (answer, verification) of each of its rows. Raises ValueError naming file and row."""
    found: dict[str, list[tuple[str, str]]] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        problem, answer, verification = (row.get(name) for name in ("problem", "answer", "verification"))
        if not all(isinstance(text, str) for text in (problem, answer, verification)):
            keys = ", ".join(row) or "none"
            raise ValueError(
                f'{path}: row {number}: "problem", "answer" and "verification" have to be texts, keys are {keys}'
            )
        found.setdefault(problem, []).append((answer, verification))
    return found


def as_self_check(reply: str) -> str:
    """A model's reply as the text of a verify action: without the opening, which is put there later, in one piece.

    Lines that would open another action lose their line break. What is not a verdict at the end stays as it is; stage
    0 drops it.
    """
    text = reply.strip().removeprefix(VERIFY_OPENING).strip()
    return text if cut(f"{VERIFY_OPENING} {text}".encode()) == [(0, "verify")] else " ".join(text.split())


# ---- who verifies ----


def local_model(
    folder: str, style: str, *, temperature: float, max_new_tokens: int, batch: int, seed: int, device: str, dtype: str
) -> Verifier:
    """A Hugging Face folder, through our own sampler, `batch` at a time. Raises ValueError as `runtime.load` does."""
    where, compute = runtime.pick(device, dtype)
    model, tokenizer = runtime.load(folder, where, compute)

    def replies(questions: Sequence[str], step: int) -> Iterator[tuple[int, str]]:
        """(index, reply) of each question that leaves room in the model's context; `step` is of the random stream."""
        prompts = [tokenizer.chat([{"role": "user", "content": question}]) for question in questions]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < model.config.max_positions]
        rollouts = generate(
            model,
            [prompts[i] for i in fitting],
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            seed=seed,
            step=step,
        )
        for i, rollout in zip(fitting, rollouts):
            yield i, tokenizer.decode(rollout.ids[:-1] if rollout.finished else rollout.ids)

    def verify(todo: Sequence[Wanted]) -> Iterator[tuple[Wanted, str]]:
        for first in range(0, len(todo), batch):
            part = todo[first : first + batch]
            checked = [(part[i], check) for i, check in replies([item.question(style) for item in part], 2 * first)]
            for i, text in replies([item.rewording(check) for item, check in checked], 2 * first + 1):
                yield checked[i][0], text

    return verify


def endpoint(
    base: str, model: str, style: str, *, key: str | None, temperature: float, max_new_tokens: int,
    timeout: float = 120.0, retries: int = 6, pause: float = 1.0, at_once: int = 16,
) -> Verifier:  # fmt: skip
    """An OpenAI-compatible endpoint, `at_once` answers at a time.

    What may pass (no connection, a time-out, 408, 409, 429, 5xx, a reply that is not what it should be) is tried again
    up to `retries` times, after `pause` seconds, twice as many each time; then the answer gets no verification. Any
    other refusal, a wrong key say, raises ValueError.
    """
    url = base.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def reply(question: str) -> str | None:
        messages = [{"role": "user", "content": question}]
        body = {"model": model, "messages": messages, "temperature": temperature, "max_tokens": max_new_tokens}
        for attempt in range(retries + 1):
            if attempt:
                time.sleep(pause * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                request = urllib.request.Request(url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=timeout) as response:
                    content = json.loads(response.read())["choices"][0]["message"]["content"]
                    if isinstance(content, str) and content.strip():
                        return content
            except urllib.error.HTTPError as error:
                if error.code not in (408, 409, 429) and error.code < 500:
                    said = error.read(200).decode(errors="replace")
                    raise ValueError(f"{url}: refused with status {error.code}: {said}") from None
            except (OSError, HTTPException, ValueError, LookupError, TypeError):  # no connection, or no proper reply
                pass
        return None

    def both(item: Wanted) -> str | None:
        check = reply(item.question(style))
        return check and reply(item.rewording(check))

    def verify(todo: Sequence[Wanted]) -> Iterator[tuple[Wanted, str]]:
        with ThreadPoolExecutor(at_once) as pool:
            futures = {pool.submit(both, item): item for item in todo}
            try:
                for future in as_completed(futures):
                    if text := future.result():
                        yield futures[future], text
            finally:
                pool.shutdown(cancel_futures=True)

    return verify


# ---- the run ----


def done(out: Path) -> set[tuple[str, str]]:
    """(unique_id, answer) of what `out` holds already; a last line that was torn by a crash is cut off."""
    if not out.exists() or not drop_torn_line(out):
        return set()
    return {(row.get("unique_id"), row.get("answer")) for row in read_jsonl(out)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", required=True, help="rollout file of the base model (sample.py --n 5 --out)")
    parser.add_argument("--out", required=True, help="verification file to write, or to go on with")
    parser.add_argument("--model", help="Hugging Face folder that verifies, the base model itself say")
    parser.add_argument("--api-base", help="or the address of an OpenAI-compatible endpoint, up to /v1")
    parser.add_argument("--api-model", help="name of the model there")
    parser.add_argument("--api-key-variable", default="OPENAI_API_KEY", help="environment variable with the key")
    parser.add_argument("--style", default="confirmative", choices=STYLES, help="of the check [%(default)s]")
    parser.add_argument("--temperature", default=0.7, type=float, help="[%(default)s]")
    parser.add_argument("--max-new-tokens", default=1024, type=int, help="of each reply [%(default)s]")
    parser.add_argument("--batch", default=64, type=int, help="answers at a time, for --model [%(default)s]")
    parser.add_argument("--seed", default=0, type=int, help="of the random stream, for --model [%(default)s]")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--device", default="auto")
    flags = parser.parse_args(argv)
    if bool(flags.model) == bool(flags.api_base) or bool(flags.api_base) != bool(flags.api_model):
        raise ValueError("give --model, or --api-base with --api-model")
    rows = read_jsonl(flags.rollouts)
    for number, row in enumerate(rows, start=1):
        if not {"unique_id", "problem", "answer", "text"} <= set(row):
            raise ValueError(f"{flags.rollouts}: row {number}: not a rollout; give a file that sample.py --out wrote")
    out = Path(flags.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    before, asked = done(out), wanted(rows)
    todo = [item for item in asked if (item.unique_id, item.answer) not in before]
    print(f"{len(asked):7,}  answers to verify, {len(asked) - len(todo):,} of them verified already")
    if not asked:
        raise ValueError(
            f"{flags.rollouts}: no problem has a right answer, in \\boxed, among its samples, so no trajectory can be built; "
            "give more samples, easier problems or another base model"
        )
    if not todo:
        return
    sampling = {"temperature": flags.temperature, "max_new_tokens": flags.max_new_tokens}
    if flags.model:
        local = {"batch": flags.batch, "seed": flags.seed, "device": flags.device, "dtype": flags.dtype}
        verify = local_model(flags.model, flags.style, **local, **sampling)
    else:
        key = os.environ.get(flags.api_key_variable)
        verify = endpoint(flags.api_base, flags.api_model, flags.style, key=key, **sampling)
    written = 0
    with out.open("a", encoding="utf-8") as file:
        for item, text in tqdm(verify(todo), total=len(todo), unit=" answers"):
            file.write(json.dumps(item.row(as_self_check(text)), ensure_ascii=False) + "\n")
            file.flush()
            written += 1
    print(f"{written:7,}  verifications written")
    if written < len(todo):
        print(f"{len(todo) - written:7,}  without a reply; the same command asks again for them")


if __name__ == "__main__":
    runtime.command(main)
