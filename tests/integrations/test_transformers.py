"""RecalibrateCallback in real trainings by Hugging Face's Trainer."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from points import Points, assert_right, network, points
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from batchnorm.integrations.transformers import RecalibrateCallback

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Model(PreTrainedModel):
    """The network as a model of transformers, which notes what training and evaluations saw."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.net = network()
        self.post_init()
        self.seen: list[Tensor] = []
        self.noted: list[list[Tensor]] = []
        self.evaluated: list[list[Tensor]] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        statistics = [b.clone() for b in self.net[1].buffers()]
        if not self.training:
            self.evaluated.append(statistics)
        elif torch.is_grad_enabled():  # not while it is recalibrated
            self.seen.append(x.clone())
            self.noted.append(statistics)
        y = self.net(x)
        return {"loss": F.cross_entropy(y, labels), "logits": y}


def train(path: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **options: Any) -> Any:
    model = Model(PretrainedConfig()) if model is None else model
    arguments = TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        num_train_epochs=2,
        per_device_train_batch_size=20,
        per_device_eval_batch_size=96,
        learning_rate=0.05,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        seed=5,
        **{"save_strategy": "no", "eval_strategy": "no", "dataloader_pin_memory": False, **options},
    )
    trainer = Trainer(model, arguments, train_dataset=Points(), eval_dataset=Points(), callbacks=list(callbacks))
    trainer.train()
    return model, trainer


def same(a: nn.Module, b: nn.Module, but: tuple[str, ...] = ("?",)) -> bool:
    states = a.state_dict(), b.state_dict()
    return all(torch.equal(v, states[1][k]) for k, v in states[0].items() if not k.endswith(but))


def equal(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> list[bool]:
    return [all(map(torch.equal, a, b)) for a, b in zip(ours, theirs, strict=True)]


def test_at_the_end_the_statistics_are_those_of_the_data(tmp_path: Path) -> None:
    without, _ = train(tmp_path)
    callback = RecalibrateCallback()
    model, trainer = train(tmp_path, callback)
    assert same(model, without, STATISTICS)
    assert_right(model.net)
    with pytest.raises(AssertionError):
        assert_right(without.net)
    assert callback.report is not None
    assert (list(callback.report.layers), callback.report.samples) == (["net.1"], 96)
    trainer.save_model(str(tmp_path / "end"))
    saved = safetensors.torch.load_file(tmp_path / "end" / "model.safetensors")
    assert torch.equal(saved["net.1.running_var"], model.net[1].running_var)


@pytest.mark.parametrize("when", [{"eval_strategy": "epoch"}, {"eval_strategy": "steps", "eval_steps": 3}])
@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2}])
def test_an_evaluation_gets_its_own_statistics_and_training_goes_on_bit_by_bit(
    when: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    without, _ = train(tmp_path, **when, **more)
    model, trainer = train(tmp_path, RecalibrateCallback("evaluation"), **when, **more)
    assert all(map(torch.equal, model.seen, without.seen))
    assert same(model, without, STATISTICS)
    assert all(equal(model.noted, without.noted))
    assert len(model.evaluated) >= 1
    assert not any(equal(model.evaluated, without.evaluated))
    if when["eval_strategy"] == "epoch":
        assert_right(model.net)  # what was last evaluated stays
        losses = [
            [entry["eval_loss"] for entry in t.state.log_history if "eval_loss" in entry]
            for t in (trainer, train(tmp_path, **when, **more)[1])
        ]
        assert all(a < b for a, b in zip(*losses, strict=True))


def test_statistics_may_be_kept(tmp_path: Path) -> None:
    without, _ = train(tmp_path)
    model, _ = train(tmp_path, RecalibrateCallback("evaluation", keep=True), eval_strategy="epoch")
    assert equal(model.noted, without.noted) == [True] * 5 + [False] * 5


def test_a_checkpoint_has_the_statistics_that_were_evaluated_and_so_has_the_best_model(tmp_path: Path) -> None:
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    model, trainer = train(tmp_path, RecalibrateCallback("evaluation"), **options)
    best = trainer.state.best_model_checkpoint
    saved = safetensors.torch.load_file(Path(best) / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert_right(model.net)


def test_persistent_workers_serve_training_alone(tmp_path: Path) -> None:
    options = {
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    without, _ = train(tmp_path, **options)
    model, _ = train(tmp_path, RecalibrateCallback(("evaluation", "train_end")), **options)
    assert all(map(torch.equal, model.seen, without.seen))
    assert_right(model.net)


def test_other_data_and_another_forward(tmp_path: Path) -> None:
    callback = RecalibrateCallback(
        data=[points()[0][:50]], forward=lambda model, batch: model.net(batch), layers="net", batches=1
    )
    model, _ = train(tmp_path, callback)
    assert callback.report is not None
    assert callback.report.samples == 50
    with torch.no_grad():
        torch.testing.assert_close(model.net[1].running_var, model.net[0](points()[0][:50]).var(0))


def test_wrong_arguments_and_models_are_told_before_it_is_too_late(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at is 'fit_end': it should be 'train_end' or 'evaluation'"):
        RecalibrateCallback("fit_end")
    model = Model(PretrainedConfig())
    model.net[1] = nn.Identity()
    model.forward = lambda x, labels: {"loss": F.cross_entropy(model.net(x), labels)}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="nothing to recalibrate"):
        train(tmp_path, RecalibrateCallback(), model=model)
