"""Images decoded and scaled once, kept as bytes in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..scenarios import ImageTransform
from .bad_images import ImageReader
from .tensor_files import TensorFiles


#: Images decoded at a time.
CHUNK = 256
UNNAMED = ("given", "given")


class ImageCache:
    """The images of a data set as the image processor scales them, (examples, 3, H, W) uint8, mapped into memory.

    What the processor does to an image after that is a number for each of 256 values, which a table holds: a step
    needs no Python for each image.

    Args:
        folder: where files are kept.
        transform: from un-augmented images to pixels.
        image_column: column of the images.

    Raises:
        ValueError: The processor's values are not bytes mapped one by one.
    """

    def __init__(self, folder: str | Path, transform: ImageTransform, image_column: str):
        processor = transform.processor
        if not transform.has_bytes:
            raise ValueError(
                f"image_cache_dir is {str(folder)!r}, but what {type(processor).__name__} makes of an image is not "
                "its scaled bytes with a number for each value. Leave image_cache_dir out."
            )
        self.transform = transform
        self.reader = ImageReader(image_column, transform.to_rgb)
        self.files = TensorFiles(folder, "images", image_column)
        settings = processor.to_dict() if hasattr(processor, "to_dict") else repr(processor)
        self.settings: dict[str, Any] = {
            "processor": [type(processor).__name__, settings, transform.digest],
            "size": transform.output_size,
        }
        #: By identity, the name of a data set's task and its split, which a message about an image has.
        self.names: dict[int, tuple[str, str]] = {}
        self._images: dict[int, tuple[Dataset, torch.Tensor]] = {}

    def of(self, data: Dataset) -> torch.Tensor:
        """The images of `data`, in order."""
        if id(data) not in self._images:
            self._images[id(data)] = data, self.files.of(data, self.settings, lambda: self._decoded(data))
        return self._images[id(data)][1]

    def take(self, part: Dataset, whole: Dataset, rows: Sequence[int]) -> None:
        """`part` is `whole.select(rows)`: its images are among those, and need no file of their own."""
        was_held = id(whole) in self._images
        self._images[id(part)] = part, self.of(whole)[torch.as_tensor(rows)]
        if not was_held:
            self.forget(whole)

    def forget(self, data: Dataset) -> None:
        """Let go of the images of `data`; their file stays."""
        self._images.pop(id(data), None)

    def _decoded(self, data: Dataset) -> torch.Tensor:
        images = torch.empty(len(data), 3, *self.transform.output_size, dtype=torch.uint8)
        for first in range(0, len(data), CHUNK):
            rows = self.reader.read(
                data, range(first, min(first + CHUNK, len(data))), *self.names.get(id(data), UNNAMED)
            )
            images[first : first + CHUNK] = self.transform.to_bytes([row[self.reader.column] for row in rows])
        return images
