"""What an interrupted run and the one that goes on with it must have in common: all that was learnt so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


#: Facts of a scenario that are told task by task, and that change where an image is mended or left out.
SIZES = ("train_sizes", "test_sizes")
#: Settings that have no part in what was learnt: of the data, digests tell more than a name that a folder may change.
NO_PART = ("bad_images", "passed_over", "dataset")

#: Images of a step on a device: so many at once, so often.
STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")


def of_finished_tasks(settings: Mapping[str, Any], finished: int) -> dict[str, Any]:
    """The settings of a run without the images of tasks that are still to be learnt.

    An image of these that could not be read may have been mended or left out; of what was learnt nothing may change.
    """
    scenario, examples = settings["scenario"], settings["examples"]
    learnt = scenario["task_names"][:finished]
    return {
        **{name: value for name, value in settings.items() if name not in NO_PART},
        "scenario": {**scenario, **{name: scenario[name][:finished] for name in SIZES}},
        "examples": {name: digest for name, digest in examples.items() if name in learnt},
    }


def alike(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both settings without how the images of a step come, if they are as many: two times four are those of eight, and
    what is learnt from them is the same but for rounding."""
    told = all(name in each for name in STEP for each in (before, now))
    if told and _images(before) == _images(now) and not any(map(_has_own_steps, (before, now))):
        before, now = ({name: value for name, value in each.items() if name not in STEP} for each in (before, now))
    return dict(before), dict(now)


def _has_own_steps(settings: Mapping[str, Any]) -> bool:
    """Whether some task has steps of its own, which the settings of the run say nothing of."""
    return any(name in values for values in (settings.get("per_task") or {}).values() for name in STEP)


def _images(settings: Mapping[str, Any]) -> Any:
    batch, accumulated = (settings[name] for name in STEP)
    return batch * accumulated if isinstance(batch, int) and isinstance(accumulated, int) else [batch, accumulated]


def has_same_images(before: Mapping[str, Any], now: Mapping[str, Any], task: str) -> bool:
    """Whether the images of a task are those of the run before."""

    def facts(settings: Mapping[str, Any]) -> list[Any]:
        scenario = settings["scenario"]
        number = scenario["task_names"].index(task)
        return [settings["examples"].get(task), *(scenario[name][number] for name in SIZES)]

    return facts(before) == facts(now)
