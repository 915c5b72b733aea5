"""What the trainer refuses, and what it says."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from datasets import Image
from peft import get_peft_model
from refused_cases import BAD_ARGUMENTS
from trainer_cases import CONFIGS
from transformers import EarlyStoppingCallback, TrainingArguments

from peft_cl import (
    ContinualTrainer,
    ContinualTrainingArguments,
    DualPromptConfig,
    LinearProbeConfig,
    class_incremental,
    task_free,
)
from peft_cl.strategies import EWC, FineTuning, NearestClassMean
from peft_cl.trainer import shard_backbone


class TestBadInput:
    """Each is refused before anything is trained."""

    def test_a_pool_smaller_than_the_tasks_need(self, make_trainer):
        with pytest.raises(ValueError, match=r"pool_size is 2, but task 3 needs a row of its own.*Enlarge pool_size"):
            make_trainer(DualPromptConfig(pool_size=2))

    def test_label_smoothing(self, tmp_path):
        with pytest.raises(ValueError, match=r"label_smoothing_factor is 0.1.*Set it to 0"):
            ContinualTrainingArguments(str(tmp_path), label_smoothing_factor=0.1)

    def test_buffers_of_one_process_for_all(self, tmp_path):
        with pytest.raises(ValueError, match="ddp_broadcast_buffers is True.*Leave it at False"):
            ContinualTrainingArguments(str(tmp_path), use_cpu=True, ddp_broadcast_buffers=True)

    def test_half_precision_of_everything(self, tmp_path):
        with pytest.raises(ValueError, match="bf16_full_eval is True.*dtype='bfloat16'"):
            ContinualTrainingArguments(str(tmp_path), use_cpu=True, bf16_full_eval=True)

    @pytest.mark.parametrize("strategy", [FineTuning(), NearestClassMean()], ids=lambda strategy: strategy.name)
    def test_task_evidence_without_training_steps_on_frozen_features(self, strategy, make_trainer):
        with pytest.raises(ValueError, match=f"task_evidence is 6.0, but {strategy.name} has no use for it"):
            make_trainer(LinearProbeConfig(task_evidence=6.0), strategy=strategy)

    def test_the_trainers_own_arguments(self, make_trainer, tmp_path):
        trainer = make_trainer(LinearProbeConfig())
        with pytest.raises(ValueError, match="args is a TrainingArguments, but must be ContinualTrainingArguments"):
            ContinualTrainer(
                trainer.model,
                TrainingArguments(str(tmp_path), use_cpu=True),
                trainer.scenario,
                processing_class=trainer.processing_class,
            )

    def test_an_augmentation_that_makes_tensors(self, make_trainer):
        with pytest.raises(ValueError, match="augmentation makes a Tensor of an image.*Leave out what comes after"):
            make_trainer(LinearProbeConfig(), augmentation=lambda image: torch.zeros(3, image.height, image.width))

    def test_an_augmentation_with_a_generator_of_its_own(self, make_trainer, caplog):
        """Its draws cannot come again; without that, it is warned of."""
        generator = np.random.default_rng(0)

        def turned(image):
            return image.rotate(float(generator.uniform(0, 180)))

        with pytest.raises(ValueError, match="augmentation_draws is 2, but augmentation gives other images for the"):
            make_trainer(LinearProbeConfig(), augmentation=turned, augmentation_draws=2)
        logger = logging.getLogger("peft_cl.trainer.checks")
        logger.addHandler(caplog.handler)
        make_trainer(LinearProbeConfig(), augmentation=turned)
        logger.removeHandler(caplog.handler)
        assert "augmentation gives other images for the same seed" in caplog.text

    def test_an_augmentation_of_batches_that_changes_their_shape(self, make_trainer):
        with pytest.raises(ValueError, match=r"batch_augmentation makes \(4, 3, 32, 16\) of a batch of shape"):
            make_trainer(LinearProbeConfig(), batch_augmentation=lambda pixels: pixels[..., ::2])

    @pytest.mark.parametrize("name", ["prediction_loss_only", "batch_eval_metrics"])
    def test_evaluation_without_predictions(self, name, tmp_path):
        with pytest.raises(ValueError, match=f"{name} is True.*Leave it at False"):
            ContinualTrainingArguments(str(tmp_path), **{name: True})

    @pytest.mark.parametrize(("name", "value", "rule"), BAD_ARGUMENTS)
    def test_values_that_the_trainer_would_take(self, name, value, rule, tmp_path):
        with pytest.raises(ValueError, match=rf"{name} is {value!r}, but must be {rule}"):
            ContinualTrainingArguments(str(tmp_path), use_cpu=True, **{name: value})

    def test_a_task_smaller_than_a_batch_that_must_be_full(self, make_trainer):
        with pytest.raises(ValueError, match=r"dataloader_drop_last is True, but 'task_0' has 32 training examples"):
            make_trainer(CONFIGS["coda"](), dataloader_drop_last=True, per_device_train_batch_size=33)

    def test_a_stretch_of_a_stream_smaller_than_a_batch_that_must_be_full(self, make_trainer, data):
        words = {"num_train_epochs": 1, "lr_scheduler_type": "constant", "dataloader_drop_last": True}
        with pytest.raises(ValueError, match=r"dataloader_drop_last is True, but 'task_0' has 32 training examples"):
            scenario = task_free(data, 3)
            make_trainer(CONFIGS["coda"](), scenario=scenario, per_device_train_batch_size=33, **words)

    def test_half_precision_that_a_cpu_does_not_have(self, tmp_path):
        with pytest.raises(ValueError, match="fp16 is True, but on a CPU.*Set it to False, or bf16 to True"):
            ContinualTrainingArguments(str(tmp_path), use_cpu=True, fp16=True)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                {"optim_args": "foo"},
                "optim is 'adamw_torch.*' with optim_args='foo', which fails: .*Correct optim_args",
            ),
            ({"optim": "galore_adamw"}, "optim is 'galore_adamw' with optim_args=None, which fails"),
            (
                {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}},
                "lr_scheduler_type is 'cosine' with lr_scheduler_kwargs={'cycles': 2}, which fails: .*Correct",
            ),
            ({"lr_scheduler_type": "warmup_stable_decay"}, "'warmup_stable_decay' with lr_scheduler_kwargs=.*fails"),
            (
                {"metric_for_best_model": "accuracy_task_9"},
                "'task_9' is none of the scenario's tasks.*accuracy_task_0",
            ),
            (
                {"metric_for_best_model": "eval_accuracy_task_1"},
                "'eval_accuracy_task_1', but 'task_1' is not measured while earlier tasks are learnt. Take",
            ),
            (
                {"callbacks": [EarlyStoppingCallback(), 3]},
                "EarlyStoppingCallback, but metric_for_best_model is None",
            ),
            (
                {"callbacks": [EarlyStoppingCallback()], "metric_for_best_model": "loss"},
                "EarlyStoppingCallback, but eval_strategy is 'no', so nothing says when to stop. Set",
            ),
            ({"callbacks": [print]}, "callbacks has <built-in function print>, but must hold .*TrainerCallback"),
            ({"callbacks": print}, "callbacks is <built-in function print>, but must be a list"),
        ],
    )
    def test_what_would_fail_in_the_first_task(self, words, message, make_trainer):
        with pytest.raises(ValueError, match=message):
            make_trainer(CONFIGS["linear-probe"](), **words)

    @pytest.mark.parametrize("strategy", [EWC, "ewc", [None]], ids=["class", "name", "none"])
    def test_no_strategy(self, strategy, make_trainer):
        with pytest.raises(ValueError, match=r"strategy has .*, but must be a Strategy or a list of them"):
            make_trainer(CONFIGS["coda"](), strategy=strategy)

    def test_class_means_of_features_that_prompts_change(self, make_trainer):
        with pytest.raises(ValueError, match=r"Nearest class mean compares features of the frozen.*LinearProbeConfig"):
            make_trainer(CONFIGS["l2p"](), strategy=NearestClassMean())

    def test_fine_tuning_in_half_precision(self, make_trainer, tiny_vit):
        model = get_peft_model(tiny_vit().bfloat16(), LinearProbeConfig(train_mask=False))
        with pytest.raises(ValueError, match=r"backbone is torch.bfloat16, in which small steps.*dtype='float32'"):
            make_trainer(None, model=model, strategy=FineTuning())

    def test_no_functions_of_images(self, make_trainer):
        it = make_trainer(CONFIGS["coda"]())
        for words in ({"processing_class": "google/vit"}, {"augmentation": "flip"}, {"batch_augmentation": 3}):
            (name,) = words
            with pytest.raises(ValueError, match=f"{name} is {words[name]!r}, but"):
                ContinualTrainer(it.model, it.args, it.scenario, **{"processing_class": it.processing_class, **words})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda part: part.with_format("numpy"), r"come as 'numpy'.*with_format\(None\)"),
            (lambda part: part.cast_column("image", Image(decode=False)), r"undecoded.*cast_column\('image', "),
        ],
        ids=["format", "undecoded"],
    )
    def test_images_that_do_not_come_as_such(self, change, message, make_trainer, data):
        changed = {split: change(part) for split, part in data.items()}
        with pytest.raises(ValueError, match=message):
            make_trainer(CONFIGS["coda"](), scenario=class_incremental(changed, 3))

    @pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
    def test_parameters_split_over_processes(self, name, make_trainer, monkeypatch):
        it = make_trainer(CONFIGS["coda"]())
        monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")  # as `accelerate launch` does
        with pytest.raises(ValueError, match=f"{name} is on, which splits parameters.*Start with `accelerate launch"):
            ContinualTrainer(it.model, it.args, it.scenario, processing_class=it.processing_class)

    def test_a_backbone_is_divided_over_processes_and_frozen(self, make_trainer, monkeypatch):
        model = make_trainer(CONFIGS["coda"]()).model
        with pytest.raises(ValueError, match="there is one process alone. Start with `accelerate launch --multi_gpu`"):
            shard_backbone(model)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        FineTuning().prepare(model)
        with pytest.raises(ValueError, match="divides frozen layers, but .* are trained. Leave it out, or call it"):
            shard_backbone(model)

    def test_images_of_another_size(self, make_trainer, tiny_vit):
        model = get_peft_model(tiny_vit(image_size=64), LinearProbeConfig())
        with pytest.raises(ValueError, match="gives images of 32 x 32 pixels, but the backbone reads 64 x 64"):
            make_trainer(None, model=model)

    def test_rates_of_parts_that_the_adapter_lacks(self, make_trainer):
        with pytest.raises(ValueError, match="learning_rates names attention, but this adapter has no such part"):
            make_trainer(CONFIGS["l2p"](), learning_rates={"attention": 0.1, "keys": 0.1})

    def test_removed_columns(self, tmp_path):
        with pytest.raises(ValueError, match="remove_unused_columns is True.*Leave it at False"):
            ContinualTrainingArguments(str(tmp_path), remove_unused_columns=True)

    def test_the_rate_is_scaled_by_the_images_of_a_step(self, tmp_path):
        words = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "use_cpu": True}
        arguments = ContinualTrainingArguments(str(tmp_path), learning_rate_per_256=0.03, **words)
        assert arguments.learning_rate == pytest.approx(0.03 * 64 / 256)
        with pytest.raises(ValueError, match="learning_rate_per_256 is -1, but must be a number above 0"):
            ContinualTrainingArguments(str(tmp_path), learning_rate_per_256=-1)

    def test_learning_rates(self, tmp_path):
        with pytest.raises(ValueError, match="learning_rates names 'prompt', but the parts are prompts"):
            ContinualTrainingArguments(str(tmp_path), learning_rates={"prompt": 0.1})
        for rate in (-1, float("inf")):
            with pytest.raises(ValueError, match=f"gives 'keys' the rate {rate}"):
                ContinualTrainingArguments(str(tmp_path), learning_rates={"keys": rate})
        with pytest.raises(ValueError, match=r"learning_rates is \[1\], but must be rates by part"):
            ContinualTrainingArguments(str(tmp_path), learning_rates=[1])

    def test_numbers_of_numpy_are_numbers(self, tmp_path):
        words = {"learning_rate": np.float32(0.5), "max_steps": np.int64(3), "learning_rates": {"keys": np.float64(1)}}
        arguments = ContinualTrainingArguments(str(tmp_path), use_cpu=True, **words)
        assert json.loads(arguments.to_json_string())["learning_rate"] == 0.5
        assert json.loads(arguments.to_json_string())["learning_rates"] == {"keys": 1.0}

    def test_a_model_without_adapter(self, tiny_vit, data, processor, tmp_path):
        arguments = ContinualTrainingArguments(str(tmp_path), use_cpu=True)
        with pytest.raises(ValueError, match="model is a ViTForImageClassification.*get_peft_model"):
            ContinualTrainer(tiny_vit(), arguments, class_incremental(data, 3), processing_class=processor)

    def test_no_scenario_and_no_processor(self, tiny_vit, data, processor, tmp_path):
        arguments = ContinualTrainingArguments(str(tmp_path), use_cpu=True)
        model = get_peft_model(tiny_vit(), LinearProbeConfig())
        with pytest.raises(ValueError, match="scenario is a dict.*class_incremental"):
            ContinualTrainer(model, arguments, data, processing_class=processor)
        with pytest.raises(ValueError, match="processing_class is None.*AutoImageProcessor"):
            ContinualTrainer(model, arguments, class_incremental(data, 3), processing_class=None)

    def test_evaluation_before_any_task(self, make_trainer):
        with pytest.raises(ValueError, match="No task has begun"):
            make_trainer(CONFIGS["linear-probe"]()).evaluate()

    def test_arguments_of_train(self, make_trainer):
        with pytest.raises(ValueError, match="got {'trial': 1}, but a task sequence is trained as a whole"):
            make_trainer(CONFIGS["linear-probe"]()).train(trial=1)

    def test_a_folder_that_cannot_be_written_to(self, make_trainer, tmp_path):
        (tmp_path / "file").write_text("not a folder")
        with pytest.raises(OSError, match="output_dir '.*file/run' cannot be written to.*Give another folder"):
            make_trainer(CONFIGS["linear-probe"](), folder="file/run")


def test_bf16_needs_no_further_word_on_a_cpu(tmp_path):
    """The Trainer would ask for use_cpu=True where there is nothing else."""
    arguments = ContinualTrainingArguments(str(tmp_path), bf16=True)
    assert arguments.bf16 and (arguments.device.type == "cpu") is not torch.accelerator.is_available()


def test_an_augmentation_may_give_images_of_any_mode(make_trainer):
    trainer = make_trainer(LinearProbeConfig(), augmentation=lambda image: image.convert("L"), num_train_epochs=1)
    trainer.train()
    assert trainer.finished_tasks == 3
