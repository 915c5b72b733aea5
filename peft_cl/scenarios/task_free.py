"""Task-free learning: a stream whose classes come and go, without a boundary that anyone is told of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from .class_incremental import check_settings, class_incremental
from .columns import check_seed, is_count, is_number, plain
from .overlap import splits_with_images
from .task import Scenario, Task


def task_free(
    dataset: Mapping[str, Dataset] | tuple[Dataset, Dataset],
    num_tasks: int | None = None,
    label_column: str = "label",
    *,
    blur: float = 0.5,
    passes: int = 1,
    stream_seed: int = 0,
    **settings: Any,
) -> Scenario:
    """Makes one stream of a data set, in which groups of classes come and go on a Gaussian schedule.

    The classes are divided as by `class_incremental`. Each group is most frequent in the middle of its stretch, which
    is as long as the group has images: each of its training images comes at a moment drawn from a normal distribution
    about that, and the stream is all images in the order of their moments (after the Gaussian schedule of Shanahan et
    al. 2021, arXiv 2105.13327). No image is copied. After each stretch the groups so far are measured; the model is
    told neither groups nor stretches.

    What is not hidden is which classes there are: the head and the pool have the rows of all of them when the stream
    begins, and the result is that of such a head. A stream whose classes are not known beforehand is not of this kind.

    Args:
        dataset, num_tasks, label_column, **settings: As for `class_incremental`.
        blur: Standard deviation of a group's moments, in widths of its stretch; 0: one group after the other.
        passes: How often each image comes, each time at another moment.
        stream_seed: Draws the moments.

    Returns:
        The scenario, named `"task-free"`, without boundaries, its stretches `"task_0"`, `"task_1"`, ...; the classes
        of a stretch are those of the group that has its peak there.

    Raises:
        ValueError, TypeError: As `class_incremental`; a negative `blur` or `stream_seed`, or no pass.

    Example:
        >>> scenario = task_free(load_dataset("uoft-cs/cifar100"), 10, "fine_label", blur=0.5)    # doctest: +SKIP
        >>> scenario.boundaries                                                                   # doctest: +SKIP
        False
    """
    check_settings(task_free, settings)
    if not is_number(blur) or not 0 <= blur < np.inf:
        raise ValueError(
            f"blur is {blur!r}, but must be a number of at least 0, in widths of a stretch. Give one such as 0.5."
        )
    if not is_count(passes):
        raise ValueError(f"passes is {passes!r}, but must be a whole number of at least 1. Give 1 for one pass.")
    stream_seed = check_seed("stream_seed", stream_seed)
    where = {name: settings.pop(name, name.split("_")[0]) for name in ("train_split", "test_split")}
    train, test, image_column = splits_with_images(dataset, **where, image_column=settings.pop("image_column", None))
    groups = class_incremental((train, test), num_tasks, label_column, image_column=image_column, **settings)
    labels = Task(0, "all", groups.classes, train, train, groups.label_names)
    group_of_class = np.concatenate([np.full(len(task.classes), task.index) for task in groups])
    position = groups.model_labels(labels, "train")
    rows = np.flatnonzero(position >= 0)
    group = group_of_class[position[rows]]
    # A group has the share of the stream that it has of the images.
    sizes = np.bincount(group, minlength=len(groups))
    ends = np.cumsum(sizes)
    peaks, widths = (ends - sizes / 2) / len(rows), sizes / len(rows)
    generator = np.random.default_rng(stream_seed)
    # Noise of its own for each pass; with blur 0 the images of a group still come in random order.
    noise = generator.normal(size=(passes, len(rows)))
    moments = peaks[group] + blur * widths[group] * noise
    order = np.lexsort((generator.random(moments.size), moments.ravel()))
    stream = np.tile(rows, passes)[order]
    stretches = np.split(stream, passes * ends[:-1])
    return groups.changed(
        [replace(task, train=train.select(stretch)) for task, stretch in zip(groups, stretches, strict=True)],
        name="task-free",
        boundaries=False,
        settings={"blur": plain(blur), "passes": int(passes), "stream_seed": stream_seed},
    )
