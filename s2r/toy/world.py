r"""The embedded default: a tiny world in which all of S²R runs on a laptop's CPU. Start reading here.

    python -m s2r.toy                        everything below, stage by stage, and a table of what each stage reached
    python -m s2r.toy pretrain --out DIR     how the base model in s2r/toy/base was made (14 minutes on one core)

A problem names a few numbers, one of which is a multiple of a:

    Eggs go in boxes of 7. Which number of eggs fills its boxes: 4315, 2886 or 3024?          a = 7, x = 3024

*Finding* x is hard for this model: it answers at once, without scratch work, and a remainder cannot be seen at a
glance, so it is right about half the time. *Checking* x is easy, because it goes digit by digit: long division, "3
leaves 3, 30 leaves 2, 22 leaves 1, 14 leaves 0". That gap is what S²R lives on: check the answer, and if it is wrong,
try another.

The base model is a 0.9 M parameter Llama that has learnt the parts and not the whole: answering, dividing, and naming
another number than those that were named before. It has never seen a text check itself. Stages 0 to 2 teach it to
check and to correct, with the same three scripts that train a large model: `stages` lists the commands.

The checks of stage 0 come from a rule, and the rule has a weakness of the models that write them for real: where work is
tedious, it often says what the work would show and leaves it out (`hasty`). All its verdicts are true, so no filter
finds that out, and SFT learns to claim as well. Of a model, such a claim is a guess. RL sees which verdicts come true,
and teaches it to divide.

Departs from the paper also in that the chat template leaves out the system prompt, to keep sequences short.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TextIO

import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tqdm import tqdm

from kernels.logprob import token_logp
from s2r.data import write_jsonl
from s2r.metrics import table
from s2r.model import ModelConfig, Transformer
from s2r.packing import pack, predictors
from s2r.grammar import RETRY_OPENING, VERDICT_SENTENCE, VERIFY_OPENING

BASE = "s2r/toy/base"  # ships with the repository; the paths are relative to its root, where every command runs
RUNS = "runs/toy"
TRAIN, TEST, LONGER = f"{RUNS}/train.jsonl", f"{RUNS}/test.jsonl", f"{RUNS}/longer.jsonl"
ROLLOUTS, TRAJECTORIES = f"{RUNS}/base.rollouts.jsonl", f"{RUNS}/trajectories.jsonl"
SFT, RL, RL_PROCESS = f"{RUNS}/sft", f"{RUNS}/rl-outcome", f"{RUNS}/rl-process"

TEMPLATES = (
    "Which number is a multiple of {a}: {xs}?",
    "Eggs go in boxes of {a}. Which number of eggs fills its boxes: {xs}?",
    "Chairs stand in rows of {a}. Which number of chairs leaves none over: {xs}?",
    "{a} children share sweets. Which number of sweets can they share evenly: {xs}?",
)
PATTERNS = [re.compile(re.escape(template).replace(r"\{a\}", r"(?P<a>\d+)").replace(r"\{xs\}", r"(?P<xs>\d[\d, or]*)"))
            for template in TEMPLATES]
DIVISORS = range(2, 10)
LEVELS = {1: 2, 2: 3, 3: 4, 4: 5}  # difficulty of a problem -> how many numbers it names
NUMBERS = (2, 3, 4, 5)  # how many numbers a question of the pretraining names, all as often
DIGITS = 4  # of each number
TEDIOUS = 7  # from this divisor on, the verifications of stage 0 are mostly made in haste
KEEP = ("1", "0.5", "0.3", "0.3")  # share of the trajectories with 1, 2, 3, 4 trials
EVALUATE = ("sample.py", "--max-new-tokens", "320")  # greedy, to the length limit of RL


# ---- the world: questions and checks ----

@dataclass(frozen=True)
class Question:
    """Which of xs is a multiple of a? Told in the words of one template; exactly one of them is."""

    a: int
    xs: tuple[int, ...]
    template: int

    @property
    def x(self) -> int:
        return next(x for x in self.xs if x % self.a == 0)

    @property
    def text(self) -> str:
        *first, last = map(str, self.xs)
        return TEMPLATES[self.template].format(a=self.a, xs=f"{', '.join(first)} or {last}")


def held_out(a: int, x: int) -> bool:
    """One (a, x) in ten belongs to the test set: no training or pretraining question has this answer, in any wording."""
    return zlib.crc32(f"{a} {x}".encode()) % 10 == 0


def question(rng: random.Random, test: bool = False, level: int | None = None, digits: int = DIGITS) -> Question:
    """A random question of the training or the test world: of one level, or as the pretraining has it."""
    a, low = rng.choice(DIVISORS), 10 ** (digits - 1)
    count = LEVELS[level] if level else rng.choice(NUMBERS)
    xs = []
    while len(xs) < count:
        x = rng.randrange(low, 10 * low)
        new = x // low not in [y // low for y in xs]  # no two begin with the same digit, so that one digit tells which
        if new and (x % a if xs else x % a == 0 and held_out(a, x) == test):
            xs.append(x)
    rng.shuffle(xs)
    return Question(a, tuple(xs), rng.randrange(len(TEMPLATES)))


def write_problems(folder: str, train: int = 4000, test: int = 1000, longer: int = 400, seed: int = 0) -> None:
    """Problem files, all levels alike, no question twice: `train.jsonl`, `test.jsonl`, and `longer.jsonl`, a digit longer.

    Numbers of the last are longer than any that a model was trained on, by pretraining or later.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, size in (("train", train), ("test", test), ("longer", longer)):
        rng, questions = random.Random(f"{seed} {name}"), {}
        while len(questions) < size:
            level = 1 + len(questions) % len(LEVELS)
            q = question(rng, name != "train", level, DIGITS + (name == "longer"))
            questions[q.text] = q, level
        write_jsonl(Path(folder) / f"{name}.jsonl", (
            {"problem": q.text, "answer": str(q.x), "level": level, "unique_id": f"toy/{name}/{i}"}
            for i, (q, level) in enumerate(questions.values())))


