"""A process that trains a small sequence, and may kill itself: `sequence_process.py FOLDER METHOD KILL_AT RESUME`.

METHOD is a method's name, followed by `+checkpoints` (within a task too), `+short`, `+stream`, `+augmented`, `+cached`
(queries in files), `+stopping` (early, with checkpoints), `+best` (checkpoint at the end), `+uneven` (tasks that
batches do not divide), `+accumulated` (two batches a step), `+unmasked`, `+sharded` (layers), `+er`, `+ewc`,
`+finetuning`, `+packnet`, `+hat` (on tasks that are known at test), `+balanced` (ER), `+gem`, `+agem`, `+der`,
`+icarl` (with its head); a head: `+lda`, `+ridge`, `+aligned`, `+fusion`
(with `+first`: prompts are learnt in the first task, with `+drift`: sums follow them). `+metrics`: some of the user's
own. `+temperature`: one fitted after each task. Rows of pools: `+growing`, `+adaptive` (growth), `+shared` (CODA's),
`+bykey` (DualPrompt's).

In the environment, `LARGEST_FILE` limits the size of a file in bytes, as a full disk would;
`EVALUATE_FIRST` measures once before anything is trained; `PLAIN` leaves dropout and augmentation out.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from peft import PeftModel, get_peft_model
from PIL import Image as PILImage
from transformers import EarlyStoppingCallback, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from peft_cl import (
    CodaPromptConfig,
    ContinualTrainer,
    ContinualTrainingArguments,
    DualPromptConfig,
    L2PConfig,
    LinearProbeConfig,
    RandomResizedCropFlip,
    class_incremental,
    task_free,
    task_incremental,
)
from peft_cl.metrics import confusion_matrix, top_k_accuracy
from peft_cl.strategies import EWC, ExperienceReplay, FineTuning
from peft_cl.strategies.dark_experience_replay import DarkExperienceReplay
from peft_cl.strategies.gem import AGEM, GEM
from peft_cl.strategies.hat import HAT
from peft_cl.strategies.icarl import ICaRL
from peft_cl.strategies.lora import FirstSessionLoRA, SequentialLoRA
from peft_cl.strategies.lwf import LearningWithoutForgetting
from peft_cl.strategies.osf import OSF
from peft_cl.strategies.packnet import PackNet
from peft_cl.strategies.slow_learner import SlowLearner
from peft_cl.strategies.synaptic_intelligence import SynapticIntelligence
from peft_cl.trainer import shard_backbone


CONFIGS = {
    "l2p": lambda **more: L2PConfig(pool_size=6, prompt_length=2, top_k=2, frequency_penalty=True, **more),
    "dualprompt": lambda **more: DualPromptConfig(
        prompt_length=2, g_prompt_length=2, layers=[1], g_layers=[0], pool_size=4, **more
    ),
    "coda": lambda **more: CodaPromptConfig(
        **{"components_per_task": 2, "prompt_length": 4, "layers": [0, 1], **more}
    ),
    "probe": lambda **more: LinearProbeConfig(**more),
}
HEADS = {
    "icarl": {"head": "ncm", "head_options": {"metric": "cosine", "normalize": True}, "head_features": "cls"},
    "lda": {"head": "lda", "head_features": "cls+mean", "head_layers": 2, "head_options": {"shrinkage": 0.1}},
    "ridge": {"head": "ridge", "head_options": {"projection": 40}},
    "aligned": {"head": "aligned", "head_options": {"samples": 16}},
    "fusion": {
        "head": "fusion",
        "head_features": "cls+mean+query",
        "head_options": {"query_options": {"shrinkage": 0.1}},
    },
}
#: Pools whose rows begin from images, grow, and are held apart.
ROWS = {
    "growing": {"growth": "every_task", "growth_size": 2, "init": "patches", "key_init": "queries"},
    "adaptive": {
        "growth": "adaptive",
        "growth_entropy": 0.5,
        "past_rows": "frozen",
        "adaptive_orthogonality": True,
        "diversity_coefficient": 0.1,
    },
    "shared": {"components_per_task": None, "pool_size": 4, "init": "normal", "alignment_coefficient": 0.1},
    "bykey": {"expert_choice": "key", "train_g_prompts": "first_task"},
}
STRATEGIES = {
    "er": lambda: ExperienceReplay(8),
    "ewc": lambda: EWC(10.0, 8),
    "finetuning": FineTuning,
    "lora": lambda: SequentialLoRA(2),
    "firstlora": lambda: FirstSessionLoRA(2),
    "osf": OSF,
    "online": lambda: EWC(10.0, 8, online=True, decay=0.8),
    "si": lambda: SynapticIntelligence(0.1),
    "lwf": LearningWithoutForgetting,
    "slow": SlowLearner,
    "packnet": PackNet,
    "hat": HAT,
    "balanced": lambda: ExperienceReplay(8, memory="balanced"),
    "gem": lambda: GEM(9, 0.1),
    "agem": lambda: AGEM(9),
    "der": lambda: DarkExperienceReplay(8),
    "icarl": lambda: ICaRL(12),
}
#: Kinds of the moments so far.
events: list[str] = []
kill_at, training_steps = 0, 0


def happened(kind: str) -> None:
    events.append(kind)
    if len(events) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


def counted(function, before: str, after: str | None = None):
    """The function, with a moment before and after each call."""

    def call(*args, **kwargs):
        happened(before)
        result = function(*args, **kwargs)
        happened(after or before)
        return result

    return call


def counting_tasks(train_task):
    def call(trainer, task, **columns):
        if task.index:
            happened("between tasks")
        return train_task(trainer, task, **columns)

    return call


def counting_steps(function):
    def call(*args, **kwargs):
        global training_steps
        training_steps += 1
        return function(*args, **kwargs)

    return call


def examples(per_class: int | list[int], seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), per_class)
    pixels = rng.normal(128, 30, (len(labels), 16, 16, 3)) + 20 * labels[:, None, None, None]
    return Dataset.from_dict(
        {"image": [PILImage.fromarray(each.clip(0, 255).astype("uint8")) for each in pixels], "label": labels},
        features=Features({"image": Image(), "label": ClassLabel(num_classes=6)}),
    )


def trainer_processes() -> int:
    """`torchrun` says how many there are; the total batch stays the same."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def head_settings(options: list[str]) -> dict:
    settings = {name: value for option in options for name, value in (HEADS | ROWS).get(option, {}).items()}
    if "first" in options:
        settings["train_prompts"] = "first_task"
    if "drift" in options:
        settings["drift_compensation"] = "map"
    return settings


