"""What a task sequence needs, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, get_scheduler
from transformers.utils import logging

from ..heads import HEADS
from ..scenarios import ImageTransform, Scenario
from ..scenarios.pixels import options_of
from ..text import brief
from ..tuners.base.config import PromptPoolConfig
from ..tuners.base.model import PromptPoolModel
from .arguments import ContinualTrainingArguments
from .examples import has_transform
from .per_task import check_tasks, settings_of_task
from .strategy import Strategy
from .transformed import check_transformed


logger = logging.get_logger(__name__)
#: Seeds that an augmentation is tried with.
TRIALS = 4


def check_fit(model: Any, args: Any, scenario: Any, strategy: Strategy, finished_tasks: int = 0) -> None:
    """Refuse what cannot work, before anything is trained; `finished_tasks` of the scenario are learnt already."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, PromptPoolModel):
        raise ValueError(
            f"model is a {type(model).__name__}, but a task sequence needs a PeftModel with a configuration of "
            "peft_cl. Wrap it: get_peft_model(model, CodaPromptConfig())."
        )
    if not isinstance(args, ContinualTrainingArguments):
        raise ValueError(f"args is a {type(args).__name__}, but must be ContinualTrainingArguments.")
    if not isinstance(scenario, Scenario):
        raise ValueError(
            f"scenario is a {type(scenario).__name__}, but must be a Scenario, for instance from "
            "class_incremental(dataset, num_tasks=10)."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would split batches with DataParallel; prompts are "
            "set up per call and cannot be split so. Start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0."
        )
    for name, given in (("FSDP", args.fsdp), ("DeepSpeed", args.deepspeed)):
        if given or parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}"):
            raise ValueError(
                f"{name} is on, which splits parameters over processes, but head and pool grow with each task and "
                "each process needs them whole. Start with `accelerate launch --multi_gpu`: the backbone is frozen, "
                "so a process holds its weights once, without gradients or optimizer state. If one device cannot hold "
                "them, divide its layers by peft_cl.trainer.shard_backbone(model)."
            )
    check_images(args, scenario)
    check_transformed(scenario)
    check_tasks(args, scenario)
    if args.dataloader_drop_last:
        for task in scenario[finished_tasks:]:
            with settings_of_task(args, scenario, task):
                batch = args.train_batch_size
            if len(task.train) < batch * args.world_size:
                raise ValueError(
                    f"dataloader_drop_last is True, but {task.name!r} has {len(task.train)} training examples, fewer "
                    f"than one batch of {batch} on each of {args.world_size} processes. Set it to "
                    "False, or make the batch smaller."
                )
    config = model.peft_config[model.active_adapter]
    model.base_model.head.active.check_classes(len({*(config.classes if config.tasks else ()), *scenario.classes}))
    check_scenario(config, args, scenario, strategy, finished_tasks)
    strategy.check(model, scenario)
    check_ahead(config, args, scenario)


def check_metric(args: ContinualTrainingArguments, scenario: Scenario, own: Sequence[str]) -> None:
    """Refuse a metric that is not measured, or that some task would lack: a task is measured from the time on when it
    is learnt.

    Args:
        own: names of the user's own metrics that are numbers.
    """
    name, first = (args.metric_for_best_model or "").removeprefix("eval_"), scenario[0].name
    known = ["loss", "average_accuracy", f"accuracy_{first}", *own, *(f"{metric}_{first}" for metric in own)]
    if not name or name in known:
        return
    if name.startswith("accuracy_"):
        is_task = name.removeprefix("accuracy_") in [task.name for task in scenario]
        why = "is not measured while earlier tasks are learnt" if is_task else "is none of the scenario's tasks"
        raise ValueError(
            f"metric_for_best_model is {args.metric_for_best_model!r}, but {name.removeprefix('accuracy_')!r} {why}. "
            f"Take 'average_accuracy', 'loss' or 'accuracy_{first}'."
        )
    raise ValueError(
        f"metric_for_best_model is {args.metric_for_best_model!r}, but must be one of {', '.join(known)}. Take one of "
        "them, or give the trainer compute_metrics=, a function that returns a number of this name."
    )


