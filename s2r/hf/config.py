"""The shape of a model: `config.json` of a Hugging Face folder, old and new spellings, as one dataclass.

Called by `s2r/model.py`; `read_json` also by the other files of this folder.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

AGAIN = "fetch the file again"
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # of that rope type


def read_json(path: Path) -> dict:
    """Content of a JSON file that holds an object. Raises ValueError, naming the file, when it does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object; {AGAIN}")
    return content


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, by the field's names; `hf` is the config.json that it was read from."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # G
    head_dim: int  # E
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # None, or the parameters of rope type "llama3"
    norm_eps: float = 1e-5
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    max_positions: int = 2048  # tokens of context
    hf: dict | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `config.json`, in its old spelling (rope_theta, rope_scaling) or new one (rope_parameters).

        Raises FileNotFoundError without it, and ValueError for a setting that is missing, impossible or not supported.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; --model wants a Hugging Face model folder")
        hf = read_json(path)
        rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: the rope settings are {rope!r}, not an object; {AGAIN}")
        settings = hf | {name: value for name, value in rope.items() if value is not None}
        family, rope_type = hf.get("model_type"), rope.get("rope_type", rope.get("type", "default"))
        for what, found, known in (
            ("model_type", family, ("llama", "mistral", "qwen2", "qwen3")),
            ("hidden_act", hf.get("hidden_act", "silu"), ("silu",)),
            ("rope type", rope_type, ("default", "llama3")),
            *((name, hf.get(name, False), (False,)) for name in ("attention_bias", "mlp_bias", "use_sliding_window")),
            ("tie_word_embeddings", hf.get("tie_word_embeddings", False), (True, False)),
        ):
            if found not in known:
                raise ValueError(f"{path}: {what} {found!r} is not supported; known: {', '.join(map(str, known))}")

        def number(name: str, default: float | None = None, kind: str = "whole number") -> float:
            """A setting that is a "number" or "whole number" above 0, `default` where it is absent or null."""
            found = default if settings.get(name) is None else settings[name]
            if type(found) not in ((int, float) if kind == "number" else (int,)) or not 0 < found < math.inf:
                raise ValueError(f"{path}: {name} is {json.dumps(found)}, where a {kind} above 0 belongs; {AGAIN}")
            return found

        D, H = number("hidden_size"), number("num_attention_heads")
        G, E = number("num_key_value_heads", H), number("head_dim", D // H)
        if H % G:
            raise ValueError(f"{path}: num_attention_heads {H} is no multiple of num_key_value_heads {G}; {AGAIN}")
        if E % 2:
            raise ValueError(f"{path}: head_dim {E} is odd, and rotary positions need pairs; {AGAIN}")
        scaling = {name: number(name, kind="number") for name in LLAMA3 if rope_type == "llama3"}
        context = number("max_position_embeddings", cls.max_positions)
        window = number("sliding_window", context) if family == "mistral" else context  # a context within it needs none
        return cls(
            vocab_size=number("vocab_size"), hidden_size=D, intermediate_size=number("intermediate_size"),
            num_layers=number("num_hidden_layers"), num_heads=H, num_kv_heads=G, head_dim=E,
            rope_theta=number("rope_theta", cls.rope_theta, "number"), rope_scaling=scaling or None,
            norm_eps=number("rms_norm_eps", kind="number"), max_positions=min(context, window), hf=hf,
            tied=hf.get("tie_word_embeddings", cls.tied), qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
        )  # fmt: skip

    def inverse_frequencies(self) -> torch.Tensor:
        """Angular speed per position of each rotary pair, (E/2,) fp32, with Llama 3.1's scaling if there is one."""
        E, s = self.head_dim, self.rope_scaling
        speed = self.rope_theta ** (-torch.arange(0, E, 2, dtype=torch.float32) / E)
        if s is None:
            return speed
        # Divided by `factor` beyond the old context, blended before it (meta-llama/llama-models, llama3/model.py).
        turns = s["original_max_position_embeddings"] * speed / (2 * math.pi)  # full turns within the old context
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow pair, scaled; 1: fast pair, as it was
        return speed * (kept + (1 - kept) / s["factor"])
