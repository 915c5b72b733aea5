"""What a run says while it is under way: a line for each task and losses always, bars on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

from ..text import plain


class SequenceProgress(ProgressCallback):
    """A line for each task, and losses as often as `logging_steps` says; on a terminal in the place of losses two
    bars: the tasks of the sequence, and the steps of the task (or the batches of an evaluation) under it.

    Replaces the Trainer's own bar, whose log lines would drown the sequence's, and its printing of what is logged.
    A bar in a file is a line for each of its states, so that there are none where the output is no terminal.

    Args:
        bars: whether bars are wanted (`disable_tqdm`); without a terminal there are none.
    """

    def __init__(self, bars: bool = True):
        super().__init__()
        self.bars = bars and sys.stderr.isatty()
        self.sequence_bar = None
        self.description = self.place = ""

    def say(self, line: str) -> None:
        """A line on the standard output, above the bars."""
        if self.bars:
            tqdm.write(line)
        else:
            print(line, flush=True)

    def begin_sequence(self, tasks: int, finished: int) -> None:
        if self.bars:
            self.sequence_bar = tqdm(total=tasks, initial=finished, desc="tasks", unit="task", dynamic_ncols=True)

    def begin_task(self, name: str, number: int, tasks: int) -> None:
        """Task `number` of so many, counted from 1."""
        self.description = plain(name, 40)
        self.place = f"task {number} of {tasks} ({plain(name)})"
        if self.sequence_bar is not None:
            self.sequence_bar.set_description(f"tasks ({self.description})")

    def end_task(self, facts: str) -> None:
        """Count a task as finished and say what came of it."""
        self.say(f"{self.place}: {facts}")
        if self.sequence_bar is not None:
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
        if state.is_world_process_zero and self.bars:
            self.training_bar = tqdm(
                total=state.max_steps, desc=f"  {self.description}", unit="step", leave=False, dynamic_ncols=True
            )
        self.current_step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step, done = state.global_step, state.global_step - self.current_step
        if self.training_bar is not None:
            self.training_bar.update(done)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)
        elif not self.bars:
            # To callbacks the steps go on from task to task; here they are the task's own.
            rate = f", learning rate {logs['learning_rate']:.3g}" if "learning_rate" in logs else ""
            step = f"step {self.current_step} of {state.max_steps}"
            self.say(f"{self.place}: {step}, loss {float(logs['loss']):.4g}{rate}")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not self.bars:
            return
        if state.is_world_process_zero and self.prediction_bar is None and eval_dataloader is not None:
            self.prediction_bar = tqdm(
                total=len(eval_dataloader), desc="  evaluation", unit="batch", leave=False, dynamic_ncols=True
            )
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)
