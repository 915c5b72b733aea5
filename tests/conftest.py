"""Shared set-up of the tests: no network, few threads, and a tiny backbone."""

from __future__ import annotations

import os


# Read by huggingface_hub when it is first imported, so it is set before any import below.
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cli_fixtures import place, refused, train, trained  # noqa: F401
from datasets import Dataset
from peft import get_peft_model
from trainer_cases import images
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from peft_cl import ContinualTrainer, ContinualTrainingArguments, class_incremental
from peft_cl.trainer.checks import REPLACEMENTS


# The models here are too small for more threads to pay; a user's own setting wins.
if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
    torch.set_num_threads(1)


#: Programs that playwright can drive as they are, without a download of its own.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: Marker -> whether this machine has what such tests need, and what that is.
NEEDS = {
    "gpu": (torch.cuda.is_available(), "a CUDA GPU"),
    "flash": (importlib.util.find_spec("flash_attn") is not None, "the package flash_attn"),
    "timm": (importlib.util.find_spec("timm") is not None, "timm"),
    "torchao": (importlib.util.find_spec("torchao") is not None, "torchao"),
    "quanto": (importlib.util.find_spec("optimum") is not None, "optimum-quanto"),
    "bitsandbytes": (importlib.util.find_spec("bitsandbytes") is not None, "bitsandbytes"),
    "torchvision": (importlib.util.find_spec("torchvision") is not None, "torchvision"),
    "browser": (
        importlib.util.find_spec("playwright") is not None and any(map(shutil.which, BROWSERS)),
        "the package playwright, or chromium",
    ),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of what the machine lacks, by name and in the open: they count as deselected."""
    missing = {name for name, (there, _) in NEEDS.items() if not there}
    left_out = [item for item in items if missing.intersection(mark.name for mark in item.iter_markers())]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """What was imported stays: the Trainer's collections of garbage, one a task, need not go through it."""
    gc.freeze()


def pytest_report_header() -> list[str]:
    return [
        f"Tests marked {name!r} are left out: {what} is missing" for name, (there, what) in NEEDS.items() if not there
    ]


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


@pytest.fixture(scope="session")
def data() -> dict[str, Dataset]:
    return {"train": images(16, 0), "test": images(8, 1)}


@pytest.fixture(scope="session")
def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 32, "width": 32})


@pytest.fixture
def make_trainer(tiny_vit, data, processor, tmp_path):
    """`make_trainer(config, ...)`: a trainer of `config` on a tiny backbone; further words are training arguments."""

    def make(
        config,
        *,
        num_tasks=3,
        strategy=None,
        folder="run",
        model=None,
        scenario=None,
        processing_class=None,
        **training,
    ):
        torch.manual_seed(0)
        names = (
            "augmentation",
            "batch_augmentation",
            "callbacks",
            "earlier_test",
            "validation",
            "loss",
            "compute_metrics",
            *REPLACEMENTS,
        )
        own = {name: training.pop(name) for name in names if name in training}
        settings = {"learning_rate": 1e-2, "num_train_epochs": 2, "per_device_train_batch_size": 8, **training}
        arguments = ContinualTrainingArguments(
            str(tmp_path / folder),
            disable_tqdm=True,
            **{"logging_steps": 1, "use_cpu": True, "pictures": False, **settings},
        )
        return ContinualTrainer(
            get_peft_model(tiny_vit(), config) if model is None else model,
            arguments,
            scenario or class_incremental(data, num_tasks=num_tasks),
            processing_class=processing_class or processor,
            strategy=strategy,
            **own,
        )

    return make
