"""Bars: our own, and those of other libraries where nobody sees them move."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers.utils import logging


def no_bars_in_files() -> None:
    """Switch them off where the output is no terminal: in a file each state of a bar would be a line."""
    if not sys.stderr.isatty():
        no_bars()


def no_bars() -> None:
    """Switch them off."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def batch_bar(batches: Iterable[Any], what: str) -> Iterable[Any]:
    """The batches, with a bar called `what` while they come, where the output is a terminal."""
    return tqdm(batches, desc=what, unit="batch", leave=False, dynamic_ncols=True, disable=None)
