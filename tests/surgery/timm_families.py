"""What is converted, fused and folded of timm's models, as a table: ``python -m tests.surgery.timm_families``.

Models have random weights and statistics, and small inputs. ``--all`` takes the longer list; names take those models.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # as pytest does

from networks import randomized  # noqa: E402

import batchnorm  # noqa: E402
from with_timm import timm  # noqa: E402

# One small model of each family.
MODELS = (
    "efficientnet_b0", "mobilenetv3_small_050", "regnetx_002", "densenet121", "repvgg_a0", "mobileone_s0",
    "hrnet_w18_small", "ghostnet_050", "res2net50_14w_8s", "skresnet18", "rexnet_100", "tf_efficientnet_b0",
    "tf_mobilenetv3_small_minimal_100", "resnet18d",
)  # fmt: skip
MORE = (
    "mobilenetv3_large_100", "mobilenetv2_035", "mobilenetv4_conv_small", "regnety_002", "ghostnetv2_100", "mixnet_s",
    "tf_mixnet_s", "tf_efficientnetv2_b0", "resnet18", "resnest14d", "legacy_seresnet18", "ecaresnet26t",
    "cspdarknet53",
    "cs3darknet_s", "dla34", "vovnet39a", "ese_vovnet19b_dw", "selecsls42", "xception41", "inception_v3",
    "dpn68", "gernet_s", "lcnet_050", "mnasnet_050", "fbnetc_100", "hardcorenas_a", "repghostnet_050", "fastvit_t8",
    "efficientformer_l1", "levit_128s", "hgnet_tiny", "starnet_s1", "repvit_m0_9", "efficientvit_b0", "tresnet_m",
    "bat_resnext26ts", "inception_v4", "nasnetalarge", "vgg11_bn",
)  # fmt: skip
SIDES = {
    "levit_128s": 224, "efficientformer_l1": 224, "bat_resnext26ts": 256, "inception_v3": 96, "inception_v4": 96,
    "nasnetalarge": 96,
}  # fmt: skip
_ACTIVATIONS = (
    F.relu, torch.relu, torch.relu_, F.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.leaky_relu, F.silu,
    F.hardswish, F.gelu, F.elu,
)  # fmt: skip


class Outcome(NamedTuple):
    """How many of a model's batch normalization layers were served."""

    layers: int
    converted: int
    fusable: int
    fused: int
    folded: int
    fuse_seconds: float
    fold_seconds: float
    forward_seconds: float
    fuse: Any
    fold: Any


def model_and_input(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = randomized(timm.create_model(name, pretrained=False, num_classes=5))
    for part in model.modules():
        if hasattr(part, "drop_rate"):
            part.drop_rate = 0.0
    side = SIDES.get(name, 64)
    return model, torch.randn(2, 3, side, side)


class _Readers(TorchFunctionMode):
    """Notes which functions read the outputs of batch normalization layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.of: dict[nn.Module, list[Any]] = {}
        self._outputs: dict[int, tuple[Tensor, nn.Module]] = {}
        for layer in layers_of(model):
            layer.register_forward_hook(self._left)

    def _left(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        self._outputs[id(output)] = output, layer
        self.of.setdefault(layer, [])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":
            for tensor in args:
                if id(tensor) in self._outputs:
                    self.of[self._outputs[id(tensor)][1]].append(func)
        result = func(*args, **(kwargs or {}))
        if args and result is args[0]:  # in place: what reads it now reads something else
            self._outputs.pop(id(result), None)
        return result


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def with_activation(model: nn.Module, x: Tensor) -> set[str]:
    """Which layers have an activation in their class, or behind them as all that reads them."""
    twin = copy.deepcopy(model).eval()
    readers = _Readers(twin)
    with torch.no_grad(), readers:
        twin(x)
    own = {m for m in layers_of(twin) if not isinstance(getattr(m, "act", nn.Identity()), nn.Identity)}
    own |= {m for m, found in readers.of.items() if len(found) == 1 and found[0] in _ACTIVATIONS}
    return {name for name, m in twin.named_modules() if m in own}


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - start)


def measured(name: str) -> Outcome:
    model, x = model_and_input(name)
    seconds: list[float] = []
    with torch.no_grad():
        model.eval()(x)
        with _timed(seconds):
            model(x)
    with _timed(seconds):
        fused = batchnorm.fuse(model, x)
    with _timed(seconds):
        folded = batchnorm.fold(model, x)
    forward, fuse, fold = seconds
    fusable = with_activation(model, x)
    converted = batchnorm.convert(copy.deepcopy(model))
    return Outcome(
        len(layers_of(model)), len(converted.converted), len(fusable), len(fusable & fused.fused.keys()),
        len(folded.folded),
fuse, fold, forward, fused, folded,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--reasons", action="store_true", help="say why layers were left")
    given = parser.parse_args()
    print(
        "| model | layers | converted | fused, of those with an activation | folded | fuse, s | fold, s | forward, s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in given.names or (MODELS + MORE if given.all else MODELS):
        try:
            o = measured(name)
        except Exception as error:
            print(f"| {name} | {type(error).__name__}: {str(error)[:200]} |", flush=True)
            continue
        print(
            f"| {name} | {o.layers} | {o.converted} | {o.fused} of {o.fusable} | {o.folded} | {o.fuse_seconds:.1f} | "
            f"{o.fold_seconds:.1f} | {o.forward_seconds:.2f} |", flush=True,
        )  # fmt: skip
        if given.reasons:
            for result in (o.fuse, o.fold):
                for layer, why in result.skipped.items():
                    print(f"    {type(result).__name__} {layer}: {why}")


if __name__ == "__main__":
    main()
