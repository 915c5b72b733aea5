"""The encoder with its two passes: an un-prompted one for the query, and the prompted one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ...backbones import Family
from ...backbones.modes import draws, evaluation_mode, without_autocast, without_own_checkpointing
from ...backbones.reading import can_read, is_watched, read_layer
from ...heads import CLS, OWN, Features
from .call import Call, Trace, in_front, recording
from .layer import AdapterLayer
from .lock import CallLock
from .pool import PromptPool
from .prompts import Injection, Prompts


NO_PROMPTS = Prompts()
#: Head types that read no token behind the CLS token.
READ_AT_THE_FRONT = ("cls", "prompt", "cls+prompt")
#: Ways to run a layer that `torch.compile` may compile; its own limit, 8, is passed in a sequence of tasks.
COMPILED_CASES = 16


class State(NamedTuple):
    """The input of a layer: tokens (B, N, D), and what the layer takes beside them."""

    hidden: torch.Tensor
    arguments: Mapping[str, Any]


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
            output = self._forward(pixel_values, *args, **kwargs)
            return output if self.call is None else self.family.answer(output, self.call.classify)

    def _forward(
        self,
        pixel_values: torch.Tensor,
        *args: Any,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        pool: PromptPool | None = self.active
        call = self.call or Call()
        call.prompts = NO_PROMPTS  # until the pool has chosen
        if pool is None or (pool.query_is_feature and call.reads_own):
            given = {"interpolate_pos_encoding": interpolate_pos_encoding, "attention_mask": attention_mask}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return self.base_layer(pixel_values, *args, **kwargs)
        if attention_mask is not None:
            raise ValueError(
                "attention_mask is not supported with prompts: images are read whole. Leave it out, or run the base "
                "model inside `with model.disable_adapter():`."
            )
        interpolate = self._interpolates(interpolate_pos_encoding)
        trace = Trace(
            hidden_states=[] if self._wanted("output_hidden_states", kwargs) else None,
            attentions=[] if self._wanted("output_attentions", kwargs) else None,
        )
        if pool.query_is_feature and call.query is not None and not trace.wanted:
            return self._output_of_feature(call, call.query, trace)
        first = self._first_layer(pool, call.features)
        query, start = call.query if pool.needs_query else None, None
        if query is None and pool.needs_query:
            query, start = self._query(pixel_values, interpolate, first)
            call.query = query
        # The pool computes in its own precision, whatever the passes run in.
        with without_autocast(pixel_values.device):
            pool.known_tasks, pool.task_scores = call.task_ids, None
            if pool.asks_for_tasks and call.classify is not None:
                pool.task_scores = call.classify.foretell(query)
            prompts = pool(query[:, : self.hidden_size] if pool.needs_query else None)
        if start is None or trace.wanted or not self._is_fixed(pixel_values, first):
            start = self._start(pixel_values, interpolate, first, trace)
        feature, tokens = self._for_head(call, start, first, prompts, trace)
        if pool.query_is_feature:
            call.query = feature.detach()
        if prompts.parts:
            features = self._features_of_parts(start, first, prompts)
            with without_autocast(pixel_values.device):
                prompts.losses.update(pool.compare(features))
        call.prompts = prompts
        if feature is not None:
            return self._output_of_feature(call, feature, trace)
        return self.family.output(tokens, self.family.pooler_output(self.base_layer, tokens), *trace.outputs)

    def _output_of_feature(self, call: Call, feature: torch.Tensor, trace: Trace) -> Any:
        """An output whose tokens are all the same feature (B, F): the head takes it, however the model pools it."""
        call.read = feature
        tokens = feature[:, None].expand(-1, self.family.num_special(self.base_layer) + 1, -1)
        return self.family.output(tokens, feature, *trace.outputs)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.family.hidden_size(self.base_layer)

    @property
    def learns(self) -> bool:
        """Whether the base encoder itself is trained."""
        return any(weight.requires_grad for weight in self.base_layer.parameters())

    @property
    def query_features(self) -> Features:
        """What `query` is made of: the CLS feature, and more if the active adapter's head reads more."""
        pool: PromptPool | None = self.active
        return CLS if pool is None else pool.config.query_features

    def _first_layer(self, pool: PromptPool, features: Features | None) -> int:
        """The lowest layer that is of the two passes' own, or whose output the head reads."""
        layers = 1 if features is None else features.layers
        layers = max(layers, self.query_features.layers if pool.needs_query else 1)
        first = min(pool.first_layer, len(self._layers) - layers)
        return first if pool.query_layer is None else min(first, pool.query_layer + 1)

    def _read(self, features: Features, start: State, first: int, prompts: Prompts, trace: Trace) -> torch.Tensor:
        """(B, parts x layers x D): the features of the last layers' outputs, from the input of layer `first` on."""
        if features == OWN:
            return self._pooled(*self._finish(start, first, prompts, "own", trace))
        outputs: list[tuple[torch.Tensor, int]] = []
        self._finish(start, first, prompts, "all" if features.reads_all or trace.wanted else "cls", trace, outputs)
        parts = []
        for hidden, kept in reversed(outputs[-features.layers :]):
            parts += [getattr(self.family, part)(self.base_layer, hidden[:, kept:]) for part in features.parts]
        return torch.cat(parts, dim=-1)

    def _pooled(self, hidden: torch.Tensor, kept: int) -> torch.Tensor:
        """What the base model's own classifier is given."""
        tokens = self.family.last_hidden_state(self.base_layer, hidden[:, kept:])
        return self.family.pooled(self.base_layer, tokens)

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
        hidden, kept = self._finish(self._start(pixel_values, False, 0, Trace()), 0, prompts, "all", Trace())
        return self.family.feature_norm(self.base_layer)(hidden), kept

    @torch.no_grad()
    def _query(self, pixel_values: torch.Tensor, interpolate: bool, first: int) -> tuple[torch.Tensor, State]:
        """The query (B, Q), and the input of layer `first` on the way to it."""
        pool: PromptPool | None = self.active
        last = None if pool is None else pool.query_layer
        with evaluation_mode(self.base_layer):
            start = self._start(pixel_values, interpolate, first, Trace())
            if last is not None:  # an early layer's output, where the pass ends
                return self._cls(self._through(start, first, last + 1, Trace()).hidden).clone(), start
            if self.query_features != CLS:
                return self._read(self.query_features, start, first, NO_PROMPTS, Trace()), start
            hidden, _ = self._finish(start, first, NO_PROMPTS, "cls", Trace())
            return self._cls(hidden).clone(), start  # not a view, which would keep all tokens

    def _cls(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, D): the CLS feature of a layer's output without prompt tokens."""
        norm = self.family.feature_norm(self.base_layer)
        if self.family.cls_is_first_token and is_watched([norm]):  # somebody's hook is to see all tokens
            return norm(hidden)[:, 0]
        return self.family.cls(self.base_layer, hidden)

    def _is_fixed(self, pixel_values: torch.Tensor, first: int) -> bool:
        """Whether the input of layer `first` is the same in both passes, and needs no graph in either."""
        below = [*self.family.below_layers(self.base_layer), *self._layers[:first]]
        modules = [module for part in below for module in part.modules()]
        if any(module.training and draws(module) for module in modules):
            return False
        if self.family.draws_positions(self.base_layer):
            return False
        learns = pixel_values.requires_grad or any(
            weight.requires_grad for part in below for weight in part.parameters()
        )
        return not (learns and torch.is_grad_enabled())

    @property
    def _layers(self) -> nn.ModuleList | list[nn.Module]:
        return self.family.layer_list(self.base_layer)

    def _start(self, pixel_values: torch.Tensor, interpolate: bool, first: int, trace: Trace) -> State:
        """Embeddings and the layers below `first`, which no prompt enters: (B, special tokens + patches, D)."""
        state = State(*self.family.embed(self.base_layer, pixel_values, interpolate))
        return self._through(state, 0, first, trace)

    def _through(self, state: State, first: int, end: int, trace: Trace) -> State:
        """The layers from `first` to before `end`, without prompts."""
        for index, layer in enumerate(self._layers[first:end], start=first):
            if trace.hidden_states is not None:
                trace.hidden_states.append(state.hidden)
            with recording(self.family, layer, trace.attentions):
                hidden = self._run_layer(layer, state, None)
            state = State(*self.family.after(self.base_layer, index, hidden, state.arguments))
        return state

    @torch.no_grad()
    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embeddings of all images' patches before the first layer, (patches of all images, width)."""
        with self.lock.held(), evaluation_mode(self.base_layer):
            tokens = self._start(pixel_values, self._interpolates(None), 0, Trace()).hidden
        return tokens[:, self.family.num_special(self.base_layer) :].flatten(0, -2)

    def _finish(
        self,
        start: State,
        first: int,
        prompts: Prompts,
        read: str,
        trace: Trace,
        outputs: list[tuple[torch.Tensor, int]] | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Run the layers from `first` on with `prompts`.

        Args:
            start: the input of layer `first`.
            read: what of the result is wanted: `"all"` tokens, what a `PromptPool.head_type` needs, or what the base
                model's own classifier does (`"own"`).
            outputs: takes each layer's output, and how many prompt tokens are in front of the CLS token there.

        Returns:
            The last layer's output, (B, prompts kept + special tokens + patches, D) or fewer tokens, and how many
            prompt tokens are in front of the CLS token.
        """
        kept, layers = 0, self._layers
        hidden, arguments = start
        if read == "own" and self.family.reads == "cls":
            read = "cls"
        # Attention knows no order: where tokens stand shows in hidden states and attentions alone.
        pool: PromptPool | None = self.active
        place = self.family.num_special(self.base_layer) if pool is not None and pool.behind_cls else 0
        at_the_front = read in READ_AT_THE_FRONT and self.family.cls_is_first_token and not place
        for index, layer in enumerate(layers[first:], start=first):
            injection = prompts.at(index, hidden)
            extra = 0
            if injection is not None and injection.tokens is not None:
                rows = injection.tokens
                if injection.cls_position:
                    rows = rows + self.family.cls_position(self.base_layer)
                extra = rows.shape[1]
                rows = rows.to(hidden.dtype).expand(hidden.shape[0], -1, -1)
                hidden = torch.cat([hidden[:, :place], rows, hidden[:, place:]], dim=1)
            if trace.hidden_states is not None:
                trace.hidden_states.append(hidden)
            is_kept = injection is None or injection.keep
            kept += extra if is_kept else 0
            span = None
            if layer is layers[-1] and at_the_front and is_kept and self._can_read(layer):
                span = (kept if read == "cls" else 0, kept + 1)
                kept -= span[0]
            with recording(self.family, layer, trace.attentions):
                hidden = self._run_layer(layer, State(hidden, arguments), injection, span)
            if not is_kept:
                hidden = in_front(hidden, place, extra)[:, extra:]
            if outputs is not None:
                outputs.append((in_front(hidden, place, kept), kept))
            hidden, arguments = self.family.after(self.base_layer, index, hidden, arguments)
        if trace.hidden_states is not None:
            trace.hidden_states.append(hidden)
        return in_front(hidden, place, kept), kept

    def _can_read(self, layer: nn.Module) -> bool:
        """Whether the last layer may be run for some of its tokens alone."""
        if not self.reads_last_layer or type(layer) is not self._tried:
            return False
        behind = (self, self.family.feature_norm(self.base_layer))
        return not is_watched([*layer.modules(), *behind])

    def _run_layer(
        self, layer: nn.Module, state: State, injection: Injection | None, span: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """One layer with its prefix, checkpointed if the user asked for it; with a `span`, for these tokens alone.

        The prefix is an argument of the checkpointed function, not an attribute left on the module: the recomputation
        in the backward pass sees the same prefix, and the reentrant mode finds the gradient of its tensors.
        """
        hidden, arguments = state
        prefix = (injection.keys, injection.values) if injection is not None and injection.keys is not None else ()
        if prefix and prefix[0].shape[-1] != hidden.shape[-1]:  # Swin: rows are as wide as the widest layer prompted
            prefix = tuple(rows[..., : hidden.shape[-1]] for rows in prefix)
        checkpointing = self.family.checkpointing(self.base_layer, layer)
        checkpointed = (
            getattr(checkpointing, "gradient_checkpointing", False)
            and layer.training
            and torch.is_grad_enabled()
            and any(tensor.requires_grad for tensor in (hidden, *prefix, *layer.parameters()))
        )

        def run(hidden: torch.Tensor, *prefix: torch.Tensor) -> torch.Tensor:
            if span is not None:
                return read_layer(self.family, layer, hidden, *span, *prefix)
            with self.family.prefixed(layer, hidden, *prefix), without_own_checkpointing(layer):
                return self.family.run(layer, hidden, arguments)

        if checkpointed:
            return checkpointing._gradient_checkpointing_func(run, hidden, *prefix)
        return run(hidden, *prefix)

    def _for_head(
        self, call: Call, start: State, first: int, prompts: Prompts, trace: Trace
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The feature (B, F) that the head reads; or, where it reads what the base model's own does, the encoder's
        tokens, which the base model pools itself."""
        family, encoder, pool = self.family, self.base_layer, self.active
        if call.features is not None:
            feature = self._read(call.features, start, first, prompts, trace)
            if call.features.query:
                feature = torch.cat([feature, call.query.to(feature.dtype)], dim=-1)
            return feature, None
        head_type = "own" if call.reads_own or pool.head_type == "cls" else pool.head_type
        # Who calls the encoder alone, or asks for what is on the way, gets all tokens. Before its first task an
        # adapter without prompts is the base model, to the bit.
        part = self.call is not None and not trace.wanted and pool.config.tasks
        read = head_type if part else "all"
        hidden, kept = self._finish(start, first, prompts, read, trace)
        if head_type != "own":
            count = {"prompt": kept, "cls+prompt": kept + 1, "mean": hidden.shape[1]}[head_type]
            return family.feature_norm(encoder)(hidden[:, :count]).mean(dim=1), None
        if pool.query_is_feature:
            return self._pooled(hidden, kept), None
        return None, family.last_hidden_state(encoder, hidden[:, kept:] if kept else hidden)

    def _features_of_parts(self, start: State, first: int, prompts: Prompts) -> dict[str, torch.Tensor]:
        """CLS feature (B, D) of the image under each part of the prompts alone."""
        features = {}
        for name, part in prompts.parts.items():
            hidden, kept = self._finish(start, first, part, "cls", Trace())
            features[name] = self._cls(hidden[:, kept:]).float()
        return features

    def _interpolates(self, given: bool | None) -> bool:
        """Whether position embeddings are interpolated: as the call says, or else the adapter's configuration."""
        said = given not in (None, self.family.unsaid)
        return given if said else self.active.config.interpolate_pos_encoding

    def _wanted(self, option: str, kwargs: dict[str, Any]) -> bool:
        value = kwargs.get(option)
        config = getattr(self.base_layer, "config", None)
        return bool(getattr(config, option, False) if value is None else value)
