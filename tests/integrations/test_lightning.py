"""RecalibrateCallback in real Lightning fits."""

import importlib
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from points import assert_right, network, points
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from batchnorm.integrations.lightning import RecalibrateCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler.*"),
]


class Module(LightningModule):
    """Trains the network, and notes losses and statistics of validations."""

    def __init__(self, net: nn.Sequential | None = None) -> None:
        super().__init__()
        self.net = network() if net is None else net
        self.validated: list[tuple[float, Tensor]] = []
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.seen.append(batch[0].detach().clone())
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        self.validated.append((float(loss), self.net[1].running_var.clone()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(workers: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(4)
    more: dict[str, Any] = {"num_workers": 1, "persistent_workers": True} if workers else {}
    return DataLoader(TensorDataset(*points()), batch_size=20, shuffle=True, generator=generator, **more)


def validation() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*points()), batch_size=96)


def fit(*callbacks: Callback, workers: bool = False, module: Module | None = None, **options: Any) -> Module:
    module = Module() if module is None else module
    torch.manual_seed(1)
    options = {"max_epochs": 2, "check_val_every_n_epoch": 1, **options}
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, loader(workers), validation())
    return module


def same(a: nn.Module, b: nn.Module, but: tuple[str, ...] = ()) -> bool:
    states = a.state_dict(), b.state_dict()
    return all(torch.equal(v, states[1][k]) for k, v in states[0].items() if not k.endswith(but or ("?",)))


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def test_at_the_end_the_statistics_are_those_of_the_data() -> None:
    without, callback = fit(), RecalibrateCallback()
    module = fit(callback)
    assert same(module, without, STATISTICS)  # training did not notice
    assert_right(module.net)
    with pytest.raises(AssertionError):
        assert_right(without.net)
    assert callback.report is not None
    assert list(callback.report.layers) == ["net.1"]
    x, targets = points()
    losses = [F.cross_entropy(m.net.eval()(x), targets).item() for m in (module, without)]
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize(("every", "workers"), [(1.0, False), (0.4, False), (0.4, True)])
def test_a_validation_gets_its_own_statistics_and_training_goes_on_bit_by_bit(every: float, workers: bool) -> None:
    without = fit(val_check_interval=every, workers=workers)
    module = fit(RecalibrateCallback("validation"), val_check_interval=every, workers=workers)
    for ours, theirs in zip(module.seen, without.seen, strict=True):
        assert torch.equal(ours, theirs)
    assert same(module, without, STATISTICS)
    assert len(module.validated) == len(without.validated) > 2
    sane = slice(1, None)  # the sanity check comes before training
    assert all(a[0] < b[0] for a, b in zip(module.validated[sane], without.validated[sane], strict=True))
    if every == 1.0:
        assert_right(module.net)  # what was last validated stays
    else:
        assert same(module, without)  # training has gone on after it
    assert module.validated[0][1].eq(1).all()


def statistics(net: nn.Sequential) -> list[Tensor]:
    return [b.clone() for b in net[1].buffers()]


class Statistics(Callback):
    """Notes what training has, at every batch."""

    def __init__(self) -> None:
        self.noted: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Module)
        self.noted.append(statistics(pl_module.net))


@pytest.mark.parametrize("keep", [False, True])
def test_training_has_its_own_statistics_back_unless_they_are_kept(keep: bool) -> None:
    noted, without = Statistics(), Statistics()
    fit(noted, RecalibrateCallback("validation", keep=keep))
    fit(without)
    first = 5  # batches of the epoch before the first validation
    assert all(map(torch.equal, noted.noted[first - 1], without.noted[first - 1]))
    assert all(map(torch.equal, noted.noted[first], without.noted[first])) is not keep
    assert all(map(torch.equal, noted.noted[-1], without.noted[-1])) is not keep


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "ema without buffers": lambda: EMAWeightAveraging(decay=0.8, use_buffers=False),
    "mean": lambda: WeightAveraging(),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_get_their_own_statistics(average: str, first: bool, tmp_path: Path) -> None:
    def callbacks(ours: bool) -> list[Callback]:
        both: list[Callback] = [AVERAGES[average]()]
        return [RecalibrateCallback(), *both] if ours and first else [*both, RecalibrateCallback()] if ours else both

    without, checkpoint = fit(*callbacks(False)), ModelCheckpoint(tmp_path, save_last=True, monitor="loss")
    module = fit(*callbacks(True), checkpoint)
    assert same(module, without, STATISTICS)
    assert_right(module.net)
    with pytest.raises(AssertionError):  # they lag, or are an average of averages
        assert_right(without.net)
    module.trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("buffers", [True, False])
