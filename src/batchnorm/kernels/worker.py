"""Compile kernels into the cache on disk, in a process beside the one that will need them (`ahead.py` starts it).

Run as a script. Standard input has a JSON line with ``sys.path``, then one for each kernel: name, dtype, form.
"""

import sys

del sys.path[0]  # this folder, whose modules are no top-level ones

import gc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import threading  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402

_IDLE = 5.0  # seconds without a kernel after which this process ends, and gives its memory back


def main() -> None:
    """Compile what standard input names, until it ends or nothing comes."""
    gc.disable()  # a tenth of the time, in a process of seconds
    sys.path[:] = json.loads(sys.stdin.readline())
    kernels = Path(__file__).resolve().parent
    for name, folder in (("batchnorm", kernels.parent), ("batchnorm.kernels", kernels)):
        module = ModuleType(name)  # their own __init__ loads torch, which takes as long as a kernel, and is not needed
        module.__path__ = [str(folder)]
        sys.modules[name] = module
    from batchnorm.kernels import cache, compile
    from batchnorm.kernels.key import Form, Key

    while True:
        idle = threading.Timer(_IDLE, os._exit, (0,))
        idle.daemon = True
        idle.start()
        line = sys.stdin.readline()
        idle.cancel()
        if not line:
            return
        name, dtype, *form = json.loads(line)
        key = Key(name, dtype, Form(*form))
        if cache.find(key) is None:
            cache.store(key, compile.object_code(key))


if __name__ == "__main__":
    main()
