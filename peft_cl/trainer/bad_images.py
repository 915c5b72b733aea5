"""Images that cannot be read: named by task, split, row and file, looked for before training, passed over."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers.utils import logging

from ..scenarios import Scenario
from ..scenarios.overlap import StoredImages
from ..scenarios.pixels import RANGES, WHITE_VALUE, white_of
from ..text import counted
from .examples import has_transform


logger = logging.get_logger(__name__)
#: What `bad_images` may be.
STOP, CHECK, PASS_OVER = CHOICES = ("stop", "check", "pass_over")
#: Bad images that are named in a message; the record names more.
NAMED, RECORDED = 5, 100
#: Images of a task that stand for all of them.
LOOKED_AT = 16
#: Values up to this share of the range are more likely those of fewer bits: 12 of 16.
FEWER_BITS = 1 / 16


class BadImageError(ValueError):
    """An image cannot be read; the message names task, split, row and file."""


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be read.

    Attributes:
        task: Name of its task, `None` where it has none.
        split: `"train"` or `"test"`.
        row: Row in the task's split.
        file: Its file, or the name that the data set has for it; `None` without one.
        reason: What is wrong with it.
    """

    task: str | None
    split: str
    row: int
    file: str | None
    reason: str

    def __str__(self) -> str:
        named = f" ({self.file})" if self.file else ""
        task = f"task {self.task!r}, " if self.task else ""
        return f"{task}{self.split} split, row {self.row}{named}: {self.reason}"


@dataclass(frozen=True)
class ImageReader:
    """Reads examples with their images as RGB, and says which image cannot be read.

    Args:
        column: Column of the images.
        to_rgb: From an image of any mode to RGB.
        remedy: What a user can do about an image that cannot be read.
        rows: What the rows are called; `None`: by their numbers.
    """

    column: str
    to_rgb: Callable[[Image.Image], Image.Image]
    remedy: str = (
        "Mend the file or remove it from the data, and go on with the run by resuming it. Or set bad_images, of the "
        f"training arguments, to {PASS_OVER!r} to leave such images out, or to {CHECK!r} to find all before training."
    )
    rows: Sequence[int] | None = None

    def read(self, data: Dataset, rows: Sequence[int], task: str | None, split: str) -> list[dict[str, Any]]:
        """The examples of `data`, which is the `split` of `task`.

        Raises:
            BadImageError: An image cannot be read.
        """
        try:
            return [self._as_rgb(example) for example in data.__getitems__(list(rows))]
        except Exception as error:  # what a decoder may raise has no end
            for row in rows:
                bad = self.look_at(data, row, task, split)
                if bad is not None:
                    raise BadImageError(f"An image cannot be read. {bad}. {self.remedy}") from error
            raise

    def look_at(self, data: Dataset, row: int, task: str | None, split: str) -> BadImage | None:
        """What is wrong with the image of an example, `None`: nothing."""
        try:
            self._as_rgb(data.__getitems__([row])[0])
            return None
        except Exception as error:
            stored = StoredImages.of(data, self.column)
            number = row if self.rows is None else int(self.rows[row])
            return BadImage(task, split, number, stored and stored.path(row), _reason(error, stored, row))

    def bad_ones(self, scenario: Scenario) -> Iterator[tuple[int, str, int, BadImage]]:
        """All images of the scenario's tasks that cannot be read, with the number of the task, split and row in it."""
        for task in scenario:
            for split in ("train", "test"):
                data = getattr(task, split)
                if not has_transform(data) and self.column in data.column_names:
                    data = data.select_columns([self.column])
                for row in range(len(data)):
                    bad = self.look_at(data, row, task.name, split)
                    if bad is not None:
                        yield task.index, split, row, bad

    def _as_rgb(self, example: dict[str, Any]) -> dict[str, Any]:
        image = example.get(self.column)
        if image is None and self.column in example:
            raise ValueError("there is no image (None)")
        return {**example, self.column: self.to_rgb(image)} if isinstance(image, Image.Image) else example


