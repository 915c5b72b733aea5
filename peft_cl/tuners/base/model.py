"""The tuner: puts the prompted encoder and the head into a base model, and starts tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ...backbones import Family, family_of
from .config import PromptPoolConfig
from .encoder import PromptedEncoder
from .head import ClassifierHead, GrowingLinear
from .layer import AdapterLayer
from .pool import Geometry, PromptPool


class PromptPoolModel(BaseTuner):
    """Base of the methods' tuners. A method sets `prefix` and `pool_class`; everything else is here.

    All state sits in the base model, in two modules: a `PromptedEncoder` in the encoder's place and a `ClassifierHead`
    in the classifier's. The base model's weights are shared with it and never changed.
    """

    prefix: str
    pool_class: type[PromptPool]
    tuner_layer_cls = AdapterLayer
    target_module_mapping: dict[str, list[str]] = {}

    # ----------------------------------------------------------------------------------------------- tasks

    def begin_task(self, class_names: Sequence[str]) -> None:
        """Start the next task of the active adapter.

        Classes that are new get a row in the head, in the order given; classes known from earlier tasks keep theirs.
        The pool does what its method does at a task's start. Parameters may be replaced by larger ones, so make a new
        optimizer afterwards (the papers start every task with a new one anyway).

        Args:
            class_names: names of the task's classes, distinct and not empty.

        Raises:
            ValueError: no or repeated names, a pool too small for another task, or an adapter loaded for inference.

        Example:
            >>> model = get_peft_model(base, CodaPromptConfig())    # doctest: +SKIP
            >>> model.begin_task(["cat", "dog"])                    # doctest: +SKIP
            >>> model.begin_task(["horse"])                         # doctest: +SKIP
            >>> model.config.id2label                               # doctest: +SKIP
            {0: 'cat', 1: 'dog', 2: 'horse'}
        """
        adapter, config = self._active_config()
        names = _checked_names(class_names)
        if config.inference_mode:
            raise ValueError(
                f"The adapter {adapter!r} was loaded for inference and cannot learn a task. Load it with "
                "PeftModel.from_pretrained(..., is_trainable=True)."
            )
        config.check_next_task(config.num_tasks)
        known = list(config.classes or ()) if config.tasks else []
        classes = known + [name for name in names if name not in known]
        config.classes = classes
        config.tasks = [*(config.tasks or ()), [classes.index(name) for name in names]]
        self.head.entries[adapter].grow(len(classes), keep=len(known))
        pool = self.pool
        if config.num_tasks > 1:
            pool.begin_task(config.num_tasks - 1)
        config.rows_in_use = pool.rows_in_use
        self._show_labels()

    @property
    def encoder(self) -> PromptedEncoder:
        """The prompted encoder inside the base model."""
        return getattr(self.model, self.family.encoder)

    @property
    def head(self) -> ClassifierHead:
        """The growing head inside the base model."""
        return getattr(self.model, self.family.head)

    @property
    def pool(self) -> PromptPool:
        """The active adapter's pool: its parameters, and what it selects."""
        return self.encoder.entries[self._active_config()[0]]

    @property
    def family(self) -> Family:
        return family_of(self.model)

    def query(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of the frozen, un-prompted model by which prompts are chosen: (B, D) for images (B, C, H, W)."""
        return self.encoder.query(pixel_values)

    def _active_config(self) -> tuple[str, PromptPoolConfig]:
        if not self.active_adapters:
            raise ValueError("No adapter is active. Activate one with set_adapter(name).")
        name = self.active_adapters[0]
        return name, self.peft_config[name]

    # ----------------------------------------------------------------------------------------------- injection

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        family = family_of(self.model)
        peft_config.check_backbone(len(family.layer_list(_unwrapped(getattr(self.model, family.encoder)))))
        peft_config.target_modules = [family.encoder, family.head]
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        family = self.family
        hidden_size = self.model.config.hidden_size
        if target_name == family.encoder:
            if not isinstance(target, PromptedEncoder):
                target = PromptedEncoder(target, self.prefix, family)
                setattr(parent, target_name, target)
            geometry = Geometry(hidden_size, len(family.layer_list(target.base_layer)))
            pool = self.pool_class(peft_config, geometry)
            peft_config.rows_in_use = pool.rows_in_use
            target.add_entry(adapter_name, pool)
            return
        if not isinstance(target, ClassifierHead):
            target = ClassifierHead(target, self.prefix, family.encoder)
            setattr(parent, target_name, target)
            self._attach(target)
        if peft_config.tasks:
            head = GrowingLinear(hidden_size, len(peft_config.classes), peft_config)
        else:
            head = GrowingLinear.copy_of(target.base_layer, hidden_size, peft_config)
        target.add_entry(adapter_name, head)

    def _attach(self, head: ClassifierHead) -> None:
        """Hook the head's two methods into the base model, once; `unload` takes them out again.

        `PeftModel` calls the base model, never this tuner's `forward`, so behaviour must sit on the base model. Bound
        methods of a module inside it survive deepcopy and pickle.
        """
        model = self.model
        head.base_config = {name: getattr(model.config, name) for name in ("id2label", "label2id")}
        head.base_accepts_loss_kwargs = getattr(model, "accepts_loss_kwargs", None)
        head.hooks = [
            model.register_forward_pre_hook(head.before_forward, with_kwargs=True),
            model.register_forward_hook(head.after_forward, with_kwargs=True, always_call=True),
        ]
        # The Trainer must divide the loss by the accumulation steps itself: the pool's terms are not per-sample sums.
        model.accepts_loss_kwargs = False

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._show_labels()

    # ----------------------------------------------------------------------------------------------- adapters

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise ValueError(
                f"set_adapter got {names}, but one prompt adapter can be active at a time: each has its own head. "
                "Name one."
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._show_labels()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._show_labels()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._show_labels()

    def _show_labels(self) -> None:
        """Keep the base config's labels in step with the head that answers, for pipelines and predictions."""
        head = getattr(self.model, self.family.head)
        if not isinstance(head, ClassifierHead):
            return
        active = head.active
        if active is None or not active.config.tasks:
            labels = head.base_config
        else:
            names = active.config.classes
            labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        for name, value in labels.items():
            setattr(self.model.config, name, dict(value))
        self.model.num_labels = len(labels["id2label"])

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        head = self.head
        for hook in head.hooks:
            hook.remove()
        head.enable_adapters(False)
        self._show_labels()
        if head.base_accepts_loss_kwargs is None:
            del self.model.accepts_loss_kwargs
        else:
            self.model.accepts_loss_kwargs = head.base_accepts_loss_kwargs
        setattr(self.model, self.family.encoder, self.encoder.base_layer)
        setattr(self.model, self.family.head, head.base_layer)
        del self.model.peft_config
        return self.model

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            "Prompts are extra tokens of the attention, not a change of its weights: they cannot be merged into the "
            "base model. Keep the adapter beside it, or call `unload()` to get the base model back without it."
        )

    # ----------------------------------------------------------------------------------------------- state dict

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Our entries may hold modules (the query projection), so the name is taken out where we put it.

        - before: `base_model.model.vit.l2p_pool.default.query_projection.weight`
        -  after: `base_model.model.vit.l2p_pool.query_projection.weight`
        """
        for kind in (PromptedEncoder.kind, ClassifierHead.kind):
            key = key.replace(f".{cls.prefix}{kind}.{adapter_name}.", f".{cls.prefix}{kind}.")
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT loads with `strict=False`; here a file that does not fit is refused before anything is loaded."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        marks = [f".{cls.prefix}{kind}.{adapter_name}." for kind in (PromptedEncoder.kind, ClassifierHead.kind)]
        expected = {key: value for key, value in model.state_dict().items() if any(mark in key for mark in marks)}
        missing = sorted(expected.keys() - remapped.keys())
        if missing:
            raise ValueError(
                f"The {config.method} adapter file lacks {missing}: it is incomplete, or of another method. Found "
                f"{sorted(state_dict)}. Save the adapter again with save_pretrained."
            )
        misfits = [
            f"{cls._remove_adapter_name_from_key(key, adapter_name)}: file {tuple(remapped[key].shape)}, model "
            f"{tuple(value.shape)}"
            for key, value in expected.items()
            if remapped[key].shape != value.shape
        ]
        if misfits:
            raise ValueError(
                f"The {config.method} adapter does not fit this model: {'; '.join(misfits)}. A different last size "
                "means a base model of another width: load the adapter's own base model. Different rows or classes "
                "mean another number of tasks: load it with PeftModel.from_pretrained, which builds the adapter as it "
                "was saved, or under a new adapter name."
            )
        return remapped


def _unwrapped(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, AdapterLayer) else module


def _checked_names(class_names: Sequence[str]) -> list[str]:
    if isinstance(class_names, str):
        raise ValueError(f"class_names is the string {class_names!r}, but must be a list of names, one per class.")
    names = list(class_names)
    if not names:
        raise ValueError("class_names is empty, but a task has at least one class.")
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"class_names holds {wrong[:5]}, but names are strings. Convert them with str().")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"class_names repeats {repeated}: each class of a task is named once.")
    return names
