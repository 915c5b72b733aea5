"""LoRA in the frozen backbone, by PEFT: learnt on with each task, or in the first one alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ..backbones import Family
from ..scenarios import Scenario, Task
from ..text import brief
from ..trainer import ContinualTrainer, Strategy, register_strategy
from ..tuners.base.merged import layers_of_others, merged, parameters_of_others
from .fine_tuning import BACKBONE_FOLDER, check_probe, check_whole, save_backbone
from .settings import check_count, check_number


#: Folder in the adapter's for LoRA alone, as PEFT saves it.
LORA_FOLDER = "lora"
#: In the place of a list of layers.
ALL_LINEAR = "all-linear"
#: What the projections of queries and values are called, alone or in one with those of keys.
QUERY_AND_VALUE = ("q_proj", "v_proj", "query", "value", "qkv")


def check_targets(target_modules: Sequence[str] | str | None) -> list[str] | str | None:
    """The names of layers that a user gave, as a list; `"all-linear"` and None as they are.

    Raises:
        ValueError: they are none of these.
    """
    if target_modules is None or target_modules == ALL_LINEAR:
        return target_modules
    names = list(target_modules) if isinstance(target_modules, (list, tuple, set)) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"target_modules is {target_modules!r}, but must be a list of names of layers, or {ALL_LINEAR!r}. Give "
            "one such as ['q_proj', 'v_proj']."
        )
    return sorted(names)


def linear_layers(backbone: nn.Module, family: Family) -> list[str]:
    """Names of the linear layers in the backbone's transformer layers; of all if it has none of these."""
    linear = {name: part for name, part in backbone.named_modules() if isinstance(part, nn.Linear)}
    inside = {id(part) for layer in family.layer_list(backbone) for part in layer.modules()}
    return [name for name, part in linear.items() if id(part) in inside] or list(linear)


def targets_in(target_modules: list[str] | str | None, model: PeftModel) -> list[str]:
    """Full names, in the backbone, of the layers that are meant.

    Args:
        target_modules: names, or ends of names; `"all-linear"`; None: the projections of queries and values.

    Raises:
        ValueError: the backbone has no such layer.
    """
    tuner = model.base_model
    backbone = merged(tuner.encoder.base_layer)
    linear, kind = linear_layers(backbone, tuner.family), type(tuner.encoder.base_layer).__name__
    if target_modules == ALL_LINEAR:
        found = linear
    elif target_modules is None:
        found = [name for name in linear if name.rpartition(".")[2] in QUERY_AND_VALUE]
    else:
        names = [name for name, _ in backbone.named_modules()]
        matches = {end: [name for name in names if f".{name}".endswith(f".{end}")] for end in target_modules}
        unknown = [end for end, matched in matches.items() if not matched]
        if unknown:
            raise ValueError(
                f"target_modules names {brief(unknown)}, but {kind} has no such layers. Name others; its last "
                f"linear ones are {', '.join(linear[-6:])}."
            )
        found = list(dict.fromkeys(name for matched in matches.values() for name in matched))
    if not found:
        what = "linear layers" if target_modules else "projections of queries and values"
        raise ValueError(
            f"target_modules is {target_modules!r}, but {kind} has no {what}. Name layers of it, as "
            "print(model) shows them"
            + (f", or give target_modules={ALL_LINEAR!r}." if linear else ": convolutions, for instance.")
        )
    return found


