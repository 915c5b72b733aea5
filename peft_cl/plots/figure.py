"""The figure that all pictures are drawn on: it shows text as it stands, in whatever script."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text


class PlainFigure(Figure):
    """A figure in whose text nothing has a meaning: a "$" begins no formula, whatever the user's settings are.

    Letters that its font lacks come from an installed one that has them, where there is one.
    """

    def draw(self, renderer: Any) -> None:
        for text in self.findobj(Text):
            text.set_parse_math(False)
            text.set_usetex(False)
            text.set_fontfamily(fonts_for(text))
        with warnings.catch_warnings():  # a line for each letter that no font has; an empty box shows it
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            super().draw(renderer)


def fonts_for(text: Text) -> list[str]:
    """The text's own fonts, and after them those that have the letters which these lack."""
    own = list(text.get_fontfamily())
    letters = {ord(letter) for letter in text.get_text() if not letter.isascii()}
    return [*own, *_others(tuple(own), frozenset(letters))] if letters else own


@lru_cache(maxsize=256)
def _others(own: Sequence[str], letters: frozenset[int]) -> list[str]:
    files = [font_manager.findfont(font_manager.FontProperties(family=[family])) for family in own]
    missing = set(letters).difference(*map(_letters_of, files))
    found = []
    for entry in sorted(font_manager.fontManager.ttflist, key=_unusual) if missing else ():
        has = missing & _letters_of(entry.fname)
        if has and entry.name not in own and not entry.name.startswith("Last Resort"):  # which has boxes for all
            found.append(entry.name)
            missing -= has
        if not missing:
            break
    return found


def _unusual(entry: Any) -> tuple:
    """Upright fonts of usual weight first, and the same one each time."""
    return entry.style != "normal", abs(_weight(entry.weight) - 400), entry.name, entry.fname


def _weight(weight: Any) -> int:
    return weight if isinstance(weight, int) else font_manager.weight_dict.get(weight, 400)


@cache
def _letters_of(file: str) -> frozenset[int]:
    """Code points that a font has; none of a font that cannot be read."""
    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()
