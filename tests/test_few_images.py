"""`images_per_class`: a scenario with fewer training images of each class."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from peft_cl.commands.sections import DatasetSettings, ScenarioSettings
from peft_cl.scenarios import class_incremental, domain_incremental, task_free


def data_of(counts, domains=("a",)):
    """Examples with `counts[label]` images of each class in each domain; a column says which image each is."""
    rows = [(label, domain) for domain in domains for label, count in enumerate(counts) for _ in range(count)]
    names = [str(label) for label in range(len(counts))]
    columns = {
        "image": [Pillow.new("RGB", (8, 8), (number % 256, number // 256, 0)) for number in range(len(rows))],
        "label": [label for label, _ in rows],
        "domain": [domain for _, domain in rows],
        "number": list(range(len(rows))),
    }
    features = {
        "image": Image(),
        "label": ClassLabel(names=names),
        "domain": Value("string"),
        "number": Value("int64"),
    }
    return Dataset.from_dict(columns, features=Features(features))


def counts_of(task):
    return np.bincount(task.train["label"], minlength=4).tolist()


def test_each_task_has_so_many_images_of_each_class_and_all_test_images():
    data, test = data_of([5, 6, 2, 7]), data_of([3, 3, 3, 3])
    few = class_incremental((data, test), 2, seed=1).with_images_per_class(3)
    assert sorted(counts_of(few[0]) + counts_of(few[1])) == [0, 0, 0, 0, 2, 3, 3, 3]  # of a class with 2, both
    assert [len(task.test) for task in few] == [6, 6]
    of_domains = domain_incremental((data_of([5, 5], ("a", "b")), data_of([2, 2], ("a", "b"))))
    assert [counts_of(task)[:2] for task in of_domains.with_images_per_class(4)] == [[4, 4], [4, 4]]


def test_the_seed_draws_the_images_and_the_record_says_so():
    scenario = class_incremental((data_of([20, 20]), data_of([2, 2])), 1)
    drawn = [scenario.with_images_per_class(5, seed=seed)[0].train["number"] for seed in (0, 0, 1)]
    assert list(drawn[0]) == list(drawn[1]) != list(drawn[2])
    described = scenario.with_images_per_class(5, seed=1).describe()
    assert described["settings"] == {"images_per_class": 5, "images_seed": 1}
    assert described["train_sizes"] == [10]


def test_a_configuration_says_it_and_its_seed_draws_both():
    data = (data_of([20, 20, 20, 20]), data_of([2, 2, 2, 2]))
    made = ScenarioSettings(num_tasks=2, seed=3, images_per_class=4).make(
        {"": data}, {"": DatasetSettings(path="photos")}
    )
    expected = class_incremental(data, 2, seed=3).with_images_per_class(4, seed=3)
    assert [list(task.train["number"]) for task in made] == [list(task.train["number"]) for task in expected]


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "five"])
def test_what_is_no_number_of_images_is_refused(count):
    scenario = class_incremental((data_of([5, 5]), data_of([2, 2])), 1)
    with pytest.raises(ValueError, match="images_per_class is .*whole number of at least 1; leave it out"):
        scenario.with_images_per_class(count)


def test_a_stream_refuses_it():
    data = (data_of([20, 20]), data_of([2, 2]))
    with pytest.raises(ValueError, match="one stream, in which an image may come several times. Leave it out"):
        task_free(data, 2).with_images_per_class(5)
    with pytest.raises(ValueError, match="images_per_class does not go with the kind task-free. Take it out"):
        ScenarioSettings(kind="task-free", num_tasks=2, images_per_class=5)
