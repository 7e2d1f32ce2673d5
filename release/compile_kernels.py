"""Compile the usual kernels for a released wheel, so that no user waits for them: `make wheel` runs it.

    python release/compile_kernels.py --out src/batchnorm/kernels/compiled

writes an archive of object files for each level of Linux processors on x86-64. `cache.py` reads them, where they were
made from the same sources. Other systems, dtypes and forms compile on first use.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from batchnorm.kernels import cache
from batchnorm.kernels.compile import object_code
from batchnorm.kernels.key import Form, Key

VIEWS = ("planes", "small", "rows", "planes_split", "rows_split")
ALONE = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu")
WITH_RESIDUAL = ("relu",)  # whose slopes are kept as bits where the backward follows


def usual() -> Iterator[Key]:
    """The kernels that training and evaluating convolutional networks needs."""
    for dtype, view in product(("float32", "bfloat16"), VIEWS):
        forms = [Form(activation) for activation in ALONE]
        forms += [Form(activation, residual=True, slope_bits=True) for activation in WITH_RESIDUAL]
        for form in forms:
            yield Key(f"{view}_forward", dtype, form)
            yield Key(f"{view}_backward", dtype, form._replace(residual=form.residual and not form.slope_bits))
    for dtype, view in product(("float32", "bfloat16"), ("planes", "rows")):
        for activation in ALONE:
            yield Key(f"{view}_evaluate", dtype, Form(activation))
            yield Key(f"{view}_evaluate", dtype, Form(activation, residual=True))
    for view, direction in product(VIEWS, ("forward", "backward")):
        yield Key(f"{view}_{direction}", "float64")


def compiled(key: Key) -> dict[str, bytes]:
    """A kernel's object files, by level."""
    return {level: object_code(key, level) for level in cache.LEVELS}


def main() -> None:
    """Compile, and write the archives."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, help="the folder of the archives")
    arguments.add_argument("--only", default="", help="a regular expression that the kernels' names must have")
    arguments.add_argument("--processes", type=int, default=os.cpu_count())
    asked = arguments.parse_args()
    keys = [key for key in usual() if re.search(asked.only, key.symbol)]
    with ProcessPoolExecutor(asked.processes, mp_context=get_context("spawn")) as pool:
        files = list(pool.map(compiled, keys))
    asked.out.mkdir(parents=True, exist_ok=True)
    for level in cache.LEVELS:
        path = asked.out / cache.archive_of(level).name
        with ZipFile(path, "w", ZIP_DEFLATED) as archive:
            archive.comment = cache.source().encode()
            for key, code in zip(keys, files, strict=True):
                archive.writestr(key.symbol, code[level])
        print(f"{path}: {len(keys)} kernels, {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
