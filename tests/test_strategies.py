"""Comparison methods on the trainer's hooks: on a prompt adapter and on the whole backbone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from trainer_cases import CONFIGS
from transformers import ResNetConfig, ResNetForImageClassification

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig, Strategy, class_incremental
from peft_cl.strategies import EWC, ExperienceReplay, FineTuning, JointTraining, NearestClassMean


def unmasked(name: str):
    config = CONFIGS[name]()
    config.train_mask = False
    return config


ON = {"backbone": [FineTuning()], "l2p": [], "coda": []}


def learnt(make_trainer, on: str, *strategies: Strategy, folder: str = "run", **training):
    config = unmasked("linear-probe" if on == "backbone" else on)
    # A backbone made at random unlearns at once with the adapters' rate.
    rate = {"learning_rate": 1e-3} if on == "backbone" else {}
    trainer = make_trainer(config, strategy=[*ON[on], *strategies], folder=folder, **{**rate, **training})
    trainer.train()
    return trainer


@pytest.mark.parametrize("on", [each if each == "coda" else pytest.param(each, marks=pytest.mark.slow) for each in ON])
def test_replay_and_joint_training_keep_what_the_plain_loss_forgets(on, make_trainer):
    plain = learnt(make_trainer, on)
    replay = learnt(make_trainer, on, ExperienceReplay(30), folder="er")
    joint = learnt(make_trainer, on, JointTraining(), folder="joint")
    assert plain.metrics["average_accuracy"] < 0.7
    assert replay.metrics["average_accuracy"] > plain.metrics["average_accuracy"] + 0.1
    assert joint.metrics["average_accuracy"] > plain.metrics["average_accuracy"] + 0.1


@pytest.mark.parametrize(
    ("on", "strategy"), [("coda", EWC(10.0, 8)), ("coda", ExperienceReplay(8)), ("linear-probe", NearestClassMean())]
)
def test_a_strategy_begins_anew_with_a_new_run(on, strategy, make_trainer):
    """A loop over seeds may hold one object: the second run is the first one again."""
    found = []
    for folder in ("first", "second"):
        trainer = make_trainer(unmasked(on), strategy=strategy, folder=folder, num_train_epochs=1)
        trainer.train()
        weights = trainer.tuner.head.active.weight.detach().clone()
        found.append((weights, trainer.accuracy_matrix))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=0)
    np.testing.assert_array_equal(found[1][1], found[0][1])


def test_replay_of_a_data_set_with_a_transform_beside_one_without(make_trainer, data):
    """The kept queries of the one are of no use beside images of the other, which have none."""
    scenario = class_incremental(data, num_tasks=2)
    transformed = scenario[0].train.with_transform(lambda batch: batch)
    scenario._tasks = (replace(scenario[0], train=transformed), scenario[1])
    config = unmasked("coda")
    trainer = make_trainer(config, scenario=scenario, strategy=ExperienceReplay(8), num_train_epochs=1)
    trainer.train()
    assert trainer.finished_tasks == 2


@pytest.mark.parametrize("on", ["backbone", pytest.param("l2p", marks=pytest.mark.slow)])
def test_ewc_holds_what_the_first_task_needs(on, make_trainer):
    moved = []
    for strength in (0.0, 1e5):
        ewc, kept = EWC(strength, fisher_samples=16), {}

        class Watch(Strategy):
            def begin_task(self, trainer, task, ewc=ewc, kept=kept):
                if task.index == 1:
                    kept.update(curvature=dict(ewc.curvature), centre=dict(ewc.centre))

        trainer = learnt(make_trainer, on, ewc, Watch(), num_tasks=2, folder=f"ewc {strength}")
        now = {name: value.detach() for name, value in trainer.tuner.lasting_parameters().items()}
        springs = (
            (kept["curvature"][name] * (now[name][: len(centre)] - centre) ** 2).sum()
            for name, centre in kept["centre"].items()
        )
        moved.append(float(sum(springs)))
    assert moved[1] < 0.5 * moved[0]


def test_ewcs_parabola_is_the_sum_of_the_tasks(make_trainer):
    """By hand: curvature F1 + F2, centre their weighted mean; rows that the first task lacks have F2 alone."""
    ewc = EWC(2.0, fisher_samples=4)
    trainer = make_trainer(unmasked("linear-probe"), num_tasks=2, strategy=ewc, num_train_epochs=1)
    tuner, fishers, values = trainer.tuner, [], []
    for task in trainer.scenario:
        tuner.begin_task(task.classes)
        parameters = tuner.lasting_parameters()
        with torch.no_grad():
            for value in parameters.values():
                value.normal_()
        fishers.append(ewc._fisher(trainer, task, parameters))
        values.append({name: value.detach().clone() for name, value in parameters.items()})
        ewc.end_task(trainer, task)
    for name, second in fishers[1].items():
        first, rows = fishers[0][name], len(fishers[0][name])
        point = torch.randn_like(values[1][name])
        by_hand = (first * (point[:rows] - values[0][name]) ** 2).sum()
        by_hand = by_hand + (second * (point - values[1][name]) ** 2).sum()
        kept = (ewc.curvature[name] * (point - ewc.centre[name]) ** 2).sum()
        # They differ by what does not depend on the point.
        zero = torch.zeros_like(point)
        constant = (first * values[0][name] ** 2).sum() + (second * values[1][name] ** 2).sum()
        constant = constant - (ewc.curvature[name] * (zero - ewc.centre[name]) ** 2).sum()
        torch.testing.assert_close(by_hand, kept + constant, rtol=1e-4, atol=1e-5)


def test_the_fisher_information_is_that_of_the_softmax(make_trainer):
    """For a linear head the gradient of log p(y|x) by the bias is one_hot(y) - p."""
    ewc = EWC(fisher_samples=1000)
    trainer = make_trainer(LinearProbeConfig(head_init="zeros"), num_tasks=3, strategy=ewc)
    task = trainer.scenario[0]
    trainer.tuner.begin_task(task.classes)
    parameters = trainer.tuner.lasting_parameters()
    bias = next(name for name in parameters if name.endswith("bias"))
    # Two classes, a head of zeros: p is (1/2, 1/2), each squared gradient 1/4.
    torch.testing.assert_close(ewc._fisher(trainer, task, parameters)[bias], torch.tensor([0.25, 0.25]))


def test_the_reservoir_is_a_uniform_sample(make_trainer):
    trainer = make_trainer(unmasked("linear-probe"), num_tasks=3)
    counts = np.zeros(3)
    for seed in range(40):
        trainer.args.seed = seed
        replay = ExperienceReplay(memory_size=9)
        for task in trainer.scenario:
            replay.end_task(trainer, task)
        assert len(replay.memory) == 9 and replay.seen == 96
        assert len({tuple(entry) for entry in replay.memory.tolist()}) == 9
        counts += np.bincount(replay.memory[:, 0], minlength=3)
    assert counts.sum() == 360 and (abs(counts - 120) < 4 * np.sqrt(120)).all()


def test_replayed_images_come_with_their_labels_and_queries(make_trainer):
    seen = []

    class Watch(Strategy):
        def batch(self, trainer, inputs):
            sizes = {name: len(value) for name, value in inputs.items()}
            seen.append({**sizes, "classes": set(inputs["labels"].tolist())})
            return inputs

    strategies = [ExperienceReplay(12, replay_batch_size=5), Watch()]
    trainer = make_trainer(unmasked("coda"), strategy=strategies, num_tasks=2, num_train_epochs=1)
    trainer.train()
    first, second = seen[:6], seen[6:]
    assert all(step["labels"] == step["query"] == step["pixel_values"] == 8 for step in first)
    assert all(step["labels"] == step["query"] == step["pixel_values"] == 13 for step in second)
    assert all(step["classes"] & {0, 1, 2} and step["classes"] & {3, 4, 5} for step in second)


@pytest.mark.parametrize("strategy", [ExperienceReplay(10), JointTraining()], ids=lambda each: each.name)
def test_a_mask_that_would_make_the_loss_infinite_is_refused(strategy, make_trainer):
    with pytest.raises(ValueError, match=f"train_mask is True, but {strategy.name} trains on classes"):
        make_trainer(L2PConfig(), strategy=strategy)


def test_bad_settings():
    for settings in ({"memory_size": 0}, {"replay_batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} is 0, but must be a whole number of at least 1"):
            ExperienceReplay(**settings)
    with pytest.raises(ValueError, match="strength is -1, but must be a number of at least 0"):
        EWC(-1)
    assert EWC(np.float32(3), np.int64(8)).settings() == {"strength": 3.0, "fisher_samples": 8}
    for strength in ("3", True, float("nan")):
        with pytest.raises(ValueError, match="strength is .*, but must be a number of at least 0"):
            EWC(strength)
    with pytest.raises(ValueError, match="fisher_samples is 0, but must be"):
        EWC(fisher_samples=0)


def test_two_ways_of_learning_cannot_be_combined(make_trainer):
    with pytest.raises(ValueError, match="JointTraining, JointTraining, but each kind may be there once"):
        make_trainer(unmasked("l2p"), strategy=[JointTraining(), JointTraining()])
    with pytest.raises(ValueError, match=r"cannot be combined: Nearest class mean has a way of its own .*\(learn\)"):
        make_trainer(unmasked("linear-probe"), strategy=[JointTraining(), NearestClassMean()])


@pytest.mark.parametrize("strategy", [ExperienceReplay(10), JointTraining(), EWC()], ids=lambda each: each.name)
def test_task_evidence_needs_batches_of_one_task(strategy, make_trainer):
    with pytest.raises(ValueError, match=f"task_evidence is 6, but {strategy.name} has no use for it"):
        make_trainer(L2PConfig(train_mask=False, task_evidence=6), strategy=strategy)


@pytest.mark.parametrize(
    "config",
    [
        CodaPromptConfig(attention=False, components_per_task=2, prompt_length=4),
        DualPromptConfig(g_layers=[], prompt_length=2),
        CodaPromptConfig.from_preset("textbook", components_per_task=2, prompt_length=4),
    ],
)
def test_ewc_on_adapters_without_some_parts(config, make_trainer):
    trainer = make_trainer(config, strategy=EWC(10.0, 8), num_tasks=2, num_train_epochs=1)
    trainer.train()
    assert trainer.finished_tasks == 2
    assert all("pool" not in name or value.any() for name, value in trainer.strategy.strategies[0].curvature.items())


def test_names_in_tables(make_trainer):
    assert make_trainer(DualPromptConfig(train_mask=False), strategy=[ExperienceReplay(), EWC()]).results.method == (
        "DualPrompt + ER + EWC"
    )
    for order in ([FineTuning(), EWC()], [EWC(), FineTuning()]):
        assert make_trainer(unmasked("linear-probe"), strategy=order).results.method == "Fine-tuning + EWC"


@pytest.mark.parametrize("strategy", [EWC(fisher_samples=8), ExperienceReplay(20)], ids=lambda each: each.name)
def test_on_a_backbone_that_takes_no_prompts(strategy, make_trainer):
    """A convolutional network has no tokens to put prompts among; these methods need none."""
    base = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=6, layer_type="basic")
    )
    weights = list(base.resnet.parameters())
    before = [value.detach().clone() for value in weights]
    model = get_peft_model(base, LinearProbeConfig(train_mask=False))
    trainer = make_trainer(None, model=model, num_tasks=2, num_train_epochs=1, strategy=[FineTuning(), strategy])
    trainer.train()
    assert sum(trainer.results.kept_bytes.values()) > 0
    assert any((value != old).any() for value, old in zip(weights, before, strict=True))
