"""Layers of other frameworks do the same here: in evaluation, and in the step of training after."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm

# In a process of its own: Keras chooses its backend, and sets torch's device, when it is imported.
KERAS = """
import sys
import numpy as np
import torch
import keras

rng = np.random.default_rng(0)
found = {}
for number, options in enumerate(eval(sys.argv[2])):
    layer = keras.layers.BatchNormalization(**options)
    layer.build((None, 3, 3, 4))
    for v in layer.trainable_variables:
        v.assign(rng.uniform(0.5, 1.5, 4))
    batches = rng.normal(2, 3, (5, 8, 3, 3, 4)).astype("float32")
    for batch in batches[:-1]:
        layer(batch, training=True)
    for v in layer.weights:
        found[f"{number}/{v.name}"] = keras.ops.convert_to_numpy(v)
    found[f"{number}:decay"], found[f"{number}:eps"] = layer.momentum, layer.epsilon
    found[f"{number}:x"] = batches[-1]
    found[f"{number}:y"] = keras.ops.convert_to_numpy(layer(batches[-1], training=False))
    layer(batches[-1], training=True)
    found[f"{number}:mean"] = keras.ops.convert_to_numpy(layer.moving_mean)
    found[f"{number}:var"] = keras.ops.convert_to_numpy(layer.moving_variance)
