"""Adapters on the Hugging Face Hub: their model card."""

from __future__ import annotations

from .card import model_card, write_model_card
from .papers import Paper


__all__ = ["Paper", "model_card", "write_model_card"]
