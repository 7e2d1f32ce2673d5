"""Files: writing that leaves either the whole file or the one before."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: readers and interruptions never meet half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
