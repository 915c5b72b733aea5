"""What belongs to one call of the classification model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...backbones import Family
from ...heads import Features
from .prompts import Prompts


@dataclass
class Call:
    """One call of the classification model: what the user passed beside the images, and what the pool answered.

    `query`, (B, Q), is the user's or the query pass's; None where nothing has a use for one. `features` is what the
    head sees; None: what the method's paper reads (`PromptPool.head_type`), or with `reads_own` what the base model's
    own classifier does. `read`, (B, F), is the feature that the encoder leaves for the head; None: the head takes what
    the base model pools.
    """

    labels: torch.Tensor | None = None
    task_ids: torch.Tensor | None = None
    query: torch.Tensor | None = None
    features: Features | None = None
    reads_own: bool = False
    read: torch.Tensor | None = None
    classify: Callable[[torch.Tensor], torch.Tensor] | None = None  # the head, where the encoder calls it
    mixed: Any = None  # the `MixedBatch` whose first adapter this call is of
    prompts: Prompts | None = None  # until the encoder has run

    def check(self, batch: int, width: int | None = None) -> None:
        """Refuse `task_ids` and `query` that are not of `batch` images, which would be broadcast in silence, and a
        `query` of fewer than `width` numbers."""
        if self.task_ids is not None:
            self.task_ids = torch.as_tensor(self.task_ids)
            if self.task_ids.shape != (batch,) or self.task_ids.is_floating_point():
                raise ValueError(
                    f"task_ids have shape {tuple(self.task_ids.shape)} and dtype {self.task_ids.dtype}, but must be "
                    f"the number of a task for each of the {batch} images, ({batch},)."
                )
        if self.query is not None and (self.query.ndim != 2 or self.query.shape[0] != batch):
            raise ValueError(
                f"query has shape {tuple(self.query.shape)}, but must be a feature for each of the {batch} images, "
                f"({batch}, D)."
            )
        if self.query is not None and width is not None and self.query.shape[1] < width:
            raise ValueError(
                f"query has {self.query.shape[1]} numbers an image, but the head reads {width} of the frozen model. "
                "Make it by model.base_model.query(pixel_values), or leave it out."
            )


@dataclass
class Trace:
    """Outputs that HF users may ask for; they contain the prompts."""

    hidden_states: list[torch.Tensor] | None = None
    attentions: list[torch.Tensor] | None = None

    @property
    def wanted(self) -> bool:
        return self.hidden_states is not None or self.attentions is not None

    @property
    def outputs(self) -> tuple[tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None]:
        """Hidden states and attentions, as HF models return them."""
        return tuple(None if found is None else tuple(found) for found in (self.hidden_states, self.attentions))


def in_front(hidden: torch.Tensor, place: int, count: int) -> torch.Tensor:
    """Tokens with the `count` prompts behind `place` others moved to the front, where all that reads expects them."""
    if not (place and count):
        return hidden
    return torch.cat([hidden[:, place : place + count], hidden[:, :place], hidden[:, place + count :]], dim=1)


@contextmanager
def recording(family: Family, layer: nn.Module, attentions: list[torch.Tensor] | None) -> Iterator[None]:
    """Collect the layer's attention weights, (B, heads, N, prefix + N), while the block runs: the first columns are
    the prompts' keys. Only eager attention has weights to show."""
    if attentions is None:
        yield
        return
    attention = family.attention_of(layer)
    if not hasattr(attention, "config"):
        raise ValueError(
            f"output_attentions is True, but {type(attention).__name__} does not show its weights under prompts. "
            "Leave it out, or run the base model inside `with model.disable_adapter():`."
        )
    handle = attention.register_forward_hook(lambda module, inputs, output: attentions.append(output[1]))
    implementation, attention.config._attn_implementation = attention.config._attn_implementation, "eager"
    try:
        yield
    finally:
        attention.config._attn_implementation = implementation
        handle.remove()
