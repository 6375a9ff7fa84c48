"""The JSON files of a Hugging Face model folder. Called by `s2r/model.py` and `s2r/tokenizer.py`."""

import json
from pathlib import Path


def read_json(path: Path) -> dict:
    """Content of a JSON file that holds an object; ValueError, naming the file, when it does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object; fetch the file again")
    return content
