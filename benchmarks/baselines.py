"""The contenders that are slow to build, or not always there: torch.compile, JAX, ONNX Runtime."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.benchmark.cells import Operation
from batchnorm.benchmark.contenders import Inputs, call, layer
from batchnorm.benchmark.timing import Call
from benchmarks.grid import Cell

COMPILED, JAX, ONNX = "torch.compile", "JAX", "ONNX Runtime"
BASELINES = (COMPILED, JAX, ONNX)
_PACKAGES = {JAX: ("jax",), ONNX: ("onnx", "onnxscript", "onnxruntime")}


def build(
    cell: Cell, given: Inputs, operation: Operation, only: tuple[str, ...] = BASELINES
) -> tuple[dict[str, Call], dict[str, str]]:
    """Build the calls of those that can run a cell; returns them, and for each that cannot be had here, why."""
    builders = {COMPILED: _compiled}
    if cell.layout == "contiguous":  # the others know no layout
        builders[JAX] = _jax
        if operation == "evaluation" and cell.dtype == "float32":
            builders[ONNX] = _onnx
    calls: dict[str, Call] = {}
    skipped: dict[str, str] = {}
    for name in (name for name in only if name in builders):
        missing = [package for package in _PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
        if missing:
            skipped[name] = f"not installed: {', '.join(missing)}"
            continue
        try:
            built = builders[name](cell, given, operation)
            built()
        except Exception as error:  # a compiler is missing, or versions do not fit
            skipped[name] = f"{type(error).__name__}: {error}"
        else:
            calls[name] = built
    return calls, skipped


def _compiled(cell: Cell, given: Inputs, operation: Operation) -> Call:
    torch.compiler.reset()  # it compiles anew for a limited number of shapes, then never again
    compiled: Any = torch.compile(layer(nn, given, cell), dynamic=False)
    return call(compiled, given, operation)


def _jax(cell: Cell, given: Inputs, operation: Operation) -> Call:
    """The same under ``jax.jit``. JAX has its own threads, as many as there are cores."""
    import jax
    import jax.numpy as jnp

    def array(t: Tensor) -> Any:
        return jnp.asarray(t.detach().float().numpy(), dtype=str(t.dtype).removeprefix("torch."))

    arguments, grad_y = [array(t) for t in (*given.arguments, given.weight, given.bias)], array(given.grad_y)
    mean, var = array(given.running_mean), array(given.running_var)
    x = arguments[0]
    per_channel = (None, slice(None), *(None,) * (x.ndim - 2))
    axes = (0, *range(2, x.ndim))
    unbiased = x.size / x.shape[1] / (x.size / x.shape[1] - 1)

    def apply(x: Any, added: tuple[Any, ...], weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        scale = weight * jax.lax.rsqrt(var + 1e-5)
        z = (x.astype("float32") - mean[per_channel]) * scale[per_channel] + bias[per_channel]
        for residual in added:
            z = z + residual.astype("float32")
        return (z if cell.fused == "bn" else jax.nn.relu(z)).astype(x.dtype)

    def train(x: Any, *others: Any) -> Any:
        *added, weight, bias = others
        wide = x.astype("float32")
        now, spread = wide.mean(axes), wide.var(axes)
        moved = 0.9 * mean + 0.1 * now, 0.9 * var + 0.1 * unbiased * spread
        return apply(x, tuple(added), weight, bias, now, spread), moved

    def step(grad_y: Any, *arguments: Any) -> Any:
        y, pull, moved = jax.vjp(train, *arguments, has_aux=True)
        return y, pull(grad_y), moved

    def evaluate(mean: Any, var: Any, x: Any, *others: Any) -> Any:
        *added, weight, bias = others
        return apply(x, tuple(added), weight, bias, mean, var)

    calls: dict[Operation, tuple[Callable[..., Any], list[Any]]] = {
        "forward": (train, arguments),
        "forward+backward": (step, [grad_y, *arguments]),
        "evaluation": (evaluate, [mean, var, *arguments]),
    }
    function, wanted = calls[operation]
    jitted = jax.jit(function)
    return lambda: jax.block_until_ready(jitted(*wanted))


def _onnx(cell: Cell, given: Inputs, operation: Operation) -> Call:
    """The torch.nn module, exported in evaluation mode, on as many threads as torch has here.

    Its threads may wait busily within a run, but not after it, when others have their turn.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cell.onnx"
        _export(layer(nn, given, cell).eval(), given.arguments, path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for one, t in zip(session.get_inputs(), given.arguments, strict=True):
        binding.bind_cpu_input(one.name, t.detach().numpy())
    binding.bind_output(session.get_outputs()[0].name)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return binding

    return run


def _export(built: nn.Module, arguments: tuple[Tensor, ...], path: Path) -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():  # of the exporter about its own use of torch
            warnings.simplefilter("ignore")
            torch.onnx.export(built, tuple(t.detach() for t in arguments), str(path), dynamo=True, verbose=False)
    finally:
        logger.setLevel(level)
