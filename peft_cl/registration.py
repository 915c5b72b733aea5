"""Enters a method's name in PEFT's registries, so that the stock PEFT functions find it.

PEFT keeps its methods in the enum `PeftType` and has no hook for a member from outside. `peft.register_peft_method`
refuses a name that the enum lacks, so the member is added first; everything after that is PEFT's own registration.
"""

from __future__ import annotations

import enum

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType


def add_peft_type(name: str) -> PeftType:
    """Return the member `name` of `PeftType`, adding it if PEFT does not have it (yet).

    Args:
        name: the member's name and value, upper case (`"L2P"`).

    Returns:
        The member: equal to its string, with PEFT's usual `.name` and `.value`, found by `PeftType(name)`, stable
        under pickle and deepcopy.

    Raises:
        RuntimeError: if `PeftType` is no longer a string enum, that is, if PEFT changed under us.

    Example:
        >>> add_peft_type("L2P") is add_peft_type("L2P")
        True
    """
    if name in PeftType.__members__:
        return PeftType[name]
    if not (issubclass(PeftType, str) and issubclass(PeftType, enum.Enum)):
        raise RuntimeError(
            f"peft_cl adds {name!r} to peft.PeftType, which must be a string enum but is {PeftType.__mro__}. "
            "Install the tested PEFT version (constraints.txt)."
        )
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # EnumMeta refuses to assign members; a member that is being made is the one exception we need.
    type.__setattr__(PeftType, name, member)
    return member


def register_method(name: str, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> PeftType:
    """Register a method under `name` (lower case); its parameters carry the prefix `f"{name}_"`.

    Args:
        name: the method's name in saved configs (in upper case) and in parameter names.
        config_class: sets `self.peft_type` to the member of this name in its `__post_init__`.
        model_class: its `prefix` is `f"{name}_"`.

    Raises:
        KeyError: another class has this name. The same class again is fine: a module may be reloaded.

    Example:
        >>> register_method("mymethod", MyConfig, MyModel)  # doctest: +SKIP
        <PeftType.MYMETHOD: 'MYMETHOD'>
    """
    member = add_peft_type(name.upper())
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is not None and _address(known) == _address(config_class):
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_class
        PEFT_TYPE_TO_TUNER_MAPPING[member] = model_class
        return member
    register_peft_method(name=name, config_cls=config_class, model_cls=model_class, prefix=f"{name}_")
    return member


def _address(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