def solve(x: int) -> str:
    """An attempt with answer x: the answer, straight away."""
    return rf"It is \boxed{{{x}}}."


def divide(a: int, x: int) -> str:
    """Long division of x by a: "Divide 483 by 7: 4 leaves 4, 48 leaves 6, 63 leaves 0. Nothing remains."."""
    steps, rest = [], 0
    for digit in str(x):
        part = 10 * rest + int(digit)
        rest = part % a
        steps.append(f"{part} leaves {rest}")
    return f"Divide {x} by {a}: {', '.join(steps)}. {'Something' if rest else 'Nothing'} remains."


def parse(problem: str) -> tuple[int, list[str]]:
    """a and the numbers named, of a problem's text. Raises ValueError for a problem that is not of this world."""
    found = next(filter(None, (pattern.fullmatch(problem) for pattern in PATTERNS)), None)
    if found is None:
        raise ValueError(f"not a problem of the toy world, so its rule cannot verify answers to it: {problem!r}")
    return int(found["a"]), re.findall(r"\d+", found["xs"])


def verify(problem: str, answer: str | None, style: str = "confirmative") -> tuple[str, str]:
    """Verification by rule: its text, and the verdict it comes to, which is true.

    Confirmative, it puts the answer back into the problem. In the style "solving", which the paper tried and rejected, it
    finds the number again and compares; in the style "claim" it shows no work. Works for whatever a model may have boxed.
    """
    a, xs = parse(problem)
    if answer not in xs:
        return f"This is not one of the numbers. {VERDICT_SENTENCE['incorrect']}", "incorrect"
    verdict = "incorrect" if int(answer) % a else "correct"
    if style == "solving":
        x = next(x for x in xs if int(x) % a == 0)
        check = f"Solve it again: it is {x}, {'the same number' if x == answer else 'another number'}."
    elif style == "claim":
        check = f"This is {'not ' if verdict == 'incorrect' else ''}a multiple of {a}."
    else:
        check = divide(a, int(answer))
    return f"{check} {VERDICT_SENTENCE[verdict]}", verdict


