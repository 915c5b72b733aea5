"""Methods to compare with, on the same trainer."""

from __future__ import annotations

from .fine_tuning import FineTuning
from .nearest_class_mean import NearestClassMean


__all__ = ["FineTuning", "NearestClassMean"]
