"""Learning to Prompt (L2P)."""

from __future__ import annotations

from ...registration import register_method
from .config import L2PConfig
from .model import L2PModel


__all__ = ["L2PConfig", "L2PModel"]

register_method("l2p", L2PConfig, L2PModel)