def hasty(problem: str, answer: str) -> bool:
    """Whether stage 0 has a claim in place of this confirmative check: three in four of those by a tedious divisor."""
    return parse(problem)[0] >= TEDIOUS and zlib.crc32(f"{problem} {answer}".encode()) % 4 > 0


# ---- the base model: tokenizer, pretraining text, pretraining ----

def document(rng: random.Random) -> list[tuple[str, int]]:
    """One pretraining text in pieces (text, weight of its tokens in the loss).

    Some are a chat, question and right answer. The others are plain: people try the numbers named until one is right, in
    four of five never one twice, and often divide what they have just said. None of it looks like a verification.
    Questions are context, weight 0; right answers weigh most, because they are the hardest to learn.
    """
    q = question(rng)
    if rng.random() < 0.6:
        asked = f"<|im_start|>user\n{q.text}<|im_end|>\n<|im_start|>assistant\n"
        return [(asked, 0), (solve(q.x) + "<|im_end|>", 3)]
    text, wrong = [(q.text + "\n", 0)], [x for x in q.xs if x != q.x]
    if rng.random() < 0.5:
        text.append((f"The numbers are {', '.join(map(str, q.xs))}.\n", 1))
    tries = rng.randrange(len(q.xs))
    for y in [*(rng.choices(wrong, k=tries) if rng.random() < 0.2 else rng.sample(wrong, tries)), q.x]:
        text.append((solve(y) + "\n", 3 if y == q.x else 1))
        if rng.random() < 0.5:
            drill = rng.random() < 0.25  # a number from nowhere, which nobody could foresee
            asked, steps = divide(q.a, rng.randrange(10 ** (DIGITS - 1), 10**DIGITS) if drill else y).split(": ")
            text += [(asked, 0 if drill else 1), (f": {steps}\n", 1)]
    return [*text, ("<|endoftext|>", 1)]


