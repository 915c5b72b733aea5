"""The vision backbones that can carry prompts: one row or one file per family. No other place knows their modules."""

from __future__ import annotations

from .families import FAMILIES, family_of, loader_of, register_family, supported_models
from .family import Family
from .geometry import Geometry


__all__ = ["FAMILIES", "Family", "Geometry", "family_of", "loader_of", "register_family", "supported_models"]
