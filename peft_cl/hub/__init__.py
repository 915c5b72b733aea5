"""Adapters on the Hugging Face Hub: their model card, pushing and fetching them, Spaces."""

from __future__ import annotations

from .card import model_card, write_model_card
from .faults import HubError
from .papers import Paper
from .pushing import push_adapter
from .spaces import push_demo, push_metrics


__all__ = ["HubError", "Paper", "model_card", "push_adapter", "push_demo", "push_metrics", "write_model_card"]
