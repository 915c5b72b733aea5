"""Domain-incremental learning: the same classes in every task, in another kind of image."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Dataset

from .columns import read_labels
from .order import drawn_order, given_order
from .overlap import splits_with_images
from .task import Scenario, Task


def domain_incremental(
    dataset: Mapping[str, Dataset] | tuple[Dataset, Dataset],
    domain_column: str = "domain",
    label_column: str = "label",
    *,
    image_column: str | None = None,
    domain_order: Sequence[str] | Sequence[int] | None = None,
    seed: int | None = None,
    train_split: str = "train",
    test_split: str = "test",
) -> Scenario:
    """Divides a data set by its domains into tasks (domain-incremental learning, van de Ven et al. 2022).

    No image is decoded or copied: each task is a `select` view. Classes that a domain lacks are not in its task.

    Args:
        dataset: A `DatasetDict` (or dict) with a train and a test split, or a pair (train, test).
        domain_column: Column that says the domain: `ClassLabel`, integer or string.
        label_column: Column of the classes, likewise.
        image_column: Column of the images; `None`: the only one with an `Image` feature.
        domain_order: Names or ids of the domains in the order wanted; a subset leaves the rest out. `None`: the order
            of the `ClassLabel` or of the sorted names, or drawn from `seed`.
        seed: Draws the order, `numpy.random.default_rng(seed).permutation`; not together with `domain_order`.
        train_split: Name of the split to train on, for a dict of splits.
        test_split: Name of the split to test on, for a dict of splits.

    Returns:
        The scenario, named `"domain-incremental"`, its tasks named by their domains.

    Raises:
        ValueError: A missing split or column, one split to train and to test on, labels or domains that are missing
            or outside their names, a domain order with unknown, repeated or untrained domains or together with a
            seed, a seed below 0, or a domain without test examples of a class that it trains. The message names the
            remedy.
        TypeError: `dataset` is no train and test split, or is streamed.

    Warns:
        UserWarning: Test examples of a class that their domain has no training examples of are left out, as
            `class_incremental` leaves those of classes without training examples out.

    Example:
        >>> scenario = domain_incremental(load_dataset("flwrlabs/pacs-split"), "domain")    # doctest: +SKIP
        >>> [task.name for task in scenario]                                                # doctest: +SKIP
        ['art_painting', 'cartoon', 'photo', 'sketch']
    """
    if domain_order is not None and seed is not None:
        raise ValueError(f"domain_order and seed={seed} both set the order of the domains; give only one of them.")
    if domain_column == label_column:
        raise ValueError(
            f"domain_column and label_column are both {label_column!r}: then every task would be a class. Name the "
            "column of the domains, or use class_incremental."
        )
    train, test, image_column = splits_with_images(dataset, train_split, test_split, image_column)
    labels = read_labels(train, test, label_column)
    domains = read_labels(train, test, domain_column, "domain_column")
    trained = np.bincount(domains.train, minlength=len(domains.names)) > 0
    if domain_order is not None:
        order = given_order(domain_order, domains.names, trained, "domain_order", "domain")
    else:
        untrained = np.setdiff1d(domains.test, np.flatnonzero(trained))
        if untrained.size:
            warnings.warn(
                f"The domains {[domains.names[domain] for domain in untrained]} have no training examples and are "
                "left out, their test examples with them; name those to use by domain_order= to say so yourself.",
                stacklevel=2,
            )
        order = drawn_order(np.flatnonzero(trained), seed)

    tasks = []
    for index, domain in enumerate(order):
        name = domains.names[domain]
        train_rows, test_rows = np.flatnonzero(domains.train == domain), np.flatnonzero(domains.test == domain)
        if not test_rows.size:
            raise ValueError(
                f"The domain {name!r} has no test examples, so its accuracy cannot be measured; leave it out by "
                "domain_order=, or use another test_split."
            )
        classes = np.unique(labels.train[train_rows])
        is_trained = np.isin(labels.test[test_rows], classes)
        if not is_trained.all():
            unused = [labels.names[label] for label in np.setdiff1d(labels.test[test_rows], classes)]
            if not is_trained.any():
                raise ValueError(
                    f"The domain {name!r} has test examples of {unused}, but no training examples of them, and no "
                    "other test examples; leave it out by domain_order=, or use another test_split."
                )
            warnings.warn(
                f"The domain {name!r} has no training examples of {unused}, and its {np.sum(~is_trained):,} test "
                "examples of them are left out; remove them by filter() to say so yourself.",
                stacklevel=2,
            )
            test_rows = test_rows[is_trained]
        names = tuple(labels.names[label] for label in classes)
        view = train.select(train_rows)
        tasks.append(Task(index=index, name=name, classes=names, train=view, test=test.select(test_rows)))
    return Scenario(
        tasks,
        name="domain-incremental",
        image_column=image_column,
        label_column=label_column,
        label_names=labels.names,
        seed=seed,
        data=(train, test),
    )
