"""A finished run is asked for more epochs: its last task goes on, as the plain Trainer's would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trainer_cases import CONFIGS

from peft_cl import CodaPromptConfig, LinearProbeConfig, class_incremental


KEPT = {"save_strategy": "epoch", "lr_scheduler_type": "constant"}
METHODS = {
    "coda": CONFIGS["coda"],
    "l2p": CONFIGS["l2p"],
    "lda": lambda: CodaPromptConfig(components_per_task=2, layers=[0, 1], head="lda"),
}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name == "coda" else pytest.mark.slow) for name in METHODS]
)
def test_it_is_what_more_epochs_from_the_start_of_the_task_give(method, make_trainer):
    make = METHODS[method]
    straight = make_trainer(make(), num_train_epochs=1, folder="straight", **KEPT)
    for task in straight.scenario:
        if task is straight.scenario[-1]:
            straight.args.num_train_epochs = 3
        straight.train_task(task)
    make_trainer(make(), num_train_epochs=1, **KEPT).train()
    longer = make_trainer(make(), num_train_epochs=3, **KEPT)
    longer.train(resume_from_checkpoint=True)
    own, theirs = (each.model.state_dict() for each in (longer, straight))
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    assert np.array_equal(longer.accuracy_matrix, straight.accuracy_matrix, equal_nan=True)
    assert [each["took"] for each in longer.learnt] == [each["took"] for each in straight.learnt]
    assert longer.results.hyperparameters["num_train_epochs"] == [1, 1, 3]


def test_of_a_run_of_one_task(make_trainer, data):
    one = class_incremental(data, 1)
    make_trainer(METHODS["coda"](), scenario=one, num_train_epochs=1, **KEPT).train()
    longer = make_trainer(METHODS["coda"](), scenario=one, num_train_epochs=2, **KEPT)
    longer.train(resume_from_checkpoint=True)
    straight = make_trainer(METHODS["coda"](), scenario=one, num_train_epochs=2, folder="straight", **KEPT)
    straight.train()
    assert longer.learnt[0]["took"] == straight.learnt[0]["took"]
    own, theirs = (each.model.state_dict() for each in (longer, straight))
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)


def test_without_a_checkpoint_the_remedy_works(make_trainer):
    make_trainer(METHODS["coda"](), num_train_epochs=1).train()
    with pytest.raises(
        ValueError, match="task_2 cannot have more epochs, as there is no checkpoint.*save_strategy='epoch'"
    ):
        make_trainer(METHODS["coda"](), num_train_epochs=2).train(resume_from_checkpoint=True)
    make_trainer(METHODS["coda"](), num_train_epochs=1, **KEPT).train()
    make_trainer(METHODS["coda"](), num_train_epochs=2, **KEPT).train(resume_from_checkpoint=True)


def test_where_nothing_is_trained_it_says_so(make_trainer):
    make_trainer(LinearProbeConfig.from_preset("best"), num_train_epochs=1, **KEPT).train()
    with pytest.raises(ValueError, match="task_2 cannot have more epochs, as no step was trained in it"):
        trainer = make_trainer(LinearProbeConfig.from_preset("best"), num_train_epochs=2, **KEPT)
        trainer.train(resume_from_checkpoint=True)


def test_an_interrupted_run_keeps_its_epochs(make_trainer):
    begun = make_trainer(METHODS["coda"](), num_train_epochs=1, **KEPT)
    begun.train_task(begun.scenario[0])
    with pytest.raises(ValueError, match="num_train_epochs: was 1, is 2. Put them back"):
        make_trainer(METHODS["coda"](), num_train_epochs=2, **KEPT).train(resume_from_checkpoint=True)


def test_fewer_epochs_are_refused(make_trainer):
    make_trainer(METHODS["coda"](), num_train_epochs=2, **KEPT).train()
    with pytest.raises(ValueError, match="num_train_epochs: was 2, is 1. Put them back"):
        make_trainer(METHODS["coda"](), num_train_epochs=1, **KEPT).train(resume_from_checkpoint=True)
