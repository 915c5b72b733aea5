"""PackNet: tasks are packed into one network, each into the weights that those before it could do without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from ..scenarios import Scenario, Task
from ..trainer import ContinualTrainer, register_strategy
from ..trainer.record import adapter_folder
from .isolating import Isolating, check_task, encoder_of, read_beside
from .settings import check_number


#: File beside the adapter: for each weight the number of its task, counted from 1.
MASKS_FILE = "packnet_masks.safetensors"
#: Owner of a weight that no task has.
FREE = 0
#: What one byte can number.
MOST_TASKS = 255


@register_strategy("packnet")
class PackNet(Isolating):
    """PackNet (Mallya & Lazebnik, CVPR 2018, arXiv 1711.05769): prune, retrain, and give the rest to the next task.

    A task trains all weights that no earlier task owns. After the share 1 - `retrain` of its steps, the smallest of
    these weights (the share `prune` of them in each layer, by magnitude) are set to 0 and left to later tasks. The
    rest is trained for the remaining steps, then belongs to the task and never changes again. A task's network is its
    own weights and those of earlier tasks; all others are 0.

    What is divided are the matrices of linear layers and the kernels of convolutions, the patch embedding among them.
    Biases, normalisation, position embeddings and tokens are trained in the first task and fixed after it (section 3
    of the paper). The head has rows of its own for each task, which are not pruned.

    Within a step it holds a copy of the trained weights. Images of earlier tasks are measured with the network of
    their task, which takes a second pass; `eval_loss` is that of the newest task's network.

    Args:
        prune: share of the present task's weights that is left to later tasks, above 0 and below 1. After t tasks the
            share prune ** t is free. The paper has 0.5 and 0.75.
        retrain: share of a task's steps after the pruning, 0 or more and below 1. The paper has a third.

    Raises:
        ValueError: other settings; a scenario that does not tell the task of a test image, or in which a class is in
            several tasks; train_mask=False; a frozen backbone; one with BatchNorm, whose statistics every batch
            changes; more tasks than there are weights for.

    Example:
        >>> model = get_peft_model(base, LinearProbeConfig())                     # doctest: +SKIP
        >>> trainer = ContinualTrainer(                                           # doctest: +SKIP
        ...     model, args, task_incremental(data, 5), processing_class=processor, strategy=[FineTuning(), PackNet()]
        ... )
    """

    name = "PackNet"
    limits = (
        "It holds one network for each task (PackNet), and what loads it gives that of the newest task. For an "
        "earlier one, call `peft_cl.strategies.packnet.apply_task(model, folder, task)` on the loaded model.",
    )

    def __init__(self, prune: float = 0.5, retrain: float = 0.33):
        super().__init__()
        self.prune = check_number("prune", prune, 0.5, above=0, below=1)
        self.retrain = check_number("retrain", retrain, 0.33, least=0, below=1)
        self.forget()

    def forget(self) -> None:
        #: Task that owns each weight, uint8 from 1; `FREE`: none. By the weight's name in the encoder.
        self.owners: dict[str, torch.Tensor] = {}
        self.tasks_known = 0
        #: Whether the present task's weights are pruned.
        self.pruned = False

    def settings(self) -> dict[str, Any]:
        return {"prune": self.prune, "retrain": self.retrain}

    def check(self, model: PeftModel, scenario: Scenario) -> None:
        super().check(model, scenario)
        encoder = model.base_model.encoder
        for module in encoder.modules():
            if getattr(module, "track_running_stats", False):
                raise ValueError(
                    f"The backbone has {type(module).__name__}, whose running statistics every batch changes, but "
                    f"{self.name} keeps the networks of earlier tasks as they are. Use a backbone with layer "
                    "normalisation, such as a ViT."
                )
        sizes, tasks = [weight.numel() for weight in weights_of(encoder).values()], len(scenario)
        if tasks > MOST_TASKS:
            raise ValueError(
                f"The scenario has {tasks} tasks, but {self.name} numbers them by one byte, up to {MOST_TASKS}. Make "
                "fewer tasks."
            )
        if not free_after(tasks - 1, sizes, self.prune):
            enough = [
                each for each in (0.5, 0.75, 0.9, 0.99) if each > self.prune and free_after(tasks - 1, sizes, each)
            ]
            remedy = f"Give a larger prune, such as {enough[0]}" if enough else "Make fewer tasks"
            raise ValueError(
                f"prune is {self.prune} and the scenario has {tasks} tasks, but each task needs weights that those "
                f"before it leave: of n weights in a layer, n * prune ** {tasks - 1}. {remedy}."
            )

    def begin_task(self, trainer: ContinualTrainer, task: Task) -> None:
        """The task takes all that is free."""
        number = trainer.tuner.head.config.num_tasks
        weights = weights_of(trainer.tuner.encoder)
        if number == 1:
            self.owners = {name: torch.zeros_like(value, dtype=torch.uint8) for name, value in weights.items()}
        self._place(trainer.args.device)
        if number > MOST_TASKS or not any((owner == FREE).any() for owner in self.owners.values()):
            raise ValueError(
                f"{number - 1} tasks are learnt, but {self.name} has no weights left for {task.name!r}: with prune "
                f"{self.prune}, a task leaves that share of its own. Begin anew, with a larger prune or fewer tasks."
            )
        for owner in self.owners.values():
            owner[owner == FREE] = number
        self.tasks_known, self.pruned = number, False

    def _place(self, device: torch.device) -> None:
        """After an interruption they come back on the CPU."""
        self.owners = {name: owner.to(device) for name, owner in self.owners.items()}

    def shares(self, trainer: ContinualTrainer) -> dict[nn.Parameter, torch.Tensor]:
        shares = super().shares(trainer)
        if shares or self.pruned:
            self._place(trainer.args.device)
            for name, weight in weights_of(trainer.tuner.encoder).items():
                shares[weight] = self.owners[name] == self.tasks_known
        return shares

    def after_step(self, trainer: ContinualTrainer) -> None:
        super().after_step(trainer)
        done = trainer.state.global_step + 1  # the Trainer counts the step after this
        if not self.pruned and done >= steps_before_pruning(trainer.state.max_steps, self.retrain):
            self._prune(trainer)

    def end_task(self, trainer: ContinualTrainer, task: Task) -> None:
        if not self.pruned:  # the training was stopped early, or its best checkpoint is one before the pruning
            self._prune(trainer)

    @torch.no_grad()
    def _prune(self, trainer: ContinualTrainer) -> None:
        """The same on every process: their weights are the same."""
        self._place(trainer.args.device)
        for name, weight in weights_of(trainer.tuner.encoder).items():
            self.owners[name] = pruned(weight, self.owners[name], self.tasks_known, self.prune)
            weight.masked_fill_(self.owners[name] == FREE, 0.0)
        self.pruned = True

    @torch.no_grad()
    def predict(
        self, trainer: ContinualTrainer, inputs: dict[str, torch.Tensor], logits: torch.Tensor
    ) -> torch.Tensor:
        """The model's logits are those of the newest task's network, also while that is trained."""
        if logits is None or not self.owners:
            return logits
        self._place(trainer.args.device)
        model, scores = trainer.accelerator.unwrap_model(trainer.model), logits.clone()
        for task in inputs["task_ids"].unique().tolist():
            if task + 1 >= self.tasks_known:
                continue
            rows = inputs["task_ids"] == task
            batch = {name: inputs[name][rows] for name in ("pixel_values", "task_ids")}
            with network_of(trainer.tuner.encoder, self.owners, task + 1), trainer.accelerator.autocast():
                scores[rows] = model(**batch).logits.to(logits)
        return scores

    def state_dict(self) -> dict[str, Any]:
        return {"owners": self.owners, "tasks": self.tasks_known, "pruned": self.pruned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.owners, self.tasks_known, self.pruned = dict(state["owners"]), state["tasks"], state["pruned"]

    def save(self, trainer: ContinualTrainer, folder: Path) -> None:
        owners = {name: owner.cpu().contiguous() for name, owner in self.owners.items()}
        save_file(owners, adapter_folder(folder, trainer.tuner.active_adapters[0]) / MASKS_FILE)

    def kept_bytes(self, trainer: ContinualTrainer) -> dict[str, int]:
        """One byte a weight. Predicting for earlier tasks needs them too."""
        return {"masks": sum(owner.numel() * owner.element_size() for owner in self.owners.values())}


def apply_task(model: PeftModel, folder: str | Path, task: int) -> None:
    """Reduce a loaded model to the network of one task, in place: the weights that the task does not see become 0.

    Args:
        model: what `AutoPeftModel.from_pretrained(folder)` gives. Load it anew for another task.
        folder: folder of the adapter, on this machine.
        task: number of the task, from 0, as in `task_ids`.

    Raises:
        ValueError: no adapter, no masks in the folder, masks of another backbone, no such task, or a model that was
            reduced to another task.

    Example:
        >>> model = AutoPeftModel.from_pretrained("run")          # doctest: +SKIP
        >>> apply_task(model, "run", task=0)                      # doctest: +SKIP
        >>> model(pixel_values, task_ids=torch.zeros(len(pixel_values), dtype=torch.long))    # doctest: +SKIP
    """
    encoder, owners = encoder_of(model), read_beside(folder, MASKS_FILE, PackNet.name)
    weights = weights_of(encoder)
    if {name: weight.shape for name, weight in weights.items()} != {name: each.shape for name, each in owners.items()}:
        raise ValueError(
            f"The masks in {str(folder)!r} are of another backbone than this {type(encoder.base_layer).__name__}. "
            "Load the model from the same folder."
        )
    check_task(encoder, task, max(int(owner.max()) for owner in owners.values()))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.masked_fill_(unseen(owners[name].to(weight.device), task + 1), 0.0)


def weights_of(encoder: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are divided among tasks, by their names in the encoder that the adapter wraps."""
    modules = encoder.base_layer.named_modules()
    return {f"{name}.weight": module.weight for name, module in modules if isinstance(module, (nn.Linear, nn.Conv2d))}


