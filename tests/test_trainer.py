"""The trainer of a task sequence, on small images that can be learnt."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from peft import PeftConfig, PeftModel, get_peft_model
from PIL import Image as PILImage
from trainer_cases import CONFIGS
from transformers import AutoModelForImageClassification, TrainerCallback
from transformers.utils import logging

from peft_cl import (
    L2PConfig,
    LinearProbeConfig,
    RandomResizedCropFlip,
    RunResults,
    class_incremental,
    domain_incremental,
    task_incremental,
)
from peft_cl.plots.run import PICTURE_FILES, RELIABILITY_FILE
from peft_cl.strategies import FineTuning, NearestClassMean


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sequence_is_learnt_measured_saved_and_reloaded(name, make_trainer, tiny_vit, data, tmp_path):
    trainer = make_trainer(CONFIGS[name]())
    trainer.train()
    matrix = trainer.accuracy_matrix
    assert np.isnan(matrix[np.triu_indices(3, 1)]).all()
    assert not np.isnan(matrix[np.tril_indices(3)]).any()
    assert matrix[0, 0] == 1.0  # two plain colours
    assert trainer.metrics["average_accuracy"] == pytest.approx(matrix[2].mean())

    results = RunResults.load(tmp_path / "run")
    np.testing.assert_array_equal(np.array(results.accuracy_matrix, dtype=float), matrix)
    assert results.finished_tasks == 3
    assert results.adapter_bytes == (tmp_path / "run" / "adapter_model.safetensors").stat().st_size

    # What was saved predicts what was measured, on a base with another head, through the stock loading code.
    loaded = PeftModel.from_pretrained(tiny_vit(num_labels=2), tmp_path / "run")
    assert list(loaded.config.id2label.values()) == list(trainer.scenario.classes)
    fresh = make_trainer(CONFIGS[name](), folder="fresh")
    loaded.eval()
    pixels = fresh._collators[False](list(data["test"]))
    with torch.no_grad():
        predicted = loaded(pixels["pixel_values"]).logits.argmax(-1)
    correct = (predicted == pixels["labels"]).numpy().reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(correct, matrix[2])


def test_only_the_current_task_has_a_new_optimizer_with_its_parameters(make_trainer):
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
            seen.append((held == trainable, len(optimizer.state)))

    make_trainer(CONFIGS["coda"](), callbacks=[Watch()]).train()
    assert seen == [(True, 0)] * 3


def test_parts_have_learning_rates_of_their_own(make_trainer):
    rates = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {parameter: name.split(".", 3)[-1] for name, parameter in model.named_parameters()}
            for group in optimizer.param_groups:
                rates.update(
                    {names[parameter].rpartition("default.")[2]: group["lr"] for parameter in group["params"]}
                )

    given = {"prompts": 0.5, "pool": 0.25, "head": 0.125}
    trainer = make_trainer(CONFIGS["coda"](), callbacks=[Watch()], learning_rates=given, lr_scheduler_type="constant")
    trainer.train_task(trainer.scenario[0])
    assert rates == {"prompts": 0.5, "keys": 0.25, "attention": 0.25, "weight": 0.125, "bias": 0.125}


WITH_PART = {
    "keys": lambda: CONFIGS["l2p"](),
    "query_projection": lambda: L2PConfig(pool_size=6, prompt_length=2, top_k=2, query_projection="mlp"),
    "g_prompts": lambda: CONFIGS["dualprompt"](),
    "attention": lambda: CONFIGS["coda"](),
}


@pytest.mark.parametrize("part", WITH_PART)
def test_each_part_of_a_pool_has_its_rate_in_every_tasks_optimizer(part, make_trainer):
    steps = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {parameter: name for name, parameter in model.named_parameters() if "_pool." in name}
            held = [(group, each) for group in optimizer.param_groups for each in group["params"] if each in names]
            assert len(held) == len(names)
            rates = [(group["lr"], group["weight_decay"]) for group, _ in held]
            own = [names[each].partition("default.")[2] for _, each in held]
            steps.append(dict(zip(own, rates, strict=True)))

    trainer = make_trainer(
        WITH_PART[part](),
        callbacks=[Watch()],
        learning_rates={part: 0.5},
        learning_rate=0.25,
        lr_scheduler_type="constant",
        weight_decay=0.125,
        num_tasks=2,
        max_steps=1,
    )
    trainer.train()
    assert len(steps) == 2
    for rates in steps:
        assert {name.split(".")[0] for name, (rate, _) in rates.items() if rate == 0.5} == {part}
        assert {rate for rate, _ in rates.values()} == {0.25, 0.5}
        assert all(decay == (0 if name.endswith("bias") else 0.125) for name, (_, decay) in rates.items())


def test_rows_of_past_tasks_never_move(make_trainer):
    trainer = make_trainer(CONFIGS["coda"](), weight_decay=0.5)
    trainer.train_task(trainer.scenario[0])
    pool = trainer.model.base_model.pool
    learnt = pool.prompts.detach().clone()
    trainer.train_task(trainer.scenario[1])
    assert torch.equal(pool.past_prompts, learnt)


def test_incomplete_batches_are_dropped_in_training_only(make_trainer):
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(state.max_steps)

    trainer = make_trainer(
        CONFIGS["coda"](),
        callbacks=[Watch()],
        dataloader_drop_last=True,
        per_device_train_batch_size=5,  # 6 whole batches of 32 images
        per_device_eval_batch_size=7,
        num_train_epochs=1,
    )
    trainer.train()
    assert seen == [6, 6, 6] and not np.isnan(trainer.accuracy_matrix[2]).any()


@pytest.mark.parametrize("name", CONFIGS)
def test_domains_share_the_head(name, make_trainer, data):
    """Three domains of six colours: as they are, darker, and with red and blue exchanged."""
    changes = {
        "plain": lambda pixels: pixels,
        "dark": lambda pixels: pixels // 2,
        "swapped": lambda pixels: pixels[..., ::-1].copy(),
    }
    features = Features({**data["train"].features, "domain": ClassLabel(names=list(changes))})

    def in_domains(split: Dataset) -> Dataset:
        rows = [
            {**row, "image": PILImage.fromarray(change(np.asarray(row["image"]))), "domain": domain}
            for domain, change in changes.items()
            for row in split
        ]
        return Dataset.from_list(rows, features=features)

    scenario = domain_incremental({split: in_domains(examples) for split, examples in data.items()})
    trainer = make_trainer(CONFIGS[name](), scenario=scenario)
    trainer.train()
    assert trainer.results.task_names == list(changes)
    assert len(trainer.model.peft_config["default"].classes) == 6
    assert not np.isnan(trainer.accuracy_matrix[np.tril_indices(3)]).any()
    assert trainer.accuracy_matrix[2, 2] > 1 / 3  # twice the chance


def test_a_known_task_leaves_its_own_classes_in_question(make_trainer, data):
    trainer = make_trainer(CONFIGS["coda"](), scenario=task_incremental(data, 3))
    trainer.train()
    batch = trainer._collators[False](list(data["test"]))
    with torch.no_grad():
        logits = trainer.model.eval()(batch["pixel_values"]).logits
    blocks = logits.view(len(logits), 3, 2)[torch.arange(len(logits)), batch["labels"] // 2]
    correct = (blocks.argmax(-1) == batch["labels"] % 2).view(3, -1).float().mean(1)
    np.testing.assert_allclose(trainer.accuracy_matrix[2], correct, atol=1e-6)
    assert trainer.results.scenario["name"] == "task-incremental"


@pytest.mark.parametrize("train_mask", [True, False])
def test_a_trained_adapter_learns_on(train_mask, make_trainer, data):
    """Classes that the adapter knows keep their rows, whatever their order in the new scenario."""
    orders = [["blue", "red"], ["magenta", "red", "blue", "green"]]
    scenarios = [class_incremental(data, len(order) // 2, class_order=order) for order in orders]
    trainer = make_trainer(CONFIGS["linear-probe"](), scenario=scenarios[0])
    trainer.train()
    trainer.model.peft_config["default"].train_mask = train_mask
    trainer = make_trainer(None, model=trainer.model, scenario=scenarios[1], folder="more")
    trainer.train()
    assert trainer.model.peft_config["default"].classes == ["blue", "red", "magenta", "green"]
    examples = [example for example in data["test"] if example["label"] in (0, 1, 2, 5)]
    pixels = make_trainer(CONFIGS["linear-probe"](), folder="fresh")._collators[False](examples)["pixel_values"]
    with torch.no_grad():
        rows = trainer.model.eval()(pixels).logits.argmax(-1)
    names = [trainer.model.config.id2label[row] for row in rows.tolist()]
    expected = [data["test"].features["label"].int2str(example["label"]) for example in examples]
    correct = {
        name: np.mean([n == e for n, e in zip(names, expected, strict=True) if e == name]) for name in orders[1]
    }
    for task in scenarios[1]:
        measured = trainer.accuracy_matrix[1, task.index]
        assert measured == pytest.approx(np.mean([correct[name] for name in task.classes]))
    if not train_mask:  # the plain cross-entropy ends at the last task's classes
        assert correct["green"] == correct["blue"] == 1


def test_a_task_that_was_interrupted_is_not_begun_twice(make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = make_trainer(CONFIGS["dualprompt"](), callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(RuntimeError, match="task_0 was begun and interrupted.*Make model and trainer anew"):
        trainer.train()
    assert trainer.model.peft_config["default"].num_tasks == 1


@pytest.mark.parametrize("name", ["coda", "linear-probe"])
def test_cached_queries_change_nothing(name, make_trainer):
    matrices, weights = [], []
    for cache in (True, False):
        trainer = make_trainer(CONFIGS[name](), folder=f"cache {cache}", cache_queries=cache)
        trainer.train()
        matrices.append(trainer.accuracy_matrix)
        trained = (parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trained]))
    np.testing.assert_array_equal(*matrices)
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-4)


def test_augmented_training_images_get_no_cached_query(make_trainer):
    trainer = make_trainer(CONFIGS["coda"](), augmentation=RandomResizedCropFlip(), num_train_epochs=1)
    trainer.train()
    kept = {id(data) for data, _ in trainer.queries._queries.values()}
    assert kept == {id(task.test) for task in trainer.scenario}


def test_batch_4_equals_2_by_2_accumulated(make_trainer):
    def learnt(**training):
        trainer = make_trainer(
            CONFIGS["l2p"](), folder=str(training), optim="sgd", learning_rate=0.1, max_steps=3, **training
        )
        trainer.train_task(trainer.scenario[0])
        return trainer.model.base_model.pool.keys.detach(), trainer.model.base_model.head.active.weight.detach()

    once = learnt(per_device_train_batch_size=4)
    accumulated = learnt(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    torch.testing.assert_close(once, accumulated, atol=1e-6, rtol=1e-5)


def test_nearest_class_mean_is_the_nearest_mean(make_trainer, data):
    trainer = make_trainer(LinearProbeConfig(), strategy=NearestClassMean())
    trainer.train()
    train, test = (trainer._collators[False](list(data[split])) for split in ("train", "test"))
    tuner = trainer.model.base_model
    features, queries = tuner.query(train["pixel_values"]), tuner.query(test["pixel_values"])
    means = torch.stack([features[train["labels"] == label].mean(0) for label in range(6)])
    nearest = torch.cdist(queries, means).argmin(-1)
    with torch.no_grad():
        predicted = trainer.model.eval()(test["pixel_values"]).logits.argmax(-1)
    assert torch.equal(predicted, nearest)
    assert trainer.results.method == "Nearest class mean"


def test_class_means_are_over_all_domains(make_trainer, data):
    """A class that comes again keeps what it had: two halves of the images, as two domains, make the means of all."""
    halves = Features({**data["train"].features, "domain": ClassLabel(names=["odd", "even"])})
    split = {
        name: Dataset.from_list([{**row, "domain": place % 2} for place, row in enumerate(part)], features=halves)
        for name, part in data.items()
    }
    both = make_trainer(LinearProbeConfig(), strategy=NearestClassMean(), scenario=domain_incremental(split))
    both.train()
    whole = make_trainer(LinearProbeConfig(), strategy=NearestClassMean(), num_tasks=1, folder="whole")
    whole.train()
    torch.testing.assert_close(both.tuner.head.active.weight, whole.tuner.head.active.weight)
    torch.testing.assert_close(both.tuner.head.active.bias, whole.tuner.head.active.bias)


def test_fine_tuning_moves_the_backbone_and_counts_it(make_trainer, tiny_vit):
    trainer = make_trainer(LinearProbeConfig(train_mask=False), strategy=FineTuning(), learning_rate=1e-3)
    trainer.train()
    before = tiny_vit().vit.layers[0].mlp.fc1.weight
    after = trainer.model.base_model.encoder.base_layer.layers[0].mlp.fc1.weight
    assert not torch.equal(before, after)
    assert not trainer.queries._queries  # a backbone that moves has no feature to keep
    results = trainer.results
    assert results.trainable_parameters > 150_000
    assert results.adapter_bytes > 4 * 150_000


def test_a_run_in_python_leaves_card_and_pictures(make_trainer, tmp_path, monkeypatch, caplog):
    trainer = make_trainer(CONFIGS["l2p"](), num_train_epochs=1, num_tasks=2, pictures=True)
    trainer.train()
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == set(PICTURE_FILES) - {RELIABILITY_FILE}
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"Final average accuracy: {100 * trainer.metrics['average_accuracy']:.2f} %" in card
    assert "a backbone without a name" in card and "Model ID" not in card and "base_model" not in card.split("---")[1]

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.get_logger("peft_cl"), "propagate", True)
    make_trainer(CONFIGS["linear-probe"](), num_train_epochs=1, pictures=True, folder="without").train()
    (line,) = [record.getMessage() for record in caplog.records if "pictures" in record.getMessage()]
    assert line.endswith("which is not installed: `pip install peft-cl[plots]`.")
    assert not list((tmp_path / "without").glob("*.png"))


@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_a_fine_tuned_model_comes_back(adapter, make_trainer, tiny_vit, data, tmp_path):
    """The folder holds the trained backbone beside the head, as a base model of its own."""
    model = get_peft_model(tiny_vit(), LinearProbeConfig(train_mask=False), adapter_name=adapter)
    trainer = make_trainer(None, model=model, strategy=FineTuning(), learning_rate=1e-3, num_train_epochs=1)
    trainer.train_task(trainer.scenario[0])  # what is there after each task, not only at the end
    place = tmp_path / "run" / ("" if adapter == "default" else adapter)
    assert [file.parent for file in (tmp_path / "run").rglob("adapter_config.json")] == [place]
    folder = PeftConfig.from_pretrained(str(place)).base_model_name_or_path
    base = AutoModelForImageClassification.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, place).eval()
    pixels = trainer._collators[False](list(data["test"]))["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).logits, trainer.model.eval()(pixels).logits)


def test_each_task_has_its_own_folder_for_checkpoints(make_trainer, tmp_path):
    trainer = make_trainer(CONFIGS["dualprompt"](), save_strategy="epoch", num_train_epochs=1)
    trainer.train()
    # Those of finished tasks go when the next snapshot holds what they held.
    (checkpoint,) = (tmp_path / "run").glob("_state/task_*/checkpoint-*")
    assert checkpoint.parts[-2:] == ("task_2", "checkpoint-4")


def test_evaluate_on_other_examples(make_trainer, data):
    trainer = make_trainer(CONFIGS["linear-probe"](), num_train_epochs=1)
    trainer.train()
    metrics = trainer.evaluate(data["test"])
    assert metrics["eval_accuracy"] == pytest.approx(trainer.accuracy_matrix[2].mean())
