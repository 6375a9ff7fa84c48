r"""The embedded default: a tiny world in which all of S²R runs on a laptop's CPU. Start reading here.

    python -m s2r.toy                        everything below, stage by stage, and a table of what each stage reached
    python -m s2r.toy pretrain --out DIR     how the base model in s2r/toy_base was made (10 minutes on one core)

A problem hides a number x of three digits in a·x = c:

    A taxi costs 7 per mile, 3024 in all. How many miles was the ride?        a = 7, c = 3024, x = 432

*Finding* x is hard for this model: it writes the equation down and answers at once, without scratch work. *Checking*
x is easy, because it goes in small steps: put x back in, multiply by place values, compare with c digit by digit. A
failed check even tells in which direction to look. That gap is what S²R lives on.

The base model is a 0.9 M parameter Llama that has learnt the parts and not the whole: answering, multiplying,
comparing, and trying again when somebody else said "Too big." It has never seen a text check itself. Its pretraining
ends when it answers about six in ten of the test problems; half as many steps again and it would answer nearly all.
Stages 0 to 2 teach it to check and to correct, with the same three scripts that train a large model: `stages` lists the
commands. Departs from the paper: verifications come from a rule (`verify`), not from GPT-4, and the chat template
leaves out the system prompt, to keep sequences short.
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
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tqdm import tqdm

from kernels.logprob import token_logp
from s2r.data import write_jsonl
from s2r.metrics import table
from s2r.model import ModelConfig, Transformer
from s2r.packing import pack, predictors
from s2r.trajectory import RETRY_OPENING, VERDICT_SENTENCE, VERIFY_OPENING

BASE = "s2r/toy_base"  # ships with the repository; the paths are relative to its root, where every command runs
RUNS = "runs/toy"
TRAIN, TEST = f"{RUNS}/train.jsonl", f"{RUNS}/test.jsonl"
ROLLOUTS, TRAJECTORIES = f"{RUNS}/base.rollouts.jsonl", f"{RUNS}/trajectories.jsonl"
SFT, RL, RL_PROCESS = f"{RUNS}/sft", f"{RUNS}/rl-outcome", f"{RUNS}/rl-process"

TEMPLATES = (
    "{a} times a number is {c}. What is the number?",
    "{a} equal bags hold {c} nuts in all. How many nuts are in a bag?",
    "Ann walks {a} equal laps, {c} steps in all. How many steps is a lap?",
    "A taxi costs {a} per mile, {c} in all. How many miles was the ride?",
)
PATTERNS = [re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(template))) for template in TEMPLATES]
HORIZON = 3000  # steps at which the learning rate is zero; pretraining stops before, or finding x would be easy too
FACTORS = ((2, 3), (4, 5), (6, 7), (8, 9))  # the values of a in pretraining, all as often
LEVELS = {1: (6,), 2: (7, 9), 3: (4,), 4: (8,)}  # difficulty of a problem -> a, by how often the base model is right


# ---- the world: questions and checks ----

@dataclass(frozen=True)
class Question:
    """a·x = c with x unknown, told in the words of one template."""

    a: int
    x: int
    template: int

    @property
    def c(self) -> int:
        return self.a * self.x

    @property
    def text(self) -> str:
        return TEMPLATES[self.template].format(a=self.a, c=self.c)


def held_out(a: int, x: int) -> bool:
    """One (a, x) in ten belongs to the test set: no training or pretraining question uses it, in any wording."""
    return zlib.crc32(f"{a} {x}".encode()) % 10 == 0


def question(rng: random.Random, test: bool = False, level: int | None = None) -> Question:
    """A random question of the training or the test world: of one level, or with any factor that there is."""
    factors = LEVELS[level] if level else rng.choice(FACTORS)
    while True:
        a, x = rng.choice(factors), rng.randrange(100, 1000)
        if held_out(a, x) == test:
            return Question(a, x, rng.randrange(len(TEMPLATES)))


def write_problems(folder: str, train: int = 2000, test: int = 1000, seed: int = 0) -> None:
    """`train.jsonl` and `test.jsonl` in the problem-file format, all levels alike, no question twice."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, size in (("train", train), ("test", test)):
        rng, questions = random.Random(f"{seed} {name}"), {}
        while len(questions) < size:
            level = 1 + len(questions) % len(LEVELS)
            q = question(rng, name == "test", level)
            questions[q.text] = q, level
        write_jsonl(Path(folder) / f"{name}.jsonl", (
            {"problem": q.text, "answer": str(q.x), "level": level, "unique_id": f"toy/{name}/{i}"}
            for i, (q, level) in enumerate(questions.values())))


def solve(q: Question, x: int) -> str:
    """An attempt with answer x: the equation, and straight away the answer."""
    return rf"{q.a}*?={q.c}, so \boxed{{{x}}}."


