"""The options of ensembles: `--ensemble-top-k` and `--with`, and the model that they make of an adapter."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from peft import PeftModel
from torch import nn

from ..reliability.ensembles import AdapterEnsemble, ensemble_of_top_k
from ..text import plain
from ..tuners.base.config import PromptPoolConfig
from .adapters import SavedAdapter
from .errors import CommandError, explained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ensemble-top-k",
        type=int,
        metavar="K",
        help="average the logits under the best prompt, the two best, ... the K best (L2P), or under each of the K "
        "best experts (DualPrompt)",
    )
    parser.add_argument(
        "--with",
        dest="others",
        nargs="+",
        default=[],
        metavar="ADAPTER",
        help="average the probabilities with those of further adapters of the same method and base model",
    )


@contextmanager
def ensemble(
    model: PeftModel, adapter: SavedAdapter, arguments: argparse.Namespace, networks: bool = False
) -> Iterator[tuple[nn.Module, SavedAdapter, str | None]]:
    """What the options make of a loaded adapter: a model that is asked in its place.

    Args:
        model: The adapter on its base model.
        networks: Whether the adapter holds a network for each task.

    Yields:
        The model, the adapter with the classes that the model tells apart, and what it is in words (`None`: the
        adapter as it is).

    Raises:
        CommandError: The adapters do not fit together, or the method has no choice of top-1 to top-K.
    """
    k, others = arguments.ensemble_top_k, arguments.others
    if networks and (k is not None or others):
        raise CommandError(
            f"The adapter {adapter.name!r} holds a network for each task, so it is no member of an ensemble. Leave "
            f"{'--with' if others else '--ensemble-top-k'} out."
        )
    words = []
    with ExitStack() as stack:
        if k is not None:
            words.append(f"top-1 to top-{k}")
            with explained(f"--ensemble-top-k is {k}, which cannot be done"):
                stack.enter_context(ensemble_of_top_k(model, k))
        asked: nn.Module = model
        if others:
            saved = [SavedAdapter.read(name) for name in others]
            words.append(f"with {', '.join(plain(each.name) for each in saved)}")
            asked = _joined(model, adapter, saved, other_base=arguments.model is not None)
            adapter = replace(adapter, config=_joined_config(asked))
        yield asked, adapter, "; ".join(words) or None


def _joined(
    model: PeftModel, adapter: SavedAdapter, others: Sequence[SavedAdapter], other_base: bool
) -> AdapterEnsemble:
    names = [model.active_adapter]
    for number, other in enumerate(others, start=1):
        if other.config.peft_type != adapter.config.peft_type:
            raise CommandError(
                f"--with has {other.name!r}, which is of {other.config.method}, but {adapter.name!r} is of "
                f"{adapter.config.method}, and one model carries adapters of one method. Give adapters of "
                f"{adapter.config.method}."
            )
        if other.base_model != adapter.base_model and not other_base:
            raise CommandError(
                f"--with has {other.name!r}, which was learnt on {other.base_model!r}, but {adapter.name!r} on "
                f"{adapter.base_model!r}. Give adapters of one base model; if both are the same, name it by --model."
            )
        with explained(f"The adapter {str(other.folder)!r} cannot be put beside {adapter.name!r}"):
            model.load_adapter(str(other.folder), f"with_{number}", torch_device=str(model.device))
        names.append(f"with_{number}")
    with explained("--with cannot be done"):
        return AdapterEnsemble(model, names)


def _joined_config(ensemble: AdapterEnsemble) -> PromptPoolConfig:
    """The first adapter's configuration with the classes of all; those that it lacks are of tasks of their own, one
    for each task of a later adapter that brings some."""
    config = copy.copy(ensemble.configs[0])
    classes, tasks = ensemble.classes, [list(rows) for rows in config.tasks]
    known = set(config.classes)
    for other in ensemble.configs[1:]:
        for rows in other.tasks:
            new = [other.classes[row] for row in rows if other.classes[row] not in known]
            known.update(new)
            tasks += [[classes.index(name) for name in new]] if new else []
    config.classes, config.tasks = classes, tasks
    return config
