"""Linear probe: the growing head on frozen features, without prompts. What every prompt method has to beat."""

from __future__ import annotations

from ...registration import register_method
from .config import LinearProbeConfig
from .model import LinearProbeModel


__all__ = ["LinearProbeConfig", "LinearProbeModel"]

register_method("linearprobe", LinearProbeConfig, LinearProbeModel)
