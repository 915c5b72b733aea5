"""What a card calls metrics and settings."""

from __future__ import annotations

from dataclasses import fields

from peft import PeftConfig


# metric in `RunResults.metrics`: type in the card's metadata, name, meaning
METRICS = {
    "average_accuracy": ("accuracy", "Final average accuracy", "mean over all tasks after the last one trained"),
    "average_incremental_accuracy": (
        "average_incremental_accuracy",
        "Average incremental accuracy",
        "mean over the steps of the average accuracy so far",
    ),
    "forgetting": ("forgetting", "Forgetting", "mean drop from a task's best accuracy to its last, lower is better"),
    "overall_accuracy": ("", "Overall accuracy", "over all test examples, so that larger tasks weigh more"),
    "per_step_forgetting": (
        "",
        "Per step forgetting",
        "mean drop from one step to the next, what the code of CODA-Prompt calls forgetting",
    ),
    "backward_transfer": ("", "Backward transfer", "mean change of a task's accuracy since it was learnt"),
    "forward_transfer": ("", "Forward transfer", "mean gain on a task before it is learnt"),
}
# setting in `RunResults.hyperparameters`: name in the protocol
SETTINGS = {
    "num_train_epochs": "Epochs per task",
    "max_steps": "Steps per task",
    "per_device_train_batch_size": "Batch size per device",
    "gradient_accumulation_steps": "Gradient accumulation steps",
    "devices": "Devices",
    "device": "Device",
    "threads": "Threads",
    "backbone_dtype": "Backbone in",
    "learning_rate": "Learning rate",
    "learning_rates": "Learning rates of parts",
    "max_grad_norms": "Gradient clipping of parts",
    "lr_scheduler_type": "Learning rate schedule",
    "optim": "Optimizer",
    "weight_decay": "Weight decay",
    "max_grad_norm": "Gradient clipping",
    "augmentation": "Augmentation",
    "selection": "Chosen within a task",
    "processor": "Changes to the image processor",
}
# What a configuration says about the adapter's file rather than about the method.
NOT_SETTINGS = {field.name for field in fields(PeftConfig)} | {
    "classes",
    "tasks",
    "rows_in_use",
    "grown",
    "joined",
    "joined_prompts",
    "stream",
    "base_weights",
    "temperature",
    "format_version",
    "target_modules",
}
