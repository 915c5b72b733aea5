"""The model as it was when a task began, for methods that distil from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn
from torch.func import functional_call

from ..backbones.modes import evaluation_mode
from ..scenarios import Scenario
from ..trainer import ContinualTrainer


class Teacher:
    """The network before a task, which gives logits for the task's batches ("knowledge distillation").

    It holds copies of what is trained, and shares all else with the model: on an adapter it costs the adapter's bytes,
    with `FineTuning` those of the whole model. Make it in `Strategy.begin_task`. It needs no state: after an
    interruption `begin_task` is called again, with the weights of the task's beginning.

    Args:
        trainer: the trainer, whose model has the rows of the task that begins.

    Attributes:
        weights: the copies, by their names in the base model.

    Example:
        >>> class Distil(Strategy):                                                        # doctest: +SKIP
        ...     def check(self, model, scenario):
        ...         check_teacher("Distil", model, scenario)
        ...     def begin_task(self, trainer, task):
        ...         self.teacher = Teacher(trainer)
        ...     def losses(self, trainer, inputs, logits):
        ...         return {"distil": (logits - self.teacher.logits(trainer, inputs)).square().mean()}
    """

    def __init__(self, trainer: ContinualTrainer):
        self.weights = {name: value.detach().clone() for name, value in trained_tensors(trainer.tuner.model)}

    @torch.no_grad()
    def logits(self, trainer: ContinualTrainer, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits (B, classes) in float32 for a batch of training, without a graph.

        They are those of the head that is trained, also where another is computed from sums. No class is masked out.
        Rows of classes that the task has brought are as they began: their logits mean nothing.

        Args:
            trainer: the trainer.
            inputs: the batch, of which `pixel_values` is read, and `query` if it is there.
        """
        read = {name: inputs[name] for name in ("pixel_values", "query") if name in inputs}
        with trained_head_answers(trainer), trainer.accelerator.autocast():
            return functional_call(trainer.tuner.model, self.weights, kwargs=read).logits.float()


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Trained parameters by name, and the buffers beside them in their modules: statistics of a batch norm, counts."""
    for prefix, module in model.named_modules():
        trained = [(name, value) for name, value in module.named_parameters(prefix, recurse=False)]
        trained = [(name, value) for name, value in trained if value.requires_grad]
        yield from trained
        if trained:
            yield from module.named_buffers(prefix, recurse=False)


@contextmanager
def trained_head_answers(trainer: ContinualTrainer) -> Iterator[None]:
    """Inside the block the model is in evaluation mode, and the head that is trained answers."""
    head = trainer.tuner.head.active
    was_training = head.training
    with evaluation_mode(trainer.tuner.model):
        # A head that is computed from sums lets the trained one answer in its own training mode.
        head.training = head.training_head is not None
        try:
            yield
        finally:
            head.training = was_training


def check_teacher(name: str, model: PeftModel, scenario: Scenario) -> None:
    """Refuse pools that renew rows with each task: a network with fresh rows is not the one before the task.

    Args:
        name: the strategy's, for the message.
        model: the model, before anything is trained.
        scenario: the tasks.

    Raises:
        ValueError: such a pool (DualPrompt, CODA-Prompt) in a sequence of tasks.
    """
    pool, config = model.base_model.pool, model.peft_config[model.active_adapter]
    renewed = pool.renewed
    if renewed and scenario.boundaries and config.train_prompts != "first_task":
        raise ValueError(
            f"The adapter is {config.method}, but {name} distils from the network before each task, and this method "
            f"renews rows of its pool ({', '.join(renewed)}) with each task. Use L2PConfig or LinearProbeConfig, or "
            "set train_prompts='first_task' in the adapter's configuration."
        )
