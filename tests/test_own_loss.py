"""A loss of the user's own keeps the method's terms and masks; what would drop them is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from trainer_cases import CONFIGS

from peft_cl import L2PConfig, LinearProbeConfig, task_free
from peft_cl.strategies import JointTraining


def plain(logits, labels, class_names):
    return F.cross_entropy(logits, labels)


def smoothed(logits, labels, class_names):
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def focal(logits, labels, class_names):
    log_p = logits.log_softmax(-1)
    every = -((1 - log_p.exp()) ** 2) * log_p  # over all classes: -inf among the logits would make it NaN
    return every.gather(1, labels[:, None])[:, 0] + 0.0 * every.sum(-1)


def weights_of(trainer):
    return {name: value for name, value in trainer.model.state_dict().items() if "pool" in name or "head" in name}


@pytest.mark.parametrize("method", CONFIGS)
def test_the_cross_entropy_given_by_hand_trains_the_same(method, make_trainer):
    runs = []
    for words in ({}, {"loss": plain}):
        runs.append(make_trainer(CONFIGS[method](), num_train_epochs=1, folder=str(len(words)), **words))
        runs[-1].train()
    first, second = map(weights_of, runs)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert "own_loss" in runs[1].state.log_history[0]
    assert runs[1].results.hyperparameters["loss"].startswith("<function plain")
    assert "loss" not in runs[0].results.hyperparameters


@pytest.mark.parametrize("loss", [smoothed, focal])
def test_keys_move_under_any_loss(loss, make_trainer):
    trainer = make_trainer(CONFIGS["l2p"](), num_train_epochs=1, loss=loss)
    before = trainer.tuner.pool.keys.detach().clone()
    trainer.train()
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
    assert "pull" in trainer.state.log_history[0]
    assert (trainer.tuner.pool.keys - before).abs().max() > 0


def test_the_value_is_the_one_over_the_classes_of_the_task(make_trainer):
    seen = []

    def spy(logits, labels, class_names):
        seen.append((logits.shape[1], labels.max().item(), class_names))
        return smoothed(logits, labels, class_names)

    trainer = make_trainer(LinearProbeConfig(), loss=spy)
    seen.clear()
    model = trainer.model
    model.begin_task(["a", "b"])
    model.begin_task(["c", "d", "e"])
    model.train()
    images = torch.randn(4, 3, 32, 32)
    labels = torch.tensor([2, 3, 4, 4])
    output = model(pixel_values=images, labels=labels)
    assert seen == [(3, 2, ("c", "d", "e"))]
    expected = F.cross_entropy(output.logits[:, 2:], labels - 2, label_smoothing=0.1)
    torch.testing.assert_close(output.loss, expected)
    # Samples of two tasks, each among the classes of its own.
    labels, tasks = torch.tensor([0, 1, 4, 4]), torch.tensor([0, 0, 1, 1])
    output = model(pixel_values=images, labels=labels, task_ids=tasks)
    expected = (
        smoothed(output.logits[:2, :2], labels[:2], ()) + smoothed(output.logits[2:, 2:], labels[2:] - 2, ())
    ) / 2
    torch.testing.assert_close(output.loss, expected)


def test_classes_of_a_batch_of_a_stream(make_trainer, data):
    counts = set()

    def spy(logits, labels, class_names):
        counts.add(len(class_names))
        return plain(logits, labels, class_names)

    trainer = make_trainer(
        CONFIGS["l2p"](), scenario=task_free(data, 3), loss=spy, num_train_epochs=1, lr_scheduler_type="constant"
    )
    counts.clear()
    trainer.train()
    assert min(counts) < 6


def test_weights_by_the_names_of_classes(make_trainer):
    def weighted(logits, labels, class_names):
        weight = torch.tensor([{"red": 0.0}.get(name, 1.0) for name in class_names])
        return F.cross_entropy(logits, labels, weight)

    trainer = make_trainer(LinearProbeConfig(), loss=weighted, num_tasks=1)
    trainer.train()
    assert trainer.results.per_class_accuracy["red"] == 0.0
    assert trainer.results.per_class_accuracy["blue"] > 0.9


def test_all_classes_without_a_mask(make_trainer):
    counts = []

    def spy(logits, labels, class_names):
        counts.append(len(class_names))
        return plain(logits, labels, class_names)

    trainer = make_trainer(LinearProbeConfig(train_mask=False), strategy=JointTraining(), loss=spy, num_train_epochs=1)
    assert counts == [2, 4, 6]  # the trial
    trainer.train()
    assert set(counts[3:]) == {2, 4, 6}


def test_the_next_trainer_has_its_own(make_trainer):
    model = make_trainer(LinearProbeConfig(), loss=smoothed).model
    make_trainer(LinearProbeConfig(), model=model, folder="next")
    assert model.base_model.head.own_loss is None


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("focal", "loss is 'focal', but must be a function. Give a function"),
        (torch.nn.CrossEntropyLoss(), "loss fails on the 2 classes of task 'task_0': TypeError"),
        (
            lambda logits, labels, names: F.cross_entropy(logits, labels, torch.ones(6)),
            r"loss fails on the 2 classes.*called with logits \(2, 2\)",
        ),
        (lambda logits, labels, names: logits, r"loss gives a tensor \(2, 2\).*must give the mean over the batch"),
        (lambda logits, labels, names: F.cross_entropy(logits, labels).item(), r"loss gives 0.69"),
        (lambda logits, labels, names: F.cross_entropy(logits.detach(), labels), r"loss gives a tensor \(\)"),
        (
            lambda logits, labels, names: plain(logits, labels, names) * {"red": 1, "green": 2}[names[0]],
            "loss fails on the 2 classes of task 'task_1': KeyError",
        ),
    ],
)
def test_what_is_no_loss_is_told_before_training(loss, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(LinearProbeConfig(), loss=loss)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("compute_loss_func", lambda outputs, labels, num_items_in_batch=None: 0, "Give it as loss="),
        ("optimizers", (torch.optim.SGD([torch.zeros(1)], 0.1), None), "Set optim, optim_args and learning_rates"),
        ("optimizer_cls_and_kwargs", (torch.optim.SGD, {"lr": 0.1}), "Set optim, optim_args and learning_rates"),
        ("preprocess_logits_for_metrics", lambda logits, labels: logits, r"predicted classes from predict\(task\)"),
        ("data_collator", lambda examples: examples, "Give augmentation= or batch_augmentation="),
        ("model_init", lambda: None, "in a loop of your own"),
    ],
)
def test_what_would_stand_in_the_place_of_ours(name, value, remedy, make_trainer):
    with pytest.raises(ValueError, match=f"{name} is given, but each task has its own.*{remedy}"):
        make_trainer(L2PConfig(pool_size=6), **{name: value})


def test_a_search_in_one_trainer_is_refused(make_trainer):
    with pytest.raises(NotImplementedError, match="Make a model and a trainer.*for each set of settings"):
        make_trainer(L2PConfig(pool_size=6)).hyperparameter_search(lambda trial: {})
