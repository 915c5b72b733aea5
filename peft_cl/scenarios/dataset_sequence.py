"""Several data sets, one after the other ("5-datasets")."""

from __future__ import annotations

from collections.abc import Mapping

from datasets import Dataset

from .columns import check_flag, check_name
from .overlap import whole_data
from .task import Scenario, Task


IMAGE, LABEL = "image", "label"


def dataset_sequence(
    datasets: Mapping[str, Mapping[str, Dataset] | tuple[Dataset, Dataset]],
    label_columns: str | Mapping[str, str] = "label",
    image_columns: str | Mapping[str, str] | None = None,
    *,
    shared_classes: bool = False,
    train_split: str = "train",
    test_split: str = "test",
) -> Scenario:
    """Makes each data set a task, in the order given, such as the 5-datasets sequence (Ebrahimi et al. 2020).

    No image is decoded or copied. The test never says from which data set an image is.

    Args:
        datasets: Name -> data set with a train and a test split. They may differ in columns, kind of labels and
            sizes of images.
        label_columns: Column of the labels in all of them, or name -> column where it is not `"label"`.
        image_columns: Column of the images likewise; `None` or not named: the only one with an `Image` feature. (What
            a message about one data set calls `label_column=` and `image_column=` is its entry here.)
        shared_classes: Whether classes of the same name in two data sets are the same class (as domains of one set).
            Otherwise `"5"` of one and `"5"` of the other are two classes, and a class is named
            `"<data set>/<class>"`.
        train_split, test_split: Names of the splits, for dicts of splits.

    Returns:
        The scenario, named `"dataset-sequence"`, its tasks named as the data sets.

    Raises:
        ValueError, TypeError: No data set, a name that is no text, `shared_classes` that is not True or False, and
            what `class_incremental` refuses in each of them; the message names the data set.

    Example:
        >>> scenario = dataset_sequence(    # doctest: +SKIP
        ...     {name: load_dataset(name) for name in ("ylecun/mnist", "ufldl-stanford/svhn")}
        ... )
    """
    if not isinstance(datasets, Mapping) or not datasets:
        raise ValueError(
            f"datasets is {type(datasets).__name__} of {len(datasets) if isinstance(datasets, Mapping) else '?'}, but "
            'must be a dict of at least one data set by name, {"mnist": load_dataset(...), ...}.'
        )
    for name in datasets:
        check_name("The name of a data set", name)
    shared_classes = check_flag("shared_classes", shared_classes)
    for argument, columns in (("label_columns", label_columns), ("image_columns", image_columns)):
        unknown = sorted(set(columns) - set(datasets)) if isinstance(columns, Mapping) else []
        if unknown:
            raise ValueError(f"{argument} names {unknown}, but the data sets are {list(datasets)}. Name these.")
    tasks = []
    for index, (name, dataset) in enumerate(datasets.items()):
        label, image = (
            columns.get(name) if isinstance(columns, Mapping) else columns
            for columns in (label_columns, image_columns)
        )
        try:
            tasks.append(_task(index, name, dataset, label or LABEL, image, shared_classes, train_split, test_split))
        except (ValueError, TypeError) as error:
            raise type(error)(f"Data set {name!r}: {error}") from error
    names = [task.label_prefix + label_name for task in tasks for label_name in task.label_names]
    return Scenario(
        tasks,
        name="dataset-sequence",
        image_column=IMAGE,
        label_column=LABEL,
        label_names=list(dict.fromkeys(names)),
    )


def _task(
    index: int,
    name: str,
    dataset: Mapping[str, Dataset] | tuple[Dataset, Dataset],
    label_column: str,
    image_column: str | None,
    shared_classes: bool,
    train_split: str,
    test_split: str,
) -> Task:
    labels, train, test = whole_data(dataset, label_column, image_column, (IMAGE, LABEL), train_split, test_split)
    prefix = "" if shared_classes else f"{name}/"
    classes = tuple(prefix + each for each in labels.trained())
    return Task(index, name, classes, train, test, labels.names, prefix)
