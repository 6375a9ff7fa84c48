"""Writing files: after a crash, a full disk or a `kill -9` there is the old one or the new one, whole.

A file that grows line by line may end in half a line then, which `drop_torn_line` cuts off.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(path: str | Path) -> None:
    """Make the folder that a file is to be written to. Raises ValueError if `path` is there and no regular file."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: there is something that is not a file (a folder, device or pipe); give another path")
    path.parent.mkdir(parents=True, exist_ok=True)


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write rows as `replacing` does: a crash leaves the old file or the new one. Raises as `check_output`."""
    check_output(path)
    with replacing(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name for a new version of a file, then puts it in place; a full disk leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # renaming onto a link to the same file does nothing


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name != "nt":  # which cannot open a folder
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def drop_torn_line(path: Path) -> bool:
    """Cut off the last line of a file if a crash left it without its end. Returns whether any text is left."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)
    return bool(content[:whole].strip())