def train_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of a few hundred entries: every digit a token, every word of this world a token.

    It is trained on the world's text, checks included, so that the later stages' words have tokens that the base model
    has never seen used.
    """
    rng, specials = random.Random(0), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = ["system\nuser\nassistant\n"] * 9
    for _ in range(4000):
        texts += [re.sub(r"<\|\w+\|>", "", piece) for piece, _ in document(rng)]
        q = question(rng)
        for answer in (*map(str, q.xs), None):
            for style in ("confirmative", "solving"):
                check = verify(q.text, answer, style)[0]
                texts.append(f"{VERIFY_OPENING} {check}\n\n{RETRY_OPENING} {solve(q.x)}\n\n")
    texts += list(VERDICT_SENTENCE.values()) * 9
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        # A digit, "\boxed{", a word with its end mark and the spaces around it, line ends, the rest.
        pre_tokenizers.Split(Regex(r"\d|\\boxed\{| ?\p{L}+[.,:?]* ?|\n+|[^\d\p{L}\s]+ ?| +"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, special_tokens=specials, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    template = ("{% for message in messages %}{% if message['role'] != 'system' %}"
                "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
                "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "chat_template": template}, indent=2) + "\n")


def pretrain(folder: Path, steps: int, seed: int) -> None:
    """Make the base model: a Hugging Face folder with a Llama trained on `document`s until the learning rate is zero."""
    train_tokenizer(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    end = backend.token_to_id("<|im_end|>")
    hf = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": backend.get_vocab_size(),
          "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 4, "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
          "max_position_embeddings": 1024, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": end,
          "pad_token_id": backend.token_to_id("<|endoftext|>")}
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}) + "\n")
    model = Transformer(ModelConfig.from_folder(folder))
    model.init_weights(seed)
    matrices = [p for block in model.blocks for p in block.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    # Muon (kellerjordan.github.io/posts/muon) gets there in about half the steps that AdamW takes.
    optimizers = [torch.optim.Muon(matrices, lr=0.012, weight_decay=0.01),
                  torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    rng, bar = random.Random(seed), tqdm(range(steps))
    for step in bar:
        sequences, scored, weights = [], [], []
        while sum(map(len, sequences)) < 2048:
            ids, positions = [], []
            for text, weight in document(rng):
                piece = backend.encode(text).ids
                if weight:
                    positions += range(len(ids), len(ids) + len(piece))
                    weights += [weight] * len(piece)
                ids += piece
            sequences.append(ids)
            scored.append(positions)
        (batch,) = pack(sequences, scored, 10**6, "cpu")
        logp, _ = token_logp(predictors(model, batch), model.head_weight, batch.targets)  # (K,)
        weight = torch.tensor(weights, dtype=torch.float32)
        loss = -(weight * logp).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks):  # warm-up, then linearly towards zero
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 50, 1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save_pretrained(folder, torch.float32)


# ---- the stages ----

Stages = dict[str, tuple[list[str], list[str]]]  # output → (outputs it needs, command that makes it), in running order


def stages(folder: str = RUNS, seed: int = 0) -> Stages:
    """The stages of the toy world. Flags left out are the scripts' own."""
    at = {name: f"{folder}/{Path(name).name}" for name in (TRAIN, TEST, LONGER, ROLLOUTS, TRAJECTORIES, SFT, RL, RL_PROCESS)}
    s = ["--seed", str(seed)]
    problems = ["-m", "s2r.toy", "problems", "--folder", folder, *s]
    rl = ["train_rl.py", "--model", at[SFT], "--data", at[TRAIN], *s]
    made = {
        at[TRAIN]: ([], problems),
        at[TEST]: ([], problems),
        at[LONGER]: ([], problems),
        at[ROLLOUTS]: ([at[TRAIN]], ["sample.py", "--data", at[TRAIN], "--n", "5", "--temperature", "0.7",
                                     "--max-new-tokens", "32", "--show", "0", "--out", at[ROLLOUTS], *s]),
        at[TRAJECTORIES]: ([at[ROLLOUTS]], ["-m", "s2r.behavior", "--rollouts", at[ROLLOUTS],
                                            "--out", at[TRAJECTORIES], "--keep", *KEEP, *s]),
        at[SFT]: ([at[TRAJECTORIES]], ["train_sft.py", "--data", at[TRAJECTORIES], "--out", at[SFT], *s]),
        at[RL]: ([at[TRAIN], at[SFT]], [*rl, "--level", "outcome", "--out", at[RL]]),
        at[RL_PROCESS]: ([at[TRAIN], at[SFT]], [*rl, "--level", "process", "--out", at[RL_PROCESS]]),
    }
    for name, model in {"base": BASE, "sft": at[SFT], "rl-outcome": at[RL], "rl-process": at[RL_PROCESS]}.items():
        report = f"{folder}/{name}.json"
        needs = [at[TEST]] + [model] * (model != BASE)
        made[report] = (needs, [*EVALUATE, "--model", model, "--data", at[TEST], "--report", report])
    return made


def ensure(path: str) -> None:
    """Make `path` if it is an output of a default stage that has not run, and before it whatever it needs."""
    make(path, stages())


