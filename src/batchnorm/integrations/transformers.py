"""Recalibration in the training of Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from batchnorm.integrations.training import Batches, Recalibration
from batchnorm.surgery.inspect.batches import Forward
from batchnorm.surgery.recalibrate import Recalibrated

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{__name__} needs transformers: pip install transformers") from error

__all__ = ["RecalibrateCallback"]


class RecalibrateCallback(TrainerCallback):
    """Recalibrate batch normalization at the end of a training, before evaluations within it, or both.

    At the end the model gets the statistics of its final weights, or of the best ones with `load_best_model_at_end`;
    ``trainer.save_model()`` afterwards saves them, while the checkpoints of single steps are saved before. Before an
    evaluation the model gets them for the evaluation and for a checkpoint that is saved with it, and training then goes
    on with its own. The random generators, and the order of the training's batches, are those without the callback.

    The batches are the training's; of all processes, each its own. An evaluation that a callback behind this one asks
    for, and one that is called by hand, is without recalibration.

    Args:
        at: "train_end", "evaluation", or both.
        data: other batches.
        forward: ``forward(model, batch)``; the default calls the model with those parts of the batch that it takes.
        keep: let training go on with the statistics of the last evaluation.
        options: others of :func:`batchnorm.recalibrate`: `batches`, `tolerance`, `method`, `layers`.

    Raises:
        ValueError: after the first training step, if there is nothing to recalibrate, or the loader cannot be copied.

    Example:
        >>> Trainer(model, arguments, train_dataset=images, callbacks=[RecalibrateCallback(batches=100)])
    """

    def __init__(
        self,
        at: str | Collection[str] = "train_end",
        *,
        data: Iterable[Any] | None = None,
        forward: Forward | None = None,
        keep: bool = False,
        **options: Any,
    ) -> None:
        self._recalibration = Recalibration(at, ("train_end", "evaluation"), data, forward, keep, options)
        self._looked = False

    @property
    def report(self) -> Recalibrated | None:
        """What the last recalibration did."""
        return self._recalibration.report

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin an epoch."""
        self._looked = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look, once an epoch, which layers train; recalibrate what is about to be evaluated."""
        if not self._looked:
            self._recalibration.look(kwargs["model"], kwargs["train_dataloader"])
            self._looked = True
        if control.should_evaluate and self._recalibration.at("evaluation"):
            self._recalibration.lend(kwargs["model"], _batches(kwargs["train_dataloader"]))

    on_epoch_end = on_step_end

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let training go on with its own statistics, after a checkpoint has been saved with those evaluated."""
        self._recalibration.put_back()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Recalibrate for good."""
        if self._recalibration.at("train_end"):
            self._recalibration.run(kwargs["model"], _batches(kwargs["train_dataloader"]))


def _batches(loader: Iterable[Any] | None) -> Batches | None:
    return None if loader is None else Batches(loader)
