"""One trial of a search: a run of `peft-cl train` on the first tasks, judged on held-out training images."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..metrics import RunResults
from ..scenarios import Scenario
from ..text import plain
from ..trainer import ContinualTrainer
from ..trainer.checks import check_scenario
from ..trainer.files import remove
from ..tuning.holdout import first_tasks, hold_out
from ..tuning.search import FAILED, FINISHED, PRUNED, Outcome, Watch
from .errors import CommandError, explained
from .sections import DatasetSettings
from .settings import RunSettings, make_settings
from .sources import load_pair
from .train import make_trainer
from .tune_input import of_a_trial, with_settings


@dataclass(frozen=True)
class Plan:
    """What all trials of a search have in common.

    Attributes:
        tasks: Number of tasks, the first ones of the scenario.
        holdout: Share of each class's training images that is held out.
        holdout_seed: Draws these.
        seeds: Training seeds; a trial is judged by the mean over them.
        metric: What is judged by, one of the record's metrics.
        folder: Where the records of the trials go.
    """

    tasks: int
    holdout: float
    holdout_seed: int
    seeds: tuple[int, ...]
    metric: str
    folder: Path


class TrialTrainer(ContinualTrainer):
    """A trainer that writes no adapter, no state to go on from, and no card."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.progress.say = lambda line: None  # the search says how far it is

    def save(self) -> None:
        pass

    def save_snapshot(self) -> None:
        pass


class Trials:
    """Makes trials of a search: `trials(number, settings, watch)` learns the tasks and returns the outcome.

    Args:
        config: Sections of the run, without those of the search.
        plan: What the trials have in common.
    """

    def __init__(self, config: Mapping[str, Any], plan: Plan):
        self.config, self.plan = config, plan

    @cached_property
    def whole(self) -> Scenario:
        """All tasks, with held-out training images in the place of the test images, which are not read."""
        settings = self.base
        with explained("Training images cannot be held out"):
            parts = {name: self._divided(each, settings) for name, each in settings.datasets.items()}
        with explained("With held-out training images in the place of test images, the tasks cannot be made"):
            return settings.scenario.make(parts, settings.datasets)

    @cached_property
    def scenario(self) -> Scenario:
        """The tasks that a trial learns."""
        with explained("The first tasks cannot be judged on held-out training images"):
            return first_tasks(self.whole, self.plan.tasks)

    @property
    def base(self) -> RunSettings:
        """The configuration's own settings; data and scenario are the same in all trials."""
        return make_settings({**self.config, "output_dir": str(self.plan.folder)})

    def _divided(self, data: DatasetSettings, settings: RunSettings) -> tuple[Any, Any]:
        train, _ = load_pair(data)
        columns = [data.label_column]
        if settings.scenario.kind == "domain-incremental":
            columns.append(settings.scenario.domain_column or "domain")
        return hold_out(train, columns, self.plan.holdout, self.plan.holdout_seed)

    def __call__(self, number: int, settings: Mapping[str, Any], watch: Watch) -> Outcome:
        """Make a trial; what goes wrong in it is its outcome, and stops no other."""
        began = time.perf_counter()
        try:
            metrics = self._measured(number, settings, watch)
            outcome = Outcome(PRUNED if metrics is None else FINISHED, metrics or {})
        except CommandError as error:
            outcome = Outcome(FAILED, reason=str(error))
        except Exception as error:
            outcome = Outcome(FAILED, reason=plain(f"{type(error).__name__}: {' '.join(str(error).split())}", 1000))
        if outcome.state != FINISHED:
            remove(self.plan.folder / f"{number:04d}")
        free_memory()
        return Outcome(outcome.state, outcome.metrics, time.perf_counter() - began, outcome.reason)

    def _measured(self, number: int, settings: Mapping[str, Any], watch: Watch) -> dict[str, float] | None:
        """The metrics, means over the seeds; None if the trial was given up."""
        found: list[Mapping[str, float]] = []
        for seed in self.plan.seeds:
            folder = self.plan.folder / f"{number:04d}" / f"seed_{seed}"
            remove(folder)  # of an interrupted process
            try:
                trainer = self.trainer(with_settings(self.config, settings), seed, folder)
                results = self._learnt(trainer, watch, len(found) * self.plan.tasks)
            finally:
                remove(folder)  # checkpoints within tasks
            if results is None:
                return None
            folder.mkdir(parents=True)
            results.save(folder)
            found.append(results.metrics)
        return means(found)

    def _learnt(self, trainer: TrialTrainer, watch: Watch, before: int) -> RunResults | None:
        """The record of a run; None if it was given up. `before`: tasks of the seeds before."""
        for task in trainer.scenario:
            trainer.train_task(task)
            if watch(before + task.index, self._judged(trainer.metrics)):
                return None
        return trainer.results

    def _judged(self, metrics: Mapping[str, float]) -> float:
        value = metrics.get(self.plan.metric, float("nan"))
        if value != value:
            raise CommandError(
                f"{self.plan.metric} was not measured, so the trial cannot be judged. Choose another by --metric."
            )
        return value

    def trainer(self, config: Mapping[str, Any], seed: int, folder: Path) -> TrialTrainer:
        """The trainer of one run of a trial with this configuration.

        Raises:
            CommandError: The settings do not do, for the first tasks or for all of them.
        """
        trainer = make_trainer(make_settings(of_a_trial(config, seed, folder)), self.scenario, TrialTrainer)
        config = trainer.tuner.peft_config[trainer.model.active_adapter]
        with explained("With all tasks of the scenario this run cannot be set up"):
            check_scenario(config, trainer.args, self.whole, trainer.strategy, 0)
        return trainer


def means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over runs."""
    return {name: fmean(each[name] for each in metrics) for name in metrics[0]}


def free_memory() -> None:
    """Let go of what a trainer leaves behind, which refers to itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
