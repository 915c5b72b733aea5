"""Which prompts an image got, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..text import counted, rounded
from ..tuners.base.model import PromptPoolModel


#: Of a weighted sum of all rows, how many of the heaviest are named.
HEAVIEST = 3


@dataclass(frozen=True)
class Choice:
    """The prompts that an image gets at some layers.

    Attributes:
        layers: Numbers of the encoder layers, from 0.
        rows: Numbers of rows of the pool, from 0; where all rows take part, those with the largest weights.
        weights: Their weights, where all rows take part with one; `None` where rows are chosen.
    """

    layers: tuple[int, ...]
    rows: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def __str__(self) -> str:
        """The rows, as in `2, 7` or `4 (0.71), 0 (-0.12)`."""
        if self.weights is None:
            return ", ".join(map(str, self.rows))
        pairs = zip(self.rows, self.weights, strict=True)
        return ", ".join(f"{row} ({rounded(weight, 2)})" for row, weight in pairs)


def choices_of(tuner: PromptPoolModel, image: int = 0) -> tuple[Choice, ...]:
    """Which prompts an image of the last call got, for each set of keys.

    Args:
        tuner: `model.base_model`, after a call of the model in evaluation mode.
        image: Its number in the batch.

    Returns:
        None at all where nothing is chosen: there are no prompts, or all images get the same ones.
    """
    layers = tuple(getattr(tuner.peft_config[tuner.active_adapters[0]], "layers", None) or ())
    selected, weights = tuner.head.last_selected, tuner.head.last_weights
    if selected is not None:
        sets = selected[None] if selected.ndim == 2 else selected
        return tuple(
            Choice(own, tuple(dict.fromkeys(rows[image].tolist())))
            for own, rows in zip(_layers_of_sets(layers, len(sets)), sets, strict=True)
        )
    if weights is None:
        return ()
    return tuple(_heaviest((layer,), of_layer[image]) for layer, of_layer in zip(layers, weights, strict=True))


def _layers_of_sets(layers: tuple[int, ...], sets: int) -> list[tuple[int, ...]]:
    """One set of keys chooses for all layers, else each layer has its own."""
    return [layers] if sets == 1 else [(layer,) for layer in layers]


def _heaviest(layers: tuple[int, ...], weights: torch.Tensor) -> Choice:
    rows = weights.abs().topk(min(HEAVIEST, len(weights))).indices
    return Choice(layers, tuple(rows.tolist()), tuple(weights[rows].tolist()))


def described(choices: Sequence[Choice], rows: int) -> list[tuple[str, str]]:
    """The choices of one image as lines of a table, what and which; `rows`: how many rows the pool has."""
    of = counted(rows, "row")
    if len(choices) == 1 and choices[0].weights is None:
        what = "rows" if len(choices[0].rows) > 1 else "row"
        return [("Prompts", f"{what} {choices[0]} of {rows}, {_layers(choices[0].layers)}")]
    weighted = any(choice.weights is not None for choice in choices)
    first = f"sums of {of}; the largest weights:" if weighted else f"chosen among {of}:"
    return [("Prompts", first), *((_layers(choice.layers), str(choice)) for choice in choices)]


def _layers(numbers: Sequence[int]) -> str:
    """`layers 0–4` for numbers that follow each other, else `layers 0, 2`."""
    first, last = numbers[0], numbers[-1]
    if first == last:
        return f"layer {first}"
    together = len(numbers) > 2 and list(numbers) == list(range(first, last + 1))
    return f"layers {first}–{last}" if together else f"layers {', '.join(map(str, numbers))}"