def pruned(weight: torch.Tensor, owner: torch.Tensor, task: int, prune: float) -> torch.Tensor:
    """`owner` after the share `prune` of the task's weights in one layer, the smallest by magnitude, became free.

    Args:
        weight: of any shape.
        owner: of the same shape, the number of the task that owns each weight.
    """
    own = (owner == task).flatten().nonzero()[:, 0]
    magnitudes = weight.detach().flatten()[own].abs()
    smallest = magnitudes.argsort(stable=True)[: round(prune * len(own))]  # section 3: a fixed share of each layer
    return owner.flatten().index_fill(0, own[smallest], FREE).view_as(owner)


def unseen(owner: torch.Tensor, task: int) -> torch.Tensor:
    """Which weights are no part of the network of `task`, counted from 1: those that are free or of later tasks."""
    return (owner == FREE) | (owner > task)


def steps_before_pruning(steps: int, retrain: float) -> int:
    """After how many of a task's steps its weights are pruned, at least 1."""
    return max(1, round(steps * (1 - retrain)))


def free_after(tasks: int, sizes: Sequence[int], prune: float) -> int:
    """How many weights are free after `tasks` tasks, in layers of so many weights."""
    free = list(sizes)
    for _ in range(tasks):
        free = [round(prune * count) for count in free]
    return sum(free)


@contextmanager
def network_of(encoder: nn.Module, owners: dict[str, torch.Tensor], task: int) -> Iterator[None]:
    """Inside the block, the encoder has the weights that `task`, counted from 1, sees, and 0 for all others."""
    weights = weights_of(encoder)
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data.masked_fill_(unseen(owners[name], task), 0.0)
        yield
    finally:
        for name, weight in weights.items():
            weight.data.copy_(kept[name])
