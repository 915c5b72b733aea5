"""Arguments of the continual trainer: `TrainingArguments` that hold for every task."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class ContinualTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, applied to each task anew: epochs, steps, warm-up and schedule are per task.

    Two defaults differ: images are kept (`remove_unused_columns=False`, the collator turns them into pixels), and no
    checkpoints are written within a task (`save_strategy="no"`; the adapter and the results are saved after each task).

    Args:
        evaluate_after: which tasks are measured after each task: `"seen"` (all tasks so far, the default) or
            `"last"` (all tasks, but only once, after the last).

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
    evaluate_after: str = field(
        default="seen",
        metadata={"help": "'seen': after each task, measure all tasks so far. 'last': only after the last task."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns is True, but the image column would be removed before it is turned into pixels. "
                "Leave it at False."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, but the logits of other tasks' classes are "
                "-inf in training, which makes a smoothed loss infinite. Set it to 0."
            )
        if self.evaluate_after not in ("seen", "last"):
            raise ValueError(f"evaluate_after is {self.evaluate_after!r}, but must be 'seen' or 'last'.")
