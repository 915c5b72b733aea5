"""Progress of the whole sequence beside that of the task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

from ..text import plain


class SequenceProgress(ProgressCallback):
    """Two bars: the tasks of the sequence, and the steps of the task (or the batches of an evaluation) under it.

    Replaces the Trainer's own bar, whose log lines would drown the sequence's; losses stand beside the bar.
    """

    def __init__(self):
        super().__init__()
        self.sequence_bar = None
        self.description = ""

    def begin_sequence(self, tasks: int, finished: int) -> None:
        self.sequence_bar = tqdm(total=tasks, initial=finished, desc="tasks", unit="task", dynamic_ncols=True)

    def begin_task(self, name: str, index: int) -> None:
        self.description = plain(name, 40)
        if self.sequence_bar is not None:
            self.sequence_bar.set_description(f"tasks ({self.description})")

    def end_task(self, line: str) -> None:
        """Count a task as finished and leave `line` above the bars."""
        if self.sequence_bar is not None:
            self.sequence_bar.write(line)
            self.sequence_bar.update(1)

    def end_sequence(self) -> None:
        if self.sequence_bar is not None:
            self.sequence_bar.set_description("tasks")
            self.sequence_bar.close()
            self.sequence_bar = None

    def counted(self, items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
        """The items, with a bar of their own under that of the sequence."""
        if self.sequence_bar is None:
            return iter(items)
        return iter(tqdm(items, desc=f"  {what}", total=total, unit="batch", leave=False, dynamic_ncols=True))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, desc=f"  {self.description}", unit="step", leave=False, dynamic_ncols=True
            )
        self.current_step = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.prediction_bar is None and eval_dataloader is not None:
            self.prediction_bar = tqdm(
                total=len(eval_dataloader), desc="  evaluation", unit="batch", leave=False, dynamic_ncols=True
            )
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)
