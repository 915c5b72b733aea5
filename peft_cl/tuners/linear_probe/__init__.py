"""Linear probe: the growing head on frozen features, without prompts. What every prompt method has to beat."""

from __future__ import annotations

from ...registration import add_peft_type, register_method


add_peft_type("LINEARPROBE")

from .config import LinearProbeConfig  # noqa: E402  (the config names its PEFT type)
from .model import LinearProbeModel  # noqa: E402


__all__ = ["LinearProbeConfig", "LinearProbeModel"]

register_method("linearprobe", LinearProbeConfig, LinearProbeModel)
