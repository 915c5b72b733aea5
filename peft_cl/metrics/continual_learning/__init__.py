"""The folder that `evaluate.load` reads."""

from __future__ import annotations

from .continual_learning import ContinualLearning


__all__ = ["ContinualLearning"]
