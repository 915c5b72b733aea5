"""On real images, with the embedded backbone: run where `PEFT_CL_DATA` names the folder of data sets."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from peft_cl import (
    CodaPromptConfig,
    ContinualTrainer,
    ContinualTrainingArguments,
    DualPromptConfig,
    LinearProbeConfig,
    class_incremental,
    domain_incremental,
)
from peft_cl.assets import default_backbone
from peft_cl.metrics import usage_shares
from peft_cl.strategies import NearestClassMean


pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def tiny_imagenet():
    return load_dataset(str(Path(os.environ["PEFT_CL_DATA"], "tiny-imagenet-cl")))


def backbone():
    return AutoModelForImageClassification.from_pretrained(
        default_backbone(), dtype=torch.bfloat16, attn_implementation="eager"
    )


def trainer_of(config, scenario, folder, strategy=None, **training):
    set_seed(0)
    return ContinualTrainer(
        get_peft_model(backbone(), config),
        ContinualTrainingArguments(
            str(folder), use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=250, **training
        ),
        scenario,
        processing_class=AutoImageProcessor.from_pretrained(default_backbone()),
        strategy=strategy,
    )


def test_ten_tasks_of_ten_classes_share_the_images(tiny_imagenet):
    scenario = class_incremental(tiny_imagenet, num_tasks=10, seed=1)
    assert [len(task.train) for task in scenario] == [2500] * 10
    assert [len(task.test) for task in scenario] == [500] * 10
    assert len(set(scenario.classes)) == 100
    assert set(scenario[3].train.unique("label")) == {scenario.label_names.index(name) for name in scenario[3].classes}


@pytest.mark.slow
def test_nearest_class_means_of_unseen_classes(tiny_imagenet, tmp_path):
    """The embedded backbone's features tell 20 classes that it has not seen apart, far above the 5% of chance."""
    scenario = class_incremental(tiny_imagenet, num_tasks=2, class_order=list(range(20)))
    trainer = trainer_of(LinearProbeConfig(), scenario, tmp_path, NearestClassMean())
    trainer.train()
    assert trainer.metrics["average_accuracy"] > 0.35


def test_domains_of_real_images(tmp_path):
    """Photographs, paintings, cartoons and sketches of the same seven things; rows are chosen by domain, mostly."""
    data = load_dataset(str(Path(os.environ["PEFT_CL_DATA"], "pacs")))
    data = {split: part.shuffle(seed=0).select(range(700)) for split, part in data.items()}
    scenario = domain_incremental(data, domain_order=["photo", "sketch"])
    trainer = trainer_of(
        DualPromptConfig(head_init="zeros"),
        scenario,
        tmp_path,
        num_train_epochs=2,
        per_device_train_batch_size=25,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
    )
    trainer.train()
    assert trainer.accuracy_matrix[0, 0] > 0.4  # of seven classes
    usage = usage_shares(trainer.results.prompt_usage)
    assert usage[0, 0] > 0.6 and usage[1, 1] > 0.8


@pytest.mark.slow
def test_prompts_learn_real_classes_and_the_adapter_carries_them(tiny_imagenet, tmp_path):
    scenario = class_incremental(tiny_imagenet, num_tasks=2, class_order=list(range(8)))
    trainer = trainer_of(
        CodaPromptConfig(components_per_task=5),
        scenario,
        tmp_path,
        num_train_epochs=2,
        per_device_train_batch_size=25,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
    )
    trainer.train()
    assert trainer.accuracy_matrix[0, 0] > 0.5  # of four classes
    assert trainer.metrics["average_accuracy"] > 0.3  # of eight

    loaded = PeftModel.from_pretrained(backbone(), tmp_path).eval()
    assert tuple(loaded.config.id2label.values()) == scenario.classes
    test = trainer._collators[False](list(scenario[1].test))
    with torch.no_grad():
        predicted = loaded(test["pixel_values"]).logits.argmax(-1)
    accuracy = (predicted == test["labels"]).float().mean().item()
    # The trainer measured in batches with cached queries: bfloat16 may turn a tie or two.
    np.testing.assert_allclose(accuracy, trainer.accuracy_matrix[1, 1], atol=0.02)
