"""From the examples of a data set to a batch for the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image


# What an example may bring beside its image and its label.
BESIDE = ("query", "task_ids", "place")


class ContinualCollator:
    """Makes a batch for the model out of a scenario's examples, with the labels in the order of the model's outputs.

    Set `remove_unused_columns=False` in the training arguments: the Trainer would remove the image column otherwise.

    Args:
        transform: Callable from a list of PIL images to `pixel_values`, such as `ImageTransform`.
        label_index: `scenario.label_index()`: the model's label of each label id, -1 for classes left out.
        image_column: Column of the images.
        label_column: Column of the labels: ids, or class names if `label_names` is given.
        label_names: `scenario.label_names`, for data sets with class names as labels and for error messages.
        unlabelled: Whether the examples are to be predicted only: their labels are left alone, if they have any.

    Raises:
        ValueError: `label_index` and `label_names` differ in length.

    Example:
        >>> collator = ContinualCollator(transform, scenario.label_index(), "image", "label")
        >>> batch = collator([scenario[0].train[row] for row in range(8)])
        >>> batch["pixel_values"].shape, batch["labels"].dtype
        (torch.Size([8, 3, 224, 224]), torch.int64)
    """

    def __init__(
        self,
        transform: Callable[[list[Image.Image]], torch.Tensor],
        label_index: np.ndarray | Sequence[int],
        image_column: str = "image",
        label_column: str = "label",
        *,
        label_names: Sequence[str] | None = None,
        unlabelled: bool = False,
    ) -> None:
        self.unlabelled = unlabelled
        self.transform = transform
        self.label_index = [int(position) for position in label_index]
        self.image_column = image_column
        self.label_column = label_column
        if label_names is not None and len(label_names) != len(self.label_index):
            raise ValueError(
                f"label_index has {len(self.label_index)} entries but label_names {len(label_names)}; "
                "take both from the same scenario."
            )
        self.label_names = None if label_names is None else tuple(label_names)
        self._id_of_name = {name: label for label, name in enumerate(self.label_names or ())}

    def __call__(self, examples: Sequence[Mapping[str, Any]] | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the batch.

        Args:
            examples: one mapping for each; or one of tensors for all, with `image_bytes` (`ImageTransform.to_bytes`)
                in the place of images and with `model_label`.

        Returns:
            `pixel_values`, as the transform gives them, `labels`, int64 of shape (examples,), unless unlabelled, and
            `query`, `task_ids` and `place`, stacked, if the examples bring them. Examples that bring a `model_label`
            have the model's own; a `draw` is the seed of the example's augmentation. `image_bytes` stay bytes, a
            quarter of the pixels' size on the way to a device, where `ImageTransform.from_bytes` makes pixels of them.

        Raises:
            ValueError: A column is missing, or a label is not among the classes of the scenario.
        """
        if isinstance(examples, Mapping):
            batch = {"image_bytes": examples["image_bytes"], "labels": examples["model_label"]}
            return {**batch, **{name: examples[name] for name in BESIDE if name in examples}}
        labelled = bool(examples) and "model_label" in examples[0]
        columns = (self.image_column,) if labelled or self.unlabelled else (self.image_column, self.label_column)
        for column in columns:
            if examples and column not in examples[0]:
                raise ValueError(
                    f"The examples have the columns {list(examples[0])}, but not {column!r}. Give data that has it, "
                    f"or call it so by rename_column; a Trainer of your own keeps it with remove_unused_columns=False."
                )
        images = [example[self.image_column] for example in examples]
        if examples and "draw" in examples[0]:
            pixel_values = self.transform(images, [example["draw"] for example in examples])
        else:
            pixel_values = self.transform(images)
        batch = {"pixel_values": pixel_values}
        if not self.unlabelled:
            labels = [
                example["model_label"] if labelled else self._label(example[self.label_column]) for example in examples
            ]
            batch["labels"] = torch.tensor([int(label) for label in labels], dtype=torch.int64)
        for name in BESIDE:
            if examples and name in examples[0]:
                batch[name] = torch.stack([example[name] for example in examples])
        return batch

    def _label(self, label: str | int) -> int:
        if isinstance(label, str):
            if self.label_names is None:
                raise ValueError(
                    f"The example's label is the name {label!r}, but the collator only knows label ids; "
                    "give ContinualCollator(label_names=scenario.label_names)."
                )
            known = self._id_of_name.get(label, -1)
        else:
            known = int(label)
        # A negative id would count from the end of the list: it must not reach it.
        position = self.label_index[known] if 0 <= known < len(self.label_index) else -1
        if position < 0:
            named = "" if isinstance(label, str) or not self.label_names else f" ({self._name(known)})"
            raise ValueError(
                f"The label {label!r}{named} in {self.label_column!r} is not among the "
                f"{sum(position >= 0 for position in self.label_index)} classes of the scenario; "
                "use the tasks' own data, or make the scenario with this class."
            )
        return position

    def _name(self, label: int) -> str:
        return repr(self.label_names[label]) if 0 <= label < len(self.label_names) else "no such class"
