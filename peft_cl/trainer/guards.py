"""What goes wrong without an error: each is told once in a run, with what was seen and the option that helps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from ..heads import HEADS
from ..heads.linear import TrainedRows
from ..metrics.same_rows import same_rows, ways_to_other_rows
from ..scenarios import Scenario, Task
from ..text import counted, percent
from ..tuners.base.config import PromptPoolConfig
from ..tuners.base.pool import PromptPool
from ..tuners.base.row_pool import RowPool
from ..tuners.base.similarity import cosine_sum


if TYPE_CHECKING:
    from .trainer import ContinualTrainer

#: Mean cosine of a pool's prompts from which on they count as one. Independent rows of U[0, 1) have 3/4, as all their
#: numbers are positive.
COLLAPSED = 0.9
#: From so many rows on they are said to have collapsed wherever they began: of two, one may begin as the other's copy.
ENOUGH_ROWS = 3
#: Share of all choices that the rows in use have; the rest are a few images that differ.
NEARLY_ALL = 0.99
#: Spread of queries over their length. Untrained ViTs have 0.2 for noise and more for images, trained ones as much.
SAME_QUERY = 1e-3
#: Norms in two layers of a transformer. Trained ones do not all stay at exactly 1 and 0.
ENOUGH_NORMS = 4
#: Prompts a task that are advised for a pool that the tasks share.
ROWS_A_TASK = 2
#: Times the cross-entropy from which on a term decides what is learnt.
FAR_ABOVE = 10
#: Forgetting (a fraction) that a head which is computed from sums over all tasks does not have.
MUCH_FORGOTTEN = 0.1


# ------------------------------------------------------------------------------------------------ before training


def random_backbone(backbone: nn.Module) -> str | None:
    """Of a backbone that was never trained: its norms, four or more, all scale by exactly 1 and shift by exactly 0."""
    norms = [part for part in backbone.modules() if isinstance(part, nn.LayerNorm) and part.elementwise_affine]
    if len(norms) < ENOUGH_NORMS or any(hasattr(norm.weight, "full_tensor") for norm in norms):  # divided over GPUs
        return None
    with torch.no_grad():
        trained = any((norm.weight != 1).any() or (norm.bias is not None and norm.bias.any()) for norm in norms)
    if trained:
        return None
    return (
        f"The backbone is randomly initialised: all {len(norms)} of its layer norms are exactly 1 and 0. Prompts "
        "steer what a pretrained backbone knows, and teach a random one next to nothing. Load a pretrained one, by "
        "AutoModelForImageClassification.from_pretrained(name) in Python or as model.name in a configuration."
    )


def trained_backbone(backbone: nn.Module) -> str | None:
    """Of a backbone that is trained though no strategy trains it."""
    trained = [weight for weight in backbone.parameters() if weight.requires_grad]
    if not trained:
        return None
    return (
        f"The backbone is not frozen: {counted(sum(weight.numel() for weight in trained), 'weight')} in "
        f"{counted(len(trained), 'tensor')} of it require a gradient. They are trained with the prompts and are not "
        "saved with the adapter, and queries change with them. Call "
        "model.base_model.encoder.base_layer.requires_grad_(False), or, if it is to be trained, give "
        "strategy=FineTuning(), which saves it."
    )


def small_pool(config: PromptPoolConfig, tasks: int) -> str | None:
    """Of a pool that `tasks` tasks share, with too few rows for them, and that does not grow (section 9.2)."""
    shared = getattr(config, "shares_rows", False) and not getattr(config, "use_prompt_mask", False)
    if tasks < 2 or not shared or config.growth is not None or config.train_prompts == "first_task":
        return None
    rows, wanted = config.total_rows, ROWS_A_TASK * tasks
    if rows >= wanted:
        return None
    return (
        f"The pool is small: {counted(rows, 'prompt')} for {tasks} tasks, which then overwrite each other's. Advised "
        f"are {ROWS_A_TASK} to {ROWS_A_TASK + 1} a task: set pool_size={wanted}, or growth='every_task', which adds "
        "growth_size prompts with each task."
    )


# ------------------------------------------------------------------------------------------------ after a task


def same_query(query: torch.Tensor, config: PromptPoolConfig) -> str | None:
    """Of queries (B, D) of a batch that do not differ from image to image."""
    if len(query) < 2:
        return None
    query = query.float()
    spread = query.var(0).sum().sqrt() / query.norm(dim=-1).mean().clamp_min(1e-30)
    if spread > SAME_QUERY:
        return None
    layer = getattr(config, "query_layer", None)
    cause = (
        "The images of the batch are alike, or the backbone makes nothing of them: look at what the image processor "
        "gives, and load a pretrained backbone."
        if layer is None
        else f"query_layer is {layer}, whose output may not have seen the image: set it to a later layer, or to None."
    )
    return (
        f"The query does not depend on the image: over a batch of {len(query)} it varies by {spread:.1g} of its "
        f"length, so that all images choose the same prompts. {cause}"
    )


def cosines_of_rows(pool: PromptPool) -> torch.Tensor | None:
    """Mean cosine of different prompts in each layer, (layers,); None without two rows in use."""
    if not isinstance(pool, RowPool) or "prompts" not in pool.row_axes:
        return None
    with torch.no_grad():
        rows = pool.flat("prompts", pool.rows("prompts"))[:, : pool.rows_in_use].float()
        count = rows.shape[1]
        if count < 2:
            return None
        return torch.stack([cosine_sum(each[None], each[None, :0]) for each in rows]) / (count * (count - 1))


def collapse(pool: PromptPool, before: torch.Tensor | None) -> str | None:
    """Of prompts that training has made alike.

    Args:
        pool: after a task in which it was trained.
        before: `cosines_of_rows` when the task began.
    """
    now = cosines_of_rows(pool)
    if now is None or now.max() <= COLLAPSED:
        return None
    place = int(now.argmax())
    rose = before is not None and before[place] < min(COLLAPSED, now[place])
    copies = getattr(pool.config, "shared_prompt_pool", False)  # which are alike by intention
    if not rose and (pool.rows_in_use < ENOUGH_ROWS or copies):
        return None
    began = f", {before[place]:.2f} when the task began" if rose else ""
    layers = pool.config.layers
    where = f" of layer {layers[place]}" if len(layers) > 1 else ""
    return (
        f"The prompts have collapsed: the {pool.rows_in_use} prompts{where} have a mean cosine of {now[place]:.2f}"
        f"{began} (above {COLLAPSED}), so that it matters little which are chosen. Set diversity_coefficient=0.1, "
        "whose term lowers these cosines, or give prompts a lower rate by learning_rates."
    )


def few_rows(counts: np.ndarray, choices: int, adapter: Mapping[str, Any], has_tasks: bool = True) -> str | None:
    """Of a pool of which a few rows serve all images, though there are more.

    Args:
        counts: how often each row was chosen for each task's test images, (tasks, rows).
        choices: rows that one image chooses.
        adapter: the settings, as the record has them.
        has_tasks: False for a stream.
    """
    total = np.sort(np.asarray(counts).sum(axis=0))[::-1]
    in_use = int(np.searchsorted(np.cumsum(total), NEARLY_ALL * total.sum()) + 1)
    if in_use > choices or len(total) <= choices:
        return None
    share = total[:in_use].sum() / total.sum()
    return (
        f"Few prompts are ever chosen: {in_use} of {len(total)} rows of the pool have {percent(share)} % of all "
        f"choices of {counted(len(counts), 'task')}, and one image chooses {choices}. The pool then works as one "
        "prompt for all images." + ways_to_other_rows(adapter, len(counts), has_tasks)
    )


def heavy_orthogonality(losses: Mapping[str, float]) -> str | None:
    """Of an orthogonality term far above the loss of the labels.

    Args:
        losses: means over a task, by the names in logs; that of the labels first.
    """
    labels, term = next(iter(losses.items()), ("", 0.0)), losses.get("orthogonality", 0.0)
    if not term > FAR_ABOVE * labels[1]:
        return None
    times = term / max(labels[1], 1e-12)
    return (
        f"The orthogonality term is {term:.3g} on average over the task, {times:,.0f} times the "
        f"{labels[0].replace('_', '-')} ({labels[1]:.3g}): prompts are held apart rather than learnt. Lower "
        "orthogonality_coefficient by as much."
    )


def forgetting_head(config: PromptPoolConfig, scenario: Scenario, forgetting: float) -> str | None:
    """Of a trained head that has forgotten, where a computed one would not.

    Args:
        forgetting: the metric after the last task, a fraction; NaN where it was not measured.
    """
    disjoint = sum(len(task.classes) for task in scenario) == len(scenario.classes)
    asked = scenario.boundaries and not scenario.task_known and disjoint
    if not asked or not issubclass(HEADS[config.head], TrainedRows) or not forgetting > MUCH_FORGOTTEN:
        return None
    return (
        f"The head forgets: forgetting is {percent(forgetting)} %, and head is {config.head!r}, which each task "
        "trains. Set head='lda', which is computed from sums over the images of all tasks, or take the preset 'best'."
    )


# ------------------------------------------------------------------------------------------------ in a run


class Guards(TrainerCallback):
    """Looks at a run of `trainer`, and gives `say` each warning once. It computes from weights and counts that are
    there, draws no random numbers, and waits for no device within a step.
    """

    def __init__(self, trainer: ContinualTrainer, say: Callable[[str], None]):
        self.trainer, self.say = trainer, say
        self.said: set[str] = set()
        self.query: torch.Tensor | None = None
        self.hook: Any = None
        self.looked = False
        self._forget_task()

    def _forget_task(self) -> None:
        self.before: torch.Tensor | None = None
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = 0

    def tell(self, what: str, text: str | None) -> None:
        """Say `text`, if there is one and nothing was said of `what` before; on the first process."""
        if text is None or what in self.said or not self.trainer.is_world_process_zero():
            return
        self.said.add(what)
        self.say(text)

    def before_training(self) -> None:
        trainer, tuner = self.trainer, self.trainer.tuner
        backbone = tuner.encoder.base_layer
        if not any(each.trains_backbone for each in trainer.strategy.strategies):
            self.tell("random backbone", random_backbone(backbone))
            self.tell("trained backbone", trained_backbone(backbone))
        if trainer.scenario.boundaries and not trainer.tasks_before:  # the size of a pool that has learnt is given
            self.tell("small pool", small_pool(tuner.head.config, len(trainer.scenario)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pool = self.trainer.tuner.pool
        if self.before is None:
            self.before = cosines_of_rows(pool)
        if not self.looked and self.hook is None and pool.needs_query:
            self.hook = pool.register_forward_pre_hook(self._take_query)

    def _take_query(self, pool: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Of the first batch; it is looked at after the task, when the device has nothing to wait for."""
        if inputs and inputs[0] is not None:
            self.query = inputs[0].detach()
        self._let_go()

    def _let_go(self) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook, self.looked = None, True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        for name, value in self.trainer.tuner.head.last_losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def after_task(self, task: Task) -> None:
        trainer, tuner = self.trainer, self.trainer.tuner
        self._let_go()
        if self.query is not None:
            self.tell("query", same_query(self.query, tuner.head.config))
            self.query = None
        if self.steps:
            self.tell("collapse", collapse(tuner.pool, self.before))
            means = {name: float(value) / self.steps for name, value in self.sums.items()}
            self.tell("orthogonality", heavy_orthogonality(means))
        self._forget_task()
        is_last = trainer.finished_tasks == len(trainer.scenario)
        self.look_at_rows(is_last)
        if is_last and not trainer.strategy.why_trained_head:
            forgetting = trainer.metrics.get("forgetting", float("nan"))
            self.tell("head", forgetting_head(tuner.head.config, trainer.scenario, forgetting))

    def look_at_rows(self, is_last: bool) -> None:
        """What the test images choose. Of several tasks the first may well choose few rows, and those to come others;
        that all of them choose the same is known at the end."""
        counts, pool = self.trainer.prompt_usage, self.trainer.tuner.pool
        if counts is None or not (is_last or len(counts) > 1) or not counts.sum():
            return
        results = self.trainer.results
        if is_last:
            self.tell("rows", same_rows(results))
        choices = getattr(pool.config, "top_k", 1) * self.trainer.key_sets
        adapter, has_tasks = results.hyperparameters.get("adapter", {}), self.trainer.scenario.boundaries
        self.tell("rows", few_rows(counts, choices, adapter, has_tasks))
