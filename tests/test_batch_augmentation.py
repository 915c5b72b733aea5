"""Augmentations of batches: what mixes images is told before training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_cl import LinearProbeConfig


def mixup(pixels, lam=0.3):
    return lam * pixels + (1 - lam) * pixels[torch.randperm(len(pixels))]


def cutmix(pixels):
    mixed = pixels.clone()
    mixed[..., 4:20, 4:20] = pixels[torch.randperm(len(pixels))][..., 4:20, 4:20]
    return mixed


def seldom(pixels):
    return mixup(pixels) if torch.rand(()) < 0.5 else pixels


def rolled(pixels):
    return 0.5 * pixels + 0.5 * pixels.roll(1, 0)


def in_place(pixels):
    pixels.mul_(0.5).add_(0.5 * pixels.flip(0))
    return pixels


OWN = np.random.default_rng(0)


def own_generator(pixels):
    return mixup(pixels, lam=OWN.uniform(0.2, 0.8))


@pytest.mark.parametrize("function", [mixup, cutmix, seldom, rolled, in_place, own_generator])
def test_mixed_images_are_refused(function, make_trainer):
    with pytest.raises(ValueError, match="batch_augmentation mixes images.*Leave out what mixes"):
        make_trainer(LinearProbeConfig(), batch_augmentation=function)


def flipped(pixels):
    return torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)


def brightened(pixels):
    return pixels * (0.5 + torch.rand(len(pixels), 3, 1, 1)) + torch.randn(len(pixels), 1, 1, 1)


def noisy(pixels):  # of a generator that does not repeat
    return pixels + torch.from_numpy(OWN.normal(0, 0.1, tuple(pixels.shape))).float()


@pytest.mark.parametrize("function", [flipped, brightened, noisy, torch.nn.Identity()])
def test_each_image_by_itself_is_fine(function, make_trainer):
    make_trainer(LinearProbeConfig(), batch_augmentation=function, num_train_epochs=1).train()


def test_the_trial_leaves_the_random_state_alone(make_trainer):
    states = []
    for function in (None, flipped):
        make_trainer(LinearProbeConfig(), batch_augmentation=function)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_what_needs_labels_fails_before_training(make_trainer):
    def torchvision_like(*inputs):
        if len(inputs) < 2:
            raise ValueError("Could not infer where the labels are in the sample.")

    with pytest.raises(ValueError, match=r"batch_augmentation fails on a batch: ValueError: Could not infer.*MixUp"):
        make_trainer(LinearProbeConfig(), batch_augmentation=torchvision_like)
