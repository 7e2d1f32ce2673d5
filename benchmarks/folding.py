"""What folding is worth: evaluation of networks folded in several ways.

All contenders of a row start from one network with drawn weights and statistics. None is timed before its results agree
with that network in float64 about as well as the network itself does in float32.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config  # which `torch` alone does not load
from torch import Tensor, nn
from torch.fx.experimental import optimization

from batchnorm.benchmark.figures import by_first
from batchnorm.benchmark.networks import ALLOWED, ROUNDING
from batchnorm.benchmark.timing import Call, Ratio
from batchnorm.surgery.folding.fold import fold
from benchmarks.models import MODELS

UNFOLDED, FOLDED, FX = "unfolded", "batchnorm.fold", "torch.fx's fuse"
FREEZING, FOLDED_FREEZING = "inductor's freezing", "folded, inductor's freezing"


@dataclass(frozen=True)
class Job:
    """One network on one input.

    Attributes:
        network: a name in `NETWORKS`.
        shape: (N, 3, H, W).
        compiled: whether torch.compile takes part, which takes minutes to build.
    """

    network: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    compiled: bool = True


@dataclass(frozen=True)
class Row:
    """What a job came to.

    Attributes:
        seconds: the median over rounds for each contender.
        gains: for each contender, the first one's time by its own, paired by rounds.
        errors: relative errors against float64, root of the mean square.
        skipped: why a contender has no figures.
    """

    job: Job
    seconds: dict[str, float]
    gains: dict[str, Ratio]
    errors: dict[str, float]
    skipped: dict[str, str]
    rounds: int = 0


class Apart(nn.Module):
    """torch.nn's layer, an addition and an activation, as networks have them that know nothing of fusing."""

    def __init__(self, channels: int, activation: str | None) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        kinds: dict[str | None, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}
        self.act = kinds[activation](inplace=True) if activation is not None else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Give ``activation(batch_norm(x) + residual)``."""
        z = self.bn(x)
        found: Tensor = self.act(z if residual is None else z + residual)
        return found


class _Logits(nn.Module):
    """A classifier of transformers, that gives a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (N, 3, H, W)."""
        found: Tensor = self.model(x).logits
        return found


def _transformer(kind: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(num_labels=100, **options)
    return _Logits(getattr(transformers, f"{kind}ForImageClassification")(config))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: MODELS["ResNet-18"](Apart),
    "MobileNetV2": lambda: MODELS["MobileNetV2"](Apart),
    "ResNet-18 of transformers": lambda: _transformer(
        "ResNet", embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
    ),
    "MobileNetV2 of transformers": lambda: _transformer("MobileNetV2"),
    "RegNetY-400MF of transformers": lambda: _transformer(
        "RegNet", embedding_size=32, hidden_sizes=[48, 104, 208, 440], depths=[1, 3, 6, 6], groups_width=8
    ),
}


def jobs(quick: bool) -> list[Job]:
    """What is measured: small and larger images, one and eight of them."""
    if quick:
        small = (2, 3, 32, 32)
        return [Job(name, small, compiled=False) for name in list(NETWORKS)[:2]]
    own, theirs = list(NETWORKS)[:2], list(NETWORKS)[2:]
    layouts, shapes = ("contiguous", "channels_last"), ((1, 3, 224, 224), (8, 3, 64, 64))
    found = [Job(name, shape, layout) for name in own for layout in layouts for shape in shapes]
    found += [Job(own[0], (8, 3, 224, 224), layout, compiled=False) for layout in layouts]
    return found + [Job(name, (1, 3, 224, 224)) for name in theirs]


def measure(job: Job, seconds: float) -> Row:
    """Build a job's contenders, check them and time them; what cannot be built or is wrong is skipped.

    Args:
        job: which.
        seconds: for how long they take turns.
    """
    if job.network.endswith("of transformers") and importlib.util.find_spec("transformers") is None:
        return Row(job, {}, {}, {}, {UNFOLDED: "not installed: transformers"})
    torch.compiler.reset()  # it compiles anew for a limited number of shapes, then never again
    network, x = network_of(job)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    skipped: dict[str, str] = {}
    right = _result(copy.deepcopy(network).double(), x.double())
    for name, build in _contenders(job).items():
        try:
            built = build(copy.deepcopy(network), x)
            errors[name] = float((_result(built, x) - right).norm() / right.norm())
        except Exception as error:  # what cannot be traced or compiled here; the others go on
            skipped[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        limit = max(ALLOWED * next(iter(errors.values())), ROUNDING)
        if not errors[name] <= limit:  # nan fails, too
            skipped[name] = f"it is off by {errors[name]:.2g} of its size (allowed: {limit:.2g})"
            continue
        calls[name] = lambda network=built: network(x)  # type: ignore[misc]
    if UNFOLDED not in calls:
        return Row(job, {}, {}, errors, skipped)
    with torch.no_grad():
        figures = by_first(calls, seconds)
    return Row(job, figures.seconds, figures.ratios, errors, skipped, figures.rounds)


def network_of(job: Job) -> tuple[nn.Module, Tensor]:
    """Build a job's network and its input, the same ones every time; weights and statistics are drawn."""
    layout = torch.channels_last if job.layout == "channels_last" else torch.contiguous_format
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[job.network]().eval()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 2)
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0, 0.1)
        x = torch.randn(job.shape)
    return network.to(memory_format=layout), x.contiguous(memory_format=layout)  # type: ignore[call-overload]


Build = Callable[[nn.Module, Tensor], Any]


def _contenders(job: Job) -> dict[str, Build]:
    """How each is made of a copy of the network; what the others are compared with comes first."""
    found: dict[str, Build] = {
        UNFOLDED: lambda network, x: network,
        FOLDED: lambda network, x: fold(network, x).model,
        FX: lambda network, x: optimization.fuse(network),
    }
    if job.compiled:
        found[FREEZING] = _compiled
        found[FOLDED_FREEZING] = lambda network, x: _compiled(fold(network, x).model, x)
    return found


def _compiled(network: nn.Module, x: Tensor) -> Any:
    """Compile with constant weights, which lets inductor fold by itself."""
    made: Any = torch.compile(network, dynamic=False)
    # Its pool of compiling processes would stay and disturb.
    with torch._inductor.config.patch(freezing=True, compile_threads=1), torch.no_grad():
        made(x)
    return made


def _result(network: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(network(x)).double()
