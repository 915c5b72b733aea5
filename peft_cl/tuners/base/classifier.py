"""The module in the classifier's place: labels in, logits masked, and the loss, which only it can define."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ...backbones.modes import without_autocast
from ...heads import Head
from .call import Call
from .config import PromptPoolConfig
from .encoder import PromptedEncoder
from .layer import AdapterLayer
from .mixing import MixedBatch


class ClassifierHead(AdapterLayer):
    """Stands in the place of the base model's classifier: gives features to the active adapter's head, and turns its
    logits and the labels into the training loss.

    Two hooks on the classification model, `before_forward` and `after_forward`, carry `labels`, `task_ids` and `query`
    around the base model's own forward: its loss would use the base config's number of labels, weigh the pool's terms
    by accelerate's accumulation steps, and cannot mask classes. They are hooks because `PeftModel` calls the base
    model, never a tuner's `forward`; so pipelines and `get_base_model()` give the same answers. With adapters disabled
    the base model is left alone, its own loss included.

    Args:
        base_layer: the base model's classifier.
        prefix: the method's prefix.
        encoder_name: the base model's attribute that holds the `PromptedEncoder`.

    Attributes:
        configs: the adapters' configurations, by name.
        last_losses: the terms of the last loss, by name, detached and weighted.
        last_selected: the pool rows that the last call chose, as `Prompts.selected`.
        last_weights: how much of each row the images of the last call got, as `Prompts.weights`.
        mixed: the batch of several adapters that the next call is of; None: the active adapter answers.
        own_loss: what stands in the place of the cross-entropy, `(logits, labels, class_names) -> loss`, as
            `ContinualTrainer` describes it; None: nothing does.
    """

    kind = "head"

    def __init__(self, base_layer: nn.Module, prefix: str, encoder_name: str):
        super().__init__(base_layer, prefix)
        self.encoder_name = encoder_name
        self.last_losses: dict[str, torch.Tensor] = {}
        self.last_selected: torch.Tensor | None = None
        self.last_weights: torch.Tensor | None = None
        self.configs: dict[str, PromptPoolConfig] = {}
        self.mixed: MixedBatch | None = None
        self._rows: dict[str, torch.Tensor] = {}
        #: Takes a training call's logits with their graph, before any is masked, while it is a list.
        self._logits: list[torch.Tensor] | None = None
        self.own_loss: Callable[[torch.Tensor, torch.Tensor, Sequence[str]], torch.Tensor] | None = None
        #: Takes the features that a head reads, while it is a list.
        self.captured: list[torch.Tensor] | None = None
        #: The classification model, in a tuple: torch must not take the whole for a part of its part.
        self.owner: tuple[PreTrainedModel, ...] = ()

    # ----------------------------------------------------------------------------------------------- the base model

    def attach(self, model: PreTrainedModel) -> None:
        """Hook into the classification model that this head is part of; `detach` undoes all of it.

        Bound methods of a module inside the model survive deepcopy and pickle.
        """
        self.owner = (model,)
        self.base_names = _class_names(model, self.base_layer)
        self.base_labels = {name: dict(getattr(model.config, name)) for name in ("id2label", "label2id")}
        self.base_problem_type = getattr(model.config, "problem_type", None)
        self.base_accepts_loss_kwargs = getattr(model, "accepts_loss_kwargs", None)
        self.hooks = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
        ]
        # The Trainer must divide the loss by the accumulation steps itself: the pool's terms are not per-sample sums.
        model.accepts_loss_kwargs = False

    def detach(self) -> None:
        (model,) = self.owner
        for hook in self.hooks:
            hook.remove()
        self._show(self.base_labels, self.base_problem_type)
        if self.base_accepts_loss_kwargs is None:
            del model.accepts_loss_kwargs
        else:
            model.accepts_loss_kwargs = self.base_accepts_loss_kwargs
        self.owner = ()

    def show_labels(self) -> None:
        """Keep the base config's labels in step with the head that answers, for pipelines and predictions."""
        if self.active is None:
            self._show(self.base_labels, self.base_problem_type)
        else:
            names = self.config.classes
            # Of several classes one is the answer, whatever the base model was for: pipelines choose softmax by it.
            problem_type = self.base_problem_type and "single_label_classification"
            labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
            self._show(labels, problem_type)

    def _show(self, labels: dict[str, dict], problem_type: str | None) -> None:
        (model,) = self.owner
        model.config.problem_type = problem_type
        for name, value in labels.items():
            setattr(model.config, name, dict(value))
        model.num_labels = len(labels["id2label"])

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.show_labels()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.show_labels()

    # ----------------------------------------------------------------------------------------------- forward

    @property
    def config(self) -> PromptPoolConfig:
        """The active adapter's configuration."""
        return self.configs[next(name for name in self.active_adapters if name in self.entries)]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F) -> logits (B, classes learnt)."""
        head: Head | None = self.active
        if head is None or not head.classes:  # before its first task a head leaves the answer to the base model
            return self.base_layer(features)
        (model,) = self.owner
        call = getattr(model, self.encoder_name).call or Call()
        if call.read is not None:
            features = call.read
        if self.captured is not None:
            self.captured[:] = [features.detach(), call.query]
        if not head.training:
            return head(features.to(head.dtype), call.query)
        if self._observes_steps(head, call):
            head.observe(features, call.labels.to(features.device), call.query)
        if head.training_head is not None:
            head, features = head.training_head, features[:, : head.training_head.sizes.features]
        return head(features.to(head.dtype), call.query)

    def _observes_steps(self, head: Head, call: Call) -> bool:
        """Whether training steps are what a head observes: those of a stream, which comes but once. A forward in
        training mode for another purpose (no labels, no graph) is nothing to learn from."""
        learns = call.labels is not None and torch.is_grad_enabled() and not self.config.inference_mode
        return learns and head.observes and self.config.stream

    @contextmanager
    def keeping_logits(self) -> Iterator[list[torch.Tensor]]:
        """A list that holds, after a call of the model inside the block, its logits (B, classes) with their graph and
        before any is masked."""
        self._logits, before = [], self._logits
        try:
            yield self._logits
        finally:
            self._logits = before

    @contextmanager
    def capturing(self) -> Iterator[list[torch.Tensor | None]]:
        """A list that holds, after a call of the model inside the block, the features (B, F) that the head read and
        the query (B, Q) of the call."""
        self.captured = []
        try:
            yield self.captured
        finally:
            self.captured = None

    def rows_of_tasks(self, device: torch.device) -> torch.Tensor:
        """Boolean (tasks, classes): which rows belong to each task. Kept on the device: a copy would make every step
        wait for it."""
        config, name = self.config, self.active_adapters[0]
        shape, kept = (len(config.tasks), len(config.classes)), self._rows.get(name)
        if kept is None or kept.device != device or kept.shape != shape:
            rows = torch.zeros(shape, dtype=torch.bool)
            for task, members in enumerate(config.tasks):
                rows[task, members] = True
            kept = self._rows[name] = rows.to(device)
        return kept

    def forget_rows(self) -> None:
        """Read the tasks' rows anew: the configuration has changed."""
        self._rows.clear()

    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Take what the base model's forward must not see: `labels`, `task_ids`, `query`."""
        getattr(model, self.encoder_name).lock.acquire()
        mixed, self.mixed = self.mixed, None  # the calls inside a mixed one are of one adapter each
        if mixed is not None:
            args, kwargs = mixed.begin(args, kwargs)
        task_ids, query = kwargs.pop("task_ids", None), kwargs.pop("query", None)
        call = Call(task_ids=task_ids, query=query, mixed=mixed, classify=self)
        if self.active is not None:
            images = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0] if args else None
            config, head = self.config, self.active
            if images is not None:
                # Sizes by `shape`: `len` would make an exported batch size a constant.
                call.check(images.shape[0], config.query_width)
            # Prompts are learnt by what their paper reads, whatever a head that observes sees afterwards.
            learns = head.training and head.training_head is not None and not config.stream
            call.features = config.features if head.classes and config.tasks and not learns else None
            call.reads_own = not head.classes
            args, kwargs = _labels_by_name(model, args, kwargs)
            call.labels = kwargs.pop("labels", None)
        getattr(model, self.encoder_name).call = call
        return args, kwargs

    def after_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Mask the logits, and add the loss where labels were given."""
        encoder: PromptedEncoder = getattr(model, self.encoder_name)
        mixed = None if encoder.call is None else encoder.call.mixed
        try:
            output = self.finish(model, output)
            return output if mixed is None or output is None else mixed.finish(model, output)
        finally:
            encoder.lock.release()

    def finish(self, model: nn.Module, output: Any) -> Any:
        """What `after_forward` returns; `output` is None if the forward raised."""
        encoder: PromptedEncoder = getattr(model, self.encoder_name)
        call, encoder.call = encoder.call, None
        if output is None or call is None:  # the forward raised: only the state had to be cleared
            return output
        if self.active is None:
            if call.task_ids is not None:
                raise ValueError(
                    "task_ids were given, but no adapter is active: the base model has no tasks. Leave them out, or "
                    "activate one by set_adapter(name)."
                )
            return output
        logits = output[0] if isinstance(output, tuple) else output.logits
        logits = self.weigh_evidence(logits, call, training=model.training)
        if not model.training and self.config.temperature != 1.0:
            logits = logits.float() / self.config.temperature  # eq. 9 of Guo et al. (2017), arXiv 1706.04599
        if self._logits is not None:
            self._logits[:] = [logits]
        logits = self.mask(logits, call.task_ids, training=model.training, labels=call.labels)
        self.last_selected, self.last_weights = call.prompts.selected, call.prompts.weights
        loss = None
        if call.labels is not None:
            name, of_labels = self.loss_of_labels(logits, call.labels)
            terms = call.prompts.losses  # none outside training
            loss = of_labels + sum(terms.values())
            self.last_losses = {name: term.detach() for name, term in {name: of_labels, **terms}.items()}
        if isinstance(output, tuple):
            return (logits, *output[1:]) if loss is None else (loss, logits, *output[1:])
        fields = {name: value for name, value in output.items() if name not in ("loss", "logits")}
        return type(output)(loss=loss, logits=logits, **fields)

    def weigh_evidence(self, logits: torch.Tensor, call: Call, *, training: bool) -> torch.Tensor:
        """In a training step, let the tasks' mean queries see the batch; in evaluation, add the task evidence."""
        config, evidence = self.config, self.active.evidence
        if evidence is None:
            if config.task_evidence:
                raise ValueError(
                    f"task_evidence was set to {config.task_evidence}, but the adapter was made without it and keeps "
                    "no mean queries. Set it in the configuration before get_peft_model."
                )
            return logits
        with without_autocast(logits.device):
            if training:
                # A forward in training mode for another purpose (no labels, no graph) is nothing to learn from.
                if call.labels is not None and torch.is_grad_enabled() and not config.inference_mode:
                    evidence.observe(call.query[:, : evidence.size])
            elif config.task_evidence and config.tasks and call.task_ids is None:
                rows = self.rows_of_tasks(logits.device)
                return logits.float() + evidence(call.query[:, : evidence.size], rows).float()
        return logits

    def foretell(self, query: torch.Tensor) -> torch.Tensor | None:
        """What the frozen features (B, Q) say of the tasks before there are prompted ones: scores (B, tasks), by the
        head or else by the task evidence; None: nothing."""
        head, rows = self.active, self.rows_of_tasks(query.device)
        said = head.foretell(query)
        if said is not None:
            return said[:, None].masked_fill(~rows, -torch.inf).logsumexp(-1)
        return None if head.evidence is None else head.evidence.similarity(query[:, : head.evidence.size])

    def mask(
        self,
        logits: torch.Tensor,
        task_ids: torch.Tensor | None,
        *,
        training: bool,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Set the logits of classes that are out of the question to -inf.

        Args:
            logits: (B, classes) of the active head.
            task_ids: (B,), the task of each sample (task-incremental evaluation): its own task's classes are kept.
            training: without `task_ids`, keep the classes of the current task (`train_mask`).
            labels: (B,), of a stream, which has no current task: the classes in the batch are kept.
        """
        config = self.config
        if task_ids is not None:
            # Looked into where it costs nothing, as labels are; an accelerator raises an error of its own.
            numbers = task_ids.tolist() if task_ids.device.type == "cpu" else ()
            unknown = sorted({task for task in numbers if not 0 <= task < config.num_tasks})
            if unknown:
                raise ValueError(
                    f"task_ids holds {unknown[:5]}, but the active adapter has begun {config.num_tasks} tasks: they "
                    f"must be from 0 to {config.num_tasks - 1}."
                )
            allowed = self.rows_of_tasks(logits.device)[task_ids.to(logits.device)]
        elif training and config.train_mask and config.stream and labels is not None:
            present = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            # Labels out of range are told of by the loss, in words.
            rows = labels.to(logits.device).long().flatten().clamp(0, logits.shape[-1] - 1)
            allowed = present.scatter(0, rows, True)
        elif training and config.train_mask and config.tasks:
            allowed = self.rows_of_tasks(logits.device)[-1:]
        else:
            return logits
        return logits.masked_fill(~allowed, -torch.inf)

    def loss_of_labels(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Mean cross-entropy of (B, classes) and (B,) labels, in float32, or the user's loss, with its name in logs.

        Raises:
            ValueError: labels that are no class indices, of unknown classes, or of classes that are masked out.
        """
        self._check_labels(logits, labels)
        if self.own_loss is None:
            return "cross_entropy", F.cross_entropy(logits.float(), labels.long())
        # Logits of -inf are no numbers to reckon with (a smoothed loss is infinite): the user's function gets the
        # classes that the loss is over, rows that differ in them one group after the other.
        masks, group = (~torch.isneginf(logits)).unique(dim=0, return_inverse=True)
        total = logits.new_zeros((), dtype=torch.float32)
        for number, mask in enumerate(masks):
            rows, columns = (group == number).nonzero()[:, 0], mask.nonzero()[:, 0]
            names = tuple(self.config.classes[column] for column in columns.tolist())
            positions = mask.cumsum(0)[labels[rows].long()] - 1
            loss = self.own_loss(logits[rows][:, columns].float(), positions, names)
            total = total + loss.mean() * (len(rows) / len(labels))
        return "own_loss", total

    def _check_labels(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}, but must be class indices, (B,)."
            )
        # Looked into where it costs nothing; on an accelerator it would make every step wait for the device.
        if labels.device.type == "cpu" and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= logits.shape[-1]:
                raise ValueError(
                    f"labels reach from {low} to {high}, but the active head knows the classes 0 to "
                    f"{logits.shape[-1] - 1}. Call begin_task with the new classes' names, or map the labels to the "
                    "order of `classes` in the adapter's config."
                )
            masked = labels[torch.isneginf(logits.detach().gather(1, labels[:, None].long()))[:, 0].cpu()]
            if len(masked):
                raise ValueError(
                    f"labels hold the classes {masked.unique().tolist()[:5]}, which are not of the task that the "
                    "logits are masked to, so their loss would be infinite. Train on the examples of the current "
                    "task, give the right task_ids, or set train_mask=False."
                )


def _class_names(model: PreTrainedModel, classifier: nn.Module) -> list[str]:
    """Names of the base model's classes; none if it has no classifier (`num_labels=0`)."""
    linear = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
    rows = linear[-1].out_features if linear else 0
    return [str(model.config.id2label.get(row, row)) for row in range(rows)]


def _labels_by_name(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Positional arguments after the images, by their names, so that `labels` is found however it was passed."""
    if len(args) < 2:
        return args, kwargs
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
