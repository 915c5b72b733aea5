"""Fitting an adapter's temperature on held-out images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers.utils import logging

from ..backbones.modes import evaluation_mode
from .calibration import BINS, HIGHEST, LOWEST, Calibration, CalibrationMeasures, checked_logits, fit_temperature


logger = logging.get_logger(__name__)
#: What the model is told of a batch.
INPUTS = ("pixel_values", "task_ids", "query")


def calibrate(
    model: PeftModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    measure_on_half: bool = True,
    seed: int = 0,
    bins: int = BINS,
) -> Calibration:
    """Fit the temperature of a model's active adapter, and keep it in its configuration.

    In evaluation the model's logits are divided by it from then on, and `save_pretrained` saves it. Predictions stay
    the same. `begin_task` puts it back to 1.

    Args:
        model: A `PeftModel` with one of this library's adapters, which has learnt classes.
        batches: Held-out images of all classes learnt, neither training nor test images: a `DataLoader`, for instance,
            whose batches have `pixel_values` (B, C, H, W) and `labels` (B,), rows of the head as
            `model.config.label2id` has them; also `task_ids` (B,) where the tasks of images are known.
        measure_on_half: Measure on one half of the images the temperature that was fitted on the other half. False:
            measure on all images the temperature that was fitted on them, which looks a little too good.
        seed: Draws the halves.
        bins: Number of bins of the expected calibration error.

    Returns:
        The temperature, fitted on all images, and the measures before and after.

    Raises:
        ValueError: The adapter has learnt no classes, or `fit_calibration` refuses the images.

    Example:
        >>> calibration = calibrate(model, loader)                       # doctest: +SKIP
        >>> calibration.temperature, calibration.before.ece, calibration.after.ece    # doctest: +SKIP
        (1.62, 0.094, 0.021)
    """
    config = model.peft_config[model.active_adapter]
    if not config.tasks:
        raise ValueError("The adapter has learnt no classes yet, so it has no probabilities. Train it first.")
    before, config.temperature = config.temperature, 1.0
    try:
        logits, labels = _logits_of(model, batches)
        calibration = fit_calibration(logits, labels, measure_on_half=measure_on_half, seed=seed, bins=bins)
    except BaseException:
        config.temperature = before
        raise
    config.temperature = calibration.temperature
    return calibration


def fit_calibration(
    logits: Any, labels: Any, *, measure_on_half: bool = True, seed: int = 0, bins: int = BINS
) -> Calibration:
    """Fit a temperature on logits, and measure without and with it.

    A temperature is one number, but on the images that it was fitted on it still looks a little better than on others.
    So one half of the images of each class is measured with a temperature fitted on the other half. The temperature
    that is returned is fitted on all images, as each makes it surer.

    Where all images are predicted right, they say nothing of the errors to come: the smaller the temperature, the
    likelier they are. It stays 1 then, with a warning.

    Args:
        logits: (images, classes) of held-out images, at the temperature 1.
        labels: (images,), rows of the head.
        measure_on_half, seed, bins: as `calibrate` has them.

    Raises:
        ValueError: as `fit_temperature`; a single image cannot be halved.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> scores = rng.normal(size=(5000, 10))
        >>> labels = (scores + rng.gumbel(size=scores.shape)).argmax(-1)  # drawn from softmax(scores)
        >>> round(fit_calibration(3 * scores, labels).temperature, 1)  # logits that are three times too sure
        3.0
    """
    logits, labels = checked_logits(logits, labels)
    temperature, measured, used = _unless_all_right(logits, labels), slice(None), None
    if measure_on_half:
        if len(labels) < 2:
            raise ValueError(
                "There is 1 held-out image, but measure_on_half is True, and one image has no halves. Give more "
                "images, or set measure_on_half to False."
            )
        half = half_of_each_class(labels, seed)
        measured, used = ~half, _unless_all_right(logits[half], labels[half])
    if _all_right(logits, labels):
        logger.warning(
            "All %d held-out images are predicted right, which says nothing of how often others will be: the "
            "temperature stays 1. Give more images, on which the model makes some errors.",
            len(labels),
        )
    elif temperature in (LOWEST, HIGHEST):
        logger.warning(
            "The temperature is %s, the end of its range: for these %d held-out images the likelihood has no maximum "
            "within it. Give more images, and make sure that their labels are rows of the head.",
            temperature,
            len(labels),
        )
    before, after = (
        CalibrationMeasures.of(logits[measured], labels[measured], each, bins) for each in (1.0, used or temperature)
    )
    return Calibration(temperature, before, after, len(labels))


def _unless_all_right(logits: np.ndarray, labels: np.ndarray) -> float:
    return 1.0 if _all_right(logits, labels) else fit_temperature(logits, labels)


def _all_right(logits: np.ndarray, labels: np.ndarray) -> bool:
    return bool((logits.argmax(-1) == labels).all())


def half_of_each_class(labels: np.ndarray, seed: int) -> np.ndarray:
    """Draw half of the images of each class; classes with an odd number give the odd image to both halves in turn.

    Args:
        labels: (images,).
        seed: Draws them.

    Returns:
        Boolean (images,): which are drawn.
    """
    order = np.lexsort((np.random.default_rng(seed).random(len(labels)), labels))  # by class, in a drawn order
    drawn = np.zeros(len(labels), dtype=bool)
    drawn[order[::2]] = True
    return drawn


@torch.no_grad()
def _logits_of(model: PeftModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (images, classes) in float32 and labels (images,) of all batches, in evaluation mode."""
    device, logits, labels = next(model.parameters()).device, [], []
    with evaluation_mode(model):
        for batch in batches:
            if not {"pixel_values", "labels"} <= batch.keys():
                raise ValueError(
                    f"A batch has {', '.join(batch)}, but must have pixel_values and labels. Give both by name, as a "
                    "DataLoader of a trainer does."
                )
            inputs = {name: torch.as_tensor(batch[name]).to(device) for name in INPUTS if name in batch}
            logits.append(model(**inputs).logits.float().cpu())
            labels.append(torch.as_tensor(batch["labels"]).cpu())
    if not logits:
        raise ValueError("There are no held-out images: batches is empty. Give a list of batches, or a DataLoader.")
    return torch.cat(logits), torch.cat(labels)
