"""A pool whose tasks choose the same rows is told of, with what helps."""

from __future__ import annotations

import dataclasses
import logging

import pytest
from trainer_cases import CONFIGS

from peft_cl import L2PConfig
from peft_cl.hub.card import model_card
from peft_cl.metrics.same_rows import same_rows


def test_log_and_card_say_so_and_the_remedy_works(make_trainer, caplog):
    logger = logging.getLogger("peft_cl.trainer.trainer")
    logger.addHandler(caplog.handler)
    try:
        trainer = make_trainer(L2PConfig(pool_size=6, prompt_length=2, top_k=2), num_train_epochs=1)
        trainer.train()
        results = dataclasses.replace(trainer.results, prompt_usage=[[16, 16, 0, 0, 0, 0]] * 3)
        note = same_rows(results)
        assert "All tasks choose the same prompts: 2 of 6 rows" in note
        assert "use_prompt_mask=True with pool_size=6" in note
        assert note in model_card(results)
        # What is measured here decides whether it is logged.
        assert ("All tasks choose the same prompts" in caplog.text) == (same_rows(trainer.results) is not None)
        config = L2PConfig(pool_size=6, prompt_length=2, top_k=2, use_prompt_mask=True)
        make_trainer(config, num_train_epochs=1, folder="masked").train()
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("usage", [None, [[16, 16, 0, 0, 0, 0], [0, 0, 16, 16, 0, 0], [0, 0, 0, 0, 16, 16]]])
def test_nothing_is_said_where_they_differ_or_nothing_was_counted(usage, make_trainer):
    trainer = make_trainer(CONFIGS["l2p"](), num_train_epochs=1)
    trainer.train()
    assert same_rows(dataclasses.replace(trainer.results, prompt_usage=usage)) is None
