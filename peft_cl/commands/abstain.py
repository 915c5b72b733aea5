"""The options of abstaining: `--abstain-below` of `predict`, `--coverage` of `evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np
import torch

from ..reliability.abstaining import COVERAGES, accuracy_at_coverage
from ..reliability.scores import max_probability
from ..text import percent
from .errors import CommandError


def add_threshold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--abstain-below",
        type=float,
        metavar="P",
        help="mark as (abstains) what is predicted with a probability below P, between 0 and 1",
    )


def check_threshold(threshold: float | None) -> None:
    if threshold is not None and not 0 < threshold < 1:
        raise CommandError(f"--abstain-below is {threshold}, but must be above 0 and below 1, such as 0.5.")


def add_coverage(parser: argparse.ArgumentParser) -> None:
    shares = ", ".join(f"{share:.0%}" for share in COVERAGES).replace("%", "%%")
    parser.add_argument(
        "--coverage", action="store_true", help=f"accuracy on the {shares} of the images that the model is surest of"
    )


def answers_and_confidence(logits: torch.Tensor) -> torch.Tensor:
    """The predicted row and its probability, (B, C) -> (B, 2) float64."""
    return torch.stack([logits.argmax(-1).double(), max_probability(logits)], dim=-1)


def coverage_table(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Accuracy at each coverage, by its share in percent."""
    return {f"{100 * share:g}": accuracy_at_coverage(confidence, correct, share) for share in COVERAGES}


def described(table: Mapping[str, float]) -> list[str]:
    """Lines of text, a line for each coverage."""
    return ["coverage  accuracy", *(f"{share:>7}%  {percent(value, 2):>7}%" for share, value in table.items())]
