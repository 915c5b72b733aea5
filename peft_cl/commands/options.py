"""Reading a configuration: the YAML file, the changes from the command line, and values put into dataclasses."""

from __future__ import annotations

import re
import types
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ..text import brief
from .errors import CommandError, explained, unknown


T = TypeVar("T")


#: Of a configuration: characters, and values in it once aliases stand for what they name.
LARGEST_TEXT, MOST_VALUES = 1_000_000, 100_000


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML's 1.1 surprises: 1e-3 is a number; `no`, 001, 0x1, 1_000, 1:30 and 2020-01-01 are words,
    as they may be names. A repeated key is refused, and so is what aliases would make huge."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"its aliases stand for more than {MOST_VALUES:,} values; write out what is meant", None
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        counts = Counter(key.value for key in keys)
        repeated = [key for key in keys if counts[key.value] > 1]
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"{repeated[-1].value} stands there more than once. Take one out", repeated[-1].start_mark
            )
        return super().construct_mapping(node, deep)


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node stands for, aliases followed; each node is counted once and remembered."""
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise yaml.constructor.ConstructorError(None, None, "an alias names what it is in", node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0  # under way
    parts = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
    inside = [] if isinstance(node, yaml.ScalarNode) else parts
    sizes[id(node)] = 1 + sum(_expanded_size(each, sizes) for each in inside)
    return sizes[id(node)]


_INTEGER = "tag:yaml.org,2002:int"
_REPLACED = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", _INTEGER, "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_REPLACED[0], re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _REPLACED[1],
    re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+|\.[0-9]+|[0-9]+\.[0-9]*|\.(?:inf|nan))$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(_INTEGER, re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader`, or any reader of YAML 1.1, would take for something else."""


_Dumper.yaml_implicit_resolvers = {
    first: _Loader.yaml_implicit_resolvers.get(first, []) + yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
    for first in {**_Loader.yaml_implicit_resolvers, **yaml.SafeDumper.yaml_implicit_resolvers}
}


def write_yaml(value: Any) -> str:
    """A configuration as text, which `read_config` reads as the same values.

    Example:
        >>> write_yaml({"class_order": ["1e3", 2]})
        "class_order:\\n- '1e3'\\n- 2\\n"
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, source: str) -> Any:
    """Read YAML; `source` names where it comes from in the error."""
    if len(text) > LARGEST_TEXT:
        raise CommandError(
            f"{source} has {len(text):,} characters, but at most {LARGEST_TEXT:,} are read. Shorten it."
        )
    try:
        loader = _Loader(text)
        loader.name = source
        return loader.get_single_data()
    except RecursionError:
        raise CommandError(f"{source} is nested too deeply. Take brackets out.") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a number of 5,000 digits, a list as a key
        raise CommandError(f"{source} is not readable as YAML: {' '.join(str(error).split())[:500]}") from error


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a configuration file: a mapping of sections."""
    path = Path(path)
    if not path.is_file():
        raise CommandError(f"There is no configuration file {str(path)!r}. Give the path of a YAML file.")
    with explained(f"{path} cannot be read"):
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST_TEXT + 1)
    config = parse_yaml(text, str(path))
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise CommandError(f"{path} holds no sections. It must be a mapping such as `method: l2p`, one line for each.")
    return config


def split_overrides(
    arguments: Sequence[str], flags: Collection[str], options: Collection[str] = ()
) -> tuple[list[str], list[tuple[str, Any]]]:
    """Divide a command line into what argparse knows and the changes `--dotted.key value` (or `--dotted.key=value`).

    Args:
        arguments: The words after `train` or `tune`.
        flags: Options that belong to argparse and take no value.
        options: Options that belong to argparse and take one.

    Returns:
        The words for argparse, and the pairs of key and value, read as YAML.

    Example:
        >>> split_overrides(["run.yaml", "--training.learning_rate", "1e-3", "--overwrite"], ["--overwrite"])
        (['run.yaml', '--overwrite'], [('training.learning_rate', 0.001)])
    """
    rest, overrides = [], []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word in flags:
            rest.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise CommandError(f"--{key} has no value. Write `--{key} VALUE`.")
            value = words.pop(0)
        if f"--{key}" in options:
            rest += [f"--{key}", value]
            continue
        overrides.append((key, parse_yaml(value, f"The value of --{key}, {brief(value)},")))
    return rest, overrides