def times(a: int, x: int) -> str:
    """a·x by place values, for 7 and 432: "7*400=2800, 7*30=210, 7*2=14, 2800+210=3010, 3010+14=3024"."""
    digits = str(x)
    parts = [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits) if d != "0"] or [0]
    steps, total = [f"{a}*{part}={a * part}" for part in parts], a * parts[0]
    for part in parts[1:]:
        steps.append(f"{total}+{a * part}={total + a * part}")
        total += a * part
    return ", ".join(steps)


def compare(r: int, c: int) -> str:
    """r against c, digit by digit down to the first that differs: "263 to 284: 2=2, 6<8, too small"."""
    width = max(len(str(r)), len(str(c)))
    r, c = str(r).zfill(width), str(c).zfill(width)
    steps = []
    for p, q in zip(r, c):
        sign = "=" if p == q else "<" if p < q else ">"
        steps.append(f"{p}{sign}{q}")
        if sign != "=":
            break
    return f"{r} to {c}: {', '.join(steps)}, {dict(zip('=<>', ('equal', 'too small', 'too big')))[sign]}"


def verify(problem: str, answer: str | None) -> tuple[str, str]:
    """Confirmative verification by rule: put the answer back into the problem. Its text, and the verdict it comes to.

    Works for whatever a model may have boxed. Raises ValueError for a problem that is not of this world.
    """
    found = next(filter(None, (pattern.fullmatch(problem) for pattern in PATTERNS)), None)
    if found is None:
        raise ValueError(f"not a problem of the toy world, so its rule cannot verify answers to it: {problem!r}")
    a, c = int(found["a"]), int(found["c"])
    if not re.fullmatch(r"[0-9]{1,5}", answer or ""):
        return f"There is no number to check. {VERDICT_SENTENCE['incorrect']}", "incorrect"
    x = int(answer)
    verdict = "correct" if a * x == c else "incorrect"
    return f"{times(a, x)}. {compare(a * x, c)}. {VERDICT_SENTENCE[verdict]}", verdict


# ---- the base model: tokenizer, pretraining text, pretraining ----

def near(rng: random.Random, x: int) -> int:
    """A wrong answer as a solver in a hurry gives it: not far from x."""
    while True:
        y = x + rng.choice((-1, 1)) * rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 6, 8, 9, 10, 10, 11, 12, 20, 100))
        if 1 <= y < 1000:
            return y


def exercise(rng: random.Random, q: Question) -> list[tuple[str, int]]:
    """One part of a check by itself, about the question; its missing numbers have to be looked up there."""
    y = rng.choice((q.x, near(rng, q.x), near(rng, q.x), rng.randrange(1, 1000)))
    if rng.random() < 0.5:
        return [(f"Times {y}: ", 0), (f"{times(q.a, y)}.\n", 1)]
    miss = q.c + rng.choice((-1, 1)) * rng.choice((1, 1, 2, 3, 5, 10, 20, 100))
    left, rest = compare(rng.choice((q.c, q.c, max(miss, 0), q.a * y)), q.c).split(" to ")
    return [(f"Compare {left}", 0), (f" to {rest}.\n", 1)]


def document(rng: random.Random) -> list[tuple[str, int]]:
    """One pretraining text in pieces (text, weight of its tokens in the loss).

    Most are a chat, question and answer. The others are plain: attempts at a question, each followed by exercises in
    the parts of a check and, when it was wrong, by somebody's hint. None of it looks like a verification. Questions,
    wrong attempts and hints are context, weight 0; right answers weigh most, because they are the hardest to learn.
    """
    q = question(rng)
    if rng.random() < 0.6:
        asked = f"<|im_start|>user\n{q.text}<|im_end|>\n<|im_start|>assistant\n"
        return [(asked, 0), (solve(q, q.x) + "<|im_end|>", 2)]
    text, low, high = [(q.text + "\n", 0)], 0, 1000
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        y = near(rng, q.x)
        if low < y < high:  # nobody guesses against a hint
            text += [(solve(q, y) + "\n", 0)] + [p for _ in range(rng.randrange(1, 4)) for p in exercise(rng, q)]
            text.append(("Too small.\n" if y < q.x else "Too big.\n", 0))
            low, high = (y, high) if y < q.x else (low, y)
    text += [(solve(q, q.x) + "\n", 2)] + [p for _ in range(rng.randrange(1, 4)) for p in exercise(rng, q)]
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
        for answer in (str(q.x), str(near(rng, q.x)), None):
            texts.append(f"{VERIFY_OPENING} {verify(q.text, answer)[0]}\n\n{RETRY_OPENING} {solve(q, q.x)}\n\n")
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
    """Make the base model: a Hugging Face folder with a Llama trained on `document`s for `steps` ≤ HORIZON steps."""
    if steps > HORIZON:
        raise ValueError(f"--steps {steps}: the learning rate is zero after {HORIZON}")
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
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 50, 1 - step / HORIZON)
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save_pretrained(folder, torch.float32)