class _LoRA(Strategy):
    """What both have in common: low-rank updates W + lora_alpha / r * B A (Hu et al. 2021, arXiv 2106.09685, eq. 3).

    The layers are PEFT's, inside the frozen backbone and under the name of the adapter, so that `disable_adapter()`
    switches both off: what is left is the base model, to the bit. They are float32, whatever the backbone is.
    """

    has_task_evidence = False
    trains_backbone = True

    def __init__(
        self,
        r: int = 8,
        lora_alpha: float = 16,
        target_modules: Sequence[str] | str | None = None,
        learning_rate: float | None = None,
    ):
        self.r = check_count("r", r, 8)
        self.lora_alpha = check_number("lora_alpha", lora_alpha, 16, above=0)
        self.learning_rate = check_number("learning_rate", learning_rate, 0.0005, above=0, or_none=True)
        self.target_modules = check_targets(target_modules)

    def settings(self) -> dict[str, Any]:
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "target_modules": self.target_modules,
            "learning_rate": self.learning_rate,
        }

    def learning_rates(self, args: Any) -> dict[str, float]:
        return {} if self.learning_rate is None else {"backbone": self.learning_rate}

    def check(self, model: PeftModel, scenario: Scenario) -> None:
        check_probe(self.name, model)
        backbone = model.base_model.encoder.base_layer
        targets, layers = targets_in(self.target_modules, model), layers_of_others(backbone)
        if not layers:
            check_whole(self.name, backbone.parameters(), "saves them with LoRA merged into them")
            return
        config = backbone.peft_config.get(model.active_adapter)
        own = isinstance(config, LoraConfig) and (config.r, config.lora_alpha) == (self.r, self.lora_alpha)
        if not own or set(layers) != set(targets):
            raise ValueError(
                f"The backbone has {len(layers)} layers of {type(next(iter(layers.values()))).__name__} in it, which "
                f"are not those of {self.name} with r={self.r}, lora_alpha={self.lora_alpha} and target_modules="
                f"{self.target_modules!r}. Load it anew, or give the settings of the LoRA that is there."
            )

    def prepare(self, model: PeftModel) -> None:
        """Put new layers into the backbone; a model that an earlier trainer has trained goes on with those it has."""
        backbone, config = model.base_model.encoder.base_layer, model.peft_config[model.active_adapter]
        if not layers_of_others(backbone):
            lora = LoraConfig(
                r=self.r,
                lora_alpha=self.lora_alpha,
                target_modules=targets_in(self.target_modules, model),
                base_model_name_or_path=config.base_model_name_or_path,
            )
            inject_adapter_in_model(lora, backbone, model.active_adapter)
            for parameter in parameters_of_others(backbone):  # PEFT does so for models that it wraps
                parameter.data = parameter.data.float()

    def save(self, trainer: ContinualTrainer, folder: Path) -> None:
        """Save the backbone with LoRA merged into it, as `FineTuning` does, and LoRA alone as an adapter of PEFT."""
        save_backbone(trainer, folder)
        model = trainer.accelerator.unwrap_model(trainer.model)
        tuner, adapter = model.base_model, model.active_adapter
        backbone = tuner.encoder.base_layer
        config = copy.copy(backbone.peft_config[adapter])
        # PEFT shortens the names where they are many; in the whole model the short ones could mean more.
        config.target_modules, config.inference_mode = sorted(layers_of_others(backbone)), True
        config.save_pretrained(str(folder / LORA_FOLDER))
        weights = {
            f"base_model.model.{tuner.family.encoder}.{name}": value.contiguous()
            for name, value in get_peft_model_state_dict(backbone, adapter_name=adapter).items()
        }
        save_file(weights, folder / LORA_FOLDER / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def saved_bytes(self, trainer: ContinualTrainer, adapter_bytes: int) -> int:
        """LoRA and the head: the base model is as it was, and the merged copy can be made again."""
        parts = parameters_of_others(trainer.tuner.encoder.base_layer)
        return adapter_bytes + sum(value.numel() * value.element_size() for value in parts)


@register_strategy("lora")
class SequentialLoRA(_LoRA):
    """LoRA and the head are trained on each task in turn: the lower bound of continual learning by LoRA.

    LoRA is that of Hu et al. 2021 (arXiv 2106.09685), in the layers of PEFT. One pair of matrices is trained on from
    task to task, and nothing holds the earlier ones. Use it on a linear probe with the plain cross-entropy over all
    classes seen: `LinearProbeConfig(train_mask=False)`. A head that is computed from features is refused: features
    change with each task.

    Beside the adapter lie `backbone/`, the base model with LoRA merged, which all loaders take, and `lora/`, which
    `PeftModel.from_pretrained(base, "out/lora")` loads into the base model. In 16 bits the merged weights are rounded.
    A saved adapter that learns on does so from the merged backbone, with a new LoRA, and `lora/` then is that alone.

    Args:
        r: the rank; at least 1.
        lora_alpha: LoRA's part in a layer's output is multiplied by lora_alpha / r; above 0.
        target_modules: names of layers, or ends of names; `"all-linear"`: all in the transformer layers; None: the
            projections of queries and values, as in LoRA's paper (in timm's models in one with that of keys).
        learning_rate: LoRA's own, above 0; None: that of the arguments.

    Raises:
        ValueError: another value; later, a backbone without such layers, a quantised or divided one, or an adapter
            with prompts.

    Example:
        >>> model = get_peft_model(base, LinearProbeConfig(train_mask=False))         # doctest: +SKIP
        >>> trainer = ContinualTrainer(model, ..., strategy=SequentialLoRA(r=8))      # doctest: +SKIP
    """

    name = "Sequential LoRA"
    why_trained_head = "changes all features with each task"
    limits = (
        f"The backbone was trained by LoRA: load the base model from the folder `{BACKBONE_FOLDER}` beside this file, "
        "not the original one (`AutoModelForImageClassification`, `pipeline` and `AutoPeftModel` find it). The folder "
        f"`{LORA_FOLDER}` holds LoRA alone, for the original base model.",
    )

    def title(self, adapter: str) -> str:
        return self.name


@register_strategy("first-session-lora")
class FirstSessionLoRA(_LoRA):
    """LoRA learns in the first task and is frozen then, as first-session adaptation (Panos et al., arXiv 2303.13199).

    From the second task on the features stay, so that any head may be computed from them, exactly, and is computed
    from features that are kept; that is how RanPAC (McDonnell et al. 2023, arXiv 2307.02251) and ADAM (Zhou et al.
    2023, arXiv 2303.07338) use it. In the first task a linear head is trained along with LoRA, which a computed head
    replaces at its end. Use it on a linear probe: `LinearProbeConfig(head="lda")`.

    What is saved, and the settings, are those of `SequentialLoRA`. A saved adapter that learns on needs no strategy:
    the merged backbone is its base model.

    Args:
        r: the rank; at least 1.
        lora_alpha: LoRA's part in a layer's output is multiplied by lora_alpha / r; above 0.
        target_modules: as `SequentialLoRA` has it.
        learning_rate: LoRA's own, above 0; None: that of the arguments.

    Raises:
        ValueError: as `SequentialLoRA`; later, an adapter that was loaded with tasks.

    Example:
        >>> model = get_peft_model(base, LinearProbeConfig(head="lda"))               # doctest: +SKIP
        >>> trainer = ContinualTrainer(model, ..., strategy=FirstSessionLoRA(r=8))    # doctest: +SKIP
    """

    name = "First-session LoRA"
    learns_streams = False
    limits = (
        *SequentialLoRA.limits,
        "LoRA was learnt from the first task alone.",
    )

    #: Whether the first task is learnt, and the backbone that the layers are in, once there is one.
    _learnt = False
    _backbone: nn.Module | None = None

    def title(self, adapter: str) -> str:
        head = adapter.partition(" + ")[2]
        return f"{self.name} + {head}" if head else self.name

    def check(self, model: PeftModel, scenario: Scenario) -> None:
        config = model.peft_config[model.active_adapter]
        if config.tasks and not layers_of_others(model.base_model.encoder.base_layer):
            raise ValueError(
                f"The adapter has learnt {config.num_tasks} tasks, but {self.name} learns in the first one alone. "
                "Leave the strategy out: the features stay as they are."
            )
        if config.drift_compensation:
            raise ValueError(
                f"drift_compensation is {config.drift_compensation!r}, but under {self.name} no features move that "
                "sums were made of. Leave it at None."
            )
        super().check(model, scenario)

    def prepare(self, model: PeftModel) -> None:
        super().prepare(model)
        config = model.peft_config[model.active_adapter]
        # Heads ask for it: a linear one is trained in the first task alone.
        config.train_prompts = "first_task"
        self._learnt, self._backbone = bool(config.tasks), model.base_model.encoder.base_layer
        self._freeze_if_learnt()

    def begin_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self._freeze_if_learnt()  # PEFT unfreezes layers that were switched off for a while

    def end_task(self, trainer: ContinualTrainer, task: Task) -> None:
        self._learnt = True
        self._freeze_if_learnt()

    def _freeze_if_learnt(self) -> None:
        for parameter in parameters_of_others(self._backbone):
            parameter.requires_grad_(not self._learnt)

    def save(self, trainer: ContinualTrainer, folder: Path) -> None:
        super().save(trainer, folder)
        self._freeze_if_learnt()

    def state_dict(self) -> dict[str, Any]:
        return {"learnt": self._learnt}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._learnt = state["learnt"]
        self._freeze_if_learnt()
