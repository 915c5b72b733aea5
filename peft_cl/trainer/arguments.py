"""Arguments of the continual trainer: `TrainingArguments` that hold for every task."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments

from ..scenarios.columns import is_number, plain
from .bad_images import CHOICES, STOP
from .clipping import check_norms
from .learning_rates import check_rates
from .per_task import checked


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _steps(value: Any) -> bool:
    return is_number(value) and (0 < value < 1 or (1 <= value < math.inf and value == int(value)))


#: What values must be that the Trainer would take as they are, or only fail on in the middle: a test, and its words.
RULES = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        (lambda value: _whole(value, 1), "a whole number of at least 1"),
    ),
    **dict.fromkeys(
        ("seed", "validation_seed", "dataloader_num_workers"),
        (lambda value: _whole(value, 0), "a whole number of at least 0"),
    ),
    "data_seed": (lambda value: value is None or _whole(value, 0), "a whole number of at least 0, or None"),
    "num_train_epochs": (lambda value: is_number(value) and 0 < value < math.inf, "a number above 0"),
    "max_steps": (lambda value: _whole(value, 1) or value == -1, "a whole number of at least 1, or -1 for epochs"),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon"),
        (lambda value: is_number(value) and 0 <= value < math.inf, "a number of at least 0"),
    ),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2"), (lambda value: is_number(value) and 0 <= value < 1, "at least 0 and below 1")
    ),
    "train_sampling_strategy": (
        lambda value: value in ("random", "sequential"),
        "'random' or 'sequential': images have no length",
    ),
    "label_names": (
        lambda value: value in (None, ["labels"]),
        "None: the column of the labels is the scenario's label_column",
    ),
    "neftune_noise_alpha": (lambda value: value is None, "None: its noise is for embeddings of text"),
    "include_for_metrics": (
        lambda value: not value,  # the Trainer makes a list of None
        "None: metrics are computed from scores and labels, and the images of all tasks would lie in memory at once",
    ),
    "eval_do_concat_batches": (bool, "True: accuracies are counted from the predictions of all test images"),
    "metric_for_best_model": (
        lambda value: value is None or (isinstance(value, str) and bool(value)),  # the trainer knows the names
        "the name of what is measured, such as 'average_accuracy', or None",
    ),
    **dict.fromkeys(
        ("logging_steps", "save_steps"),
        (_steps, "a whole number of at least 1, or a part of all steps between 0 and 1"),
    ),
    "eval_steps": (
        lambda value: value is None or _steps(value),
        "a whole number of at least 1, a part of all steps between 0 and 1, or None",
    ),
    **dict.fromkeys(
        ("augmentation_draws", "eval_accumulation_steps"),
        (lambda value: value is None or _whole(value, 1), "a whole number of at least 1, or None"),
    ),
    "learning_rate_per_256": (
        lambda value: value is None or (is_number(value) and 0 < value < math.inf),
        "a number above 0, such as 0.03, or None",
    ),
    "validation_fraction": (
        lambda value: value is None or (is_number(value) and 0 < value < 1),
        "a number between 0 and 1, such as 0.1, or None",
    ),
    "torch_compile_backend": (
        lambda value: value is None or str(value).upper() in DynamoBackend.list(),
        "one of " + ", ".join(each.lower() for each in DynamoBackend.list()),
    ),
    "torch_compile_mode": (
        lambda value: value in (None, "default", "max-autotune-no-cudagraphs"),
        "None, 'default' or 'max-autotune-no-cudagraphs': layers are compiled one by one, and CUDA graphs of single "
        "layers overwrite each other's results",
    ),
    "use_liger_kernel": (lambda value: not value, "False: its kernels are for language models"),
    "optim_target_modules": (
        lambda value: value is None,
        "None: it names linear layers of the backbone, which is frozen or trained as a whole",
    ),
    "bad_images": (lambda value: value in CHOICES, f"one of {', '.join(CHOICES)}"),
    **dict.fromkeys(
        ("query_cache_dir", "image_cache_dir"),
        (lambda value: value is None or isinstance(value, (str, os.PathLike)), "a folder, or None"),
    ),
}


@dataclass
class ContinualTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, applied to each task anew: epochs, steps, warm-up and schedule are per task.

    Some defaults differ: images are kept (`remove_unused_columns=False`, the collator turns them into pixels), no
    checkpoints are written within a task (`save_strategy="no"`; adapter and results are saved after each task),
    processes do not overwrite each other's counts (`ddp_broadcast_buffers=False`), and callbacks with a state, such as
    `EarlyStoppingCallback`, go on with it after an interruption (`restore_callback_states_from_checkpoint=True`).
    A loss that is not finite is logged as it is (`logging_nan_inf_filter=False`: the Trainer would wait for the device
    at each step to look), batches are copied to the device while it computes (`accelerator_config.non_blocking`), and
    `torch_compile` leaves float32 products exact unless `tf32=True` is said.

    Args:
        learning_rates: rates that differ from `learning_rate`, by the part's name: `"prompts"`, `"g_prompts"`
            (DualPrompt's general one), `"keys"`, `"attention"`, `"query_projection"` (the pool's parameters),
            `"head"`, or `"pool"` for all of the pool that is not named; the schedule holds for all.
        max_grad_norms: norms to which the gradients of a part are clipped by themselves, by the same names (`"pool"`:
            all that is not named of the pool), before `max_grad_norm` clips all of them together.
        learning_rate_per_256: the rate of a step on 256 images, in place of `learning_rate`, which becomes this times
            the images of a step (batch x accumulation x processes) / 256, as the JAX protocols of L2P and DualPrompt
            have it. Rates in `learning_rates` are taken as they are.
        per_task: settings that single tasks have of their own, by the task's number from 0 (`0` or `"0"`), its name,
            `"first"`, or `"later"` (all behind the first): for instance a long first task,
            `{"first": {"num_train_epochs": 20}, "later": {"learning_rate": 1e-3}}`. A task may have its own epochs,
            steps, rates, schedule, warm-up, weight decay, batch size and accumulation. Not for a stream.
        cache_queries: compute the frozen model's query of an image once where it is the same each time (test images,
            and training images without augmentation) and keep it in memory, 4 D bytes an image.
        augmentation_draws: how many different augmentations of an image there are: after as many epochs they come
            again, and its query under each is computed once for a task and kept, 4 D bytes. None: ever new ones.
        query_cache_dir: a folder in which these are kept for later runs too; several runs and processes may share it,
            and whatever has changed (data, image processor, a weight of the backbone, ...) is computed anew. None: not
            kept. Files that are not needed any more may be deleted.
        image_cache_dir: a folder in which images are kept decoded and scaled, 3 H W bytes an image, where they are not
            augmented one by one (`batch_augmentation` works on them): a step then needs no Python for each image.
            None: images are decoded each time.
        measure_ahead: measure the tasks to come as well: all of them before the first is learnt, when head and prompts
            have just begun (the `baseline` of the record), and after each task those after it. It fills the accuracy
            matrix above its diagonal and gives `forward_transfer`. Later tasks must bring no new classes, as the
            domains of a domain-incremental scenario: the head has no rows for those yet.
        count_flops: count the floating-point operations of learning by torch's own counter, for the record (`flops`):
            the first steps of each task, which stand for the others, and whatever is computed once for each image. It
            slows what it counts.
        pictures: whether `train()` ends by drawing the run into its folder (needs matplotlib): the accuracy matrix,
            curves, and the use of prompts and the similarity of keys where there are such.
        bad_images: what becomes of images that cannot be read (truncated, empty, missing, none). `"stop"`: training
            stops at the first one, and is resumed when it is mended or removed. `"check"`: all images are opened
            before training, and all bad ones are named. `"pass_over"`: likewise, and they are left out, with a
            warning that names them; the record lists them.
        validation_fraction: the share of each class's training images that is kept back and measured within a task
            (`eval_strategy`), on all tasks of the run so far; what chooses there (early stopping, the best checkpoint,
            a plateau of the rate) chooses by it. None: nothing is kept back, and to choose is refused, as it would be
            by test images, unless the trainer gets `validation=`.
        validation_seed: draws these images.
        fit_temperature: after each task, before it is measured, fit the temperature that logits are divided by in
            evaluation on the validation images of the tasks so far (`validation_fraction`, or `validation=` of the
            trainer). Predictions stay the same, probabilities become truer; `results.calibration` says by how much.
            Where all of these images are predicted right it stays 1.

    Raises:
        ValueError: a setting that would be wrong for a task sequence, with the reason.

    Example:
        >>> ContinualTrainingArguments("out", num_train_epochs=5, learning_rate=1e-3)
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the images are a column that the model does not name."}
    )
    save_strategy: str = field(
        default="no", metadata={"help": "Checkpoints within a task. The adapter is saved after each task anyway."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata={
            "help": "Must stay False: each process counts for itself, and the counts are joined at a task's end."
        },
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True,
        metadata={"help": "A task that is resumed goes on with its callbacks' states, such as patience used up."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log the last finite loss in the place of one that is not finite."}
    )
    learning_rates: dict[str, float] | None = field(
        default=None,
        metadata={"help": "Rates by part that differ from learning_rate, for instance {'prompts': 0.005}."},
    )
    max_grad_norms: dict[str, float] | None = field(
        default=None,
        metadata={"help": "Norms to which the gradients of a part alone are clipped, for instance {'pool': 1.0}."},
    )
    learning_rate_per_256: float | None = field(
        default=None,
        metadata={"help": "Learning rate of a step on 256 images, scaled by those of a step; sets learning_rate."},
    )
    per_task: dict[str, dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Settings that tasks have of their own, by number, name, 'first' or 'later', for instance "
            "{'first': {'num_train_epochs': 20}}."
        },
    )
    cache_queries: bool = field(
        default=True,
        metadata={"help": "Keep the queries of images that are never augmented: one pass a step instead of two."},
    )
    augmentation_draws: int | None = field(
        default=None,
        metadata={"help": "Augmentations of an image that come again, with cached queries; null: ever new ones."},
    )
    query_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder in which these queries are kept for later runs; null: in memory, for this run."},
    )
    image_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder in which images are kept decoded and scaled; null: decoded each time."},
    )
    measure_ahead: bool = field(
        default=False,
        metadata={"help": "Measure tasks before they are learnt too, for forward transfer; not with new classes."},
    )
    count_flops: bool = field(
        default=False, metadata={"help": "Count the floating-point operations of learning, for the record."}
    )
    pictures: bool = field(
        default=True, metadata={"help": "Draw the run into its folder at the end, if matplotlib is installed."}
    )
    bad_images: str = field(
        default=STOP, metadata={"help": "Images that cannot be read: stop, check (before training), or pass_over."}
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={"help": "Share of each class's training images that is kept back to choose by within a task."},
    )
    validation_seed: int = field(default=0, metadata={"help": "Draws the images of validation_fraction."})
    fit_temperature: bool = field(
        default=False, metadata={"help": "Calibrate probabilities after each task, on validation images."}
    )

    def __post_init__(self):
        for each in fields(self):
            setattr(self, each.name, plain(getattr(self, each.name)))
        for name, (holds, rule) in RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"{name} is {value!r}, but must be {rule}.")
        self._check_switches()
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # the Trainer asks for it by name before it takes bf16 there
        own_loading = self.accelerator_config is None
        if self.torch_compile and self.tf32 is None:
            self.tf32 = False
        super().__post_init__()
        if own_loading and self.dataloader_pin_memory:
            self.accelerator_config.non_blocking = True
        self._check_data_and_device()
        for name in ("learning_rates", "max_grad_norms"):
            if isinstance(getattr(self, name), dict):
                setattr(self, name, {part: plain(value) for part, value in getattr(self, name).items()})
        check_rates(self.learning_rates)
        check_norms(self.max_grad_norms)
        self.scale_rate()
        self._check_evaluation_and_saving()
        self.per_task = checked(self)

    def _check_data_and_device(self) -> None:
        if self.fp16 and self.device.type == "cpu":
            raise ValueError(
                "fp16 is True, but on a CPU the Trainer would compute in float32 all the same. Set it to False, or "
                "bf16 to True."
            )
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns is True, but the image column would be removed before it is turned into pixels."
                " Leave it at False."
            )
        if self.ddp_broadcast_buffers:
            raise ValueError(
                "ddp_broadcast_buffers is True, but the first process's counts would overwrite the others'. Leave it "
                "at False."
            )
        if self.world_size > 1 and not self.accelerator_config.even_batches:
            raise ValueError(
                "accelerator_config.even_batches is False, but then one process has fewer steps than the others, and "
                "these wait for it for ever. Leave it at True: what completes a last batch is left out again."
            )
        if self.query_cache_dir is not None and not self.cache_queries:
            raise ValueError(
                f"query_cache_dir is {self.query_cache_dir!r}, but cache_queries is False, so nothing would be kept. "
                "Take one of them out."
            )

    def _check_switches(self) -> None:
        """A word is true, whatever it says."""
        for name, allowed in SWITCHES.items():
            value = getattr(self, name)
            if not any(value is one for one in allowed):
                words = ", ".join(map(str, allowed[:-1]))
                raise ValueError(f"{name} is {value!r}, but must be {words} or {allowed[-1]}.")

    def _check_evaluation_and_saving(self) -> None:
        for name in ("fp16_full_eval", "bf16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is True, but the Trainer would cast prompts and head too and go on in half precision. "
                    "Leave it at False, and load the backbone with dtype='bfloat16'."
                )
        for name in ("prediction_loss_only", "batch_eval_metrics"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is True, but accuracies are counted from the predictions of all test images. Leave it at "
                    "False."
                )
        if self.save_only_model:
            raise ValueError(
                "save_only_model is True, but a task can only go on from a checkpoint with its optimizer. Leave it at "
                "False; the adapter is saved after each task anyway."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, but the logits of other tasks' classes are "
                "-inf in training, which makes a smoothed loss infinite. Set it to 0, and give the trainer "
                "loss=lambda logits, labels, class_names: torch.nn.functional.cross_entropy(logits, labels, "
                f"label_smoothing={self.label_smoothing_factor}), which gets the classes in question alone."
            )

    def scale_rate(self) -> None:
        """Set `learning_rate` by the images of a step, where `learning_rate_per_256` says so."""
        if self.learning_rate_per_256 is not None:
            self.learning_rate = self.learning_rate_per_256 * self.images_per_step / 256

    @property
    def images_per_step(self) -> int:
        """Images in a step of the optimizer: batch x accumulation x processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


_BOOL = {"bool": (True, False), "bool | None": (True, False, None)}
#: Fields that are switches, and what they may be. Read once: `HfArgumentParser` writes other types into the fields.
SWITCHES = {
    each.name: _BOOL[kind]
    for each in fields(ContinualTrainingArguments)
    if (kind := "bool" if each.type is bool else str(each.type)) in _BOOL
}
