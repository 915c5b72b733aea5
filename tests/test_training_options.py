"""What `TrainingArguments` and the Trainer offer, task by task."""

from __future__ import annotations

import json

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from peft import get_peft_model
from trainer_cases import CONFIGS, images
from transformers import EarlyStoppingCallback, TrainerCallback

from peft_cl import RunResults
from peft_cl.trainer.learning_rates import part_of


class Note(TrainerCallback):
    """Keeps the learning rate at each step's end, and what was logged."""

    def __init__(self):
        self.rates, self.logs, self.steps = [], [], []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.steps.append(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


def test_warm_up_and_schedule_begin_anew_with_each_task(make_trainer):
    note = Note()
    make_trainer(
        CONFIGS["coda"](), callbacks=[note], max_steps=6, warmup_steps=2, lr_scheduler_type="cosine", num_tasks=2
    ).train()
    assert note.steps == [*range(1, 7)] * 2
    assert note.rates[:6] == note.rates[6:] and max(note.rates) == note.rates[1] == 1e-2
    assert note.rates[5] < 1e-3


def test_evaluation_within_a_task_and_early_stopping(make_trainer):
    note = Note()
    trainer = make_trainer(
        CONFIGS["linear-probe"](),
        callbacks=[note, EarlyStoppingCallback(early_stopping_patience=1)],
        num_train_epochs=20,
        num_tasks=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        validation_fraction=0.25,
        metric_for_best_model="average_accuracy",
    )
    trainer.train()
    accuracies = [log["eval_average_accuracy"] for log in note.logs if "eval_average_accuracy" in log]
    assert len(accuracies) < 2 * 20  # it stopped
    assert trainer.finished_tasks == 2
    # What was kept is the best of the last task's epochs.
    last = [log for log in note.logs if "eval_accuracy_task_1" in log]
    assert trainer.metrics["average_accuracy"] == max(log["eval_average_accuracy"] for log in last)


def test_the_best_checkpoint_of_a_trained_pool_comes_back(make_trainer, tmp_path):
    trainer = make_trainer(
        CONFIGS["coda"](),
        num_tasks=1,
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        validation=images(8, 1),
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the first epoch is the best
    )
    trainer.train()
    (state,) = (tmp_path / "run" / "_state" / "task_0").glob("checkpoint-36/trainer_state.json") or [None]
    best = json.loads(state.read_text())["best_model_checkpoint"]
    assert best.endswith("checkpoint-12")
    kept = torch.load(f"{best}/optimizer.pt", weights_only=True)  # a checkpoint like any other
    assert kept["param_groups"]
    from safetensors.torch import load_file

    weights = load_file(f"{best}/adapter_model.safetensors")
    final = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(torch.equal(final[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"dataloader_drop_last": True},
        {"optim": "adafactor"},
        {"auto_find_batch_size": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_trainer_work(options, make_trainer):
    trainer = make_trainer(CONFIGS["coda"](), num_tasks=2, **options)
    trainer.train()
    assert trainer.metrics["average_accuracy"] > 0.5 and trainer.finished_tasks == 2


def test_an_adapter_may_be_called_like_a_part(tiny_vit):
    model = get_peft_model(tiny_vit(), CONFIGS["coda"](), adapter_name="head")
    parts = {
        name.rpartition(".")[2]: part_of(name, {"head": 0.5, "keys": 0.1}) for name, _ in model.named_parameters()
    }
    assert parts["prompts"] is None and parts["keys"] == "keys"


@pytest.mark.parametrize("method", ["l2p", "dualprompt", "coda"])
def test_torch_compile_compiles_the_layers_and_not_once_for_each_task(method, make_trainer):
    """The model as a whole would be compiled anew at each task: prompts, head and pool change."""
    matrices, graphs = [], torch._dynamo.utils.counters["stats"]
    for options in ({}, {"torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        before = graphs["unique_graphs"]
        trainer = make_trainer(CONFIGS[method](), folder=f"run {options}", num_train_epochs=1, **options)
        trainer.train()
        compiled = graphs["unique_graphs"] - before
        assert 0 < compiled <= 12 if options else compiled == 0
        matrices.append(trainer.accuracy_matrix)
    np.testing.assert_allclose(*matrices, atol=0.02)


def test_workers_that_live_on_serve_no_stale_examples(make_trainer):
    """Each evaluation is of more tasks than the one before; a kept loader would serve the first one's."""
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    matrices = []
    for settings in ({}, workers):
        trainer = make_trainer(CONFIGS["coda"](), folder=f"run {settings}", num_train_epochs=1, **settings)
        trainer.train()
        matrices.append(trainer.accuracy_matrix)
    np.testing.assert_array_equal(*matrices)


def test_batches_are_augmented_on_their_device_in_training_alone(make_trainer):
    seen = []

    def flip(pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.ndim == 4 and not torch.is_grad_enabled()
        seen.append(len(pixels))
        return pixels.flip(-1)

    trainer = make_trainer(CONFIGS["coda"](), num_train_epochs=1, num_tasks=2, batch_augmentation=flip)
    seen.clear()  # what it was tried on
    trainer.train()
    assert sum(seen) == 96
    assert not any(id(task.train) in trainer.queries._queries for task in trainer.scenario)  # they differ each time
    assert "flip" in RunResults.load(trainer.folder).hyperparameters["batch_augmentation"]


def test_kornia_augments_batches(make_trainer):
    augment = K.AugmentationSequential(K.RandomHorizontalFlip(), K.RandomResizedCrop((32, 32), scale=(0.5, 1.0)))
    matrices = []
    for folder in ("one", "two"):
        trainer = make_trainer(CONFIGS["coda"](), num_tasks=2, batch_augmentation=augment, folder=folder)
        trainer.train()
        matrices.append(trainer.accuracy_matrix)
    np.testing.assert_array_equal(*matrices)  # it draws from the generators that the run's seed sets
    assert trainer.metrics["average_accuracy"] > 0.5
    assert "RandomResizedCrop" in trainer.results.hyperparameters["batch_augmentation"]


def test_prompt_usage_is_on_record(make_trainer):
    trainer = make_trainer(CONFIGS["l2p"](), num_tasks=2)
    trainer.train()
    usage = np.array(RunResults.load(trainer.folder).prompt_usage)
    # 24 test images of each task choose 2 of 6 rows each.
    assert usage.shape == (2, 6) and usage.sum(axis=1).tolist() == [48, 48]
    linear = make_trainer(CONFIGS["linear-probe"](), num_tasks=2, folder="probe", num_train_epochs=1)
    linear.train()
    assert linear.results.prompt_usage is None


def test_the_gradients_of_a_part_are_clipped_by_themselves(make_trainer):
    """The pool's to a norm of 0.001, the head's not; then the Trainer clips all of them together, here not at all."""

    class Norms(TrainerCallback):
        seen: list[dict[str, float]] = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            squares = {"pool": 0.0, "head": 0.0}
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    squares["pool" if "_pool." in name else "head"] += parameter.grad.square().sum().item()
            self.seen.append({part: square**0.5 for part, square in squares.items()})

    norms = Norms()
    settings = {"num_tasks": 2, "max_steps": 3, "max_grad_norm": 0.0}
    make_trainer(CONFIGS["coda"](), callbacks=[norms], max_grad_norms={"pool": 1e-3}, **settings).train()
    assert len(norms.seen) == 6
    assert all(each["pool"] == pytest.approx(1e-3, rel=1e-4) and each["head"] > 0.1 for each in norms.seen)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ({"prompt": 1.0}, "max_grad_norms names 'prompt', but the parts are prompts, g_prompts"),
        ({"pool": 0}, "max_grad_norms gives 'pool' the norm 0, but a norm must be a number above 0"),
        ({"pool": "1"}, "gives 'pool' the norm '1'"),
        (1.0, r"max_grad_norms is 1.0, but must be norms by part, such as \{'pool': 1.0\}"),
        ({"g_prompts": 1.0}, "max_grad_norms names g_prompts, but this adapter has no such part"),
        ({"backbone": 1.0}, "max_grad_norms names backbone, but the backbone is frozen"),
    ],
)
def test_norms_that_are_none_are_refused(norms, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(CONFIGS["coda"](), max_grad_norms=norms)
