"""Heads that observe, under the trainer: every scenario, strategies, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from observing_cases import LDA, PROMPTS, WIDE, adapter_logits, all_at_once, batch_of, check_close
from peft import get_peft_model
from trainer_cases import images

from peft_cl import (
    LinearProbeConfig,
    RandomResizedCropFlip,
    class_incremental,
    dataset_sequence,
    domain_incremental,
    task_free,
    task_incremental,
)
from peft_cl.heads import LDAHead
from peft_cl.strategies import EWC, ExperienceReplay, FineTuning, JointTraining, NearestClassMean


# ------------------------------------------------------------------------------------------------ scenarios


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("num_tasks", [1, 3, 6])
def test_any_number_of_tasks_equals_all_data_at_once(num_tasks, cached, make_trainer, data):
    trainer = make_trainer(LinearProbeConfig(**LDA, **WIDE), num_tasks=num_tasks, cache_queries=cached)
    trainer.train()
    found = adapter_logits(trainer, data["test"])
    torch.testing.assert_close(found, all_at_once(trainer, data))
    assert trainer.metrics["average_accuracy"] == 1.0
    assert trainer.state.global_step == 0 and trainer.results.trainable_parameters == 0  # nothing was trained


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_tasks_gives_the_same_head(seed, make_trainer, data):
    found = {}
    for order in (None, seed):
        scenario = class_incremental(data, 3, seed=order)
        trainer = make_trainer(LinearProbeConfig(**LDA), scenario=scenario, folder=f"order-{order}")
        trainer.train()
        columns = [trainer.tuner.head.config.classes.index(name) for name in data["train"].features["label"].names]
        found[order] = adapter_logits(trainer, data["test"])[:, columns]
    check_close(found[seed], found[None])


def test_domains_add_up(make_trainer, data):
    halves = Features({**data["train"].features, "domain": ClassLabel(names=["odd", "even"])})
    split = {
        name: Dataset.from_list([{**row, "domain": place % 2} for place, row in enumerate(part)], features=halves)
        for name, part in data.items()
    }
    trainer = make_trainer(LinearProbeConfig(**LDA), scenario=domain_incremental(split))
    trainer.train()
    check_close(adapter_logits(trainer, data["test"]), all_at_once(trainer, data))


def test_a_stream_is_observed_as_it_comes(make_trainer, data):
    """On frozen features; each image once for each pass of the stream."""
    trainer = make_trainer(
        LinearProbeConfig(**LDA), scenario=task_free(data, 3), num_train_epochs=1, lr_scheduler_type="constant"
    )
    trainer.train()
    head = trainer.tuner.head.active
    assert head.sums.images == len(data["train"])
    check_close(adapter_logits(trainer, data["test"]), all_at_once(trainer, data))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("head", ["lda", "aligned", "fusion"])
def test_a_stream_under_prompts_is_observed_in_its_steps(name, head, make_trainer, data):
    config = PROMPTS[name](head=head, **({"pool_size": 6} if name == "dualprompt" else {}))
    trainer = make_trainer(
        config, scenario=task_free(data, 3), num_train_epochs=1, lr_scheduler_type="constant", learning_rate=1e-2
    )
    trainer.train()
    head = trainer.tuner.head.active
    sums = {"aligned": "gaussians", "fusion": "query"}
    assert getattr(head, sums.get(config.head, ""), head).sums.images == len(data["train"])
    assert trainer.metrics["average_accuracy"] > 0.5


def test_a_known_task_is_masked(make_trainer, data):
    scenario = task_incremental(data, 3)
    trainer = make_trainer(LinearProbeConfig(**LDA), scenario=scenario)
    trainer.train()
    batch = batch_of(trainer, data["test"])
    with torch.no_grad():
        logits = trainer.model.eval()(batch["pixel_values"], task_ids=torch.full((len(batch["labels"]),), 1)).logits
    assert logits[:, 2:4].isfinite().all() and torch.isneginf(logits[:, [0, 1, 4, 5]]).all()


def test_data_sets_one_after_the_other(make_trainer, data):
    pairs = {"first": (data["train"], data["test"]), "second": (images(10, 5), images(4, 6))}
    for shared, classes in ((True, 6), (False, 12)):
        trainer = make_trainer(
            LinearProbeConfig(**LDA), scenario=dataset_sequence(pairs, shared_classes=shared), folder=str(shared)
        )
        trainer.train()
        head = trainer.tuner.head.active
        assert head.classes == classes and head.sums.images == len(data["train"]) + 60
        assert trainer.metrics["average_accuracy"] > (0.9 if shared else 0.3)  # the same colours under two names


@pytest.mark.slow
@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "augmented"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_the_first_task_stay_and_sums_stay_exact(name, dtype, augmented, make_trainer, data, tiny_vit):
    """What a head knows of the first task's images after the last task is what it would know now."""
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_vit().to(getattr(torch, dtype)), PROMPTS[name](**LDA, **WIDE, train_prompts="first_task")
    )
    augmentation = RandomResizedCropFlip(size=32) if augmented else None
    trainer = make_trainer(None, model=model, augmentation=augmentation)
    pool = trainer.tuner.pool
    trainer.train_task(trainer.scenario[0])
    first = {key: value.clone() for key, value in pool.state_dict().items()}
    trainer.train()
    assert pool.state_dict().keys() == first.keys()
    assert all(torch.equal(value, first[key]) for key, value in pool.state_dict().items())
    assert not any(parameter.requires_grad for parameter in trainer.model.parameters())
    head = trainer.tuner.head.active
    assert head.training_head is None
    sums = head.sums.clone()
    trainer.tuner.fit_head()  # adds nothing
    again = LDAHead(head.sizes, 6, shrinkage=0.1)
    for task in trainer.scenario:
        for batch in trainer.plain_batches(task):
            again.observe(trainer.tuner.features(batch["pixel_values"])[0], batch["labels"])
    again.fit()
    assert sums.images == again.sums.images
    torch.testing.assert_close(again.sums.means, sums.means, rtol=1e-5, atol=1e-5)
    assert trainer.metrics["average_accuracy"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
def test_sums_follow_prompts_that_go_on(name, make_trainer):
    """The second task's training moves the features of the first one's images, of which sums know where they were."""
    errors = {}
    for drift in (None, "means", "map"):
        config = PROMPTS[name](**LDA, drift_compensation=drift)
        trainer = make_trainer(config, folder=str(drift), num_train_epochs=4, learning_rate=5e-2, num_tasks=2)
        trainer.train()
        head, first = trainer.tuner.head.active, trainer.scenario[0]
        now = LDAHead(head.sizes, 6)
        for batch in trainer.plain_batches(first):
            now.observe(trainer.tuner.features(batch["pixel_values"])[0], batch["labels"])
        now.fit()
        errors[drift] = (head.sums.means - now.sums.means)[:3].norm().item()
    assert errors["map"] < 0.9 * errors[None] and errors["means"] < errors[None], errors


def test_memory_stays_where_nothing_is_trained(make_trainer):
    """Loaders of past evaluations, each with the queries of all tasks seen, and queries of what was learnt, are let
    go: they would grow with the square of the number of tasks, and with the data."""
    trainer = make_trainer(LinearProbeConfig(head="lda"))
    trainer.train()
    trainer.predict(trainer.scenario[0].test)
    assert not trainer.accelerator._dataloaders
    tests = {id(task.test) for task in trainer.scenario}
    assert set(trainer.queries._queries) == tests


def test_mid_task_measurements_are_of_the_head_as_it_would_be(make_trainer):
    """They see a head for the task's classes, and leave no trace: prompts learn as under the linear head."""
    seen, pools = [], []
    for head in ({"head": "linear"}, LDA):
        trainer = make_trainer(PROMPTS["coda"](**head), folder=head["head"], eval_strategy="epoch")
        evaluate = trainer.evaluate
        trainer.evaluate = lambda evaluate=evaluate, **words: seen.append(evaluate(**words)) or seen[-1]
        trainer.train()
        pools.append(trainer.tuner.pool.state_dict())
    assert all(torch.equal(value, pools[1][name]) for name, value in pools[0].items())
    assert len(seen) == 2 * 3 * (2 + 1)
    assert all(metrics["eval_average_accuracy"] > 0.9 for metrics in seen[9:])
    assert trainer.tuner.head.active.sums.images == 96


# ------------------------------------------------------------------------------------------------ strategies


def test_joint_training_observes_all_data_anew(make_trainer, data):
    config = PROMPTS["l2p"](**LDA, train_mask=False)
    trainer = make_trainer(config, strategy=JointTraining())
    trainer.train()
    assert trainer.tuner.head.active.sums.images == len(data["train"])


def test_replay_observes_each_image_once(make_trainer, data):
    trainer = make_trainer(PROMPTS["l2p"](**LDA, train_mask=False), strategy=ExperienceReplay(8))
    trainer.train()
    assert trainer.tuner.head.active.sums.images == len(data["train"])


def test_the_strategy_and_the_head_of_class_means_agree(make_trainer, data):
    strategy = make_trainer(LinearProbeConfig(), strategy=NearestClassMean(), folder="strategy")
    head = make_trainer(LinearProbeConfig(head="ncm"), folder="head")
    for trainer in (strategy, head):
        trainer.train()
    assert (strategy.accuracy_matrix == head.accuracy_matrix).sum() == 6
    first, second = (adapter_logits(each, data["test"]).log_softmax(-1) for each in (strategy, head))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "strategy", "message"),
    [
        (lambda: LinearProbeConfig(**LDA, train_mask=False), FineTuning(), "head is 'lda'.*Fine-tuning changes all"),
        (
            lambda: PROMPTS["coda"](**LDA, train_prompts="first_task", train_mask=False),
            [EWC(), ExperienceReplay(8)],
            "head is 'lda'.*EWC holds weights by the likelihood that a trained head gives. Set head='linear'",
        ),
        (lambda: LinearProbeConfig(**LDA), NearestClassMean(), "fills a linear head.*head='lda'"),
        (lambda: LinearProbeConfig(head="ridge", head_options={"projection": 5}), None, "projection is 5.*6 classes"),
    ],
)
def test_what_cannot_work_is_told_before_training(config, strategy, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(config(), strategy=strategy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_prompts": "first_task"}, "train_prompts is 'first_task', but a stream has no tasks"),
        ({"drift_compensation": "map", **LDA}, "drift_compensation is 'map', but a stream has no tasks"),
    ],
)
def test_a_stream_has_no_tasks_to_learn_prompts_in(fields, message, make_trainer, data):
    with pytest.raises(ValueError, match=message):
        make_trainer(
            PROMPTS["l2p"](**fields), scenario=task_free(data, 3), num_train_epochs=1, lr_scheduler_type="constant"
        )


