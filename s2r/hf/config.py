"""The shape of a model: `config.json` of a Hugging Face folder, its old spellings and its new ones, as one dataclass.

Called by `s2r/model.py`; `read_json` by `s2r/tokenizer.py` as well.
"""

import json
from dataclasses import dataclass
from pathlib import Path

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def read_json(path: Path) -> dict:
    """Content of a JSON file that holds an object; ValueError, naming the file, when it does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object; fetch the file again")
    return content


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, by the field's names; `hf` is the config.json that it was read from."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # None, or the parameters of rope type "llama3"
    norm_eps: float = 1e-5
    tied: bool = True  # the head is the embedding
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    max_positions: int = 2048  # tokens of context
    hf: dict | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `config.json`, in its old spelling (rope_theta, rope_scaling) or new one (rope_parameters).

        Raises FileNotFoundError without a config.json, ValueError for a family, activation, bias or rope type that
        this class does not compute.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; --model wants a Hugging Face model folder")
        hf = read_json(path)
        family = hf.get("model_type")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        heads = hf.get("num_attention_heads")
        for what, found, known in (
            ("model_type", family, FAMILIES),
            ("hidden_act", hf.get("hidden_act", "silu"), ("silu",)),
            ("rope type", rope_type, ("default", "llama3")),
            ("attention_bias", hf.get("attention_bias", False), (False,)),
            ("mlp_bias", hf.get("mlp_bias", False), (False,)),
            ("use_sliding_window", hf.get("use_sliding_window", False), (False,)),
        ):
            if found not in known:
                raise ValueError(f"{path}: {what} {found!r} is not supported; known: {', '.join(map(str, known))}")
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "rms_norm_eps",
        )
        scaling = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        absent = [name for name in sizes if name not in hf]
        absent += [name for name in scaling if rope_type == "llama3" and name not in rope]
        if absent:
            raise ValueError(f"{path}: no {', '.join(absent)}; fetch the file again")
        max_positions = hf.get("max_position_embeddings", 2048)
        if family == "mistral" and hf.get("sliding_window"):
            max_positions = min(max_positions, hf["sliding_window"])  # up to there the window changes nothing
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rope_theta=rope.get("rope_theta") or hf.get("rope_theta", 10_000.0),
            rope_scaling=rope if rope_type == "llama3" else None,
            norm_eps=hf["rms_norm_eps"],
            tied=hf.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            max_positions=max_positions,
            hf=hf,
        )
