"""What may not differ between an interrupted run and the one that goes on with it."""

from __future__ import annotations

import functools

import pytest
from datasets import Dataset, Image
from peft import get_peft_model
from trainer_cases import CONFIGS, images
from transformers import ViTImageProcessorPil

from peft_cl import class_incremental, task_free
from peft_cl.trainer.provenance import MEASURING
from peft_cl.trainer.snapshot import differences, load_snapshot, save_snapshot


def augment(image):
    return image


@pytest.fixture
def settings(make_trainer):
    """`settings(...)`: what a trainer made so would compare."""

    def get(config=None, processor=None, **words):
        trainer = make_trainer(config or CONFIGS["coda"](), **words)
        if processor is not None:
            trainer.processing_class = processor
        return trainer.settings()

    return get


def test_the_same_run_has_the_same_settings(settings):
    for augmentation in (None, augment, functools.partial(augment)):
        assert not differences(settings(augmentation=augmentation), settings(augmentation=augmentation))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"adam_epsilon": 1e-3}, "adam_epsilon"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type"),
        ({"num_tasks": 2}, "scenario.num_tasks"),
        ({"processor": ViTImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False)}, "processor."),
        ({"config": CONFIGS["l2p"]()}, "method"),
        ({"data_seed": 3}, "data_seed"),
        ({"eval_strategy": "epoch"}, "eval_strategy"),
        ({"eval_strategy": "steps", "eval_steps": 3}, "eval_steps"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model"),
        ({"greater_is_better": True}, "greater_is_better"),
        (
            {
                "load_best_model_at_end": True,
                "eval_strategy": "epoch",
                "save_strategy": "epoch",
                "validation_fraction": 0.2,
            },
            "load_best_model_at_",
        ),
        ({"validation_fraction": 0.2}, "validation_fraction"),
        ({"validation": images(2, 3)}, "validation: was None"),
    ],
)
def test_a_change_is_found_and_named(settings, change, name):
    found = differences(settings(), settings(**change))
    assert any(entry.startswith(name) for entry in found), found


def test_a_run_of_an_earlier_version_goes_on(make_trainer, tmp_path):
    """Its snapshot does not say when it measured."""
    words = {"num_train_epochs": 1, "eval_strategy": "epoch"}
    first = make_trainer(CONFIGS["linear-probe"](), **words)
    first.train_task(first.scenario[0])
    state = load_snapshot(tmp_path / "run" / "_state")
    for name in MEASURING:
        del state["settings"][name]
    save_snapshot(tmp_path / "run" / "_state", state)
    resumed = make_trainer(CONFIGS["linear-probe"](), **words)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.finished_tasks == 3
    assert resumed.results.hyperparameters["eval_strategy"] == "epoch"
    assert "eval_strategy" not in make_trainer(CONFIGS["linear-probe"](), folder="plain").results.hyperparameters


def test_other_weights_of_the_backbone(settings, tiny_vit):
    """Its name says nothing: both are made from a configuration."""
    models = (get_peft_model(tiny_vit(seed, **more), CONFIGS["coda"]()) for seed, more in ((0, {}), (1, {})))
    found = differences(*(settings(model=model) for model in models))
    assert len(found) == 1 and found[0].startswith("backbone.weights: was ")
    models = (tiny_vit(), tiny_vit())
    models[1].set_attn_implementation("eager")
    found = differences(*(settings(model=get_peft_model(model, CONFIGS["coda"]())) for model in models))
    assert found == ["backbone.attention: was 'sdpa', is 'eager'"]


@pytest.mark.parametrize("part", ["train", "test"])
def test_other_images_under_the_same_labels(settings, data, part):
    other = {**data, part: images({"train": 16, "test": 8}[part], 7)}
    found = differences(settings(), settings(scenario=class_incremental(other, 3)))
    assert [entry.partition(":")[0] for entry in found] == [f"examples.task_{index}" for index in range(3)]


def test_images_in_files(settings, tmp_path):
    """The data set holds paths alone; the files are others."""
    found = []
    for seed in (0, 1):
        splits = []
        for split, first in (("train", seed), ("test", seed + 2)):
            for index, image in enumerate(images(4, first)["image"]):
                image.save(tmp_path / f"{split}{index}.png")
            labels = images(4, 0)["label"]
            paths = [str(tmp_path / f"{split}{index}.png") for index in range(len(labels))]
            splits.append(Dataset.from_dict({"image": paths, "label": labels}).cast_column("image", Image()))
        found.append(settings(scenario=class_incremental(tuple(splits), 2)))
    assert {entry.partition(":")[0] for entry in differences(*found)} == {"examples.task_0", "examples.task_1"}


def test_another_adapter_that_learns_on(settings, tiny_vit):
    found = []
    for order in (["black", "white"], ["white", "black"]):
        model = get_peft_model(tiny_vit(), CONFIGS["coda"]())
        model.begin_task(order)
        found.append(settings(model=model))
    assert differences(*found) == [
        "learnt_before.classes: was ['black', 'white'], is ['white', 'black']",
    ]


def test_another_stream_is_another_scenario(settings, data):
    words = {"config": CONFIGS["l2p"](), "num_train_epochs": 1, "lr_scheduler_type": "constant"}
    streams = [settings(scenario=task_free(data, 3, **change), **words) for change in ({}, {"blur": 2.0})]
    assert differences(*streams)[0] == "scenario.settings.blur: was 0.5, is 2.0"


def test_a_folder_without_a_run(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="nowhere', but no run was interrupted there"):
        make_trainer(CONFIGS["coda"]()).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["optimizers", "eval_dataset"])
def test_what_each_task_has_of_its_own_is_refused(name, make_trainer, data, tiny_vit, processor, tmp_path):
    from peft import get_peft_model

    from peft_cl import ContinualTrainer, ContinualTrainingArguments, class_incremental

    arguments = ContinualTrainingArguments(str(tmp_path / "run"), use_cpu=True)
    model = get_peft_model(tiny_vit(), CONFIGS["coda"]())
    with pytest.raises(ValueError, match=f"{name} is given, but each task has its own"):
        ContinualTrainer(
            model, arguments, class_incremental(data, 3), processing_class=processor, **{name: data["test"]}
        )


def test_checkpoints_without_their_optimizer_are_refused(make_trainer):
    with pytest.raises(ValueError, match="save_only_model is True.*Leave it at False"):
        make_trainer(CONFIGS["coda"](), save_strategy="epoch", save_only_model=True)