def check_callbacks(args: ContinualTrainingArguments, callbacks: Any) -> None:
    """Refuse callbacks that are none, and early stopping that has nothing to go by."""
    if callbacks is not None and not isinstance(callbacks, (list, tuple)):
        raise ValueError(f"callbacks is {callbacks!r}, but must be a list of TrainerCallback. Put it into a list.")
    for each in callbacks or ():
        kind = each if isinstance(each, type) else type(each)
        if not issubclass(kind, TrainerCallback):
            raise ValueError(f"callbacks has {each!r}, but must hold objects (or classes) of TrainerCallback.")
        if issubclass(kind, EarlyStoppingCallback):
            lacking = {"metric_for_best_model": args.metric_for_best_model, "eval_strategy": args.eval_strategy.value}
            for name, value in lacking.items():
                if value in (None, "no"):
                    raise ValueError(
                        f"callbacks has {kind.__name__}, but {name} is {value!r}, so nothing says when to stop. Set "
                        "metric_for_best_model, for instance to 'average_accuracy', and eval_strategy to 'epoch' or "
                        "'steps'."
                    )


#: Arguments of the Trainer that would stand in the place of something of ours, and what to give instead.
REPLACEMENTS = {
    "optimizers": "Set optim, optim_args and learning_rates in the arguments",
    "optimizer_cls_and_kwargs": "Set optim, optim_args and learning_rates in the arguments",
    "train_dataset": "Give the data to the scenario",
    "eval_dataset": "Give the data to the scenario",
    "data_collator": "Give augmentation= or batch_augmentation=",
    "preprocess_logits_for_metrics": "Read the predicted classes from predict(task), or override Strategy.predict",
    "compute_loss_func": "Give it as loss=, a function (logits, labels, class_names) to which the method's own terms "
    "and masks are applied",
    "model_init": "Make a model and a trainer for each set of settings in a loop of your own",
}


def check_replacements(given: Mapping[str, Any]) -> None:
    """Refuse arguments of the Trainer in whose place the task sequence needs its own."""
    for name, remedy in REPLACEMENTS.items():
        value = given.get(name)
        if value is None or (name == "optimizers" and value == (None, None)):
            continue
        raise ValueError(
            f"{name} is given, but each task has its own, which scenario and arguments say. Leave it out. {remedy}."
        )


def check_optimizer(args: ContinualTrainingArguments) -> None:
    """Make optimizer and schedule once, of one parameter: what they refuse is told before anything is trained."""
    model = nn.Linear(2, 2)
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
            return  # a maker of several optimizers, which needs the whole model
        parameters = next(
            (settings.pop(name) for name in ("params", "model", "optimizer_dict") if name in settings), 0
        )
        optimizer = kind(parameters or model.parameters(), **settings)
    except (ValueError, TypeError, ImportError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"optim is {str(args.optim.value)!r} with optim_args={args.optim_args!r}, which fails: {error}. Correct "
            "optim_args, or take optim='adamw_torch'."
        ) from error
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,  # or what comes after would not be tried
            num_training_steps=100,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"lr_scheduler_type is {str(args.lr_scheduler_type.value)!r} with lr_scheduler_kwargs="
            f"{args.lr_scheduler_kwargs!r}, which fails: {error}. Correct lr_scheduler_kwargs, or take "
            "lr_scheduler_type='linear'."
        ) from error


def check_functions(processing_class: Any, augmentation: Any, batch_augmentation: Any, draws: int | None) -> None:
    """Refuse what cannot be applied to images."""
    if draws is not None and augmentation is None:
        raise ValueError(
            f"augmentation_draws is {draws}, but no augmentation is given that could be drawn. Give one as "
            "augmentation=, such as RandomResizedCropFlip(), or leave augmentation_draws out."
        )
    if not callable(processing_class) or not hasattr(processing_class, "to_json_string"):
        raise ValueError(
            f"processing_class is {processing_class!r}, but must be the backbone's processor: "
            "AutoImageProcessor.from_pretrained(...)."
        )
    options_of(processing_class)  # refuses a background or white that is none
    for name, function in (("augmentation", augmentation), ("batch_augmentation", batch_augmentation)):
        if function is not None and not callable(function):
            raise ValueError(
                f"{name} is {function!r}, but must be a function of an image (batch_augmentation: of a batch), such "
                "as RandomResizedCropFlip(size=224)."
            )


