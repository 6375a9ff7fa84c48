"""How the base model in s2r/toy/base was made: 25 minutes on one core.

    python -m s2r.toy.pretrain --out DIR

The base model is a Llama with 0.9 M parameters. It has learnt the parts of S²R but not the whole: to answer, to add up,
to name the target, to compare two numbers, and to give a row of signs that was not given before. It has never seen a
text that checks an answer; `document` lists what it has seen. Its sizes and its chat template come from the JSON files
in s2r/toy/base.

Departs from the paper: the chat template leaves out the system prompt, to keep sequences short.
"""

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tqdm import tqdm

from kernels.logprob import token_logp
from s2r.grammar import RETRY_OPENING, VERDICT_SENTENCE, VERIFY_OPENING
from s2r.hf.config import ModelConfig
from s2r.model import Transformer
from s2r.packing import pack, predictors
from s2r.run.flags import check, start
from s2r.toy.world import add_up, compare, name, puzzle, rows, solve, total, verify

BASE = Path(__file__).with_name("base")
CHATS, SUMS = 0.40, 0.25  # fractions of the documents; the others are puzzles with several rows


@dataclass(frozen=True)
class Config:
    out: str  # model folder to write
    steps: int = 4000  # optimizer steps
    seed: int = 0  # of the weights and of the texts


def document(rng: random.Random) -> list[tuple[str, int]]:
    """One pretraining text, as pieces (text, weight of its tokens in the loss).

    - A chat: a puzzle and its right answer.
    - A puzzle and one row of signs after another until one is right, none twice. After most rows the numbers are added
      up with these signs, and the target of the puzzle is named. The two are not compared.
    - Sums of random numbers without a puzzle, each compared with a random target.

    So the model has seen every part of a check, but never a whole one: no total of a puzzle is compared with its target,
    and no row is called right or wrong. What nobody can know beforehand has weight 0: puzzles, wrong rows, random
    numbers. Right rows have most, because they are hardest to learn.
    """
    kind, p = rng.random(), puzzle(rng)
    if kind < CHATS:
        asked = f"<|im_start|>user\n{p.text}<|im_end|>\n<|im_start|>assistant\n"
        return [(asked, 0), (solve(p.row) + "<|im_end|>", 3)]
    if kind > 1 - SUMS:
        return [*(piece for _ in range(3) for piece in random_sum(rng)), ("<|endoftext|>", 1)]
    text = [(p.text + "\n", 0)]
    wrong = [row for row in rows(len(p.row)) if row != p.row]
    for row in [*rng.sample(wrong, rng.randrange(4)), p.row]:
        text.append((solve(row) + "\n", 3 if row == p.row else 0))
        if rng.random() < 0.7:
            text.append((f"Add up: {add_up(p.xs, row)} {name(p.target)}\n", 1))
    return [*text, ("<|endoftext|>", 1)]


def random_sum(rng: random.Random) -> list[tuple[str, int]]:
    """Adding up random numbers with random signs, a random target, and whether the total is the target, as pieces."""
    xs = puzzle(rng).xs
    row = rng.choice(rows(len(xs) - 1))
    end = total(xs, row)
    far = end + rng.choice((-1, 1)) * rng.choice(rng.choice((range(1, 13), range(1, 60))))
    target = end if rng.random() < 0.5 else min(max(far, 0), 149)
    text = f"Add up: {add_up(xs, row)} {name(target)} {compare(end, target)}\n"
    # Weight 0: the first number, every sign with its number, and the target. 2: the comparison. 1: all else.
    random_part = re.compile(r"(?<=up: )\d+| (?:plus|minus) \d+|(?<=target is )\d+")
    known, unknown = random_part.split(text), random_part.findall(text)
    weights = [1] * (len(known) - 1) + [2]
    return [piece for a, weight, b in zip(known, weights, [*unknown, ""]) for piece in ((a, weight), (b, 0))]


def train_tokenizer() -> Backend:
    """A byte-level BPE tokenizer with a few hundred tokens: one for every number and every word of this world.

    It is trained on checks too, so their words have tokens, which the pretraining never uses.
    """
    rng, texts = random.Random(0), ["system\nuser\nassistant\n", *map(str, range(150))] * 9
    for _ in range(4000):
        texts += [re.sub(r"<\|\w+\|>", "", piece) for piece, _ in document(rng)]
        p = puzzle(rng)
        tried = (p.row, rng.choice(rows(len(p.row))), ())
        checks = [verify(p.text, " ".join(row), style)[0] for row in tried for style in ("confirmative", "solving")]
        texts += [f"{VERIFY_OPENING} {text}\n\n{RETRY_OPENING} {solve(p.row)}\n\n" for text in checks]
    texts += list(VERDICT_SENTENCE.values()) * 9
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        # A number, "\boxed{", a word with its end mark and the spaces around it, line ends, the rest.
        pre_tokenizers.Split(Regex(r"\d+|\\boxed\{| ?\p{L}+[.,:?]* ?|\n+|[^\d\p{L}\s]+ ?| +"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return backend


def encode(backend: Backend, pieces: list[tuple[str, int]]) -> tuple[list[int], list[int]]:
    """Ids of the pieces, and the weight of each: that of the piece in which the token begins.

    The pieces are encoded as one text. One by one they would give other tokens at their borders than running text has.
    """
    weights = [weight for text, weight in pieces for _ in text]  # of each character
    encoding = backend.encode("".join(text for text, _ in pieces))
    return encoding.ids, [weights[start] for start, _ in encoding.offsets]


def main(cfg: Config) -> None:
    """Write a Hugging Face folder with a Llama trained on `document`s."""
    check(cfg, "steps")
    folder, backend = Path(cfg.out), train_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((BASE / name).read_bytes())
    base, size = ModelConfig.from_folder(BASE), backend.get_vocab_size()
    model = Transformer(replace(base, vocab_size=size, hf=base.hf | {"vocab_size": size}))
    model.init_weights(cfg.seed)
    matrices = [p for block in model.blocks for p in block.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    # Muon (kellerjordan.github.io/posts/muon) gets there in about half the steps that AdamW takes.
    optimizers = [torch.optim.Muon(matrices, lr=0.012, weight_decay=0.01),
                  torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)]

    rng, bar = random.Random(cfg.seed), tqdm(range(cfg.steps))
    for step in bar:
        sequences, scored, weights = [], [], []
        while sum(map(len, sequences)) < 2048:
            ids, row = encode(backend, document(rng))
            sequences.append(ids)
            scored.append([t for t, weight in enumerate(row) if weight])
            weights += filter(None, row)
        (batch,) = pack(sequences, scored, 10**6, "cpu")
        logp, _ = token_logp(predictors(model, batch), model.head_weight, batch.targets)  # (Q,)
        weight = torch.tensor(weights, dtype=torch.float32)
        loss = -(weight * logp).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            peak = optimizer.defaults["lr"]  # warm-up, then linearly towards zero
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 50, 1 - step / cfg.steps)
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save_pretrained(folder, torch.float32)


if __name__ == "__main__":
    start(main, Config)
