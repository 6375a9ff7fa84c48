"""A LoRA as files of PEFT (github.com/huggingface/peft).

A model is handed in; only its `blocks` are used. q, k and v share one matrix and one A here, and the file has that A three
times; that of gate and up twice. Called by `s2r/hf/weights.py`.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def loras(model) -> dict[torch.nn.Parameter, torch.nn.Module]:
    """Each frozen matrix and the LoRA beside it; empty without LoRA."""
    modules = (module for block in model.blocks for module in block.children())
    return {m.weight: m.lora for m in modules if getattr(m, "lora", None) is not None}


def save(places: dict, beside: dict, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors; `places` as in weights.py, `beside` as from `loras`."""
    folder.mkdir(parents=True, exist_ok=True)
    found, kinds = {}, set()
    for name, (p, start, end) in places.items():
        if p in beside:
            name, lora = name.removesuffix(".weight"), beside[p]
            kinds.add(name.rpartition(".")[2])
            for kind, x in (("A", lora.A), ("B", lora.B[start:end])):
                copy = x.detach().to("cpu", copy=True).contiguous()
                found[f"base_model.model.{name}.lora_{kind}.weight"] = copy
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    rank = lora.A.shape[0]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": lora.scale * rank, "lora_dropout": 0.0,
        "bias": "none", "target_modules": sorted(kinds), "inference_mode": True, "base_model_name_or_path": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
