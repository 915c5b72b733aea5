"""The head: one row per class learnt, growing with the tasks; and the loss, which only the head's owner can define."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .config import PromptPoolConfig
from .encoder import Call, PromptedEncoder
from .layer import AdapterLayer
from .similarity import cosine


class GrowingLinear(nn.Linear):
    """A linear classifier of one adapter, (classes, D), whose rows are appended as classes arrive.

    With `task_evidence` a buffer `task_queries`, (tasks, D), keeps the sum of each task's unit queries.

    Args:
        in_features: D.
        classes: rows to start with.
        config: the adapter's configuration: its tasks say which rows a task may use, `head_init` how rows begin.
    """

    def __init__(self, in_features: int, classes: int, config: PromptPoolConfig):
        self.config = config
        super().__init__(in_features, classes)
        if config.task_evidence:
            self.register_buffer("task_queries", torch.zeros(config.num_tasks, in_features))

    def reset_parameters(self) -> None:
        if self.out_features == 0:
            return
        if self.config.head_init == "default":
            super().reset_parameters()
            return
        nn.init.zeros_(self.bias)
        if self.config.head_init == "zeros":
            nn.init.zeros_(self.weight)
        else:
            nn.init.trunc_normal_(self.weight, std=0.02)

    @torch.no_grad()
    def copy_from(self, classifier: nn.Linear) -> None:
        """Take the rows of another classifier of the same size; a missing bias is 0."""
        self.weight.copy_(classifier.weight)
        if classifier.bias is None:
            nn.init.zeros_(self.bias)
        else:
            self.bias.copy_(classifier.bias)

    def grow(self, classes: int, *, keep: int) -> None:
        """Have `classes` rows, of which the first `keep` are the present ones; the others begin anew."""
        fresh = GrowingLinear(self.in_features, classes, self.config).to(self.weight)
        for name in ("weight", "bias"):
            old, new = getattr(self, name), getattr(fresh, name)
            with torch.no_grad():
                new[:keep] = old[:keep]
            setattr(self, name, nn.Parameter(new.detach(), requires_grad=old.requires_grad))
        self.out_features = classes
        if self.config.task_evidence:
            began = self.config.num_tasks - len(self.task_queries)
            self.task_queries = F.pad(self.task_queries, (0, 0, 0, began))

    @torch.no_grad()
    def observe(self, query: torch.Tensor) -> None:
        """Count a training batch's queries (B, D) towards the current task's mean."""
        if len(self.task_queries):
            self.task_queries[-1] += F.normalize(query.to(self.task_queries), dim=-1).sum(0)

    def evidence(self, query: torch.Tensor) -> torch.Tensor:
        """(B, D) queries -> (B, classes): what speaks for the task of each class, to be added to its logit.

        The masked cross-entropy compares the classes of one task only: the difference between the logits of two tasks
        is never trained. The query, by which prompts are chosen, tells tasks apart to some degree. So the logit of a
        class gets log p(task | query) with p the softmax of `task_evidence` times the cosine of the query and the
        task's mean query; its normalisation is the same for all classes and left out. The decomposition is that of
        HiDe-Prompt (Wang et al., NeurIPS 2023, arXiv 2310.07234); the mean query in its place is ours. A class
        of several tasks takes their mean.
        """
        similarity = cosine(query.to(self.task_queries), self.task_queries)
        rows = _rows_of_tasks(self.config.tasks, self.weight[:, 0][None]).to(similarity)
        return self.config.task_evidence * similarity @ (rows / rows.sum(0))


class ClassifierHead(AdapterLayer):
    """Stands in the place of the base model's classifier, and turns logits and labels into the training loss.

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
        last_losses: the terms of the last loss, by name, detached and weighted.
    """

    kind = "head"

    def __init__(self, base_layer: nn.Module, prefix: str, encoder_name: str):
        super().__init__(base_layer, prefix)
        self.encoder_name = encoder_name
        self.last_losses: dict[str, torch.Tensor] = {}
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
        self._show(self.base_labels)
        if self.base_accepts_loss_kwargs is None:
            del model.accepts_loss_kwargs
        else:
            model.accepts_loss_kwargs = self.base_accepts_loss_kwargs
        self.owner = ()

    def show_labels(self) -> None:
        """Keep the base config's labels in step with the head that answers, for pipelines and predictions."""
        if self.active is None:
            self._show(self.base_labels)
        else:
            names = self.active.config.classes
            self._show({"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}})

    def _show(self, labels: dict[str, dict]) -> None:
        (model,) = self.owner
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

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, D) -> logits (B, classes learnt)."""
        head = self.active
        if head is None:
            return self.base_layer(features)
        return head(features.to(head.weight.dtype))

    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Take what the base model's forward must not see: `labels`, `task_ids`, `query`."""
        call = Call(task_ids=kwargs.pop("task_ids", None), query=kwargs.pop("query", None))
        if self.active is not None:
            args, kwargs = _labels_by_name(model, args, kwargs)
            call.labels = kwargs.pop("labels", None)
        getattr(model, self.encoder_name).call = call
        return args, kwargs

    def after_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Mask the logits, and add the loss where labels were given."""
        encoder: PromptedEncoder = getattr(model, self.encoder_name)
        call, encoder.call = encoder.call, None
        if output is None or call is None:  # the forward raised: only the state had to be cleared
            return output
        if self.active is None:
            if call.task_ids is not None:
                raise ValueError("task_ids were given, but no adapter is active: the base model has no tasks.")
            return output
        logits = output[0] if isinstance(output, tuple) else output.logits
        if self.active.config.task_evidence and self.active.config.tasks:
            if model.training:
                self.active.observe(call.query)
            else:
                logits = logits + self.active.evidence(call.query).to(logits.dtype)
        logits = self.mask(logits, call.task_ids, training=model.training)
        loss = None
        if call.labels is not None:
            cross_entropy = self.cross_entropy(logits, call.labels)
            terms = call.prompts.losses  # none outside training
            loss = cross_entropy + sum(terms.values())
            self.last_losses = {
                "cross_entropy": cross_entropy.detach(),
                **{name: term.detach() for name, term in terms.items()},
            }
        if isinstance(output, tuple):
            return (logits, *output[1:]) if loss is None else (loss, logits, *output[1:])
        fields = {name: value for name, value in output.items() if name not in ("loss", "logits")}
        return type(output)(loss=loss, logits=logits, **fields)

    def mask(self, logits: torch.Tensor, task_ids: torch.Tensor | None, *, training: bool) -> torch.Tensor:
        """Set the logits of classes that are out of the question to -inf.

        Args:
            logits: (B, classes) of the active head.
            task_ids: (B,), the task of each sample (task-incremental evaluation): its own task's classes are kept.
            training: without `task_ids`, keep the classes of the current task (`train_mask`).
        """
        config = self.active.config
        if task_ids is not None:
            task_ids = torch.as_tensor(task_ids)
            unknown = sorted({task for task in task_ids.tolist() if not 0 <= task < config.num_tasks})
            if unknown:
                raise ValueError(
                    f"task_ids holds {unknown[:5]}, but the active adapter has begun {config.num_tasks} tasks, which "
                    "count from 0."
                )
            allowed = _rows_of_tasks(config.tasks, logits)[task_ids.to(logits.device)]
        elif training and config.train_mask and config.tasks:
            allowed = _rows_of_tasks(config.tasks[-1:], logits)
        else:
            return logits
        return logits.masked_fill(~allowed, -torch.inf)

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of (B, classes) and (B,) labels, in float32.

        Raises:
            ValueError: labels that are no class indices, of unknown classes, or of classes that are masked out.
        """
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
        return F.cross_entropy(logits.float(), labels.long())


def _rows_of_tasks(tasks: Sequence[Sequence[int]], logits: torch.Tensor) -> torch.Tensor:
    """Boolean (tasks, classes): which head rows belong to each task."""
    rows = torch.zeros(len(tasks), logits.shape[-1], dtype=torch.bool)
    for task, classes in enumerate(tasks):
        rows[task, classes] = True
    return rows.to(logits.device)


def _class_names(model: PreTrainedModel, classifier: nn.Module) -> list[str]:
    """Names of the base model's classes; none if it has no classifier (`num_labels=0`)."""
    rows = classifier.out_features if isinstance(classifier, nn.Linear) else 0
    return [str(model.config.id2label.get(row, row)) for row in range(rows)]


def _labels_by_name(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Positional arguments after the images, by their names, so that `labels` is found however it was passed."""
    if len(args) < 2:
        return args, kwargs
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
