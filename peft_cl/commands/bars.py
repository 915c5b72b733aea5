"""Bars of other libraries, where nobody sees them move."""

from __future__ import annotations

import sys

import datasets
from transformers.utils import logging


def no_bars_in_files() -> None:
    """Switch them off where the output is no terminal: in a file each state of a bar would be a line."""
    if not sys.stderr.isatty():
        no_bars()


def no_bars() -> None:
    """Switch them off."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
