"""The Trainer made right for one task after the other: what one task needs, nothing of the sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from datasets import Dataset
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from ..scenarios import ContinualCollator, ImageTransform, Scenario, Task
from ..tuners.base.model import PromptPoolModel
from .arguments import ContinualTrainingArguments
from .checks import check_augmentation, check_image_size
from .examples import EpochDraws, TaskExamples, rows_by_image
from .image_cache import ImageCache
from .learning_rates import set_rates
from .processes import kept_counts, without_repeats
from .progress import SequenceProgress
from .query_cache import QueryCache
from .strategy import Strategy


class TaskTrainer(Trainer):
    """`transformers.Trainer` whose `fit` trains on the examples of tasks, with everything that a task needs made anew.

    Attributes:
        task: the task that is learnt or was learnt last; None before the first.
        queries: the frozen model's features of the images, where they are the same each time.
        optimizer_state: what the next optimizer takes up from an interrupted run.
        steps_before: steps of the optimizer before the present `fit`, those of an interrupted run included.
        selected_rows: collects the pool rows chosen for each image, (batch, choices), while it is a list.
    """

    args: ContinualTrainingArguments

    def __init__(
        self,
        model: Any,
        args: ContinualTrainingArguments,
        scenario: Scenario,
        processing_class: Any,
        augmentation: Callable | None,
        batch_augmentation: Callable[[torch.Tensor], torch.Tensor] | None,
        strategy: Strategy,
        **kwargs: Any,
    ):
        self.scenario = scenario
        self.strategy = strategy
        self.batch_augmentation = batch_augmentation
        config = model.peft_config[model.active_adapter]
        # An adapter that has learnt tasks before goes on: the rows of its head come first.
        self.tasks_before = config.num_tasks
        self.classes_before = tuple(config.classes if config.tasks else ())
        self._transforms = {
            training: ImageTransform(processing_class, augmentation if training else None)
            for training in (True, False)
        }
        check_image_size(model, self._transforms[False].output_size)
        check_augmentation(self._transforms[True], scenario, args.augmentation_draws)
        self.make_collators()
        if args.eval_strategy != "no":  # the Trainer asks for it; `evaluate` knows what to measure
            kwargs.setdefault("eval_dataset", scenario[0].test)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collators[False],
            train_dataset=scenario[0].train,
            processing_class=processing_class,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
            **kwargs,
        )
        self.progress = SequenceProgress()
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(self.progress)
        self.pop_callback(PrinterCallback)
        self.add_callback(EpochDraws(self))
        plain = self._transforms[False]
        self.queries = QueryCache(
            augmentation is None and batch_augmentation is None,
            scenario.image_column,
            args.query_cache_dir,
            processor=[type(processing_class).__name__, processing_class.to_json_string(), plain.digest],
            batch=args.eval_batch_size,
        )
        self.images = ImageCache(args.image_cache_dir, plain, scenario.image_column) if args.image_cache_dir else None
        self.task: Task | None = None
        self.optimizer_state: dict[str, Any] | None = None
        self.selected_rows: list[torch.Tensor] | None = None
        self.key_sets = 1
        self.steps_before = 0
        self._losses: dict[str, torch.Tensor] = {}
        self._losses_counted = 0
        self._weights: list[float] = []
        self._weight = 1.0
        self._was_stopped = False

    def create_accelerator_and_postprocess(self) -> None:
        """Compile the model's layers, each for itself, where `torch_compile` or the launcher asks for compiling.

        The Trainer would compile the model as a whole, anew at each task, whose head and prompts are others.
        """
        super().create_accelerator_and_postprocess()
        if self.args.tf32 is False:  # accelerate allows it where something is compiled
            torch.backends.cuda.matmul.allow_tf32 = False
        wanted = TorchDynamoPlugin(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        if wanted.backend != DynamoBackend.NO:
            self.tuner.encoder.compile_layers(**wanted.to_kwargs())

    def make_collators(self) -> None:
        """Collators that know the labels of the scenario's classes."""
        scenario = self.scenario
        self._collators = {
            training: ContinualCollator(
                transform,
                scenario.label_index(self.classes_before),
                scenario.image_column,
                scenario.label_column,
                label_names=scenario.label_names,
            )
            for training, transform in self._transforms.items()
        }
        self.data_collator = self._collators[False]

    @property
    def tuner(self) -> PromptPoolModel:
        """The tuner inside the model, however the model is wrapped."""
        return self.accelerator.unwrap_model(self.model).base_model

    # ----------------------------------------------------------------------------------------------- one task

    @property
    def augmentation(self) -> Callable | None:
        """What is applied to each training image."""
        return self._transforms[True].augmentation

    def fit(self, tasks: Sequence[Task]) -> TrainOutput:
        """The Trainer's own loop over the training examples of `tasks`; everything that belongs to a task is new."""
        # The Trainer keeps its optimizer, its schedule and its wrapped model from one train() to the next: rows that
        # the task brought would be in none of them, and an evaluation before would switch DDP off. A stream has no
        # tasks: its optimizer goes on.
        if self.scenario.boundaries:
            self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        self.train_dataset = self.examples(tasks, "train")
        self._losses, self._losses_counted = {}, 0
        self.steps_before, self.state.global_step = self.steps_before + self.state.global_step, 0
        checkpoint, self._was_stopped = self._checkpoint(), False
        try:
            output = super().train(resume_from_checkpoint=checkpoint)
            if checkpoint is not None and checkpoint.endswith(f"-{self.state.global_step}"):
                self._nothing_left(checkpoint)
            return output
        finally:
            if len(tasks) == 1:  # tasks that are gone through together come again
                self.forget(tasks)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """After a checkpoint of the last step nothing is left to train; the Trainer would take one step more."""
        if self.state.global_step >= self.state.max_steps or self._was_stopped:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_callback_state(self) -> None:
        """The Trainer forgets that a callback had stopped the training when the checkpoint was written."""
        super()._load_callback_state()
        control = self.state.stateful_callbacks.get("TrainerControl", {})
        self._was_stopped = control.get("args", {}).get("should_training_stop", False)

    def _checkpoint(self) -> str | None:
        """The checkpoint that this task goes on from, if it was interrupted."""
        return None

    def _nothing_left(self, checkpoint: str) -> None:
        """Called if the task was at its end in the checkpoint that it went on from."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with `learning_rates` where parts have rates of their own."""
        if self.optimizer is not None:  # of a stream
            return self.optimizer
        optimizer = super().create_optimizer(model)
        if self.args.learning_rates:
            set_rates(optimizer, self.model, self.args.learning_rates)
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
            self.optimizer_state = None
        return optimizer

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device; images that were kept as bytes become pixels there."""
        inputs = super()._prepare_inputs(inputs)
        if "image_bytes" not in inputs:
            return inputs
        rest = {name: value for name, value in inputs.items() if name != "image_bytes"}
        return {"pixel_values": self._transforms[False].from_bytes(inputs["image_bytes"]), **rest}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None are counted: the Trainer's estimate is one for text, and walks through the model at each step."""
        return 0

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The Trainer's batches of a step; the last of an epoch is of real examples alone on every process."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._weights = [1.0] * len(batches)
        if batches and not self.args.dataloader_drop_last:
            examples = len(self.train_dataset)
            batches[-1], self._weights[-1] = without_repeats(batches[-1], examples, self.accelerator)
        return batches, items

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self._weight = self._weights.pop(0) if self._weights else 1.0
        # Of weight 0 is an example that another process learns: it must not be counted.
        with nullcontext() if self._weight else kept_counts(self.tuner):
            inputs = self.strategy.batch(self, self._prepare_inputs(inputs))
            if self.batch_augmentation is not None:
                inputs["pixel_values"] = self._augmented(inputs["pixel_values"])
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.strategy.after_backward(self)
        return loss

    @torch.no_grad()
    def _augmented(self, pixel_values: torch.Tensor) -> torch.Tensor:
        augmented = self.batch_augmentation(pixel_values)
        if getattr(augmented, "shape", None) != pixel_values.shape:
            found = tuple(augmented.shape) if isinstance(augmented, torch.Tensor) else type(augmented).__name__
            raise ValueError(
                f"batch_augmentation makes {found} of a batch of shape {tuple(pixel_values.shape)}, but must give a "
                "tensor of that shape. Crop and scale to the backbone's size in it."
            )
        return augmented

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            terms = self.strategy.losses(self)
            loss = (loss + sum(terms.values())) * self._weight
            for name, value in {**self.tuner.head.last_losses, **terms}.items():
                self._losses[name] = self._losses.get(name, 0.0) + value.detach() * self._weight
            self._losses_counted += 1
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        selected = self.tuner.head.last_selected
        if self.selected_rows is not None and selected is not None:
            rows = rows_by_image(selected, self.tuner.pool.rows_in_use)
            self.key_sets = 1 if selected.ndim == 2 else len(selected)
            self.selected_rows.append(self.accelerator.gather_for_metrics(rows))
        return loss, self.strategy.predict(self, inputs, logits), labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside the loss, log its terms one by one: means since the last log, over all processes.

        Each log names its task. To callbacks the steps go on from task to task, so that curves do not overlap.
        """
        if "loss" in logs and self._losses_counted:
            means = torch.stack([value.float() for value in self._losses.values()]) / self._losses_counted
            means = self.accelerator.reduce(means, "mean").tolist()
            logs.update(zip(self._losses, means, strict=True))
            self._losses, self._losses_counted = {}, 0
        if self.task is not None:
            logs["task"] = self.task.index
        own = self.state.global_step
        self.state.global_step += self.steps_before
        try:
            super().log(logs, start_time)
        finally:
            self.state.global_step = own

    # ----------------------------------------------------------------------------------------------- data

    def examples(self, tasks: Sequence[Task], split: str, *, measured: bool = False) -> TaskExamples:
        """The tasks' `"train"` or `"test"` examples one after the other, with what belongs to each of them: its label
        in the order of the model's outputs, its query where that is kept, its task where that is known at test.

        Args:
            measured: whether training examples are to be measured on, as test examples are.
        """
        labels = [self.scenario.model_labels(task, split, self.classes_before) for task in tasks]
        tensors = {"model_label": torch.from_numpy(np.concatenate(labels))}
        if self.args.cache_queries:
            with self.accelerator.autocast():  # in the precision of the steps
                tensors["query"] = self.queries.queries(tasks, split, self.tuner, self.plain_batches)
        if (split == "test" or measured) and self.scenario.task_known:
            numbers = torch.tensor([self.tasks_before + task.index for task in tasks])
            sizes = torch.tensor([len(getattr(task, split)) for task in tasks])
            tensors["task_ids"] = numbers.repeat_interleave(sizes)
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        augmented = split == "train" and self.augmentation is not None
        # What is trained on, so that two tasks' draws differ.
        seed = [self.args.seed, *(task.index for task in tasks)] if augmented else None
        parts = [getattr(task, split) for task in tasks]
        draws = self.args.augmentation_draws
        examples = TaskExamples(parts, tensors, seed, None if augmented else self._image_bytes(parts), draws)
        come_again = augmented and draws and self.batch_augmentation is None
        if come_again and self.args.cache_queries and self.queries.are_fixed(self.tuner):
            examples.drawn["query"] = torch.stack([self._queries_of_draw(examples, draw) for draw in range(draws)])
        return examples

    def _queries_of_draw(self, examples: TaskExamples, draw: int) -> torch.Tensor:
        """Queries of augmented images, (examples, D) float32."""
        examples.begin_epoch(draw)
        with self.accelerator.autocast():
            batches = self._batches(examples, training=True)
            return torch.cat([self.tuner.query(batch["pixel_values"]).float().cpu() for batch in batches])

    def part_of(self, task: Task, rows: Sequence[int]) -> Task:
        """The task with some of its training examples, in the order of `rows`. `forget` it after use."""
        part = replace(task, train=task.train.select(rows))
        if self.images is not None:
            self.images.take(part.train, task.train, rows)
        return part

    def forget(self, tasks: Sequence[Task]) -> None:
        """Let go of what is kept of the training examples of `tasks`; files stay."""
        self.queries.forget(tasks)
        if self.images is not None:
            for task in tasks:
                self.images.forget(task.train)

    def _image_bytes(self, parts: Sequence[Dataset]) -> list[torch.Tensor] | None:
        return None if self.images is None else [self.images.of(part) for part in parts]

    def training_batch(self, examples: TaskExamples, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Some of the examples as a batch of training, augmented as others are, on the device."""
        examples.begin_epoch(int(torch.randint(2**62, ())))  # other draws each time
        return self._prepare_inputs(self._collators[True](examples.__getitems__(indices)))

    def plain_batches(
        self,
        task: Task,
        split: str = "train",
        batch_size: int | None = None,
        rows: Sequence[int] | None = None,
        with_queries: bool = False,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Un-augmented batches of all of a task's examples (or of `rows`), in order, on this process alone."""
        tensors = {"model_label": torch.from_numpy(self.scenario.model_labels(task, split, self.classes_before))}
        if with_queries:
            with self.accelerator.autocast():
                tensors["query"] = self.queries.queries([task], split, self.tuner, self.plain_batches)
        parts = [getattr(task, split)]
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        examples = TaskExamples(parts, tensors, images=self._image_bytes(parts))
        return self._batches(examples, batch_size, rows=rows)

    def _batches(
        self,
        examples: TaskExamples,
        batch_size: int | None = None,
        training: bool = False,
        rows: Sequence[int] | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        # A generator of its own: the order of the training images must not depend on whether queries are cached.
        loader = DataLoader(
            examples,
            batch_size or self.args.eval_batch_size,
            sampler=rows,
            collate_fn=self._collators[training],
            generator=torch.Generator(),
        )
        return (self._prepare_inputs(batch) for batch in loader)

    def get_train_dataloader(self):
        self.data_collator = self._collators[True]
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = self._collators[False]

    def _get_train_sampler(self, train_dataset=None):
        if self.scenario.boundaries:
            return super()._get_train_sampler(train_dataset)
        return SequentialSampler(train_dataset or self.train_dataset)  # the order of a stream is the data

    def get_eval_dataloader(self, eval_dataset=None):
        # Kept loaders are found by a name that all data sets given as objects share: a stale one would be served.
        self.__dict__.pop("_eval_dataloaders", None)
        with self._every_example():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._every_example():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _every_example(self) -> Iterator[None]:
        """Incomplete batches are dropped in training only; every test image counts."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def _save(self, output_dir=None, state_dict=None):
        # The Trainer writes its arguments beside the adapter, in `training_args.bin`, and both are shared.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
