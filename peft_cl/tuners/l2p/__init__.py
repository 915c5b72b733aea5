"""Learning to Prompt (L2P)."""

from __future__ import annotations

from ...registration import add_peft_type, register_method


add_peft_type("L2P")

from .config import L2PConfig  # noqa: E402  (the config names its PEFT type)
from .model import L2PModel  # noqa: E402


__all__ = ["L2PConfig", "L2PModel"]

register_method("l2p", L2PConfig, L2PModel)
