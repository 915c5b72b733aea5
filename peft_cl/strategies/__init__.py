"""Methods to compare with, on the same trainer: a file each, which overrides what the method does differently."""

from __future__ import annotations

from .dark_experience_replay import DarkExperienceReplay
from .ewc import EWC
from .experience_replay import ExperienceReplay
from .fine_tuning import FineTuning
from .gem import AGEM, GEM
from .hat import HAT
from .icarl import ICaRL
from .joint import JointTraining
from .lora import FirstSessionLoRA, SequentialLoRA
from .lwf import LearningWithoutForgetting
from .nearest_class_mean import NearestClassMean
from .osf import OSF
from .packnet import PackNet
from .slow_learner import SlowLearner
from .synaptic_intelligence import SynapticIntelligence


__all__ = [
    "AGEM",
    "EWC",
    "GEM",
    "HAT",
    "OSF",
    "DarkExperienceReplay",
    "ExperienceReplay",
    "FineTuning",
    "FirstSessionLoRA",
    "ICaRL",
    "JointTraining",
    "LearningWithoutForgetting",
    "NearestClassMean",
    "PackNet",
    "SequentialLoRA",
    "SlowLearner",
    "SynapticIntelligence",
]