def divided(model: PeftModel, options: list[str]) -> PeftModel:
    if "sharded" in options and trainer_processes() > 1:
        shard_backbone(model)
    return model


def main(folder: str, method: str, kill: str, resume: str) -> None:
    global kill_at
    kill_at = int(kill)
    if "LARGEST_FILE" in os.environ:
        limit = int(os.environ["LARGEST_FILE"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    name, *options = method.split("+")
    strategies = [STRATEGIES[option]() for option in options if option in STRATEGIES]
    stream = "stream" in options
    augmented = "augmented" in options or not os.environ.get("PLAIN")
    settings = head_settings(options)
    settings |= {"task_evidence": 2.0} if name == "l2p" and not strategies and not settings else {}
    known = not {"packnet", "hat"}.isdisjoint(options)
    if (strategies and not known) or "unmasked" in options:
        settings["train_mask"] = False
    if "checkpoints" in options:
        training = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "num_train_epochs": 2}
    else:
        training = {"num_train_epochs": 1}
    if "stopping" in options:  # after the first evaluation and two more: nothing is as much better as that
        training |= {"num_train_epochs": 4, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    if "short" in options:
        training["max_steps"] = 4
    if "best" in options:
        training |= {"num_train_epochs": 3, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
        training |= {"load_best_model_at_end": True, "greater_is_better": True}  # the first, that is
        training["save_total_limit"] = None
    if "accumulated" in options:
        training["gradient_accumulation_steps"] = 2
    if stream:
        training["lr_scheduler_type"] = "constant"
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays
    torch.manual_seed(0)
    dropout = 0.0 if os.environ.get("PLAIN") else 0.1
    size = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "num_labels": 6}
    width = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "hidden_dropout_prob": dropout}
    base = ViTForImageClassification(ViTConfig(**size, **width))
    # In a step: gradients are there, and the optimizer has not stepped.
    steps = counting_steps(ContinualTrainer.training_step)
    ContinualTrainer.training_step = counted(steps, "before a step", "in a step")
    ContinualTrainer.prediction_step = counted(ContinualTrainer.prediction_step, "evaluation")
    ContinualTrainer.train_task = counting_tasks(ContinualTrainer.train_task)
    os.replace, os.fsync = counted(os.replace, "replace"), counted(os.fsync, "fsync")
    model = get_peft_model(base, CONFIGS[name](**settings))
    arguments = ContinualTrainingArguments(
        folder,
        **training,
        per_device_train_batch_size=4 // trainer_processes(),
        per_device_eval_batch_size=6,
        learning_rate=0.01,
        query_cache_dir=f"{folder}-queries" if "cached" in options else None,
        fit_temperature="temperature" in options,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        pictures=False,
    )
    trainer = ContinualTrainer(
        divided(model, options),
        arguments,
        (task_free if stream else task_incremental if known else class_incremental)(
            # 11, 10 and 9 images: of the last batch of 4 the first of two processes has 2, 2 and 1, the other 1, 0, 0.
            (examples([6, 5, 5, 5, 5, 4] if "uneven" in options else 6, 0), examples(3, 1)),
            3,
            seed=None if "uneven" in options else 1,
        ),
        processing_class=ViTImageProcessorPil(size={"height": 16, "width": 16}),
        augmentation=RandomResizedCropFlip(size=16) if augmented else None,
        strategy=strategies,
        compute_metrics=[top_k_accuracy(2), confusion_matrix()] if "metrics" in options else None,
        callbacks=[EarlyStoppingCallback(2, 100.0)] if "stopping" in options else None,
        validation=examples(3, 1) if {"stopping", "best", "temperature"} & set(options) else None,
    )
    if os.environ.get("EVALUATE_FIRST"):
        print("before", trainer.evaluate(trainer.scenario[0].test)["eval_accuracy"])
    trainer.train(resume_from_checkpoint=resume == "resume")
    counts = {name: buffer for name, buffer in trainer.tuner.named_buffers() if "chosen" in name or "evidence" in name}
    torch.save(counts, f"{folder}/counts-{trainer.args.process_index}.pt")
    print("training steps", training_steps)
    print(", ".join(events))
    print("processes", trainer.accelerator.num_processes)


if __name__ == "__main__":
    main(*sys.argv[1:])
