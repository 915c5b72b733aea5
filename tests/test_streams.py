"""Streams without task boundaries: how they are made, and how adapters learn from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from trainer_cases import CONFIGS
from transformers import TrainerCallback

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig, task_free
from peft_cl.strategies import JointTraining, NearestClassMean


STREAMING = {
    "l2p": CONFIGS["l2p"],
    "dualprompt": lambda: DualPromptConfig(prompt_length=2, g_prompt_length=2, pool_size=4),
    "coda": lambda: CodaPromptConfig(components_per_task=4, prompt_length=4),
    "linear-probe": CONFIGS["linear-probe"],
}


def groups(stream) -> np.ndarray:
    """The group (of two classes) of each image of the stream, in order."""
    labels = np.concatenate([np.asarray(task.train["label"]) for task in stream])
    return labels // 2


def test_each_image_comes_once_a_pass_and_groups_come_in_turn(data):
    for passes in (1, 3):
        stream = task_free(data, 3, blur=0.5, passes=passes)
        order = groups(stream)
        assert np.bincount(order).tolist() == [32 * passes] * 3
        means = [np.flatnonzero(order == group).mean() for group in range(3)]
        assert means == sorted(means)
    assert not stream.boundaries and stream.describe()["name"] == "task-free"
    assert [task.classes for task in stream] == [("red", "green"), ("blue", "yellow"), ("cyan", "magenta")]


def test_the_blur_is_the_spread_of_a_group(data):
    spread = [np.flatnonzero(groups(task_free(data, 3, blur=blur)) == 1).std() for blur in (0.0, 0.3, 1.0)]
    assert spread == sorted(spread) and spread[2] > 1.5 * spread[0]
    hard = groups(task_free(data, 3, blur=0.0))
    assert (np.diff(hard) >= 0).all()  # one group after the other
    seeds = [groups(task_free(data, 3, stream_seed=seed)) for seed in (0, 0, 1)]
    assert (seeds[0] == seeds[1]).all() and (seeds[0] != seeds[2]).any()


def test_a_stretch_is_as_long_as_its_group(data):
    stream = task_free(data, classes_per_task=[4, 1, 1], blur=0.0, passes=2)
    assert [len(task.train) for task in stream] == [128, 32, 32]
    assert [set(task.train["label"]) for task in stream] == [{0, 1, 2, 3}, {4}, {5}]


def test_an_interrupted_stream_is_not_gone_on_with_in_the_same_process(make_trainer, data):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    words = {"scenario": task_free(data, 3), "num_train_epochs": 1, "lr_scheduler_type": "constant"}
    trainer = make_trainer(CONFIGS["l2p"](), callbacks=[Stop()], **words)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for resume in (None, True):
        with pytest.raises(RuntimeError, match="task_0 was begun and interrupted.*Make model and trainer anew"):
            trainer.train(resume_from_checkpoint=resume)


def test_classes_may_be_left_out(data):
    stream = task_free(data, 2, class_order=["cyan", "red"])
    assert stream.classes == ("cyan", "red") and sum(len(task.train) for task in stream) == 32


@pytest.mark.parametrize("name", STREAMING)
def test_a_stream_is_learnt_saved_and_reloaded(name, make_trainer, tiny_vit, data, tmp_path):
    trainer = make_trainer(
        STREAMING[name](),
        scenario=task_free(data, 3, passes=3),
        num_train_epochs=1,
        lr_scheduler_type="constant",
    )
    orders, optimizers, step = [], set(), trainer.training_step

    def watched(model, inputs, *more):
        orders.extend(inputs["labels"].tolist())
        optimizers.add(id(trainer.optimizer.optimizer))
        return step(model, inputs, *more)

    trainer.training_step = watched
    trainer.train()
    assert len(optimizers) == 1  # one goes on over the stretches
    expected = np.concatenate([trainer.scenario.model_labels(task, "train") for task in trainer.scenario])
    assert orders == expected.tolist()  # in the stream's own order
    assert trainer.metrics["average_accuracy"] > 0.5
    loaded = PeftModel.from_pretrained(tiny_vit(num_labels=2), tmp_path / "run")
    assert loaded.peft_config["default"].stream
    images = torch.stack([torch.rand(3, 32, 32) for _ in range(2)])
    trainer.model.eval()
    torch.testing.assert_close(loaded(images).logits, trainer.model(images).logits)


def test_dualprompt_chooses_and_trains_any_row_by_its_key(tiny_vit):
    model = get_peft_model(tiny_vit(), DualPromptConfig(prompt_length=2, g_prompt_length=2, pool_size=4))
    model.begin_stream(["a", "b"])
    pool = model.base_model.pool
    assert pool.rows_in_use == 4 and model.peft_config["default"].rows_in_use == 4
    torch.nn.init.normal_(pool.keys)
    images = torch.rand(16, 3, 32, 32)
    model.train()
    query = torch.randn(16, 48)
    model(pixel_values=images, query=query, labels=torch.arange(16) % 2).loss.backward()
    chosen = model.base_model.head.last_selected.unique().tolist()
    with torch.no_grad():
        model.eval()(pixel_values=images, query=query)
    assert model.base_model.head.last_selected.unique().tolist() == chosen and len(chosen) > 1
    touched = pool.prompts.grad.flatten(-2).abs().sum(dim=(0, 1, 3)).nonzero().flatten().tolist()
    assert touched == chosen
    assert pool.keys.grad[0].abs().sum(-1).nonzero().flatten().tolist() == chosen


def test_the_loss_of_a_stream_is_over_the_classes_in_the_batch(tiny_vit):
    losses = []
    for train_mask in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(tiny_vit(), LinearProbeConfig(train_mask=train_mask, head_init="zeros"))
        model.begin_stream(["a", "b", "c", "d"])
        images, labels = torch.rand(4, 3, 32, 32), torch.tensor([1, 3, 3, 1])
        losses.append(model.train()(pixel_values=images, labels=labels).loss.item())
        with pytest.raises(ValueError, match="labels reach from 1 to 9"):
            model(pixel_values=images, labels=torch.tensor([1, 9, 1, 1]))
        assert torch.isfinite(model.eval()(pixel_values=images).logits).all()
    # A head of zeros is undecided between 2 classes, or between 4.
    assert losses == pytest.approx([np.log(2), np.log(4)])


def test_nearest_class_means_of_a_stream_know_what_they_have_seen(make_trainer, data):
    trainer = make_trainer(
        CONFIGS["linear-probe"](),
        scenario=task_free(data, 3, blur=0.0),
        strategy=NearestClassMean(),
        num_train_epochs=1,
        lr_scheduler_type="constant",
    )
    trainer.train()
    assert np.isfinite(trainer.metrics["average_accuracy"]) and trainer.metrics["average_accuracy"] > 0.5


def test_a_stretch_made_by_hand_has_images_of_its_stream_alone(data):
    stream = task_free(data, 3)
    with pytest.raises(ValueError, match=r"Task 'task_0': The train split has examples of .*classes of the stream"):
        stream.changed(stream[:1])
    with pytest.raises(ValueError, match=r"Task 'task_0': The test split has examples of .*classes of the task"):
        stream.changed([replace(stream[0], test=data["test"]), *stream[1:]])


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"blur": "0.5"}, "blur is '0.5', but must be a number of at least 0"),
            ({"blur": True}, "blur is True, but must be a number of at least 0"),
            ({"blur": float("nan")}, "blur is nan, but must be a number of at least 0"),
            ({"blur": -1}, "blur is -1, but must be a number of at least 0"),
            ({"passes": 0}, "passes is 0, but must be a whole number of at least 1"),
            ({"stream_seed": -1}, "stream_seed is -1, but must be a whole number of at least 0"),
            ({"stream_seed": None}, "stream_seed is None, but must be a whole number.*a resumed run draws the same"),
            ({"seed": "x"}, "seed is 'x', but must be a whole number"),
            ({"num_tasks": 9}, "6 classes cannot make 9 tasks"),
        ],
    )
    def test_of_the_scenario(self, data, settings, message):
        with pytest.raises(ValueError, match=message):
            task_free(data, **{"num_tasks": 3, **settings})

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (L2PConfig(use_prompt_mask=True, pool_size=30), "use_prompt_mask is True.*a stream has no tasks"),
            (L2PConfig(frequency_penalty=True), "frequency_penalty is True.*a stream has none"),
            (DualPromptConfig(pool_size=None), "pool_size is None.*a stream has no tasks"),
            (L2PConfig(task_evidence=6), "task_evidence is 6, but a stream has no tasks"),
        ],
    )
    def test_of_settings_that_need_tasks(self, config, message, make_trainer, data):
        with pytest.raises(ValueError, match=message):
            make_trainer(config, scenario=task_free(data, 3), num_train_epochs=1, lr_scheduler_type="constant")

    @pytest.mark.parametrize(
        ("training", "message"),
        [
            ({"num_train_epochs": 2}, "num_train_epochs is 2 .*gone through once.*passes"),
            ({"max_steps": 5}, "max_steps 5"),
            ({"lr_scheduler_type": "linear"}, "lr_scheduler_type is 'linear'.*end of a stream is not known"),
            ({"warmup_steps": 5}, "warmup_steps=5"),
        ],
    )
    def test_of_arguments_that_need_an_end(self, training, message, make_trainer, data):
        settings = {"num_train_epochs": 1, "lr_scheduler_type": "constant", **training}
        with pytest.raises(ValueError, match=message):
            make_trainer(CONFIGS["l2p"](), scenario=task_free(data, 3), **settings)

    def test_of_strategies_that_need_tasks(self, make_trainer, data):
        settings = {"num_train_epochs": 1, "lr_scheduler_type": "constant", "scenario": task_free(data, 3)}
        with pytest.raises(ValueError, match="joint training needs tasks with an end"):
            make_trainer(LinearProbeConfig(train_mask=False), strategy=JointTraining(), **settings)

    def test_tasks_and_streams_do_not_mix(self, tiny_vit, data):
        model = get_peft_model(tiny_vit(), CONFIGS["l2p"]())
        model.begin_stream(["a"])
        with pytest.raises(ValueError, match="learnt from a stream, which has no tasks"):
            model.begin_task(["b"])
        model = get_peft_model(tiny_vit(), CONFIGS["l2p"]())
        model.begin_task(["a"])
        with pytest.raises(ValueError, match="has begun 1 tasks, but a stream has none"):
            model.begin_stream(["b"])
        with pytest.raises(ValueError, match="one stream, to which no task can be added"):
            task_free(data, 3).with_task(data)
