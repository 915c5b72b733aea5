"""Several adapters in one batch: each image is answered by its own (PEFT's `adapter_names`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch

from ...text import brief
from .layer import AdapterLayer


#: PEFT's name for the base model in a mixed batch.
BASE = "__base__"
#: What a mixed batch has no answer to: it is of other sizes for each adapter.
ON_THE_WAY = ("output_hidden_states", "output_attentions")


class MixedBatches:
    """Methods of `PromptPoolModel` for batches whose images belong to several adapters.

    Example:
        >>> model.eval()                                                               # doctest: +SKIP
        >>> names = ["animals", "cars", "__base__"]                                    # doctest: +SKIP
        >>> best = model(pixel_values, adapter_names=names).logits.argmax(-1)          # doctest: +SKIP
        >>> [model.base_model.mixed_classes(names)[column] for column in best]         # doctest: +SKIP
        ['cat', 'estate car', 'tabby, tabby cat']
    """

    def mixed_classes(self, adapter_names: Sequence[str]) -> list[str]:
        """The class of each column of the logits of `model(pixel_values, adapter_names=adapter_names)`.

        These are the classes of the adapters named, adapter by adapter in the order in which they were loaded, those
        of the base model (`"__base__"`) last. A class that several know has one column. Neither the order of the names
        nor how often one occurs makes a difference.

        Raises:
            ValueError: an adapter that the model does not have, or one without classes.
        """
        return [name for name, _ in columns(self.classes_by_adapter(adapter_names))]

    def classes_by_adapter(self, adapter_names: Sequence[str]) -> dict[str, list[str]]:
        """The adapters named -> the classes of their logits, in the order of `mixed_classes`."""
        unknown = sorted({str(name) for name in adapter_names if name not in self.peft_config and name != BASE})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(map(brief, unknown[:5]))}. The model has "
                f"{brief(list(self.peft_config))}, and {BASE!r} is the base model. Load an adapter by "
                "load_adapter(folder, adapter_name)."
            )
        named = set(adapter_names)
        found = {name: list(config.classes or ()) for name, config in self.peft_config.items() if name in named}
        if BASE in named:
            found[BASE] = self.head.base_names
        for name, classes in found.items():
            if not classes:
                raise ValueError(
                    f"{name!r} has no classes, so it cannot answer in a mixed batch. Train it first, or leave it out "
                    "of adapter_names."
                )
        return found

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Entered by PEFT around a call of the model, with what it is called with."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        batch = MixedBatch(self, list(names), args, kwargs)
        with self.encoder.lock.held_throughout(), batch.in_place():
            yield


def columns(classes: dict[str, list[str]]) -> list[tuple[str, int]]:
    """Classes of several adapters, each once. The second number tells classes of one name in one model apart (ImageNet
    has two kinds of crane): how many came before it."""
    return list(dict.fromkeys(column for names in classes.values() for column in _counted(names)))


def _counted(names: Sequence[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        found.append((name, seen[name]))
        seen[name] += 1
    return found


class MixedBatch:
    """One call of the model for several adapters: a forward pass for each, over its images.

    The call that the user made runs the first adapter's images; when it ends (`ClassifierHead.after_forward`), it
    calls the model for the others. So all that a call does, hooks of others included, is done for each adapter.

    Args:
        tuner: the `PromptPoolModel`.
        names: an adapter's name for each image.
        args: what the model is called with; `kwargs` by name.

    Raises:
        ValueError: a model in training mode, labels, names that are too few, too many or unknown, or outputs that have
            other sizes for each adapter.
    """

    def __init__(self, tuner: Any, names: list[str], args: tuple, kwargs: dict[str, Any]):
        if tuner.model.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode: an adapter learns alone. Call "
                "model.eval(), or train one adapter after the other (set_adapter)."
            )
        images = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0] if args else ()
        if len(names) != len(images) or not names:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(images)} respectively. Give a name for each image."
            )
        if kwargs.get("labels") is not None or len(args) > 1:
            raise ValueError(
                "A mixed batch has no loss: each adapter numbers its classes anew. Leave labels out where "
                "adapter_names is given, and give all but the images by name."
            )
        said = {option: kwargs.get(option) for option in ON_THE_WAY}
        if any(getattr(tuner.model.config, option, False) if on is None else on for option, on in said.items()):
            raise ValueError(
                "A mixed batch gives logits alone: hidden states and attentions have another length for each adapter. "
                f"Set {' and '.join(ON_THE_WAY)} to False, or ask one adapter at a time (set_adapter)."
            )
        self.tuner = tuner
        self.classes = tuner.classes_by_adapter(names)
        self.rows = {name: [row for row, other in enumerate(names) if other == name] for name in self.classes}
        self.count = len(names)
        self.args: tuple = ()
        self.kwargs: dict[str, Any] = {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the next call be of this batch; afterwards the adapters are as they were, whatever happened."""
        layers: tuple[AdapterLayer, ...] = (self.tuner.encoder, self.tuner.head)
        before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
        self.tuner.head.mixed = self
        try:
            yield
        finally:
            self.tuner.head.mixed = self.tuner.head.last_selected = None
            for layer, (active, disabled) in zip(layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What the call is made with for the first adapter, in the place of what the user gave."""
        self.args, self.kwargs = args, kwargs
        return self._inputs_of(next(iter(self.rows)))

    def finish(self, model: torch.nn.Module, output: Any) -> Any:
        """The whole answer, from the first adapter's."""
        answers = [_logits(output)]
        for name in list(self.rows)[1:]:
            args, kwargs = self._inputs_of(name)
            answers.append(_logits(model(*args, **kwargs)))
        logits = self._joined(answers)
        return (logits,) if isinstance(output, tuple) else type(output)(logits=logits)

    def _inputs_of(self, name: str) -> tuple[tuple, dict[str, Any]]:
        """Activate an adapter without touching what is trained or shown, and take its images' share of the inputs."""
        for layer in (self.tuner.encoder, self.tuner.head):
            layer._disable_adapters = name == BASE
            layer._active_adapter = [] if name == BASE else [name]
        rows = self.rows[name]
        return tuple(self._share(value, rows) for value in self.args), {
            key: self._share(value, rows) for key, value in self.kwargs.items()
        }

    def _share(self, value: Any, rows: list[int]) -> Any:
        if isinstance(value, (list, tuple)) and len(value) == self.count:
            return [value[row] for row in rows]
        return value[rows] if getattr(value, "ndim", 0) and len(value) == self.count else value

    def _joined(self, answers: list[torch.Tensor]) -> torch.Tensor:
        """(B, columns): each adapter's logits (b, classes) at its images' rows and its classes' columns."""
        place = {column: index for index, column in enumerate(columns(self.classes))}
        dtype = reduce(torch.promote_types, (answer.dtype for answer in answers))
        whole = answers[0].new_full((self.count, len(place)), -torch.inf, dtype=dtype)
        for (name, rows), answer in zip(self.rows.items(), answers, strict=True):
            own = torch.tensor([place[column] for column in _counted(self.classes[name])])
            whole[torch.tensor(rows)[:, None], own] = answer.to(dtype)
        return whole


def _logits(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.logits
