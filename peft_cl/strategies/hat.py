"""HAT: hard attention to the task says which units of the network a task uses, and guards those of earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from ..scenarios import Scenario, Task
from ..trainer import ContinualTrainer, register_strategy
from ..trainer.record import adapter_folder
from ..tuners.base.encoder import PromptedEncoder
from .isolating import Isolating, check_task, encoder_of, read_beside
from .settings import check_number


#: File beside the adapter: the gates, (tasks, units), by the name of the module that reads the units.
GATES_FILE = "hat_gates.safetensors"
#: From the authors' code: bounds of an embedding, and of what its gradient's compensation takes the cosh of.
LARGEST_EMBEDDING, LARGEST_COSH = 6.0, 50.0


@register_strategy("hat")
class HAT(Isolating):
    """Hard attention to the task (Serra et al., ICML 2018, arXiv 1801.01423).

    Each task has an embedding e with a number for each unit of the network; the unit is multiplied by the gate
    a = sigmoid(s e). As s grows to `smax` over each epoch, gates become 0 or 1. Weights between units that earlier
    tasks use do not move, and a regulariser has a task use few units that no earlier one does.

    The units of a transformer are what linear layers read within a block: the hidden units of each MLP, and the
    channels of the values that the attention's output projection reads. All else stands in the residual stream, which
    every task reads and writes whole: tokens, queries and keys, normalisation and the biases of what is added to the
    stream are units that all tasks use, gate 1, and their weights are fixed after the first task. That is eq. 2 with
    a = 1. Patch and position embeddings are fixed likewise.

    Where the paper multiplies gradients by 1 - min(a_i, a_j) (eq. 2), here the optimizer's step is multiplied: the
    same for SGD, while AdamW would divide a constant factor out again, and decays weights without any gradient.

    The embeddings are no parameters of the model. They are learnt by gradient descent of their own, as in the paper,
    at a rate that follows the trainer's schedule. A unit's gradient is the smaller, the more units there are: where
    gates hardly change in the steps there are, raise `embedding_rate`.

    In memory the model applies the gates of the task that `task_ids` names, else those of the newest task. A saved
    adapter has none: see `apply_task`.

    Args:
        smax: the largest s, above 1. The paper has 400.
        strength: c of the regulariser, 0 or more. The paper has 0.75.
        embedding_rate: learning rate of the embeddings, above 0. The paper begins with 0.05.

    Raises:
        ValueError: other settings; a scenario that does not tell the task of a test image, or in which a class is in
            several tasks; train_mask=False; a frozen backbone, or one whose blocks are not such an attention and MLP;
            torch_compile.

    Example:
        >>> model = get_peft_model(base, LinearProbeConfig())                     # doctest: +SKIP
        >>> trainer = ContinualTrainer(                                           # doctest: +SKIP
        ...     model, args, task_incremental(data, 5), processing_class=processor, strategy=[FineTuning(), HAT()]
        ... )
    """

    name = "HAT"
    limits = (
        "Each task has gates on the units of the backbone (HAT), which are in the file "
        f"`{GATES_FILE}`, and what loads the adapter does not apply them. Call "
        "`peft_cl.strategies.hat.apply_task(model, folder, task)` on the loaded model.",
    )

    def __init__(self, smax: float = 400.0, strength: float = 0.75, embedding_rate: float = 0.05):
        super().__init__()
        self.smax = check_number("smax", smax, 400, above=1)
        self.strength = check_number("strength", strength, 0.75, least=0)
        self.embedding_rate = check_number("embedding_rate", embedding_rate, 0.05, above=0)
        #: s of the present step.
        self.scale = self.smax
        self._units: dict[str, Units] = {}
        self._hooks: list[Any] = []  # on the encoder
        self._gates: list[Any] = []  # on the modules that read units, while the encoder runs
        self.forget()

    def forget(self) -> None:
        #: For each task (units,): the embeddings of all layers one after the other.
        self.embeddings: list[torch.Tensor] = []

    @property
    def tasks_known(self) -> int:
        return len(self.embeddings)

    def settings(self) -> dict[str, Any]:
        return {"smax": self.smax, "strength": self.strength, "embedding_rate": self.embedding_rate}

    def check(self, model: PeftModel, scenario: Scenario) -> None:
        super().check(model, scenario)
        gated_units(model.base_model.encoder)

    def prepare(self, model: PeftModel) -> None:
        super().prepare(model)
        encoder = model.base_model.encoder
        self._take_off_gates()
        for hook in self._hooks:  # of an earlier run's model
            hook.remove()
        # The encoder is the adapter's wrapper: what is put on here goes with the adapter. Bound methods survive
        # deepcopy and pickle.
        self._hooks = [
            encoder.register_forward_pre_hook(self._before_encoder),
            encoder.register_forward_hook(self._after_encoder, always_call=True),
        ]
        self._units = gated_units(encoder)

    def begin_task(self, trainer: ContinualTrainer, task: Task) -> None:
        if trainer.args.torch_compile:
            raise ValueError(
                f"torch_compile is True, but {self.name} puts gates into the layers, which a compiled one would not "
                "see. Set it to False."
            )
        count = sum(units.count for units in self._units.values())
        # The same on every process, and not from torch's generator: a resumed run draws them twice.
        drawn = np.random.default_rng([trainer.args.seed, task.index]).standard_normal(count)
        new = torch.from_numpy(drawn).float().to(trainer.args.device).requires_grad_()
        self.embeddings = [each.detach() for each in self.embeddings] + [new]

    # ----------------------------------------------------------------------------------------------- the forward pass

    def _before_encoder(self, encoder: PromptedEncoder, inputs: tuple) -> None:
        """Put a gate on each module that reads units."""
        self._take_off_gates()
        if encoder.active is None or not self.embeddings:
            return
        self._place(next(encoder.base_layer.parameters()).device)
        task_ids, embedding, scale = encoder.call and encoder.call.task_ids, self.embeddings[-1], self.smax
        if task_ids is not None:  # unknown tasks are refused by the head
            rows = task_ids.to(embedding.device).clamp(0, len(self.embeddings) - 1)
            embedding = torch.stack(self.embeddings)[rows, None]  # (B, 1, units)
        elif encoder.training:
            scale = self.scale
        for units in self._units.values():
            gate = partial(gated, embedding=embedding, units=units.span, scale=scale)
            self._gates.append(units.reader.register_forward_pre_hook(gate))

    def _after_encoder(self, encoder: PromptedEncoder, inputs: tuple, output: Any) -> None:
        """Take the gates off, unless a backward pass may run checkpointed layers once more."""
        if output is None or not (encoder.training and torch.is_grad_enabled()):
            self._take_off_gates()

    def _take_off_gates(self) -> None:
        for gate in self._gates:
            gate.remove()
        self._gates = []

    def _place(self, device: torch.device) -> None:
        """After an interruption they come back on the CPU."""
        self.embeddings = [
            each if each.device == device else each.detach().to(device).requires_grad_(each.requires_grad)
            for each in self.embeddings
        ]

    # ----------------------------------------------------------------------------------------------- a training step

    def batch(self, trainer: ContinualTrainer, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batches = len(trainer.callback_handler.train_dataloader)
        steps = max(-(-batches // trainer.args.gradient_accumulation_steps), 1)
        steps = min(steps, trainer.state.max_steps)
        self.scale = annealed(trainer.state.global_step % steps + 1, steps, self.smax)
        return inputs

    def losses(
        self, trainer: ContinualTrainer, inputs: Mapping[str, torch.Tensor], logits: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        gates = torch.sigmoid(self.scale * self.embeddings[-1])  # eq. 1
        return {"hat": self.strength * regulariser(gates, self.used())}  # eq. 6

    def used(self) -> torch.Tensor:
        """(units,): how much the tasks before the newest use each unit, the largest of their gates."""
        if len(self.embeddings) == 1:
            return torch.zeros_like(self.embeddings[0])
        return torch.sigmoid(self.smax * torch.stack(self.embeddings[:-1]).detach()).amax(0)  # section 2.3

    def shares(self, trainer: ContinualTrainer) -> dict[nn.Parameter, torch.Tensor]:
        shares = super().shares(trainer)
        if not shares:
            return shares
        used = self.used()
        stream = used.new_ones(1)  # the residual stream, which all tasks use
        for units in self._units.values():
            own = used[units.span]
            shares[units.reader.weight] = free_share(stream, own)
            for producer in units.producers:
                shares[producer.weight] = free_share(own, stream)
                if producer.bias is not None:
                    shares[producer.bias] = 1 - own
        return shares

    def after_backward(self, trainer: ContinualTrainer) -> None:
        self._take_off_gates()
        super().after_backward(trainer)
        embedding, scaler = self.embeddings[-1], trainer.accelerator.scaler
        gradient = trainer.accelerator.reduce(embedding.grad, "mean")  # DDP knows of the model's parameters alone
        if scaler is not None:  # what overflows leaves the weights where they are, and a unit of an embedding too
            gradient = (gradient / scaler.get_scale()).nan_to_num(0.0, 0.0, 0.0)
        embedding.grad = compensated(gradient, embedding.detach(), self.scale, self.smax)

    @torch.no_grad()
    def after_step(self, trainer: ContinualTrainer) -> None:
        super().after_step(trainer)
        embedding, group = self.embeddings[-1], trainer.optimizer.param_groups[0]
        decay = group["lr"] / (group.get("initial_lr") or group["lr"] or 1.0)
        embedding -= self.embedding_rate * decay * embedding.grad
        embedding.clamp_(-LARGEST_EMBEDDING, LARGEST_EMBEDDING)
        embedding.grad = None

    # ----------------------------------------------------------------------------------------------- what is kept

    def state_dict(self) -> dict[str, Any]:
        return {"embeddings": [each.detach() for each in self.embeddings]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.embeddings = [each.detach().clone() for each in state["embeddings"]]
        if self.embeddings:
            self.embeddings[-1].requires_grad_()

    def save(self, trainer: ContinualTrainer, folder: Path) -> None:
        gates = torch.sigmoid(self.smax * torch.stack(self.embeddings).detach()).cpu()
        parts = {name: gates[:, units.span].contiguous() for name, units in self._units.items()}
        save_file(parts, adapter_folder(folder, trainer.tuner.active_adapters[0]) / GATES_FILE)

    def kept_bytes(self, trainer: ContinualTrainer) -> dict[str, int]:
        """A number for each unit and task. Predicting needs them too."""
        return {"gates": sum(each.numel() * each.element_size() for each in self.embeddings)}


def apply_task(model: PeftModel, folder: str | Path, task: int) -> None:
    """Make a loaded model the network of one task, in place: the task's gates go into the weights that read the units.

    Args:
        model: what `AutoPeftModel.from_pretrained(folder)` gives. Load it anew for another task.
        folder: folder of the adapter, on this machine.
        task: number of the task, from 0, as in `task_ids`.

    Raises:
        ValueError: no adapter, no gates in the folder, gates of another backbone, no such task, or a model that was
            made another task's.

    Example:
        >>> model = AutoPeftModel.from_pretrained("run")          # doctest: +SKIP
        >>> apply_task(model, "run", task=0)                      # doctest: +SKIP
        >>> model(pixel_values, task_ids=torch.zeros(len(pixel_values), dtype=torch.long))    # doctest: +SKIP
    """
    encoder, gates = encoder_of(model), read_beside(folder, GATES_FILE, HAT.name)
    units = gated_units(encoder)
    if {name: each.count for name, each in units.items()} != {name: each.shape[-1] for name, each in gates.items()}:
        raise ValueError(
            f"The gates in {str(folder)!r} are of another backbone than this {type(encoder.base_layer).__name__}. "
            "Load the model from the same folder."
        )
    check_task(encoder, task, min(len(each) for each in gates.values()))
    with torch.no_grad():
        for name, each in units.items():
            each.reader.weight *= gates[name][task].to(each.reader.weight)


# --------------------------------------------------------------------------------------------------- the mathematics


def gated(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], *, embedding: torch.Tensor, units: slice, scale: float
) -> tuple[torch.Tensor, ...]:
    """What a module reads, (B, N, units), times its gates (eq. 1). `embedding`: (units of all layers,), or (B, 1, the
    same). A graph for each module: layers may be checkpointed one by one."""
    gate = torch.sigmoid(scale * embedding[..., units])
    return (inputs[0] * gate.to(inputs[0].dtype), *inputs[1:])


def annealed(step: int, steps: int, smax: float) -> float:
    """s in step number `step`, from 1, of the `steps` of an epoch: from 1 / smax to smax (eq. 3)."""
    return smax if steps == 1 else 1 / smax + (smax - 1 / smax) * (step - 1) / (steps - 1)


def compensated(gradient: torch.Tensor, embedding: torch.Tensor, scale: float, smax: float) -> torch.Tensor:
    """The gradient of an embedding as if the gates were sigmoid(e), whatever s is, times smax (eq. 5)."""
    steep = torch.cosh((scale * embedding).clamp(-LARGEST_COSH, LARGEST_COSH)) + 1
    return smax / scale * steep / (torch.cosh(embedding) + 1) * gradient


def regulariser(gates: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """R of eq. 7: the share that the task uses of what earlier tasks do not. Both (units,)."""
    return (gates * (1 - used)).sum() / (1 - used).sum().clamp_min(1e-12)


def free_share(outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs): 1 - min(a_i, a_j) for the weight from unit j to unit i (eq. 2), of how much each is used."""
    return 1 - torch.minimum(outputs[:, None], inputs[None, :])


