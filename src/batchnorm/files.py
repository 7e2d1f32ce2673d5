"""Files: writing that leaves either the whole file or the one before, and text between two headings."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside another; what the block writes there takes the other's place, whole or not at all.

    Readers and interruptions never meet half of it, and after an exception what was there before still is.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


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