# ------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_a_pass_over_the_training_images_is_all_it_costs(cached, make_trainer):
    """Uncached, an evaluation sees 2, 4 and 6 of the 6 classes' test images."""
    trainer = make_trainer(LinearProbeConfig(**LDA), cache_queries=cached)
    encoder, counted = trainer.tuner.encoder, []
    start = encoder._start
    encoder._start = lambda pixels, *words: counted.append(len(pixels)) or start(pixels, *words)
    trainer.train()
    assert sum(counted) == 96 + (48 if cached else 16 + 32 + 48)


def test_the_scenario_is_read_without_augmentation(make_trainer, data):
    plain = make_trainer(LinearProbeConfig(**LDA), folder="plain")
    cropped = make_trainer(LinearProbeConfig(**LDA), folder="cropped", augmentation=RandomResizedCropFlip(size=32))
    for trainer in (plain, cropped):
        trainer.train()
    first, second = (adapter_logits(each, data["test"]) for each in (plain, cropped))
    torch.testing.assert_close(first, second)


def test_a_task_with_a_transform_of_its_own(make_trainer, data):
    scenario = class_incremental(data, num_tasks=2)
    transformed = scenario[0].train.with_transform(lambda batch: batch)
    scenario._tasks = (replace(scenario[0], train=transformed), scenario[1])
    trainer = make_trainer(LinearProbeConfig(**LDA), scenario=scenario)
    trainer.train()
    assert trainer.tuner.head.active.sums.images == 96
