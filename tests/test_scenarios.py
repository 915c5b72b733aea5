"""Class-incremental scenarios: which images land in which task, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PillowImage

from peft_cl.scenarios import Scenario, Task, class_incremental


NAMES = ["ant", "bee", "cat", "dog", "emu"]


def split(labels, feature=None, image="image", label="label") -> Dataset:
    """A split whose image of row r has the grey value r, so that a row can be told after selection."""
    feature = ClassLabel(names=NAMES) if feature is None else feature
    images = [PillowImage.new("L", (4, 4), row) for row in range(len(labels))]
    return Dataset.from_dict({image: images, label: labels}, features=Features({image: Image(), label: feature}))


def splits(train=(4, 3, 2, 1, 0, 0, 1, 2, 3, 4), test=(0, 1, 2, 3, 4), **kwargs) -> DatasetDict:
    return DatasetDict(train=split(list(train), **kwargs), test=split(list(test), **kwargs))


def rows(dataset: Dataset) -> list[int]:
    return [image.getpixel((0, 0)) for image in dataset["image"]]


def test_every_example_lands_once_in_the_task_of_its_class():
    scenario = class_incremental(splits(), num_tasks=5)
    assert [task.classes for task in scenario] == [(name,) for name in NAMES]
    assert [rows(task.train) for task in scenario] == [[4, 5], [3, 6], [2, 7], [1, 8], [0, 9]]
    assert [rows(task.test) for task in scenario] == [[0], [1], [2], [3], [4]]
    assert [(task.index, task.name) for task in scenario][-1] == (4, "task_4")


def test_first_tasks_take_the_classes_that_do_not_divide():
    scenario = class_incremental(splits(), num_tasks=3)
    assert [task.classes for task in scenario] == [("ant", "bee"), ("cat", "dog"), ("emu",)]


def test_the_first_task_may_be_larger_and_the_sizes_given():
    larger = class_incremental(splits(), num_tasks=3, first_task_classes=2)
    assert [task.classes for task in larger] == [("ant", "bee"), ("cat", "dog"), ("emu",)]
    given = class_incremental(splits(), classes_per_task=[1, 3])
    assert [task.classes for task in given] == [("ant",), ("bee", "cat", "dog")]
    assert given.label_index().tolist() == [0, 1, 2, 3, -1]  # what is beyond the sizes is left out


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "num_tasks must be a whole number of at least 1, got None"),
        ({"num_tasks": 2, "classes_per_task": [1, 1]}, "classes_per_task sets the size of every task"),
        ({"classes_per_task": [2, 0]}, r"classes_per_task is \[2, 0\], but must be a list of whole numbers"),
        ({"classes_per_task": []}, r"classes_per_task is \[\], but must be a list of whole numbers of at least 1"),
        ({"classes_per_task": 5}, "classes_per_task is 5, but must be a list of whole numbers.*num_tasks="),
        ({"classes_per_task": "abc"}, "classes_per_task is 'abc', but must be a list of whole numbers"),
        ({"classes_per_task": [3, 3]}, "asks for 6 classes, but there are 5"),
        ({"num_tasks": 1, "first_task_classes": 2}, "first_task_classes is 2 with num_tasks=1"),
        ({"num_tasks": 4, "first_task_classes": 3}, "5 classes cannot make 4 tasks with 3 in the first"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        class_incremental(splits(), **sizes)


def test_scenario_is_a_sequence_that_describes_itself():
    scenario = class_incremental(splits(), num_tasks=2, seed=3)
    assert len(scenario) == 2 and list(scenario) == [scenario[0], scenario[-1]] and scenario[1:] == (scenario[1],)
    description = json.loads(json.dumps(scenario.describe()))
    assert description == {
        "name": "class-incremental",
        "num_tasks": 2,
        "boundaries": True,
        "settings": {},
        "seed": 3,
        "class_order": list(scenario.classes),
        "task_names": ["task_0", "task_1"],
        "classes_per_task": [3, 2],
        "train_sizes": [6, 4],
        "test_sizes": [3, 2],
    }


def test_seed_gives_the_documented_permutation_and_none_the_natural_order():
    drawn = class_incremental(splits(), num_tasks=5, seed=7)
    assert drawn.classes == tuple(NAMES[label] for label in np.random.default_rng(7).permutation(5))
    assert class_incremental(splits(), num_tasks=5).classes == tuple(NAMES)


@pytest.mark.parametrize("order", [["emu", "ant", "cat"], [4, 0, 2], np.array([4, 0, 2]), ["emu", 0, "cat"]])
def test_class_order_by_name_or_label_id_may_leave_classes_out(order):
    scenario = class_incremental(splits(), num_tasks=2, class_order=order)
    assert [task.classes for task in scenario] == [("emu", "ant"), ("cat",)]
    assert rows(scenario[0].train) == [0, 4, 5, 9]
    index = scenario.label_index()
    assert index.dtype == np.int64 and index.tolist() == [1, -1, 2, -1, 0]


def test_integer_labels_are_named_by_their_number_and_may_have_gaps():
    scenario = class_incremental(splits(train=(7, 2, 7, 5), test=(2, 5, 7), feature=Value("int32")), num_tasks=3)
    assert scenario.classes == ("2", "5", "7")
    assert scenario.label_index().tolist() == [-1, -1, 0, -1, -1, 1, -1, 2]
    assert rows(scenario[2].train) == [0, 2]


def test_text_labels_are_numbered_in_sorted_order():
    data = splits(train=("cat", "ant", "cat", "bee"), test=("bee", "cat", "ant"), feature=Value("string"))
    scenario = class_incremental(data, num_tasks=3)
    assert scenario.label_names == ("ant", "bee", "cat") and scenario.label_index().tolist() == [0, 1, 2]
    assert [rows(task.test) for task in scenario] == [[2], [0], [1]]


def test_splitting_decodes_no_image():
    data = splits()
    broken = data["train"].cast_column("image", Image(decode=False)).map(lambda _: {"image": {"bytes": b"no image"}})
    broken = broken.cast_column("image", Image())
    scenario = class_incremental((broken, data["test"]), num_tasks=5)
    assert len(scenario[0].train) == 2
    with pytest.raises(OSError):
        scenario[0].train[0]


def test_pair_of_splits_other_split_names_and_other_columns():
    data = splits(image="photo", label="species")
    by_pair = class_incremental((data["train"], data["test"]), 5, "species")
    by_name = class_incremental(
        {"fit": data["train"], "validation": data["test"]}, 5, "species", train_split="fit", test_split="validation"
    )
    for scenario in (by_pair, by_name):
        assert (scenario.image_column, scenario.label_column) == ("photo", "species") and len(scenario) == 5


def test_rows_of_a_shuffled_and_transformed_data_set_are_the_right_ones():
    data = splits()
    shuffled = data["train"].shuffle(seed=1).with_transform(lambda batch: {"label": [0] * len(batch["label"])})
    scenario = class_incremental((shuffled, data["test"]), num_tasks=5)
    assert sorted(rows(scenario[1].train.with_format(None))) == [3, 6]


def test_names_without_training_examples_are_left_out_with_a_warning():
    data = splits(train=(0, 1, 3, 4), test=(0, 1, 2, 3, 4))
    with pytest.warns(UserWarning, match="cat.*no training examples.*class_order"):
        scenario = class_incremental(data, num_tasks=2)
    assert scenario.classes == ("ant", "bee", "dog", "emu")
    assert sum(len(task.test) for task in scenario) == 4
    with pytest.raises(ValueError, match="class_order has .*cat.*no examples"):
        class_incremental(data, num_tasks=2, class_order=NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_column": "fine"}, r"no column 'fine' in the train split.*\['image', 'label'\].*label_column="),
        ({"image_column": "label"}, r"column 'label' has the feature ClassLabel.*but images are needed"),
        ({"image_column": "img"}, r"no column 'img' in the train split.*\['image', 'label'\].*image_column="),
        ({"test_split": "validation"}, r"no split 'validation'.*\['train', 'test'\].*test_split="),
        ({"num_tasks": 6}, "5 classes cannot make 6 tasks"),
        ({"num_tasks": 2, "class_order": ["ant"]}, "1 classes cannot make 2 tasks"),
        ({"num_tasks": 0}, "at least 1, got 0"),
        ({"num_tasks": 2.5}, "whole number.*2.5"),
        ({"class_order": ["ant", "yak"]}, r"does not have: \['yak'\].*'ant'"),
        ({"class_order": [0, 5, -1]}, r"does not have: \[5, -1\].*from 0 to 4"),
        ({"class_order": "ant"}, "class_order is 'ant', but must be a list of at least one name or id"),
        ({"class_order": 5}, "class_order is 5, but must be a list.*Leave it out for every class"),
        ({"class_order": []}, r"class_order is \[\], but must be a list"),
        ({"class_order": {"ant", "bee"}}, "class_order is {.*}, but must be a list"),  # has no order
        ({"class_order": [True, 2, 3]}, r"does not have: \[True\]"),
        ({"seed": -1}, "seed is -1, but must be a whole number of at least 0"),
        ({"seed": "x"}, "seed is 'x', but must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5, but must be a whole number"),
        ({"seed": True}, "seed is True, but must be a whole number"),
        ({"test_split": "train"}, "train_split and test_split are both 'train'.*trained on.*train_test_split()"),
        ({"class_order": ["ant", "bee", 0]}, r"\['ant'\] more than once"),
        ({"class_order": NAMES, "seed": 0}, "only one of them"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        class_incremental(splits(), **{"num_tasks": 1, **arguments})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (splits(test=(0, 1, -1)), r"test split has labels \[-1\].*0\.\.4.*unlabelled"),
        (splits(train=(0, -1), test=(0,), feature=Value("int64")), "train split.*from -1 to 0"),
        (splits(test=(0, 1), feature=Value("int64")), r"has no test examples"),
        (
            splits(train=(0, None), test=(0,), feature=Value("int64")),
            "1 of 2 examples of the train split have no label",
        ),
        (splits(train=(0, 1), test=(0, 9), feature=Value("int64")), r"labels \[9\].*train split does not have"),
        (splits(train=("a", "b"), test=("a", "B"), feature=Value("string")), r"labels \['B'\].*train split does not"),
        (splits(train=(0.5,), test=(0.5,), feature=Value("float32")), "float32.*class_encode_column"),
        (splits(test=(0, 1, 4)), r"Task 2 with the classes \['cat'\] has no test examples"),
        (splits(test=()), "'test' split has no examples"),
        (splits().remove_columns("image"), r"no column with an Image feature.*\['label'\].*image_column="),
        (splits().map(lambda row: {"mask": row["image"]}), r"several image columns \['image', 'mask'\]"),
        ((split([0]), split(["ant"], Value("string"))), "ClassLabel in the train split, but string in the test split"),
        (
            (split([0]), split([0], ClassLabel(names=["ant", "bee", "cat", "dog", "yak"]))),
            r"different label names \(only in train: \['emu'\], only in test: \['yak'\]\)",
        ),
        ((split([0]), split([0], ClassLabel(names=NAMES[::-1]))), r"different label names \(another order\)"),
    ],
)
def test_wrong_data_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        class_incremental(data, num_tasks=5 if "Task 2" in message else 2)


def test_one_split_and_streams_are_refused():
    with pytest.raises(TypeError, match="one Dataset.*pair"):
        class_incremental(splits()["train"], num_tasks=2)
    with pytest.raises(TypeError, match="'train' split is a IterableDataset.*streaming"):
        class_incremental((splits()["train"].to_iterable_dataset(), splits()["test"]), num_tasks=2)


def test_a_scenario_made_by_hand_may_repeat_classes():
    data = split([0, 1])
    tasks = [Task(0, "photo", ("bee", "ant"), data, data), Task(1, "sketch", ("ant", "bee", "cat"), data, data)]
    columns = {"image_column": "image", "label_column": "label", "label_names": NAMES}
    assert Scenario(tasks, name="domain-incremental", **columns).classes == ("bee", "ant", "cat")
    with pytest.raises(ValueError, match="no tasks"):
        Scenario([], name="empty", **columns)
    with pytest.raises(ValueError, match=r"in order, got \[1, 0\]"):
        Scenario(tasks[::-1], name="reversed", **columns)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"classes": ("yak",)}, ValueError, r"The classes \['yak'\] are not in its label_names"),
        ({"classes": ()}, ValueError, r"classes is \(\), but must be at least one name, and none twice"),
        ({"classes": ("cat", "dog", "cat")}, ValueError, r"classes is \('cat', 'dog', 'cat'\), but must be"),
        ({"classes": ("cat",)}, ValueError, r"The train split has examples of \['dog'\].*classes of the task"),
        ({"test": split([2, 0])}, ValueError, r"The test split has examples of \['ant'\].*remove them by filter"),
        ({"train": split([])}, ValueError, "The 'train' split has no examples"),
        ({"test": split([])}, ValueError, "The 'test' split has no examples"),
        ({"test": split([2], image="photo")}, ValueError, "no column 'image' in the test split.*image_column="),
        ({"train": split([2], label="kind")}, ValueError, "no column 'label' in the train split.*label_column="),
        ({"test": split([2.0], Value("float32"))}, ValueError, "label_column 'label' has the feature.*float32"),
        ({"train": split([2]).to_iterable_dataset()}, TypeError, "'train' split is a IterableDataset"),
        ({"label_prefix": "b/"}, ValueError, r"The classes \['cat', 'dog'\] are not in its label_names \['b/ant'"),
    ],
)
def test_a_task_made_by_hand_that_cannot_be_learnt_is_refused(changes, error, message):
    first = Task(0, "photo", ("ant", "bee"), split([0, 1]), split([0, 1]))
    second = Task(1, "sketch", ("cat", "dog"), split([2, 3]), split([2, 3]))
    columns = {"name": "by hand", "image_column": "image", "label_column": "label", "label_names": NAMES}
    assert len(Scenario([first, second], **columns)) == 2
    with pytest.raises(error, match=f"^Task 'sketch': .*{message}"):
        Scenario([first, replace(second, **changes)], **columns)


def test_a_transform_may_make_the_images_of_a_task_made_by_hand():
    data = split([0, 1], image="photo").with_transform(lambda rows: {"image": rows["photo"], "label": rows["label"]})
    columns = {"image_column": "image", "label_column": "label", "label_names": NAMES}
    assert len(Scenario([Task(0, "task_0", ("ant", "bee"), data, data)], name="by hand", **columns)) == 1


def test_labels_of_text_under_a_prefix_are_classes_of_a_task_made_by_hand():
    data = split(["ant", "bee"], Value("string"))
    task = Task(0, "task_0", ("a/bee", "a/ant"), data, data, ("ant", "bee"), "a/")
    columns = {"image_column": "image", "label_column": "label", "label_names": ["a/ant", "a/bee"]}
    assert Scenario([task], name="by hand", **columns).model_labels(task, "train").tolist() == [1, 0]


def test_a_seed_of_numpy_goes_into_the_record():
    scenario = class_incremental(splits(), num_tasks=2, seed=np.int64(3))
    assert json.dumps(scenario.describe()) == json.dumps(class_incremental(splits(), 2, seed=3).describe())


def test_labels_of_a_view_of_a_view_are_read_in_its_order():
    data = splits()
    view = data["train"].select([9, 0, 4, 1]).shuffle(seed=0).select([3, 1, 0])
    task = Task(0, "task_0", ("emu", "dog", "ant"), view, view)
    columns = {"image_column": "image", "label_column": "label", "label_names": NAMES}
    labels = Scenario([task], name="by hand", **columns).model_labels(task, "train")
    assert [task.classes[label] for label in labels] == [NAMES[label] for label in view["label"]]
