"""How the base model in s2r/toy/base was made: 14 minutes on one core.

    python -m s2r.toy.pretrain --out DIR

The base model is a Llama with 0.9 M parameters. It has learnt the parts of S²R but not the whole: to answer, to
divide, and to name a number that was not named before. It has never seen a text that checks itself. Its sizes and
its chat template come from the JSON files in s2r/toy/base.

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
from s2r.toy.world import NUMBERS, divide, question, solve, verify

BASE = Path(__file__).with_name("base")


@dataclass(frozen=True)
class Config:
    out: str  # model folder to write
    steps: int = 3000  # optimizer steps
    seed: int = 0  # of the weights and of the texts


def document(rng: random.Random) -> list[tuple[str, int]]:
    """One pretraining text, as pieces (text, weight of its tokens in the loss).

    Some texts are a chat: a question and its right answer. In the others, somebody names one number after another
    until one is right, usually none twice, and often divides the number just named. Nothing in them looks like a
    verification. Questions have weight 0; right answers have most, because they are hardest to learn.
    """
    q = question(rng)
    if rng.random() < 0.6:
        asked = f"<|im_start|>user\n{q.text}<|im_end|>\n<|im_start|>assistant\n"
        return [(asked, 0), (solve(q.x) + "<|im_end|>", 3)]
    text, wrong = [(q.text + "\n", 0)], [x for x in q.xs if x != q.x]
    if rng.random() < 0.5:
        text.append((f"The numbers are {', '.join(map(str, q.xs))}.\n", 1))
    tries = rng.randrange(len(q.xs))
    named = rng.choices(wrong, k=tries) if rng.random() < 0.2 else rng.sample(wrong, tries)
    for y in [*named, q.x]:
        text.append((solve(y) + "\n", 3 if y == q.x else 1))
        if rng.random() < 0.5:
            drill = rng.random() < 0.25  # divide a random number instead, which cannot be predicted
            x = rng.choice(NUMBERS) if drill else y
            asked, steps = divide(q.a, x).split(": ")
            text += [(asked, 0 if drill else 1), (f": {steps}\n", 1)]
    return [*text, ("<|endoftext|>", 1)]


def train_tokenizer() -> Backend:
    """A byte-level BPE tokenizer with a few hundred tokens: one for every digit and every word of this world.

    It is trained on checks too, so their words have tokens, which the pretraining never uses.
    """
    rng, texts = random.Random(0), ["system\nuser\nassistant\n"] * 9
    for _ in range(4000):
        texts += [re.sub(r"<\|\w+\|>", "", piece) for piece, _ in document(rng)]
        q = question(rng)
        checks = [verify(q.text, str(x), style)[0] for x in (*q.xs, None) for style in ("confirmative", "solving")]
        texts += [f"{VERIFY_OPENING} {text}\n\n{RETRY_OPENING} {solve(q.x)}\n\n" for text in checks]
    texts += list(VERDICT_SENTENCE.values()) * 9
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        # A digit, "\boxed{", a word with its end mark and the spaces around it, line ends, the rest.
        pre_tokenizers.Split(Regex(r"\d|\\boxed\{| ?\p{L}+[.,:?]* ?|\n+|[^\d\p{L}\s]+ ?| +"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return backend


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
            pieces = [(backend.encode(text).ids, weight) for text, weight in document(rng)]
            row = [weight for ids, weight in pieces for _ in ids]  # of each token
            sequences.append([id for ids, _ in pieces for id in ids])
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
