"""With torchvision installed, which is optional: its augmentation and the processors that are built on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trainer_cases import CONFIGS
from transformers import ViTImageProcessor, ViTImageProcessorPil


pytestmark = pytest.mark.torchvision


def test_transforms_augment_images_and_batches(make_trainer):
    from torchvision.transforms import v2

    augment = v2.Compose([v2.RandomResizedCrop(32, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()])
    for name in ("augmentation", "batch_augmentation"):
        matrices = []
        for folder in ("one", "two"):
            trainer = make_trainer(CONFIGS["coda"](), num_tasks=2, folder=name + folder, **{name: augment})
            trainer.train()
            matrices.append(trainer.accuracy_matrix)
        np.testing.assert_array_equal(*matrices)  # drawn from the seeds
        assert trainer.metrics["average_accuracy"] > 0.5
        assert "RandomResizedCrop" in str(trainer.results.hyperparameters[name])


def test_a_processor_on_torchvision_learns_what_one_on_pil_learns(make_trainer):
    size = {"height": 32, "width": 32}
    matrices = []
    for kind in (ViTImageProcessor, ViTImageProcessorPil):
        trainer = make_trainer(CONFIGS["coda"](), folder=kind.__name__, processing_class=kind(size=size))
        trainer.train()
        matrices.append(trainer.accuracy_matrix)
    np.testing.assert_allclose(*matrices, atol=0.05)


def test_images_on_torchvision_are_kept_as_bytes_or_refused(make_trainer, tmp_path):
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    trainer = make_trainer(CONFIGS["coda"](), processing_class=processor)
    transform = trainer._transforms[False]
    pictures = [example["image"] for example in trainer.scenario[0].train]
    assert transform.has_bytes
    torch.testing.assert_close(transform.from_bytes(transform.to_bytes(pictures)), transform(pictures))
