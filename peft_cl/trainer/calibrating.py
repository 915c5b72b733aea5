"""The temperature of a run: fitted after each task on validation images, and taken up with an interrupted run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..reliability.calibration import Calibration
from ..reliability.fitting import fit_calibration
from ..scenarios import Task
from .processes import over_processes


if TYPE_CHECKING:
    from .trainer import ContinualTrainer


def calibration_of(trainer: ContinualTrainer) -> dict[str, Any] | None:
    """Fit the temperature on the validation images of the tasks so far, if the arguments say so.

    Returns:
        What goes on record.
    """
    if not trainer.args.fit_temperature:
        return None
    calibration = fit_calibration(*validation_logits(trainer, trainer.validation[: trainer.task.index + 1]))
    trainer.tuner.head.config.temperature = calibration.temperature
    return calibration.to_dict()


def validation_logits(trainer: ContinualTrainer, tasks: Sequence[Task]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (images, classes) of the `test` images of `tasks`, as they are measured, and labels (images,); the same
    on every process."""
    examples = trainer.examples(tasks, "test")
    trainer.model.eval()

    def of_rows(rows: Sequence[int]) -> torch.Tensor:
        batches = trainer.batches_of(examples, rows=rows)
        shown = trainer.progress.counted(batches, -(-len(rows) // trainer.args.eval_batch_size), "calibration")
        return torch.cat([trainer.prediction_step(trainer.model, batch, False)[1].float().cpu() for batch in shown])

    return over_processes(trainer.accelerator, len(examples), of_rows), examples.tensors["model_label"]


def take_temperature(trainer: ContinualTrainer) -> None:
    """After an interruption, take up the temperature of the last finished task, which beginning the tasks anew has put
    back to 1."""
    calibration = trainer.learnt[-1].get("calibration") if trainer.learnt else None
    if calibration is not None:
        trainer.tuner.head.config.temperature = Calibration.from_dict(calibration).temperature
