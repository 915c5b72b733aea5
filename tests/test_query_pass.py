"""The pass that keeps queries: recorded apart from training, shown, and left out where it cannot pay."""

from __future__ import annotations

import time

import pytest
from trainer_cases import CONFIGS

from peft_cl import CodaPromptConfig, RunResults


#: Their queries are kept in any case.
TEST_IMAGES = 48


@pytest.fixture
def passes(monkeypatch):
    """Images that went through the frozen model alone."""
    from peft_cl.tuners.base.model import PromptPoolModel

    counted, plain = [], PromptPoolModel.query

    def query(tuner, pixel_values):
        counted.append(len(pixel_values))
        return plain(tuner, pixel_values)

    monkeypatch.setattr(PromptPoolModel, "query", query)
    return counted


def test_few_steps_do_without(make_trainer, passes):
    """32 images a task; two steps go through 16 of them."""
    trainer = make_trainer(CONFIGS["l2p"](), max_steps=2)
    trainer.train()
    assert sum(passes) == TEST_IMAGES
    assert trainer.results.query_seconds == 0


def test_as_many_steps_as_there_are_images_keep_them(make_trainer, passes):
    trainer = make_trainer(CONFIGS["l2p"](), max_steps=4)
    trainer.train()
    assert sum(passes) == 3 * 32 + TEST_IMAGES
    assert trainer.results.query_seconds > 0


def test_results_are_the_same_with_and_without(make_trainer):
    found = []
    for words in ({"cache_queries": True}, {"cache_queries": False}):
        trainer = make_trainer(CONFIGS["dualprompt"](), max_steps=3, folder=str(len(found)), **words)
        trainer.train()
        found.append(trainer.accuracy_matrix.tolist())
    assert str(found[0]) == str(found[1])


def test_its_time_is_no_time_of_training(make_trainer, passes, monkeypatch, tmp_path):
    from peft_cl.tuners.base.model import PromptPoolModel

    counted = PromptPoolModel.query

    def slow(tuner, pixel_values):
        time.sleep(0.5)
        return counted(tuner, pixel_values)

    monkeypatch.setattr(PromptPoolModel, "query", slow)
    trainer = make_trainer(CONFIGS["l2p"](), num_tasks=1, max_steps=12, per_device_eval_batch_size=24)
    began = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - began
    record = RunResults.load(tmp_path / "run")
    assert sum(passes) == 96 + TEST_IMAGES
    assert record.query_seconds > 2  # 96 training images in batches of 24
    assert 0 < record.train_seconds < whole - record.query_seconds


def test_a_head_on_the_query_keeps_it_however_few_steps_there_are(make_trainer, passes):
    config = CodaPromptConfig.from_preset("best", layers=[0, 1], head="fusion", head_options={"query": "ncm"})
    trainer = make_trainer(config, max_steps=1, num_train_epochs=1)
    trainer.train()
    assert trainer.finished_tasks == 3


def test_it_has_a_bar(make_trainer, passes, monkeypatch):
    trainer = make_trainer(CONFIGS["l2p"](), num_tasks=1, max_steps=12, per_device_eval_batch_size=24)
    shown, plain = [], trainer.progress.counted

    def counted(items, total, what):
        shown.append((what, total))
        return plain(items, total, what)

    monkeypatch.setattr(trainer.progress, "counted", counted)
    trainer.train()
    assert ("queries", 4) in shown
