"""A tokenizer of a few hundred tokens, written as a Hugging Face folder: no network, no download, milliseconds."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Wait, let me recheck my solution. Let me try again. Therefore, the answer is correct.",
    "Therefore, the answer is incorrect. Therefore, the answer cannot be verified. So \\boxed{7} is the answer.\n\n",
]


def tiny_tokenizer(folder: str | Path) -> Path:
    """Writes tokenizer.json and tokenizer_config.json (byte-level BPE, ChatML) into `folder`, which it returns.

    Every byte is a token, so any text can be encoded; the markers of a trajectory come out as several tokens.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL]))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML, "bos_token": None,
              "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
