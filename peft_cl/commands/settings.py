"""What one run is: a configuration turned into checked objects, before anything is loaded."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from transformers.processing_utils import ImagesKwargs

from ..hub.terms import NOT_SETTINGS
from ..scenarios import RandomResizedCropFlip
from ..scenarios.pixels import BACKGROUND, WHITE_VALUE
from ..text import brief
from ..trainer import ContinualTrainingArguments, Strategy
from ..trainer.strategy import STRATEGIES
from ..tuners.base.config import PromptPoolConfig
from .adapters import SavedAdapter
from .earlier import make_earlier_test
from .errors import CommandError, explained, unknown
from .methods import METHODS, Method
from .options import check_names, convert, fill
from .own_metrics import make_metrics
from .sections import ONLY, SEQUENCE, STREAM, DatasetSettings, ModelSettings, ScenarioSettings


SECTIONS = (
    "model",
    "processor",
    "method",
    "preset",
    "adapter",
    "continue_from",
    "earlier_test",
    "strategy",
    "dataset",
    "scenario",
    "augmentation",
    "training",
    "metrics",
    "output_dir",
)
SCALED_RATE = "learning_rate_per_256"


@dataclass(frozen=True)
class RunSettings:
    """A run, checked as far as it can be without its model and its data."""

    method_name: str
    method: Method
    preset: str | None
    adapter: PromptPoolConfig
    strategies: list[Strategy]
    continue_from: SavedAdapter | None
    earlier_test: dict[str, DatasetSettings] | None
    model: ModelSettings
    processor: dict[str, Any]
    datasets: dict[str, DatasetSettings]
    scenario: ScenarioSettings
    augmentation: RandomResizedCropFlip | None
    training: ContinualTrainingArguments
    metrics: list[Callable]
    learning_rate_note: str
    output_dir: str


def make_settings(config: dict[str, Any], earlier: SavedAdapter | None = None) -> RunSettings:
    """Turn the sections of a configuration into settings.

    Args:
        config: The sections.
        earlier: The adapter to continue from, which then says method and settings, and its base model by default.

    Raises:
        CommandError: An unknown section or name, a value of another type or out of range, or a section that is
            missing; the message says which, the rule and the remedy.
    """
    for name in sorted(config, key="methods".__ne__):  # what says most of a file comes first
        if name not in SECTIONS:
            raise unknown_section(name)
    for name in ("method", "preset", "output_dir"):
        if not isinstance(config.get(name), (str, type(None))):
            raise CommandError(f"{name} is {brief(config[name])}, but must be text. Give one name.")
    model = fill("model", ModelSettings, _model_values(config.get("model"), earlier))
    method_name, method, preset, adapter = (
        _make_adapter(config) if earlier is None else _take_over(config, earlier.config)
    )
    if method.trains_backbone and model.dtype != "float32":
        raise CommandError(
            f"model.dtype is {model.dtype}, but {method_name} trains the backbone, whose small steps are lost in 16 "
            "bits. Set model.dtype to float32 (and training.bf16 to true, for speed on a GPU)."
        )
    output_dir = config.get("output_dir")
    if not isinstance(output_dir, str) or not output_dir:
        raise CommandError("output_dir is missing: it names the folder for adapter and results. Give one.")
    training, note = _make_arguments(config.get("training"), output_dir)
    scenario = fill("scenario", ScenarioSettings, config.get("scenario"))
    return RunSettings(
        method_name=method_name,
        method=method,
        preset=preset,
        adapter=adapter,
        strategies=_make_strategies(config.get("strategy"), method),
        continue_from=earlier,
        earlier_test=make_earlier_test(config.get("earlier_test"), earlier),
        model=model,
        processor=check_names(
            "processor", config.get("processor"), (*ImagesKwargs.__annotations__, BACKGROUND, WHITE_VALUE)
        ),
        datasets=_make_datasets(config.get("dataset"), scenario.kind),
        scenario=scenario,
        augmentation=_make_augmentation(config.get("augmentation")),
        training=training,
        metrics=make_metrics(config.get("metrics")),
        learning_rate_note=note,
        output_dir=training.output_dir,  # without ~
    )


def unknown_section(name: str) -> CommandError:
    """Make the error for a section that there is none of, with where a setting of its name is."""
    if name == "search":
        return CommandError("The section search is for `peft-cl tune`. Take it out, or give the file to that command.")
    if name == "methods":
        return CommandError("methods is a section of a suite. Give the file to `peft-cl compare`.")
    error = unknown("section", name, SECTIONS)
    owners = {
        "training": ContinualTrainingArguments.__dataclass_fields__,
        "dataset": DatasetSettings.__dataclass_fields__,
        "scenario": ScenarioSettings.__dataclass_fields__,
    }
    found = [section for section, names in owners.items() if name in names]
    # The commonest slip: a setting without its section.
    return CommandError(f"{error} {found[0]}.{name} exists: put it there.") if found else error


def _expand(values: Any, name: str) -> Any:
    return {name: values} if isinstance(values, str) else values


def _model_values(values: Any, earlier: SavedAdapter | None) -> Any:
    values = _expand(values, "name")
    if earlier is None:
        return values
    return earlier.complete(check_names("model", values, ModelSettings.__dataclass_fields__))


def _make_datasets(values: Any, kind: str) -> dict[str, DatasetSettings]:
    """The section `dataset`: one, or for a sequence of several a mapping of names to what else is the section."""
    if kind != SEQUENCE:
        return {ONLY: fill("dataset", DatasetSettings, _expand(values, "path"))}
    if not isinstance(values, dict) or not all(isinstance(each, (str, dict)) for each in values.values()):
        raise CommandError(
            f"dataset is {brief(values)}, but a {SEQUENCE} has several: a mapping such as `{{mnist: ylecun/mnist, "
            "svhn: {path: ufldl-stanford/svhn, name: cropped_digits}}`."
        )
    if values and set(values) <= set(DatasetSettings.__dataclass_fields__):
        raise CommandError(
            f"dataset has the settings {', '.join(values)} of one data set, but a {SEQUENCE} has several, each by a "
            "name of your own: a mapping such as `{mnist: ylecun/mnist, svhn: {path: ufldl-stanford/svhn, name: "
            "cropped_digits}}`. For one data set set scenario.kind to another."
        )
    found = {name: fill(f"dataset.{name}", DatasetSettings, _expand(each, "path")) for name, each in values.items()}
    for name, each in found.items():
        same = next((other for other in found if other != name and found[other] == each), None)
        if same is not None:
            raise CommandError(f"dataset.{name} and dataset.{same} are the same data, {each.path!r}. Take one out.")
    return found


def _make_adapter(config: dict[str, Any]) -> tuple[str, Method, str | None, PromptPoolConfig]:
    name = config.get("method")
    if name is None:
        raise CommandError(f"method is missing. Give one of {', '.join(METHODS)}.")
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    method, preset = METHODS[name], config.get("preset")
    config_class = method.config_class
    if preset is not None and preset not in config_class.presets:
        raise unknown(f"preset of {name}", preset, config_class.presets)
    known = [field.name for field in fields(config_class) if field.name not in NOT_SETTINGS]
    values = check_names("adapter", config.get("adapter"), known)
    hints = get_type_hints(config_class)
    for setting, value in values.items():
        convert(f"adapter.{setting}", value, hints[setting])
    with explained("adapter is wrong"):
        if preset is None and method.preset and config.get("strategy") is None:
            preset = method.preset
            scenario = config.get("scenario")
            if isinstance(scenario, dict) and scenario.get("kind") == STREAM:  # which has no first task
                values = {"train_prompts": "every_task", "drift_compensation": None, **values}
        return name, method, preset, method.configure(preset, **values)


def _take_over(config: dict[str, Any], earlier: PromptPoolConfig) -> tuple[str, Method, str | None, PromptPoolConfig]:
    given = [name for name in ("preset", "adapter") if config.get(name) is not None]
    if given:
        raise CommandError(
            f"continue_from takes the settings from the adapter, but {' and '.join(given)} are given too. Take them "
            f"out, for instance by {' '.join(f'--{name} null' for name in given)}."
        )
    fitting = [name for name, method in METHODS.items() if method.fits(earlier)]
    name = config.get("method") or (fitting[0] if len(fitting) == 1 else None)
    if name not in fitting:
        raise CommandError(
            f"The adapter is one of {', '.join(fitting)}, and method is {brief(name)}. "
            + ("Leave method out." if len(fitting) == 1 else "Set method to one of these: how it is to learn on.")
        )
    return name, METHODS[name], None, earlier


def _make_strategies(values: Any, method: Method) -> list[Strategy]:
    """The section `strategy`: a name, a list of names, or a mapping of names and their settings; with the method's
    own, which may stand there with other settings."""
    strategies: list[Strategy] = []
    if isinstance(values, list) and all(isinstance(name, str) for name in values):
        values = {name: name for name in values}
    for name, settings in check_names("strategy", _expand(values, values) or {}, STRATEGIES).items():
        known = [each for each in inspect.signature(STRATEGIES[name]).parameters if each not in ("args", "kwargs")]
        given = check_names(f"strategy.{name}", None if settings == name else settings, known)
        with explained("strategy is wrong"):
            strategies.append(STRATEGIES[name](**given))
    has_own = any(type(each) is method.strategy_class for each in strategies)
    return strategies if has_own else [method.strategy_class(), *strategies]


def _make_augmentation(values: Any) -> RandomResizedCropFlip | None:
    if values is None or values is False or values == "none":
        return None
    return fill("augmentation", RandomResizedCropFlip, values)


def _make_arguments(values: Any, output_dir: str) -> tuple[ContinualTrainingArguments, str]:
    """Returns the arguments, and how the learning rate came about."""
    values = check_names("training", values, _settable_arguments())
    values = {name: value for name, value in values.items() if value is not None}  # null: the default
    if SCALED_RATE in values and "learning_rate" in values:
        raise CommandError(
            f"training has both learning_rate ({values['learning_rate']}) and {SCALED_RATE} ({values[SCALED_RATE]}). "
            f"Keep one; on the command line `--training.{SCALED_RATE} null` takes the other out."
        )
    with _named(values):
        arguments = fill("training", ContinualTrainingArguments, values, output_dir=output_dir)
    if arguments.device.type == "cpu":
        arguments.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns of it
        arguments.accelerator_config.non_blocking = False
    note = f"{arguments.learning_rate:g}"
    if arguments.learning_rate_per_256 is not None:
        note += f" = {arguments.learning_rate_per_256:g} x {arguments.images_per_step} images in a step / 256"
    return arguments, note


@contextmanager
def _named(values: Mapping[str, Any]) -> Iterator[None]:
    """Of a value that a library refuses, name the setting: `epoh is not a valid IntervalStrategy` does not."""
    try:
        yield
    except CommandError as error:
        text = str(error)
        found = [name for name, value in values.items() if re.search(rf"(?<!\w){re.escape(str(value))}\b", text)]
        if len(found) != 1 or found[0] in text:
            raise
        own = f"training.{found[0]} is {brief(values[found[0]])}"
        raise CommandError(f"{own}. {text}. Give another value.") from error


def _settable_arguments() -> list[str]:
    known = ContinualTrainingArguments.__dataclass_fields__
    return [name for name in known if known[name].init and name != "output_dir"]
