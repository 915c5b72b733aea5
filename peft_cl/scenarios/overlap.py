"""Test images that are training images too: the same file, or the same bytes."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset
from PIL import Image as PillowImage

from .columns import Labels, find_image_column, only_trained, read_labels, train_and_test


#: Share of the test images up to which equal bytes are the odd duplicate of a public data set, and no fault of layout.
FEW = 0.01
#: Images that are named in a message.
NAMED = 3
#: Bytes at the end of an image that are compared before all of them.
TAIL = 64
#: Images of a split of which a digest reads more than the size.
TAILS_READ = 100_000


@dataclass(frozen=True)
class StoredImages:
    """A column of images as the data set stores it; nothing is copied or decoded.

    Attributes:
        chunks: The column's (bytes, path) chunks.
        ends: Row of the table where each chunk ends.
        rows: Row of the table of each example.
    """

    chunks: list[tuple[pyarrow.Array, pyarrow.Array]]
    ends: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, data: Dataset, column: str) -> StoredImages | None:
        """The column's images; `None` if it does not store images (a transform makes them)."""
        if column not in data.column_names:
            return None
        stored = data.data.column(column)
        if not pyarrow.types.is_struct(stored.type):
            return None
        chunks = [
            tuple(pyarrow.compute.struct_field(chunk, name) for name in ("bytes", "path")) for chunk in stored.chunks
        ]
        ends = np.cumsum([len(content) for content, _ in chunks])
        rows = np.arange(len(data)) if data._indices is None else data._indices.column(0).to_numpy()
        return cls(chunks, ends, rows)

    def sizes(self) -> np.ndarray:
        """Bytes of each example's image, int64, -1 where there is none to read."""
        inside = [pyarrow.compute.binary_length(content).to_numpy(zero_copy_only=False) for content, _ in self.chunks]
        sizes = np.nan_to_num(np.concatenate(inside).astype(np.float64), nan=-1).astype(np.int64)[self.rows]
        for example in np.flatnonzero(sizes < 0):
            sizes[example] = _size(self.path(example))
        return sizes

    def is_missing(self, example: int) -> bool:
        """Whether the data set has neither bytes nor a name for it."""
        chunk, place = self._place(example)
        return not self.chunks[chunk][0][place].is_valid and self.path(example) is None

    def path(self, example: int) -> str | None:
        chunk, place = self._place(example)
        return self.chunks[chunk][1][place].as_py()

    def file(self, example: int) -> str | None:
        """The file outside of the data set that is the image; `None` if its bytes lie inside."""
        chunk, place = self._place(example)
        return None if self.chunks[chunk][0][place].is_valid else self.path(example)

    def content(self, example: int) -> memoryview | bytes:
        """The image's bytes; none where they cannot be read."""
        chunk, place = self._place(example)
        content = self.chunks[chunk][0][place]
        if content.is_valid:
            return memoryview(content.as_buffer())
        try:
            with open(self.path(example), "rb") as file:
                return file.read()
        except (OSError, TypeError, ValueError):
            return b""

    def tail(self, example: int) -> bytes:
        """Its last bytes."""
        file = self.file(example)
        if file is None:
            return bytes(self.content(example)[-TAIL:])
        try:
            with open(file, "rb") as opened:
                opened.seek(-min(TAIL, os.path.getsize(file)), os.SEEK_END)
                return opened.read()
        except (OSError, ValueError):
            return b""

    def _place(self, example: int) -> tuple[int, int]:
        row = int(self.rows[example])
        chunk = int(np.searchsorted(self.ends, row, side="right"))
        return chunk, row - (int(self.ends[chunk - 1]) if chunk else 0)


def splits_with_images(
    dataset: Any, train_split: str, test_split: str, image_column: str | None
) -> tuple[Dataset, Dataset, str]:
    """Returns the train and the test split, which have no image in common, and the column of their images.

    Args:
        dataset, train_split, test_split: As for `train_and_test`.
        image_column: As for `find_image_column`.

    Raises:
        ValueError, TypeError: As these, and for images that both splits have.

    Warns:
        UserWarning: A few training images equal test images to the byte, and are left out of training.
    """
    train, test = train_and_test(dataset, train_split, test_split)
    image_column = find_image_column(train, test, image_column)
    return without_test_images(train, test, image_column), test, image_column


def whole_data(
    dataset: Any,
    label_column: str,
    image_column: str | None,
    columns: tuple[str, str],
    train_split: str,
    test_split: str,
) -> tuple[Labels, Dataset, Dataset]:
    """Returns the labels of a data set that becomes one task, and its splits with the image and label column alone.

    Args:
        dataset, train_split, test_split: As for `train_and_test`.
        label_column, image_column: The data set's, as for `read_labels` and `find_image_column`.
        columns: What the image and the label column are called from now on.
    """
    train, test, image_column = splits_with_images(dataset, train_split, test_split, image_column)
    labels = read_labels(train, test, label_column)
    test = only_trained(test, labels)
    renamed = {old: new for old, new in zip((image_column, label_column), columns, strict=True) if old != new}
    train, test = (
        split.select_columns([image_column, label_column]).rename_columns(renamed) for split in (train, test)
    )
    return labels, train, test


