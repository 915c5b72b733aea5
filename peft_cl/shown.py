"""Values in messages: cut where they are long, and never made of all of a structure that refers to itself often."""

from __future__ import annotations

import reprlib


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 200, 200, 40
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 20


def shown(value: object) -> str:
    """The `repr` of a value, of at most some hundreds of characters for a text and some entries of a list.

    Example:
        >>> shown([1, 2, 3])
        '[1, 2, 3]'
    """
    return _SHORT.repr(value)
