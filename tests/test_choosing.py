"""What is chosen within a task is chosen by validation images, never by test images."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from trainer_cases import CONFIGS, images, whole_and_resumed
from transformers import EarlyStoppingCallback, TrainerCallback

from peft_cl import RunResults, class_incremental, domain_incremental, task_free
from peft_cl.trainer.choosing import share_of_each_class


WATCHED = {"eval_strategy": "epoch"}
BEST = {"load_best_model_at_end": True, "save_strategy": "epoch", **WATCHED}


class Rows(TrainerCallback):
    """Keeps which images each evaluation measured: how many, and whether within a task."""

    def __init__(self):
        self.sizes = []

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self.sizes.append(len(eval_dataloader.dataset))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (BEST, "load_best_model_at_end"),
        ({"metric_for_best_model": "average_accuracy", **WATCHED}, "metric_for_best_model='average_accuracy'"),
        (
            {"callbacks": [EarlyStoppingCallback()], "metric_for_best_model": "loss", **WATCHED},
            "EarlyStoppingCallback",
        ),
        ({"callbacks": [EarlyStoppingCallback], "metric_for_best_model": "loss", **WATCHED}, "EarlyStoppingCallback"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", **WATCHED}, "lr_scheduler_type='reduce_lr_on_plateau'"),
        ({"save_strategy": "best", "metric_for_best_model": "loss", **WATCHED}, "save_strategy='best'"),
    ],
)
def test_to_choose_by_test_images_is_refused(words, name, make_trainer):
    with pytest.raises(ValueError, match=r"would choose by test images.*Set validation_fraction") as caught:
        make_trainer(CONFIGS["linear-probe"](), **words)
    assert name in str(caught.value)
    make_trainer(CONFIGS["linear-probe"](), **words, validation_fraction=0.25)  # the remedies work
    make_trainer(CONFIGS["linear-probe"](), **words, validation=images(2, 5))


def test_what_chooses_later_is_refused_too(make_trainer):
    trainer = make_trainer(CONFIGS["linear-probe"](), metric_for_best_model=None, **WATCHED)
    trainer.add_callback(EarlyStoppingCallback())
    with pytest.raises(ValueError, match="EarlyStoppingCallback would choose by test images"):
        trainer.train()
    trainer.pop_callback(EarlyStoppingCallback)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="load_best_model_at_end would choose by test images"):
        trainer.train_task(trainer.scenario[0])


def test_what_is_only_watched_is_warned_of(make_trainer, caplog):
    with caplog.at_level(logging.WARNING, "peft_cl"):
        logging.getLogger("peft_cl").propagate = True
        make_trainer(CONFIGS["linear-probe"](), folder="quiet")
        assert "test images" not in caplog.text
        trainer = make_trainer(CONFIGS["linear-probe"](), num_train_epochs=1, **WATCHED)
    assert "to be watched and not to choose by. Set validation_fraction" in caplog.text
    trainer.train()
    assert trainer.results.hyperparameters["selection"] == "nothing; test images were watched"


def test_images_kept_back_are_neither_learnt_nor_test_images(make_trainer, data, tmp_path):
    rows = Rows()
    trainer = make_trainer(
        CONFIGS["linear-probe"](),
        validation_fraction=0.25,
        validation_seed=3,
        metric_for_best_model="average_accuracy",
        callbacks=[rows],
        per_device_eval_batch_size=100,
        **BEST,
    )
    for task, kept, given in zip(trainer.scenario, trainer.validation, class_incremental(data, 3), strict=True):
        assert (len(task.train), len(kept.test)) == (24, 8)
        assert np.bincount(kept.test["label"]).max() == 4  # of each class as many
        learnt, chosen, all_of_them = (
            {image.tobytes() for image in part["image"]} for part in (task.train, kept.test, given.train)
        )
        assert not learnt & chosen and learnt | chosen == all_of_them
    trainer.train()
    # Two epochs of each task on validation images of the tasks so far, then all their test images.
    assert rows.sizes == [8, 8, 16, 16, 16, 32, 24, 24, 48]
    results = RunResults.load(tmp_path / "run")
    assert results.scenario["train_sizes"] == [24] * 3 and results.hyperparameters["validation_fraction"] == 0.25
    expected = (
        "load_best_model_at_end, metric_for_best_model='average_accuracy'; measured on 24 images: 0.25 of the "
        "training images of each class, drawn with seed 3"
    )
    assert results.hyperparameters["selection"] == expected
    assert f"| Chosen within a task | {expected} |" in (tmp_path / "run" / "README.md").read_text()


def test_the_choice_is_the_one_that_validation_images_say(make_trainer, data):
    """Test images of another kind say the opposite, and are not asked."""
    wrong = data["test"].map(lambda row: {"label": (row["label"] // 2) * 2 + 1 - row["label"] % 2})

    class Accuracies(TrainerCallback):
        def __init__(self):
            self.found = []

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.found.append(metrics["eval_average_accuracy"])

    note = Accuracies()
    trainer = make_trainer(
        CONFIGS["linear-probe"](),
        scenario=class_incremental({"train": data["train"], "test": wrong}, 3),
        validation=images(6, 9),
        metric_for_best_model="average_accuracy",
        callbacks=[note, EarlyStoppingCallback(1)],
        **{**BEST, "num_train_epochs": 4},
    )
    trainer.train_task(trainer.scenario[0])
    *within, after = note.found
    assert max(within) > 0.9 and after < 0.1  # of the same weights
    assert trainer.state.best_metric == max(within)
    assert "validation images of the data" in trainer.results.hyperparameters["selection"]


def test_an_added_task_has_its_own_part(make_trainer, data):
    trainer = make_trainer(
        CONFIGS["linear-probe"](), num_tasks=1, validation_fraction=0.25, num_train_epochs=1, **WATCHED
    )
    trainer.train()
    trainer.train_task(data, name="again")
    assert [len(task.test) for task in trainer.validation] == [24, 24] and len(trainer.scenario[1].train) == 72


def test_a_resumed_run_draws_the_same_images(make_trainer):
    def trainer(**words):
        return make_trainer(
            CONFIGS["coda"](),
            validation_fraction=0.25,
            num_train_epochs=1,
            metric_for_best_model="loss",
            **BEST,
            **words,
        )

    whole, again = whole_and_resumed(trainer)
    np.testing.assert_array_equal(again.accuracy_matrix, whole.accuracy_matrix)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0, but must be a number between 0 and 1"),
        ({"validation_fraction": True}, "validation_fraction is True"),
        ({"validation_seed": -1}, "validation_seed is -1"),
        ({"validation_fraction": 0.2, "validation": "given"}, "validation images are given, and validation_fraction"),
        ({"validation": "part"}, "validation has no images of the tasks task_1, task_2"),
    ],
)
def test_bad_validation(words, message, make_trainer):
    data = images(2, 5)
    kinds = {"given": data, "part": data.filter(lambda row: row["label"] < 2)}
    words = {name: kinds.get(value, value) if isinstance(value, str) else value for name, value in words.items()}
    with pytest.raises(ValueError, match=message):
        make_trainer(CONFIGS["linear-probe"](), **words)


def test_a_stream_needs_images_of_their_own(make_trainer, data):
    words = {"num_train_epochs": 1, "lr_scheduler_type": "constant", "eval_strategy": "epoch"}
    with pytest.raises(ValueError, match=r"an image of a stream may come several times.*validation="):
        make_trainer(CONFIGS["l2p"](), scenario=task_free(data, 2), validation_fraction=0.2, **words)
    make_trainer(CONFIGS["l2p"](), scenario=task_free(data, 2), validation=images(2, 5), **words).train()


def test_domains_are_told_by_name(make_trainer, data):
    domains = {
        name: part.add_column("domain", ["ab"[row % 2] for row in range(len(part))]) for name, part in data.items()
    }
    scenario = domain_incremental(domains)
    with pytest.raises(ValueError, match="validation is one data set, but the tasks a, b share classes"):
        make_trainer(CONFIGS["linear-probe"](), scenario=scenario, validation=images(2, 5))
    given = {"a": images(2, 5), "b": images(2, 6)}
    assert len(make_trainer(CONFIGS["linear-probe"](), scenario=scenario, validation=given).validation) == 2


def test_shares_of_classes():
    labels = np.array([0] * 10 + [1] * 3 + [2] * 2 + [3])
    drawn = share_of_each_class(labels, 0.3, 0)
    assert np.bincount(labels[drawn], minlength=4).tolist() == [3, 1, 1, 0]
    assert (drawn == share_of_each_class(labels, 0.3, 0)).all()
    assert (drawn != share_of_each_class(labels, 0.3, 1)).any()


CHOICE = ("--training", "{eval_strategy: epoch, save_strategy: epoch, load_best_model_at_end: true, use_cpu: true}")


def test_a_choice_by_test_images_in_a_configuration(refused):
    assert "would choose by test images" in refused(*CHOICE)
    assert "has no split 'dev'; it has ['train', 'test']" in refused(*CHOICE, "--dataset.validation_split", "dev")


def test_a_validation_split_from_a_configuration(train, place, tmp_path):
    choice = (*CHOICE, "--training.num_train_epochs", "1")
    assert train(*choice, "--training.validation_fraction", "0.25") == 0
    assert "0.25 of the training images" in RunResults.load(tmp_path / "out").hyperparameters["selection"]
    folder = tmp_path / "three"
    folder.mkdir()
    for source, split in (("data/train", "train"), ("data/test", "test"), ("single/train", "validation")):
        (folder / f"{split}.parquet").write_bytes((place / f"{source}.parquet").read_bytes())
    words = ("--dataset", f"{{path: {folder}, validation_split: validation}}", "--overwrite")
    assert train(*choice, *words) == 0
    assert "40 images: validation images of the data" in RunResults.load(tmp_path / "out").hyperparameters["selection"]
