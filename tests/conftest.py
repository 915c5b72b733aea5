"""Shared set-up of the tests: no network, few threads, and a tiny backbone."""

from __future__ import annotations

import os


# Read by huggingface_hub when it is first imported, so it is set before any import below.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification


# The models here are too small for more threads to pay; a user's own setting wins.
if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
    torch.set_num_threads(1)


@pytest.fixture
def tiny_vit() -> Callable[..., ViTForImageClassification]:
    """Return a factory of tiny random ViTs in evaluation mode.

    `tiny_vit(seed=0, **overrides)` gives the same weights for the same seed and leaves torch's random state as it was;
    `overrides` are fields of `ViTConfig`. By default: images (B, 3, 32, 32), patch 8 (16 patches and CLS), hidden size
    48, 4 heads, 6 layers, 12 labels.
    """

    def build(seed: int = 0, **overrides: Any) -> ViTForImageClassification:
        fields = {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 48,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "layer_norm_eps": 1e-6,
            "num_labels": 12,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ViTForImageClassification(ViTConfig(**{**fields, **overrides})).eval()

    return build
