"""iCaRL: exemplars, what is learnt from them, and the nearest mean of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from replay_cases import (
    EXEMPLARS,
    config_for,
    make_small,  # noqa: F401
    on_backbone,
)

from peft_cl import CodaPromptConfig, Strategy, domain_incremental
from peft_cl.strategies import EWC, FineTuning
from peft_cl.strategies.icarl import ICaRL, herd, sigmoid_loss


FEATURES = [
    [0.9, 0.09, -0.74],
    [-0.92, -0.46, 0.22],
    [-1.01, -0.21, -0.16],
    [0.54, 0.21, 0.36],
    [-0.65, -0.13, 0.78],
    [1.49, -1.26, 1.51],
    [1.35, 0.78, 0.26],
    [-0.31, 1.46, 1.96],
    [1.8, 1.32, 0.36],
]


def test_herding_chooses_as_avalanche_does():
    """Made by `HerdingSelectionStrategy.make_sorted_indices_from_features` of avalanche-lib 0.6.0."""
    order = [3, 4, 6, 1, 8, 2, 5, 7, 0]
    assert herd(torch.tensor(FEATURES), 20).tolist() == order
    assert herd(torch.tensor(FEATURES), 4).tolist() == order[:4]  # it may be cut from the end (Alg. 5)


def test_icarls_loss_is_avalanches():
    """Made by `ICaRLLossPlugin` of avalanche-lib 0.6.0, whose mean is over the 4 classes too."""
    logits = torch.tensor([[-1.21, 0.0, 0.66, -1.29], [0.4, 0.43, 0.7, -1.18], [-0.66, -0.44, -1.17, 1.74]])
    before = torch.tensor([[-0.5, 0.33], [1.32, 0.63], [0.68, 1.0]]).sigmoid()
    new = F.one_hot(torch.tensor([2, 3, 0]), 4)[:, 2:].float()
    found = sigmoid_loss(logits[:, 2:], new) + sigmoid_loss(logits[:, :2], before)
    assert found.item() == pytest.approx(4 * 0.80960613489151, rel=1e-6)


@pytest.mark.parametrize("on", ["backbone", "l2p"])
def test_icarl_classifies_by_the_nearest_mean_of_its_exemplars(on, make_trainer):
    icarl = ICaRL(15)
    if on == "backbone":
        trainer = on_backbone(make_trainer, icarl)
    else:
        trainer = make_trainer(config_for(icarl, "l2p"), strategy=icarl, num_train_epochs=1)
    for task, count in zip(trainer.scenario, (7, 3, 2), strict=True):
        before = icarl.store.places.tolist()
        trainer.train_task(task)
        labels = icarl.store.labels(trainer, icarl.store.places)
        assert np.bincount(labels).tolist() == [count] * 2 * (task.index + 1)
        assert all(place in before for place in icarl.store.places.tolist() if place[0] < task.index)
    head = trainer.tuner.head.active
    for label in range(6):
        chosen = icarl.store.places[labels == label]
        (batch,) = trainer.plain_batches(trainer.scenario[int(chosen[0, 0])], rows=chosen[:, 1].tolist())
        features, _ = trainer.tuner.features(batch["pixel_values"])
        mean = F.normalize(F.normalize(features, dim=-1).mean(0), dim=-1)  # Alg. 1
        torch.testing.assert_close(head.weight[label] / head.scale, mean, atol=1e-5, rtol=1e-5)
    assert trainer.metrics["average_accuracy"] > 0.7


def test_icarl_begins_each_task_with_the_outputs_of_the_network_before(make_trainer):
    """Without a step in between, the distillation is the entropy of the old outputs: it has no gradient."""
    found = []

    class Watched(ICaRL):
        def losses(self, trainer, inputs, logits):
            terms = super().losses(trainer, inputs, logits)
            if terms:
                old = logits[:, : 2 * trainer.task.index].detach()
                gradient = torch.autograd.grad(terms["distillation"], logits, retain_graph=True)[0]
                found.append((terms["distillation"].item(), float(sigmoid_loss(old, old.sigmoid())), gradient))
            return terms

    trainer = on_backbone(make_trainer, Watched(12), max_steps=2)
    trainer.train()
    assert len(found) == 4
    for first, then in (found[:2], found[2:]):
        assert first[0] == pytest.approx(first[1], rel=1e-5) and first[2].abs().max() < 1e-6
        assert then[2].abs().max() > 1e-6


def test_icarl_trains_on_the_task_and_all_exemplars(make_trainer):
    seen = []

    class Watch(Strategy):
        def batch(self, trainer, inputs):
            seen.append((trainer.task.index, inputs["labels"].tolist()))
            return inputs

    on_backbone(make_trainer, ICaRL(12), Watch()).train()
    for task, exemplars in enumerate(([], [3] * 4, [3] * 4)):
        labels = np.bincount([label for number, batch in seen if number == task for label in batch], minlength=6)
        exemplars = {0: [], 1: [6, 6], 2: [3, 3, 3, 3]}[task]
        assert labels.tolist() == [*exemplars, 16, 16, *[0] * (4 - 2 * task)]


def test_icarl_is_measured_within_a_task_too(make_trainer):
    icarl = ICaRL(12)
    trainer = on_backbone(make_trainer, icarl, eval_strategy="steps", eval_steps=2)
    trainer.train()
    within = [
        entry["eval_average_accuracy"] for entry in trainer.state.log_history if "eval_average_accuracy" in entry
    ]
    assert within and trainer.finished_tasks == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"head": "linear", "head_options": {}},
            "head is 'linear' .* Set these in .*: head 'ncm'",
        ),
        ({"head_options": {"metric": "cosine"}}, "classifies by the nearest mean of exemplars"),
        ({"head_features": "cls+mean"}, "head_features='cls\\+mean', but iCaRL"),
        ({"train_mask": True}, "train_mask is True, but iCaRL trains on classes of earlier tasks"),
    ],
)
def test_icarl_refuses_other_heads(settings, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(config_for(ICaRL(), **settings), strategy=ICaRL())


def test_icarl_refuses_what_it_has_no_exemplars_for(make_trainer, data):
    with pytest.raises(ValueError, match="memory_size is 5, but must be at least the number of classes, 6"):
        make_trainer(config_for(ICaRL()), strategy=ICaRL(5))
    domains = {split: part.add_column("domain", [0, 1] * (len(part) // 2)) for split, part in data.items()}
    again = domain_incremental(domains)
    with pytest.raises(ValueError, match="brings classes again in later tasks, but iCaRL"):
        make_trainer(config_for(ICaRL()), strategy=ICaRL(), scenario=again)
    trainer = make_trainer(config_for(ICaRL()), num_train_epochs=1)
    trainer.train_task(trainer.scenario[0])
    with pytest.raises(ValueError, match="has learnt 1 tasks, of whose classes iCaRL has no exemplars"):
        make_trainer(None, model=trainer.model, strategy=ICaRL(), folder="more")
    coda = CodaPromptConfig(layers=[0, 1], train_mask=False, **EXEMPLARS)
    with pytest.raises(ValueError, match="The adapter is CODA-Prompt, but iCaRL"):
        make_trainer(coda, strategy=ICaRL())


def test_a_computed_head_on_a_trained_backbone_needs_exemplars(make_trainer):
    with pytest.raises(ValueError, match="Fine-tuning changes all features with each task"):
        make_trainer(config_for(ICaRL()), strategy=FineTuning())
    with pytest.raises(ValueError, match="EWC holds weights"):
        make_trainer(config_for(ICaRL()), strategy=[FineTuning(), ICaRL(), EWC()])


def test_of_exemplars_that_were_laid_out_before_nothing_is_kept(make_trainer, tmp_path):
    icarl = ICaRL(12)
    images = {"image_cache_dir": str(tmp_path / "images")}
    trainer = make_trainer(config_for(icarl, "l2p"), strategy=icarl, num_train_epochs=1, **images)
    trainer.train()
    tests, parts = (
        [id(data) for data in group]
        for group in ([task.test for task in trainer.scenario], [part.train for part in icarl.store.parts])
    )
    assert set(trainer.queries._queries) == {*tests, *parts}
    assert {place for place in trainer.images._images if place not in tests} == set(parts)
