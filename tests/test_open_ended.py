"""Sequences of several data sets, and tasks that are added weeks later."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from peft import PeftModel
from trainer_cases import CONFIGS, images
from transformers import TrainerCallback

from peft_cl import ContinualTrainer, class_incremental, dataset_sequence


def written(dataset: Dataset, *names: str) -> Dataset:
    """Images of the classes `names`, in other columns and with labels of text."""
    labels = dataset.features["label"]
    rows = [row for row in dataset if labels.int2str(row["label"]) in names]
    return Dataset.from_dict(
        {"what": [labels.int2str(row["label"]) for row in rows], "photo": [row["image"] for row in rows]},
        features=Features({"what": Value("string"), "photo": Image()}),
    )


@pytest.fixture(scope="module")
def halves(data) -> dict:
    """Two data sets: ids 0 and 1 of one are red and green, the texts of the other blue and yellow."""
    first = {split: part.select(np.flatnonzero(np.isin(part["label"], [0, 1]))) for split, part in data.items()}
    second = {split: written(part, "blue", "yellow") for split, part in data.items()}
    return {"ids": first, "texts": second}


def test_data_sets_with_other_columns_and_labels_make_one_sequence(halves, make_trainer):
    scenario = dataset_sequence(halves, {"texts": "what"})
    assert [task.name for task in scenario] == ["ids", "texts"]
    assert scenario.classes == ("ids/red", "ids/green", "texts/blue", "texts/yellow")
    assert [scenario.model_labels(task, "train").max() for task in scenario] == [1, 3]
    trainer = make_trainer(CONFIGS["coda"](), scenario=scenario)
    trainer.train()
    assert trainer.accuracy_matrix[0, 0] == 1.0 and trainer.metrics["average_accuracy"] > 0.6
    for place, task in enumerate(scenario):  # with the labels that the task gives its examples
        for examples in (task, task.test):
            assert trainer.evaluate(examples)["eval_accuracy"] == trainer.accuracy_matrix[1, place]
    with pytest.raises(ValueError, match="number their classes differently.*Give a Task"):
        trainer.evaluate(halves["ids"]["test"].select(range(4)))
    assert list(trainer.model.config.id2label.values()) == list(scenario.classes)


def test_classes_of_the_same_name_may_be_the_same(data):
    scenario = dataset_sequence({"a": data, "b": data}, shared_classes=True)
    assert len(scenario.classes) == 6 and "red" in scenario.classes
    labels = [scenario.model_labels(task, "test") for task in scenario]
    np.testing.assert_array_equal(*labels)
    assert len(dataset_sequence({"a": data, "b": data}).classes) == 12


def test_bad_data_sets_are_named(data, halves):
    with pytest.raises(ValueError, match="Data set 'texts': There is no column 'label'"):
        dataset_sequence(halves)
    with pytest.raises(ValueError, match="Data set 'b': There is no split 'test'"):
        dataset_sequence({"a": data, "b": {"train": images(1, 0)}})
    with pytest.raises(ValueError, match="datasets is dict of 0"):
        dataset_sequence({})
    with pytest.raises(ValueError, match=r"label_columns names \['c'\], but the data sets are \['a'\]"):
        dataset_sequence({"a": data}, {"c": "label"})


def test_a_task_is_added_to_a_run(halves, make_trainer, tmp_path):
    trainer = make_trainer(CONFIGS["dualprompt"](), scenario=class_incremental(halves["ids"], 1))
    trainer.train()
    trainer.train_task(halves["texts"], name="later", label_column="what")
    assert trainer.finished_tasks == 2 and trainer.results.task_names == ["task_0", "later"]
    assert not np.isnan(trainer.accuracy_matrix[1]).any() and trainer.metrics["average_accuracy"] > 0.6
    assert trainer.model.peft_config["default"].classes == ["red", "green", "blue", "yellow"]


def test_a_saved_adapter_learns_on_weeks_later(halves, make_trainer, tiny_vit, tmp_path):
    """What the adapter knew keeps its rows; the second run's trainer knows nothing of the first's data."""
    make_trainer(CONFIGS["coda"](), scenario=class_incremental(halves["ids"], 1)).train()
    model = PeftModel.from_pretrained(tiny_vit(), tmp_path / "run", is_trainable=True)
    scenario = class_incremental(halves["texts"], 1, label_column="what", image_column="photo")
    trainer = make_trainer(None, model=model, scenario=scenario, folder="on")
    trainer.train()
    assert model.peft_config["default"].tasks == [[0, 1], [2, 3]] and trainer.accuracy_matrix[0, 0] > 0.9
    # A forgetting of 0 of the one task of this run says nothing of those before.
    assert "Tasks learnt before: 1, of which no figure below" in (tmp_path / "on" / "README.md").read_text()
    assert "learnt before" not in (tmp_path / "run" / "README.md").read_text()


def test_an_added_task_is_part_of_what_is_resumed(halves, make_trainer):
    def scenario():
        return class_incremental(halves["ids"], 1)

    trainer = make_trainer(CONFIGS["coda"](), scenario=scenario())
    trainer.train()
    trainer.train_task(halves["texts"], name="later", label_column="what")
    with pytest.raises(ValueError, match=r"If later came by train_task, make the scenario with_task\(data\)"):
        make_trainer(CONFIGS["coda"](), scenario=scenario()).train(resume_from_checkpoint=True)
    again = make_trainer(
        CONFIGS["coda"](), scenario=scenario().with_task(halves["texts"], name="later", label_column="what")
    )
    assert again.train(resume_from_checkpoint=True) is None  # nothing is left to learn
    np.testing.assert_array_equal(again.accuracy_matrix, trainer.accuracy_matrix)


def test_an_added_task_that_was_interrupted_goes_on(halves, make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if kwargs["model"].peft_config["default"].num_tasks == 2 and state.global_step == 2:
                raise KeyboardInterrupt

    words = {"name": "later", "label_column": "what"}

    def trainer(longer=False, **more):
        scenario = class_incremental(halves["ids"], 1)
        scenario = scenario.with_task(halves["texts"], **words) if longer else scenario
        return make_trainer(CONFIGS["coda"](), scenario=scenario, save_strategy="steps", save_steps=1, **more)

    whole = trainer(folder="whole")
    whole.train()
    whole.train_task(halves["texts"], **words)
    interrupted = trainer(callbacks=[Stop()])
    interrupted.train()
    with pytest.raises(KeyboardInterrupt):
        interrupted.train_task(halves["texts"], **words)
    with pytest.raises(ValueError, match=r"If later came by train_task, make the scenario with_task\(data\)"):
        trainer().train(resume_from_checkpoint=True)
    resumed = trainer(longer=True)
    resumed.train(resume_from_checkpoint=True)
    np.testing.assert_array_equal(resumed.accuracy_matrix, whole.accuracy_matrix)
    for name, value in whole.tuner.lasting_parameters().items():
        assert torch.equal(value, resumed.tuner.lasting_parameters()[name])


def test_only_the_next_task_can_be_learnt(make_trainer, data):
    trainer = make_trainer(CONFIGS["linear-probe"](), num_train_epochs=1)
    with pytest.raises(ValueError, match="0 of 3 tasks are learnt, and a task is added to the end"):
        trainer.train_task(data)
    assert len(trainer.scenario) == 3
    with pytest.raises(ValueError, match="task_2 is not the next task: 0 of 3 are learnt"):
        trainer.train_task(trainer.scenario[2])
    trainer.train()
    with pytest.raises(ValueError, match="task_0 is not the next task: 3 of 3 are learnt"):
        trainer.train_task(trainer.scenario[0])


def test_classes_that_are_never_trained_are_not_measured(data):
    train = data["train"].select(np.flatnonzero(np.isin(data["train"]["label"], [0, 1])))
    with pytest.warns(UserWarning, match="'blue'.*have no training examples, and their test examples are left out"):
        scenario = dataset_sequence({"a": (train, data["test"])})
    assert len(scenario[0].test) == 16 and scenario.classes == ("a/red", "a/green")


def test_numbers_are_no_names(data):
    def numbered(split):
        return split.cast_column("label", Value("int64"))

    numbers = {split: numbered(part) for split, part in data.items()}
    with pytest.warns(UserWarning, match="numbers without names"):
        class_incremental(numbers, 2).with_task(numbers)


def test_a_name_is_no_path(data, make_trainer, tmp_path):
    away = str(tmp_path / "away")
    scenario = dataset_sequence({away: data})
    make_trainer(CONFIGS["linear-probe"](), scenario=scenario, save_strategy="epoch", num_train_epochs=1).train()
    assert not (tmp_path / "away").exists()
    assert list((tmp_path / "run" / "_state" / "task_0").glob("checkpoint-*"))


def test_a_pool_too_small_for_an_added_task_is_refused(halves, make_trainer):
    config = CONFIGS["dualprompt"]()
    config.pool_size = 1
    trainer: ContinualTrainer = make_trainer(config, scenario=class_incremental(halves["ids"], 1))
    trainer.train()
    with pytest.raises(ValueError, match="pool_size is 1, but task 2 needs a row of its own"):
        trainer.train_task(halves["texts"], label_column="what")
    assert trainer.finished_tasks == 1 and len(trainer.scenario) == 1
