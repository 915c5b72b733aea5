"""Learning rates of their own for the parts of an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn


#: Parts that may have a rate; the name of a pool's parameter goes before "pool", which means all of them. The backbone
#: has trained weights under strategies that train it.
PARTS = ("prompts", "g_prompts", "keys", "attention", "query_projection", "head", "pool", "backbone")


def check_rates(rates: dict[str, float] | None) -> None:
    """Raise a `ValueError` for a part that does not exist or a rate that is none."""
    check_by_part("learning_rates", "rate", rates, "{'prompts': 0.005}", "of at least 0", lambda rate: rate >= 0)


def check_by_part(
    setting: str,
    what: str,
    values: dict[str, float] | None,
    example: str,
    rule: str,
    holds: Callable[[float], bool],
) -> None:
    """Refuse what gives no finite numbers to parts.

    Args:
        setting: the argument's name.
        what: what a number is called.
        values: by the name of the part; None: nothing is set.
        example: values that will do.
        rule: what a number must be.
        holds: whether it is.

    Raises:
        ValueError: it names the part, its value and the rule.
    """
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{setting} is {values!r}, but must be {what}s by part, such as {example}.")
    for name, value in (values or {}).items():
        if name not in PARTS:
            raise ValueError(f"{setting} names {name!r}, but the parts are {', '.join(PARTS)}. Name these.")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
        if not is_number or not holds(value):
            raise ValueError(f"{setting} gives {name!r} the {what} {value!r}, but a {what} must be a number {rule}.")


def check_parts(setting: str, values: dict[str, float] | None, model: nn.Module) -> None:
    """Raise a `ValueError` for a value that no parameter in `model` would have; a frozen backbone has none.

    Args:
        setting: the argument's name.
        values: by the name of the part.
    """
    values = values or {}
    if "backbone" in values and not any(
        parameter.requires_grad and part_of(name, values) == "backbone" for name, parameter in model.named_parameters()
    ):
        raise ValueError(
            f"{setting} names backbone, but the backbone is frozen. Take the name out, or give a strategy that "
            "trains the backbone, such as FineTuning()."
        )
    used = {part_of(name, values) for name, _ in model.named_parameters()}
    unused = [part for part in values if part not in used]
    if unused:
        raise ValueError(
            f"{setting} names {', '.join(unused)}, but this adapter has no such part, or all of it has values of its "
            "own. Take the name out."
        )


def set_rates(optimizer: torch.optim.Optimizer, model: nn.Module, rates: dict[str, float]) -> None:
    """Split the optimizer's groups where parameters of `model` have rates of their own; all else in a group stays."""
    parts = {parameter: part_of(name, rates) for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        for part in (None, *rates):
            chosen = [parameter for parameter in group["params"] if parts[parameter] == part]
            if chosen:
                groups.append({**group, "params": chosen, "lr": rates.get(part, group["lr"])})
    optimizer.param_groups[:] = groups


def part_of(name: str, rates: dict[str, float]) -> str | None:
    """The entry of `rates` that holds for the parameter `name`, or None.

    Example:
        >>> part_of("vit.coda_pool.default.prompts", {"prompts": 0.01, "pool": 0.001})
        'prompts'
        >>> part_of("vit.coda_pool.default.keys", {"prompts": 0.01, "pool": 0.001})
        'pool'
    """
    components = name.split(".")
    container = next((part for kind in ("pool", "head") for part in components if part.endswith(f"_{kind}")), None)
    if container is None:
        return "backbone" if "backbone" in rates else None
    # Behind the container comes the adapter's name, which may be any word, and then the parameter's.
    exact = next((part for part in components[components.index(container) + 2 :] if part in rates), None)
    kind = container.rpartition("_")[2]
    return exact or (kind if kind in rates else None)
