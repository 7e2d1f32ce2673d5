"""Recalibration in Lightning's training."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from batchnorm.integrations.training import Batches, Recalibration
from batchnorm.surgery.inspect.batches import Forward, call
from batchnorm.surgery.recalibrate import Recalibrated

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import Checkpoint
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{__name__} needs lightning: pip install lightning") from error

__all__ = ["RecalibrateCallback"]


class RecalibrateCallback(Callback):
    """Recalibrate batch normalization at the end of a fit, before validations within it, or both.

    At the end of the fit the model gets the statistics of its final weights. With Lightning's `WeightAveraging`,
    `EMAWeightAveraging` or `StochasticWeightAveraging` these are the averaged weights, and wherever this callback
    stands in the list, it runs after theirs. Before a validation it does the same to the weights that are validated,
    averaged or not; a checkpoint of this validation has these statistics, and training then goes on with its own. The
    random generators, and the order of the training's batches, are those without the callback.

    The batches are the training's, as many as the trainer uses of them, brought to the device and into the precision
    as the trainer does. All processes' batches count.

    Args:
        at: "fit_end", "validation", or both.
        data: other batches.
        forward: ``forward(module, batch)``; the default calls the module itself, as :func:`batchnorm.recalibrate` does.
        keep: let training go on with the statistics of the last validation.
        options: others of :func:`batchnorm.recalibrate`: `batches`, `tolerance`, `method`, `layers`.

    Raises:
        ValueError: after the first training step, if there is nothing to recalibrate, or the loader cannot be copied.

    Example:
        >>> Trainer(callbacks=[EMAWeightAveraging(), RecalibrateCallback(batches=100)])
    """

    def __init__(
        self,
        at: str | Collection[str] = "fit_end",
        *,
        data: Iterable[Any] | None = None,
        forward: Forward | None = None,
        keep: bool = False,
        **options: Any,
    ) -> None:
        self._recalibration = Recalibration(at, ("fit_end", "validation"), data, forward, keep, options)
        self._done = False

    @property
    def report(self) -> Recalibrated | None:
        """What the last recalibration did."""
        return self._recalibration.report

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind the callbacks that average weights, and before those that save checkpoints."""
        callbacks: list[Callback] = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        place = next((i for i, c in enumerate(callbacks) if isinstance(c, Checkpoint)), len(callbacks))
        trainer.callbacks = [*callbacks[:place], self, *callbacks[place:]]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._done = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, once an epoch, which layers train."""
        if batch_idx == 0:
            self._recalibration.look(pl_module, trainer.train_dataloader)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate what is validated."""
        if self._recalibration.at("validation") and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._recalibration.lend(pl_module, *_used(trainer, pl_module))

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Let training go on with its own statistics, after checkpoints have been saved with those validated."""
        self._recalibration.put_back()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate for good."""
        if self._recalibration.at("fit_end"):
            self._recalibration.run(pl_module, *_used(trainer, pl_module))
        self._done = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the statistics of training back."""
        self._recalibration.put_back()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """After the fit, save these statistics with averaged weights, too.

        WeightAveraging saves its own copy of the average, to which the module was set at the end, without them.
        """
        if self._done and "current_model_state" in checkpoint:
            checkpoint["state_dict"] = dict(checkpoint["current_model_state"])


def _used(trainer: Trainer, module: LightningModule) -> tuple[Batches | None, Forward]:
    """The batches that the trainer trains with, and how it calls the module with one."""

    def prepare(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module.on_before_batch_transfer(batch, 0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def forward(model: nn.Module, batch: Any) -> Any:
        with trainer.precision_plugin.forward_context():
            return call(model, batch)

    loader, limit = trainer.train_dataloader, trainer.num_training_batches
    batches = None if loader is None else Batches(loader, None if math.isinf(limit) else int(limit), prepare)
    return batches, forward