def without_test_images(train: Dataset, test: Dataset, image_column: str) -> Dataset:
    """Returns the training examples whose images are not test images too.

    Images are compared as they are stored: by their files' names, and by their bytes. Images of one colour are equal
    by chance and are not counted, unless they are one file.

    Raises:
        ValueError: The splits have a file in common, or equal bytes in more than 1% of the test images.

    Warns:
        UserWarning: Equal bytes in fewer, which are left out of training.
    """
    stored = StoredImages.of(train, image_column), StoredImages.of(test, image_column)
    if None in stored:
        return train
    images = dict(zip(("train", "test"), stored, strict=True))
    _refuse_same_files(images)
    shared = list(_equal_bytes(images))
    if not shared:
        return train
    training, tested = (sorted({pair[side] for pair in shared}) for side in (0, 1))
    what = f"{len(tested):,} of {len(test):,} test images are training images too, to the byte"
    names = [name for name in (images["test"].path(row) for row in tested[:NAMED]) if name]
    named = f" ({', '.join(names)}{', ...' if len(tested) > NAMED else ''})" if names else f" (rows {tested[:NAMED]})"
    if len(tested) > FEW * len(test):
        raise ValueError(
            f"{what}{named}, so the model would be measured on what it was trained on. Remove them from one of the "
            "splits, or divide one split by train_test_split(), in a configuration by dataset.test_fraction."
        )
    warnings.warn(
        f"{what}{named}: {len(training):,} training images are left out. Remove them by select() to say so yourself.",
        stacklevel=4,
    )
    return train.select(np.setdiff1d(np.arange(len(train)), training))


def digest_of_images(parts: Sequence[Dataset], image_column: str) -> str | None:
    """Returns a short digest of the images of data sets, the same for any order of them and any place of their files;
    of more than 100,000 images their sizes alone are read. `None` where they are not stored."""
    facts = []
    for data in parts:
        stored = StoredImages.of(data, image_column)
        if stored is None:
            return None
        sizes = stored.sizes().tolist()
        few = len(sizes) <= TAILS_READ
        facts += [f"{size} {zlib.crc32(stored.tail(row)) if few else 0}" for row, size in enumerate(sizes)]
    return hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()[:8]


def _refuse_same_files(images: Mapping[str, StoredImages]) -> None:
    train, test = (
        {os.path.realpath(file): file for row in range(len(each.rows)) if (file := each.file(row))}
        for each in images.values()
    )
    same = [name for real, name in test.items() if real in train]
    if not same:
        return
    folders = list(dict.fromkeys(str(PurePath(name).parent) for name in same))
    raise ValueError(
        f"{len(same):,} of {len(test):,} test images are training images too, the same files (in "
        f"{', '.join(folders[:NAMED])}{', ...' if len(folders) > NAMED else ''}), so the model would be measured on "
        "what it was trained on. load_dataset takes each folder with a name such as 'train' or 'test' for a split, at "
        "any depth: say which files a split has, load_dataset('imagefolder', data_files={'train': 'FOLDER/train/**', "
        "'test': 'FOLDER/test/**'}), in a configuration dataset.data_files."
    )


def _equal_bytes(images: Mapping[str, StoredImages]) -> Iterator[tuple[int, int]]:
    """Pairs (train, test) of examples whose images are equal. Sizes and last bytes leave few to be read whole."""
    sizes = [each.sizes() for each in images.values()]
    common = np.intersect1d(*sizes)
    rows = [np.flatnonzero(np.isin(own, common[common > 0])) for own in sizes]
    tails: list[dict[Any, list[int]]] = []
    for each, own, candidates in zip(images.values(), sizes, rows, strict=True):
        found: dict[Any, list[int]] = {}
        for row in candidates.tolist():
            found.setdefault((int(own[row]), each.tail(row)), []).append(row)
        tails.append(found)
    for key in tails[0].keys() & tails[1].keys():
        digests = [
            {hashlib.sha256(each.content(row)).digest(): row for row in reversed(found[key])}
            for each, found in zip(images.values(), tails, strict=True)
        ]
        for digest in digests[0].keys() & digests[1].keys():
            if _is_blank(images["test"].content(digests[1][digest])):
                continue
            equal = [
                [row for row in found[key] if hashlib.sha256(each.content(row)).digest() == digest]
                for each, found in zip(images.values(), tails, strict=True)
            ]
            yield from ((train, test) for train in equal[0] for test in equal[1])


def _is_blank(content: memoryview | bytes) -> bool:
    """Whether an image is of one colour (or is none)."""
    try:
        with PillowImage.open(io.BytesIO(content)) as image:
            extrema = image.convert("RGBA").getextrema()
    except (OSError, ValueError, SyntaxError, PillowImage.DecompressionBombError):
        return False
    return all(low == high for low, high in extrema)


def _size(path: str | None) -> int:
    try:
        return os.path.getsize(path)
    except (OSError, TypeError, ValueError):
        return -1
