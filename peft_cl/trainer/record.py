"""The record of a run, from the trainer's state; that of an adapter goes on from run to run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..heads.files import SUMS_FILE
from ..metrics import RunResults, continual_metrics
from ..tuners.base.merged import parameters_of_others
from .bad_images import recorded
from .choosing import described_choices
from .costs import peak_memory
from .earlier import EarlierTasks
from .provenance import MEASURING, RECORDED, dataset_name, described, hyperparameters, model_name, versions


if TYPE_CHECKING:
    from .trainer import ContinualTrainer

#: Settings that may be others from task to task, and are a list in the record then.
BY_TASK = (
    *RECORDED,
    *MEASURING,
    "augmentation",
    "batch_augmentation",
    "loss",
    "devices",
    "backbone_dtype",
    "validation_fraction",
)
#: What a task takes.
TOOK = ("epochs", "steps", "images_per_step")


def record_of(trainer: ContinualTrainer) -> RunResults:
    """What the adapter has learnt and what was measured so far, in this run and in those before."""
    trainable, total = trainer.model.get_nb_trainable_parameters()
    tuner, strategy, earlier = trainer.tuner, trainer.strategy, trainer.earlier
    folder = adapter_folder(Path(trainer.args.output_dir), tuner.active_adapters[0])
    weights, sums = folder / SAFETENSORS_WEIGHTS_NAME, folder / SUMS_FILE
    facts = facts_of(trainer)
    chosen = described_choices(trainer.args, trainer.callback_handler.callbacks, trainer.validation)
    before, most = earlier.record, trainer.most_trainable
    if before is not None:
        facts["dataset"] = _joined(before.dataset, facts["dataset"], " + ")
        most = max(most, before.trainable_parameters)
    return RunResults(
        **{**facts, "scenario": {**scenario_of(earlier, facts["scenario"]), "content": trainer.scenario.content}},
        peft_type=tuner.peft_config[tuner.active_adapters[0]].peft_type.value,
        seed=trainer.args.seed,
        task_names=[*earlier.names, *(task.name for task in trainer.scenario)],
        accuracy_matrix=trainer.whole_matrix.tolist(),
        test_sizes=test_sizes(trainer),
        metrics=trainer.metrics,
        trainable_parameters=max(trainable, most) if trainer.finished_tasks else trainable,
        total_parameters=total,
        adapter_bytes=strategy.saved_bytes(trainer, weights.stat().st_size) if weights.is_file() else None,
        sums_bytes=sums.stat().st_size if tuner.head.active.observes and sums.is_file() else None,
        train_seconds=trainer.train_seconds + (before.train_seconds if before else 0.0),
        query_seconds=trainer.query_seconds + ((before.query_seconds or 0.0) if before else 0.0),
        hyperparameters=settings_over_tasks(trainer) | ({"selection": chosen} if chosen else {}),
        versions=versions(),
        command=None,
        finished_tasks=len(earlier) + trainer.finished_tasks,
        prompt_usage=usage_of_finished_tasks(trainer),
        baseline=trainer.baseline,
        backbone=_backbone_of(trainer),
        kept_bytes=strategy.kept_bytes(trainer),
        peak_memory_bytes=_most(peak_memory(trainer.args.device), before and before.peak_memory_bytes),
        flops=_flops_of(trainer),
        learnt=[*learnt_before(earlier), *(task["took"] for task in trainer.learnt)],
        calibration=calibrations_of(trainer),
        **_details_of(trainer),
    )


def calibrations_of(trainer: ContinualTrainer) -> list[dict[str, Any] | None] | None:
    """What calibrating after each finished task gave; None where no temperature was fitted after any."""
    earlier = trainer.earlier
    before = (earlier.record and earlier.record.calibration) or [None] * len(earlier)
    own = [task.get("calibration") for task in trainer.learnt[: trainer.finished_tasks]]
    found = [*earlier.on_record(before, None), *own]
    return found if any(found) else None


def _backbone_of(trainer: ContinualTrainer) -> dict[str, int]:
    """Its parameters, how many of them are trained, and the bytes it takes beside the adapter if it is saved too."""
    backbone = trainer.tuner.encoder.base_layer
    added = {id(weight) for weight in parameters_of_others(backbone)}  # by LoRA, for instance: none of its own
    own = [weight for weight in backbone.parameters() if id(weight) not in added]
    changes = any(weight.requires_grad for weight in own)
    return {
        "parameters": sum(weight.numel() for weight in own),
        "trained": sum(weight.numel() for weight in backbone.parameters() if weight.requires_grad),
        "saved_bytes": trainer.strategy.saved_bytes(trainer, 0) if changes else 0,
    }


def _most(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return max(known, default=None)


def _flops_of(trainer: ContinualTrainer) -> int | None:
    """Of all processes, which do as much each; None where those of some task were not counted."""
    own, record = trainer.flops.total, trainer.earlier.record
    before = (record and record.flops) if len(trainer.earlier) else 0
    if own is None or before is None or not trainer.finished_tasks:
        return None
    return own * trainer.args.world_size + before


def _details_of(trainer: ContinualTrainer) -> dict[str, Any]:
    """What the last measurement told; of own metrics the values of finished tasks, as one may be measured that is not
    saved yet."""
    if not trainer.finished_tasks:
        return {}
    details, done = dict(trainer.details), len(trainer.earlier) + trainer.finished_tasks
    if details.get("own_metrics"):
        details["own_metrics"] = {name: values[:done] for name, values in details["own_metrics"].items()}
    return details


def facts_of(trainer: ContinualTrainer) -> dict[str, Any]:
    """What this run is: method, base model, data and scenario."""
    config = trainer.tuner.peft_config[trainer.tuner.active_adapters[0]]
    return {
        "method": trainer.strategy.title(config.title),
        "base_model": model_name(trainer.model),
        "dataset": dataset_name(trainer.scenario),
        "scenario": trainer.scenario.describe(),
    }


def scenario_of(earlier: EarlierTasks, scenario: dict[str, Any]) -> dict[str, Any]:
    """The description of all tasks of the adapter, from that of this run's `scenario`."""
    if not len(earlier):
        return scenario
    before = earlier.record.scenario if earlier.record else {}
    known = [name for classes in earlier.classes for name in classes]
    sizes = [size for size in earlier.on_record(before.get("train_sizes", ()), None) if size is not None]
    joined = {
        "name": _joined(before.get("name", ""), scenario["name"], ", then "),
        "num_tasks": len(earlier) + scenario["num_tasks"],
        "settings": before.get("settings", {}) | scenario["settings"],
        "seed": scenario["seed"] if before.get("seed") == scenario["seed"] else None,
        "class_order": list(dict.fromkeys([*known, *scenario["class_order"]])),
        "task_names": [*earlier.names, *scenario["task_names"]],
        "classes_per_task": [*map(len, earlier.classes), *scenario["classes_per_task"]],
        "train_sizes": [*sizes, *scenario["train_sizes"]],
        "test_sizes": [*earlier.test_sizes, *scenario["test_sizes"]],
    }
    described = {**scenario, **joined}
    if len(sizes) < len(earlier):  # rather none than those of a part
        del described["train_sizes"]
    return described


