"""How long a first use takes: ``fuse`` and the first training step of a ResNet-18, each in a process of its own.

    python benchmarks/first_use.py

with no compiled kernel, with those that the first one left, and with those that a released wheel brings. Needs
transformers, which the tests install, and a machine that does nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDED = "float32_(planes|small)_(forward|backward)_(None|relu)_"  # by this network

STEP = """
import sys
import time
import torch
import transformers
import batchnorm
torch.manual_seed(0)
small = {"depths": [2, 2, 2, 2], "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "embedding_size": 64}
model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**small))
images = torch.randn(8, 3, 64, 64)
start = time.perf_counter()
model = batchnorm.fuse(model, images).model.train()
fused = time.perf_counter()
model(images).logits.sum().backward()
assert batchnorm.kernels.ran() == ("numba", "numba")
end = time.perf_counter()
loaded = "Numba loaded" if "numba" in sys.modules else "Numba not loaded"
print(f"{end - start:5.1f} s (fuse {fused - start:.1f}, first training step {end - fused:.1f}; {loaded})")
"""


def first_use(source: Path, cache: Path) -> str:
    """The answer of a process with this package and this folder for compiled kernels."""
    environment = os.environ | {"PYTHONPATH": str(source), "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", STEP], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    """Measure, and print a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "src")
        shutil.copytree(REPOSITORY / "src", copy, ignore=shutil.ignore_patterns("__pycache__", "compiled"))
        first_use(copy, Path(folder, "warm"))  # Python's own compiled modules, and the system's files
        print("no compiled kernel:  ", first_use(copy, Path(folder, "cache")), flush=True)
        print("compiled before:     ", first_use(copy, Path(folder, "cache")), flush=True)
        compiled = copy / "batchnorm" / "kernels" / "compiled"
        release = [sys.executable, str(REPOSITORY / "release" / "compile_kernels.py"), "--out", str(compiled)]
        subprocess.run([*release, "--only", NEEDED], check=True, stdout=subprocess.DEVNULL)
        print("with a released wheel:", first_use(copy, Path(folder, "nothing")), flush=True)


if __name__ == "__main__":
    main()
