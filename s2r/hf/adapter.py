"""A LoRA as files of PEFT (github.com/huggingface/peft), and added to its matrices.

A model is handed in; only its `blocks` are used. q, k and v are one matrix here and have one A, which stands in the
file three times; gate and up likewise. Called by `s2r/hf/weights.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file


def deltas(model) -> dict[torch.nn.Parameter, Callable[[int, int], torch.Tensor]]:
    """Matrix → function of (start, end) that gives rows start … end of its α/r·B·A, fp32; empty without LoRA."""

    def rows(lora) -> Callable[[int, int], torch.Tensor]:
        return lambda start, end: lora.scale * (lora.B[start:end] @ lora.A).detach()

    modules = (module for block in model.blocks for module in block.children())
    return {m.weight: rows(m.lora) for m in modules if getattr(m, "lora", None) is not None}


def save(model, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    c, found = model.config, {}
    q, kv, F = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    for i, block in enumerate(model.blocks):
        for name, module, start, end in (
            ("self_attn.q_proj", block.qkv, 0, q),
            ("self_attn.k_proj", block.qkv, q, q + kv),
            ("self_attn.v_proj", block.qkv, q + kv, q + 2 * kv),
            ("self_attn.o_proj", block.o, 0, None),
            ("mlp.gate_proj", block.gate_up, 0, F),
            ("mlp.up_proj", block.gate_up, F, 2 * F),
            ("mlp.down_proj", block.down, 0, None),
        ):
            where = f"base_model.model.model.layers.{i}.{name}"
            found[f"{where}.lora_A.weight"] = module.lora.A
            found[f"{where}.lora_B.weight"] = module.lora.B[start:end]
    copies = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in found.items()}
    save_file(copies, folder / "adapter_model.safetensors", {"format": "pt"})
    lora = model.blocks[0].down.lora
    rank = lora.A.shape[0]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": lora.scale * rank, "lora_dropout": 0.0,
        "bias": "none", "target_modules": sorted({name.split(".")[-3] for name in found}), "inference_mode": True,
        "base_model_name_or_path": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
