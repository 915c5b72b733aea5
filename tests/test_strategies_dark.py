"""DER++: images with the logits that the model gave for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from replay_cases import (
    config_for,
    make_small,  # noqa: F401
    on_backbone,
)

from peft_cl import Strategy
from peft_cl.strategies.dark_experience_replay import DarkExperienceReplay, logit_distance, widened


def test_the_distance_of_logits_is_over_the_classes_there_were():
    kept = torch.tensor([[1.0, 2.0, torch.nan], [0.0, 0.0, 3.0]])
    logits = torch.tensor([[0.0, 2.0, 9.0], [1.0, 2.0, 3.0]], requires_grad=True)
    distance = logit_distance(logits, kept)
    assert distance.item() == pytest.approx(((1 + 0) / 2 + (1 + 4 + 0) / 3) / 2)
    distance.backward()
    assert logits.grad[0, 2] == 0
    assert widened(kept, 3, 4).isnan().sum() == 1 + 2 + 4 and widened(kept, 1, 1).shape == kept.shape


def test_der_keeps_the_logits_of_its_images(make_trainer):
    """Of a network that hardly moves, the kept logits are those that it gives for the images at the kept places."""
    der = DarkExperienceReplay(20)
    trainer = on_backbone(make_trainer, der, learning_rate=1e-12)
    trainer.train()
    assert der.store.seen == 96 and len(der.store) == 20 and set(der.store.places[:, 0]) == {0, 1, 2}
    assert der.logits.shape == (20, 6)
    trainer.model.eval()
    for (number, row), kept in zip(der.store.places.tolist(), der.logits, strict=True):
        known = 2 * (number + 1)
        assert kept[known:].isnan().all()
        (batch,) = trainer.plain_batches(trainer.scenario[number], rows=[row])
        with torch.no_grad():
            logits = trainer.model(pixel_values=batch["pixel_values"]).logits[0]
        torch.testing.assert_close(kept[:known], logits[:known], atol=1e-5, rtol=1e-5)
    terms = [entry["logit_replay"] for entry in trainer.state.log_history if "logit_replay" in entry]
    assert terms and max(terms) < 1e-8
    kept = trainer.strategy.kept_bytes(trainer)
    assert kept == {"memory": 20 * 3072, "logits of the memory": 4 * int((~der.logits.isnan()).sum())}


def test_ders_terms_are_of_the_batch_and_of_two_draws_from_the_memory(make_trainer):
    found = []

    class Watch(Strategy):
        def losses(self, trainer, inputs, logits):
            labels, logits = inputs["labels"], logits.detach()
            replayed = {"label_replay": 0.5 * F.cross_entropy(logits[16:], labels[16:])} if len(labels) > 8 else {}
            found.append({"own_loss": F.cross_entropy(logits[:8], labels[:8]), **replayed})
            if replayed:
                memory = der.store.labels(trainer, der.store.places).tolist()
                assert len(labels) == 24 and set(labels[8:].tolist()) <= set(memory)
            return {}

    der = DarkExperienceReplay(10)
    trainer = make_trainer(config_for(der, "l2p"), strategy=[Watch(), der], num_train_epochs=1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "own_loss" in entry]
    assert len(found) == 12 and len(logs) == 4  # of the last task
    for entry, expected in zip(logs, found[-4:], strict=True):
        assert entry["logit_replay"] > 0
        for name, value in expected.items():
            assert entry[name] == pytest.approx(float(value), rel=1e-5)
