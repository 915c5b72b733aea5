"""Task sequences made from ordinary `datasets` data, and the way from their examples to model input."""

from __future__ import annotations

from .class_incremental import class_incremental
from .domain_incremental import domain_incremental
from .task import Scenario, Task
from .task_incremental import task_incremental
from .transforms import ContinualCollator, ImageTransform, RandomResizedCropFlip


__all__ = [
    "ContinualCollator",
    "ImageTransform",
    "RandomResizedCropFlip",
    "Scenario",
    "Task",
    "class_incremental",
    "domain_incremental",
    "task_incremental",
]
