"""What a method of the user's own can rely on: when gradients are handed to it, and that its labels are measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trainer_cases import CONFIGS

from peft_cl import LinearProbeConfig, Strategy


SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "weight_decay": 0.0}


class Watch(Strategy):
    """Keeps a copy of the gradients that it is handed, and of the weights at that moment."""

    def __init__(self):
        self.gradients, self.weights, self.steps = [], [], []

    def after_backward(self, trainer):
        self.steps.append(trainer.state.global_step)
        self.gradients.append({name: value.grad.clone() for name, value in trained(trainer).items()})
        self.weights.append({name: value.detach().clone() for name, value in trained(trainer).items()})


def trained(trainer) -> dict[str, torch.nn.Parameter]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def learn_one_task(make_trainer, *strategies, **training):
    """A trainer that has learnt the first of three tasks, of 32 images; and the weights then."""
    trainer = make_trainer(CONFIGS["linear-probe"](), strategy=list(strategies), **{**SGD, **training})
    trainer.train_task(trainer.scenario[0])
    return {name: value.detach().clone() for name, value in trained(trainer).items()}


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 4), (2, 2), (3, 2)])
def test_gradients_are_handed_over_once_a_step(accumulation, steps, make_trainer):
    watch = Watch()
    learn_one_task(make_trainer, watch, gradient_accumulation_steps=accumulation)
    assert watch.steps == list(range(2 * steps))  # two epochs; the step itself is still to come
    # The optimizer takes those gradients alone: w' = w - 0.1 g.
    for before, gradients, after in zip(watch.weights, watch.gradients, watch.weights[1:], strict=False):
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        for name, gradient in gradients.items():
            clipped = gradient / max(1.0, float(norm))
            torch.testing.assert_close(after[name], before[name] - 0.1 * clipped)


def test_accumulated_gradients_are_complete(make_trainer):
    whole, parts = Watch(), Watch()
    learn_one_task(make_trainer, whole, per_device_train_batch_size=16, folder="whole")
    learn_one_task(make_trainer, parts, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    for one, other in zip(whole.gradients, parts.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_a_strategy_makes_of_gradients_is_clipped_and_stepped(accumulation, make_trainer):
    class Hundred(Strategy):
        def after_backward(self, trainer):
            for parameter in trained(trainer).values():
                parameter.grad.fill_(100.0)

    watch, last = Watch(), {"max_steps": 2, "max_grad_norm": 1.0, "gradient_accumulation_steps": accumulation}
    learn_one_task(make_trainer, Hundred(), watch, **last)
    assert all((gradient == 100).all() for step in watch.gradients for gradient in step.values())  # not clipped yet
    before, after = watch.weights
    moved = torch.cat([(before[name] - after[name]).flatten() for name in before])
    # As long as the clipped gradient times the rate, and the same for every number.
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1 / len(moved) ** 0.5))


def test_a_gradient_of_zero_holds_a_weight(make_trainer):
    class HoldFirstClass(Strategy):
        def after_backward(self, trainer):
            for parameter in trained(trainer).values():
                parameter.grad[0] = 0.0

    watch = Watch()
    after = learn_one_task(make_trainer, HoldFirstClass(), watch)
    for name, before in watch.weights[0].items():
        assert torch.equal(after[name][0], before[0]) and not torch.equal(after[name][1], before[1])


def test_strategies_are_handed_gradients_in_their_order(make_trainer):
    class Double(Strategy):
        def after_backward(self, trainer):
            for parameter in trained(trainer).values():
                parameter.grad *= 2

    before, after = Watch(), type("After", (Watch,), {})()
    learn_one_task(make_trainer, before, Double(), after)
    for one, other in zip(before.gradients, after.gradients, strict=True):
        torch.testing.assert_close({name: 2 * gradient for name, gradient in one.items()}, other)


def test_terms_weigh_the_same_however_a_batch_is_accumulated(make_trainer):
    class Decay(Strategy):
        def losses(self, trainer, inputs, logits):
            return {"decay": sum(value.square().sum() for value in trained(trainer).values())}

    whole = learn_one_task(make_trainer, Decay(), per_device_train_batch_size=16, folder="whole")
    parts = learn_one_task(make_trainer, Decay(), gradient_accumulation_steps=2, folder="parts")
    without = learn_one_task(make_trainer, per_device_train_batch_size=16)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    assert all(whole[name].norm() < 0.9 * without[name].norm() for name in whole)


def test_gradients_may_be_projected_on_those_of_a_memory(make_trainer):
    """A-GEM (Chaudhry et al. 2019, arXiv 1812.00420) in a strategy of its own."""

    class AGEM(Strategy):
        def __init__(self):
            self.kept, self.products = [], []

        def end_task(self, trainer, task):
            self.kept.append(trainer.part_of(task, range(0, len(task.train), 4)))

        def after_backward(self, trainer):
            if not self.kept:
                return
            examples = trainer.examples(self.kept, "train")
            batch = trainer.training_batch(examples, range(len(examples)))
            parameters = list(trained(trainer).values())
            loss = trainer.accelerator.unwrap_model(trainer.model)(**batch).loss
            reference = torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters)])
            gradient = torch.cat([each.grad.flatten() for each in parameters])
            product = gradient @ reference
            if product < 0:
                gradient = gradient - product / reference.square().sum() * reference
                torch.nn.utils.vector_to_parameters(gradient, [each.grad for each in parameters])
            self.products.append((float(product), float(gradient @ reference)))

    found = {}
    for name, strategies in {"plain": [], "a-gem": [agem := AGEM()]}.items():
        config = LinearProbeConfig(train_mask=False)
        trainer = make_trainer(config, strategy=strategies, folder=name, num_train_epochs=6, **SGD)
        trainer.train()
        found[name] = trainer.metrics["forgetting"]
    assert len(agem.products) == 2 * 6 * 4 and min(before for before, _ in agem.products) < -1e-3
    assert min(after for _, after in agem.products) > -1e-4
    assert found["a-gem"] < found["plain"] - 0.05


@pytest.mark.parametrize("label", [0, 3])
def test_labels_that_a_strategy_predicts_are_measured(label, make_trainer, data):
    class Always(Strategy):
        def predict(self, trainer, inputs, logits):
            # What can be predicted is what has been learnt.
            assert logits.shape == (len(inputs["labels"]), 2 * (trainer.task.index + 1))
            scores = torch.zeros_like(logits)
            scores[:, min(label, scores.shape[1] - 1)] = 1.0
            return scores

    trainer = make_trainer(CONFIGS["linear-probe"](), strategy=Always(), num_train_epochs=1)
    trainer.train()
    right = np.zeros(3)
    right[label // 2] = 0.5  # of two classes with as many images
    assert trainer.accuracy_matrix[2].tolist() == right.tolist()
    assert trainer.results.per_class_accuracy == {
        name: float(row == label) for row, name in enumerate(trainer.scenario.classes)
    }
    assert set(trainer.predict(trainer.scenario[1]).predictions) == {label}
    assert trainer.evaluate(data["test"])["eval_accuracy"] == pytest.approx(1 / 6)


def test_a_strategy_predicts_from_the_images_and_its_own_state(make_trainer):
    """The nearest mean of the features of some images a class, as iCaRL has it."""

    class NearestExemplar(Strategy):
        def __init__(self):
            self.means = []

        def end_task(self, trainer, task):
            rows = trainer.scenario.model_labels(task, "train")
            for label in np.unique(rows):
                some = trainer.part_of(task, np.flatnonzero(rows == label)[:5])
                (batch,) = trainer.plain_batches(some, batch_size=5)
                self.means.append(trainer.tuner.query(batch["pixel_values"]).mean(0))

        def predict(self, trainer, inputs, logits):
            return -torch.cdist(trainer.tuner.query(inputs["pixel_values"]), torch.stack(self.means))

    trainer = make_trainer(CONFIGS["linear-probe"](), strategy=NearestExemplar(), learning_rate=0.0)
    trainer.train()
    assert len(trainer.strategy.strategies[0].means) == 6
    assert trainer.metrics["average_accuracy"] > 0.9  # of colours, at a glance; the head has learnt nothing
