"""Ensembles at test time: of one adapter's choices of prompts (top-1 to top-k), and of several adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..backbones.modes import evaluation_mode
from ..heads.checks import check_count, check_number
from ..text import brief, counted
from ..tuners.base.model import PromptPoolModel
from ..tuners.base.pool import PromptPool
from ..tuners.base.similarity import compare
from ..tuners.dualprompt.pool import DualPromptPool
from ..tuners.l2p.pool import L2PPool


# ------------------------------------------------------------------------------------------------------- top-1 to k


@contextmanager
def ensemble_of_top_k(model: PeftModel, k: int) -> Iterator[PeftModel]:
    """Inside the block, the model's logits are the mean over those of k = 1, 2, ..., K chosen prompts.

    A wrong choice of prompts counts less where several choices are asked. With z_k, the logits under the k prompts
    whose keys are nearest to the query,

        logits = 1/K sum_{k=1..K} z_k.

    L2P has `top_k` = k in the k-th pass, whatever its configuration says. DualPrompt chooses one expert, so the k-th
    pass takes the expert with the k-th nearest key: the K best experts are averaged. The query pass is done once; the
    prompted pass is done K times. Task evidence, temperature and masks are applied to the mean. The configuration is
    the same afterwards, and is never written.

    Args:
        model: A `PeftModel` with L2P or DualPrompt, in evaluation mode when it is called.
        k: K, at least 1 and at most the rows that take part in a choice.

    Raises:
        ValueError: Another `k`, or a method that does not choose its prompts by rank.

    Example:
        >>> with ensemble_of_top_k(model, 3):                    # doctest: +SKIP
        ...     logits = model(pixel_values=pixel_values).logits
    """
    tuner, base = model.base_model, model.get_base_model()
    check_count("k", k)
    _choices(tuner, k)  # before any call
    forward, was_own = base.forward, "forward" in vars(base)

    def averaged(*args: Any, **kwargs: Any) -> Any:
        if base.training:
            raise ValueError(
                "The model is in training mode, but an ensemble of top-1 to top-k predicts only. Call model.eval(), "
                "or train outside the block."
            )
        logits = []
        for choice in _choices(tuner, k):
            with choice():
                output = forward(*args, **kwargs)
            logits.append(output[0] if isinstance(output, tuple) else output.logits)
        mean = torch.stack(logits).mean(0)
        if isinstance(output, tuple):
            return (mean, *output[1:])
        return type(output)(**{**output, "logits": mean})

    base.forward = averaged
    try:
        yield model
    finally:
        if was_own:
            base.forward = forward
        else:
            del base.forward


def _choices(tuner: PromptPoolModel, k: int) -> list[Callable[[], AbstractContextManager]]:
    """For each pass, what has the pool choose as that pass does, for a while.

    Raises:
        ValueError: The pool has no choice by rank, or fewer rows than `k`.
    """
    pool = tuner.pool
    choice = next((choice for kind, choice in CHOICES.items() if isinstance(pool, kind)), None)
    method, rows = pool.config.method, pool.rows_in_use
    if choice is None or not rows:
        raise ValueError(
            f"An ensemble of top-1 to top-{k} is of methods that choose prompts by rank (L2P, and DualPrompt with "
            f"expert prompts), but this {method} adapter does not. Use it as it is, or an ensemble of several "
            "adapters (AdapterEnsemble; `peft-cl evaluate --with`)."
        )
    if k > rows:
        raise ValueError(
            f"k is {k}, but the choice is among {counted(rows, 'row')} of the adapter's pool. Give at most {rows}."
        )
    call = tuner.encoder.call
    if call is not None and call.task_ids is not None and pool.config.known_task_rows:
        return [nullcontext]  # each image takes the rows of its task: there is no choice
    return [partial(choice, pool, rank) for rank in range(1, k + 1)]


@contextmanager
def _so_many(pool: L2PPool, rank: int) -> Iterator[None]:
    """L2P takes the `rank` nearest prompts, among the rows that it had to choose from."""
    changes: dict[str, Any] = {"top_k": rank}
    if pool.config.use_prompt_mask:  # rows in use are counted by top_k then
        changes |= {"use_prompt_mask": False, "pool_size": pool.rows_in_use}
    with _reading(pool, changes):
        yield


@contextmanager
def _ranked(pool: DualPromptPool, rank: int) -> Iterator[None]:
    """DualPrompt takes the expert with the `rank`-th nearest key: each image asks with that key, and finds it."""
    select, similarity = pool.select, pool.config.similarity

    def asked(query: torch.Tensor) -> Any:
        keys = pool.rows("keys")  # (sets, rows, D)
        place = compare(query, keys, similarity).topk(rank, dim=-1).indices[..., -1:]  # (sets, B, 1)
        return select(keys.gather(-2, place.expand(-1, -1, keys.shape[-1])))

    pool.select = asked
    try:
        with _reading(pool, {"similarity": "cosine"}):  # a key is nearest to itself in cosine, not always in product
            yield
    finally:
        del pool.select


@contextmanager
def _reading(pool: PromptPool, changes: dict[str, Any]) -> Iterator[None]:
    """The pool reads a copy of its configuration with `changes`; the configuration itself, which is saved, stays."""
    config = pool.config
    pool.config = copy.copy(config)
    vars(pool.config).update(changes)
    try:
        yield
    finally:
        pool.config = config


CHOICES: dict[type[PromptPool], Callable[[Any, int], AbstractContextManager]] = {
    L2PPool: _so_many,
    DualPromptPool: _ranked,
}


# ------------------------------------------------------------------------------------------------------- adapters


class AdapterEnsemble(nn.Module):
    """The mean of the softmax probabilities of several adapters of one model (Lakshminarayanan et al. 2017, arXiv
    1612.01474, eq. in section 2.4), always in evaluation mode.

        p(c | x) = sum_a w_a p_a(c | x),   sum_a w_a = 1.

    Classes are matched by their names. An adapter that lacks a class gives it probability 0: it takes each image for
    one of its own classes. So the ensemble is meant for adapters that know the same classes (seeds, settings); of
    adapters with classes of their own, the one that is surest of an image decides.

    Args:
        model: A `PeftModel` that holds the adapters (`load_adapter`). It has the same active adapter afterwards.
        adapters: Their names.
        weights: A weight of each, of any sum. `None`: equal ones.

    Attributes:
        classes: Names of the columns of the logits: the first adapter's classes, then those that later ones add.

    Raises:
        ValueError: Names that the model does not hold or that come twice, adapters that have learnt no classes, or
            weights that are negative, not finite, all 0, or not one for each adapter.

    Example:
        >>> model = PeftModel.from_pretrained(base, "out/seed0", adapter_name="first")    # doctest: +SKIP
        >>> model.load_adapter("out/seed1", "second")                                     # doctest: +SKIP
        >>> ensemble = AdapterEnsemble(model, ["first", "second"])                        # doctest: +SKIP
        >>> ensemble(pixel_values).logits.softmax(-1)                                     # doctest: +SKIP
    """

    def __init__(self, model: PeftModel, adapters: Sequence[str], weights: Sequence[float] | None = None):
        super().__init__()
        adapters = [adapters] if isinstance(adapters, str) else list(adapters)
        known = list(model.peft_config)
        wrong = [name for name in adapters if name not in known or adapters.count(name) > 1]
        if wrong or not adapters:
            raise ValueError(
                f"adapters is {brief(adapters)}, but must be different names of adapters that the model holds: "
                f"{brief(known)}. Load others by load_adapter(folder, name)."
            )
        self.model, self.adapters = model, adapters
        self.configs = [model.peft_config[name] for name in adapters]
        empty = [name for name, config in zip(adapters, self.configs, strict=True) if not config.tasks]
        if empty:
            raise ValueError(f"The adapter {empty[0]!r} has learnt no classes yet. Train it first, or leave it out.")
        self.weights = _shares(weights, len(adapters))
        self.classes = list(dict.fromkeys(name for config in self.configs for name in config.classes))

    def get_base_model(self) -> nn.Module:
        """The base model that all adapters share."""
        return self.model.get_base_model()

    def forward(
        self, pixel_values: torch.Tensor, task_ids: torch.Tensor | None = None, **inputs: Any
    ) -> ImageClassifierOutput:
        """Logs of the mean probabilities.

        Args:
            pixel_values: (B, channels, height, width).
            task_ids: (B,), the task of each image, among whose classes the prediction then is.
            inputs: Passed on to the model.

        Returns:
            An output whose `logits` (B, classes) are log-probabilities, -inf for a probability of 0.

        Raises:
            ValueError: `task_ids` for adapters whose tasks differ.
        """
        if task_ids is not None:
            self._check_tasks()
            inputs["task_ids"] = task_ids
        place = {name: column for column, name in enumerate(self.classes)}
        mean = None
        with evaluation_mode(self.model), _given_back(self.model):
            for name, config, weight in zip(self.adapters, self.configs, self.weights, strict=True):
                self.model.set_adapter(name)
                own = weight * self.model(pixel_values=pixel_values, **inputs).logits.float().softmax(-1)
                columns = torch.tensor([place[each] for each in config.classes], device=own.device)
                if mean is None:
                    mean = own.new_zeros(len(own), len(self.classes))
                mean = mean.index_add(1, columns, own)
        return ImageClassifierOutput(logits=mean.log())

    def _check_tasks(self) -> None:
        """A task's number must say the same to all adapters."""
        named = [[{config.classes[row] for row in rows} for rows in config.tasks] for config in self.configs]
        other = next((name for name, tasks in zip(self.adapters, named, strict=True) if tasks != named[0]), None)
        if other is not None:
            raise ValueError(
                f"task_ids are given, but the tasks of {other!r} have other classes than those of "
                f"{self.adapters[0]!r}, so a task's number does not say the same to both. Leave task_ids out, or take "
                "adapters of the same tasks."
            )


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights so that their sum is 1."""
    weights = [1.0] * count if weights is None else [check_number("weights", each, least=0) for each in weights]
    if len(weights) != count or not sum(weights):
        raise ValueError(
            f"weights is {brief(weights)}, but must have a number for each of {counted(count, 'adapter')}, not all 0. "
            "Leave it out for equal ones."
        )
    return [weight / sum(weights) for weight in weights]


@contextmanager
def _given_back(model: PeftModel) -> Iterator[None]:
    """The model has its active adapter and its trainable parameters back afterwards."""
    active, trained = model.active_adapter, [weight for weight in model.parameters() if weight.requires_grad]
    try:
        yield
    finally:
        model.set_adapter(active)
        model.requires_grad_(False)
        for weight in trained:
            weight.requires_grad_(True)
