"""A task that starts over with fewer images in a step, where memory was too small for as many."""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from .resuming import ResumableTrainer, checkpoint_folder
from .snapshot import forget_folder, on_cpu, set_random_state


logger = logging.get_logger(__name__)


class RestartingTrainer(ResumableTrainer):
    """A trainer of whose lost steps (`auto_find_batch_size`) nothing is left."""

    _at_start: dict[str, Any] | None = None

    def _inner_training_loop(self, batch_size: int | None = None, args: Any = None, **kwargs: Any) -> TrainOutput:
        """With `auto_find_batch_size` the Trainer calls it again with fewer images in a step, where memory was too
        small for as many: then the task starts over, and nothing is left of the steps that were lost."""
        if not self.args.auto_find_batch_size:
            return super()._inner_training_loop(batch_size, args, **kwargs)
        if self._at_start is None:
            self._at_start = on_cpu(self.learnt_state())
        else:
            logger.warning(
                "Memory is too small for steps of %s images: %s starts over with %s.",
                self._train_batch_size,
                self.task.name,
                batch_size,
            )
            self._start_over(kwargs.get("resume_from_checkpoint"))
        output = super()._inner_training_loop(batch_size, args, **kwargs)
        self._at_start = None
        return output

    def _start_over(self, checkpoint: str | None) -> None:
        state = on_cpu(self._at_start)
        self.optimizer = self.lr_scheduler = None
        self.optimizer_state = state["optimizer"]
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        self.model.zero_grad(set_to_none=True)
        self.forget_steps()
        self._take(state)
        set_random_state(state["random"])
        if checkpoint is None and self.is_world_process_zero():
            forget_folder(checkpoint_folder(self.folder, self.task))