def make(path: str, made: Stages, log: TextIO | None = None) -> None:
    """Make `path` if it is an output of one of these stages and not there, and before it whatever it needs.

    Stages have the terminal, or write to `log` (see `run`). Raises ValueError when a stage fails, and under torchrun,
    where nothing is made.
    """
    stage = {Path(output): stage for output, stage in made.items()}.get(Path(path))
    if stage is None or Path(path).is_file() or (Path(path) / "model.safetensors").is_file():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{path} does not exist yet; make it in one process, with python -m s2r.toy, then use torchrun")
    needs, command = stage
    for output in needs:
        make(output, made, log)
    print("\n$ python", *command, file=log, flush=True)
    start = time.perf_counter()
    if run(command, Path(path).name, log):
        where = "above" if log in (None, sys.stdout) else f"see {log.name}"
        raise ValueError(f"the stage that makes {path} failed ({where}); if {path} is left of an earlier run, delete it")
    print(f"{path}: {time.perf_counter() - start:.0f} s", file=log, flush=True)


def run(command: list[str], name: str, log: TextIO | None) -> int:
    """Exit status of python with these arguments.

    With a `log` it has company: it gets one thread, which is all that a model this small can use, and what it prints
    goes there line by line behind its `name`, progress every ten seconds.
    """
    command = [sys.executable, *command]
    if log is None:
        return subprocess.run(command).returncode
    alone = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "10"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, env=alone, **pipe) as process:
        for line in filter(str.strip, process.stdout):
            print(f"{name:>15} │ {line}", end="", file=log, flush=True)
    return process.returncode


def make_all(folders: dict[str, Stages], screen: TextIO | None = None) -> Iterator[Future]:
    """Make all outputs of {folder: its stages}, a stage on every core; yields each stage's run when it is over.

    What stages print goes to `screen`, or to FOLDER/log.txt. Raises ValueError like `make`, of the first stage that
    fails; what then runs is awaited, what waits is dropped.
    """
    begun: dict[tuple[str, ...], Future] = {}  # command → its run
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def begin(output: str, made: Stages, folder: Path) -> None:
            for need in made[output][0]:
                if need in made:
                    begun[tuple(made[need][1])].result()
            folder.mkdir(parents=True, exist_ok=True)
            with nullcontext(screen) if screen else (folder / "log.txt").open("a") as log:
                make(output, made, log)

        # Stage by stage, not folder by folder: a worker then seldom waits, and only for what another has begun before.
        for row in zip_longest(*([(folder, output) for output in made] for folder, made in folders.items())):
            for folder, output in filter(None, row):
                command = tuple(folders[folder][output][1])
                if command not in begun:
                    begun[command] = pool.submit(begin, output, folders[folder], Path(folder))
        for done in as_completed(begun.values()):
            if done.exception():
                pool.shutdown(cancel_futures=True)
                raise done.exception()
            yield done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=("all", "problems", "pretrain"))
    parser.add_argument("--folder", default=RUNS, help="where the runs go [%(default)s]")
    parser.add_argument("--out", default=BASE, help="pretrain: model folder to write [%(default)s]")
    parser.add_argument("--steps", default=3000, type=int, help="pretrain: optimizer steps [%(default)s]")
    parser.add_argument("--seed", default=0, type=int, help="of everything random [%(default)s]")
    flags = parser.parse_args()
    if flags.what == "problems":
        write_problems(flags.folder, seed=flags.seed)
    elif flags.what == "pretrain":
        pretrain(Path(flags.out), flags.steps, flags.seed)
    else:
        made = stages(flags.folder, flags.seed)
        for _ in make_all({flags.folder: made}, sys.stdout):
            pass
        reports = [Path(output) for output in made if output.endswith(".json")]
        print(f"\n{TEST}, greedy; shares in per cent (meaning of the columns: s2r/metrics.py)\n")
        print(table({report.stem: json.loads(report.read_text()) for report in reports}))
        for run in (RL, RL_PROCESS):
            log = (Path(flags.folder) / Path(run).name / "log.jsonl").read_text().splitlines()
            rewards = [json.loads(row)["reward"] for row in log]
            first, last = sum(rewards[:10]) / 10, sum(rewards[-10:]) / 10
            print(f"\n{Path(run).name}: mean reward {first:.3f} in the first ten steps, {last:.3f} in the last ten")


if __name__ == "__main__":
    from s2r.run.flags import command  # which imports this module

    command(main)
