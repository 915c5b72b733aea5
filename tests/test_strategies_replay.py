"""Methods with a memory of images: what they keep, what they change, and that an interruption changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from replay_cases import (
    STRATEGIES,
    Interrupt,
    config_for,
    make_small,  # noqa: F401
    on_backbone,
    weights_of,
)
from test_processes import check_same, run
from trainer_cases import whole_and_resumed

from peft_cl import L2PConfig, LinearProbeConfig, task_free
from peft_cl.strategies import ExperienceReplay, FineTuning
from peft_cl.strategies.dark_experience_replay import DarkExperienceReplay
from peft_cl.strategies.gem import AGEM, GEM
from peft_cl.strategies.icarl import ICaRL
from peft_cl.strategies.memory import balanced, even_shares, reservoir_slots


# ------------------------------------------------------------------------------------------------------- the memory


@pytest.mark.parametrize(
    ("available", "size", "shares"),
    [
        ([10, 2, 10], 9, [3, 2, 4]),
        ([5, 5, 5], 3, [1, 1, 1]),
        ([2, 1], 9, [2, 1]),
        ([4, 4, 4], 2, [0, 1, 1]),
        ([], 4, []),
    ],
)
def test_places_are_divided_evenly(available, size, shares):
    assert even_shares(available, size) == shares


def test_a_reservoir_gives_each_image_the_same_chance():
    counts = np.zeros(30)
    for seed in range(2000):
        memory = np.full(6, -1)
        slots = reservoir_slots(6, 0, 20, np.random.default_rng([seed, 0]))
        slots = np.concatenate([slots, reservoir_slots(6, 20, 10, np.random.default_rng([seed, 1]))])
        for image, slot in enumerate(slots):
            if slot >= 0:
                memory[slot] = image
        counts += np.bincount(memory, minlength=30)
    assert (abs(counts - 400) < 4.5 * np.sqrt(400 * 0.8)).all()


def test_a_balanced_choice_is_a_uniform_sample_of_each_group():
    groups, counts = np.array([0] * 20 + [1] * 5 + [2]), np.zeros(26)
    for seed in range(500):
        kept = balanced(groups, np.random.default_rng(seed).random(26), 9)
        assert np.bincount(groups[kept]).tolist() == [4, 4, 1]
        counts[kept] += 1
    assert (abs(counts[:20] - 100) < 45).all() and (abs(counts[20:25] - 400) < 45).all() and counts[25] == 500


def test_the_balanced_memory_has_as_many_images_of_each_class_and_only_lets_go(make_trainer):
    trainer, before = make_trainer(config_for(ExperienceReplay())), None
    replay = ExperienceReplay(8, memory="balanced")
    for task, expected in zip(trainer.scenario, ([4, 4], [2, 2, 2, 2], [1, 1, 1, 1, 2, 2]), strict=True):
        replay.end_task(trainer, task)
        assert np.bincount(replay.store.labels(trainer, replay.memory)).tolist() == expected
        now = {tuple(place) for place in replay.memory.tolist()}
        assert len(now) == 8 and (before is None or {place for place in now if place[0] < task.index} <= before)
        before = now


def test_the_memory_is_counted_in_bytes_of_pixels(make_trainer):
    trainer = make_trainer(config_for(ExperienceReplay()), strategy=ExperienceReplay(10), num_train_epochs=1)
    assert trainer.strategy.kept_bytes(trainer) == {"memory": 0}
    trainer.train()
    assert trainer.strategy.kept_bytes(trainer) == {"memory": 10 * 3 * 32 * 32}


# ------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", ["DER++", "iCaRL", pytest.param("ER", marks=pytest.mark.slow)])
def test_what_a_plain_run_forgets_is_kept(name, make_trainer):
    plain = make_trainer(config_for(GEM()), strategy=FineTuning(), learning_rate=1e-3, folder="plain")
    plain.train()
    trainer = on_backbone(make_trainer, STRATEGIES[name](), num_train_epochs=2)
    trainer.train()
    assert trainer.metrics["average_accuracy"] > plain.metrics["average_accuracy"] + 0.1
    assert trainer.results.method == f"Fine-tuning + {name}"


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_begins_anew_with_a_new_run(name, make_trainer):
    found, strategy = [], STRATEGIES[name]()
    for folder in ("first", "second"):
        trainer = on_backbone(make_trainer, strategy, folder=folder, num_tasks=2)
        trainer.train()
        found.append(weights_of(trainer))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


@pytest.mark.parametrize(
    "name",
    [name if name in ("GEM", "DER++", "iCaRL") else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES],
)
def test_a_resumed_run_is_the_whole_one_to_the_bit(name, make_trainer):
    """Interrupted after the first task, and in the middle of the second, after a checkpoint."""

    def make(folder="run", **more):
        settings = {"num_tasks": 2, "save_strategy": "steps", "save_steps": 2}
        return on_backbone(make_trainer, STRATEGIES[name](), folder=folder, **settings, **more)

    whole, again = whole_and_resumed(make)
    interrupt = Interrupt(2)
    part = make("middle", callbacks=[interrupt])
    interrupt.trainer = part
    with pytest.raises(KeyboardInterrupt):
        part.train()
    middle = make("middle")
    middle.train(resume_from_checkpoint=True)
    assert middle.finished_tasks == 2
    for other in (again, middle):
        found = weights_of(other)
        assert all(torch.equal(value, found[key]) for key, value in weights_of(whole).items())
        np.testing.assert_array_equal(other.accuracy_matrix, whole.accuracy_matrix)
        states = [each.strategy.strategies[1].state_dict() for each in (other, whole)]
        assert states[0].keys() == states[1].keys() and states[0]["seen"] == states[1]["seen"]
        for key in states[0].keys() - {"seen"}:
            torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "probe+finetuning+balanced+uneven",
        "l2p+gem+uneven",
        "probe+finetuning+gem",
        "probe+finetuning+agem",
        "l2p+der+uneven",
        "probe+finetuning+der",
        "l2p+icarl+uneven",
    ],
)
def test_two_processes_equal_one(method, tmp_path):
    for processes, folder in ((1, "one"), (2, "two")):
        run(processes, tmp_path / folder, method, PLAIN="1", EVALUATE_FIRST="1")
    check_same(tmp_path / "two", tmp_path / "one", 1e-4, 1e-3)


@pytest.mark.parametrize("name", STRATEGIES)
def test_streams_are_refused(name, make_trainer, data):
    strategy = STRATEGIES[name]()
    config = config_for(strategy)
    stream = {"num_train_epochs": 1, "lr_scheduler_type": "constant"}
    with pytest.raises(ValueError, match=f"{name.replace('+', '.')} needs tasks with an end"):
        make_trainer(config, strategy=strategy, scenario=task_free(data, 3), **stream)


@pytest.mark.parametrize("kind", [ExperienceReplay, GEM, AGEM, DarkExperienceReplay, ICaRL])
@pytest.mark.parametrize("size", [0, -1, 2.5, True, "9"])
def test_a_memory_of_no_size_is_refused(kind, size):
    with pytest.raises(ValueError, match="memory_size is .*, but must be a whole number of at least 1. Give one such"):
        kind(size)


@pytest.mark.parametrize("value", [-1, "1", True, float("nan"), float("inf")])
def test_other_bad_settings_are_refused(value):
    for name, make in (("margin", GEM), ("alpha", DarkExperienceReplay), ("beta", DarkExperienceReplay)):
        with pytest.raises(ValueError, match=f"{name} is .*, but must be a number of at least 0. Give one such"):
            make(**{name: value})
    with pytest.raises(ValueError, match="reference_batch_size is 0, but must be a whole number of at least 1"):
        AGEM(reference_batch_size=0)
    with pytest.raises(ValueError, match="memory is 'ring', but must be one of 'reservoir', 'balanced'"):
        ExperienceReplay(memory="ring")


def test_settings_are_numbers_that_json_knows():
    assert ExperienceReplay(np.int64(5)).settings() == {"memory_size": 5, "replay_batch_size": None}
    assert ExperienceReplay(5, memory="balanced").settings()["memory"] == "balanced"
    assert GEM(np.int64(5), np.float32(1)).settings() == {"memory_size": 5, "margin": 1.0}
    assert AGEM(5, 3).settings() == {"memory_size": 5, "reference_batch_size": 3}
    assert DarkExperienceReplay(5).settings() == {"memory_size": 5, "alpha": 0.1, "beta": 0.5}


def test_what_der_cannot_be_combined_with(make_trainer):
    config = config_for(DarkExperienceReplay())
    with pytest.raises(ValueError, match=r"DER\+\+ and ER cannot be combined: each keeps a memory"):
        make_trainer(config, strategy=[DarkExperienceReplay(), ExperienceReplay()])
    with pytest.raises(ValueError, match="loss is given, but DER.. has a loss of its own"):
        make_trainer(config, strategy=DarkExperienceReplay(), loss=F.cross_entropy)
    with pytest.raises(ValueError, match="train_mask is True, but DER.. trains on classes of earlier tasks"):
        make_trainer(L2PConfig(), strategy=DarkExperienceReplay())
    with pytest.raises(ValueError, match="DER.. keeps logits of a head that is trained"):
        make_trainer(LinearProbeConfig(head="ncm", train_mask=False), strategy=DarkExperienceReplay())
