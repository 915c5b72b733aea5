"""What an interrupted run and the one that goes on with it must have in common: all that was learnt so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


#: Facts of a scenario that are told task by task, and that change where an image is mended or left out.
SIZES = ("train_sizes", "test_sizes")
#: Settings that have no part in what was learnt: of the data, digests tell more than a name that a folder may change.
NO_PART = ("bad_images", "passed_over", "dataset")


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


def has_same_images(before: Mapping[str, Any], now: Mapping[str, Any], task: str) -> bool:
    """Whether the images of a task are those of the run before."""

    def facts(settings: Mapping[str, Any]) -> list[Any]:
        scenario = settings["scenario"]
        number = scenario["task_names"].index(task)
        return [settings["examples"].get(task), *(scenario[name][number] for name in SIZES)]

    return facts(before) == facts(now)
