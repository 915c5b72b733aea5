"""The encoder with its two passes: an un-prompted one for the query, and the prompted one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...backbones import Family
from .attention import prefixed
from .layer import AdapterLayer
from .pool import PromptPool
from .prompts import Injection, Prompts


NO_PROMPTS = Prompts()


@dataclass
class Call:
    """One call of the classification model: what the user passed beside the images, and what the pool answered.

    `query`, (B, D), is the user's or the query pass's; None where the pool has no use for one.
    """

    labels: torch.Tensor | None = None
    task_ids: torch.Tensor | None = None
    query: torch.Tensor | None = None
    prompts: Prompts = field(default_factory=Prompts)

    def check(self, batch: int) -> None:
        """Refuse `task_ids` and `query` that are not of `batch` images: they would be broadcast in silence."""
        if self.task_ids is not None:
            self.task_ids = torch.as_tensor(self.task_ids)
            if self.task_ids.shape != (batch,) or self.task_ids.is_floating_point():
                raise ValueError(
                    f"task_ids have shape {tuple(self.task_ids.shape)} and dtype {self.task_ids.dtype}, but must be "
                    f"the number of a task for each of the {batch} images, ({batch},)."
                )
        if self.query is not None and (self.query.ndim != 2 or len(self.query) != batch):
            raise ValueError(
                f"query has shape {tuple(self.query.shape)}, but must be a feature for each of the {batch} images, "
                f"({batch}, D)."
            )


@dataclass
class Trace:
    """Outputs that HF users may ask for; they contain the prompts."""

    hidden_states: list[torch.Tensor] | None = None
    attentions: list[torch.Tensor] | None = None

    @property
    def wanted(self) -> bool:
        return self.hidden_states is not None or self.attentions is not None


class PromptedEncoder(AdapterLayer):
    """Stands in the place of a classification model's encoder: `pixel_values` in, the encoder's output out.

    The passes run the base encoder's own modules in the order of its own forward. With adapters disabled the base
    encoder's forward is called as it is.
    """

    kind = "pool"

    def __init__(self, base_layer: nn.Module, prefix: str, family: Family):
        super().__init__(base_layer, prefix)
        self.family = family
        self.call: Call | None = None

    def forward(
        self,
        pixel_values: torch.Tensor,
        *args: Any,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        pool: PromptPool | None = self.active
        if pool is None:
            return self.base_layer(
                pixel_values,
                *args,
                interpolate_pos_encoding=interpolate_pos_encoding,
                attention_mask=attention_mask,
                **kwargs,
            )
        if attention_mask is not None:
            raise ValueError(
                "attention_mask is not supported with prompts: images are read whole. Leave it out, or run the base "
                "model inside `with model.disable_adapter():`."
            )
        interpolate = bool(interpolate_pos_encoding)
        call = self.call or Call()
        trace = Trace(
            hidden_states=[] if self._wanted("output_hidden_states", kwargs) else None,
            attentions=[] if self._wanted("output_attentions", kwargs) else None,
        )
        if pool.query_is_feature and call.query is not None and not trace.wanted:
            return BaseModelOutputWithPooling(last_hidden_state=call.query[:, None])
        query = call.query if pool.needs_query else None
        if query is None and pool.needs_query:
            query = call.query = self.query(pixel_values, interpolate_pos_encoding=interpolate)
        # The pool computes in its own precision, whatever the passes run in.
        with torch.autocast(pixel_values.device.type, enabled=False):
            prompts = pool(query)
        tokens, num_prompts = self.encode(pixel_values, prompts, interpolate, trace)
        if pool.query_is_feature:
            call.query = tokens[:, 0].detach()
        if prompts.parts:
            features = self._features_of_parts(pixel_values, prompts, interpolate)
            with torch.autocast(pixel_values.device.type, enabled=False):
                prompts.losses.update(pool.compare(features))
        call.prompts = prompts
        return BaseModelOutputWithPooling(
            last_hidden_state=self._for_head(tokens, num_prompts, pool.head_type),
            hidden_states=tuple(trace.hidden_states) if trace.hidden_states is not None else None,
            attentions=tuple(trace.attentions) if trace.attentions is not None else None,
        )

    @torch.no_grad()
    def query(self, pixel_values: torch.Tensor, *, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """The query pass: the frozen, un-prompted encoder in evaluation mode, without a graph.

        Args:
            pixel_values: (B, channels, height, width).

        Returns:
            (B, D): the CLS token after the final norm, in the encoder's dtype.
        """
        with evaluation_mode(self.base_layer):
            tokens, _ = self.encode(pixel_values, NO_PROMPTS, interpolate_pos_encoding)
        return tokens[:, 0]

    def encode(
        self, pixel_values: torch.Tensor, prompts: Prompts, interpolate: bool = False, trace: Trace | None = None
    ) -> tuple[torch.Tensor, int]:
        """Run the encoder's modules with `prompts`.

        Returns:
            The tokens after the final norm, (B, prompts kept + special tokens + patches, D), and the number of prompt
            tokens in front of the CLS token.
        """
        trace = trace or Trace()
        encoder = self.base_layer
        hidden = self.family.embed(encoder, pixel_values, interpolate)
        kept = 0
        for index, layer in enumerate(self.family.layer_list(encoder)):
            injection = prompts.at(index, hidden)
            extra = 0
            if injection is not None and injection.tokens is not None:
                rows = injection.tokens
                if injection.cls_position:
                    rows = rows + self.family.cls_position(encoder)
                extra = rows.shape[1]
                hidden = torch.cat([rows.to(hidden.dtype).expand(len(hidden), -1, -1), hidden], dim=1)
            if trace.hidden_states is not None:
                trace.hidden_states.append(hidden)
            with self._recording(layer, trace.attentions):
                hidden = self._run_layer(layer, hidden, injection)
            if extra and not injection.keep:
                hidden = hidden[:, extra:]
            else:
                kept += extra
        if trace.hidden_states is not None:
            trace.hidden_states.append(hidden)
        return self.family.final_norm(encoder)(hidden), kept

    def _run_layer(self, layer: nn.Module, hidden: torch.Tensor, injection: Injection | None) -> torch.Tensor:
        """One layer with its prefix, checkpointed if the user asked for it.

        The prefix is an argument of the checkpointed function, not an attribute left on the module: the recomputation
        in the backward pass sees the same prefix, and the reentrant mode finds the gradient of its tensors.
        """
        prefix = (injection.keys, injection.values) if injection is not None and injection.keys is not None else ()
        attention = self.family.attention_of(layer)
        checkpointed = (
            getattr(layer, "gradient_checkpointing", False)
            and layer.training
            and torch.is_grad_enabled()
            and any(tensor.requires_grad for tensor in (hidden, *prefix, *layer.parameters()))
        )

        def run(hidden: torch.Tensor, *prefix: torch.Tensor) -> torch.Tensor:
            with prefixed(attention, *prefix) if prefix else nullcontext(), without_own_checkpointing(layer):
                output = layer(hidden)
            return output[0] if isinstance(output, tuple) else output

        if checkpointed:
            return layer._gradient_checkpointing_func(run, hidden, *prefix)
        return run(hidden, *prefix)

    def _for_head(self, tokens: torch.Tensor, num_prompts: int, head_type: str) -> torch.Tensor:
        """Prompt tokens are taken out, and the feature that `head_type` names stands where the head reads it."""
        if head_type == "cls":
            return tokens[:, num_prompts:] if num_prompts else tokens
        read = {"prompt": num_prompts, "cls+prompt": num_prompts + 1, "mean": tokens.shape[1]}[head_type]
        return self.family.present(tokens[:, :read].mean(dim=1), tokens[:, num_prompts:])

    def _features_of_parts(
        self, pixel_values: torch.Tensor, prompts: Prompts, interpolate: bool
    ) -> dict[str, torch.Tensor]:
        """CLS feature (B, D) of the image under each part of the prompts alone."""
        features = {}
        for name, part in prompts.parts.items():
            tokens, num_prompts = self.encode(pixel_values, part, interpolate)
            features[name] = tokens[:, num_prompts].float()
        return features

    def _wanted(self, option: str, kwargs: dict[str, Any]) -> bool:
        value = kwargs.get(option)
        return bool(getattr(self.base_layer.config, option, False) if value is None else value)

    @contextmanager
    def _recording(self, layer: nn.Module, attentions: list[torch.Tensor] | None) -> Iterator[None]:
        """Collect the layer's attention weights, (B, heads, N, prefix + N), while the block runs."""
        if attentions is None:
            yield
            return
        attention = self.family.attention_of(layer)
        handle = attention.register_forward_hook(lambda module, inputs, output: attentions.append(output[1]))
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch dropout and drop-path off inside the block, and give every module its own mode back afterwards."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True


@contextmanager
def without_own_checkpointing(layer: nn.Module) -> Iterator[None]:
    """The layer's forward is checkpointed by us, with its prefix, or needs no checkpoint; it must not do so itself."""
    if not getattr(layer, "gradient_checkpointing", False):
        yield
        return
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.gradient_checkpointing = True
