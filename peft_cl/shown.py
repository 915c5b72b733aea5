"""Values in messages: cut where they are long, and never made of all of a structure that refers to itself often."""

from __future__ import annotations

import reprlib


class _Short(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 200, 200
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 20

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write numbers of many digits.
        return repr(value) if value.bit_length() < 200 else f"<a number of {value.bit_length():,} bits>"


_SHORT = _Short()


def shown(value: object) -> str:
    """The `repr` of a value, cut: some hundreds of letters of a text, some entries of a list, 1,000 letters in all.

    Example:
        >>> shown([1, 2, 3])
        '[1, 2, 3]'
    """
    text = _SHORT.repr(value)
    return text if len(text) <= 1000 else f"{text[:1000]}..."
