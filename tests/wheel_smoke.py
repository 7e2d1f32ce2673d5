"""Build the wheel, install it alone into an empty folder, and use it from there: does it hold all that it needs?

It has two compiled kernels; a wheel to release (`make wheel`) has all of the usual ones.

Run by `make test`, in the environment that has the dependencies; not collected by pytest.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
KERNELS = "float32_planes_(forward|backward)_None"  # of the layer below

USE = """
import importlib.resources
import sys
from pathlib import Path

import torch

import batchnorm

site = Path(sys.argv[1])
assert Path(batchnorm.__file__).is_relative_to(site), f"{batchnorm.__file__} is not the installed wheel"
assert batchnorm.BatchNorm2d(3)(torch.randn(2, 3, 40, 40)).shape == (2, 3, 40, 40)

# Large enough that our own kernel is worth its call.
x = torch.randn(16, 32, 48, 48, requires_grad=True)
ours, torchs = batchnorm.BatchNorm2d(32), torch.nn.BatchNorm2d(32)
torch.testing.assert_close(ours(x), torchs(x), rtol=1e-4, atol=1e-4)
weight = torch.randn_like(x)
for layer in (ours, torchs):
    layer.zero_grad()
    layer(x).backward(weight)
assert batchnorm.kernels.ran() == ("numba", "numba"), batchnorm.kernels.ran()
torch.testing.assert_close(ours.weight.grad, torchs.weight.grad, rtol=1e-3, atol=1e-2)

from batchnorm.kernels import cache

if cache._level() is None:
    print("no compiled kernels are shipped for this system or processor: not tried")
else:
    assert "numba" not in sys.modules, "a kernel was compiled that the wheel has"

package = importlib.resources.files("batchnorm")
for resource in ("py.typed", "study/templates/report.html.j2", "reports/templates/base.css"):
    assert package.joinpath(resource).is_file(), f"the wheel lacks {resource}"
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist, site, made = (Path(folder, name).resolve() for name in ("dist", "site", "made"))
        shutil.copytree(REPOSITORY / "src", made / "src", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPOSITORY / name, made)
        python = (sys.executable, "-m")
        compiled = made / "src" / "batchnorm" / "kernels" / "compiled"
        run(sys.executable, REPOSITORY / "release" / "compile_kernels.py", "--out", compiled, "--only", KERNELS)
        run(*python, "build", "--wheel", "--no-isolation", "--outdir", dist, made)
        (wheel,) = dist.glob("batchnorm-*.whl")
        run(*python, "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)

        # Ahead of the environment's own packages, so also of the editable install of the source.
        environment = os.environ | {"PYTHONPATH": str(site), "NUMBA_CACHE_DIR": str(Path(folder, "cache"))}
        run(sys.executable, "-c", USE, site, cwd=folder, env=environment)
        run(site / "bin" / "batchnorm", "compare", "--help", cwd=folder, env=environment)
    print("the wheel holds all that it needs")


def run(*command: object, **options: object) -> None:
    if subprocess.run([str(part) for part in command], **options).returncode:
        sys.exit("the wheel does not hold all that it needs: see above")


if __name__ == "__main__":
    main()