def check_augmentation(transform: ImageTransform, scenario: Scenario, draws: int | None) -> None:
    """Try the augmentation on the first training image: it must give an image, and the same one for one seed."""
    if transform.augmentation is None:
        return
    image = transform.to_rgb(scenario[0].train[0][scenario.image_column])
    repeats = True
    for seed in range(TRIALS):
        first, second = (transform.augmented(image, seed) for _ in range(2))
        if not isinstance(first, Image.Image):
            raise ValueError(
                f"augmentation makes a {type(first).__name__} of an image, but must give a PIL image, of which the "
                "image processor makes pixel values. Leave out what comes after (ToTensor, Normalize)."
            )
        repeats = repeats and (first.size, first.tobytes()) == (second.size, second.tobytes())
    if repeats:
        return
    why = (
        "augmentation gives other images for the same seed: it draws from a random generator of its own. Draw from "
        "the global ones of random, numpy.random or torch"
    )
    if draws is not None:
        raise ValueError(
            f"augmentation_draws is {draws}, but {why}, so that draws can come again; or leave augmentation_draws out."
        )
    logger.warning(
        "%s; as it is, workers, processes and an interruption change what is drawn, and a run cannot be repeated.", why
    )


def check_images(args: ContinualTrainingArguments, scenario: Scenario) -> None:
    """Refuse images that do not come as such, and to keep those that may be others each time."""
    for task in scenario:
        for split in ("train", "test"):
            data = getattr(task, split)
            if data.format["type"] not in (None, "custom"):
                raise ValueError(
                    f"The {split} examples of task {task.name!r} come as {data.format['type']!r}, but images are "
                    "needed as the data set decodes them. Call with_format(None) on the data set."
                )
            if getattr(data.features.get(scenario.image_column), "decode", True) is False:
                raise ValueError(
                    f"The {split} images of task {task.name!r} come undecoded. Call "
                    f"cast_column({scenario.image_column!r}, datasets.Image()) on the data set."
                )
            if args.image_cache_dir and has_transform(data):
                raise ValueError(
                    f"image_cache_dir is {args.image_cache_dir!r}, but the {split} images of task {task.name!r} go "
                    "through a transform of the data set (with_transform), of which one result would be kept. Leave "
                    "image_cache_dir out, or give the trainer augmentation= or batch_augmentation= in its place."
                )


def check_scenario(
    config: PromptPoolConfig, args: ContinualTrainingArguments, scenario: Scenario, strategy: Strategy, finished: int
) -> None:
    """Refuse a scenario that the adapter, the arguments or the strategy cannot go through."""
    if config.stream:
        raise ValueError(
            "The adapter is learnt from a stream, which has an end, and cannot learn more. Start with a new adapter."
        )
    if scenario.boundaries:
        for index in range(len(scenario) - finished):
            config.check_task(config.num_tasks + index)
    else:
        if config.tasks:
            raise ValueError(
                f"The adapter has learnt {config.num_tasks} tasks, but a stream has none. Start with a new adapter."
            )
        config.check_stream()
        check_stream_arguments(args)
        if not strategy.learns_streams:
            raise ValueError(
                f"{strategy.name} needs tasks with an end, but the scenario {scenario.name!r} is a stream. Use a "
                "scenario with boundaries."
            )
    if strategy.trains_earlier_classes and config.train_mask and scenario.boundaries:
        raise ValueError(
            f"train_mask is True, but {strategy.name} trains on classes of earlier tasks too, whose loss would be "
            "infinite. Set train_mask=False in the adapter's configuration."
        )
    if strategy.why_trained_head and HEADS[config.head].observes:
        raise ValueError(
            f"head is {config.head!r}, which is computed from sums over features, but {strategy.why_trained_head}. "
            "Set head='linear'."
        )
    if config.task_evidence and not strategy.has_task_evidence:
        raise ValueError(
            f"task_evidence is {config.task_evidence}, but {strategy.name} has no use for it: a task's mean query "
            "comes from training steps on its own images alone, with a frozen backbone. Leave it at 0."
        )