np.savez(sys.argv[1], **found)
"""
OPTIONS: list[dict[str, Any]] = [
    {}, {"momentum": 0.8, "epsilon": 0.1}, {"scale": False}, {"center": False}, {"scale": False, "center": False},
]  # fmt: skip


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What real Keras layers hold and do."""
    if find_spec("keras") is None:  # not imported: it would look for its backend
        pytest.skip("Keras, which the group test installs, is not there")
    folder = tmp_path_factory.mktemp("keras")
    made = folder / "keras.npz"
    environment = {**os.environ, "KERAS_BACKEND": "torch", "KERAS_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", KERAS, str(made), repr(OPTIONS)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    with np.load(made) as found:
        return dict(found)


def layer_of(keras: dict[str, np.ndarray], number: int, kind: type[nn.Module], count: int | None = None) -> Any:
    arrays = {name.partition("/")[2]: array for name, array in keras.items() if name.startswith(f"{number}/")}
    decay, eps = (float(keras[f"{number}:{what}"]) for what in ("decay", "eps"))
    options, state = batchnorm.ported(arrays, decay=decay, eps=eps, count=count)
    layer = kind(**options)
    layer.load_state_dict(state)
    return layer


def images(array: np.ndarray) -> Tensor:
    return torch.tensor(array).movedim(-1, 1)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_keras_in_evaluation(keras: dict[str, np.ndarray], number: int, kind: type[nn.Module]) -> None:
    layer = layer_of(keras, number, kind).eval()
    torch.testing.assert_close(layer(images(keras[f"{number}:x"])), images(keras[f"{number}:y"]), rtol=1e-6, atol=1e-6)
    assert layer.eps == OPTIONS[number].get("epsilon", 1e-3)
    assert layer.momentum == pytest.approx(1 - OPTIONS[number].get("momentum", 0.99), abs=1e-15)
    assert layer.affine == any(OPTIONS[number].get(name, True) for name in ("scale", "center"))
    missing = [
        t for name, t in (("scale", layer.weight), ("center", layer.bias)) if not OPTIONS[number].get(name, True)
    ]
    assert all(t is None or (t == t[0]).all() for t in missing)


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_keras_after_one_more_step_of_training(keras: dict[str, np.ndarray], number: int) -> None:
    x = images(keras[f"{number}:x"])
    n = x.numel() // x.shape[1]
    mean, var = (torch.tensor(keras[f"{number}:{what}"]) for what in ("mean", "var"))
    layer = layer_of(keras, number, nn.BatchNorm2d, count=n)
    layer(x)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, var * n / (n - 1), rtol=1e-5, atol=1e-5)
    layer = layer_of(keras, number, nn.BatchNorm2d)  # without the count, the step alone is unbiased
    layer(x)
    drift = layer.momentum * x.var((0, 2, 3), correction=0) / (n - 1)
    torch.testing.assert_close(layer.running_var - var, drift, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("before", ["batch_normalization/", "bn_conv1/", "model/block_1/bn/", ""])
@pytest.mark.parametrize("nested", [False, True])
def test_names_of_tf_keras_and_groups_of_a_file(before: str, nested: bool) -> None:
    values = {"gamma:0": 1.0, "beta:0": 2.0, "moving_mean:0": 3.0, "moving_variance:0": 4.0}
    arrays: dict[str, Any] = {before + name: np.full(3, value) for name, value in values.items()}
    if nested:
        arrays = {"bn": {"group": arrays}}
    state = batchnorm.ported(arrays, decay=0.99, eps=1e-3).state
    found = [float(state[name][0]) for name in ("weight", "bias", "running_mean", "running_var")]
    assert found == [1.0, 2.0, 3.0, 4.0]


def test_arrays_of_two_layers_are_told_apart() -> None:
    arrays = {f"bn{number}/moving_mean:0": np.zeros(3) for number in (1, 2)}
    with pytest.raises(ValueError, match="'bn2/moving_mean:0' is one more running_mean: of each there is one"):
        batchnorm.ported(arrays, decay=0.99, eps=1e-3)


@pytest.mark.parametrize(
    "names",
    [
        ("weight", "bias", "running_mean", "running_var"), ("gamma", "beta", "moving_mean", "moving_variance"),
        ("scale", "bias", "mean", "var"), ("scale", "offset", "mean", "var"), ("weight", "bias", "_mean", "_variance"),
    ],
    ids=["torch", "keras", "flax", "haiku", "paddle"],
)  # fmt: skip
def test_names_and_shapes(names: tuple[str, ...]) -> None:
    values = np.arange(1.0, 13.0).reshape(4, 1, 1, 3)
    options, state = batchnorm.ported(dict(zip(names, values, strict=True)), decay=0.9, eps=1e-5)
    assert options == {"num_features": 3, "eps": 1e-5, "momentum": 0.1, "affine": True}
    assert [state[name].tolist() for name in ("weight", "bias", "running_mean", "running_var")] == [
        [1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]
    ]  # fmt: skip
    assert state["running_var"].dtype == torch.float64
    assert list(nn.BatchNorm1d(**options).state_dict()) == [
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]
    assert set(state) == set(nn.BatchNorm1d(**options).state_dict())


@pytest.mark.parametrize(
    "array", [np.ones(3, np.float16), torch.ones(3, dtype=torch.bfloat16, requires_grad=True), [1] * 3]
)
def test_arrays_of_all_kinds_are_copied(array: Any) -> None:
    _, state = batchnorm.ported({"mean": array, "var": array}, decay=0.9, eps=1e-5)
    state["running_var"] += 1
    assert state["running_mean"].tolist() == [1, 1, 1]
    assert state["running_mean"].dtype == torch.float32


def test_the_caller_s_arrays_stay() -> None:
    var = np.ones(3)
    _, state = batchnorm.ported({"mean": np.zeros(3), "var": var}, decay=0.9, eps=1e-5, count=2)
    assert state["running_var"].tolist() == [2, 2, 2]
    assert var.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("arrays", "options", "said"),
    [
        ({"mean": [0]}, {}, "there is no running_var or moving_variance or var or _variance among mean"),
        ({}, {}, "there is no running_mean .* among no arrays"),
        ({"renorm_mean": [0]}, {}, "unknown array 'renorm_mean': the names are weight or gamma or scale; bias"),
        ({"gamma": [1], "scale": [1]}, {}, "'scale' is one more weight"),
        ({"mean": [0, 0], "var": [1, 1], "gamma": [1]}, {}, "one value a channel, got .*'weight': 1"),
        ({"mean": [0], "var": [-1]}, {}, "a running variance is negative, -1"),
        ({}, {"decay": 1.5}, "decay must be between 0 and 1"),
        ({}, {"eps": 0}, "eps must be above 0"),
        ({}, {"count": 1}, "count, the values a channel in a batch, must be above 1, got 1"),
    ],
)
def test_errors(arrays: dict[str, Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        batchnorm.ported(arrays, **{"decay": 0.9, "eps": 1e-5, **options})