def _joined(first: str, second: str, by: str) -> str:
    """Two texts as one; the first alone if it says the second already."""
    parts = first.split(by)
    return first if second in parts else by.join(filter(None, [first, second]))


def test_sizes(trainer: ContinualTrainer) -> list[int]:
    """Numbers of test images of all tasks; 0 where they are not known."""
    return [*trainer.earlier.test_sizes, *(len(task.test) for task in trainer.scenario)]


def metrics_of(trainer: ContinualTrainer) -> dict[str, float]:
    """The metrics after the last finished task; NaN where tasks have a part in it that were not measured."""
    if not trainer.finished_tasks:
        return {}
    tasks, sizes = trainer.tasks_before + trainer.finished_tasks, test_sizes(trainer)
    # A task that was added later has no accuracy from before the first one.
    whole = trainer.baseline is not None and not np.isnan(trainer.baseline).any()
    known = all(sizes[:tasks])
    metrics = continual_metrics(
        trainer.whole_matrix,
        test_sizes=sizes if known else None,
        baseline=trainer.baseline if whole else None,
        tasks=tasks,
    )
    return metrics if known else metrics | {"overall_accuracy": float("nan")}


def settings_of(trainer: ContinualTrainer) -> dict[str, Any]:
    """Settings that the next task is learnt with."""
    config = trainer.tuner.peft_config[trainer.tuner.active_adapters[0]]
    settings = hyperparameters(trainer.args, trainer.model, config, trainer.augmentation)
    for name, function in (
        ("batch_augmentation", trainer.batch_augmentation),
        ("loss", trainer.tuner.head.own_loss),
    ):
        if function is not None:
            settings[name] = described(function)
    if trainer.passed_over:
        settings["passed_over"] = recorded(trainer.passed_over)
    if trainer.strategy.settings():
        settings["strategy"] = trainer.strategy.settings()
    if trainer.tasks_before:
        settings["tasks_learnt_before"] = trainer.tasks_before
    if trainer.args.per_task:
        settings["per_task"] = {key: dict(values) for key, values in trainer.args.per_task.items()}
    if trainer.args.measure_ahead:
        settings["measure_ahead"] = True
    if trainer.args.validation_fraction is not None:
        settings["validation_fraction"] = trainer.args.validation_fraction
        settings["validation_seed"] = trainer.args.validation_seed
    return settings


