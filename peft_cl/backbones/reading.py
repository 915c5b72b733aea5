"""The last layer, for the tokens that the head reads."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .attention import attention_function
from .family import Family
from .modes import without_autocast


def read_layer(
    family: Family, layer: nn.Module, hidden: torch.Tensor, start: int, stop: int, *prefix: torch.Tensor
) -> torch.Tensor:
    """`layer(hidden)[:, start:stop]` without computing the other tokens.

    All tokens are keys and values, so their projections remain; queries, output projection and MLP, five sixths of a
    layer's products, are done for the tokens that are read.

    Args:
        layer: a layer for which `can_read` holds.
        hidden: (B, N, D), the layer's input.
        start, stop: the tokens wanted.
        *prefix: keys and values of the prefix, (B or 1, L, D), or nothing.

    Returns:
        (B, stop - start, D)
    """
    attention = family.attention_of(layer)
    query, key, value, output = (getattr(attention, name) for name in family.projections)
    norm_before, norm_after = (getattr(layer, name) for name in family.norms)
    scaling, dropout = (
        _named(attention, *names) for names in (("scaling", "scale"), ("attention_dropout", "dropout"))
    )
    read = hidden[:, start:stop]
    normed = norm_before(hidden)

    def heads(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def through(branch: tuple[str, ...], rows: torch.Tensor) -> torch.Tensor:
        for name in branch:
            rows = getattr(layer, name)(rows)
        return rows

    with family.prefixed(layer, hidden, *prefix):
        mixed, _ = attention_function(attention, attention.config)(
            attention,
            # A product with rows that lie apart would copy the weight for each image.
            heads(query(normed[:, start:stop].contiguous())),
            heads(key(normed)),
            heads(value(normed)),
            None,
            dropout=dropout if attention.training else 0.0,
            scaling=scaling,
        )
    after_attention, after_mlp = family.branches
    read = read + through(after_attention, output(mixed.flatten(2)))
    return read + through(after_mlp, getattr(layer, family.mlp)(norm_after(read)))


def _named(module: nn.Module, *names: str) -> float:
    """The first of these attributes that the module has."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


def can_read(family: Family, layer: nn.Module) -> bool:
    """Whether `read_layer` gives what the layer gives: its parts are as the family's row says, and a try agrees.

    A layer of another make, or of another version of transformers, is then simply run whole. A copy is tried, on the
    CPU and in double precision: what a device or an attention kernel cannot do, or rounds, must not decide.
    """
    weights = next(layer.parameters(), None)
    if weights is None or any(is_traceable_wrapper_subclass(each) or each.is_meta for each in layer.parameters()):
        return False  # nothing to try, or weights (quantised, say) that cannot be tried in double precision
    generator = torch.Generator().manual_seed(0)
    try:
        layer = copy.deepcopy(layer).to("cpu", torch.float64).eval()
        attention = family.attention_of(layer)
        attention.config._attn_implementation = "eager"
        width = getattr(attention, family.projections[0]).in_features
        with torch.no_grad(), without_autocast(torch.device("cpu")):
            hidden = torch.randn(2, 5, width, generator=generator, dtype=torch.float64)
            expected = family.run(layer, hidden, family.arguments)
            found = read_layer(family, layer, hidden, 1, 3)
    except (AttributeError, TypeError, RuntimeError, StopIteration):
        return False
    return torch.allclose(found, expected[:, 1:3], rtol=0, atol=1e-9 * expected.abs().max().item())


def is_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody's hooks are on one of the modules: they are to see all tokens."""
    return any(True for _ in hooks_of(modules))


def hooks_of(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """Somebody's hooks on the modules, and what stands in the place of their own forwards (accelerate's hooks do).

    Hooks on all modules that there are do not count: who counts operations wants those that are done.
    """
    for module in modules:
        if "forward" in module.__dict__:
            yield module.__dict__["forward"]
        for hooks in (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
            yield from hooks.values()
        yield from (hook for hook in module._forward_hooks.values() if not _is_of_transformers(hook))


def _is_of_transformers(hook: Any) -> bool:
    """Whether it is the hook that transformers leaves on layers for good once hidden states were asked for."""
    return getattr(hook, "__qualname__", "").endswith(".<locals>.output_capturing_hook")
