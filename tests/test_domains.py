"""Domain-incremental scenarios: one task a domain, over shared classes."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PillowImage

from peft_cl.scenarios import class_incremental, domain_incremental


CLASSES, DOMAINS = ["ant", "bee"], ["photo", "sketch", "cartoon"]


def split(rows: str, domain=None) -> Dataset:
    """Rows such as "pa sb": the first letters of a domain and of a class; image r has the grey value r."""
    rows = rows.split()
    features = {"image": Image(), "label": ClassLabel(names=CLASSES), "domain": domain or ClassLabel(names=DOMAINS)}
    names = [next(name for name in DOMAINS if name.startswith(row[0])) for row in rows]
    return Dataset.from_dict(
        {
            "image": [PillowImage.new("L", (4, 4), row) for row in range(len(rows))],
            "label": [next(name for name in CLASSES if name.startswith(row[1])) for row in rows],
            "domain": names,
        },
        features=Features(features),
    )


def splits(train: str = "pa sb ca pb sa cb", test: str = "sa pb cb ca", **kwargs) -> DatasetDict:
    return DatasetDict(train=split(train, **kwargs), test=split(test, **kwargs))


def rows(dataset: Dataset) -> list[int]:
    return [image.getpixel((0, 0)) for image in dataset["image"]]


def test_every_domain_is_a_task_over_the_same_classes():
    scenario = domain_incremental(splits())
    assert [task.name for task in scenario] == DOMAINS
    assert [task.classes for task in scenario] == [("ant", "bee")] * 3
    assert [rows(task.train) for task in scenario] == [[0, 3], [1, 4], [2, 5]]
    assert [rows(task.test) for task in scenario] == [[1], [0], [2, 3]]
    assert scenario.classes == ("ant", "bee") and scenario.describe()["name"] == "domain-incremental"


def test_the_order_is_given_or_drawn():
    given = domain_incremental(splits(), domain_order=["cartoon", 0])
    assert [task.name for task in given] == ["cartoon", "photo"]
    drawn = domain_incremental(splits(), seed=5)
    assert [task.name for task in drawn] == [DOMAINS[i] for i in np.random.default_rng(5).permutation(3)]


def test_domains_may_be_text():
    scenario = domain_incremental(splits(domain=Value("string")))
    assert [task.name for task in scenario] == sorted(DOMAINS)


def test_a_domain_has_the_classes_that_it_trains():
    scenario = domain_incremental(splits("pa sb sa cb", "pa sb cb"))
    assert [task.classes for task in scenario] == [("ant",), ("ant", "bee"), ("bee",)]
    assert scenario.label_index().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ({}, {"domain_column": "style"}, "no column 'style'.*Name the one to use by domain_column="),
        ({}, {"domain_column": "image"}, "The domain_column 'image' has the feature.*name another by domain_column="),
        ({}, {"domain_order": 3}, "domain_order is 3, but must be a list of at least one name or id"),
        ({}, {"domain_order": []}, r"domain_order is \[\], but must be a list.*Leave it out for every domain"),
        ({}, {"domain_order": [True]}, r"does not have: \[True\]"),
        ({}, {"seed": -1}, "seed is -1, but must be a whole number of at least 0"),
        ({}, {"train_split": "test"}, "train_split and test_split are both 'test'"),
        ({}, {"domain_column": "label"}, "domain_column and label_column are both 'label'.*class_incremental"),
        ({}, {"domain_order": ["photo"], "seed": 1}, "domain_order and seed=1"),
        (
            {},
            {"domain_order": ["photo", "oil"]},
            r"entries that the data set does not have: \['oil'\]",
        ),
        ({}, {"domain_order": ["photo", 0]}, "more than once, but a domain belongs to one task"),
        ({"train": "pa pb sa sb"}, {"domain_order": ["cartoon"]}, r"domain_order has \['cartoon'\], but the train"),
        ({"test": "pa sb"}, {}, "domain 'cartoon' has no test examples"),
        ({"train": "pa sa ca"}, {}, r"test examples of \['bee'\], but no training examples"),
    ],
)
def test_what_cannot_work_is_refused(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        domain_incremental(splits(**data), **arguments)


def test_classes_and_domains_are_two_ways_through_the_same_data():
    data = splits()
    assert {len(task.train) for task in domain_incremental(data)} == {2}
    assert {len(task.train) for task in class_incremental(data, 2)} == {3}
