"""What all pictures share: colours, the empty figure, its heading, and how it is saved."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from ..disk import replacing
from ..text import plain


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PIXELS = 12_000  # along a side
INK = "#222222"
MUTED = "#666666"

# Okabe and Ito (2008): told apart with any colour vision; their yellow is left out, too faint on white. Markers and,
# once the colours repeat, dashes say the same again, so that lines stay apart in black and white too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "p", "*", "<", ">")
DASHES = ("-", "--", ":", "-.")


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of that size in inches, whose layout keeps its parts from overlapping."""
    try:
        import matplotlib.figure  # noqa: F401

        from .figure import PlainFigure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib, which is not installed: `pip install peft-cl[plots]`.") from error
    figure = PlainFigure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def save(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    """Write the picture, making its folder where needed; no path, no file."""
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path if path.suffix else path.with_suffix(".png")) as aside:  # as matplotlib names it
            figure.savefig(aside, dpi=min(200, MOST_PIXELS / max(figure.get_size_inches())))


def short_name(name: str) -> str:
    """Return the last part of a Hub id or path: what a reader calls a dataset or a backbone."""
    return plain(re.split(r"[\\/]", name.rstrip("\\/"))[-1], 60)


def set_title(axes: Axes, heading: str, below: str, width: float, size: float = 12, colour: object = INK) -> None:
    """Write a bold heading with a line in grey below it, at the left; both are wrapped to `width` inches."""
    small = 0.8 * size
    # A letter of matplotlib's own DejaVu Sans is about 0.69 (bold) and 0.6 (regular) of its size wide.
    heading = wrap(plain(heading, 120), int(width * 72 / (0.69 * size)))
    below = wrap(below, int(width * 72 / (0.6 * small)))
    gap = 0.55 * size
    axes.annotate(below, (0, 1), (0, gap), "axes fraction", "offset points", fontsize=small, color=MUTED, va="bottom")
    above = gap + 1.3 * small * (below.count("\n") + 1) + 0.3 * size
    axes.set_title(heading, loc="left", fontsize=size, fontweight="bold", color=colour, pad=above)


def wrap(text: str, letters: int) -> str:
    """Break the text into lines of at most so many letters, at spaces: names keep their hyphens, "%" its number."""
    return textwrap.fill(text.replace(" %", "\u00a0%"), max(10, letters), break_on_hyphens=False)
