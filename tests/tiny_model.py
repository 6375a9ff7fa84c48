"""A random Llama of 30,000 parameters with the tokenizer of tiny.py, as a folder on which scripts run in seconds."""

import hashlib
import json
from pathlib import Path

import torch

from s2r.grammar import VERDICT_SENTENCE
from s2r.hf.config import ModelConfig
from s2r.hf.tokenizer import Tokenizer
from s2r.model import Transformer
from s2r.run.files import write_jsonl
from tiny import tiny_tokenizer


def tiny_model(folder: str | Path, *, spare: int = 0, context: int = 512, std: float = 0.3, seed: int = 0) -> Path:
    """Writes the model folder and returns it: `spare` embedding rows beyond the tokenizer's, `context` positions.

    A large `std` keeps the logits apart, so that an argmax does not hang on the last bit.
    """
    folder = tiny_tokenizer(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer.vocab_size + spare,
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": context, "tie_word_embeddings": True, "bos_token_id": None,
        "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.end_id,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.end_id}))
    model = Transformer(ModelConfig.from_folder(folder))
    model.init_weights(seed, std)
    with torch.no_grad():
        model.embed[tokenizer.vocab_size :] = 10.0  # spare rows that shout: whoever listens samples nonsense
    model.save_pretrained(folder)
    return folder


def sums(count: int) -> list[tuple[int, int]]:
    """`count` different pairs of digits whose sum is a digit."""
    return [(a, b) for a in range(10) for b in range(10 - a)][:count]


def problem_file(path: Path, count: int = 16) -> Path:
    """A problem file of additions, levels 1 and 2."""
    write_jsonl(path, ({"problem": f"{a}+{b}?", "answer": str(a + b), "level": 1 + i % 2, "unique_id": f"sum/{i}"}
                       for i, (a, b) in enumerate(sums(count))))
    return path


def steps(a: int, b: int, wrong: int) -> list[dict]:
    """A trajectory for a+b with `wrong` attempts before the right one."""
    out = []
    for off in range(wrong, -1, -1):
        word = "incorrect" if off else "correct"
        out += [{"kind": "solve", "text": rf"\boxed{{{a + b + off}}}", "correct": not off},
                {"kind": "verify", "text": f"{a}+{b}={a + b}. {VERDICT_SENTENCE[word]}", "verdict": word}]
    return out


def trajectory_file(path: Path, count: int = 16) -> Path:
    """A trajectory file for the same additions, with 0, 1 or 2 wrong attempts each."""
    write_jsonl(path, ({"unique_id": f"sum/{i}", "problem": f"{a}+{b}?", "answer": str(a + b),
                        "trajectory": steps(a, b, i % 3)} for i, (a, b) in enumerate(sums(count))))
    return path


def digest(folder: Path) -> dict[str, str]:
    """Every file below `folder` with a hash of its content."""
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*")) if file.is_file()}


def same(a, b) -> bool:
    """Equality of nested states, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
