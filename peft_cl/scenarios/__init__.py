"""Task sequences made from ordinary `datasets` data, and the way from their examples to model input."""

from __future__ import annotations

from .class_incremental import class_incremental
from .collator import ContinualCollator
from .dataset_sequence import dataset_sequence
from .domain_incremental import domain_incremental
from .pixels import open_image, to_rgb
from .task import Scenario, Task
from .task_free import task_free
from .task_incremental import task_incremental
from .transforms import ImageTransform, RandomResizedCropFlip


__all__ = [
    "ContinualCollator",
    "ImageTransform",
    "RandomResizedCropFlip",
    "Scenario",
    "Task",
    "class_incremental",
    "dataset_sequence",
    "domain_incremental",
    "open_image",
    "task_free",
    "task_incremental",
    "to_rgb",
]
