"""The record of a run, from the trainer's state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..heads.files import SUMS_FILE
from ..metrics import RunResults
from .bad_images import recorded
from .provenance import dataset_name, described, hyperparameters, model_name, versions


if TYPE_CHECKING:
    from .trainer import ContinualTrainer


def record_of(trainer: ContinualTrainer) -> RunResults:
    """What the run was and what it has measured so far."""
    trainable, total = trainer.model.get_nb_trainable_parameters()
    tuner, scenario, strategy = trainer.tuner, trainer.scenario, trainer.strategy
    adapter = tuner.active_adapters[0]
    config = tuner.peft_config[adapter]
    folder = adapter_folder(Path(trainer.args.output_dir), adapter)
    weights, sums = folder / SAFETENSORS_WEIGHTS_NAME, folder / SUMS_FILE
    settings = hyperparameters(trainer.args, trainer.model, config, trainer.augmentation)
    for name, function in (("batch_augmentation", trainer.batch_augmentation), ("loss", tuner.head.own_loss)):
        if function is not None:
            settings[name] = described(function)
    if trainer.passed_over:
        settings["passed_over"] = recorded(trainer.passed_over)
    if strategy.settings():
        settings["strategy"] = strategy.settings()
    if trainer.tasks_before:
        settings["tasks_learnt_before"] = trainer.tasks_before
    if trainer.args.measure_ahead:
        settings["measure_ahead"] = True
    return RunResults(
        method=strategy.title(config.title),
        peft_type=config.peft_type.value,
        base_model=model_name(trainer.model),
        dataset=dataset_name(scenario),
        scenario={**scenario.describe(), "content": scenario.content},
        seed=trainer.args.seed,
        task_names=[task.name for task in scenario],
        accuracy_matrix=trainer.accuracy_matrix.tolist(),
        test_sizes=[len(task.test) for task in scenario],
        metrics=trainer.metrics,
        trainable_parameters=max(trainable, trainer.most_trainable) if trainer.finished_tasks else trainable,
        total_parameters=total,
        adapter_bytes=strategy.saved_bytes(trainer, weights.stat().st_size) if weights.is_file() else None,
        sums_bytes=sums.stat().st_size if tuner.head.active.observes and sums.is_file() else None,
        train_seconds=trainer.train_seconds,
        query_seconds=trainer.query_seconds,
        hyperparameters=settings,
        versions=versions(),
        command=None,
        finished_tasks=trainer.finished_tasks,
        prompt_usage=usage_of_finished_tasks(trainer),
        baseline=trainer.baseline,
        **(trainer.details if trainer.finished_tasks else {}),
    )


def adapter_folder(folder: Path, adapter: str) -> Path:
    """Where PEFT saves an adapter in `folder`: those of other names than "default" in folders of their own."""
    return folder if adapter == "default" else folder / adapter


def usage_of_finished_tasks(trainer: ContinualTrainer) -> list[list[float]] | None:
    """How often each row was chosen for each task's test images; None where no rows are chosen."""
    if trainer.prompt_usage is None or not trainer.finished_tasks:
        return None
    return trainer.prompt_usage[: trainer.finished_tasks].tolist()
