"""docs/training-loops.md runs as it stands, from top to bottom."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm

PAGE = Path(__file__).parents[2] / "docs" / "training-loops.md"


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    plain, evaluation, lightning, transformers = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)

    run(plain, names)
    x = names["data"].tensors[0]
    assert_population(names["model"], x)
    assert_population(names["averaged"].module, x)
    assert names["report"].samples == len(x)

    before = {name: value.clone() for name, value in names["model"].state_dict().items()}
    run(evaluation, names)
    assert all(torch.equal(value, before[name]) for name, value in names["model"].state_dict().items())
    saved = torch.load("checkpoint.pt", weights_only=True)
    assert not torch.equal(saved["1.running_var"], before["1.running_var"])

    run(lightning, names)
    assert_population(names["trainer"].lightning_module.net, x)

    run(transformers, names)
    model = names["trainer"].model
    saved = type(model).from_pretrained("out/final").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    again = batchnorm.recalibrate(model, names["trainer"].get_train_dataloader())
    assert again.layers["resnet.embedder.embedder.normalization"].mean_change.max < 1e-5


def run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, str(PAGE), "exec"), names)


def assert_population(net: nn.Sequential, x: torch.Tensor) -> None:
    with torch.no_grad():
        y = net[0](x)
    torch.testing.assert_close(net[1].running_mean, y.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net[1].running_var, y.var(0), rtol=1e-4, atol=1e-5)
