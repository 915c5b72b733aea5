"""What a model takes images for, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .reliability.experts import expert_tasks
from .scenarios import ImageTransform


@dataclass(frozen=True)
class Prediction:
    """What an image is taken for.

    Attributes:
        names: Names of the most probable classes, the best first.
        probabilities: The model's probability of each of them; over all classes learnt they sum to 1.
        task: Number of the task, from 0, that brought the best class; `None` where no task did (a stream).
        expert_task: Number of the task whose prompts the keys chose, whatever the head predicts; `None` where rows of
            the pool say no task (`peft_cl.reliability.expert_tasks`).
        abstains: Whether the best class is less probable than the threshold that was asked for, so that the names are
            guesses.
    """

    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    task: int | None
    expert_task: int | None = None
    abstains: bool = False


@torch.no_grad()
def classify(
    model: Any,
    images: Sequence[Image.Image],
    processor: Any,
    top_k: int = 1,
    task_ids: Sequence[int] | None = None,
    abstain_below: float | None = None,
) -> list[Prediction]:
    """Say what a model takes images for: names, and no rows of its head.

    A model's outputs, and the `predictions` of `ContinualTrainer.predict`, are rows of the head, in the order in which
    classes were learnt. They are not the label ids of a data set, whose order is another. Names are the same in both.

    Args:
        model: A `PeftModel` with one of this library's adapters, which has learnt classes.
        images: PIL images of any size and mode.
        processor: The image processor that the adapter was learnt with (`AutoImageProcessor.from_pretrained(folder)`).
        top_k: Number of classes to name for each image; all of them where there are fewer.
        task_ids: The task of each image, where it is known: only the task's classes are in question then.
        abstain_below: A prediction whose best probability is below it `abstains`, above 0 and below 1; `None`: none
            does. `peft_cl.reliability.threshold_for_accuracy` finds one on held-out images.

    Returns:
        A `Prediction` for each image, in order.

    Raises:
        ValueError: The adapter has learnt no classes, `top_k` is less than 1, or another `abstain_below`.

    Example:
        ```python
        >>> model = PeftModel.from_pretrained(base, "out").eval()
        >>> classify(model, [Image.open("cat.jpg")], AutoImageProcessor.from_pretrained("out"))[0].names
        ('cat',)
        ```
    """
    config = model.peft_config[model.active_adapter]
    classes = list(config.classes or ()) if config.tasks else []
    if not classes:
        raise ValueError("The adapter has learnt no classes yet, so it takes images for nothing. Train it first.")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, but must be at least 1.")
    if abstain_below is not None and not 0 < abstain_below < 1:
        raise ValueError(f"abstain_below is {abstain_below}, but must be above 0 and below 1, such as 0.5.")
    if not images:
        return []
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        pixels = ImageTransform(processor)(list(images)).to(device)
        known = None if task_ids is None else torch.as_tensor(task_ids, device=device)
        logits = model(pixels, task_ids=known).logits.float()
        experts = expert_tasks(model.base_model)
    finally:
        model.train(was_training)
    # Of classes that are out of the question nothing is said.
    in_question = int((~logits.isneginf()).sum(-1).min())
    probabilities, rows = logits.softmax(-1).topk(min(top_k, in_question))
    task_of = {} if config.stream else {row: task for task, of_task in enumerate(config.tasks) for row in of_task}
    chosen = [None] * len(rows) if experts is None else experts.tolist()
    return [
        Prediction(
            names=tuple(classes[row] for row in best),
            probabilities=tuple(values),
            task=task_of.get(best[0]),
            expert_task=expert,
            abstains=abstain_below is not None and values[0] < abstain_below,
        )
        for best, values, expert in zip(rows.tolist(), probabilities.tolist(), chosen, strict=True)
    ]