def apply_overrides(config: dict[str, Any], overrides: Sequence[tuple[str, Any]], names: Collection[str]) -> None:
    """Set dotted keys in the configuration, in place; a section that is missing is made.

    Args:
        config: Sections as `read_config` gives them.
        overrides: Pairs of dotted key and value.
        names: The sections there may be.
    """
    for key, value in overrides:
        section, *path = key.split(".")
        if section not in names:
            raise unknown("option or section", section, names, prefix="--")
        place, name = config, section
        for step in path:
            if not isinstance(place.get(name), dict):
                if place.get(name) is not None:
                    raise CommandError(
                        f"--{key} sets a part of {name}, but {name} is {brief(place[name])}. Set --{section} itself."
                    )
                place[name] = {}
            place, name = place[name], step
        place[name] = value


def check_names(section: str, values: Any, known: Collection[str]) -> dict[str, Any]:
    """Return the section's values as a dict with known names only; a section left empty has none."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise CommandError(f"{section} is {brief(values)}, but must be a mapping of names and values.")
    for name in values:
        if name not in known:
            raise unknown("setting", name, known, prefix=f"{section}.")
    return values


def fill(section: str, cls: type[T], values: Any, leave_out: Collection[str] = (), **given: Any) -> T:
    """Make a dataclass from a section's values, with names and types checked.

    Args:
        section: Name of the section, for messages.
        cls: The dataclass.
        values: The section's values by name; `None`: none.
        leave_out: Fields that cannot be set by the user.
        **given: Fields set by the program.

    Raises:
        CommandError: An unknown name, a value of another type, or one that the class refuses.
    """
    settable = [field.name for field in fields(cls) if field.init and field.name not in leave_out]
    values = check_names(section, values, [name for name in settable if name not in given])
    for field in fields(cls):
        required = field.default is MISSING and field.default_factory is MISSING and field.init
        if required and field.name not in {*values, *given}:
            raise CommandError(f"{section}.{field.name} is missing: {field.metadata['help']} Give `{section}:` one.")
    hints = get_type_hints(cls)
    converted = {name: convert(f"{section}.{name}", value, hints.get(name, Any)) for name, value in values.items()}
    with explained(f"{section} is wrong"):
        return cls(**given, **converted)


def convert(name: str, value: Any, hint: Any) -> Any:
    """Return the value as the type hint has it: a whole number may stand for a float, a list for a tuple.

    Hints other than numbers, text, `Literal`, lists, tuples and unions of these are not checked.
    """
    for choice in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        matches, converted = _match(name, value, choice)
        if matches:
            return converted
    remedy = ""
    if not isinstance(value, (str, list, dict)) and "text" in _words(hint):
        remedy = " A name that looks like a number, a truth value or null needs quotes (on the command line '\"1\"')."
    raise CommandError(f"{name} is {brief(value)}, but must be {_words(hint)}.{remedy}")


def _match(name: str, value: Any, hint: Any) -> tuple[bool, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (None, type(None)):
        return value is None, None
    if hint is Any:
        return True, value
    if origin is Literal:
        return value in arguments, value
    if hint in (bool, str):
        return isinstance(value, hint), value
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool), value
    if origin in (list, tuple):
        return _match_items(name, value, origin, arguments)
    if origin is dict:
        return isinstance(value, dict), value
    if isinstance(hint, type):
        return isinstance(value, hint), value
    return True, value


def _match_items(name: str, value: Any, origin: type, arguments: tuple) -> tuple[bool, Any]:
    if not isinstance(value, (list, tuple)):
        return False, value
    is_open = origin is list or arguments[-1] is Ellipsis
    if not is_open and len(arguments) != len(value):
        return False, value
    kinds = [arguments[0]] * len(value) if is_open else arguments
    items = [convert(f"{name}[{i}]", item, kind) for i, (item, kind) in enumerate(zip(value, kinds, strict=True))]
    return True, origin(items)


def _words(hint: Any) -> str:
    """Say a type hint in words: `float | None` becomes "a number or null"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(choice) for choice in arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (list, dict):
        return "a list" if origin is list else "a mapping"
    if origin is tuple:
        return f"a list of {len(arguments)}"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return plain.get(hint, getattr(hint, "__name__", str(hint)))
