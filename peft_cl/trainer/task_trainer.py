"""The Trainer made right for one task after the other: what one task needs, nothing of the sequence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from ..scenarios import ContinualCollator, ImageTransform, Scenario, Task
from ..scenarios.pixels import options_of
from ..tuners.base.model import PromptPoolModel
from .arguments import ContinualTrainingArguments
from .bad_images import ImageReader, check_range, mended
from .batch_augmentation import check_batch_augmentation, of_that_shape
from .checks import check_augmentation, check_image_size, warn_of_empty_classes
from .clipping import clip_parts
from .costs import Flops
from .examples import EpochDraws, places_of, rows_by_image
from .image_cache import ImageCache
from .learning_rates import set_rates
from .processes import kept_counts, true_everywhere, without_repeats
from .progress import SequenceProgress
from .query_cache import QueryCache
from .strategy import AfterStep, Strategy
from .task_data import TaskData


class TaskTrainer(TaskData):
    """`transformers.Trainer` whose `fit` trains on the examples of tasks, with everything that a task needs made anew.

    Attributes:
        task: the task that is learnt or was learnt last; None before the first.
        queries: the frozen model's features of the images, where they are the same each time.
        optimizer_state: what the next optimizer takes up from an interrupted run.
        began: when the training of the task under way began, None between tasks; what is no training moves it on.
        query_seconds: seconds that the training images' queries took which are kept.
        steps_before: steps of the optimizer before the present `fit`, those of an interrupted run included.
        flops: what learning has taken so far, if it is counted.
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
        loss: Callable[..., torch.Tensor] | None,
        strategy: Strategy,
        **kwargs: Any,
    ):
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
        self.reader = ImageReader(scenario.image_column, self._transforms[False].to_rgb)
        scenario, self.passed_over = mended(scenario, self.reader, args.bad_images)
        self.scenario = scenario
        if args.process_index == 0:
            warn_of_empty_classes(scenario)
        check_range(scenario, self.reader, options_of(processing_class)["white"])
        check_augmentation(self._transforms[True], scenario, args.augmentation_draws)
        size = self._transforms[False].output_size or (64, 64)
        check_batch_augmentation(batch_augmentation, size, args.train_batch_size, args.device)
        self.make_collators()
        if args.eval_strategy != "no":  # the Trainer asks for it; `evaluate` knows what to measure
            kwargs.setdefault("eval_dataset", scenario[0].test)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collators[False],
            train_dataset=scenario[0].train,
            processing_class=processing_class,
            **kwargs,
        )
        self.tuner.head.own_loss = loss or strategy.own_loss  # of the last trainer, if it had one, no more
        self.progress = SequenceProgress(bars=not args.disable_tqdm)
        replaced = [self.pop_callback(each) for each in (ProgressCallback, PrinterCallback)]
        if any(replaced):  # a notebook has a table of its own
            self.add_callback(self.progress)
        self.add_callback(EpochDraws(self))
        self.add_callback(AfterStep(self))
        plain = self._transforms[False]
        self.queries = QueryCache(
            augmentation is None and batch_augmentation is None,
            scenario.image_column,
            args.query_cache_dir,
            partial(true_everywhere, self.accelerator),
            processor=[type(processing_class).__name__, processing_class.to_json_string(), plain.digest],
            batch=args.eval_batch_size,
        )
        self.images = ImageCache(args.image_cache_dir, plain, scenario.image_column) if args.image_cache_dir else None
        self.flops = Flops(args.count_flops)
        self.task: Task | None = None
        self.optimizer_state: dict[str, Any] | None = None
        self.selected_rows: list[torch.Tensor] | None = None
        self.key_sets = 1
        self.began: float | None = None
        self.query_seconds = 0.0
        self._uncounted = 0
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
        """The tuner inside the model, which is never wrapped: the Trainer keeps what DDP wraps in `model_wrapped`."""
        return self.model.base_model

    # ----------------------------------------------------------------------------------------------- one task

    @property
    def augmentation(self) -> Callable | None:
        """What is applied to each training image."""
        return self._transforms[True].augmentation

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images as the model reads them; where the processor does not say, the backbone's."""
        size = self._transforms[False].output_size
        if size is None:
            size = self.tuner.family.image_config(self.tuner.model).image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def weight_of_batch(self) -> float:
        """What the mean over the batch under way counts for; 0: its only example is another process's."""
        return self._weight

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside the block time passes that is none of training."""
        start, self._uncounted = time.perf_counter(), self._uncounted + 1
        try:
            yield
        finally:
            self._uncounted -= 1
            if self.began is not None and not self._uncounted:
                self.began += time.perf_counter() - start

    def fit(self, tasks: Sequence[Task]) -> TrainOutput:
        """The Trainer's own loop over the training examples of `tasks`; everything that belongs to a task is new."""
        # The Trainer keeps its optimizer, its schedule and its wrapped model from one train() to the next: rows that
        # the task brought would be in none of them, and an evaluation before would switch DDP off. A stream has no
        # tasks: its optimizer goes on.
        if self.scenario.boundaries:
            self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        self.train_dataset = self.examples(tasks, "train", images=self._images_of_a_fit(tasks))
        if self.strategy.needs_places:
            self.train_dataset.tensors["place"] = torch.from_numpy(np.concatenate([places_of(task) for task in tasks]))
        self.forget_steps()
        self.steps_before, self.state.global_step = self.steps_before + self.state.global_step, 0
        checkpoint, self._was_stopped = self._checkpoint(), False
        output = super().train(resume_from_checkpoint=checkpoint)
        self.flops.end_steps(self.state.global_step)
        if checkpoint is not None and checkpoint.endswith(f"-{self.state.global_step}"):
            self._nothing_left(checkpoint)
        return output

    def _images_of_a_fit(self, tasks: Sequence[Task]) -> float:
        """How many images the training on `tasks` goes through."""
        if self.args.max_steps > 0:
            return self.args.max_steps * self.args.images_per_step
        return self.args.num_train_epochs * sum(len(task.train) for task in tasks)

    def forget_steps(self) -> None:
        """Let go of what steps left behind for those after them."""
        self._losses, self._losses_counted, self._weights, self._weight = {}, 0, [], 1.0

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
        stopped = control.get("args", {}).get("should_training_stop", False)
        self._was_stopped = stopped and self.state.global_step < self.state.max_steps  # not by the end of the epochs

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
        rates = self.strategy.learning_rates(self.args) | (self.args.learning_rates or {})
        if rates:
            set_rates(optimizer, self.model, rates)
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
        with self.flops.step(ends=self.accelerator.sync_gradients):
            loss = self._learn_from(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                self.strategy.after_backward(self)
                if self.args.max_grad_norms:
                    clip_parts(self.model, self.args.max_grad_norms, self.accelerator)
        return loss

    def _learn_from(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        self._weight = self._weights.pop(0) if self._weights else 1.0
        # Of weight 0 is an example that another process learns: it must not be counted.
        with nullcontext() if self._weight else kept_counts(self.tuner):
            inputs = self.strategy.batch(self, self._prepare_inputs(inputs))
            if self.batch_augmentation is not None:
                with torch.no_grad():
                    augmented = self.batch_augmentation(inputs["pixel_values"])
                inputs["pixel_values"] = of_that_shape(augmented, inputs["pixel_values"])
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.tuner.head.keeping_logits() as logits:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            terms = self.strategy.losses(self, inputs, logits[0])
            loss = (loss + sum(terms.values())) * self._weight
            for name, value in {**self.tuner.head.last_losses, **terms}.items():
                self._losses[name] = self._losses.get(name, 0.0) + value.detach() * self._weight
            self._losses_counted += 1
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)  # once, and so that strategies read them too
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

    def _save(self, output_dir=None, state_dict=None):
        # The Trainer writes its arguments beside the adapter, in `training_args.bin`, and both are shared.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
