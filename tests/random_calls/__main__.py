"""The command: many cases in a child process, so that one that ends the process is known by name.

Exit code 0 if every case was right, 1 if any was wrong, died or hung.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .cases import draw

HANGS_AFTER = 900.0  # seconds of one case: compiling its loops takes some, on a busy machine many


class Outcome(NamedTuple):
    """Of one case."""

    index: int
    faults: list[str]


def main() -> None:
    """Parse the command line, run the cases, report."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--few", action="store_true", help="only few compiled forms")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        _child(asked)
    else:
        sys.exit(_report(asked))


def _report(asked: argparse.Namespace) -> int:
    began, wrong, done = time.monotonic(), 0, 0
    for outcome in outcomes(asked.seed, asked.first, asked.cases, asked.seconds, asked.few):
        done += 1
        if outcome.faults:
            wrong += 1
            print(f"case {outcome.index}:\n    {draw(asked.seed, outcome.index, asked.few).snippet()}")
            print(*(f"        {fault}" for fault in outcome.faults), sep="\n", flush=True)
        if done % 500 == 0:
            print(f"{done} cases, {wrong} wrong, {time.monotonic() - began:.0f} s", flush=True)
    print(f"seed {asked.seed}: {done} cases, {wrong} wrong, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


CHILD = ("-m", __package__ or "", "--child")


def outcomes(
    seed: int,
    first: int,
    cases: int,
    seconds: float = float("inf"),
    few: bool = False,
    child: tuple[str, ...] = CHILD,
) -> Iterator[Outcome]:
    """Run cases one after the other in a child process; start another one after a case that ends it.

    Args:
        seed, first, cases, few: see ``draw``.
        seconds: begin no case after so many.
        child: what to tell Python, before the same arguments.
    """
    deadline, index, last = time.monotonic() + seconds, first, first + cases
    while index < last and time.monotonic() < deadline:
        for outcome in _one_child((*child, "--seed", str(seed), *(["--few"] if few else [])), index, last, deadline):
            yield outcome
            index = outcome.index + 1


def _one_child(child: tuple[str, ...], first: int, last: int, deadline: float) -> Iterator[Outcome]:
    command = [sys.executable, "-X", "faulthandler", *child, "--first", str(first), "--cases", str(last - first)]
    path = os.pathsep.join([str(Path(__file__).parents[len((__package__ or "").split("."))]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        lines: queue.Queue[str | None] = queue.Queue()
        errors: list[str] = []
        readers = [
            threading.Thread(target=_read, args=(child.stdout, lines.put)),
            threading.Thread(target=_read, args=(child.stderr, errors.append)),
        ]
        for reader in readers:
            reader.start()
        running: int | None = None
        try:
            while time.monotonic() < deadline:
                try:
                    line = lines.get(timeout=HANGS_AFTER)
                except queue.Empty:
                    if running is not None:
                        yield Outcome(running, [f"has not ended after {HANGS_AFTER:.0f} s"])
                    return
                if line is None:
                    readers[1].join()
                    if running is not None or child.wait() != 0:
                        told = " | ".join("".join(e or "" for e in errors).splitlines()[-40:])
                        yield Outcome(first if running is None else running, [_death(child.wait(), told)])
                    return
                said = json.loads(line)
                if "run" in said:
                    running = said["run"]
                else:
                    running = None
                    first = said["index"] + 1
                    yield Outcome(**said)
        finally:
            child.kill()


def _death(code: int, told: str) -> str:
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"ended the process: {name}: {told}"


def _read(stream: Any, take: Any) -> None:
    with suppress(ValueError):
        for line in stream:
            take(line)
    take(None)


def _child(asked: argparse.Namespace) -> None:
    import torch

    from .run import run

    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True)  # fresh memory is nan
    for index in range(asked.first, asked.first + asked.cases):
        print(json.dumps({"run": index}), flush=True)
        faults = run(draw(asked.seed, index, asked.few))
        print(json.dumps({"index": index, "faults": faults}), flush=True)


if __name__ == "__main__":
    main()
