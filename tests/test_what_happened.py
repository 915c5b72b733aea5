"""What a run is recorded as is what happened; of steps that were lost nothing is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from trainer_cases import CONFIGS
from transformers import pipeline

from peft_cl import L2PConfig, LinearProbeConfig, RunResults, class_incremental, dataset_sequence, task_free
from peft_cl.trainer.task_trainer import TaskTrainer


def test_a_setting_that_changed_on_the_way_is_a_value_for_each_task(make_trainer, tmp_path):
    trainer = make_trainer(CONFIGS["linear-probe"](), num_train_epochs=1)
    trainer.train_task(trainer.scenario[0])
    assert trainer.results.hyperparameters["num_train_epochs"] == 1
    trainer.args.num_train_epochs = 3
    trainer.args.per_device_train_batch_size = 16
    trainer.args.learning_rate = 0.5
    trainer.train_task(trainer.scenario[1])
    trainer.args.learning_rate = 1.0  # of no task that is finished
    results = RunResults.load(tmp_path / "run")
    assert results.hyperparameters["num_train_epochs"] == [1, 3]
    assert results.hyperparameters["per_device_train_batch_size"] == [8, 16]
    assert results.hyperparameters["learning_rate"] == [0.01, 0.5] == trainer.results.hyperparameters["learning_rate"]
    assert results.hyperparameters["weight_decay"] == 0.0
    assert results.learnt == [
        {"epochs": 1.0, "steps": 4, "images_per_step": 8},
        {"epochs": 3.0, "steps": 6, "images_per_step": 16},
    ]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| Epochs per task | 1, 3 (task by task) |" in card


def test_steps_in_place_of_epochs_in_one_task(make_trainer, tmp_path):
    trainer = make_trainer(CONFIGS["linear-probe"](), num_train_epochs=1)
    trainer.train_task(trainer.scenario[0])
    trainer.args.max_steps = 2
    trainer.train_task(trainer.scenario[1])
    assert trainer.results.hyperparameters["max_steps"] == [-1, 2]
    assert [task["steps"] for task in trainer.results.learnt] == [4, 2]
    assert "| Steps per task | -1, 2 (task by task) |" in (tmp_path / "run" / "README.md").read_text()


def test_what_happened_is_known_after_a_resume(make_trainer, data):
    def trainer(**words):
        return make_trainer(CONFIGS["linear-probe"](), num_train_epochs=1, **words)

    first = trainer()
    first.train_task(first.scenario[0])
    first.args.num_train_epochs = 2
    first.train_task(first.scenario[1])
    again = make_trainer(CONFIGS["linear-probe"](), num_train_epochs=2)
    again.train(resume_from_checkpoint=True)
    assert again.results.hyperparameters["num_train_epochs"] == [1, 2, 2]
    assert [task["epochs"] for task in again.results.learnt] == [1.0, 2.0, 2.0]


def out_of_memory(monkeypatch, most: int, after: int) -> None:
    """Let memory be too small for more than `most` images, from the third step of a task on."""
    step = TaskTrainer.training_step

    def training_step(self, model, inputs, *args):
        if len(inputs["labels"]) > most and self.state.global_step >= after:
            raise RuntimeError("CUDA out of memory.")
        return step(self, model, inputs, *args)

    monkeypatch.setattr(TaskTrainer, "training_step", training_step)


KINDS = {
    "evidence": lambda: L2PConfig(pool_size=6, prompt_length=2, top_k=2, task_evidence=6.0),
    "pool": lambda: CONFIGS["dualprompt"](),
    "stream": lambda: LinearProbeConfig(head="lda", train_prompts="every_task"),
    "stream of prompts": lambda: L2PConfig(pool_size=6, prompt_length=2, top_k=2, head="ncm"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_batch_begins_the_task_anew(kind, make_trainer, data, monkeypatch):
    """The result is that of a run that had this batch from the start, to the bit."""
    words = {"num_train_epochs": 2}
    if kind.startswith("stream"):
        words = {"num_train_epochs": 1, "lr_scheduler_type": "constant", "scenario": task_free(data, 2)}
    whole = make_trainer(KINDS[kind](), folder="whole", per_device_train_batch_size=7, **words)
    whole.train()
    out_of_memory(monkeypatch, 7, after=2)
    trainer = make_trainer(KINDS[kind](), auto_find_batch_size=True, **words)
    trainer.train()
    states = [each.model.state_dict() for each in (whole, trainer)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    sums = [each.tuner.head.active.going_on() for each in (whole, trainer)]
    for name, value in sums[0].items():
        assert torch.equal(value, sums[1][name]), name
    np.testing.assert_array_equal(trainer.accuracy_matrix, whole.accuracy_matrix)
    assert trainer.results.learnt == whole.results.learnt
    if trainer.results.learnt[0]["steps"]:
        assert trainer.results.hyperparameters["per_device_train_batch_size"] == 7


def test_the_checkpoints_of_lost_steps_go_with_them(make_trainer, monkeypatch, tmp_path):
    out_of_memory(monkeypatch, 7, after=3)
    words = {"auto_find_batch_size": True, "num_tasks": 1, "save_strategy": "steps", "save_steps": 2}
    make_trainer(CONFIGS["coda"](), max_steps=3, **words).train()
    steps = sorted(path.name for path in (tmp_path / "run" / "_state" / "task_0").glob("checkpoint-*"))
    assert steps == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_base_of_another_problem_answers_as_a_classifier(problem, tiny_vit, processor, data):
    base = tiny_vit(problem_type=problem)
    model = get_peft_model(base, CONFIGS["l2p"]())
    model.begin_task(["red", "green", "blue"])
    assert base.config.problem_type == "single_label_classification"
    with model.disable_adapter():
        assert base.config.problem_type == problem
    assert base.config.problem_type == "single_label_classification"
    classify = pipeline("image-classification", model=base.eval(), image_processor=processor, device="cpu")
    scores = [entry["score"] for entry in classify(data["test"][0]["image"], top_k=3)]
    assert sum(scores) == pytest.approx(1.0, abs=1e-5)
    model.unload()
    assert base.config.problem_type == problem


def test_a_base_without_a_problem_type_keeps_none(tiny_vit):
    base = tiny_vit()
    model = get_peft_model(base, CONFIGS["l2p"]())
    assert base.config.problem_type is None
    model.begin_task(["red"])
    model.unload()
    assert base.config.problem_type is None


def test_pixels_of_the_users_own_are_refused(data):
    ready = {name: part.add_column("pixel_values", [[0.0]] * len(part)) for name, part in data.items()}
    for make in (lambda: class_incremental(ready, 2), lambda: dataset_sequence({"a": ready})):
        with pytest.raises(ValueError, match=r"column 'pixel_values'.*would not be read.*remove_columns"):
            make()
    one = {"train": data["train"], "test": ready["test"]}
    with pytest.raises(ValueError, match="The test split has a column 'pixel_values'"):
        class_incremental(one, 2)


def test_images_that_are_called_pixel_values_are_images(data):
    named = {name: part.rename_column("image", "pixel_values") for name, part in data.items()}
    assert class_incremental(named, 2).image_column == "pixel_values"
