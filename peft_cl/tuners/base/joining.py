"""Joining adapters that were learnt apart, and taking tasks out of one, without training and without data."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

from peft import PeftConfig

from ...heads import Head
from ...text import brief
from .config import PromptPoolConfig
from .digests import digest_of_weights
from .layer import check_name
from .model import PromptPoolModel
from .shares import Share, new_config, share_of, without_repeats


#: Ways to join prompts.
WAYS = ("apart", "together")
#: Facts, limits, and what matters in training alone: adapters may differ in them. The joined adapter learns on as the
#: first one says.
MAY_DIFFER = {field.name for field in fields(PeftConfig)} | {
    *("classes", "tasks", "rows_in_use", "grown", "joined", "joined_prompts", "base_weights", "format_version"),
    *("temperature", "target_modules", "pool_size", "max_pool_size"),
    *("train_mask", "head_init", "drift_compensation"),
    *("init", "init_from", "init_layers", "init_noise", "key_init"),
    *("growth", "growth_size", "growth_similarity", "growth_entropy"),
    *("orthogonality", "orthogonality_coefficient", "orthogonality_scope", "diversity_coefficient"),
    *("alignment_coefficient", "entropy_coefficient", "separation_coefficient"),
    *("pull_coefficient", "pull_form", "pull_reduction", "batchwise_prompt"),
}


def join_adapters(
    model: Any,
    adapter_names: Sequence[str],
    new_name: str,
    *,
    prompts: Literal["apart", "together"] | None = None,
) -> None:
    """Make of several adapters of a model another one that knows all their classes, without training and without data.

    The adapters stay as they are. The new one has their tasks, in the order of `adapter_names`; it is saved, loaded,
    measured and learnt on as any other. Activate it by `set_adapter(new_name)`.

    Heads that are computed from sums (`ncm`, `lda`, `ridge`, the query's part of `fusion`) add their sums: on features
    that are the same, of the frozen model or under the same prompts, the result is that of one adapter that has
    learnt all tasks. Of heads that are trained the rows are put side by side; a class that several adapters know has
    the mean of its rows. Images that two adapters have both observed count twice.

    Args:
        model: a `PeftModel` (or its tuner) with these adapters, on one backbone.
        adapter_names: two or more of them, with the same settings.
        new_name: name of the adapter that is made.
        prompts: `"apart"`: an image takes the prompts of the adapter whose keys fit it best (of DualPrompt the general
            prompt too), and learning goes on with those of the last adapter. `"together"`: rows of all adapters are
            chosen from, or added up (CODA-Prompt), and general prompts are averaged. None: `"apart"` where the method
            has keys for it. Adapters without prompts, or with the same ones, are joined alike either way.

    Raises:
        ValueError: no such adapters, a name that is taken, adapters that cannot be joined (the message names the
            setting and both values), or sums that are not there. Nothing has been changed then.

    Example:
        >>> model = PeftModel.from_pretrained(base, "alice/birds", "birds")    # doctest: +SKIP
        >>> model.load_adapter("bob/fish", "fish")                             # doctest: +SKIP
        >>> join_adapters(model, ["birds", "fish"], "animals")                 # doctest: +SKIP
        >>> model.set_adapter("animals")                                       # doctest: +SKIP
    """
    tuner, names = tuner_of(model), _checked_names(adapter_names)
    for name in names:
        _check_known(tuner, name)
    _check_new(tuner, new_name)
    for name in names[1:]:
        _check_alike(tuner, names[0], name)
    way = _way(tuner, names, prompts)
    shares = without_repeats([_share(tuner, name) for name in names])
    shares[0].head.check_classes(len({name for share in shares for name in share.classes}))
    for name in names:
        tuner.need_sums(name)
    _make(tuner, new_name, shares, way)


def split_adapter(model: Any, adapter_name: str, tasks: Sequence[int], new_name: str) -> None:
    """Take tasks out of an adapter into one of their own, without training and without data.

    The adapter stays as it is. The new one has the rows of the head of the tasks' classes, and of the pool the rows
    that the tasks brought (DualPrompt, CODA-Prompt, L2P with `use_prompt_mask`) or those that all tasks share.

    It can learn on where the sums of its head are kept class by class: nearest class means are, `lda` and `ridge` with
    `head_options={"by_class": True}`. Else it predicts as the adapter does between these classes, and has no sums.

    Args:
        model: a `PeftModel` (or its tuner) with the adapter.
        adapter_name: the adapter.
        tasks: numbers of its tasks, from 0, in any order; they keep the adapter's.
        new_name: name of the adapter that is made.

    Raises:
        ValueError: no such adapter or task, or a name that is taken. Nothing has been changed then.

    Warns:
        UserWarning: the new adapter cannot learn on, or its prompts were learnt with images of other tasks too.

    Example:
        >>> split_adapter(model, "animals", [0, 1], "birds")    # doctest: +SKIP
    """
    tuner = tuner_of(model)
    _check_known(tuner, adapter_name)
    _check_new(tuner, new_name)
    config = tuner.peft_config[adapter_name]
    numbers = _checked_tasks(tasks, config.num_tasks)
    tuner.find_sums(adapter_name)
    share = _share(tuner, adapter_name, numbers)
    _make(tuner, new_name, [share], getattr(config, "joined_prompts", "apart"))
    _warn_of_shared(share, adapter_name)


def tuner_of(model: Any) -> PromptPoolModel:
    """The tuner of a model with adapters of ours.

    Raises:
        ValueError: it has none.
    """
    tuner = getattr(model, "base_model", model)
    if not isinstance(tuner, PromptPoolModel):
        raise ValueError(
            f"model is a {type(model).__name__}, which carries no adapters by PEFT of one of peft_cl's methods. Load "
            "them by PeftModel.from_pretrained(base_model, folder, name) and load_adapter(folder, name)."
        )
    return tuner


# ------------------------------------------------------------------------------------------------------- making


def _share(tuner: PromptPoolModel, name: str, tasks: Sequence[int] | None = None) -> Share:
    return share_of(tuner.peft_config[name], tuner.encoder.entries[name], tuner.head.entries[name], tasks)


def _make(tuner: PromptPoolModel, new_name: str, shares: Sequence[Share], prompts: str) -> None:
    """Make the adapter of these shares; where that fails, there is none."""
    active = list(tuner.active_adapters)
    tuner.peft_config[new_name] = new_config(shares, prompts)
    try:
        tuner.inject_adapter(tuner.model, new_name)
        config, pool = tuner.peft_config[new_name], tuner.encoder.entries[new_name]
        pool.take(shares)
        config.rows_in_use = pool.rows_in_use
        _fill_head(tuner, new_name, shares)
        tuner.head.forget_rows()
    except BaseException:
        for layer in (tuner.encoder, tuner.head):
            if new_name in layer.entries:
                del layer.entries[new_name]
        tuner.peft_config.pop(new_name, None)
        raise
    finally:  # which injecting has set for the new one
        if active:
            tuner.set_adapter(active, inference_mode=tuner.peft_config[active[0]].inference_mode)


def _fill_head(tuner: PromptPoolModel, name: str, shares: Sequence[Share]) -> None:
    head = tuner.head.entries[name]
    if len(shares) > 1:
        row = {name: number for number, name in enumerate(tuner.peft_config[name].classes)}
        rows = [[row[name] for name in share.config.classes] for share in shares]
        head.unite([share.head for share in shares], rows)
    else:
        divided = _divided(shares[0])
        divided.evidence, divided.training_head = head.evidence, head.training_head
        tuner.head.add_entry(name, divided)
        head = divided
    if head.evidence is not None:
        head.evidence.take([(share.head.evidence, share.tasks) for share in shares])


def _divided(share: Share) -> Head:
    """A copy of an adapter's head with the rows of some tasks' classes."""
    head = share.head
    # What belongs to the adapter as a whole is made anew, and not copied.
    head = copy.deepcopy(head, {id(each): None for each in (head.evidence, head.training_head) if each is not None})
    (head.keep_rows if head.can_divide else head.pick_rows)(share.head_rows)
    return head


# ------------------------------------------------------------------------------------------------------- checks


def _checked_names(adapter_names: Sequence[str]) -> list[str]:
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"adapter_names is {brief(adapter_names)}, but must hold the names of two or more adapters, each once."
        )
    return names


def _check_known(tuner: PromptPoolModel, name: str) -> None:
    if name not in tuner.peft_config:
        raise ValueError(
            f"{brief(name)} is no adapter of this model, which has {brief(list(tuner.peft_config))}. Load it first: "
            "load_adapter(folder, name)."
        )
    config = tuner.peft_config[name]
    if not config.tasks:
        raise ValueError(f"The adapter {name!r} has learnt no task yet. Train it first.")
    if config.stream:
        raise ValueError(
            f"The adapter {name!r} is learnt from a stream, which has no tasks and goes on: it can neither be joined "
            "nor split. Take adapters that have learnt tasks."
        )


def _check_new(tuner: PromptPoolModel, new_name: str) -> None:
    check_name(new_name)
    if new_name in tuner.peft_config:
        raise ValueError(
            f"The model has an adapter {new_name!r} already. Give the new one another name, or delete_adapter first."
        )


def _checked_tasks(tasks: Sequence[int], count: int) -> list[int]:
    numbers = list(tasks) if isinstance(tasks, (list, tuple, range, set)) else [tasks]
    are_tasks = all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < count for each in numbers)
    if not numbers or not are_tasks or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"tasks is {brief(tasks)}, but must hold numbers of the adapter's tasks, from 0 to {count - 1}, each once."
        )
    return sorted(numbers)


def check_settings(first: str, one: PromptPoolConfig, other: str, two: PromptPoolConfig) -> None:
    """Refuse adapters whose settings differ in what a prediction depends on, or that were learnt on two backbones.

    Args:
        first, other: Their names, for the message.
        one, two: Their configurations.

    Raises:
        ValueError: It names the settings and both values.
    """
    if type(one) is not type(two):
        raise ValueError(
            f"The adapters {first!r} and {other!r} cannot be joined: the methods are {one.method} and {two.method}. "
            "Join adapters of one method."
        )
    differ = [
        f"{field.name} is {brief(getattr(one, field.name))} and {brief(getattr(two, field.name))}"
        for field in fields(one)
        if field.name not in MAY_DIFFER and not _equal(getattr(one, field.name), getattr(two, field.name))
    ]
    if differ:
        raise ValueError(
            f"The adapters {first!r} and {other!r} cannot be joined: {'; '.join(differ)}. Join adapters that were "
            "trained with the same settings."
        )
    saved = one.base_weights or {}, two.base_weights or {}
    common = saved[0].keys() & saved[1].keys()
    if common and all(saved[0][name] != saved[1][name] for name in common):
        raise ValueError(
            f"The adapters {first!r} and {other!r} cannot be joined: they were learnt on backbones with different "
            f"weights ({brief(one.base_model_name_or_path)} and {brief(two.base_model_name_or_path)}). Train both on "
            "one backbone."
        )


def _check_alike(tuner: PromptPoolModel, first: str, other: str) -> None:
    one = tuner.peft_config[first]
    check_settings(first, one, other, tuner.peft_config[other])
    maps = [digest_of_weights(tuner.encoder.entries[name].query_projection) for name in (first, other)]
    if maps[0] != maps[1]:
        raise ValueError(
            f"The adapters {first!r} and {other!r} cannot be joined: query_projection is {one.query_projection!r} in "
            "both, but each has learnt its own, and keys fit one of them alone. Train with query_projection=None."
        )


def _equal(one: Any, two: Any) -> bool:
    """Whether two settings are the same: saved ones have lists for tuples."""
    return json.dumps(one, sort_keys=True, default=str) == json.dumps(two, sort_keys=True, default=str)


def _way(tuner: PromptPoolModel, names: Sequence[str], prompts: str | None) -> str:
    """How the prompts are joined."""
    if prompts not in (None, *WAYS):
        raise ValueError(f"prompts is {brief(prompts)}, but must be one of {', '.join(map(repr, WAYS))}, or None.")
    config = tuner.peft_config[names[0]]
    can_be_apart = getattr(config, "parts_can_be_apart", True)
    if prompts == "apart" and not can_be_apart:
        raise ValueError(
            f"prompts is 'apart', but in this {config.method} no keys meet a query before the prompted pass, which "
            "could say whose prompts an image is to take. Set prompts='together'."
        )
    way = prompts or ("apart" if can_be_apart else "together")
    for name in names:
        config = tuner.peft_config[name]
        if getattr(config, "joined", None) and config.joined_prompts != way:
            raise ValueError(
                f"prompts is {way!r}, but the adapter {name!r} was joined with prompts={config.joined_prompts!r}. Set "
                "it to that, or join the adapters that it was made of."
            )
    return way


def _warn_of_shared(share: Share, adapter_name: str) -> None:
    """Say what a part of an adapter cannot do, or still has of the other tasks."""
    if len(share.tasks) == share.config.num_tasks:
        return
    if not share.is_apart:
        warnings.warn(
            f"The prompts of {adapter_name!r} were learnt with images of other tasks too, and the new adapter has "
            "what those have left in them.",
            stacklevel=3,
        )
    if share.head.observes and not share.head.can_divide:
        warnings.warn(
            f"The sums of the head of {adapter_name!r} hold all classes together, so the new adapter predicts but "
            "cannot learn on, be joined or forget. Train with head='ncm', or with head_options={'by_class': True}, to "
            "divide it.",
            stacklevel=3,
        )
