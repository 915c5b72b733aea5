"""Methods to compare with, on the same trainer: a file each, which overrides what the method does differently."""

from __future__ import annotations

from .ewc import EWC
from .experience_replay import ExperienceReplay
from .fine_tuning import FineTuning
from .joint import JointTraining
from .nearest_class_mean import NearestClassMean


__all__ = ["EWC", "ExperienceReplay", "FineTuning", "JointTraining", "NearestClassMean"]
