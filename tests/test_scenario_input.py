"""Arguments of the scenarios that are wrong, but could be taken for right ones."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from datasets import load_from_disk
from trainer_cases import images

from peft_cl import class_incremental, dataset_sequence, domain_incremental, task_free, task_incremental
from peft_cl.scenarios import Scenario


COLUMNS = {"image_column": "image", "label_column": "label", "label_names": ["red"]}


@pytest.mark.parametrize("flag", ["no", "True", 0, None])
@pytest.mark.parametrize("name", ["shared_classes", "task_known", "boundaries"])
def test_a_truth_value_is_no_text(name, flag, data):
    with pytest.raises(ValueError, match=f"{name} is {flag!r}, but must be True or False. Give one of them"):
        if name == "shared_classes":
            dataset_sequence({"a": data}, shared_classes=flag)
        else:
            class_incremental(data, 2).changed(class_incremental(data, 2), **{name: flag})


@pytest.mark.parametrize("name", [1, "", None, ("a",)])
def test_names_are_texts(name, data):
    message = f"is {name!r}, but must be a text that is not empty. Give a name such as"
    with pytest.raises(ValueError, match=re.escape(f"The name of a data set {message}")):
        dataset_sequence({name: data})
    scenario = class_incremental(data, 2)
    with pytest.raises(ValueError, match="scenario's name is .*, but must be a text"):
        scenario.changed(scenario, name=name)
    if name is not None:  # task_<index>
        with pytest.raises(ValueError, match="name of task 2 is .*, but must be a text"):
            scenario.with_task(data, name=name)


@pytest.mark.parametrize("tasks", [[1], 5, [None], "ab"])
def test_a_scenario_is_made_of_tasks(tasks):
    with pytest.raises(TypeError, match=r"tasks has .*, but a scenario is made of a list of Task; make one"):
        Scenario(tasks, name="by hand", **COLUMNS)


MAKERS = {
    "class": lambda data, **more: class_incremental(data, 2, **more),
    "task": lambda data, **more: task_incremental(data, 2, **more),
    "stream": lambda data, **more: task_free(data, 2, **more),
    "domain": lambda data, **more: domain_incremental(data, "kind", **more),
    "sequence": lambda data, **more: dataset_sequence({"a": data}, **more),
    "added": lambda data, **more: class_incremental({"train": images(2, 0), "test": images(1, 1)}, 2).with_task(
        data, **more
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_is_trained_on_is_not_measured(make, tmp_path):
    one = images(4, 5)
    one.save_to_disk(tmp_path)
    for leak in ((one, one), {"train": one, "test": one}, (load_from_disk(tmp_path), load_from_disk(tmp_path))):
        with pytest.raises(ValueError, match=r"very same data, .* Give two splits, or divide one by train_test_split"):
            make(leak)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("argument", ["train_split", "test_split"])
@pytest.mark.parametrize("name", [["train"], None, 0])
def test_a_split_has_a_name(make, argument, name, data):
    with pytest.raises(ValueError, match=f"{argument} is .*, but must be the name of a split, such as 'train'. Give"):
        make(data, **{argument: name})


@pytest.mark.parametrize("make", [task_incremental, task_free])
def test_an_unknown_argument_is_said_by_the_function_that_got_it(make, data):
    with pytest.raises(TypeError, match=rf"{make.__name__}\(\) got sed, but its arguments are dataset, .*seed,"):
        make(data, 3, sed=1)


@pytest.mark.parametrize("number", [None, 0, "3", True, 2.0])
def test_the_number_of_tasks_comes_with_a_remedy(number, data):
    with pytest.raises(ValueError, match="num_tasks must be .*; give the number of tasks .* or classes_per_task="):
        class_incremental(data, number)


def test_numbers_of_numpy_are_taken(data):
    stream = task_free(data, np.int64(3), blur=np.float32(0.5), passes=np.int32(2), stream_seed=np.uint8(1))
    assert json.loads(json.dumps(stream.describe()))["settings"] == {"blur": 0.5, "passes": 2, "stream_seed": 1}
    shared = dataset_sequence({"a": data, "b": data}, shared_classes=np.True_)
    assert shared.classes == class_incremental(data, 1).classes