def test_averaged_weights_are_validated_and_saved_with_their_own_statistics(buffers: bool, tmp_path: Path) -> None:
    def average() -> EMAWeightAveraging:
        return EMAWeightAveraging(decay=0.8, use_buffers=buffers)

    checkpoint = ModelCheckpoint(tmp_path, monitor="loss")
    noted, without = Statistics(), Statistics()
    plain = fit(average(), without)
    module = fit(RecalibrateCallback(("validation", "fit_end")), average(), noted, checkpoint)
    assert all(a[0] < b[0] for a, b in zip(module.validated[1:], plain.validated[1:], strict=True))
    for ours, theirs in zip(noted.noted, without.noted, strict=True):
        assert all(map(torch.equal, ours, theirs))
    best = Module()
    best.load_state_dict(torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"])
    assert_right(best.net)  # and so has the score under which it was saved
    loss = F.cross_entropy(best.net.eval()(points()[0]), points()[1])
    torch.testing.assert_close(loss, checkpoint.best_model_score)


def test_layers_held_in_evaluation_are_left_alone_at_validations_too() -> None:
    class Held(Module):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(*network(), nn.BatchNorm1d(3)))

        def on_train_epoch_start(self) -> None:
            self.net[5].eval()

    module = fit(RecalibrateCallback(("validation", "fit_end")), module=Held())
    assert_right(module.net)
    assert module.net[5].running_var.eq(1).all()


def test_other_data_and_another_forward() -> None:
    class OnlySteps(Module):
        def forward(self, x: Tensor) -> Any:
            raise AssertionError("nobody should call this")

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            pass

    x, targets = points()
    half = [(x[:40], targets[:40]), (x[40:48], targets[40:48])]
    callback = RecalibrateCallback(data=half, forward=lambda module, batch: module.net(batch[0]))
    module = fit(callback, module=OnlySteps())
    assert callback.report is not None
    assert callback.report.samples == 48
    with torch.no_grad():
        y = module.net[0](x[:48])
    torch.testing.assert_close(module.net[1].running_var, y.var(0))


def test_as_many_batches_as_the_trainer_uses_in_its_precision() -> None:
    callback = RecalibrateCallback()
    module = fit(callback, limit_train_batches=3, precision="64-true")
    assert callback.report is not None
    assert callback.report.batches == 3
    assert module.net[1].running_var.dtype == torch.float64


def test_wrong_arguments_and_models_are_told_before_it_is_too_late() -> None:
    with pytest.raises(ValueError, match="at is 'end': it should be 'fit_end' or 'validation'"):
        RecalibrateCallback("end")
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch'"):
        RecalibrateCallback(batch=3)
    module = Module(nn.Sequential(nn.Linear(2, 3), nn.Identity()))
    with pytest.raises(ValueError, match="nothing to recalibrate"):
        fit(RecalibrateCallback(), module=module, num_sanity_val_steps=0)
    assert len(module.seen) == 1


def test_an_error_in_a_validation_gives_training_its_statistics_back() -> None:
    class Fails(Module):
        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            assert_right(self.net)
            raise RuntimeError("no validation today")

    without = fit(max_epochs=1)
    module = Fails()
    with pytest.raises(RuntimeError, match="no validation today"):
        fit(RecalibrateCallback("validation"), module=module, num_sanity_val_steps=0, max_epochs=1)
    assert same(module, without)


class Locked(RandomSampler):
    """Cannot be copied."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("loaders", "words"),
    [
        (lambda data: DataLoader(data, batch_size=20, sampler=Locked(data)), "loader cannot be copied"),
        (lambda data: {"a": DataLoader(data), "b": DataLoader(data)}, "several loaders at once"),
    ],
)
def test_loaders_that_cannot_be_read_beside_the_training_are_told_at_its_start(loaders: Any, words: str) -> None:
    class Parts(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            x, targets = batch["a"] if isinstance(batch, dict) else batch
            return super().training_step((torch.cat([x, x + 1]), torch.cat([targets, targets])), index)

    data, module = TensorDataset(*points()), Parts()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    with pytest.raises(ValueError, match=words + ".*give the callback data="):
        Trainer(accelerator="cpu", enable_checkpointing=False, callbacks=[RecalibrateCallback()], **options).fit(
            module, loaders(data), validation()
        )
    assert len(module.seen) == 1
    callback = RecalibrateCallback(data=DataLoader(data, batch_size=20))
    Trainer(accelerator="cpu", enable_checkpointing=False, callbacks=[callback], **options).fit(
        module, loaders(data), validation()
    )
    assert_right(module.net)


@pytest.mark.parametrize("package", ["lightning", "transformers"])
def test_without_the_package_one_line_says_what_is_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.pytorch", None)
    monkeypatch.delitem(sys.modules, f"batchnorm.integrations.{package}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=f"needs {package}: pip install {package}"):
        importlib.import_module(f"batchnorm.integrations.{package}")
