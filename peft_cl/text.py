"""Text that others wrote made fit to be shown: names of classes, tasks, folders and columns, and numbers in percent.

A name may hold anything: codes that a terminal obeys, HTML, a link, a megabyte. What is shown of it is one line, not
too long, that does nothing where it stands.
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from typing import Any


#: Letters of a name that are shown; what is longer is cut.
MOST = 100
#: Format characters that scripts and emoji are written with; all others (writing direction, zero width) are escaped.
JOINERS = "\u200c\u200d"


def plain(text: Any, most: int | None = MOST) -> str:
    """Return the text as one line that a terminal shows and does not obey.

    Line breaks and tabs become spaces. Control characters, characters that change the writing direction, and halves
    of surrogate pairs become their escapes, such as `\\x1b`. All else stays as it is.

    Args:
        text: A name; what is no text is turned into some.
        most: Cut what is longer than so many characters. `None`: nothing is cut.

    Example:
        >>> plain("cat\\x1b[2J and\\tdog")
        'cat\\\\x1b[2J and dog'
    """
    text = str(text)
    if most is not None and len(text) > most:
        text = text[: most - 1] + "…"
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(letter: str) -> str:
    if letter.isprintable() or letter in JOINERS:
        return letter
    if letter.isspace() and letter not in "\x1c\x1d\x1e\x1f":
        return letter if unicodedata.category(letter) == "Zs" else " "
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


def brief(value: Any) -> str:
    """Return the value as Python writes it, cut where it is long or deep: for messages, which name what was given.

    Example:
        >>> brief([1, "two", None])
        "[1, 'two', None]"
    """
    return plain(_BRIEF.repr(value), 4 * MOST)


class _Brief(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write numbers of many digits.
        return repr(value) if value.bit_length() < 200 else f"<a number of {value.bit_length():,} bits>"


_BRIEF = _Brief()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 3, MOST, MOST, 40
_BRIEF.maxdict = _BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxset = _BRIEF.maxfrozenset = 8


def counted(count: float, what: str) -> str:
    """Return a number with what is counted, in the plural where it is not one.

    Example:
        >>> counted(1, "image"), counted(2500, "image"), counted(3, "class")
        ('1 image', '2,500 images', '3 classes')
    """
    ending = "" if count == 1 else "es" if what.endswith("s") else "s"
    return f"{count:{',g' if isinstance(count, float) else ','}} {what}{ending}"


def percent(fraction: float, decimals: int = 1) -> str:
    """Return a fraction of 1 in percent, without the sign: rounded alike everywhere, and never "-0.0".

    The same accuracy reaches a table and a picture on different ways, whose last bits differ; rounding to nine places
    first has both show the same.

    Example:
        >>> percent(0.5), percent(-0.00001), percent(0.21749999999999997)
        ('50.0', '0.0', '21.8')
    """
    return rounded(100 * fraction, decimals)


def rounded(value: float, decimals: int) -> str:
    """Return a number with so many decimals; what rounds to nothing has no sign."""
    text = f"{round(float(value), 9):.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def duration(seconds: float) -> str:
    """Return a time in words.

    Example:
        >>> duration(9.96), duration(90), duration(3700)
        ('10.0 s', '1 min 30 s', '1 h 02 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Return a number of bytes in words.

    Example:
        >>> size(512), size(1_500_000)
        ('0.5 kB', '1.50 MB')
    """
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


#: Text that Markdown and HTML show as it stands, in a line or in a cell of a table.
_HARMLESS = re.compile(r"[\w(…][\w ()/.,;'\"+:%°±=#…{}|?\[\]-]*")
#: In such a text: addresses, which become links; marks of emphasis; brackets that make a link; the start of a list.
_SPECIAL = re.compile(r"://|www\.|@|(?<!\w)_|_(?!\w)|__|\]\s*[(\[:]|^\d+[.)]\s|mailto:|xmpp:", re.IGNORECASE)


def in_markdown(text: Any, most: int = MOST) -> str:
    """Return the text such that Markdown shows its letters and nothing else: no HTML, image, link, emphasis or cell.

    A text without special characters stays as it is, another one becomes code, in which nothing has a meaning.

    Example:
        >>> in_markdown("art_painting"), in_markdown("a|b"), in_markdown("<img src=x>")
        ('art_painting', 'a\\\\|b', '`<img src=x>`')
    """
    shown = plain(text, most).strip()
    if not shown or (_HARMLESS.fullmatch(shown) and not _SPECIAL.search(shown)):
        return shown.replace("|", "\\|")
    return code(shown, most)


def code(text: Any, most: int = MOST) -> str:
    """Return the text as a span of code in Markdown, which backticks and bars in it neither end nor divide.

    Example:
        >>> code("a`b")
        '``a`b``'
    """
    shown = plain(text, most)
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}".replace("|", "\\|")


def literal(text: str) -> str:
    """Return the text as a string in double quotes in Python's source, whatever is in it; it is not cut.

    Example:
        >>> literal('my "net"')
        '"my \\\\"net\\\\""'
    """
    return '"' + "".join(_in_quotes(letter) for letter in text) + '"'


def _in_quotes(letter: str) -> str:
    if letter in '"\\':
        return f"\\{letter}"
    return letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode("ascii")
