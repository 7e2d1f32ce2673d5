"""A small task whose batch statistics matter: three classes of 2 numbers, far from zero."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

SIZE = 96


def points(size: int = SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    targets = torch.arange(size) % 3
    centres = torch.tensor([[5.0, 0.0], [9.0, 1.0], [7.0, -8.0]])
    return centres[targets] + torch.randn(size, 2, generator=generator), targets


class Points(Dataset[dict[str, Tensor]]):
    """The points as dicts, as Hugging Face's Trainer wants them."""

    def __init__(self) -> None:
        self.inputs, self.targets = points()

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.inputs[index], "labels": self.targets[index]}


def network() -> nn.Sequential:
    """With a momentum so small that the running statistics stay near their start."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8, momentum=1e-3), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def direct(net: nn.Sequential, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The statistics of the first layer by their definition, over all points at once."""
    with torch.no_grad():
        y = net[0].double()(points()[0].double() if x is None else x.double())
    net[0].float()
    return y.mean(0).float(), y.var(0).float()


def assert_right(net: nn.Sequential) -> None:
    """The network has the population statistics of all points with its own weights."""
    for found, right in zip((net[1].running_mean, net[1].running_var), direct(net), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