# --------------------------------------------------------------------------------------------------- the units


@dataclass(frozen=True)
class Units:
    """Units that one linear module reads, and the linear modules that make them.

    Attributes:
        span: where they are among the units of all layers.
    """

    reader: nn.Linear
    producers: tuple[nn.Linear, ...]
    span: slice

    @property
    def count(self) -> int:
        return self.span.stop - self.span.start


def gated_units(encoder: PromptedEncoder) -> dict[str, Units]:
    """The units in each block of the encoder that an adapter wraps, by the name of the module that reads them.

    Raises:
        ValueError: the blocks are not made of an attention with query, key, value and output, and an MLP, all of them
            linear modules, whose units nothing else mixes.
    """
    base, family, found, end = encoder.base_layer, encoder.family, {}, 0
    names = {module: name for name, module in base.named_modules()}
    try:
        for layer in family.layer_list(base):
            attention, mlp = family.attention_of(layer), getattr(layer, family.mlp)
            query, key, value, output = (getattr(attention, name) for name in family.projections)
            *makers, last = (module for module in mlp.modules() if isinstance(module, nn.Linear))
            _check_parts(attention, [query, key, value, output])
            _check_parts(mlp, [*makers, last])
            for reader, producers in ((output, (value,)), (last, tuple(makers))):
                _check_widths(reader, producers, family.hidden_size(base))
                found[names[reader]] = Units(reader, producers, slice(end, end + reader.in_features))
                end += reader.in_features
        if not found:
            raise ValueError("it has no layers")
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"The backbone is a {type(base).__name__}, but HAT gates the units between the linear modules of an "
            f"attention and of an MLP, and here they are not known ({error}). Use a ViT, DeiT or DINOv2, or PackNet()."
        ) from error
    return found


def _check_parts(module: nn.Module, linear: list[nn.Module]) -> None:
    """Raise a `ValueError` if a module has weights of other kinds: those would mix units, or be fixed unseen."""
    weighted = {part for part in module.modules() if any(True for _ in part.parameters(recurse=False))}
    others = [part for part in weighted if part not in linear] + [
        part for part in linear if type(part) is not nn.Linear
    ]
    if others:
        raise ValueError(f"{type(module).__name__} has a {type(others[0]).__name__}")


def _check_widths(reader: nn.Linear, producers: tuple[nn.Linear, ...], width: int) -> None:
    """Raise a `ValueError` unless these read and write the residual stream, with the same units between."""
    made = {producer.out_features for producer in producers}
    if made != {reader.in_features} or {reader.out_features, *(each.in_features for each in producers)} != {width}:
        raise ValueError(f"{producers} make what {reader} reads, in a stream of {width}")
