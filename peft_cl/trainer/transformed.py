"""What a data set's own transform makes of examples, looked at before anything is trained."""

from __future__ import annotations

from PIL import Image

from ..scenarios import Scenario
from .examples import has_transform


def check_transformed(scenario: Scenario) -> None:
    """Refuse a transform of the data set (`with_transform`) that fails, or makes anything else than PIL images.

    One example of each split of each task goes through it.
    """
    for task in scenario:
        for split in ("train", "test"):
            data = getattr(task, split)
            if not has_transform(data):
                continue
            which = f"the {split} examples of task {task.name!r}"
            remedy = (
                "Have the transform make PIL images, of which the image processor makes pixels; or leave it out "
                "(with_format(None)), and give the trainer augmentation= or batch_augmentation=."
            )
            try:
                example = data[0]
            except Exception as error:  # whatever it may be, it would end the training
                raise ValueError(
                    f"The data set's transform (with_transform) fails on {which}: {type(error).__name__}: {error}. "
                    f"It is called with a dict of lists, one entry for each example. {remedy}"
                ) from error
            column = scenario.image_column
            if column not in example:
                raise ValueError(
                    f"The data set's transform (with_transform) makes the columns {list(example)} of {which}, but the "
                    f"images are needed in {column!r}. {remedy}"
                )
            if not isinstance(example[column], Image.Image):
                found = type(example[column]).__name__
                raise ValueError(
                    f"The data set's transform (with_transform) makes a {found} of {column!r} in {which}, but "
                    f"PIL images are needed. {remedy}"
                )