def _reason(error: Exception, stored: StoredImages | None, row: int) -> str:
    """What is wrong, in words: PIL names an object in memory, or says that it cannot identify it."""
    if isinstance(error, Image.DecompressionBombError):
        return f"{str(error).split(', could')[0]}; a larger limit is PIL.Image.MAX_IMAGE_PIXELS"
    if stored is not None:
        if stored.is_missing(row):
            return "there is no image (None)"
        file = stored.file(row)
        if file is not None and "://" not in file and not os.path.isfile(file):
            return "there is no such file"
        if not len(stored.content(row)):
            return "it has 0 bytes"
    if isinstance(error, Image.UnidentifiedImageError):
        return "its bytes are no image that Pillow knows"
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")


def mended(scenario: Scenario, reader: ImageReader, choice: str) -> tuple[Scenario, list[BadImage]]:
    """The scenario without images that cannot be read, and these, as `bad_images` asks for it.

    Raises:
        ValueError: There are some, which are not to be passed over, or a task or class would be left without images.
    """
    if choice == STOP:
        return scenario, []
    found = list(reader.bad_ones(scenario))
    if not found:
        return scenario, []
    bad = [each for *_, each in found]
    listed = f"{'; '.join(map(str, bad[:NAMED]))}{'; ...' if len(bad) > NAMED else ''}"
    if choice == CHECK:
        raise BadImageError(
            f"{counted(len(bad), 'image')} cannot be read. {listed}. Mend the files or remove them from the data, "
            f"or set bad_images={PASS_OVER!r} to leave them out."
        )
    logger.warning("%s cannot be read and passed over. %s.", counted(len(bad), "image"), listed)
    tasks = []
    for task in scenario:
        kept = {}
        for split in ("train", "test"):
            data = getattr(task, split)
            rows = [row for index, where, row, _ in found if (index, where) == (task.index, split)]
            kept[split] = data.select(np.setdiff1d(np.arange(len(data)), rows)) if rows else data
            if not len(kept[split]):
                raise BadImageError(
                    f"None of the {len(data):,} {split} images of task {task.name!r} can be read: {listed}. Mend them."
                )
        tasks.append(replace(task, **kept))
    return scenario.changed(tasks), bad


def recorded(bad: Sequence[BadImage]) -> dict[str, Any]:
    """Images that were passed over, in types that JSON knows."""
    return {"count": len(bad), "images": [vars(each) for each in bad[:RECORDED]]}


def check_range(scenario: Scenario, reader: ImageReader, white: float | None) -> None:
    """Refuse images of more than 8 bits that would come out nearly black, or each in a range of its own.

    Raises:
        ValueError: So they would; the message says how to set what is white.
    """
    if white is not None:
        return
    seen: dict[float, float] = {}
    data = scenario[0].train
    stored = StoredImages.of(data, reader.column)
    rows = [] if stored is None else np.unique(np.linspace(0, len(data) - 1, LOOKED_AT).astype(int))
    for row in rows:
        try:
            with Image.open(io.BytesIO(stored.content(row))) as image:  # reads the mode alone
                if image.mode not in RANGES:
                    return
                image.load()
                top, high = white_of(image), float(np.max(np.asarray(image)))
        except Exception:  # a bad image is said where it is read
            continue
        seen[top] = max(seen.get(top, 0), high)
    how = f"{WHITE_VALUE}=... of the image processor (processor.{WHITE_VALUE} in a configuration)"
    if len(seen) > 1:
        raise ValueError(
            f"Training images of task {scenario[0].name!r} have values up to {sorted(seen.values())}, of which some "
            f"would be scaled by {', '.join(f'{top:g}' for top in sorted(seen))}. Say what is white for all of them: "
            f"{how}, such as {WHITE_VALUE}={max(seen):g}."
        )
    for top, high in seen.items():
        if top > 255 and high <= top * FEWER_BITS:
            bits = max(1, int(high)).bit_length()
            raise ValueError(
                f"Training images of task {scenario[0].name!r} have no value above {high:g} of {top:g}, so they would "
                f"be nearly black. Say what is white: {how}, {WHITE_VALUE}={2**bits - 1} for {bits} bits, or "
                f"{WHITE_VALUE}={top:g} if they are as dark as that."
            )
