"""Splits and columns of a data set: found, checked, and read without decoding an image."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, Image, LargeList, List, NamedSplit, Value
from datasets.data_files import SPLIT_KEYWORDS


# Integer labels become positions in a table of names, so an identifier of a billion is refused, not allocated.
LARGEST_INTEGER_LABEL = 1_000_000
#: How load_dataset finds classes in folders of images.
LAYOUT = (
    "load_dataset takes the folders of images for their classes where all lie at one depth: FOLDER/train/cat/1.jpg "
    "and FOLDER/test/cat/2.jpg, or FOLDER/cat/1.jpg"
)
SPLIT_NAMES = {name for names in SPLIT_KEYWORDS.values() for name in names}
#: What the model reads.
PIXELS = "pixel_values"


@dataclass(frozen=True)
class Labels:
    """The labels of both splits.

    Attributes:
        names: Class name of each label id.
        train: Label ids of the train split, int64, shape (number of train examples,).
        test: Label ids of the test split, likewise.
        declared: Whether the data set itself lists the names (`ClassLabel`), so that a name may have no examples.
    """

    names: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray
    declared: bool

    def trained(self) -> tuple[str, ...]:
        """Returns the names of the classes with training examples."""
        return tuple(self.names[label] for label in np.unique(self.train))


def train_and_test(dataset: Any, train_split: str, test_split: str) -> tuple[Dataset, Dataset]:
    """Returns the train and the test split of a `DatasetDict`, a dict of splits or a (train, test) pair.

    Raises:
        ValueError: A split is missing or empty, both are the same, or a split's name is none.
        TypeError: Something else than these, or splits that are streamed.
    """
    for argument, name in (("train_split", train_split), ("test_split", test_split)):
        if not isinstance(name, (str, NamedSplit)):
            raise ValueError(f"{argument} is {name!r}, but must be the name of a split, such as 'train'. Give one.")
    if isinstance(dataset, Mapping):
        if train_split == test_split:
            raise ValueError(
                f"train_split and test_split are both {train_split!r}, so the model would be measured on what it was "
                "trained on. Name two splits, or divide one by train_test_split()."
            )
        for split in (train_split, test_split):
            if split not in dataset:
                raise ValueError(
                    f"There is no split {split!r} in the data set; its splits are {list(dataset)}. "
                    "Name the ones to use by train_split= and test_split=, or make one by train_test_split()."
                )
        pair = (dataset[train_split], dataset[test_split])
    elif isinstance(dataset, (tuple, list)) and len(dataset) == 2:
        pair = (dataset[0], dataset[1])
    else:
        raise TypeError(
            f"A scenario needs a train and a test split, got one {type(dataset).__name__}; "
            "pass a DatasetDict (load_dataset without split=) or a pair (train, test)."
        )
    for name, split in zip((train_split, test_split), pair, strict=True):
        require_examples(split, name)
    # Loaded twice from files it is two objects, of one fingerprint.
    if pair[0] is pair[1] or (pair[0].cache_files and pair[0]._fingerprint == pair[1]._fingerprint):
        raise ValueError(
            "The train and the test split are the very same data, so the model would be measured on what it was "
            "trained on. Give two splits, or divide one by train_test_split()."
        )
    return pair


def require_examples(split: Any, name: str) -> None:
    """Refuses a split that is no `Dataset`, or an empty one."""
    if not isinstance(split, Dataset):
        raise TypeError(
            f"The {name!r} split is a {type(split).__name__}, but tasks are selected by row and need a "
            "datasets.Dataset; load it without streaming=True, or convert it (Dataset.from_dict, from_generator)."
        )
    if len(split) == 0:
        raise ValueError(f"The {name!r} split has no examples; every task needs some. Give another split.")


def require_column(splits: Mapping[str, Dataset], column: str, argument: str) -> None:
    """Refuses splits, by name, without the column that the user gave as `argument`."""
    for name, split in splits.items():
        if column not in split.column_names and all(isinstance(each, Image) for each in split.features.values()):
            raise ValueError(
                f"There is no column {column!r} in the {name} split; its columns are {split.column_names}, so nothing "
                f"says what the images show. {LAYOUT}; or make one by add_column({column!r}, names)."
            )
        if column not in split.column_names:
            raise ValueError(
                f"There is no column {column!r} in the {name} split; its columns are {split.column_names}. "
                f"Name the one to use by {argument}=."
            )


def find_image_column(train: Dataset, test: Dataset, image_column: str | None) -> str:
    """Returns `image_column` after checking it, or for `None` the only column with an `Image` feature.

    Raises:
        ValueError: The column is missing in a split, or there is none or more than one to choose from.
    """
    if image_column is None:
        found = [name for name, feature in train.features.items() if isinstance(feature, Image)]
        if len(found) != 1:
            what = f"several image columns {found}" if found else "no column with an Image feature"
            raise ValueError(
                f"The data set has {what} (columns: {train.column_names}); "
                "name the one to use by image_column=, or make one by cast_column(name, datasets.Image())."
            )
        image_column = found[0]
    require_column({"train": train, "test": test}, image_column, "image_column")
    feature = train.features[image_column]
    if not isinstance(feature, Image):
        raise ValueError(
            f"The column {image_column!r} has the feature {feature}, but images are needed. Name another column by "
            f"image_column=, or convert it: cast_column({image_column!r}, datasets.Image())."
        )
    for name, split in (("train", train), ("test", test)):
        refuse_ready_pixels(split, image_column, name)
    return image_column


def refuse_ready_pixels(split: Dataset, image_column: str, name: str) -> None:
    """Refuses a split that brings pixel values of its own beside its images, of which the processor makes them."""
    if image_column != PIXELS and PIXELS in split.column_names:
        raise ValueError(
            f"The {name} split has a column {PIXELS!r}, which would not be read: pixel values are made of "
            f"{image_column!r} by the image processor. Remove it: remove_columns({PIXELS!r})."
        )


def read_labels(train: Dataset, test: Dataset, label_column: str, argument: str = "label_column") -> Labels:
    """Reads the labels of both splits; no image is decoded.

    A `ClassLabel` column has its own names. In an integer column the name of a label is `str(label)`, in a string
    column the label itself, the ids counting the sorted names; in both the train split says which classes there are.

    Args:
        train, test: The splits.
        label_column: Column of the labels, or of what is read likewise.
        argument: Name of the user's argument, for messages.

    Raises:
        ValueError: The column is missing or not of these kinds, differs in kind or names between the splits, has
            missing labels, or labels outside the names.
    """
    require_column({"train": train, "test": test}, label_column, argument)
    kind, test_kind = (_kind_of_labels(split, label_column, argument) for split in (train, test))
    if kind != test_kind:
        raise ValueError(
            f"The {argument} {label_column!r} is {kind} in the train split, but {test_kind} in the test split; "
            "give both the same feature by cast_column."
        )
    train_values, test_values = (
        _read_column(split, label_column, name) for split, name in ((train, "train"), (test, "test"))
    )
    if kind == "ClassLabel":
        return _declared_labels(train, test, label_column, train_values, test_values)
    if kind == "integer":
        _require_small(train_values, test_values, label_column)
    _require_known(train_values, test_values, label_column)
    if kind == "string":
        names, train_ids = np.unique(train_values.astype(str), return_inverse=True)
        test_ids = np.searchsorted(names, test_values.astype(str))
        return Labels(tuple(names.tolist()), train_ids.astype(np.int64), test_ids.astype(np.int64), declared=False)
    names = tuple(str(label) for label in range(int(train_values.max()) + 1))
    return Labels(names, train_values.astype(np.int64), test_values.astype(np.int64), declared=False)


def is_count(value: object, least: int = 1) -> bool:
    """Returns whether the value is a whole number of at least `least`."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Returns whether the value is a number, of Python or numpy."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Returns a number as Python's, which JSON and snapshots know, where it is numpy's."""
    return value.item() if isinstance(value, np.generic) else value


def check_flag(name: str, value: object) -> bool:
    """Returns the truth value that the user gave as `name`; a text is none, as "no" would count as true.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {value!r}, but must be True or False. Give one of them, not as text.")
    return bool(value)