def check_ahead(config: PromptPoolConfig, args: ContinualTrainingArguments, scenario: Scenario) -> None:
    """Refuse to measure tasks before they are learnt where the model has no rows for their classes, or not their
    number."""
    known = {*(config.classes if config.tasks else ()), *scenario[0].classes}
    if not args.measure_ahead or not scenario.boundaries:  # a stream begins with all classes
        return
    for task in scenario:
        new = [name for name in task.classes if name not in known]
        if new or scenario.task_known:
            why = f"brings new classes ({', '.join(new[:3])})" if new else "is told to the model by its number"
            raise ValueError(
                f"measure_ahead is True, but task {task.name!r} {why}, which the model does not know before it learns "
                "the task. Leave measure_ahead at False; it is for scenarios whose tasks share their classes, such as "
                "domain_incremental."
            )


def check_stream_arguments(args: ContinualTrainingArguments) -> None:
    """Refuse arguments that set a length or a schedule: the end of a stream is not known."""
    if args.num_train_epochs != 1 or args.max_steps > 0:
        raise ValueError(
            f"num_train_epochs is {args.num_train_epochs:g} and max_steps {args.max_steps}, but a stream is gone "
            "through once, in its own order. Set num_train_epochs=1; more passes are task_free(..., passes=...)."
        )
    if args.lr_scheduler_type != "constant" or args.warmup_steps:
        raise ValueError(
            f"lr_scheduler_type is {args.lr_scheduler_type.value!r} with warmup_steps={args.warmup_steps}, but the "
            "end of a stream is not known. Set lr_scheduler_type='constant' and no warm-up."
        )


def check_image_size(model: PeftModel, output_size: tuple[int, int] | None) -> None:
    """Refuse images of another size than the backbone's position embeddings are for, or of other channels."""
    tuner = model.base_model
    config = tuner.family.image_config(model.get_base_model())
    channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", None)
    if channels != 3:
        raise ValueError(
            f"The backbone reads images of {channels} channels, but images are given to it as RGB, 3 channels. Take a "
            "backbone for 3 channels; grey images become RGB by themselves."
        )
    expected = (size, size) if isinstance(size, int) else tuple(size or ())
    if not expected or output_size is None or tuple(output_size) == expected:
        return
    given = f"The image processor gives images of {output_size[0]} x {output_size[1]} pixels, but the backbone reads "
    if tuner.family.remedy_for_size:
        raise ValueError(
            f"{given}{expected[0]} x {expected[1]}. Load the processor of this backbone, or change its size (and "
            f"crop_size); or {tuner.family.remedy_for_size}."
        )
    if tuner.family.interpolates and not model.peft_config[model.active_adapter].interpolate_pos_encoding:
        raise ValueError(
            f"{given}{expected[0]} x {expected[1]}. Load the processor of this backbone, or change its size (and "
            "crop_size); or set interpolate_pos_encoding=True in the adapter's configuration, for images of this size."
        )
    patch = getattr(config, "patch_size", 1)
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch)
    if any(side % step for side, step in zip(output_size, sides, strict=True)):
        raise ValueError(
            f"{given}whole patches of {sides[0]} x {sides[1]}. Set the processor's size to multiples of these."
        )


def warn_of_empty_classes(scenario: Scenario) -> None:
    """Say which classes have no image to learn from, or none to measure on, in any task."""
    for split, what in (("train", "training"), ("test", "test")):
        seen = np.concatenate([scenario.model_labels(task, split) for task in scenario])
        empty = [scenario.classes[row] for row in np.setdiff1d(np.arange(len(scenario.classes)), seen)]
        if empty:
            means = "they are in no accuracy" if split == "test" else "nothing can be learnt of them"
            logger.warning(
                "%d classes have no %s images, so %s: %s. Add some, or leave these classes out.",
                *(len(empty), what, means, brief(empty)),
            )
