"""Training a task sequence."""

from __future__ import annotations

from .arguments import ContinualTrainingArguments
from .sharding import shard_backbone
from .strategy import Strategy, register_strategy
from .trainer import ContinualTrainer


__all__ = ["ContinualTrainer", "ContinualTrainingArguments", "Strategy", "register_strategy", "shard_backbone"]