def check_name(what: str, value: object) -> str:
    """Returns the name that the user gave, described by `what`.

    Raises:
        ValueError: It is no text, or an empty one.
    """
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} is {value!r}, but must be a text that is not empty. Give a name such as 'birds'.")
    return value


def is_list(value: object) -> bool:
    """Returns whether the value has entries in an order: a list, tuple, array of one dimension, ..., but no text."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def check_seed(name: str, value: object) -> int:
    """Returns the seed that the user gave as `name`, as a number that JSON knows.

    Raises:
        ValueError: It is none.
    """
    if not is_count(value, 0):
        raise ValueError(
            f"{name} is {value!r}, but must be a whole number of at least 0, from which a resumed run draws the same "
            "order again."
        )
    return int(value)


def only_trained(test: Dataset, labels: Labels) -> Dataset:
    """Returns the test examples of classes that have training examples, with a warning if others are left out.

    Raises:
        ValueError: None is left.
    """
    rows = np.flatnonzero(np.isin(labels.test, np.unique(labels.train)))
    if len(rows) == len(test):
        return test
    unused = [labels.names[label] for label in np.setdiff1d(labels.test, labels.train)]
    if not len(rows):
        raise ValueError(
            f"The test split has examples of {unused} alone, of which there are no training examples; give a "
            "split with the classes that are learnt."
        )
    warnings.warn(
        f"The classes {unused} have no training examples, and their test examples are left out; remove them by "
        "filter() to say so yourself.",
        stacklevel=5,
    )
    return test.select(rows)


def read_label_ids(split: Dataset, label_column: str, names: tuple[str, ...], split_name: str) -> np.ndarray:
    """Reads the labels of one split as positions in `names`, int64; text is looked up.

    Raises:
        ValueError: Labels that `names` does not have.
    """
    values = _read_column(split, label_column, split_name)
    if _kind_of_labels(split, label_column, "label_column") != "string":
        ids = values.astype(np.int64)
        outside = np.unique(ids[(ids < 0) | (ids >= len(names))])
    else:
        id_of_name = {name: label for label, name in enumerate(names)}
        ids = np.array([id_of_name.get(value, -1) for value in values], dtype=np.int64)
        outside = np.unique(values[ids < 0].astype(str))
    if outside.size:
        raise ValueError(
            f"The {split_name} split has labels {outside[:10].tolist()} in {label_column!r}, which are none of the "
            f"{len(names)} classes of its task; use the tasks' own data."
        )
    return ids


def _kind_of_labels(split: Dataset, column: str, argument: str) -> str:
    feature = split.features[column]
    if isinstance(feature, ClassLabel):
        return "ClassLabel"
    if isinstance(feature, Value):
        if feature.dtype.startswith(("int", "uint")):
            return "integer"
        if feature.dtype in ("string", "large_string"):
            return "string"
    if isinstance(feature, Value):
        remedy = f"Convert it by class_encode_column({column!r})"
    elif isinstance(feature, (List, LargeList)):
        remedy = f"An image has one class: choose it by map(lambda row: {{{column!r}: row[{column!r}][0]}})"
    else:
        remedy = "Make a column of one label for each image by map()"
    raise ValueError(
        f"The {argument} {column!r} has the feature {feature}, but must be a ClassLabel, integer or string column. "
        f"{remedy}, or name another by {argument}=."
    )


def _read_column(split: Dataset, column: str, split_name: str) -> np.ndarray:
    # Straight from Arrow: untouched by a transform that the user has set on the data set, and a missing label is still
    # told from a number. `split[:]` goes through the rows of a `select` view one by one, which takes seconds for a
    # million; `take` takes milliseconds.
    values: pyarrow.ChunkedArray = split.data.column(column)
    if split._indices is not None:
        values = values.take(split._indices.column(0))
    if values.null_count:
        raise ValueError(
            f"{values.null_count} of {len(split)} examples of the {split_name} split have no label in {column!r}; "
            "every example needs one. Remove them by filter(), or use a labelled split."
            + (f" {LAYOUT}." if values.null_count == len(split) else "")
        )
    return values.to_numpy()


def _declared_labels(
    train: Dataset, test: Dataset, column: str, train_ids: np.ndarray, test_ids: np.ndarray
) -> Labels:
    names, test_names = train.features[column].names, test.features[column].names
    if names != test_names:
        only_train, only_test = sorted(set(names) - set(test_names)), sorted(set(test_names) - set(names))
        how = f"only in train: {only_train}, only in test: {only_test}" if only_train or only_test else "another order"
        raise ValueError(
            f"The train and test splits give {column!r} different label names ({how}), so the same id would mean two "
            "classes; bring them together by align_labels_with_mapping(), or cast both to one ClassLabel."
        )
    for split_name, ids in (("train", train_ids), ("test", test_ids)):
        outside = np.unique(ids[(ids < 0) | (ids >= len(names))])
        if outside.size:
            raise ValueError(
                f"The {split_name} split has labels {outside[:10].tolist()} in {column!r}, outside the ClassLabel's "
                f"0..{len(names) - 1}; -1 usually marks an unlabelled split. Use a labelled one "
                "(for example test_split='validation'), or remove these examples by filter()."
            )
    trained, tested = ([names[label] for label in np.unique(ids)] for ids in (train_ids, test_ids))
    if {*trained, *tested} <= SPLIT_NAMES and not {*trained} & {*tested}:
        raise ValueError(
            f"The train split has images of {trained} alone, the test split of {tested}: these are names of splits, "
            f"and no classes. {LAYOUT}."
        )
    return Labels(tuple(names), train_ids.astype(np.int64), test_ids.astype(np.int64), declared=True)


def _require_small(train_values: np.ndarray, test_values: np.ndarray, column: str) -> None:
    for split_name, values in (("train", train_values), ("test", test_values)):
        if values.min() < 0 or values.max() > LARGEST_INTEGER_LABEL:
            raise ValueError(
                f"The integer labels of the {split_name} split in {column!r} run from {values.min()} to "
                f"{values.max()}, but must lie in 0..{LARGEST_INTEGER_LABEL}; number the classes by "
                f"class_encode_column({column!r}), or use a labelled split (-1 usually marks an unlabelled one)."
            )


def _require_known(train_values: np.ndarray, test_values: np.ndarray, column: str) -> None:
    unknown = sorted(set(test_values.tolist()) - set(train_values.tolist()))
    if unknown:
        raise ValueError(
            f"The test split has labels {unknown[:10]} in {column!r} that the train split does not have: the two have "
            "different label names. Correct the names, or remove these examples by filter()."
        )
