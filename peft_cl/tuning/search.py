"""A search and its trials, kept in a file, so that it goes on after an interruption."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from ..text import plain
from .space import Dimension


FILE = "search.journal"
NAME = "peft-cl"
#: How often a trial is begun that interruptions end: it may be what ends the process.
MOST_TRIES = 3

FINISHED, PRUNED, FAILED = "finished", "pruned", "failed"
STATES = {FINISHED: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        state: `"finished"`, `"pruned"` (given up between tasks) or `"failed"`.
        metrics: The metrics by name, means over its seeds; none where it was not finished.
        seconds: How long it took.
        reason: Why it failed; empty if it did not.
    """

    state: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """A trial that is over.

    Attributes:
        number: From 1, in the order in which trials began.
        state, metrics, seconds, reason: As its outcome has them.
        value: What it is judged by: of a pruned trial after its last task, NaN of one that failed.
        settings: The values tried, by the settings' dotted names.
    """

    number: int
    state: str
    value: float
    settings: dict[str, Any]
    metrics: dict[str, float]
    seconds: float
    reason: str


class Search:
    """Trials over a space of settings, proposed by optuna's TPE sampler (Bergstra et al. 2011, Watanabe 2023,
    arXiv 2304.11127), in a file of the folder.

    The first ten trials are drawn at random, each later one from what those before it gave. What is drawn for a trial
    depends on the seed, its number and the outcomes before it: so a search that was interrupted goes on as if it had
    not been. Where several trials run at once, which outcomes came before depends on their time.

    Args:
        folder: Where the file lies, or is made.
        space: What is tried.
        lower_is_better: Whether a lower value is a better one.
        prune: Whether trials are given up between tasks that are worse there than the median of the others; the first
            five never are.
        seed: Draws the trials.
        facts: What made the search what it is, in types that JSON knows; kept in the file.

    Example:
        >>> search = Search(Path("out"), parse_space({"training.learning_rate": {"low": 0.1, "high": 1}}))
        >>> trial = search.next()                                                      # doctest: +SKIP
        >>> search.tell(trial, Outcome("finished", {"average_accuracy": 0.9}), 0.9)    # doctest: +SKIP
    """

    def __init__(
        self,
        folder: Path,
        space: Sequence[Dimension],
        *,
        lower_is_better: bool = False,
        prune: bool = False,
        seed: int = 0,
        facts: Mapping[str, Any] | None = None,
    ):
        self.space, self.seed, self.lower_is_better = list(space), seed, lower_is_better
        self.distributions = {each.name: each.distribution() for each in space}
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of each trial, and so do we
        self.study = optuna.create_study(
            storage=_storage(folder),
            study_name=NAME,
            direction="minimize" if lower_is_better else "maximize",
            pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        self.study.set_user_attr("facts", dict(facts or {}))
        self._take_up_interrupted()

    # ----------------------------------------------------------------------------------------------- trials

    @property
    def begun(self) -> int:
        """How many trials began, those under way and those to be begun again included."""
        return len({place for trial in self._trials() if (place := _place(trial)) is not None})

    @property
    def waiting(self) -> int:
        """How many trials are to be begun again."""
        return sum(trial.state == TrialState.WAITING for trial in self._trials())

    def next(self) -> Trial:
        """Begin a trial: one that was interrupted, or a new one."""
        place = self.begun
        # Seeded for each trial, so that the draws do not depend on how often the process was started.
        seed = int(np.random.SeedSequence([self.seed, place]).generate_state(1)[0])
        self.study.sampler = optuna.samplers.TPESampler(seed=seed)
        trial = self.study.ask(self.distributions)
        if "place" not in trial.user_attrs:
            trial.set_user_attr("place", place)
        return trial

    def settings(self, trial: Trial | FrozenTrial) -> dict[str, Any]:
        """The values that a trial tries, by the settings' names."""
        return {each.name: each.value(trial.params[each.name]) for each in self.space}

    def number(self, trial: Trial | FrozenTrial) -> int:
        """Number of a trial, from 1; one that is begun again keeps its own."""
        return trial.user_attrs["place"] + 1

    def report(self, trial: Trial, step: int, value: float) -> bool:
        """Note what was measured after a task; returns whether the trial is to be given up."""
        trial.report(value, step)
        return bool(trial.should_prune())

    def tell(self, trial: Trial, outcome: Outcome, value: float | None = None) -> Row:
        """Note what came of a trial; `value` is what a finished one is judged by."""
        for name in ("metrics", "seconds", "reason"):
            trial.set_user_attr(name, getattr(outcome, name))
        return self._row(self.study.tell(trial, value, STATES[outcome.state]))

    # ----------------------------------------------------------------------------------------------- outcomes

    def rows(self) -> list[Row]:
        """The trials that are over, in the order of their numbers."""
        over = [trial for trial in self._trials() if trial.state in STATES.values() and not _is_interrupted(trial)]
        return sorted(map(self._row, over), key=lambda row: row.number)

    def ranking(self) -> list[Row]:
        """The finished trials, the best one first; of equal ones the earlier."""
        sign = 1 if self.lower_is_better else -1
        finished = [row for row in self.rows() if row.state == FINISHED]
        return sorted(finished, key=lambda row: (sign * row.value, row.number))

    def importance(self) -> dict[str, float]:
        """Share of each setting in what the best tenth of the trials has in common (PED-ANOVA, Watanabe et al. 2023,
        arXiv 2304.10255), the largest first; empty where too few trials are finished to tell."""
        if len({row.value for row in self.rows() if row.state == FINISHED}) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(self.study, evaluator=evaluator)
        return dict(sorted(found.items(), key=lambda each: -each[1]))

    def _row(self, trial: FrozenTrial) -> Row:
        state = next(name for name, value in STATES.items() if value == trial.state)
        last = list(trial.intermediate_values.values())[-1:] if state == PRUNED else []
        value = trial.value if state == FINISHED else last[0] if last else float("nan")
        facts = {name: trial.user_attrs[name] for name in ("metrics", "seconds", "reason")}
        return Row(self.number(trial), state, value, self.settings(trial), **facts)

    # ----------------------------------------------------------------------------------------------- going on

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _take_up_interrupted(self) -> None:
        """Have the trials that an earlier process began and did not end begun again, with the same settings."""
        for trial in self._trials():
            if trial.state == TrialState.RUNNING:
                self.study.tell(trial.number, state=TrialState.FAIL)
        trials = self._trials()
        left = [trial for trial in trials if _is_interrupted(trial) and _place(trial) is not None]
        going_on = {_place(trial) for trial in trials if not _is_interrupted(trial)}
        for place in sorted({_place(trial) for trial in left} - going_on):
            tries = [trial for trial in left if _place(trial) == place]
            if len(tries) < MOST_TRIES:
                self.study.enqueue_trial(tries[0].params, user_attrs={"place": place})
            else:
                self._give_up(tries[0], f"interrupted {len(tries)} times, and not begun again")

    def _give_up(self, trial: FrozenTrial, reason: str) -> None:
        facts = {"place": _place(trial), "metrics": {}, "seconds": 0.0, "reason": reason}
        failed = create_trial(
            state=TrialState.FAIL, params=trial.params, distributions=trial.distributions, user_attrs=facts
        )
        self.study.add_trial(failed)


def _place(trial: FrozenTrial) -> int | None:
    return trial.user_attrs.get("place")


def _is_interrupted(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and "reason" not in trial.user_attrs


def _storage(folder: Path) -> optuna.storages.BaseStorage:
    folder.mkdir(parents=True, exist_ok=True)
    _cut_half_a_line(folder / FILE)
    return optuna.storages.JournalStorage(JournalFileBackend(str(folder / FILE)))


def _cut_half_a_line(path: Path) -> None:
    """Take off what a process that was killed wrote of its last line, or the next one would go on with it."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def kept_facts(folder: Path) -> dict[str, Any] | None:
    """What the search in a folder was made with; `None` where there is none.

    Raises:
        ValueError: its file is damaged.
    """
    if not (folder / FILE).is_file():
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return dict(optuna.load_study(study_name=NAME, storage=_storage(folder)).user_attrs["facts"])
    except Exception as error:  # optuna has no error of its own for it
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{str(folder / FILE)!r} is damaged ({first}). Give --overwrite to begin anew.") from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two searches' facts, by dotted names.

    Example:
        >>> differences({"tasks": 3, "config": {"method": "l2p"}}, {"tasks": 2, "config": {"method": "l2p"}})
        ['tasks: was 3, is 2']
    """
    flat = [_by_name(json.loads(json.dumps(facts, default=str))) for facts in (before, now)]
    names = dict.fromkeys([*flat[0], *flat[1]])
    return [
        f"{name}: was {_cut(flat[0].get(name, 'not there'))}, is {_cut(flat[1].get(name, 'not there'))}"
        for name in names
        if flat[0].get(name, "") != flat[1].get(name, "")
    ]


def _cut(text: str) -> str:
    return plain(text, 60)


def _by_name(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            found |= _by_name(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = json.dumps(value)
    return found


Watch = Callable[[int, float], bool]
#: Makes a trial of its number and settings; told of each task by the watch, which says whether to give up.
Attempt = Callable[[int, Mapping[str, Any], Watch], Outcome]
