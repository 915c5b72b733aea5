"""What a run leaves beside its results, and must not fail by: pictures, the card, the upload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

from ..text import plain


logger = logging.get_logger(__name__)


@contextmanager
def spared(what: str) -> Iterator[None]:
    """Report what fails inside the block in one line, as a warning, and go on: the results are there already.

    Args:
        what: What is made, the first words of the line.

    Example:
        >>> with spared("No pictures of out"):
        ...     write_pictures(folder, results)    # doctest: +SKIP
    """
    try:
        yield
    except Exception as error:
        fault = str(error) or type(error).__name__
        logger.warning(plain(f"{what}, the results are whole: {fault}", 500))
