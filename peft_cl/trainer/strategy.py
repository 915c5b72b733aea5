"""The points at which a comparison method enters the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from ..scenarios import Scenario, Task


if TYPE_CHECKING:
    from .arguments import ContinualTrainingArguments
    from .trainer import ContinualTrainer


class Strategy:
    """How one task is learnt. The default is gradient descent on the task's own examples.

    A comparison method overrides what it does differently and nothing else: what a task is learnt from (`tasks`,
    `batch`), what stands in the place of the cross-entropy (`loss`) and what is added to it (`losses`), what happens
    to gradients (`after_backward`) and weights (`after_step`), before and after a task (`begin_task`, `end_task`), and
    how logits become a prediction (`predict`). What it cannot work with is refused by `check`, and other strategies
    by `check_beside`. Several may be given to the trainer at once, as a list: each does its part in the list's order.
    """

    #: Name in tables; None: that of the adapter's method alone.
    name: str | None = None

    #: What users of the saved adapter must know, for its card.
    limits: tuple[str, ...] = ()

    #: Whether a task is learnt by training steps on frozen features of its own images alone, of which task evidence
    #: takes the means.
    has_task_evidence = True

    #: Whether it makes sense on a stream, whose stretches are no tasks.
    learns_streams = True

    #: Whether it trains the backbone's weights, or puts trained ones into it: one strategy can at a time.
    trains_backbone = False

    #: Whether batches hold classes of earlier tasks, so that their logits must not be masked.
    trains_earlier_classes = False

    #: Why it cannot work with a head that is computed from sums over features; empty if it can.
    why_trained_head = ""

    #: Whether batches of training bring the `place` of each image, (B, 2): its task's number, its row in the task. The
    #: strategy's `batch` takes it out.
    needs_places = False

    def title(self, adapter: str) -> str:
        """Name of the method in tables. Default: that of the adapter's method, and the strategy's if it has one."""
        return f"{adapter} + {self.name}" if self.name else adapter

    def settings(self) -> dict[str, Any]:
        """What must not change while a sequence is under way, in types that JSON knows."""
        return {}

    def check(self, model: PeftModel, scenario: Scenario) -> None:
        """Raise a `ValueError` for an adapter or a scenario that the method is not defined for."""

    def check_beside(self, others: Sequence[Strategy]) -> None:
        """Raise a `ValueError` (`cannot_combine`) for other strategies that the method makes no sense with."""

    def prepare(self, model: PeftModel) -> None:
        """Called once by each trainer, before its first task: change the model (unfreeze weights, for instance), and
        forget what an earlier run has left in the strategy."""

    def learning_rates(self, args: ContinualTrainingArguments) -> dict[str, float]:
        """Rates of parts that have one of their own, as `learning_rates` of the arguments, which come before them."""
        return {}

    def tasks(self, trainer: ContinualTrainer, task: Task) -> Sequence[Task]:
        """Tasks whose training examples are gone through to learn `task`. Default: its own."""
        return [task]

    def observed(self, trainer: ContinualTrainer, task: Task) -> Sequence[Task]:
        """Tasks whose training examples a computed head observes after `task`. Where there are others than `task`, it
        forgets what it observed before. Default: those that it was learnt from.

        A method that overrides it shows images of all classes seen after each task. So the head may read features of a
        backbone that is trained."""
        return self.tasks(trainer, task)

    def begin_task(self, trainer: ContinualTrainer, task: Task) -> None:
        """Called when the model's head has the task's classes, before the first step."""

    def learn(self, trainer: ContinualTrainer, task: Task) -> Any:
        """Learn `task`. Default: the trainer's own training loop over `tasks`."""
        return trainer.fit(self.tasks(trainer, task))

    def batch(self, trainer: ContinualTrainer, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is trained on in place of the batch `inputs`, on its device."""
        return inputs

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str]) -> torch.Tensor:
        """What stands in the place of the cross-entropy, as `loss=` of the trainer; the default is never called."""
        raise NotImplementedError(f"{type(self).__name__} has no loss of its own")

    def losses(
        self, trainer: ContinualTrainer, inputs: Mapping[str, torch.Tensor], logits: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Weighted terms to add to the loss of a training step, by the name under which they are logged.

        Args:
            trainer: the trainer.
            inputs: the batch, as `batch` made it: `pixel_values`, `labels` and what else belongs to the images.
            logits: (B, classes) that the model gives for it, with their graph. No class is masked out.
        """
        return {}

    def after_backward(self, trainer: ContinualTrainer) -> None:
        """Called with all gradients of an optimizer's step in place, before they are clipped (with fp16 they are
        still multiplied by the loss scale)."""

    def after_step(self, trainer: ContinualTrainer) -> None:
        """Called when the optimizer has changed the weights; their gradients are still there, as they were clipped."""

    def end_task(self, trainer: ContinualTrainer, task: Task) -> None:
        """Called after the last step of a task, before it is measured."""

    def predict(
        self, trainer: ContinualTrainer, inputs: dict[str, torch.Tensor], logits: torch.Tensor
    ) -> torch.Tensor:
        """Scores (B, classes) in place of the model's logits, when tasks are measured."""
        return logits

    def state_dict(self) -> dict[str, Any]:
        """What the strategy keeps from task to task: tensors, numbers, text, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def save(self, trainer: ContinualTrainer, folder: Path) -> None:
        """Write what the adapter's file does not hold into `folder`, after each task (on the first process); from
        there it comes into the run's folder with the adapter."""

    def saved_bytes(self, trainer: ContinualTrainer, adapter_bytes: int) -> int:
        """Bytes that must be kept to use what was learnt. Default: the adapter's file."""
        return adapter_bytes

    def kept_bytes(self, trainer: ContinualTrainer) -> dict[str, int]:
        """Bytes that must be kept to learn the next task and that predicting does not need, by what they are: images
        of a memory, Fisher information, ..."""
        return {}


#: Name in configurations and suites -> class.
STRATEGIES: dict[str, type[Strategy]] = {}


def register_strategy(name: str) -> Callable[[type[Strategy]], type[Strategy]]:
    """Enter a strategy under the name that `strategy:` in a configuration or a suite gives. A module that is loaded
    again may repeat it.

    Raises:
        ValueError: another strategy has this name.

    Example:
        >>> @register_strategy("my-method")         # doctest: +SKIP
        ... class MyMethod(Strategy): ...
    """

    def enter(strategy: type[Strategy]) -> type[Strategy]:
        known = STRATEGIES.get(name)
        own = (strategy.__module__, strategy.__qualname__)
        if known is not None and (known.__module__, known.__qualname__) != own:
            raise ValueError(f"The strategy {name!r} is {known.__qualname__} already. Give yours another name.")
        STRATEGIES[name] = strategy
        return strategy

    return enter


class AfterStep(TrainerCallback):
    """Tells the trainer's strategy of each step of the optimizer."""

    def __init__(self, trainer: ContinualTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.strategy.after_step(self.trainer)


def cannot_combine(strategies: Sequence[Strategy], why: str) -> ValueError:
    """The error for strategies that make no sense together."""
    names = " and ".join(str(each.name or type(each).__name__) for each in strategies)
    return ValueError(f"{names} cannot be combined: {why}. Give one of them.")


def overrides(strategy: Strategy, hook: str) -> bool:
    """Whether the method does something of its own in a hook."""
    return getattr(type(strategy), hook) is not getattr(Strategy, hook)


class Combined(Strategy):
    """Several strategies as one; each hook is called for all of them, in order.

    Raises:
        ValueError: two of one kind, or two that cannot be combined.
    """

    def __init__(self, strategies: Sequence[Strategy]):
        for each in strategies:
            if not isinstance(each, Strategy):
                raise ValueError(
                    f"strategy has {each!r}, but must be a Strategy or a list of them, such as [EWC(), "
                    "ExperienceReplay()]."
                )
        strategies = [each for each in strategies if type(each) is not Strategy]
        # What stands for the whole method comes first, in names and in what is done.
        self.strategies = sorted(strategies, key=lambda each: each.title("") != each.name)
        self._check_combination(strategies)
        self.own = {hook: self._owner(hook) for hook in ("learn", "tasks", "loss")}
        self.name = " + ".join(each.name for each in self.strategies if each.name) or None
        self.learns_streams = all(each.learns_streams for each in strategies)
        self.limits = tuple(limit for each in strategies for limit in each.limits)
        self.has_task_evidence = all(each.has_task_evidence for each in strategies)
        self.why_trained_head = ", and ".join(self._reasons_for_trained_head(strategies))
        self.trains_earlier_classes = any(each.trains_earlier_classes for each in strategies)
        self.needs_places = any(each.needs_places for each in strategies)

    @staticmethod
    def _check_combination(strategies: Sequence[Strategy]) -> None:
        kinds = [type(each).__name__ for each in strategies]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"strategy has {', '.join(kinds)}, but each kind may be there once. Take the others out.")
        training = [each for each in strategies if each.trains_backbone]
        if len(training) > 1:
            raise cannot_combine(training, "each has a way of its own to train the backbone")
        for each in strategies:
            each.check_beside([other for other in strategies if other is not each])

    def _owner(self, hook: str) -> Strategy:
        """The one strategy that does something of its own in a hook that has room for one."""
        owners = [each for each in self.strategies if overrides(each, hook)]
        if len(owners) > 1 or (hook == "learn" and owners and len(self.strategies) > 1):
            raise cannot_combine(self.strategies, f"{owners[0].name} has a way of its own to learn a task ({hook})")
        return owners[0] if owners else Strategy()

    @staticmethod
    def _reasons_for_trained_head(strategies: Sequence[Strategy]) -> list[str]:
        anew = any(overrides(each, "observed") for each in strategies)
        return [
            f"{each.name} {each.why_trained_head}"
            for each in strategies
            if each.why_trained_head and not (anew and each.trains_backbone)
        ]

    def title(self, adapter):
        for each in self.strategies:
            adapter = each.title(adapter)
        return adapter

    def settings(self):
        return {each.name or type(each).__name__: each.settings() for each in self.strategies if each.settings()}

    @property
    def own_loss(self) -> Callable[..., torch.Tensor] | None:
        """What stands in the place of the cross-entropy, if a strategy has such."""
        return None if type(self.own["loss"]) is Strategy else self.own["loss"].loss

    def check(self, model, scenario):
        for each in self.strategies:
            each.check(model, scenario)

    def prepare(self, model):
        for each in self.strategies:
            each.prepare(model)

    def learning_rates(self, args):
        return {part: rate for each in self.strategies for part, rate in each.learning_rates(args).items()}

    def tasks(self, trainer, task):
        return self.own["tasks"].tasks(trainer, task)

    def observed(self, trainer, task):
        return self.own["tasks"].observed(trainer, task)

    def begin_task(self, trainer, task):
        for each in self.strategies:
            each.begin_task(trainer, task)

    def learn(self, trainer, task):
        own = self.own["learn"]
        return trainer.fit(self.tasks(trainer, task)) if type(own) is Strategy else own.learn(trainer, task)

    def batch(self, trainer, inputs):
        for each in self.strategies:
            inputs = each.batch(trainer, inputs)
        return inputs

    def losses(self, trainer, inputs, logits):
        return {name: term for each in self.strategies for name, term in each.losses(trainer, inputs, logits).items()}

    def after_backward(self, trainer):
        for each in self.strategies:
            each.after_backward(trainer)

    def after_step(self, trainer):
        for each in self.strategies:
            each.after_step(trainer)

    def end_task(self, trainer, task):
        for each in self.strategies:
            each.end_task(trainer, task)

    def predict(self, trainer, inputs, logits):
        for each in self.strategies:
            logits = each.predict(trainer, inputs, logits)
        return logits

    def state_dict(self):
        return {str(place): each.state_dict() for place, each in enumerate(self.strategies)}

    def load_state_dict(self, state):
        for place, each in enumerate(self.strategies):
            each.load_state_dict(state[str(place)])

    def save(self, trainer, folder):
        for each in self.strategies:
            each.save(trainer, folder)

    def saved_bytes(self, trainer, adapter_bytes):
        for each in self.strategies:
            adapter_bytes = each.saved_bytes(trainer, adapter_bytes)
        return adapter_bytes

    def kept_bytes(self, trainer):
        kept: dict[str, int] = {}
        for each in self.strategies:
            for what, count in each.kept_bytes(trainer).items():
                kept[what] = kept.get(what, 0) + count
        return kept
