"""Files: writing that leaves either the whole file or the one before, and text between two headings."""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from secrets import token_hex

# What this process has put in place so far: after an error, a command says whether that is something.
written: list[Path] = []


def target(path: Path) -> Path:
    """Find the file that a path stands for, links followed, and see that writing would make or replace a file.

    Raises:
        OSError: if it is a directory, a device or whatever else is no file; replacing /dev/null would be a disaster.
    """
    found = Path(os.path.realpath(path))
    if os.path.lexists(found) and not stat.S_ISREG(found.lstat().st_mode):
        kind = "a directory" if found.is_dir() else "no file, but a device, a pipe or the like, which is not replaced"
        raise OSError(f"{path} is {kind}")
    return found


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside another; what the block writes there takes the other's place, whole or not at all.

    Readers and interruptions never meet half of it, and after an exception what was there before still is. A link
    stays, and the file that it leads to is replaced; its permissions stay, and a new file's are those of the process.

    Raises:
        OSError: see ``target``.
    """
    place = target(path)
    partial = place.with_name(f".{token_hex(8)}{place.suffix}")
    mode = stat.S_IMODE(place.stat().st_mode) if place.exists() else None
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode))
    mode = stat.S_IMODE(partial.stat().st_mode) if mode is None else mode  # writers may make the file anew
    try:
        yield partial
        partial.chmod(mode)
        os.replace(partial, place)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(partial)):
            error.filename = str(path)
        raise
    finally:
        if partial.exists():
            partial.unlink()
        else:
            written.append(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_texts({path: text})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write text files, all of them whole before the first takes its place."""
    with ExitStack() as files:
        for path, text in reversed(list(texts.items())):  # which the stack puts in place the last first
            files.enter_context(replacing(path)).write_text(text, encoding="utf-8")


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
