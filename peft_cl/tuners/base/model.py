"""The tuner: puts the prompted encoder and the head into a base model, and starts tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ...backbones import Family, Geometry, family_of
from ...heads import Head, Sizes, TaskEvidence, make_head
from .base_weights import note_base, warn_of_another_base
from .classifier import ClassifierHead
from .config import PromptPoolConfig
from .encoder import PromptedEncoder
from .facts import check_rows_in_use
from .head_tools import HeadTools
from .layer import AdapterLayer, check_name
from .mixing import MixedBatches
from .pool import PromptPool
from .pool_tools import PoolTools
from .saved import check_sizes, check_tensors, file_beside, read_header
from .storage import stored


#: In the names of weights that are not saved with the adapter.
TRAINING_HEAD = ".training_head."


class PromptPoolModel(PoolTools, HeadTools, MixedBatches, BaseTuner):
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
        adapter, config = self._learning_config()
        self.need_sums()
        head, pool = self.head.entries[adapter], self.pool
        known = config.add_task(class_names)
        config.forget_temperature()
        self._grow_head(head, known)
        if pool.is_frozen:
            pool.eval().requires_grad_(False)
        elif config.num_tasks > 1:
            pool.begin_task(config.num_tasks - 1)
        else:
            pool.take_over()
        config.rows_in_use = pool.rows_in_use
        self.head.show_labels()

    def begin_stream(self, class_names: Sequence[str]) -> None:
        """Make the active adapter ready to learn from a stream without task boundaries, in place of `begin_task`.

        The head has a row for each class from the start. L2P and DualPrompt choose among all rows of their pools by
        the keys, in training too; CODA-Prompt trains its `components_per_task` components throughout.

        Args:
            class_names: names of all classes, distinct and not empty.

        Raises:
            ValueError: as `begin_task`; an adapter with tasks; settings that need tasks (`task_evidence`, L2P's
                `use_prompt_mask`), or a DualPrompt without `pool_size`.
        """
        adapter, config = self._learning_config()
        config.add_stream(class_names)
        config.forget_temperature()
        self._grow_head(self.head.entries[adapter], 0)
        self.pool.begin_stream()
        config.rows_in_use = self.pool.rows_in_use
        self.head.show_labels()

    def merge_counts(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """At the end of a task, join what each process counted during it.

        Args:
            total: sums a tensor over the processes.
        """
        if not self.pool.is_frozen:  # it counts no more: what it has is joined
            self.pool.merge_counts(total)
        head = self.head.active
        head.merge_counts(total)
        if head.evidence is not None:
            head.evidence.merge_counts(total)

    def _grow_head(self, head: Head, known: int) -> None:
        """Give the head a row for each class, of which the first `known` are there."""
        config = self._active_config()[1]
        head.check_classes(len(config.classes))
        head.grow(len(config.classes), keep=known)
        if head.evidence is not None:
            head.evidence.grow()
        head.describe(config.classes, self.model)
        self._set_training_head(head, config, known, backbone_learns=self.encoder.learns)
        self.head.forget_rows()

    @property
    def encoder(self) -> PromptedEncoder:
        """The prompted encoder inside the base model (before the first adapter is in: the base model's own)."""
        return getattr(self.model, self.family.encoder)

    @property
    def head(self) -> ClassifierHead:
        """The growing head inside the base model (before the first adapter is in: the base model's own)."""
        return self.family.head_of(self.model)

    @property
    def pool(self) -> PromptPool:
        """The active adapter's pool: its parameters, and what it selects."""
        return self.encoder.entries[self._active_config()[0]]

    def lasting_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters that are the same from task to task, by name; a head's rows are appended to.

        Those that a pool makes anew for each task (DualPrompt's row, CODA-Prompt's components) are not among them.
        """
        renewed = {id(value) for value in self.pool.renewed.values()}
        trained = ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)
        return {name: value for name, value in trained if id(value) not in renewed}

    @cached_property
    def family(self) -> Family:
        """The base model's."""
        parts = () if hasattr(self.model, "get_base_model") else self.model.modules()
        inside = next((each.family for each in parts if isinstance(each, PromptedEncoder)), None)
        return inside or family_of(self.model, prompts=not self.pool_class.query_is_feature)

    def query(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of the frozen, un-prompted model by which prompts are chosen: (B, D) for images (B, C, H, W); more
        numbers behind them if the head reads more of the frozen model."""
        return self.encoder.query(pixel_values)

    def _learning_config(self) -> tuple[str, PromptPoolConfig]:
        adapter, config = self._active_config()
        if config.inference_mode:
            raise ValueError(
                f"The adapter {adapter!r} was loaded for inference and cannot learn a task. Load it with "
                "PeftModel.from_pretrained(..., is_trainable=True)."
            )
        return adapter, config

    def _active_config(self) -> tuple[str, PromptPoolConfig]:
        if not self.active_adapters:
            raise ValueError("No adapter is active. Activate one with set_adapter(name).")
        name = self.active_adapters[0]
        return name, self.peft_config[name]

    # ----------------------------------------------------------------------------------------------- injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_name(adapter_name)
        # The adapter keeps its own record of classes and tasks: a user may give one config to several models.
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: PromptPoolConfig, model_config: dict) -> PromptPoolConfig:
        family = self.family
        places = family.places()
        if peft_config.target_modules not in (None, places):
            raise ValueError(
                f"target_modules is {peft_config.target_modules!r}, but in a {type(self.model).__name__} prompts and "
                f"head belong in {places}. Leave target_modules at None; load a saved adapter into a base model of "
                "the family it was trained on."
            )
        for layer in (self.encoder, self.head):
            if isinstance(layer, AdapterLayer) and not layer.adapter_layer_names[0].startswith(self.prefix):
                raise ValueError(
                    f"This model carries an adapter of another method ({layer.adapter_layer_names[0]}), and one model "
                    f"cannot carry {peft_config.method} beside it. Call unload() on it first, or load the base model "
                    "anew."
                )
        peft_config.target_modules = places
        peft_config.settle(self._geometry(), self.model)
        self._check_sizes(peft_config)
        return peft_config

    def _check_sizes(self, config: PromptPoolConfig) -> None:
        """Compare what a saved adapter's configuration asks for with the header of its file, before it is made."""
        file = file_beside(config.source, SAFETENSORS_WEIGHTS_NAME) if config.is_as_saved else None
        if file is None:
            return
        try:
            with torch.device("meta"):
                pool = self.pool_class(config, config.geometry)
                head = self._bare_head(config, pool)
        except (RuntimeError, OverflowError) as error:
            if "meta" in str(error):  # a pool of the user's own that looks at its numbers cannot be made without
                return
            raise ValueError(
                f"The settings of this {config.method} adapter ask for sizes that no file holds ({error}). The "
                "configuration is damaged: restore it, or save the adapter anew."
            ) from error
        parts = {f"{self.family.encoder}.{self.prefix}pool": pool, f"{self.family.head}.{self.prefix}head": head}
        expected = {
            f"base_model.model.{place}.{name}": value
            for place, part in parts.items()
            for name, value in part.state_dict().items()
        }
        check_sizes(config.method, expected, read_header(file))

    def _geometry(self) -> Geometry:
        encoder = self.encoder
        return self.family.geometry(encoder.base_layer if isinstance(encoder, PromptedEncoder) else encoder)

    def _width_of_paper(self, pool: PromptPool) -> int:
        """How many numbers the head of the method's paper reads here."""
        geometry = self._geometry()
        return geometry.reads if pool.head_type == "cls" else geometry.hidden_size

    def _create_and_replace(
        self,
        peft_config: PromptPoolConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if target_name == self.family.encoder:
            self._add_pool(peft_config, adapter_name)
        if target_name == self.family.places()[-1]:
            self._add_head(peft_config, adapter_name)

    def _add_pool(self, config: PromptPoolConfig, adapter_name: str) -> None:
        pool = self.pool_class(config, config.geometry)  # first: settings that it refuses leave the model untouched
        check_rows_in_use(config, pool.rows_in_use)
        config.rows_in_use = pool.rows_in_use
        if not isinstance(self.encoder, PromptedEncoder):
            setattr(self.model, self.family.encoder, PromptedEncoder(self.encoder, self.prefix, self.family))
        self.encoder.add_entry(adapter_name, pool)

    def _add_head(self, config: PromptPoolConfig, adapter_name: str) -> None:
        if not isinstance(self.head, ClassifierHead):
            head = ClassifierHead(self.head, self.prefix, self.family.encoder)
            head.fallback_device = self.model.device
            self.family.put_head(self.model, head)
            head.attach(self.model)
        # Until its first task an adapter has the base model's classes and starts from its classifier. A saved adapter
        # brings its classes, whatever classifier it meets.
        from_base = config.classes is None
        if from_base:
            config.classes = list(self.head.base_names)
        self.head.configs[adapter_name] = config
        self.head.add_entry(adapter_name, self._make_head(config, adapter_name, from_base))

    def _bare_head(self, config: PromptPoolConfig, pool: PromptPool) -> Head:
        """A head of the configuration's sizes, as new."""
        geometry = self._geometry()
        size = geometry.hidden_size
        width = config.features.width(size) if config.features else self._width_of_paper(pool)
        sizes = Sizes(width, (config.features.of_query.width(size) if config.features else size))
        # Only a head like the base model's own can take over its rows; others begin with the first task.
        is_alike = config.head == "linear" and width == geometry.reads and (geometry.reads_cls or not config.features)
        classes = len(config.classes or ()) if config.tasks or is_alike else 0
        head = make_head(config.head, sizes, classes, config.head_options, config.head_init)
        if config.task_evidence:
            head.evidence = TaskEvidence(size, config)
        return head

    def _make_head(self, config: PromptPoolConfig, adapter_name: str, from_base: bool) -> Head:
        head = self._bare_head(config, self.encoder.entries[adapter_name])
        if from_base and head.classes:
            linear = [module for module in self.head.base_layer.modules() if isinstance(module, nn.Linear)]
            head.copy_from(linear[-1])
        if config.tasks:
            head.describe(config.classes, self.model, known=True)
            if head.observes:
                head.sums_unknown()
            # Whatever its weights say now: PEFT freezes the backbone after this.
            self._set_training_head(head, config, len(config.classes), backbone_learns=False)
        return head

    @property
    def head_device(self) -> torch.device:
        """Where the adapter's part of the head is."""
        like = next(self.head.base_layer.parameters(), None)
        return self.head.fallback_device if like is None else like.device

    # ----------------------------------------------------------------------------------------------- adapters

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        self.head.detach()
        classifier = self.head.base_layer
        setattr(self.model, self.family.encoder, self.encoder.base_layer)
        self.family.give_head_back(self.model, classifier)
        del self.model.peft_config
        return self.model

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            "Prompts are extra tokens of the attention, not a change of its weights: they cannot be merged into the "
            "base model. Keep the adapter beside it, or call `unload()` to get the base model back without it."
        )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "Prompt adapters cannot be added up: each has a head, classes and keys of its own. Keep them side by "
            "side and choose by set_adapter(name), or make one of them that knows all classes by join_adapters."
        )

    # ----------------------------------------------------------------------------------------------- state dict

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """What predicting needs: not the head that training alone goes through. It is asked for to be saved, so here
        the adapter notes the weights of the backbone that it fits."""
        note_base(model, config)
        found = super()._get_adapter_state_dict(model, config, *args, **kwargs)
        # Not what LoRA in the backbone has.
        own = {key: value for key, value in found.items() if f".{cls.prefix}" in key and TRAINING_HEAD not in key}
        return {key: stored(key.rpartition(".")[2], value, config) for key, value in own.items()}

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
        # Keys that name this adapter are those that lose its name.
        expected = {
            key: value
            for key, value in model.state_dict().items()
            if cls._remove_adapter_name_from_key(key, adapter_name) != key and TRAINING_HEAD not in key
        }
        check_tensors(
            config.method,
            {cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in expected.items()},
            {cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in remapped.items()},
        )
        warn_of_another_base(model, config, adapter_name)
        # Without a second copy in memory (low_cpu_mem_usage) they take the places of the model's own as they are.
        dtypes = {cls._remove_adapter_name_from_key(key, adapter_name): value.dtype for key, value in expected.items()}
        return {
            key: value.to(dtypes[cls._remove_adapter_name_from_key(key, adapter_name)])
            for key, value in remapped.items()
        }
