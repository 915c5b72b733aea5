"""The images of a data set whose classes a saved adapter has learnt, as its model is asked about them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader, Subset

from ..scenarios import ContinualCollator, ImageTransform
from ..scenarios.columns import find_image_column, read_labels
from ..trainer.bad_images import BadImageError, ImageReader
from ..trainer.examples import TaskExamples
from .adapters import SavedAdapter
from .bars import batch_bar
from .errors import CommandError, explained, some
from .sections import DatasetSettings
from .sources import RESULTS_FILE, load_processor
from .tasks import ImageTasks, find_tasks, names_of_classes, sequence_of


@dataclass(frozen=True)
class LearntImages:
    """Images of classes that an adapter has learnt, in the data's order.

    Attributes:
        images: The images.
        collator: Makes a batch of them.
        truth: Row of the adapter's head for each image, int64, shape (images,).
        tasks: Their tasks.
        task_known: Whether the model is told the task of each image, as in a task-incremental run.
        left_out: How many images of other classes or domains the data has.
    """

    images: TaskExamples
    collator: ContinualCollator
    truth: np.ndarray
    tasks: ImageTasks
    task_known: bool
    left_out: int

    def ask(
        self,
        model: PeftModel,
        of_task: Callable[[int], PeftModel] | None,
        batch_size: int,
        answer: Callable[[torch.Tensor], torch.Tensor],
    ) -> np.ndarray:
        """What `answer` makes of the logits of all images, (images, ...), by one model or those of each task by its
        own.

        Args:
            model: The adapter on its base model.
            of_task: Gives the model of a task, where each has a network of its own.
            batch_size: Images in a batch.
            answer: What is kept of logits (B, classes): a tensor (B, ...).
        """
        count, numbers, found = len(self.truth), self.tasks.numbers, None
        # All images by one model, or those of each task by its own.
        parts = [slice(None)] if of_task is None else [numbers == number for number in np.unique(numbers)]
        try:
            for part in parts:
                own = model if of_task is None else of_task(int(numbers[part][0]))
                batches = DataLoader(
                    Subset(self.images, np.arange(count)[part].tolist()), batch_size, collate_fn=self.collator
                )
                told = numbers[part] if self.task_known else None
                answers = torch.cat([answer(logits).cpu() for logits in each_logits(own, batches, told)]).numpy()
                if found is None:
                    found = np.empty((count, *answers.shape[1:]), answers.dtype)
                found[part] = answers
        except BadImageError as error:
            raise CommandError(str(error)) from error
        return found


def learnt_images(
    model: PeftModel,
    adapter: SavedAdapter,
    examples: Dataset,
    settings: DatasetSettings,
    domain_column: str | None = None,
    task: str | None = None,
    trust_remote_code: bool = False,
    task_networks: bool = False,
) -> LearntImages:
    """Find the images whose classes the adapter has learnt, by their names; those that the classes have in the data
    sets' `task`, where it was learnt from a sequence of several.

    Args:
        task_networks: Whether the adapter holds a network for each task.

    Raises:
        CommandError: There are none, or the columns of the data cannot be used.
    """
    classes = list(adapter.config.classes or ()) if adapter.config.tasks else []
    if not classes:
        raise CommandError("The adapter has learnt no classes yet, so there is nothing to measure. Train it first.")
    with explained(f"The data set {settings.path!r} cannot be used"):
        labels = read_labels(examples, examples, settings.label_column)
        image_column = find_image_column(examples, examples, settings.image_column)
    names = names_of_classes(adapter, labels.names, task)
    index = np.array([classes.index(name) if name in classes else -1 for name in names])
    truth = index[labels.test]
    if not (truth >= 0).any():
        raise CommandError(
            f"No image of {settings.path!r} is of a class that the adapter has learnt ({some(classes)}); the classes "
            f"of {settings.label_column!r} are {some(names)}. Give another data set or --label-column"
            + (f", or --task, one of {', '.join(sequence_of(adapter))}." if sequence_of(adapter) else ".")
        )
    tasks = find_tasks(adapter, examples, truth, domain_column)
    known = np.flatnonzero((truth >= 0) & (tasks.numbers >= 0))
    place = adapter.processor or model.get_base_model().config._name_or_path
    processor = load_processor(place, trust_remote_code=trust_remote_code)
    with explained(f"The image processor of {place!r} cannot be used"):
        transform = ImageTransform(processor)
    images = TaskExamples(
        [examples.select(known)],
        {"model_label": torch.from_numpy(truth[known])},
        reader=ImageReader(image_column, transform.to_rgb, "Mend the file or remove it from the data.", known),
        names=[(task, settings.test_split)],
    )
    task_known = adapter.scenario == "task-incremental" and bool(tasks.names)
    if task_networks and not task_known:
        raise CommandError(
            f"The adapter {adapter.name!r} holds a network for each task, but the record beside it, which tells the "
            f"tasks of the classes, is missing. Put its {RESULTS_FILE} there."
        )
    return LearntImages(
        images=images,
        collator=ContinualCollator(transform, index, image_column, settings.label_column, label_names=labels.names),
        truth=truth[known],
        tasks=replace(tasks, numbers=tasks.numbers[known]),
        task_known=task_known,
        left_out=len(examples) - len(known),
    )


@torch.no_grad()
def each_logits(model: PeftModel, batches: DataLoader, tasks: np.ndarray | None) -> Iterator[torch.Tensor]:
    """Logits (B, classes) of each batch, on a GPU where there is one.

    Args:
        model: The adapter on its base model.
        batches: The images, in order.
        tasks: The task of each image, whose classes alone are in question then.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    parts = itertools.repeat(None) if tasks is None else torch.from_numpy(tasks).split(batches.batch_size)
    for batch, task_ids in zip(batch_bar(batches, "images"), parts, strict=False):  # the repetition has no end
        yield model(batch["pixel_values"].to(device), task_ids=task_ids).logits