def learnt_of(trainer: ContinualTrainer, took: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a task that was learnt: its settings, with the batch that it came down to, and what it took."""
    settings = {name: value for name, value in settings_of(trainer).items() if name in BY_TASK}
    batch = took.get("batch")
    if batch is not None:
        settings["per_device_train_batch_size"] = batch
    return {"settings": settings, "took": {name: took.get(name) for name in TOOK}}


def learnt_before(earlier: EarlierTasks) -> list[dict[str, Any]]:
    """What the tasks of the runs before took, as far as it is on record."""
    nothing = dict.fromkeys(TOOK)
    return earlier.on_record((earlier.record and earlier.record.learnt) or [nothing] * len(earlier), nothing)


def settings_over_tasks(trainer: ContinualTrainer) -> dict[str, Any]:
    """The settings of all finished tasks: a list of one value for each of them where they differ."""
    settings, record = settings_of(trainer), trainer.earlier.record
    learnt = [task["settings"] for task in trainer.learnt]
    if record is not None:
        done = record.finished_tasks
        before = [
            {name: _of_task(value, task, done) for name, value in record.hyperparameters.items() if name in BY_TASK}
            for task in range(done)
        ]
        learnt = [*trainer.earlier.on_record(before, {}), *learnt]
    if not trainer.learnt:
        return settings
    for name in dict.fromkeys(name for each in learnt for name in each):
        settings.update(_over_tasks(name, [each.get(name) for each in learnt]))
    return settings


def _over_tasks(name: str, values: Sequence[Any]) -> dict[str, Any]:
    if all(value == values[0] for value in values):
        return {name: values[0]}
    return {name: list(values)}


def _of_task(value: Any, task: int, tasks: int) -> Any:
    return value[task] if isinstance(value, list) and len(value) == tasks else value


def adapter_folder(folder: Path, adapter: str) -> Path:
    """Where PEFT saves an adapter in `folder`: those of other names than "default" in folders of their own."""
    return folder if adapter == "default" else folder / adapter


def usage_of_finished_tasks(trainer: ContinualTrainer) -> list[list[float]] | None:
    """How often each row was chosen for each task's test images; None where no rows are chosen, or tasks that were
    learnt before are not measured."""
    if trainer.prompt_usage is None or not trainer.finished_tasks:
        return None
    if len(trainer.earlier.tests) < len(trainer.earlier):
        return None
    return trainer.prompt_usage[: len(trainer.earlier) + trainer.finished_tasks].tolist()
