"""`evaluate` and `predict` on what a user hands them: tasks, their data, and other examples."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from trainer_cases import CONFIGS

from peft_cl import dataset_sequence, task_incremental


@pytest.fixture(scope="module")
def reversed_ids(data):
    """The same images with the same class names, of which each has another id."""

    def renumbered(part):
        names = part.features["label"].names
        ids = part.cast_column("label", datasets.Value("int64")).map(lambda row: {"label": 5 - row["label"]})
        return ids.cast_column("label", datasets.ClassLabel(names=names[::-1]))

    return {split: renumbered(part) for split, part in data.items()}


def test_predictions_of_a_task_are_those_that_are_measured(make_trainer, data, reversed_ids):
    scenario = dataset_sequence({"a": data, "b": reversed_ids}, shared_classes=True)
    trainer = make_trainer(CONFIGS["linear-probe"](), scenario=scenario, num_train_epochs=4)
    trainer.train()
    assert trainer.accuracy_matrix[1, 1] > 0.8
    for given in (scenario[1], scenario[1].test):
        found = trainer.predict(given)
        assert found.metrics["test_accuracy"] == trainer.accuracy_matrix[1, 1]
        assert found.predictions.shape == (len(scenario[1].test),)
        np.testing.assert_array_equal(found.label_ids, 5 - np.array(scenario[1].test["label"]))


def test_every_example_is_predicted(make_trainer):
    trainer = make_trainer(CONFIGS["linear-probe"](), num_tasks=1, dataloader_drop_last=True)
    trainer.train()
    trainer.args.per_device_eval_batch_size = 5  # of 48 images the last three are no whole batch
    assert trainer.predict(trainer.scenario[0]).predictions.shape == (48,)


def test_the_task_is_known_whatever_is_measured(make_trainer, data):
    trainer = make_trainer(CONFIGS["linear-probe"](), scenario=task_incremental(data, 3), num_train_epochs=1)
    trainer.train()
    assert trainer.predict(trainer.scenario[0].test).metrics["test_accuracy"] == trainer.accuracy_matrix[2, 0]
    predicted = trainer.predict(trainer.scenario[0].train).predictions
    assert set(predicted) <= {0, 1}  # rows of the first task's classes
    with pytest.raises(ValueError, match="task of a test image is known.*Give a Task"):
        trainer.evaluate(data["test"])


def test_other_examples_are_known_by_the_names_of_their_classes(make_trainer, data, reversed_ids):
    trainer = make_trainer(CONFIGS["linear-probe"](), num_train_epochs=4)
    trainer.train()
    expected = trainer.evaluate(data["test"])["eval_accuracy"]
    assert trainer.evaluate(reversed_ids["test"])["eval_accuracy"] == expected > 0.3  # chance is 0.17
    strange = data["test"].cast_column("label", datasets.ClassLabel(names=["a", "b", "c", "d", "e", "f"]))
    with pytest.raises(ValueError, match=r"labels of \['a', .*filter\(\)"):
        trainer.predict(strange)
