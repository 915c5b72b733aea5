"""Naive fine-tuning: the whole backbone follows each task, and nothing holds the earlier ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..assets.resolving import BESIDE
from ..trainer import ContinualTrainer, Strategy, register_strategy
from ..tuners.base.merged import merged


#: Folder in the adapter's for the backbone that was trained along with it.
BACKBONE_FOLDER = BESIDE


def put_beside(path: Path, folder: Path) -> None:
    """The file in `folder` as well, on the same bytes where the file system can: transformers takes a base model from
    the adapter's own folder, and else by a name, which would hold on one machine."""
    try:
        os.link(path, folder / path.name)
    except OSError:
        shutil.copy2(path, folder / path.name)


def check_probe(name: str, model: PeftModel) -> None:
    """Refuse an adapter with prompts: they are chosen by features that must stay.

    Raises:
        ValueError: it is no linear probe.
    """
    if not model.base_model.pool.query_is_feature:
        method = model.peft_config[model.active_adapter].method
        raise ValueError(
            f"The adapter is {method}, whose prompts are learnt for a frozen backbone, but {name} changes the "
            "backbone's features. Use it on a linear probe: LinearProbeConfig(train_mask=False)."
        )


def check_whole(name: str, parameters: Iterable[nn.Parameter], does: str = "trains them") -> None:
    """Refuse weights that cannot be trained, merged with others or saved as they are.

    Raises:
        ValueError: some are quantised, or divided over processes.
    """
    for parameter in parameters:
        if is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point():
            raise ValueError(
                f"The backbone's weights are quantised, or divided over processes ({type(parameter).__name__}, "
                f"{parameter.dtype}), but {name} {does}. Load it without quantisation, and leave shard_backbone() out."
            )


def unfreeze(name: str, parameters: Iterable[nn.Parameter]) -> None:
    """Set weights of the backbone to be trained.

    Raises:
        ValueError: they are quantised, divided over processes, or in 16 bits.
    """
    parameters = list(parameters)
    check_whole(name, parameters)
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"The backbone is {parameter.dtype}, in which small steps of its weights are lost, but {name} trains "
                "them. Load it with dtype='float32', and set bf16=True in the arguments to compute faster."
            )
        parameter.requires_grad_(True)


def save_backbone(trainer: ContinualTrainer, folder: Path) -> None:
    """Save the backbone as it is now, with LoRA in it merged, and have the adapter name it as its base model."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    base, tuner = model.get_base_model(), model.base_model
    place = f"{tuner.family.encoder}."
    weights = {
        name.replace(".base_layer.", "."): value
        for name, value in base.state_dict().items()
        if not name.startswith(place) and f".{tuner.prefix}" not in name
    }
    weights |= {f"{place}{name}": value for name, value in merged(tuner.encoder.base_layer).state_dict().items()}
    with model.disable_adapter():  # the base model's own labels go into its config
        base.save_pretrained(folder / BACKBONE_FOLDER, state_dict=weights)
    adapter = model.active_adapter
    config = model.peft_config[adapter]
    config.base_model_name_or_path = str(trainer.folder / BACKBONE_FOLDER)
    # PEFT saves adapters of other names into folders of their own.
    own = folder if adapter == "default" else folder / adapter
    facts = json.loads((own / CONFIG_NAME).read_text(encoding="utf-8"))
    facts = {**facts, "base_model_name_or_path": BACKBONE_FOLDER}  # in memory a path, in the file no machine's
    (own / CONFIG_NAME).write_text(json.dumps(facts, indent=2, sort_keys=True), encoding="utf-8")
    for path in (folder / BACKBONE_FOLDER).iterdir():
        put_beside(path, own)


@register_strategy("fine-tuning")
class FineTuning(Strategy):
    """Train all weights, backbone and head, on each task in turn: the lower bound of continual learning.

    Use it on a linear probe with the plain cross-entropy over all classes seen:
    `get_peft_model(model, LinearProbeConfig(train_mask=False))`.
    """

    name = "Fine-tuning"
    has_task_evidence = False
    trains_backbone = True
    why_trained_head = "changes all features with each task"
    limits = (
        f"All weights of the backbone were trained: load the base model from the folder `{BACKBONE_FOLDER}` beside "
        "this file, not the original one (`AutoModelForImageClassification`, `pipeline` and `AutoPeftModel` find it).",
    )

    def title(self, adapter: str) -> str:
        return self.name

    def prepare(self, model: PeftModel) -> None:
        unfreeze(self.name, model.base_model.encoder.base_layer.parameters())

    def save(self, trainer: ContinualTrainer, folder: Path) -> None:
        save_backbone(trainer, folder)

    def saved_bytes(self, trainer: ContinualTrainer, adapter_bytes: int) -> int:
        """The backbone has changed, so it must be kept with the head."""
        encoder = trainer.model.base_model.encoder.base_layer
        return adapter_bytes + sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters())