# ---- the stages ----

def stages(folder: str = RUNS, seed: int = 0) -> dict[str, tuple[list[str], list[str]]]:
    """output -> (outputs it needs, command that makes it), in running order. Flags left out are the scripts' own."""
    at = {name: f"{folder}/{Path(name).name}" for name in (TRAIN, TEST, ROLLOUTS, TRAJECTORIES, SFT, RL, RL_PROCESS)}
    s = ["--seed", str(seed)]
    problems = ["-m", "s2r.toy", "problems", "--folder", folder, *s]
    rl = ["train_rl.py", "--model", at[SFT], "--data", at[TRAIN], *s]
    made = {
        at[TRAIN]: ([], problems),
        at[TEST]: ([], problems),
        at[ROLLOUTS]: ([at[TRAIN]], ["sample.py", "--data", at[TRAIN], "--n", "5", "--temperature", "0.7",
                                     "--max-new-tokens", "32", "--show", "0", "--out", at[ROLLOUTS], *s]),
        at[TRAJECTORIES]: ([at[ROLLOUTS]], ["-m", "s2r.behavior", "--rollouts", at[ROLLOUTS],
                                            "--out", at[TRAJECTORIES], "--keep", "0.5", "1", "1", "1", *s]),
        at[SFT]: ([at[TRAJECTORIES]], ["train_sft.py", "--data", at[TRAJECTORIES], "--out", at[SFT], *s]),
        at[RL]: ([at[TRAIN], at[SFT]], [*rl, "--level", "outcome", "--out", at[RL]]),
        at[RL_PROCESS]: ([at[TRAIN], at[SFT]], [*rl, "--level", "process", "--out", at[RL_PROCESS]]),
    }
    for name, model in {"base": BASE, "sft": at[SFT], "rl-outcome": at[RL], "rl-process": at[RL_PROCESS]}.items():
        report = f"{folder}/{name}.json"
        needs = [at[TEST]] + [model] * (model != BASE)
        made[report] = (needs, ["sample.py", "--model", model, "--data", at[TEST], "--report", report])
    return made


def ensure(path: str, folder: str = RUNS, seed: int = 0) -> None:
    """Make `path` if it is an output of a stage that has not run, and before it whatever it needs. Else do nothing.

    Raises ValueError when a stage fails, and under torchrun, where nothing is made.
    """
    made = {Path(output): stage for output, stage in stages(folder, seed).items()}
    path = Path(path)
    if path not in made or path.is_file() or (path / "model.safetensors").is_file():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{path} does not exist yet; make it in one process, with python -m s2r.toy, then use torchrun")
    needs, command = made[path]
    for output in needs:
        ensure(output, folder, seed)
    print("\n$ python", *command, flush=True)
    start = time.perf_counter()
    if subprocess.run([sys.executable, *command]).returncode:
        raise ValueError(f"the stage that makes {path} failed (above); if {path} is left of an earlier run, delete it")
    print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=("all", "problems", "pretrain"))
    parser.add_argument("--folder", default=RUNS, help="where the runs go [%(default)s]")
    parser.add_argument("--out", default=BASE, help="pretrain: model folder to write [%(default)s]")
    parser.add_argument("--steps", default=2000, type=int, help="pretrain: optimizer steps [%(default)s]")
    parser.add_argument("--seed", default=0, type=int, help="of everything random [%(default)s]")
    flags = parser.parse_args()
    if flags.what == "problems":
        write_problems(flags.folder, seed=flags.seed)
    elif flags.what == "pretrain":
        pretrain(Path(flags.out), flags.steps, flags.seed)
    else:
        for output in stages(flags.folder, flags.seed):
            ensure(output, flags.folder, flags.seed)
        reports = [Path(output) for output in stages(flags.folder) if output.endswith(".json")]
        print(f"\n{TEST}, greedy; shares in per cent (meaning of the columns: s2r/metrics.py)\n")
        print(table({report.stem: json.loads(report.read_text()) for report in reports}))
        for run in (RL, RL_PROCESS):
            log = (Path(flags.folder) / Path(run).name / "log.jsonl").read_text().splitlines()
            rewards = [json.loads(row)["reward"] for row in log]
            first, last = sum(rewards[:10]) / 10, sum(rewards[-10:]) / 10
            print(f"\n{Path(run).name}: mean reward {first:.3f} in the first ten steps, {last:.3f} in the last ten")


if __name__ == "__main__":
    main()
