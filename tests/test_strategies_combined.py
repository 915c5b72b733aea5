"""Several strategies at once: which make no sense together, and what those that do leave to each other."""

from __future__ import annotations

import itertools

import pytest
from peft_cases import config_of

from peft_cl import Strategy
from peft_cl.strategies import (
    AGEM,
    EWC,
    GEM,
    HAT,
    OSF,
    DarkExperienceReplay,
    ExperienceReplay,
    FirstSessionLoRA,
    ICaRL,
    LearningWithoutForgetting,
    PackNet,
    SynapticIntelligence,
)
from peft_cl.trainer.strategy import Combined


MEMORIES = [ExperienceReplay, DarkExperienceReplay, GEM, AGEM, ICaRL]
HOLDING = [EWC, SynapticIntelligence, LearningWithoutForgetting]
REFUSED = [
    *[(*pair, "each keeps a memory of images") for pair in itertools.combinations(MEMORIES, 2)],
    *[(PackNet, other, "under (PackNet|HAT) later tasks never change") for other in (HAT, *HOLDING, *MEMORIES)],
    *[(HAT, other, "under HAT later tasks never change") for other in (*HOLDING, ExperienceReplay, GEM, AGEM, ICaRL)],
    (HAT, DarkExperienceReplay, ""),  # which has a reason of its own
    (SynapticIntelligence, EWC, "each pulls weights back"),
    (SynapticIntelligence, GEM, "GEM turns the gradients"),
    (SynapticIntelligence, AGEM, "A-GEM turns the gradients"),
    (OSF, EWC, "OSF trains other parameters in each task, and EWC holds the same"),
    (OSF, SynapticIntelligence, "OSF trains other parameters in each task"),
    (ICaRL, LearningWithoutForgetting, "each distils from the network before a task"),
]


@pytest.mark.parametrize(("kind", "other", "why"), REFUSED, ids=lambda each: getattr(each, "__name__", ""))
def test_what_makes_no_sense_together_is_refused_in_either_order(kind, other, why):
    for pair in ([kind(), other()], [other(), kind()]):
        with pytest.raises(ValueError, match=f"cannot be combined: {why}.* Give one of them"):
            Combined(pair)


def test_ders_batch_is_its_own():
    class Mixed(Strategy):
        def batch(self, trainer, inputs):
            return inputs

    with pytest.raises(ValueError, match="DER.. and Mixed cannot be combined: each puts images of its own"):
        Combined([Mixed(), DarkExperienceReplay()])
    Combined([Mixed(), ExperienceReplay()])


def test_what_makes_sense_together_is_taken():
    for strategies in (
        [EWC(), ExperienceReplay()],
        [LearningWithoutForgetting(), SynapticIntelligence()],
        [GEM(), EWC()],
    ):
        assert Combined(strategies).strategies == strategies


def test_si_lets_go_of_what_was_frozen_at_the_end_of_a_task(make_trainer):
    """LoRA after the first session: the path that it went is of no more use."""
    si = SynapticIntelligence()
    trainer = make_trainer(config_of("first"), strategy=[FirstSessionLoRA(r=2), si], num_train_epochs=1)
    trainer.train()
    assert trainer.finished_tasks == 3
    assert si.importance and not any("lora" in name for name in si.importance)
