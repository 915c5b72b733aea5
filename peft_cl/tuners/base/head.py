"""The head: one row per class learnt, growing with the tasks; and the loss, which only the head's owner can define."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .config import PromptPoolConfig
from .encoder import Call, PromptedEncoder
from .layer import AdapterLayer


class GrowingLinear(nn.Linear):
    """A linear classifier of one adapter, (classes, D), whose rows are appended as classes arrive.

    Args:
        in_features: D.
        classes: rows to start with.
        config: the adapter's configuration: its tasks say which rows a task may use, `head_init` how rows begin.
    """

    def __init__(self, in_features: int, classes: int, config: PromptPoolConfig):
        self.config = config
        super().__init__(in_features, classes)

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

    @classmethod
    def copy_of(cls, classifier: nn.Module, in_features: int, config: PromptPoolConfig) -> GrowingLinear:
        """Start from the base model's own classifier, in float32; no row if the base model has none."""
        if not isinstance(classifier, nn.Linear):
            return cls(in_features, 0, config)
        head = cls(classifier.in_features, classifier.out_features, config)
        with torch.no_grad():
            head.weight.copy_(classifier.weight)
            if classifier.bias is not None:
                head.bias.copy_(classifier.bias)
            else:
                head.bias.zero_()
        return head

    def grow(self, classes: int, *, keep: int) -> None:
        """Have `classes` rows, of which the first `keep` are the present ones; the others begin anew."""
        fresh = GrowingLinear(self.in_features, classes, self.config).to(self.weight)
        for name in ("weight", "bias"):
            old, new = getattr(self, name), getattr(fresh, name)
            with torch.no_grad():
                new[:keep] = old[:keep]
            setattr(self, name, nn.Parameter(new.detach(), requires_grad=old.requires_grad))
        self.out_features = classes


class ClassifierHead(AdapterLayer):
    """Stands in the place of the base model's classifier, and turns logits and labels into the training loss.

    Two hooks on the classification model, `before_forward` and `after_forward`, carry `labels`, `task_ids` and `query`
    around the base model's own forward: its loss would use the base config's number of labels, weigh the pool's terms
    by accelerate's accumulation steps, and cannot mask classes.
    """

    kind = "head"

    def __init__(self, base_layer: nn.Module, prefix: str, encoder_name: str):
        super().__init__(base_layer, prefix)
        self.encoder_name = encoder_name
        self.last_losses: dict[str, torch.Tensor] = {}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, D) -> logits (B, classes learnt)."""
        head = self.active
        if head is None:
            return self.base_layer(features)
        return head(features.to(head.weight.dtype))

    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Take what the base model's forward must not see: `labels`, `task_ids`, `query`."""
        args, kwargs = _labels_by_name(model, args, kwargs)
        encoder: PromptedEncoder = getattr(model, self.encoder_name)
        encoder.call = Call(kwargs.pop("labels", None), kwargs.pop("task_ids", None), kwargs.pop("query", None))
        return args, kwargs

    def after_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Mask the logits, and add the loss where labels were given."""
        encoder: PromptedEncoder = getattr(model, self.encoder_name)
        call, encoder.call = encoder.call, None
        if output is None or call is None:  # the forward raised: only the state had to be cleared
            return output
        logits = output[0] if isinstance(output, tuple) else output.logits
        logits = self.mask(logits, call.task_ids, training=model.training)
        loss = None
        if call.labels is not None:
            cross_entropy = self.cross_entropy(logits, call.labels)
            terms = call.prompts.losses if model.training else {}
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

        In training these are the classes of other tasks (`train_mask`); with `task_ids` (B,), the tasks of the samples
        (task-incremental evaluation), those outside each sample's own task.
        """
        head = self.active
        if head is None or not head.config.tasks:
            if task_ids is not None:
                raise ValueError("task_ids were given, but the active adapter has no tasks. Call begin_task first.")
            return logits
        if task_ids is not None:
            allowed = torch.stack([_one_task(head.config, task, logits) for task in task_ids.tolist()])
        elif training and head.config.train_mask:
            allowed = _one_task(head.config, head.config.num_tasks - 1, logits)
        else:
            return logits
        return logits.masked_fill(~allowed, -torch.inf)

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of (B, classes) and (B,) labels, in float32."""
        # Checked where it costs nothing; on an accelerator it would make every step wait for the device.
        if labels.device.type == "cpu" and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= logits.shape[-1]:
                raise ValueError(
                    f"labels reach from {low} to {high}, but the active head knows the classes 0 to "
                    f"{logits.shape[-1] - 1}. Call begin_task with the new classes' names, or map the labels to the "
                    "order of `classes` in the adapter's config."
                )
        return F.cross_entropy(logits.float(), labels)


def _one_task(config: PromptPoolConfig, task: int, like: torch.Tensor) -> torch.Tensor:
    """Boolean (classes,): which classes belong to `task`."""
    if not 0 <= task < config.num_tasks:
        raise ValueError(f"task {task} is unknown: the adapter has seen the tasks 0 to {config.num_tasks - 1}.")
    allowed = torch.zeros(like.shape[-1], dtype=torch.bool)
    allowed[config.tasks[task]] = True
    return allowed.to(like.device)


def _labels_by_name(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Positional arguments after the images, by their names, so that `labels` is found however it was passed."""
    if len(args) < 2:
        return args, kwargs
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
