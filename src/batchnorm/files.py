"""Files: writing that leaves either the whole file or the one before, and text between two headings."""

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


def around(path: Path, begin: str, end: str) -> tuple[str, str]:
    """Return a text file up to one heading, and from another on: between them results are published.

    Raises:
        OSError: if there is no such file, or it lacks one of the headings.
    """
    text = path.read_text(encoding="utf-8")
    before, first, rest = text.partition(begin + "\n")
    _, second, after = rest.partition(end + "\n")
    if not first or not second:
        raise OSError(f"{path} has no headings {begin!r} and {end!r}, between which results go")
    return before, second + after
