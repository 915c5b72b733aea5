"""The encoder with its two passes: an un-prompted one for the query, and the prompted one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...backbones import Family
from ...heads import CLS, Features
from .attention import prefixed
from .call import Call, Trace
from .layer import AdapterLayer
from .lock import CallLock
from .pool import PromptPool
from .prompts import Injection, Prompts
from .reading import can_read, is_watched, read_layer


NO_PROMPTS = Prompts()
#: Head types that read no token behind the CLS token.
READ_AT_THE_FRONT = ("cls", "prompt", "cls+prompt")
#: Ways to run a layer that `torch.compile` may compile; its own limit, 8, is passed in a sequence of tasks.
COMPILED_CASES = 16


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
        #: Held by a call of the classification model from its begin to its end, or by one of the encoder alone.
        self.lock = CallLock()
        #: Whether a last layer of the kind tried here can be run for some of its tokens alone; False runs it whole.
        self.reads_last_layer = can_read(family, self._layers[-1])
        self._tried = type(self._layers[-1])

    def forward(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the base encoder's forward takes and gives; see `Call` for what the classification model adds."""
        with self.lock.held():
            return self._forward(pixel_values, *args, **kwargs)

    def _forward(
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
        interpolate = self._interpolates(interpolate_pos_encoding)
        call = self.call or Call()
        trace = Trace(
            hidden_states=[] if self._wanted("output_hidden_states", kwargs) else None,
            attentions=[] if self._wanted("output_attentions", kwargs) else None,
        )
        call.prompts = NO_PROMPTS  # until the pool has chosen
        if pool.query_is_feature and call.query is not None and not trace.wanted:
            return BaseModelOutputWithPooling(last_hidden_state=call.query[:, None])
        first = self._first_layer(pool, call.features)
        query, start = call.query if pool.needs_query else None, None
        if query is None and pool.needs_query:
            query, start = self._query(pixel_values, interpolate, first)
            call.query = query
        # The pool computes in its own precision, whatever the passes run in.
        with torch.autocast(pixel_values.device.type, enabled=False):
            prompts = pool(query[:, : self.hidden_size] if pool.needs_query else None)
        if start is None or trace.wanted or not self._is_fixed(pixel_values, first):
            start = self._start(pixel_values, interpolate, first, trace)
        # The classification model reads what its head reads; who calls the encoder alone gets all tokens.
        read = pool.head_type if self.call is not None and not trace.wanted else "all"
        if call.features is None:
            tokens, num_prompts = self._finish(start, first, prompts, read, trace)
            state = self._for_head(tokens, num_prompts, pool.head_type)
        else:
            state = self._read(call.features, start, first, prompts, trace)
            if call.features.query:
                state = torch.cat([state, query.to(state.dtype)], dim=-1)
            state = state[:, None]
        if pool.query_is_feature:
            call.query = state[:, 0].detach()
        if prompts.parts:
            features = self._features_of_parts(start, first, prompts)
            with torch.autocast(pixel_values.device.type, enabled=False):
                prompts.losses.update(pool.compare(features))
        call.prompts = prompts
        return BaseModelOutputWithPooling(
            last_hidden_state=state,
            hidden_states=tuple(trace.hidden_states) if trace.hidden_states is not None else None,
            attentions=tuple(trace.attentions) if trace.attentions is not None else None,
        )

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.base_layer.config.hidden_size

    @property
    def query_features(self) -> Features:
        """What `query` is made of: the CLS feature, and more if the active adapter's head reads more."""
        pool: PromptPool | None = self.active
        return CLS if pool is None else pool.config.query_features

    def _first_layer(self, pool: PromptPool, features: Features | None) -> int:
        """The lowest layer that is of the two passes' own, or whose output the head reads."""
        layers = 1 if features is None else features.layers
        layers = max(layers, self.query_features.layers if pool.needs_query else 1)
        return min(pool.first_layer, len(self._layers) - layers)

    def _read(
        self, features: Features, start: torch.Tensor, first: int, prompts: Prompts, trace: Trace
    ) -> torch.Tensor:
        """(B, parts x layers x D): the features of the last layers' outputs, from the input of layer `first` on."""
        outputs: list[tuple[torch.Tensor, int]] = []
        self._finish(start, first, prompts, "all" if features.reads_all or trace.wanted else "cls", trace, outputs)
        norm = self.family.final_norm(self.base_layer)
        parts = []
        for hidden, kept in reversed(outputs[-features.layers :]):
            for part in features.parts:
                patches = hidden[:, kept + self.family.special_tokens :]
                parts.append(norm(hidden[:, kept]) if part == "cls" else norm(patches).mean(1))
        return torch.cat(parts, dim=-1)

    def compile_layers(self, **options: Any) -> None:
        """`torch.compile` each layer with `options`, as `nn.Module.compile` has them.

        What is around the layers changes with tasks and batches. The layers share their code, which is compiled for
        few cases: with prefix and without, with gradient and without, for one batch size, for several, and for one
        image. The last layer is run as it is where it is done for some tokens alone.
        """
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options.setdefault("recompile_limit", COMPILED_CASES)
        else:  # torch before 2.12
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_CASES)
        for layer in self._layers:
            layer.compile(**options)

    @torch.no_grad()
    def query(self, pixel_values: torch.Tensor, *, interpolate_pos_encoding: bool | None = None) -> torch.Tensor:
        """The query pass: the frozen, un-prompted encoder in evaluation mode, without a graph.

        Args:
            pixel_values: (B, channels, height, width).

        Returns:
            (B, D): the CLS token after the final norm, in the encoder's dtype; (B, Q), with the CLS token first, if
            the head of the active adapter reads more of the frozen model (`query_features`).
        """
        with self.lock.held():
            return self._query(pixel_values, self._interpolates(interpolate_pos_encoding), 0)[0]

    def encode(self, pixel_values: torch.Tensor, prompts: Prompts) -> tuple[torch.Tensor, int]:
        """The prompted pass alone, with no work left out.

        Returns:
            The tokens after the final norm, (B, prompts kept + special tokens + patches, D), and the number of prompt
            tokens in front of the CLS token.
        """
        return self._finish(self._start(pixel_values, False, 0, Trace()), 0, prompts, "all", Trace())

    @torch.no_grad()
    def _query(self, pixel_values: torch.Tensor, interpolate: bool, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The query (B, Q), and the input of layer `first` (B, N, D) on the way to it."""
        with evaluation_mode(self.base_layer):
            start = self._start(pixel_values, interpolate, first, Trace())
            if self.query_features != CLS:
                return self._read(self.query_features, start, first, NO_PROMPTS, Trace()), start
            tokens, _ = self._finish(start, first, NO_PROMPTS, "cls", Trace())
        return tokens[:, 0].clone(), start  # not a view, which would keep all tokens

    def _is_fixed(self, pixel_values: torch.Tensor, first: int) -> bool:
        """Whether the input of layer `first` is the same in both passes, and needs no graph in either."""
        below = [getattr(self.base_layer, self.family.embeddings), *self._layers[:first]]
        modules = [module for part in below for module in part.modules()]
        if any(module.training and _draws(module) for module in modules):
            return False
        learns = pixel_values.requires_grad or any(
            weight.requires_grad for part in below for weight in part.parameters()
        )
        return not (learns and torch.is_grad_enabled())

    @property
    def _layers(self) -> nn.ModuleList:
        return self.family.layer_list(self.base_layer)

    def _start(self, pixel_values: torch.Tensor, interpolate: bool, first: int, trace: Trace) -> torch.Tensor:
        """Embeddings and the layers below `first`, which no prompt enters: (B, special tokens + patches, D)."""
        hidden = self.family.embed(self.base_layer, pixel_values, interpolate)
        for layer in self._layers[:first]:
            if trace.hidden_states is not None:
                trace.hidden_states.append(hidden)
            with self._recording(layer, trace.attentions):
                hidden = self._run_layer(layer, hidden, None)
        return hidden

    def _finish(
        self,
        hidden: torch.Tensor,
        first: int,
        prompts: Prompts,
        read: str,
        trace: Trace,
        outputs: list[tuple[torch.Tensor, int]] | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Run the layers from `first` on with `prompts`, and the final norm.

        Args:
            hidden: the input of layer `first`.
            read: what of the result is wanted: `"all"` tokens, or those that a `PromptPool.head_type` needs.
            outputs: takes each layer's output, and how many prompt tokens are in front of the CLS token there.

        Returns:
            The tokens, (B, prompts kept + special tokens + patches, D) or fewer, and how many prompt tokens are in
            front of the CLS token.
        """
        kept, layers = 0, self._layers
        for index, layer in enumerate(layers[first:], start=first):
            injection = prompts.at(index, hidden)
            extra = 0
            if injection is not None and injection.tokens is not None:
                rows = injection.tokens
                if injection.cls_position:
                    rows = rows + self.family.cls_position(self.base_layer)
                extra = rows.shape[1]
                hidden = torch.cat([rows.to(hidden.dtype).expand(hidden.shape[0], -1, -1), hidden], dim=1)
            if trace.hidden_states is not None:
                trace.hidden_states.append(hidden)
            is_kept = injection is None or injection.keep
            kept += extra if is_kept else 0
            span = None
            if layer is layers[-1] and read in READ_AT_THE_FRONT and is_kept and self._can_read(layer):
                span = (kept if read == "cls" else 0, kept + 1)
                kept -= span[0]
            with self._recording(layer, trace.attentions):
                hidden = self._run_layer(layer, hidden, injection, span)
            if not is_kept:
                hidden = hidden[:, extra:]
            if outputs is not None:
                outputs.append((hidden, kept))
        if trace.hidden_states is not None:
            trace.hidden_states.append(hidden)
        if outputs is not None:  # who reads these puts the final norm on what is read
            return hidden, kept
        return self.family.final_norm(self.base_layer)(hidden), kept

    def _can_read(self, layer: nn.Module) -> bool:
        """Whether the last layer may be run for some of its tokens alone."""
        if not self.reads_last_layer or type(layer) is not self._tried:
            return False
        behind = (self, self.family.final_norm(self.base_layer))
        return not is_watched([*layer.modules(), *behind])

    def _run_layer(
        self, layer: nn.Module, hidden: torch.Tensor, injection: Injection | None, span: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """One layer with its prefix, checkpointed if the user asked for it; with a `span`, for these tokens alone.

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
            if span is not None:
                return read_layer(self.family, layer, hidden, *span, *prefix)
            with prefixed(attention, hidden, *prefix), without_own_checkpointing(layer):
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

    def _features_of_parts(self, start: torch.Tensor, first: int, prompts: Prompts) -> dict[str, torch.Tensor]:
        """CLS feature (B, D) of the image under each part of the prompts alone."""
        features = {}
        for name, part in prompts.parts.items():
            tokens, num_prompts = self._finish(start, first, part, "cls", Trace())
            features[name] = tokens[:, num_prompts].float()
        return features

    def _interpolates(self, given: bool | None) -> bool:
        """Whether position embeddings are interpolated: as the call says, or else the adapter's configuration."""
        return self.active.config.interpolate_pos_encoding if given is None else given

    def _wanted(self, option: str, kwargs: dict[str, Any]) -> bool:
        value = kwargs.get(option)
        return bool(getattr(self.base_layer.config, option, False) if value is None else value)

    @contextmanager
    def _recording(self, layer: nn.Module, attentions: list[torch.Tensor] | None) -> Iterator[None]:
        """Collect the layer's attention weights, (B, heads, N, prefix + N), while the block runs: the first columns
        are the prompts' keys. Only eager attention has weights to show."""
        if attentions is None:
            yield
            return
        attention = self.family.attention_of(layer)
        handle = attention.register_forward_hook(lambda module, inputs, output: attentions.append(output[1]))
        implementation, attention.config._attn_implementation = attention.config._attn_implementation, "eager"
        try:
            yield
        finally:
            attention.config._attn_implementation = implementation
            handle.remove()


def _draws(module: nn.Module) -> bool:
    """Whether the module draws random numbers in training."""
    rates = ("p", "attention_dropout", "drop_prob")
    return any(isinstance(rate, float) and rate > 0 for rate in (getattr(module, name, None) for name in rates))


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
