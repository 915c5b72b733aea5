"""The trainer of a task sequence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..metrics import RunResults
from ..plots.run import write_pictures
from ..scenarios import Scenario, Task
from ..text import percent
from ..tuners.base.digests import digest_of_weights
from ..tuners.base.storage import round_prompts
from .arguments import ContinualTrainingArguments
from .calibrating import calibration_of, take_temperature
from .checks import check_callbacks, check_fit, check_functions, check_metric, check_optimizer, check_replacements
from .choosing import check_choices, given_validation, keep_back, warn_of_test_images
from .earlier import earlier_tasks
from .extras import spared
from .files import check_writable, explained_writes, written_aside
from .guards import Guards
from .learning_rates import check_parts
from .loss import check_loss
from .own_metrics import OwnMetrics
from .per_task import for_each_task, settings_of_task
from .record import adapter_folder, learnt_of, metrics_of, record_of
from .sharing import SharingTrainer
from .snapshot import STATE_FOLDER
from .strategy import Combined, Strategy


logger = logging.get_logger(__name__)


class ContinualTrainer(SharingTrainer):
    """A `transformers.Trainer` that learns the tasks of a scenario one after the other and measures as it goes.

    For each task the model's head and pool start the task, optimizer and schedule are new, and the arguments hold as
    for a training of its own. After it, all tasks seen are evaluated, and adapter and results are saved. A stream
    without boundaries (`task_free`) is learnt in its own order by one optimizer, and measured as often.

    Args:
        model: a `PeftModel` with one of this library's configurations.
        args: `ContinualTrainingArguments`; epochs and steps count per task.
        scenario: the tasks.
        processing_class: the backbone's HF image processor.
        augmentation: applied to each training image (PIL in, PIL out), for instance `RandomResizedCropFlip(size=224)`.
        batch_augmentation: applied to each training batch on its device, normalised pixels (B, C, H, W) in and out:
            a module of kornia or of torchvision's `transforms.v2`, for instance.
        loss: what stands in the place of the cross-entropy: a function of `logits` (B, k), float32, of the k classes
            that the loss is over alone (those of the task, with `train_mask`), of `labels` (B,), which count from 0
            among them, and of `class_names`, their k names. It returns the mean over the batch, or (B,). What the
            method adds (the pull of keys, orthogonality, ...) is added to it as ever. Weighted, focal and smoothed
            losses are one line each: see the example.
        compute_metrics: what is measured beside the accuracies, after each task on the test images of each task seen:
            a function of `transformers.EvalPrediction` (`predictions`: scores (N, classes seen), float32, `label_ids`
            (N,), rows of the head) that returns numbers or lists of numbers by name; a list of such functions; or a
            dict of them, whose keys are put before their names (a function that returns one value by itself is named
            by its key). Ready-made in `peft_cl.metrics`: `top_k_accuracy(5)`, `f1("macro")`, `confusion_matrix()`.
            Where the task of an image is known, scores of other tasks' classes are -inf. Numbers are logged as
            `eval_<name>_<task>` and `eval_<name>`, their mean over the tasks, which `metric_for_best_model` may name
            (with `greater_is_better=False` for errors); `results.own_metrics` has all values. All functions are tried
            before training; one that fails later is NaN there, with a warning. With such functions the scores of all
            test images are in memory at once.
        strategy: a comparison method, or a list of them; None trains the adapter as it is.
        earlier_test: test images of tasks that a loaded adapter had learnt before, which are measured on then: one
            split (`Dataset`) whose images are told apart by their classes, a dict of them by the task's name, or the
            scenario that they were learnt from. None: these tasks are not measured, and the record says so.
        validation: validation images of the tasks, in the same forms, by which is chosen within a task (early
            stopping, the best checkpoint, ...); or set `validation_fraction` in the arguments.
        **kwargs: further arguments of `transformers.Trainer` (callbacks, ...).

    Attributes:
        accuracy_matrix: (tasks, tasks) array, R[i, j] = accuracy (0 to 1) on the scenario's task j after its task i;
            NaN if not measured.
        earlier: tasks that a loaded adapter had learnt before, with what the `results.json` beside it says of them.
            They come first in `results`, whose matrix and metrics are of all tasks, and their names are not given
            again (a scenario's `task_0` becomes `task_3` after three).
        metrics: average and overall accuracy, average incremental accuracy, forgetting, backward transfer, ..., as
            `continual_metrics` names them (fractions).
        results: the record of the adapter, as saved in `results.json`.

    Raises:
        ValueError: anything that cannot work, before training starts.

    Example:
        >>> trainer = ContinualTrainer(model, args, scenario, processing_class=processor)    # doctest: +SKIP
        >>> trainer.train()                                                                  # doctest: +SKIP
        >>> trainer.metrics["average_accuracy"]                                              # doctest: +SKIP
        >>> trainer.train_task(load_dataset("user/snakes"), name="snakes")  # weeks later    # doctest: +SKIP
        >>> def weighted(logits, labels, class_names):  # a rare class counts five times
        ...     weight = torch.tensor([5.0 if name == "snake" else 1.0 for name in class_names])
        ...     return torch.nn.functional.cross_entropy(logits, labels, weight.to(logits.device))
        >>> def balanced(prediction):  # compute_metrics=[balanced, top_k_accuracy(5)]
        ...     predicted = prediction.predictions.argmax(-1)
        ...     return {"balanced": sklearn.metrics.balanced_accuracy_score(prediction.label_ids, predicted)}
    """

    def __init__(
        self,
        model: PeftModel,
        args: ContinualTrainingArguments,
        scenario: Scenario,
        *,
        processing_class: Any,
        augmentation: Callable | None = None,
        batch_augmentation: Callable | None = None,
        loss: Callable | None = None,
        compute_metrics: Any = None,
        strategy: Strategy | Sequence[Strategy] | None = None,
        earlier_test: Any = None,
        validation: Any = None,
        **kwargs: Any,
    ):
        self.earlier = earlier_tasks(model)
        #: The tasks as they were given, before they got their names on record.
        self._given: list[Task] = list(scenario) if isinstance(scenario, Scenario) else []
        scenario = self.earlier.named_on(scenario) if self._given else scenario
        strategy = Combined(strategy if isinstance(strategy, (list, tuple)) else [strategy or Strategy()])
        check_fit(model, args, scenario, strategy)
        check_functions(processing_class, augmentation, batch_augmentation, args.augmentation_draws)
        if loss is not None and strategy.own_loss is not None:
            raise ValueError(
                f"loss is given, but {strategy.name} has a loss of its own in the place of the cross-entropy. Leave "
                "one of them out."
            )
        config = model.peft_config[model.active_adapter]
        check_loss(loss, scenario, config)
        self.own_metrics = OwnMetrics(compute_metrics)
        self.own_metrics.check(scenario, config)
        check_metric(args, scenario, self.own_metrics.numbers)
        check_callbacks(args, kwargs.get("callbacks"))
        for_each_task(args, scenario, check_optimizer)
        check_replacements(kwargs)
        self.earlier = self.earlier.with_tests(earlier_test, scenario)
        # For each task one whose test images are to choose by within a task.
        self.validation = [] if validation is None else given_validation(validation, scenario, args)
        validated, callbacks = bool(self.validation or args.validation_fraction), kwargs.get("callbacks")
        for_each_task(args, scenario, lambda each: check_choices(each, callbacks, validated))
        warn_of_test_images(args, validated)
        if validation is None:
            scenario, self.validation = keep_back(scenario, args)
        if args.process_index == 0:
            check_writable(Path(args.output_dir), model.peft_config)
        # As they were given: a strategy may train them, or put weights into it that are drawn.
        self._backbone = digest_of_weights(model.base_model.encoder.base_layer)[:12]
        strategy.prepare(model)
        # Of what is trained now.
        for setting in ("learning_rates", "max_grad_norms"):
            for_each_task(args, scenario, lambda each, name=setting: check_parts(name, getattr(each, name), model))
        super().__init__(
            model,
            args,
            scenario,
            processing_class,
            augmentation,
            batch_augmentation,
            loss,
            strategy,
            **kwargs,
        )
        self._asked_batch = args.train_batch_size
        self.guards = Guards(self, logger.warning)
        self.add_callback(self.guards)
        self.guards.before_training()

    # ----------------------------------------------------------------------------------------------- the sequence

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> TrainOutput | None:
        """Learn all tasks of the scenario. Returns the last task's `TrainOutput` (None if nothing was trained).

        Args:
            resume_from_checkpoint: True, or the folder of an interrupted run: its finished tasks are not repeated, and
                on one device the result is that of a run without interruption, to the bit. The task that was
                interrupted goes on from its last whole checkpoint (`save_strategy`), or starts over if it has none.
                Without a snapshot in the folder the run begins at the first task.

        Raises:
            ValueError: other arguments, or an interrupted run of another scenario or other settings.
            OSError: the output folder cannot be written to; what was saved before is kept.
        """
        if any(value for value in kwargs.values()):
            raise ValueError(
                f"train() got {kwargs}, but a task sequence is trained as a whole. Call train() with "
                "resume_from_checkpoint or without arguments."
            )
        self.check_not_interrupted()
        if resume_from_checkpoint:
            self.resume(self.folder if resume_from_checkpoint is True else Path(resume_from_checkpoint))
        output = None
        if self.is_world_process_zero():
            self.progress.begin_sequence(len(self.scenario), self.finished_tasks)
        try:
            for task in self.scenario[self.finished_tasks :]:
                output = self.train_task(task)
        finally:
            self.progress.end_sequence()
        if self.args.pictures and self.finished_tasks:
            self.draw()
        if self.args.push_to_hub:
            with spared("The run is not pushed to the Hub"):
                self.push_to_hub()
        return output

    def hyperparameter_search(self, *words: Any, **more: Any) -> None:
        """Refused: a trainer learns its sequence once, and the Trainer's search would start it over in place."""
        raise NotImplementedError(
            "hyperparameter_search would learn the sequence again in one trainer, whose model and record go on from "
            "task to task. Make a model and a trainer, with an output_dir of its own, for each set of settings in a "
            "loop of your own, and compare results.metrics of a scenario of held-out training images."
        )

    def train_task(self, task: Task | Mapping[str, Any], **columns: Any) -> TrainOutput:
        """Start, learn and measure one task, and save adapter and results.

        Args:
            task: the scenario's next task; or a data set with a train and a test split, which is added to the scenario
                as its next task, with classes that are new or known.
            **columns: for a data set, as `Scenario.with_task` has them (`name`, `label_column`, ...).
        """
        self.check_not_interrupted()
        # Both may have been changed since.
        check_choices(self.args, self.callback_handler.callbacks, bool(self.validation))
        if not isinstance(task, Task):
            task = self._add(task, **columns)
        elif columns:
            raise ValueError(
                f"train_task() got {columns} with a Task, which has its name and columns. Leave them out."
            )
        number = self.finished_tasks
        if number < len(self.scenario) and task is self._given[number]:
            task = self.scenario[number]
        if number >= len(self.scenario) or task is not self.scenario[number]:
            raise ValueError(
                f"{task.name} is not the next task: {self.finished_tasks} of {len(self.scenario)} are learnt. Give "
                "the tasks in the scenario's order."
            )
        if self.is_world_process_zero() and not (self.finished_tasks or self._resumed_from):
            self.forget_finished_run()
        with settings_of_task(self.args, self.scenario, task):
            output = self._learn(task)
        self.evaluate()
        self.finished_tasks, self.under_way = self.finished_tasks + 1, False
        with explained_writes(self.folder, self.finished_tasks - 1):
            self.save()
            self.save_snapshot()
            # A trainer to come in this process goes on with it.
            self.tuner.peft_config[self.tuner.active_adapters[0]].record = self.results
            if self.is_world_process_zero():
                self.forget_checkpoints(self.finished_tasks - 1)  # of the task before: the last one's stay
        if self.is_world_process_zero():
            self.progress.end_task(self._summary(task))
        self.guards.after_task(task)
        return output

    def _learn(self, task: Task) -> TrainOutput:
        """Everything of a task before it is measured."""
        self._begin(task)
        if self.args.measure_ahead and task.index == 0:
            self._measure_baseline()
        self.began = time.perf_counter()
        output = self.strategy.learn(self, task)
        round_prompts(self.tuner.pool, self.tuner.head.config)
        if self.args.world_size > 1:
            self.join_counts()
        with self.flops.counted():
            self.strategy.end_task(self, task)
            self.observe(task)
        self.forget_learnt(self.strategy.tasks(self, task))
        self.train_seconds, self.began = self.seconds(), None
        self.learnt.append({**learnt_of(self, self._took), "calibration": calibration_of(self)})
        return output

    def _add(self, data: Mapping[str, Any], **columns: Any) -> Task:
        """Add a data set to the scenario as its next task."""
        if self.finished_tasks < len(self.scenario):
            raise ValueError(
                f"{self.finished_tasks} of {len(self.scenario)} tasks are learnt, and a task is added to the end. "
                "Call train() first."
            )
        given = self.scenario.with_task(data, **columns)
        longer = self.earlier.named_on(given)
        check_fit(self.model, self.args, longer, self.strategy, self.finished_tasks)
        self.own_metrics.check(longer, self.tuner.head.config)
        if self.validation and self.args.validation_fraction is None:
            raise ValueError(
                "The trainer chooses by validation images that were given, and there are none of an added task. Make "
                "a new trainer with the saved adapter, a scenario of this data, and validation images of it."
            )
        longer, kept = keep_back(longer, self.args, first=len(self.scenario))
        self.validation += kept
        self._given.append(given[-1])
        self.take_scenario(longer)
        with explained_writes(self.folder, self.finished_tasks):  # so that an interruption finds the task in it
            self.save_snapshot()
        return longer[-1]

    def _begin(self, task: Task) -> None:
        self.task, self.under_way, self._took = task, True, {"epochs": 0.0, "steps": 0}
        if self.is_world_process_zero():
            # Before the first adapter: one that lies there without a state would be taken for a run that lost it.
            (self.folder / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
        number = self.tasks_before + task.index + 1
        self.progress.begin_task(task.name, number, len(self.whole_matrix))
        self.look_before(task)
        if self.args.fit_temperature:  # it is fitted anew, so that there is nothing to warn of
            self.tuner.head.config.temperature = 1.0
        self._start(task)
        self.show_pool(task)
        with self.flops.counted():
            self.strategy.begin_task(self, task)
        self.most_trainable = max(self.most_trainable, self.model.get_nb_trainable_parameters()[0])

    def _take_up(self, state: Mapping[str, Any], folder: Path) -> None:
        super()._take_up(state, folder)
        take_temperature(self)

    def fit(self, tasks: Sequence[Task]) -> TrainOutput | None:
        """Train on the examples of `tasks`, and note what it took."""
        if self.args.train_batch_size != self._asked_batch:  # which the Trainer reads but once
            self._train_batch_size = self._asked_batch = self.args.train_batch_size
        output = super().fit(tasks)
        if output is not None:
            self.without_prompts.learn(self, tasks, self.train_dataset)
            batch = self.state.train_batch_size
            self._took = {
                "epochs": round(self._took["epochs"] + self.state.epoch, 3),
                "steps": self._took["steps"] + self.state.global_step,
                "images_per_step": batch * self.args.gradient_accumulation_steps * self.args.world_size,
                "batch": batch,
            }
        return output

    # ----------------------------------------------------------------------------------------------- results

    @property
    def metrics(self) -> dict[str, float]:
        return metrics_of(self)

    def save(self) -> None:
        """Write adapter, processor, `results.json` and card into the output folder; whole files replace old ones."""
        self.save_adapter()
        if self.is_world_process_zero():
            self.results.save(self.folder)
            self.create_model_card()

    def save_adapter(self) -> None:
        """Write the adapter as it is now, the sums of its head and the processor into the output folder."""
        with written_aside(self.folder, self.is_world_process_zero()) as aside:
            self.save_model(str(aside), _internal_call=True)
            if self.is_world_process_zero():
                self.tuner.save_sums(adapter_folder(aside, self.model.active_adapter))
                self.strategy.save(self, aside)

    def draw(self) -> None:
        """Draw the run into its folder, on the first process; where that fails, say why and go on."""
        if self.is_world_process_zero():
            with spared(f"No pictures of {self.folder}"):
                write_pictures(self.folder, self.results)
                self.drawn_tasks = self.finished_tasks
            self.create_model_card()

    @property
    def results(self) -> RunResults:
        """The record of the run so far."""
        return record_of(self)

    def _summary(self, task: Task) -> str:
        """What came of a task, beside what guessing would reach."""
        metrics = self.metrics
        classes = len(task.classes if self.scenario.task_known else self.tuner.head.config.classes)
        reached = self.accuracy_matrix[task.index, task.index]
        parts = [f"accuracy {percent(reached, 2)}% (chance {percent(1 / classes, 2)}%)"]
        if self.tasks_before + task.index:
            for name in ("average_accuracy", "forgetting"):
                value = metrics[name]
                text = f"{percent(value, 2)}%" if value == value else "not measured"
                parts.append(f"{name.replace('_', ' ')} {text}")
        return ", ".join([*parts, f"{self.train_seconds:.0f} s of training"])
