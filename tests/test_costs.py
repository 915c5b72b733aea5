"""What a run takes beside time, as its record says it: operations, memory, bytes that are kept."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trainer_cases import CONFIGS, whole_and_resumed

from peft_cl import LinearProbeConfig, RunResults
from peft_cl.strategies import EWC, ExperienceReplay, FineTuning
from peft_cl.trainer.costs import ALSO_COUNTED, Flops


def learnt(make_trainer, config, folder: str, **words):
    trainer = make_trainer(config, folder=folder, num_train_epochs=1, count_flops=True, **words)
    trainer.train()
    return trainer.results


def test_operations_are_those_of_the_products(make_trainer):
    """Fine-tuning: forward, and twice as much backward, of each image and epoch; the backbone's products by hand."""
    results = learnt(make_trainer, LinearProbeConfig(train_mask=False), "run", strategy=FineTuning())
    trainer = make_trainer(LinearProbeConfig(), folder="other")
    with FlopCounterMode(display=False, custom_mapping=ALSO_COUNTED) as counter, torch.no_grad():
        trainer.model.get_base_model()(torch.rand(1, 3, 32, 32))
    images = sum(results.scenario["train_sizes"])
    # Ours is less: of the last layer it computes what the classifier reads.
    assert 2.4 < results.flops / (counter.get_total_flops() * images) <= 3.0


def test_what_is_computed_once_counts_once(make_trainer):
    """A head on frozen features takes one pass over the images, prompts with kept queries one and their training."""
    frozen = learnt(make_trainer, LinearProbeConfig(head="lda"), "frozen")
    prompts = learnt(make_trainer, CONFIGS["l2p"](), "l2p")
    more = make_trainer(CONFIGS["l2p"](), folder="more", num_train_epochs=3, count_flops=True)
    more.train()
    assert 0 < frozen.flops < prompts.flops
    steps = (more.results.flops - prompts.flops) / 2  # of one epoch, by the first step of each task
    assert prompts.flops == pytest.approx(frozen.flops + steps, rel=0.05)


@pytest.mark.slow
def test_strategies_count(make_trainer):
    config = LinearProbeConfig(train_mask=False)
    plain = learnt(make_trainer, config, "plain", strategy=FineTuning())
    ewc = learnt(make_trainer, config, "ewc", strategy=[FineTuning(), EWC(fisher_samples=8)])
    replay = learnt(make_trainer, config, "er", strategy=[FineTuning(), ExperienceReplay(30)])
    assert plain.flops < ewc.flops < 1.4 * plain.flops
    assert 1.4 * plain.flops < replay.flops < 2 * plain.flops


def test_nothing_is_counted_unasked(make_trainer):
    trainer = make_trainer(LinearProbeConfig(head="lda"), num_train_epochs=1)
    trainer.train()
    assert trainer.results.flops is None
    assert RunResults.load(trainer.folder).peak_memory_bytes > 1e8  # torch alone
    assert trainer.results.kept_bytes == {}


def test_an_interruption_changes_no_count(make_trainer):
    def make(**words):
        return make_trainer(CONFIGS["coda"](), num_train_epochs=1, count_flops=True, **words)

    whole, again = whole_and_resumed(make)
    assert whole.results.flops == again.results.flops > 0


def test_a_step_within_a_counted_block_is_not_counted_twice():
    weight = torch.ones(4, 4, requires_grad=True)
    flops = Flops(True)
    with flops.counted(), flops.step():
        weight @ weight
    flops.end_steps(10)
    assert flops.total == 2 * 4**3


def product(size: int) -> int:
    """Multiplies two matrices; returns the operations that it takes."""
    weight = torch.ones(size, size, requires_grad=True)
    weight @ weight
    return 2 * size**3


def test_batches_that_are_accumulated_are_one_step():
    """GEM computes the gradients of its memory with the last of them."""
    flops = Flops(True)
    for _ in range(5):
        for size in (2, 4):
            with flops.step(ends=size == 4):
                product(size)
    flops.end_steps(5)
    assert flops.total == 5 * (product(2) + product(4))


@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 2)])
def test_the_larger_of_the_first_two_steps_stands_for_the_others(first, second):
    """The first may find a memory empty, and the second may have the last batch of an epoch."""
    flops = Flops(True)
    for size in (first, second, 3, 3):
        with flops.step():
            product(size)
    flops.end_steps(4)
    assert flops.total == product(first) + product(second) + 2 * product(4)
    with flops.step():
        product(2)
    flops.end_steps(1)
    assert flops.total == product(first) + product(second) + 2 * product(4) + product(2)
