"""The row that prompts have to beat comes with a run where it costs nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trainer_cases import CONFIGS

from peft_cl import CodaPromptConfig, LinearProbeConfig, class_incremental, task_incremental


LDA = LinearProbeConfig  # with head="lda": frozen features alone


@pytest.mark.parametrize("scenario", [class_incremental, task_incremental])
@pytest.mark.parametrize(
    "method", ["coda", *(pytest.param(each, marks=pytest.mark.slow) for each in ("l2p", "linear-probe"))]
)
def test_it_is_lda_of_the_frozen_features(method, scenario, make_trainer, data):
    tasks = scenario(data, 3)
    trainer = make_trainer(CONFIGS[method](), scenario=tasks)
    trainer.train()
    alone = make_trainer(LDA(head="lda"), scenario=tasks, folder="alone")
    alone.train()
    row = trainer.results.without_prompts
    assert row["head"] == "LDA" and len(row["accuracies"]) == 3
    assert row["accuracies"] == pytest.approx(list(alone.accuracy_matrix[-1]))


def test_a_fused_head_has_it_already(make_trainer):
    config = CodaPromptConfig.from_preset("best", components_per_task=2, layers=[0, 1], head_layers=2)
    trainer = make_trainer(config)
    trainer.train()
    alone = make_trainer(LinearProbeConfig.from_preset("best", head_layers=2), folder="alone")
    alone.train()
    row = trainer.results.without_prompts
    assert row["head"] == alone.tuner.head.active.title == "kernel LDA"
    assert row["accuracies"] == pytest.approx(list(alone.accuracy_matrix[-1]))
    assert alone.results.without_prompts is None  # it is that row itself


def test_it_needs_no_pass_and_is_none_where_it_would(make_trainer):
    passes = []
    for words in ({}, {"cache_queries": False}, {"augmentation": lambda image: image.rotate(3)}):
        trainer = make_trainer(CONFIGS["coda"](), folder=str(len(passes)), **words)
        query = trainer.tuner.query
        trainer.tuner.query = lambda *given, query=query, **more: passes.append(1) or query(*given, **more)
        trainer.train()
        assert (trainer.results.without_prompts is None) == bool(words)


def test_it_is_the_same_after_an_interruption(make_trainer):
    whole = make_trainer(CONFIGS["coda"](), folder="whole")
    whole.train()
    begun = make_trainer(CONFIGS["coda"]())
    for task in begun.scenario[:2]:
        begun.train_task(task)
    resumed = make_trainer(CONFIGS["coda"]())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.results.without_prompts == whole.results.without_prompts is not None
    assert np.array_equal(resumed.accuracy_matrix, whole.accuracy_matrix, equal_nan=True)
    assert torch.equal(resumed.without_prompts.head.weight, whole.without_prompts.head.weight)
