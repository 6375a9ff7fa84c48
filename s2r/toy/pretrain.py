"""How the base model in s2r/toy/base was made: 14 minutes on one core.

    python -m s2r.toy.pretrain --out DIR

The base model is a Llama with 0.9 M parameters. It has learnt the parts of S²R but not the whole: to answer, to
divide, and to name a number that was not named before. It has never seen a text that checks itself.

Departs from the paper: the chat template leaves out the system prompt, to keep sequences short.
"""

import json
import random
import re
from dataclasses import dataclass
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
from s2r.toy.world import DIGITS, divide, question, solve, verify


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
            x = rng.randrange(10 ** (DIGITS - 1), 10**DIGITS) if drill else y
            asked, steps = divide(q.a, x).split(": ")
            text += [(asked, 0 if drill else 1), (f": {steps}\n", 1)]
    return [*text, ("<|endoftext|>", 1)]


def train_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer with a few hundred tokens: one for every digit and every word of this world.

    It is trained on checks too, so their words have tokens, which the pretraining never uses.
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
    template = (
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "chat_template": template}, indent=2) + "\n")


def main(cfg: Config) -> None:
    """Write a Hugging Face folder with a Llama trained on `document`s."""
    check(cfg, "steps")
    folder = Path(cfg.out)
    train_tokenizer(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    end = backend.token_to_id("<|im_end|>")
    hf = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": backend.get_vocab_size(),
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 1024, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": end, "pad_token_id": backend.token_to_id("<|endoftext|>"),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}) + "\n")
    model = Transformer(ModelConfig.from_folder(folder))
    model.init_weights(cfg.seed)
    matrices = [p for block in model.blocks for p in block.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    # Muon (kellerjordan.github.io/posts/muon) gets there in about half the steps that AdamW takes.
    optimizers = [torch.optim.Muon(matrices, lr=0.012, weight_decay=0.01),
                  torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    rng, bar = random.Random(cfg.seed), tqdm(range(cfg.steps))
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
        logp, _ = token_logp(predictors(model, batch), model.head_weight, batch.targets)  # (Q,)
        weight = torch.tensor(weights, dtype=torch.float32)
        loss = -(weight * logp).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks):  # warm-up, then linearly towards zero
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 50, 1 - step / cfg.steps)
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save_pretrained(folder, torch.float32)


if __name__ == "__main__":
    start(main, Config)
