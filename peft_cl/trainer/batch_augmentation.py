"""A user's augmentation of batches: what it must give, tried before training and watched in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..scenarios.draws import drawn_from


#: Batches that it is tried on: one that mixes images seldom does it in none of them.
TRIALS = 16
#: Of an image among empty ones, in a trial that draws differently each time: where it shines through, images mix.
BRIGHT = 1e3


def of_that_shape(found: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """What an augmentation made of (B, C, H, W).

    Raises:
        ValueError: something else than a tensor of that shape.
    """
    if getattr(found, "shape", None) != pixel_values.shape:
        what = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(
            f"batch_augmentation makes {what} of a batch of shape {tuple(pixel_values.shape)}, but must give a "
            "tensor of that shape. Crop and scale to the backbone's size in it."
        )
    return found


@torch.no_grad()
def check_batch_augmentation(
    function: Callable[[torch.Tensor], torch.Tensor] | None, size: tuple[int, int], batch: int, device: torch.device
) -> None:
    """Try the function on batches of noise.

    Args:
        size: (height, width) of the pixels.
        batch: images in a batch of training.

    Raises:
        ValueError: it fails, gives another shape, or mixes images: an image has one class, so that what is mixed of
            two would be learnt as one of them.
    """
    if function is None:
        return
    noise = torch.randn(max(2, min(batch, 4)), 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    other = torch.cat([noise[:1].flip(-1) + 1, noise[1:]])
    bright = torch.cat([torch.full_like(noise[:1], BRIGHT), torch.zeros_like(noise[1:])])
    for seed in range(TRIALS):
        first, again, second, shining = (_tried(function, each, seed) for each in (noise, noise, other, bright))
        repeats = torch.equal(first, again)
        if not torch.equal(first[1:], second[1:]) if repeats else bool((shining[1:].abs() > BRIGHT / 100).any()):
            raise ValueError(
                "batch_augmentation mixes images: what it makes of one depends on the others in the batch, as MixUp "
                "and CutMix do. Each image has the label of one class, so mixed ones would be learnt as one of two. "
                "Leave out what mixes; what changes each image by itself may stay."
            )


def _tried(function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, seed: int) -> torch.Tensor:
    devices = [images.device] if images.is_cuda else []
    with drawn_from(seed), torch.random.fork_rng(devices):
        if devices:
            torch.cuda.manual_seed(seed)
        try:
            found = function(images.clone())
        except Exception as error:  # whatever it may be, it would end the first step
            raise ValueError(
                f"batch_augmentation fails on a batch: {type(error).__name__}: {error}. It is called with normalised "
                "pixels (B, 3, H, W) alone, and must give such. Leave out what needs labels (MixUp, CutMix) or images "
                "of another kind."
            ) from error
    return of_that_shape(found, images)
