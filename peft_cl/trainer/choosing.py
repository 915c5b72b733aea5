"""What is chosen within a task (epochs, checkpoints, rates), and the images that it is chosen by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import EarlyStoppingCallback
from transformers.utils import logging

from ..scenarios import Scenario, Task
from ..text import counted
from .arguments import ContinualTrainingArguments
from .images_of_tasks import images_of_tasks


logger = logging.get_logger(__name__)
REMEDY = (
    "Set validation_fraction, for instance to 0.1, to keep back a part of the training images for it, or give "
    "validation images (validation= of the trainer, dataset.validation_split in a configuration)"
)


def share_of_each_class(labels: np.ndarray, fraction: float, seed: Any) -> np.ndarray:
    """Draw `fraction` of the examples of each class, at least one of a class that has two, and never all.

    Args:
        labels: (examples,).
        seed: as `numpy.random.default_rng` takes it.

    Returns:
        Boolean (examples,): which are drawn.
    """
    generator = np.random.default_rng(seed)
    drawn = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        drawn[rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)]] = True
    return drawn


def keep_back(scenario: Scenario, args: ContinualTrainingArguments, first: int = 0) -> tuple[Scenario, list[Task]]:
    """Take the validation part out of the training images of the tasks from `first` on.

    Returns:
        The scenario without it, and for each of these tasks one whose `test` it is.

    Raises:
        ValueError: a stream, or a task of whose classes none has two images.
    """
    if args.validation_fraction is None:
        return scenario, []
    if not scenario.boundaries:
        raise ValueError(
            f"validation_fraction is {args.validation_fraction}, but an image of a stream may come several times, so "
            "that a part kept back would be learnt all the same. Give validation images of their own by validation=, "
            "and leave validation_fraction out."
        )
    tasks, kept = list(scenario), []
    for task in scenario[first:]:
        drawn = share_of_each_class(
            scenario.model_labels(task, "train"), args.validation_fraction, [args.validation_seed, task.index]
        )
        if not drawn.any():
            raise ValueError(
                f"validation_fraction is {args.validation_fraction}, but no class of the task {task.name!r} has two "
                "training images, so none can be kept back. Leave it out, or give validation images by validation=."
            )
        kept.append(replace(task, test=task.train.select(np.flatnonzero(drawn))))
        tasks[task.index] = replace(task, train=task.train.select(np.flatnonzero(~drawn)))
    return scenario.changed(tasks), kept


def given_validation(data: Any, scenario: Scenario, args: ContinualTrainingArguments) -> list[Task]:
    """For each task of the scenario one whose `test` are its images in `data`, as `images_of_tasks` takes it.

    Raises:
        ValueError, TypeError: as `images_of_tasks`; a task without images, or two ways to choose.
    """
    if args.validation_fraction is not None:
        raise ValueError(
            f"validation images are given, and validation_fraction is {args.validation_fraction}, but one of them is "
            "what is chosen by. Leave one out."
        )
    names, classes = [task.name for task in scenario], [task.classes for task in scenario]
    found = images_of_tasks("validation", data, names, classes, scenario)
    lacking = [name for name in names if name not in {task.name for task in found}]
    if lacking:
        raise ValueError(
            f"validation has no images of the tasks {', '.join(lacking)}, so that nothing could be chosen in them. "
            "Give images of all tasks, or validation_fraction in its place."
        )
    return found


def choices(args: ContinualTrainingArguments, callbacks: Iterable[Any] | None = None) -> list[str]:
    """What of the arguments and callbacks chooses by what is measured within a task."""
    measured = args.eval_strategy != "no"
    found = ["load_best_model_at_end"] if args.load_best_model_at_end else []
    if measured and args.metric_for_best_model is not None:
        found.append(f"metric_for_best_model={args.metric_for_best_model!r}")
    if args.save_strategy == "best":
        found.append("save_strategy='best'")
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        found.append(f"lr_scheduler_type={args.lr_scheduler_type.value!r}")
    for each in callbacks or ():
        kind = each if isinstance(each, type) else type(each)
        if issubclass(kind, EarlyStoppingCallback):
            found.append(kind.__name__)
    return found


def check_choices(args: ContinualTrainingArguments, callbacks: Iterable[Any] | None, validated: bool) -> None:
    """Refuse to choose by test images, or to calibrate by them.

    Raises:
        ValueError: something is chosen or calibrated, and there are no validation images.
    """
    found = choices(args, callbacks)
    if found and not validated:
        raise ValueError(
            f"{', '.join(found)} would choose by test images, whose accuracies then say nothing of other images. "
            f"{REMEDY}."
        )
    if args.fit_temperature and not validated:
        raise ValueError(
            "fit_temperature is True, but there are no validation images: fitted on test images, the temperature "
            f"would make the calibration of the test look better than it is. {REMEDY}."
        )


def warn_of_test_images(args: ContinualTrainingArguments, validated: bool) -> None:
    """Say what the numbers within a task are of, where that is easily taken for something else."""
    if args.eval_strategy != "no" and not validated:
        logger.warning(
            "eval_strategy is %r: what is measured within a task is of test images, to be watched and not to choose "
            "by. %s.",
            str(args.eval_strategy.value),
            REMEDY,
        )
    if args.eval_strategy == "no" and args.validation_fraction is not None and not args.fit_temperature:
        logger.warning(
            "validation_fraction is %s, but eval_strategy is 'no': these training images are neither learnt nor "
            "measured. Set eval_strategy='epoch' or fit_temperature=True, or leave validation_fraction out.",
            args.validation_fraction,
        )


def described_choices(
    args: ContinualTrainingArguments, callbacks: Iterable[Any] | None, validation: Sequence[Task]
) -> str | None:
    """What was chosen within tasks and by what, for the record; None where nothing was measured there."""
    if args.eval_strategy == "no":
        return None
    found = choices(args, callbacks)
    images = sum(len(task.test) for task in validation)
    if not validation:
        return "nothing; test images were watched"
    source = (
        f"{args.validation_fraction:g} of the training images of each class, drawn with seed {args.validation_seed}"
        if args.validation_fraction is not None
        else "validation images of the data"
    )
    return f"{', '.join(found) or 'nothing'}; measured on {counted(images, 'image')}: {source}"
